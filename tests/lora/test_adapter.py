"""The folder of an adapter: stock mlx-lm reads it, ours round-trips, damage is named."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load as stock_load

from optiq.cli import main
from optiq.errors import AdapterError
from optiq.lora.adapter import Adapter, Base, check_fits, read, read_tensors, write
from optiq.lora.layers import LowRank, put
from optiq.models.adaptable import adaptable
from optiq.sources import load, resolve
from tests.lora.models import mixed_folder


def random_adapter(folder: Path, scale: float = 1.5, seed: int = 0) -> Adapter:
    """Ranks 1 to 4 in turn, and one layer left out."""
    source = resolve(str(folder))
    model = load(source, allow_quantized=True).model
    terms = {}
    for i, module in enumerate(adaptable(model)[1:]):
        out, width = module.shape
        a, b = mx.random.split(mx.random.key(1000 * seed + i))
        rank = 1 + (i + seed) % 4
        terms[module.path] = LowRank(
            0.3 * mx.random.normal((width, rank), key=a), mx.random.normal((rank, out), key=b)
        )
    base = Base(source.name, source.fingerprint)
    return Adapter(terms, scale, base, len(model.layers), {"command": "by hand"})


def random_dora(folder: Path) -> Adapter:
    """The same layers, each row of which gets another length."""
    adapter = random_adapter(folder)
    magnitudes = {
        path: 0.5 + mx.random.uniform(shape=(term.b.shape[1],), key=mx.random.key(i))
        for i, (path, term) in enumerate(adapter.terms.items())
    }
    return replace(adapter, magnitudes=magnitudes)


def same(a: Adapter, b: Adapter) -> bool:
    return a.terms.keys() == b.terms.keys() and all(
        mx.array_equal(x, y) for p in a.terms for x, y in zip(a.terms[p], b.terms[p], strict=True)
    )


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_stock_mlx_lm_reads_mixed_ranks(tmp_path: Path, kind: str) -> None:
    folder = mixed_folder(tmp_path, kind)
    adapter = random_adapter(folder)
    write(adapter, tmp_path / "adapter")
    stock, _ = stock_load(str(folder), adapter_path=str(tmp_path / "adapter"))
    base = load(resolve(str(folder)), allow_quantized=True).model
    plain = base(mx.array([[5, 6, 7, 8]]))
    put(base, adapter.terms, adapter.scale)
    ours, theirs = (model(mx.array([[5, 6, 7, 8]])) for model in (base, stock))
    assert mx.abs(ours - theirs).max() <= 1e-4 * mx.abs(theirs).max()
    assert mx.abs(ours - plain).max() > 0.05 * mx.abs(theirs).max()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    adapter = random_adapter(mixed_folder(tmp_path))
    write(adapter, tmp_path / "a")
    found = read(tmp_path / "a")
    assert same(found, adapter)
    assert (found.scale, found.base, found.blocks, found.made) == (
        adapter.scale, adapter.base, adapter.blocks, adapter.made,
    )  # fmt: skip
    assert found.digest == adapter.digest
    assert found.ranks == adapter.ranks
    assert set(found.ranks.values()) == {1, 2, 3, 4}


def test_an_adapter_of_mlx_lm_is_read_as_it_is(tmp_path: Path) -> None:
    adapter = random_adapter(mixed_folder(tmp_path))
    write(adapter, tmp_path / "a")
    (tmp_path / "a" / "optiq" / "adapter.json").unlink()
    found = read(tmp_path / "a")
    assert found.base is None
    assert set(found.ranks.values()) == {4}  # padded
    for path, (a, b) in adapter.terms.items():
        delta = found.terms[path].a @ found.terms[path].b
        assert mx.abs(delta - a @ b).max() <= 1e-5


def test_content_decides_the_digest(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path)
    adapter = random_adapter(folder)
    assert random_adapter(folder).digest == adapter.digest
    assert random_adapter(folder, scale=2.0).digest != adapter.digest
    path = next(iter(adapter.terms))
    a, b = adapter.terms[path]
    changed = {**adapter.terms, path: LowRank(a, b.at[0, 0].add(1e-3))}
    assert Adapter(changed, adapter.scale).digest != adapter.digest


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_tensors_of_every_float_are_read(tmp_path: Path, dtype: mx.Dtype) -> None:
    # An odd number of 16-bit values first, so that the next tensor does not lie on 4 bytes.
    tensors = {"a": mx.ones((3, 1), dtype), "b": mx.random.normal((2, 3)), "c": mx.zeros((0, 4))}
    mx.save_safetensors(str(tmp_path / "t.safetensors"), tensors)
    found = read_tensors(tmp_path / "t.safetensors")
    assert {name: a.dtype for name, a in found.items()} == {
        "a": dtype, "b": mx.float32, "c": mx.float32,
    }  # fmt: skip
    for name, array in tensors.items():
        assert found[name].shape == array.shape
        assert mx.array_equal(found[name], array)


def damaged(folder: Path, how: str) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapters.safetensors"
    tensors: dict[str, mx.array] = mx.load(str(weights))  # type: ignore[assignment]
    mx.eval(tensors)
    name = next(iter(tensors))
    settings: dict[str, Any] = json.loads(config.read_text())
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-40])
        return
    if how == "dora":
        settings["fine_tune_type"] = "dora"
    if how == "full":
        settings["fine_tune_type"] = "full"
    if how == "no scale":
        del settings["lora_parameters"]["scale"]
    if how == "PEFT":
        settings = {"peft_type": "LORA"}
    if how in ("NaN", "other"):
        tensors[name] = tensors[name] * (mx.nan if how == "NaN" else 2)
    if how == "half":
        del tensors[name]
    if how == "integers":
        tensors[name] = tensors[name].astype(mx.int32)
    if how == "leaf":
        tensors["model.layers.0.self_attn.q_proj.m"] = mx.zeros((4,))
    if how == "ranks":
        tensors[name] = mx.zeros((tensors[name].shape[0], 9, 2))
    config.write_text(json.dumps(settings))
    mx.save_safetensors(str(weights), tensors)
    if how not in ("other", "ours"):
        (folder / "optiq" / "adapter.json").unlink()
    if how == "ours":
        (folder / "optiq" / "adapter.json").write_text('{"ranks": {}}')


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut", "cannot be read"),
        ("full", "'full'; lora and dora are supported"),
        ("dora", "magnitudes of .* do not fit"),
        ("no scale", "no lora_parameters with a scale"),
        ("PEFT", "optiq lora export"),
        ("NaN", "not finite"),
        ("other", "is not the file that"),
        ("integers", "as I32; F32, F16, BF16 are supported"),
        ("half", "only one half"),
        ("leaf", "only lora_a and lora_b"),
        ("ranks", "two matrices of one rank"),
        ("ours", "adapter.json is damaged"),
    ],
)
def test_damage_is_named(tmp_path: Path, how: str, reason: str) -> None:
    write(random_adapter(mixed_folder(tmp_path)), tmp_path / "a")
    damaged(tmp_path / "a", how)
    with pytest.raises(AdapterError, match=reason) as caught:
        read(tmp_path / "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "is not a folder; give the folder of an adapter"),
        ("empty", "has no adapter_config.json; give a folder that"),
        ("config alone", "adapters.safetensors cannot be read .* No such file"),
        ("no JSON", "adapter_config.json cannot be read .* copy the folder"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    folder = tmp_path / name
    if name != "nothing":
        folder.mkdir()
    if name in ("config alone", "no JSON"):
        text = '{"lora_parameters": {"scale": 1}}' if name == "config alone" else "{"
        (folder / "adapter_config.json").write_text(text)
    assert main(["lora", "info", str(folder)]) == 1
    said = capsys.readouterr().err
    assert re.search(reason, said)
    assert "Errno" not in said


def test_an_adapter_of_another_base_shape_or_module_is_refused(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path)
    adapter = random_adapter(folder)
    modules = adaptable(load(resolve(str(folder)), allow_quantized=True).model)
    assert adapter.base is not None
    check_fits(adapter, modules, adapter.base)
    with pytest.raises(AdapterError, match="was made for"):
        check_fits(adapter, modules, Base("other", "0" * 64))
    path, term = next(iter(adapter.terms.items()))
    with pytest.raises(AdapterError, match="not a linear layer"):
        check_fits(Adapter({"model.layers.7.x": term}, 1.0), modules)
    with pytest.raises(AdapterError, match=f"the adapter of {path} is"):
        check_fits(Adapter({path: LowRank(term.b.T, term.a.T[:, :-1])}, 1.0), modules)
