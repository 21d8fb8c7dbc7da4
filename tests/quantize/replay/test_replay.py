"""Running from any block on gives what a full run gives, and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from optiq.errors import SensitivityError
from optiq.formats import Format
from optiq.models.places import Wrapper
from optiq.models.roles import Module, Role, quantizable
from optiq.nn.replay import Replay, arrays
from optiq.quantize.replay.backward import survey
from optiq.quantize.sensitivity.fisher import scorable, score_by_fisher
from tests.architectures import MODELS as ARCHITECTURES
from tests.architectures import construct
from tests.families.table import family_folder
from tests.quantize.sensitivity.cases import MODELS, job, randomized, sequences, tiny_source

TOKENS = sequences(20)[0]


def check_every_suffix(model: nn.Module, cached: bool = False) -> None:
    modules = quantizable(model)

    def run() -> np.ndarray[Any, Any]:
        cache = make_prompt_cache(model) if cached else None
        return np.array(model(mx.array([TOKENS]), cache=cache)[0])

    expected = run()
    before = {path: id(m) for path, m in model.named_modules()}
    with Replay(model, modules) as replay:
        tape = replay.record(TOKENS)
        recorded = [np.array(a) for a in arrays(tape.outputs)]
        ran = replay.executions
        assert ran == len(model.layers)
        for block in (None, *range(len(model.layers))):
            module = Module("", Role.MLP, "", (1, 1), block)
            hidden = replay.final(tape, module)
            replay_logits = replay.logits(tape, hidden[0])
            assert np.array_equal(np.array(replay_logits), expected)
            assert replay.executions - ran == len(model.layers) - (block or 0)
            ran = replay.executions
        halves = [replay.logits(tape, tape.hidden[0, i : i + 10]) for i in (0, 10)]
        # Stock layers multiply ten rows by another kernel than twenty.
        together = np.concatenate([np.array(h) for h in halves])
        np.testing.assert_allclose(together, expected, 1e-5, 2e-6 * np.abs(expected).max())
        assert replay.executions == ran  # logits run no block
        # in-place arithmetic in the model has not reached what was kept
        for kept, array in zip(recorded, arrays(tape.outputs), strict=True):
            assert np.array_equal(kept, np.array(array))
    assert {path: id(m) for path, m in model.named_modules()} == before
    assert np.array_equal(run(), expected)


@pytest.mark.parametrize("name", ["gemma3n", "afm7"])
def test_keys_and_values_that_later_blocks_read_are_replayed(tmp_path: Path, name: str) -> None:
    """In these caches, as in decoding; without them Gemma 3n computes something else."""
    model, _ = load_model(family_folder(tmp_path, name))
    check_every_suffix(model, cached=True)


@pytest.mark.parametrize("name", MODELS)
def test_suffix_equals_full_run(tmp_path: Path, name: str) -> None:
    model, _ = load_model(tiny_source(tmp_path, name).path)
    check_every_suffix(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_suffix_equals_full_run_in_other_architectures(name: str) -> None:
    check_every_suffix(randomized(lambda: construct(name)))


class Residual(nn.Module):
    """A block that changes its input array in place, as many model files do with `h += ...`."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(32, 32)
        self.kind = "residual"

    def __call__(self, h: mx.array, state: mx.array) -> tuple[mx.array, list[Any], None]:
        h += nn.silu(self.up_proj(h))
        return h, [h * 0.5 + state, 3], None


class Toy(nn.Module):
    """Blocks that run twice, pass structures, are asked for their class, and share a state."""

    def __init__(self, filtered: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(64, 32)
        self.stack = {"inner": [Residual() for _ in range(3)]} if filtered else None
        self.blocks = [Residual() for _ in range(3)]
        self.lm_head = nn.Linear(32, 64, bias=False)
        self.filtered = filtered

    @property
    def layers(self) -> list[nn.Module]:
        return self.stack["inner"] if self.filtered else self.blocks[:]

    def __call__(self, tokens: mx.array) -> mx.array:
        h = self.embed_tokens(tokens)
        state = mx.zeros_like(h)
        for _ in range(2):
            for block in self.blocks:
                assert isinstance(block, Residual)
                assert block.kind == "residual"
                h, (state, three), nothing = block(h, state)
                assert three == 3
                assert nothing is None
                h += 0.1 * state
        return mx.tanh(self.lm_head(h) / 3) * 3


def test_looped_blocks_with_structured_outputs() -> None:
    model = Toy()
    modules = quantizable(model)
    expected = np.array(model(mx.array([TOKENS]) % 64)[0])
    with Replay(model, modules) as replay:
        tape = replay.record([t % 64 for t in TOKENS])
        assert replay.order == [0, 1, 2, 0, 1, 2]
        for block in range(3):
            ran = replay.executions
            module = next(m for m in modules if m.path == f"blocks.{block}.up_proj")
            hidden = replay.final(tape, Module(module.path, Role.MLP, "", (1, 1), block))
            assert np.array_equal(np.array(replay.logits(tape, hidden[0])), expected)
            assert replay.executions - ran == 6 - block


def test_blocks_that_are_in_no_list_are_refused() -> None:
    model = Toy(filtered=True)
    with pytest.raises(SensitivityError, match="one by one"):
        Replay(model, quantizable(model)).__enter__()


class Sorting(Residual):
    """Its indices are traced, and MLX has no gradients at those."""

    def __call__(self, h: mx.array, state: mx.array) -> tuple[mx.array, list[Any], None]:
        h, rest, nothing = super().__call__(h, state)
        return mx.take_along_axis(h, mx.argsort(h, axis=-1), axis=-1), rest, nothing


def test_a_survey_names_what_is_called_and_what_has_no_gradients() -> None:
    tokens = [t % 64 for t in TOKENS]
    for block, said in ((Residual, ""), (Sorting, "has no gradients")):
        model = Toy()
        model.blocks[:2] = [block(), block()]
        model.blocks[2].spare = nn.Linear(32, 32)
        modules = quantizable(model)
        with Replay(model, modules) as replay:
            called, reason = survey(replay, tokens, modules)
        assert {m.path for m in modules} - called == {"blocks.2.spare"}
        assert said in reason
        assert bool(said) == bool(reason)


def test_without_gradients_auto_measures_everything() -> None:
    model = Toy()
    model.blocks[0] = Sorting()
    work = job(model, [[t % 64 for t in TOKENS]], [Format("affine", 4, 32)])
    assert scorable(work) == set()
    with pytest.raises(SensitivityError, match=r"has no gradients .*; use --sensitivity kl"):
        score_by_fisher(work)


def test_parameters_that_a_model_assigns_reach_the_layer() -> None:
    layer = nn.Linear(4, 4)
    wrapper = Wrapper(layer)
    wrapper.weight = mx.ones((4, 4))
    assert mx.array_equal(layer.weight, mx.ones((4, 4)))
    wrapper.own = mx.zeros(3)
    assert "own" not in layer
