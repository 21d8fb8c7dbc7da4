"""Guides to families: pages say what the data says, sizes are those of real models."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from optiq import cli
from optiq.doctor.guide import commands, guide, keys, sizes
from optiq.errors import UsageError
from optiq.kv.model import entries
from optiq.models.families import FAMILIES, family_of
from optiq.quantize.export import _sampling
from tests.families.table import family_folder
from tests.tiny import tiny_folder

PAGES = Path(__file__).parents[2] / "docs" / "families"
# Parameters as the hub counts them in the makers' files.
PUBLISHED = {
    "gemma3": 999_885_952,
    "qwen3": 8_190_735_360,
    "llama": 8_030_261_248,
    "mistral": 7_248_023_552,
    "phi": 14_659_507_200,
}
# A model of tests/families for each.
TINY = {
    "gemma4": "gemma4_text_e4b",
    "gemma3": "gemma3_text",
    "qwen3_5": "qwen3_5",
    "qwen3": "qwen3",
    "llama": "llama",
    "mistral": "mistral3",
    "gpt_oss": "gpt_oss",
    "deepseek": "deepseek_v3",
    "glm": "glm4_moe",
    "phi": "phi3",
}


@pytest.mark.parametrize("key", keys())
def test_the_page_is_the_guide(key: str) -> None:
    """`optiq guide KEY > docs/families/KEY.md` writes it."""
    found = guide(key)
    assert (PAGES / f"{key}.md").read_text() == f"{found}\n"
    assert f"[{key}]({key}.md)" in (PAGES / "README.md").read_text()
    assert found.sizes is None or PUBLISHED.get(key, 0) in (0, found.sizes.parameters)


def test_every_fact_has_a_source() -> None:
    for family in FAMILIES:
        assert all(said.source for said in (*family.sampling, *family.caveats)), family.key
        assert family.written is None or family.vocabularies


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gemma3_text"])
@pytest.mark.parametrize("bits", [4, 8])
def test_sizes_are_those_of_stock(tmp_path: Path, kind: str, bits: int) -> None:
    folder = tiny_folder(tmp_path, kind, dtype="bfloat16")
    model, config = load_model(folder)
    found = sizes(config)
    tensors: Any = tree_flatten(model.parameters())
    assert found.parameters == sum(array.size for _, array in tensors)
    nn.quantize(model, 64, bits, class_predicate=_without_router)
    if kind != "qwen3_moe":  # ours has its router in the same width
        assert found.weights[bits] == sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    assert found.weights[16] == 2 * found.parameters


def _without_router(path: str, module: Any) -> bool:
    return hasattr(module, "to_quantized")


def test_the_cache_is_what_tokens_take(tmp_path: Path) -> None:
    model, config = load_model(tiny_folder(tmp_path))
    found = sizes(config)
    assert found.cache["16"] == 2 * 2 * 2 * 16 * 2 * 8192  # bytes, K and V, heads, wide, layers
    assert found.cache["8/8"] < found.cache["16"]
    assert len(entries(model)) == 2


@pytest.mark.parametrize("key", TINY)
def test_a_model_finds_its_guide(tmp_path: Path, key: str) -> None:
    folder = family_folder(tmp_path, TINY[key])
    found = guide(folder)
    assert found.family.key == key
    assert found.sizes is not None
    assert found.sizes.targets
    assert commands(found)[0] == f"optiq convert {shlex.quote(str(folder))} -o out --size 5bpw"


def test_a_model_without_a_guide_is_told_which_there_are(tmp_path: Path) -> None:
    refusal = "optiq has no guide for olmo2; it has guides for gemma4, gemma3"
    with pytest.raises(UsageError, match=refusal):
        guide(family_folder(tmp_path, "olmo2"))


def test_the_models_own_sampling_is_shown(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "qwen3")
    (folder / "generation_config.json").write_text('{"temperature": 0.3, "eos_token_id": 3}')
    assert "This model's own generation_config.json says temperature 0.3." in str(guide(folder))


GEMMA = {"model_type": "gemma3", "text_config": {"vocab_size": 262208}}
TALKS = SimpleNamespace(has_chat_template=True)


def test_sampling_is_written_where_the_source_has_none(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    written = _sampling(tmp_path, GEMMA, TALKS)
    assert written == {
        "eos_token_id": [1, 106], "do_sample": True,
        "temperature": 1.0, "top_p": 0.95, "top_k": 64, "min_p": 0.0,
    }  # fmt: skip
    assert _sampling(tmp_path, GEMMA, SimpleNamespace(has_chat_template=False)) is None
    assert _sampling(tmp_path, {**GEMMA, "text_config": {"vocab_size": 384}}, TALKS) is None
    assert _sampling(tmp_path, {"model_type": "llama", "vocab_size": 128256}, TALKS) is None
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.1}')
    assert _sampling(tmp_path, GEMMA, TALKS) is None


def test_the_family_is_that_of_the_language_model_where_the_whole_has_none() -> None:
    config = {"model_type": "some_vlm", "text_config": {"model_type": "qwen3"}}
    found = family_of(config, FAMILIES)
    assert found is not None
    assert found.key == "qwen3"


@pytest.mark.families
@pytest.mark.parametrize("key", TINY)
def test_every_command_of_a_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """On a tiny model in the place of the one named, with little text; the server answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("optiq.quantize.prepare.CALIBRATION_TOKENS", 320)
    folder = family_folder(tmp_path, TINY[key])
    (tmp_path / "data").mkdir()
    row = json.dumps({"prompt": "What is 2 + 2?", "completion": "Four."})
    (tmp_path / "data" / "train.jsonl").write_text("\n".join([row] * 8))
    *ran, served = commands(guide(folder))
    for line in ran:
        _, *argv = shlex.split(line)
        more = SMALL if (key, argv[0]) == ("deepseek", "convert") else []
        assert cli.main([*argv, *EXTRA.get(argv[0], []), *more]) == 0, line
    assert mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))
    _, *argv = shlex.split(served)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    optiq = str(Path(sys.executable).parent / "optiq")
    server = subprocess.Popen([optiq, *argv, "--port", str(port)], cwd=tmp_path)
    try:
        assert "mine" in _models(port, server)
    finally:
        server.terminate()
        server.wait()


# Rows of the tiny model divide into groups of 32 only.
SMALL = ["--formats", "3,4,5,6,8,4g32,bf16"]
EXTRA = {
    "kv": ["--context", "128", "--samples", "1"],
    "lora": ["--iters", "2"],
    "convert": ["--tokens", "320"],
}


def _models(port: int, server: subprocess.Popen[bytes]) -> set[str]:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
                names = [model["id"] for model in json.load(answer)["data"]]
                return {name.rpartition(":")[2] for name in names}
        except OSError:
            time.sleep(0.3)
    return set()
