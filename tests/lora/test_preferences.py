"""DPO against its formula with stock layers; rows of preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load

from optiq import lora
from optiq.errors import AdapterError
from optiq.lora.data import Sample
from optiq.lora.layers import LowRank
from optiq.lora.preferences import Pair, Preferences, read_pairs
from optiq.lora.tuned import Tuned
from tests.lora.models import mixed_folder, write_rows
from tests.lora.test_training import opened, random_terms, samples, stock

ROWS = [
    {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"No idea of {i + 7}."}
    for i in range(9)
]


def likelihood(model: nn.Module, sample: Sample) -> mx.array:
    logits = model(mx.array([sample.tokens]))[0]
    places = mx.array(sample.trained)
    labels = mx.array(sample.tokens)[places]
    return -nn.losses.cross_entropy(logits[places - 1], labels, reduction="sum")


@pytest.mark.parametrize("alone", [False, True])
def test_the_loss_and_its_gradient_are_those_of_the_formula(tmp_path: Path, alone: bool) -> None:
    folder = mixed_folder(tmp_path)
    a, b, c, d = samples(14, 11, 9, 16)
    pairs = [Pair(a, b), Pair(c, d)]
    model = opened(folder)
    terms = random_terms(model)
    tuned = Tuned(model, terms, 2.0, recompute=True)
    tuned.alone = "for the test" if alone else ""
    objective = Preferences(tuned, 0.3, 64)
    with tuned:
        at = tuned.parameters()
        tuned.set({n: mx.zeros_like(p) if n.endswith("lora_b") else p for n, p in at.items()})
        objective.prepare(pairs)
        (unit,) = objective.passes(pairs)
        loss, found = tuned.loss_and_gradients(at, lambda: objective.value(unit))

    base, theirs = stock_load(str(folder))[0], stock(folder, terms, 2.0)
    reference = [
        likelihood(base, p.chosen).item() - likelihood(base, p.rejected).item() for p in pairs
    ]

    def formula(model: nn.Module) -> mx.array:
        total = mx.array(0.0)
        for p, ref in zip(pairs, reference, strict=True):
            gained = likelihood(model, p.chosen) - likelihood(model, p.rejected) - ref
            total = total - mx.log(mx.sigmoid(0.3 * gained))
        return total

    expected, slopes = nn.value_and_grad(theirs, formula)(theirs)
    assert loss == pytest.approx(expected.item(), rel=5e-3)
    for name, slope in tree_flatten(slopes):
        assert mx.abs(found[name] - slope).max() <= 0.03 * mx.abs(slope).max(), name


def test_preferences_are_learned(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path)
    data = write_rows(tmp_path / "data", ROWS, ROWS[:3])
    fields: dict[str, Any] = {"iters": 8, "batch_size": 3, "learning_rate": 3e-3, "dpo": True}
    result = lora.train(str(folder), data, tmp_path / "out", progress=False, **fields)
    assert result.judged[0].loss == pytest.approx(0.6931, abs=1e-3)  # both as likely as before
    assert result.held_out_loss is not None
    assert result.held_out_loss < 0.5


def test_passes_hold_whole_pairs(tmp_path: Path) -> None:
    pairs = [Pair(s, s) for s in samples(10, 20, 12, 9, 25)]
    units = Preferences(None, 0.1, 50).passes(pairs)  # type: ignore[arg-type]
    assert [p for unit in units for p in unit] == pairs
    assert [sum(len(p.tokens) for p in unit) for unit in units] == [20, 40, 42, 50]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "chosen": "y"}, "rejected is missing"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "the same"),
        ({"text": "x"}, "prompt is missing"),
        (["x"], "prompt is missing"),
    ],
)
def test_bad_pairs_are_named_by_line(tmp_path: Path, row: Any, reason: str) -> None:
    folder = mixed_folder(tmp_path)
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row))
    tokenizer = stock_load(str(folder))[1]
    with pytest.raises(AdapterError, match=r"pairs\.jsonl line 2: .*" + reason):
        read_pairs(file, tokenizer, 64)
    file.write_text(json.dumps({**ROWS[0], "chosen": "long " * 80}))
    data = read_pairs(file, tokenizer, 48)
    assert data.cut == 1
    assert len(data.train[0].chosen.tokens) == 48


def test_the_reference_is_the_base_for_pissa_too(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path)
    data = write_rows(tmp_path / "data", ROWS, ROWS[:3])
    fields: dict[str, Any] = {"iters": 1, "batch_size": 3, "dpo": True, "init": "pissa", "rank": 2}
    result = lora.train(str(folder), data, tmp_path / "out", progress=False, **fields)
    assert result.judged[0].loss == pytest.approx(0.6931, abs=2e-3)
    assert isinstance(next(iter(result.adapter.terms.values())), LowRank)
