"""Training on architectures that share keys, slide, count or keep states: the loss and gradients
are those of stock mlx-lm, packed where that holds and alone where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from optiq.lora import start
from optiq.lora.training import parameters_of
from optiq.lora.tuned import Tuned
from optiq.nn.accelerate import accelerate
from tests.lora.test_training import NATIVE, random_terms, samples, stock_loss
from tests.nn.test_accelerate import divisible, stock
from tests.nn.test_gemma4 import KINDS

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"gemma4 {kind}": ("gemma4_text", config) for kind, config in KINDS.items()},
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "gpt2": ("gpt2", {}),
    "lfm2": ("lfm2", {}),
}
PACKED = {"gemma4 keys are values", "phi3", "olmo2"}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_stock(tmp_path: Path, case: str) -> None:
    kind, config = CASES[case]
    ours, theirs = (stock(tmp_path, kind, **config) for _ in range(2))
    for model in (ours, theirs):
        nn.quantize(model, 64, 4, class_predicate=divisible)
    accelerate(ours, blocks=False)
    batch = samples(13, 8)
    terms = random_terms(ours)
    tuned = Tuned(ours, terms, 2.0, recompute=True)
    assert (tuned.alone == "") is (case in PACKED)
    with tuned:
        units = tuned.packs(batch, 64)
        parts = [
            tuned.loss_and_gradients(tuned.parameters(), lambda unit=unit: tuned.summed(unit))
            for unit in units
        ]
    count = sum(len(s.trained) for s in batch)
    loss = sum(value for value, _ in parts) / count
    theirs.freeze()
    config = {"rank": 3, "scale": 2.0, "dropout": 0.0, "keys": sorted(terms)}
    linear_to_lora_layers(theirs, 0, config)
    theirs.load_weights(list(parameters_of(terms).items()), strict=False)
    expected, slopes = nn.value_and_grad(theirs, stock_loss)(theirs, batch)
    assert loss == pytest.approx(expected.item(), rel=NATIVE)
    for name, slope in tree_flatten(slopes):
        found = sum((g[name] for _, g in parts), mx.zeros_like(slope)) / count
        assert mx.abs(found - slope).max() <= 0.03 * mx.abs(slope).max() + 1e-6, name


def test_layers_that_nothing_calls_get_no_adapter(tmp_path: Path) -> None:
    kind, config = CASES["gemma4 shared"]
    model = stock(tmp_path, kind, **config)
    called = {m.path for m in start.chosen(model, "all")}
    assert "model.layers.0.self_attn.k_proj" in called
    assert not any(path.startswith("model.layers.3.self_attn.k_proj") for path in called)
