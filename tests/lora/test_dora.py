"""Adapters of DoRA: computed as stock mlx-lm does, merged, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load as stock_load

import optiq
from optiq import lora
from optiq.cli import main
from optiq.errors import AdapterError
from optiq.lora import peft
from optiq.lora.adapter import write
from optiq.serve.opening import open_model
from tests.lora.models import mixed_folder
from tests.lora.test_adapter import random_dora, same
from tests.lora.test_merging import error, logits, with_adapter
from tests.serve.servers import read_options, served
from tests.tiny import tiny_folder


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # without biases and with them
def test_it_computes_what_stock_mlx_lm_does(tmp_path: Path, kind: str) -> None:
    folder = tiny_folder(tmp_path, kind)  # stock takes no layers of 3, 5 or 6 bits
    write(random_dora(folder), tmp_path / "adapter")
    stock, _ = stock_load(str(folder), adapter_path=str(tmp_path / "adapter"))
    expected = logits(stock)
    assert error(with_adapter(folder, lora.read(tmp_path / "adapter")), expected) < 2e-3
    assert error(logits(optiq.load(str(folder))[0]), expected) > 0.1


def test_weights_take_it(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path, "qwen2")
    adapter = random_dora(folder)
    expected = with_adapter(folder, adapter)
    for name, dense, most in (("dense", True, 2e-3), ("rounded", False, 0.2)):
        lora.merge(folder, [(adapter, 1.0)], tmp_path / name, dense=dense)
        assert error(logits(stock_load(str(tmp_path / name))[0]), expected) < most
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("mixed", "rounded")]
    assert sizes[0] == pytest.approx(sizes[1], abs=2000)  # names in the header


def test_both_formats_bring_it_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = random_dora(mixed_folder(tmp_path))
    write(adapter, tmp_path / "ours")
    peft.write(adapter, tmp_path / "peft")
    for folder in (tmp_path / "ours", tmp_path / "peft"):
        found = lora.read(folder)
        assert same(found, adapter)
        assert found.digest == adapter.digest
        assert found.magnitudes.keys() == adapter.magnitudes.keys()
        assert all(mx.array_equal(m, adapter.magnitudes[p]) for p, m in found.magnitudes.items())
    (tmp_path / "ours" / "optiq" / "adapter.json").unlink()
    assert lora.read(tmp_path / "ours").magnitudes.keys() == adapter.magnitudes.keys()
    assert main(["lora", "info", str(tmp_path / "peft")]) == 0
    assert "DoRA" in capsys.readouterr().out


def test_it_is_refused_where_only_terms_are_added(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path)
    adapter = random_dora(folder)
    assert lora.combined([(adapter, 1.0)]) is adapter
    with pytest.raises(AdapterError, match=r"sum of adapters .* DoRA.*optiq lora merge"):
        lora.combined([(adapter, 0.5)])
    write(adapter, tmp_path / "adapter")
    mounted = tuple((name, str(tmp_path / "adapter")) for name in "ab")
    read = read_options({"adapters": mounted})
    with served(open_model(str(folder), read), read) as asked:
        body = {"messages": [{"role": "user", "content": "hi"}], "adapter": "a=0.5+b=0.5"}
        refused = asked.post("/v1/chat/completions", body, status=400)
    assert "does not go with DoRA" in refused["error"]["message"]
