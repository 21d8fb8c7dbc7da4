"""An answer on a GPU whose kernels raise in the middle of it, with a CPU that says it is one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import load, stream_generate

from optiq.nn.accelerate import accelerate
from optiq.ops import native
from optiq.runtime.generate import Request, prompt_tokens, stream
from tests.ops.test_on_gpu import Extension, raised_later
from tests.tiny import tiny_folder

REQUEST = Request("What is the capital of France?", max_tokens=12)


def test_it_goes_on_with_stock_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(str(tiny_folder(tmp_path)))
    nn.quantize(model, 64, 4)
    prompt = prompt_tokens(tokenizer, REQUEST)
    expected = list(stream_generate(model, tokenizer, prompt, max_tokens=12))
    extension = Extension()
    monkeypatch.setattr(native, "device", lambda: "metal")
    monkeypatch.setattr(native, "extension", extension)
    assert accelerate(model).fused
    extension.calls.clear()

    def late(y: Any, *args: Any) -> Any:
        return [raised_later(a) for a in y] if sum(extension.calls.values()) > 30 else y

    extension.faults["mixed_quantized_matmul"] = late
    with pytest.warns(
        RuntimeWarning, match=r"a graph with them raised .*float32.* goes on"
    ) as warned:
        pieces = list(stream(model, tokenizer, REQUEST))
    assert len(warned) == 1
    assert [p.token for p in pieces] == [p.token for p in expected]
    assert "".join(p.text for p in pieces) == "".join(p.text for p in expected)
    assert pieces[-1].prompt_tokens == len(prompt)
    assert pieces[-1].generation_tokens == expected[-1].generation_tokens
    extension.calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(stream(model, tokenizer, REQUEST))) == len(pieces)
    assert not extension.calls


def test_what_raises_without_our_kernels_is_raised(tmp_path: Path) -> None:
    model, tokenizer = load(str(tiny_folder(tmp_path)))

    class Broken(nn.Module):
        layers = model.layers

        def __call__(self, x: mx.array, cache: Any = None) -> mx.array:
            return raised_later(model(x, cache=cache))

    with pytest.raises(RuntimeError, match="float32"):
        list(stream(Broken(), tokenizer, REQUEST))
