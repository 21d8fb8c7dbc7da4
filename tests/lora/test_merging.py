"""Adapters in the weights, several as one, and beside the layers of a model that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load as stock_load

import optiq
from optiq import lora
from optiq.cli import main
from optiq.errors import AdapterError, KVError, UsageError
from optiq.lora import peft
from optiq.lora.adapter import Adapter, write
from optiq.lora.layers import LowRank
from optiq.models.places import place_at
from optiq.nn.layers import dequantized
from tests.lora.models import mixed_folder
from tests.lora.test_adapter import random_adapter

IDS = [[5, 6, 7, 8, 9]]


def logits(model: Any) -> mx.array:
    out: mx.array = model(mx.array(IDS))
    return out


def error(a: mx.array, b: mx.array) -> float:
    return float((mx.abs(a - b).max() / mx.abs(b).max()).item())


def with_adapter(folder: Path, adapter: Adapter) -> mx.array:
    return logits(optiq.load(str(folder), adapter=adapter)[0])


def test_a_dense_merge_computes_what_the_adapter_does(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path)
    adapter = random_adapter(folder)
    lora.merge(folder, [(adapter, 1.0)], tmp_path / "out", dense=True)
    stock, _ = stock_load(str(tmp_path / "out"))
    assert error(logits(stock), with_adapter(folder, adapter)) < 2e-3


def test_a_requantized_merge_keeps_formats_and_bytes(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path)
    adapter = random_adapter(folder)
    lora.merge(folder, [(adapter, 1.0)], tmp_path / "out")
    stock, tokenizer = stock_load(str(tmp_path / "out"))
    base, _ = stock_load(str(folder))
    assert tokenizer.encode("hello")
    for path, (a, b) in adapter.terms.items():
        before, after = (place_at(model, path).get() for model in (base, stock))
        truth = dequantized(before) + adapter.scale * (a @ b).T
        step = mx.repeat(mx.abs(after.scales), after.group_size, axis=-1)
        off = mx.abs(dequantized(after) - truth)
        assert (off <= 1.01 * step).all()  # an edge of stock's grid may be off by one step
        assert mx.mean(off <= 0.51 * step).item() > 0.95

    def stored(where: Path) -> dict[str, tuple[Any, Any]]:
        tensors = mx.load(str(where / "model.safetensors"))
        return {name: (a.shape, a.dtype) for name, a in tensors.items()}  # type: ignore[union-attr]

    assert stored(tmp_path / "out") == stored(folder)
    assert not list(tmp_path.glob(".*partial"))


def test_a_weighted_sum_is_one_adapter(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path)
    a, b = random_adapter(folder), random_adapter(folder, scale=0.5)
    path = next(iter(b.terms))
    b = Adapter({path: LowRank(b.terms[path].a, 2 * b.terms[path].b)}, 0.5, b.base, b.blocks)
    both = lora.combined([(a, 0.5), (b, -2.0)])
    for p in a.terms:
        expected = 0.5 * a.scale * a.terms[p].a @ a.terms[p].b
        if p == path:
            expected = expected - 2.0 * 0.5 * b.terms[p].a @ b.terms[p].b
        got = both.scale * both.terms[p].a @ both.terms[p].b
        assert mx.abs(got - expected).max() <= 1e-5 * mx.abs(expected).max()
    assert both.ranks[path] == a.ranks[path] + b.ranks[path]
    assert lora.combined([(a, 1.0)]) is a


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    one, two = mixed_folder(tmp_path, name="one"), mixed_folder(tmp_path, name="two", seed=1)
    a, b = random_adapter(one), random_adapter(two)
    with pytest.raises(AdapterError, match="different models"):
        lora.combined([(a, 1.0), (b, 1.0)])
    with pytest.raises(AdapterError, match="was made for"):
        lora.merge(one, [(b, 1.0)], tmp_path / "out")
    with pytest.raises(AdapterError, match="was made for"):
        optiq.load(str(one), adapter=b)
    with pytest.raises(UsageError, match="exists"):
        lora.merge(one, [(a, 1.0)], two)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_a_loaded_adapter_answers_as_stock_mlx_lm_does(tmp_path: Path, kind: str) -> None:
    folder = mixed_folder(tmp_path, kind)
    write(random_adapter(folder), tmp_path / "a")
    peft.write(random_adapter(folder), tmp_path / "p")
    stock, _ = stock_load(str(folder), adapter_path=str(tmp_path / "a"))
    for name in ("a", "p"):
        ours, _ = optiq.load(str(folder), adapter=tmp_path / name)
        assert error(logits(ours), logits(stock)) < 2e-3


def test_generation_uses_the_adapter_and_does_not_mix_prompts(tmp_path: Path) -> None:
    folder = str(mixed_folder(tmp_path))
    write(random_adapter(Path(folder)), tmp_path / "a")
    asked: dict[str, Any] = {"max_tokens": 12}
    plain = optiq.generate(folder, "Where?", **asked)
    adapted = optiq.generate(folder, "Where?", adapter=tmp_path / "a", **asked)
    loaded = optiq.load(folder, adapter=tmp_path / "a")
    assert adapted.text == optiq.generate(loaded, "Where?", **asked).text
    assert adapted.text != plain.text
    cache = tmp_path / "kept.safetensors"
    optiq.generate(folder, "Where?", prompt_cache=cache, **asked)
    with pytest.raises(KVError):
        optiq.generate(folder, "Where?", adapter=tmp_path / "a", prompt_cache=cache, **asked)
    with pytest.raises(UsageError, match="adapter"):
        optiq.generate(loaded, "Where?", adapter=tmp_path / "a")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = mixed_folder(tmp_path)
    a, p, back, out = (str(tmp_path / name) for name in ("a", "p", "back", "out"))
    adapter = random_adapter(folder)
    write(adapter, Path(a))
    assert main(["lora", "info", a]) == 0
    assert f"sha256     {adapter.digest}" in capsys.readouterr().out
    assert main(["lora", "export", a, "--to", "peft", "-o", p]) == 0
    assert main(["lora", "export", p, "--to", "mlx", "-o", back, "--json"]) == 0
    assert lora.read(back).digest == adapter.digest
    assert main(["lora", "export", a, f"{a}=-1", "--to", "mlx", "-o", str(tmp_path / "none")]) == 0
    capsys.readouterr()
    assert main(["lora", "merge", str(folder), "--adapter", a, "-o", out, "--dense"]) == 0
    assert "bytes" in capsys.readouterr().out
    assert main(["lora", "merge", str(folder), "--adapter", f"{a}=x", "-o", out]) == 2
    assert main(["lora", "info", str(folder)]) == 1
    assert "adapter_config.json" in capsys.readouterr().err
