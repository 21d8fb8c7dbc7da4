"""Choices of experts that a rounded router changes, against stock models with that router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.utils import load_model

from optiq.formats import DENSE, Format
from optiq.models.places import place_at
from optiq.models.roles import Role
from optiq.planning.plan import MOST_FLIPS, build
from optiq.planning.proposals import propose
from optiq.planning.scores import Scores
from optiq.planning.size import Size
from optiq.quantize.options import Options
from optiq.quantize.rounding.weights import MINMAX
from optiq.quantize.sensitivity.measure import measure
from optiq.report import conversion_page
from optiq.sources import load, resolve
from tests.quantize.sensitivity.cases import calibration
from tests.tiny import tiny_folder

TEXT = calibration(40, 60, 30)
EIGHT = Format("affine", 8, 64)
ROUTERS = ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("flips"), "qwen3_moe", num_experts=16)


@pytest.fixture(scope="module")
def scores(folder: Path) -> Scores:
    options = Options(sensitivity="auto", rounding="minmax", progress=False)
    return measure(load(resolve(str(folder))), TEXT, options, rounding=MINMAX)


@contextmanager
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray[Any, Any]]]:
    """The experts that stock mlx-lm asks, call by call."""
    asked: list[np.ndarray[Any, Any]] = []
    call = SwitchGLU.__call__

    def noting(self: Any, x: mx.array, indices: mx.array) -> Any:
        asked.append(np.array(indices))
        return call(self, x, indices)

    with monkeypatch.context() as patched:
        patched.setattr(SwitchGLU, "__call__", noting)
        yield asked


@pytest.mark.parametrize("path", ROUTERS)
def test_flips_are_those_of_the_stock_model(
    folder: Path, scores: Scores, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = ROUTERS.index(path)
    found = next(s for s in scores.modules if s.module.path == path)
    model = load_model(folder)[0]
    place = place_at(model, path)
    rounded: nn.Module = place.get().to_quantized(64, 8)
    flipped = choices = 0
    for sample in TEXT.sequences:
        with heard(monkeypatch) as asked:
            tokens = mx.array([list(sample.tokens)])
            model(tokens)
            with place.holding(rounded):
                model(tokens)
        before, after = asked[layer][0], asked[layer + 2][0]
        for a, b in zip(before.tolist(), after.tolist(), strict=True):
            flipped += len(set(a) - set(b))
            choices += len(a)
    assert flipped
    assert found.scores[EIGHT].flips == pytest.approx(flipped / choices, abs=1e-9)
    assert found.scores[DENSE].flips is None


def test_they_are_kept_and_shown(scores: Scores) -> None:
    assert Scores.from_json(scores.to_json()).modules == scores.modules
    others = [s for s in scores.modules if s.module.role is not Role.ROUTER]
    assert all(score.flips is None for s in others for score in s.scores.values())
    page = conversion_page(build(scores, Size.parse("6bpw")), scores)
    assert "choices of experts that change" in page


def test_a_router_takes_no_format_that_changes_too_much(scores: Scores) -> None:
    def given(flips: float) -> set[Format]:
        changed = tuple(
            replace(s, scores={f: replace(x, flips=flips) if x.flips is not None else x
                               for f, x in s.scores.items()})
            for s in scores.modules
        )  # fmt: skip
        plans = propose(replace(scores, modules=changed), Size.parse("6bpw"))
        return {m.format for p in plans.values() for m in p.modules if m.module.path in ROUTERS}

    assert EIGHT in given(MOST_FLIPS)
    assert given(MOST_FLIPS + 0.01) == {DENSE}
