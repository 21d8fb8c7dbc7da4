"""The arithmetic of what a conversion takes, and what --memory leaves out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from optiq.base import memory as base
from optiq.calibration import Texts
from optiq.errors import UsageError
from optiq.formats import DENSE
from optiq.models.roles import Module, Role, allowed
from optiq.quantize import footprint, memory
from optiq.quantize.footprint import Shapes, shapes_of
from optiq.quantize.memory import SCORES, affordable, peak, phases
from optiq.quantize.options import Options
from optiq.quantize.sensitivity.weight_error import ELEMENTS
from optiq.sources import load, resolve
from tests.quantize.sensitivity.cases import calibration
from tests.tiny import tiny_folder

WIDTH, INNER, WORDS, BLOCKS = 4096, 14336, 128256, 32


def llama() -> Shapes:
    """The shape of a llama of 8 billion weights."""
    modules = [Module("e", Role.EMBEDDING, "e", (WORDS, WIDTH), None)]
    for i in range(BLOCKS):
        parts = {"q": (WIDTH, WIDTH), "k": (1024, WIDTH), "v": (1024, WIDTH), "o": (WIDTH, WIDTH)}
        for name, shape in parts.items():
            modules.append(Module(f"{i}.{name}", Role.ATTENTION, f"{i}.{name}", shape, i))
        for name, shape in {"g": (INNER, WIDTH), "u": (INNER, WIDTH), "d": (WIDTH, INNER)}.items():
            modules.append(Module(f"{i}.{name}", Role.MLP, f"{i}.{name}", shape, i))
    return Shapes([*modules, Module("h", Role.HEAD, "h", (WORDS, WIDTH), None)], 2, 0)


def texts(tokens: int, length: int = 256) -> Texts:
    text = calibration(*[length] * (tokens // length))
    return Texts(text, text, [], text)


def test_of_weights_the_largest_block_or_head_counts() -> None:
    shapes = llama()
    block = 2 * (2 * WIDTH**2 + 2 * 1024 * WIDTH + 3 * WIDTH * INNER)
    assert (shapes.block, shapes.outside) == (block, 2 * WORDS * WIDTH)
    assert shapes.dense == BLOCKS * block + 2 * shapes.outside
    found = phases(shapes, texts(1024), Options.parse(effort="quick"), 4_500_000_000)
    passing = found[SCORES].parts
    assert passing["weights"] == shapes.block + shapes.outside  # the first block's input
    exact = phases(shapes, texts(1024), Options(sensitivity="kl"), 4_500_000_000)
    assert exact[SCORES].parts["weights"] == shapes.dense  # run again and again


def test_outputs_of_all_blocks_are_recorded_but_fitted_weights_are_in_files() -> None:
    shapes, options = llama(), Options.parse(effort="quick")
    for plan in (10**9, 10**10):
        found = phases(shapes, texts(2048), options, plan)["fitting weights"].parts
        assert found["block outputs"] == 4 * 2048 * WIDTH * (BLOCKS + 1)
        assert found["block outputs"] + 4e9 > sum(found.values())


def test_of_few_tokens_a_llama_of_8_billion_weights_takes_little() -> None:
    def fitting(tokens: int, options: Options) -> float:
        return phases(llama(), texts(tokens), options, 4_520_000_000)["fitting weights"].total

    quick = Options.parse(effort="quick")
    assert fitting(1024, quick) < 3.5e9
    assert fitting(8192, quick) > fitting(1024, quick) + 4e9  # H of 14,336 columns
    assert fitting(1024, Options()) > fitting(1024, quick) + 2e9  # rows go together


def small() -> Shapes:
    """A model that is mostly its embedding, which is its head."""
    modules = [Module("e", Role.EMBEDDING, "e", (49152, 576), None, tied=True)]
    for i in range(4):
        for name, shape in {"g": (1536, 576), "u": (1536, 576), "d": (576, 1536)}.items():
            modules.append(Module(f"{i}.{name}", Role.MLP, f"{i}.{name}", shape, i))
    return Shapes(modules, 2, 0)


def test_at_the_head_there_are_its_formats_and_no_gradients() -> None:
    shapes, options = small(), Options.parse(effort="quick")
    head = shapes.modules[0]
    formats = [f for f in allowed(head, options.menu) if f != DENSE]
    compared = 2 * 4 * ELEMENTS  # in float32
    parts = phases(shapes, texts(1024, 64), options, 10**8)[SCORES].parts
    logits = 3 * 4 * 64 * 49152
    assert parts["at work"] == sum(f.nbytes(head.shape, 2) for f in formats) + logits + compared
    longer = phases(shapes, texts(1024), options, 10**8)[SCORES].parts
    assert longer["at work"] == 7 * 4 * 256 * 49152  # the way back from more logits
    assert "gradients" not in parts


def test_of_an_embedding_some_rows_are_fitted_at_a_time() -> None:
    options = Options.parse(effort="quick")
    parts = phases(small(), texts(1024, 64), options, 10**8)["fitting weights"].parts
    rows = 6 * 4 * 8192 * 576
    eight = max(f.nbytes((49152, 576)) for f in options.menu if f != DENSE)
    held = 49152 * 576 * 2 + 2 * eight  # in parts and joined
    assert parts["a block or head at work"] == held + 5 * 4 * 576**2 + rows
    few = phases(small(), texts(256, 64), options, 10**8)["fitting weights"].parts
    rows = 4 * (5 * 256 * 576 + 4 * 8192 * 576)  # the rows of 256 tokens stand for H
    assert few["a block or head at work"] == held + rows
    whole = phases(small(), texts(1024), options, 10**8)["fitting weights"].parts
    back = small().passed + 7 * 4 * 256 * 49152  # the logits of a longer sequence
    assert whole["a block or head at work"] == back


def test_the_process_is_as_large_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(resolve(str(tiny_folder(tmp_path))))
    for held in (0, 10**10):
        monkeypatch.setattr(footprint, "held_memory", lambda held=held: held)
        assert shapes_of(loaded).process == max(footprint.PROCESS, held + footprint.LATER)


def test_more_of_anything_takes_more() -> None:
    shapes, options = llama(), Options.parse(effort="quick")
    before = peak(phases(shapes, texts(1024), options, 10**9))[1].total
    assert peak(phases(shapes, texts(8192), options, 10**9))[1].total > before
    kl = Options(sensitivity="kl")
    assert peak(phases(shapes, texts(1024), kl, 10**9))[1].total > before


def test_what_does_not_fit_is_left_out_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(memory, "tell", said.append)
    monkeypatch.setattr(footprint, "held_memory", lambda: 0)
    loaded = load(resolve(str(tiny_folder(tmp_path, hidden_size=256, num_hidden_layers=8))))
    options = Options.parse(tokens=4096, held_out_tokens=640)
    asked, found, needs = affordable(loaded, options)
    assert asked == options
    assert needs.total > shapes_of(loaded).dense
    enough = replace(options, memory=needs.total)
    assert affordable(loaded, enough)[0] == enough
    less, fewer, kept = affordable(loaded, replace(options, memory=needs.total - 1))
    assert (less.sensitivity, less.tokens) != (options.sensitivity, options.tokens)
    assert len(fewer.calibration.sequences) <= len(found.calibration.sequences)
    assert kept.total < needs.total
    assert [text[:19] for text in said] == ["to keep to --memory"]
    with pytest.raises(UsageError, match=r"is not enough: .* takes at most .*; raise --memory to"):
        affordable(loaded, replace(options, memory=1000))


def test_within_a_limit_no_more_is_available() -> None:
    free, held = base.available_memory(), base.held_memory()
    with base.limited(held + 10**8):
        assert base.available_memory() == pytest.approx(10**8, abs=5e7)
        with base.limited(None):  # says nothing
            assert base.available_memory() < 2 * 10**8
        with base.limited(1):
            assert base.available_memory() == 0
    assert base.available_memory() > free // 2
