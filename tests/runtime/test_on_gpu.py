"""An answer on a GPU whose kernels raise in the middle of it, with a CPU that says it is one."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import load, stream_generate

from optiq.nn.accelerate import accelerate
from optiq.ops import contest
from optiq.ops.contest import Timings
from optiq.runtime.generate import Request, prompt_tokens, stream
from tests.ops.test_on_gpu import HOW, Extension, broken, on_device, raised_later
from tests.tiny import tiny_folder

REQUEST = Request("What is the capital of France?", max_tokens=12)


def test_it_goes_on_with_stock_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(str(tiny_folder(tmp_path)))
    nn.quantize(model, 64, 4)
    prompt = prompt_tokens(tokenizer, REQUEST)
    expected = list(stream_generate(model, tokenizer, prompt, max_tokens=12))
    extension = Extension()
    on_device(monkeypatch, extension)
    assert accelerate(model).fused
    extension.calls.clear()

    def late(y: Any, *args: Any, **options: Any) -> Any:
        return [raised_later(a) for a in y] if sum(extension.calls.values()) > 30 else y

    extension.faults |= dict.fromkeys(("mixed_quantized_matmul", "decode_layer"), late)
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


LAUNCHES = ("quantized_matmul", "mixed_quantized_matmul", "decode_layer")
# What goes wrong, and at which launch for the first time: one that does not compile (library,
# function, pipeline) or does not run raises in mx.eval, from the first on or later; one that cannot
# be encoded raises at once.
FAULTS = [
    *((how, 1, True) for how in HOW),
    *((how, 5, False) for how in HOW),
    ("raises", 40, True),
    ("raises in eval", 150, True),
    *(
        pytest.param(*fault, marks=pytest.mark.schedules)
        for fault in (*((how, 5, True) for how in HOW), ("raises", 150, True),
                      ("raises in eval", 40, True))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("how", "launch", "lasting"), FAULTS)
def test_whatever_fails_the_tokens_are_those_of_stock_mlx(
    how: str, launch: int, lasting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first trial to the last token, with one warning."""
    model, tokenizer = load(str(tiny_folder(tmp_path)))
    nn.quantize(model, 64, 4)
    prompt = prompt_tokens(tokenizer, REQUEST)
    expected = [p.token for p in stream_generate(model, tokenizer, prompt, max_tokens=12)]
    extension = Extension()
    on_device(monkeypatch, extension)
    monkeypatch.setenv("OPTIQ_METAL", "auto")
    timings = Timings(tmp_path / "cache", {"chip": "M9"})
    monkeypatch.setattr(contest, "timings", lambda: timings)
    ours_wins = itertools.cycle([0.0, 1.0, 0.0, 5.0])  # seconds before and after ours, then stock
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += next(ours_wins)
        return now

    monkeypatch.setattr(contest, "clock", clock)
    failed = 0

    def fault(y: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        count = sum(extension.calls[name] for name in LAUNCHES)
        if count < launch or (failed and not lasting):
            return y
        failed += 1
        return broken(how)(y)

    extension.faults = dict.fromkeys(LAUNCHES, fault)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        accelerate(model)
        got = [p.token for p in stream(model, tokenizer, REQUEST)]
        again = [p.token for p in stream(model, tokenizer, REQUEST)]
    assert got == again == expected
    assert failed
    mine = [str(w.message) for w in warned if "Metal kernel" in str(w.message)]
    assert len(mine) == (0 if how == "wrong" and not lasting and launch == 5 else 1), mine


def test_what_raises_without_our_kernels_is_raised(tmp_path: Path) -> None:
    model, tokenizer = load(str(tiny_folder(tmp_path)))

    class Broken(nn.Module):
        layers = model.layers

        def __call__(self, x: mx.array, cache: Any = None) -> mx.array:
            return raised_later(model(x, cache=cache))

    with pytest.raises(RuntimeError, match="float32"):
        list(stream(Broken(), tokenizer, REQUEST))
