"""Memory and time of a conversion at real sizes, on random weights: stated, measured, by phase.

    python -m bench.memory 135m 400m 1.5b 8b 30b-a3b [--blocks N] [--folder DIR]
        [--options JSON]

Each model is written to DIR in bf16, a shard for every 500 MB, converted in a process of its own
with these options of `optiq.convert`, and removed. With --blocks it has so many of its blocks: from
two such runs follows what one block costs. Random weights take as long as real ones, and as much
memory; their KL says nothing. Where others compute on the machine, seconds of the processor say
more than those of a clock. An 8b model takes 16 GB on the disk, and the result 5 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from optiq.sources.folder import INDEX
from optiq.sources.safetensors import encode_header
from tests.tiny import tiny_folder

_LLAMA: dict[str, Any] = {"head_dim": 64, "num_key_value_heads": 8, "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "135m": _LLAMA
    | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "400m": _LLAMA
    | {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24}
    | {"num_attention_heads": 16, "vocab_size": 49152},
    "1.5b": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    | {"num_attention_heads": 32, "vocab_size": 49152},
    "8b": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "head_dim": 128, "vocab_size": 128256}
    | {"tie_word_embeddings": False},
    "30b-a3b": {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768}
    | {"num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "head_dim": 128}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936}
    | {"tie_word_embeddings": False},
}
SHARD = 500_000_000  # bytes

CONVERT = """
import json, sys, time, optiq
model, out, options = sys.argv[1:]
found = optiq.convert(model, out, **json.loads(options))
took = [found.seconds, time.process_time(), dict(found.phases)]
print(json.dumps([found.memory.stated, found.memory.peak, *took]))
"""


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a llama or a qwen3_moe."""
    width, dim = config["hidden_size"], config["head_dim"]
    queries, keys = (config[f"num_{n}_heads"] * dim for n in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{norm}.weight", (width,)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, width)
        yield f"{at}.self_attn.o_proj.weight", (width, queries)
        mlps = {f"{at}.mlp": config["intermediate_size"]}
        if experts := config.get("num_experts"):
            inner = config["moe_intermediate_size"]
            mlps = {f"{at}.mlp.experts.{e}": inner for e in range(experts)}
            yield f"{at}.mlp.gate.weight", (experts, width)
            for norm in ("q_norm", "k_norm"):
                yield f"{at}.self_attn.{norm}.weight", (dim,)
        for mlp, inner in mlps.items():
            yield f"{mlp}.gate_proj.weight", (inner, width)
            yield f"{mlp}.up_proj.weight", (inner, width)
            yield f"{mlp}.down_proj.weight", (width, inner)
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], width)


def write(folder: Path, shape: dict[str, Any]) -> Path:
    """A model of this shape; tokenizer and config.json are those of the tests' tiny models."""
    kind = "qwen3_moe" if "num_experts" in shape else "llama"
    found = tiny_folder(folder, kind, name="model")
    (found / "model.safetensors").unlink()
    config = json.loads((found / "config.json").read_text()) | shape | {"torch_dtype": "bfloat16"}
    (found / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, of in tensors(config):
        if 2 * sum(map(prod, shards[-1].values())) > SHARD:
            shards.append({})
        shards[-1][name] = of
    draws = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32)
    weight_map = {}
    for n, shard in enumerate(shards, start=1):
        file = found / f"model-{n:05}-of-{len(shards):05}.safetensors"
        with file.open("wb") as out:
            out.write(encode_header({name: ("BF16", of) for name, of in shard.items()}, {}))
            for name, of in shard.items():
                weight_map[name] = file.name
                scale = np.float32(1.0 if len(of) == 1 else of[-1] ** -0.5)
                for start in range(0, prod(of), len(draws)):
                    part = scale * draws[: prod(of) - start]
                    (np.ones_like(part) if len(of) == 1 else part).view(np.uint16)[1::2].tofile(out)
    (found / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return found


def run(name: str, blocks: int | None, parent: Path | None, options: dict[str, Any]) -> None:
    shape = SHAPES[name] | ({"num_hidden_layers": blocks} if blocks else {})
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        model = write(Path(folder), shape)
        nbytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        command = [sys.executable, "-c", CONVERT, str(model), f"{folder}/out", json.dumps(options)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    stated, peak, seconds, busy, phases = json.loads(ran.stdout)
    print(
        f"{name}, {shape['num_hidden_layers']} blocks, {nbytes / 1e9:.2f} GB: {seconds:.0f} s "
        f"({busy:.0f} s of the processor), peak {peak / 1e9:.2f} GB ({peak / nbytes:.2f} of the "
        f"weights), stated {stated / 1e9:.2f} GB ({stated / peak:.2f} of the peak)"
    )
    for phase, took in phases.items():
        print(f"    {phase:24s} {took:8.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--blocks", type=int, help="of each model; default: all")
    parser.add_argument("--folder", type=Path, help="where models are written")
    parser.add_argument("--options", type=json.loads, default={}, help='JSON: {"effort": "quick"}')
    args = parser.parse_args()
    for name in args.shapes:
        run(name, args.blocks, args.folder, args.options)


if __name__ == "__main__":
    main()
