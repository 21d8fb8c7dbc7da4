"""Weights in the order in which the CPU reads them: the same products, the same bytes, one copy."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import save_model

import optiq
from optiq.nn.layers import QuantizedLinear
from optiq.nn.tiled import tile, tiles_of
from optiq.ops import native
from tests.nn.test_accelerate import TOKENS, divisible, leaves, stock

FORMATS = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
ROWS = 48  # a multiple of any number of rows that are read at a time


@pytest.fixture(autouse=True)
def kernels() -> None:
    if not native.active():
        pytest.skip("tiles need the native part")


def layer(bits: int, group: int, dtype: mx.Dtype = mx.bfloat16, rows: int = ROWS) -> Any:
    mx.random.seed(bits)
    linear = nn.Linear(384, rows)
    linear.set_dtype(dtype)
    return QuantizedLinear.adopt(nn.QuantizedLinear.from_linear(linear, group, bits))


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_tiled_layer_is_the_same_layer(bits: int, group: int, dtype: mx.Dtype) -> None:
    plain, tiled = layer(bits, group, dtype), layer(bits, group, dtype)
    tile(tiled)
    assert tiles_of(tiled) is not None
    for rows in (1, 2, 7, 40):
        x = mx.random.normal((rows, 384))
        for exact in (False, True):
            plain.exact = tiled.exact = exact
            assert mx.array_equal(plain(x), tiled(x))
    x = x.astype(mx.float16)
    assert mx.array_equal(plain(x), tiled(x))
    for (name, a), (_, b) in zip(
        tree_flatten(plain.parameters()), tree_flatten(tiled.parameters()), strict=True
    ):
        assert mx.array_equal(a, b), name


def test_rows_that_do_not_fill_tiles_stay() -> None:
    odd = layer(4, 64, rows=ROWS + 1)
    weight = odd.weight
    tile(odd)
    assert tiles_of(odd) is None
    assert odd.weight is weight


def test_other_parameters_are_the_ones_that_count() -> None:
    tiled, other, x = layer(4, 64), layer(4, 64), mx.random.normal((1, 384))
    tile(tiled)
    before = tiled(x)
    tiled.scales = 2 * other.scales
    tiled.biases = 2 * other.biases
    assert mx.allclose(tiled(x) - tiled.bias, 2 * (before - tiled.bias), rtol=1e-5)
    tile(tiled)
    tiled.weight[0] = tiled.weight[1]  # the same array object with other values
    tiled.scales[0], tiled.biases[0] = tiled.scales[1], tiled.biases[1]
    assert mx.array_equal((tiled(x) - tiled.bias)[:, 0], (tiled(x) - tiled.bias)[:, 1])


def test_gradients_and_copies() -> None:
    tiled, x = layer(4, 64, rows=48 * 64), mx.random.normal((2, 384))
    expected, gradient = tiled(x), mx.grad(lambda x: tiled(x).square().sum())(x)
    tile(tiled)
    assert mx.array_equal(mx.grad(lambda x: tiled(x).square().sum())(x), gradient)
    before = mx.get_active_memory()
    twin = copy.deepcopy(tiled)
    assert tiles_of(twin) is not None
    assert mx.array_equal(twin(x), expected)
    assert mx.get_active_memory() - before < tiled.weight.nbytes / 2  # shared
    pickled = pickle.loads(pickle.dumps(tiled))
    assert tiles_of(pickled) is None
    assert mx.array_equal(pickled(x), expected)


def test_nothing_is_held_twice_until_it_is_read() -> None:
    tiled = layer(4, 128, rows=48 * 512)
    gc.collect()  # what others left must not go meanwhile
    nbytes = sum(tiled[name].nbytes for name in ("weight", "scales", "biases"))
    mx.eval(tiled.parameters())
    before = mx.get_active_memory()
    tile(tiled)
    mx.eval(tiled(mx.random.normal((1, 384))))
    assert abs(mx.get_active_memory() - before) < 0.1 * nbytes
    mx.eval(tiled.parameters())
    assert mx.get_active_memory() - before > 0.9 * nbytes


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_a_repacked_model_gives_and_saves_the_same(tmp_path: Path, name: str) -> None:
    plain, repacked = stock(tmp_path, name), stock(tmp_path, name)
    for model in (plain, repacked):
        nn.quantize(model, 64, 4, class_predicate=divisible)
        model.set_dtype(mx.bfloat16)
    save_model(tmp_path / "plain", plain)
    optiq.accelerate(plain)
    optiq.accelerate(repacked, repack=True)
    tiled = [m for m in leaves(repacked).values() if tiles_of(m) is not None]
    assert len(tiled) >= 4
    for model in (plain, repacked):
        model.cache = make_prompt_cache(model)
    for tokens in (TOKENS[:, :30], TOKENS[:, 30:31], TOKENS[:, 31:]):
        assert mx.array_equal(
            plain(tokens, cache=plain.cache), repacked(tokens, cache=repacked.cache)
        )
    stored = dict(tree_flatten(repacked.parameters()))
    for key, value in mx.load(str(tmp_path / "plain" / "model.safetensors")).items():
        assert mx.array_equal(stored[key].astype(value.dtype), value), key


def test_what_a_model_loads_later_is_what_runs(tmp_path: Path) -> None:
    first, second = stock(tmp_path, "llama"), stock(tmp_path, "llama", rope_theta=50.0)
    for i, model in enumerate((first, second)):
        model.update({"model": {"norm": {"weight": model.model.norm.weight + i}}})
        nn.quantize(model, 64, 4, class_predicate=divisible)
    second.model.layers[0].mlp.up_proj.scales = 3 * second.model.layers[0].mlp.up_proj.scales
    optiq.accelerate(first, repack=True)
    mx.eval(first(TOKENS))
    first.load_weights(tree_flatten(second.parameters()))
    fresh = stock(tmp_path, "llama")
    nn.quantize(fresh, 64, 4, class_predicate=divisible)
    fresh.load_weights(tree_flatten(second.parameters()))
    optiq.accelerate(fresh)
    assert mx.array_equal(first(TOKENS), fresh(TOKENS))
