"""Models ready to run: loaded with native layers, or rounded in memory as a plan says."""

from __future__ import annotations

from math import prod
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load
from mlx_lm.utils import load_model

import optiq
from optiq import nn as native
from optiq.errors import SourceError
from optiq.models.roles import quantizable
from optiq.models.size import model_size
from optiq.quantize.export import export
from optiq.quantize.rounding.render import render_model
from optiq.runtime.loading import load
from optiq.sources import load as load_source
from tests.planned import VARIANTS, scores_of, source_of, uniform
from tests.scored import build
from tests.tiny import tiny_folder

NATIVE = (native.Linear, native.QuantizedLinear)
TOKENS = mx.array([[1, 5, 9, 200, 17, 33, 4, 250, 11, 12, 13, 14]])


def close(a: mx.array, b: mx.array) -> bool:
    """Up to activations in 16-bit fixed point, as in tests/nn/test_accelerate.py."""
    return mx.abs(a - b).max().item() <= 1e-3 * mx.abs(b).max().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_loading_gives_the_stock_model_with_native_layers(tmp_path: Path, variant: str) -> None:
    source = source_of(tmp_path, variant)
    export(source, build(scores_of(source), "5.3bpw"), tmp_path / "out")
    for folder in (source.path, tmp_path / "out"):
        model, tokenizer = optiq.load(str(folder))
        expected, stock_tokenizer = stock_load(str(folder))
        expected.set_dtype(mx.float32)
        assert isinstance(model.model.layers[0].self_attn.o_proj, NATIVE)
        assert close(model(TOKENS), expected(TOKENS))
        assert tokenizer.encode("The river") == stock_tokenizer.encode("The river")


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no folder"):
        load(str(tmp_path / "none"))
    folder = tiny_folder(tmp_path)
    with pytest.raises(SourceError, match="only applies to a hub id"):
        load(str(folder), revision="main")


@pytest.mark.parametrize("variant", VARIANTS)
def test_rendering_equals_exporting_and_loading(tmp_path: Path, variant: str) -> None:
    source = source_of(tmp_path, variant)
    for i, plan in enumerate((build(scores_of(source), "5.3bpw"), uniform(source))):
        model = render_model(load_source(source), plan)
        export(source, plan, tmp_path / f"out{i}")
        expected, _ = load_model(tmp_path / f"out{i}")
        stored = dict(tree_flatten(expected.parameters()))
        for name, array in tree_flatten(model.parameters()):
            assert mx.array_equal(array, stored.pop(name)), name
        assert not stored
        expected.set_dtype(mx.float32)
        assert close(model(TOKENS), expected(TOKENS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_size_is_that_of_the_plan(tmp_path: Path, variant: str) -> None:
    source = source_of(tmp_path, variant)
    dense = load_source(source).model
    count = sum(a.size for _, a in tree_flatten(dense.parameters()))
    nbytes = sum(a.nbytes for _, a in tree_flatten(dense.parameters()))
    assert model_size(dense) == (nbytes, 8 * nbytes / count)
    plan = build(scores_of(source), "5.3bpw")
    export(source, plan, tmp_path / "out")
    assert model_size(load_model(tmp_path / "out")[0]) == (plan.nbytes, plan.bpw)


def test_size_of_other_quantizations(tmp_path: Path) -> None:
    model, _ = load_model(tiny_folder(tmp_path, "qwen2", tie_word_embeddings=False))
    modules = quantizable(model)
    count = sum(a.size for _, a in tree_flatten(model.parameters()))
    rest = 4 * (count - sum(prod(m.shape) for m in modules))
    nn.quantize(model, 32, 4, mode="mxfp4")
    weights = sum(prod(m.shape) // 2 + prod(m.shape) // 32 for m in modules)
    assert model_size(model) == (rest + weights, 8 * (rest + weights) / count)
