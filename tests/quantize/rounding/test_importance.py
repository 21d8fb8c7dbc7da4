"""The importance of columns, against NumPy on what really goes into each layer."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.mla import MultiLinear

import optiq
from optiq.models.roles import Module, Role, quantizable
from optiq.quantize.rounding import importance
from optiq.sources import load, resolve
from tests.architectures import construct
from tests.tiny import tiny_folder

SEQUENCES = [[5, 9, 200, 31, 7], [80, 3, 3, 41, 12, 99, 150, 2]]


@pytest.mark.parametrize("native", [False, True])
def test_it_is_the_mean_square_of_the_inputs(tmp_path: Path, native: bool) -> None:
    model = load(resolve(str(tiny_folder(tmp_path, kind="llama")))).model
    modules = quantizable(model)
    if native:
        optiq.accelerate(model)
    before = [id(m) for m in model.modules()]
    found = importance.column_squares(model, modules, SEQUENCES, progress=False)
    assert [id(m) for m in model.modules()] == before  # the meters are gone
    block = model.layers[0]
    rows = []
    for tokens in SEQUENCES:
        h = model.model.embed_tokens(mx.array([tokens]))
        rows.append(np.array(block.input_layernorm(h))[0])
    truth = np.mean(np.concatenate(rows).astype(np.float64) ** 2, axis=0)
    np.testing.assert_allclose(np.array(found["model.layers.0.self_attn.k_proj"]), truth, rtol=1e-4)
    assert "model.layers.0.self_attn.k_proj" in found
    for m in modules:
        if m.role is Role.EMBEDDING and not m.tied:
            assert m.path not in found
        else:
            assert found[m.path].shape == (m.shape[-1],)


def test_a_tied_embedding_is_weighed_as_the_head(tmp_path: Path) -> None:
    model = load(resolve(str(tiny_folder(tmp_path, kind="llama", tie_word_embeddings=True)))).model
    found = importance.column_squares(model, quantizable(model), SEQUENCES, progress=False)
    rows = [np.array(model.model(mx.array([tokens])))[0] for tokens in SEQUENCES]
    truth = np.mean(np.concatenate(rows).astype(np.float64) ** 2, axis=0)
    np.testing.assert_allclose(np.array(found["model.embed_tokens"]), truth, rtol=1e-4)


def test_each_head_is_weighed_by_itself() -> None:
    model = construct("deepseek_v3")
    modules = quantizable(model)
    found = importance.column_squares(model, modules, SEQUENCES, progress=False)
    layer = MultiLinear(8, 4, 3)
    x = mx.random.normal((2, 3, 5, 8), key=mx.random.key(0))
    meter = importance._Meter(layer, Module("", Role.ATTENTION, "", (3, 4, 8), 0))
    meter(x)
    meter(mx.ones((2, 1, 5, 4)), transpose=False)  # runs backwards: its columns multiply nothing
    truth = np.square(np.array(x, np.float64)).mean(axis=(0, 2))
    overall = truth.mean(axis=0)
    weighed = (10 * truth + importance.PRIOR_ROWS * overall) / (10 + importance.PRIOR_ROWS)
    np.testing.assert_allclose(np.array(importance._mean(meter.of(0, 1))), weighed, rtol=1e-4)
    at = "model.layers.0.self_attn"
    assert found[f"{at}.unembed_out"].shape == (4, 32)
    assert f"{at}.embed_q" not in found


def test_experts_are_weighed_by_what_is_routed_to_them(tmp_path: Path) -> None:
    model = load(resolve(str(tiny_folder(tmp_path, kind="qwen3_moe")))).model
    modules = quantizable(model)
    found = importance.column_squares(model, modules, SEQUENCES, progress=False)
    expert = next(m for m in modules if m.role is Role.EXPERT)
    experts, _, width = expert.shape
    squares, rows = np.zeros((experts, width)), np.zeros(experts)

    class Spy(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            for token, chosen in zip(
                np.array(x).reshape(-1, width),
                np.array(indices).reshape(-1, indices.shape[-1]),
                strict=True,
            ):
                for e in chosen:
                    squares[e] += token.astype(np.float64) ** 2
                    rows[e] += 1
            return self.inner(x, indices)

    mlp = model.layers[expert.block].mlp
    mlp.switch_mlp = Spy(mlp.switch_mlp)
    for tokens in SEQUENCES:
        mx.eval(model(mx.array([tokens])))
    overall = squares.sum(0) / rows.sum()
    prior = importance.PRIOR_ROWS
    truth = (squares + prior * overall) / (rows + prior)[:, None]
    np.testing.assert_allclose(np.array(found[expert.path]), truth, rtol=1e-4)
