"""Native layers in whole models: the logits are those of stock mlx-lm run in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import optiq
from optiq.models.roles import blocks
from optiq.nn.accelerate import accelerate
from tests.architectures import MODELS, construct
from tests.tiny import KINDS, tiny_folder

# 40 tokens: above the 64 expert calls where mlx-lm sorts tokens by expert.
TOKENS = mx.array([[(7 * i * i + 3 * i) % 380 + 4 for i in range(40)]])
# Of the largest logit. Quantized products read activations as 16-bit fixed point, a step that is
# 2^-15 of the largest of a group; random models of this size multiply it by some twenty.
TOLERANCE = {"dense": 1e-4, "quantized": 1e-3}


def stock(tmp_path: Path, name: str, **config: Any) -> nn.Module:
    """A random stock model, the same for the same arguments."""
    if name in KINDS:
        folder = tmp_path / name
        if not folder.exists():
            tiny_folder(tmp_path, name, **config)
        return load_model(folder)[0]
    mx.random.seed(0)
    model = construct(name, **config)
    model.update(tree_map(lambda a: a + 0.1 * mx.random.normal(a.shape), model.parameters()))
    return model


def same(got: mx.array, expected: mx.array, kind: str) -> bool:
    scale = mx.abs(expected).max().item()
    assert scale > 0.5  # random logits, not zeros
    return mx.abs(got.astype(mx.float32) - expected).max().item() <= TOLERANCE[kind] * scale


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    return dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))


@pytest.mark.parametrize("bits", [None, 3, 4, 8])
@pytest.mark.parametrize("name", [*KINDS, *MODELS])
def test_logits_are_those_of_the_stock_model(tmp_path: Path, name: str, bits: int | None) -> None:
    expected, model = stock(tmp_path, name), stock(tmp_path, name)
    for m in (expected, model):
        if bits is not None:
            nn.quantize(m, 32 if bits == 3 else 64, bits, class_predicate=divisible)
    report = accelerate(model)
    assert set(report.swapped) == {
        path
        for path, m in leaves(expected).items()
        if "weight" in m and type(m).__module__ in SWAPPED
    }
    for path, why in report.left.items():
        if path in blocks(model):
            continue
        assert why == f"{type(leaves(expected)[path]).__name__} has no native counterpart"
    assert same(model(TOKENS), expected(TOKENS), "quantized" if bits else "dense")
    assert [n for n, _ in tree_flatten(model.parameters())] == [
        n for n, _ in tree_flatten(expected.parameters())
    ]


FUSED = dict.fromkeys(
    ("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mistral", "olmo2"), "attention and MLP"
) | dict.fromkeys(("qwen3_moe", "gpt_oss"), "attention")
SWAPPED = (
    "mlx_lm.models.mla",
    "mlx.nn.layers.linear",
    "mlx.nn.layers.embedding",
    "mlx.nn.layers.quantized",
    "mlx_lm.models.switch_layers",
)


def divisible(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", [*KINDS, *MODELS])
def test_bf16_weights_run_as_the_stock_model_in_float32(
    tmp_path: Path, name: str, bits: int | None
) -> None:
    """Nothing is rounded to 16 bits on the way."""
    expected, model = stock(tmp_path, name), stock(tmp_path, name)
    for m in (expected, model):
        m.set_dtype(mx.bfloat16)
        if bits is not None:
            nn.quantize(m, 64, bits, class_predicate=divisible)
    expected.set_dtype(mx.float32)
    accelerate(model)
    kept = {a.dtype for _, a in tree_flatten(model.parameters()) if a.ndim > 1}
    assert kept - {mx.uint32} == {mx.bfloat16}
    assert same(model(TOKENS), expected(TOKENS), "quantized" if bits else "dense")


def test_an_untied_head_and_biases(tmp_path: Path) -> None:
    config = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    expected, model = (stock(tmp_path, "llama", **config) for _ in range(2))
    report = accelerate(model)
    assert "lm_head" in report.swapped
    assert "bias" in model.model.layers[0].mlp.down_proj
    assert same(model(TOKENS), expected(TOKENS), "dense")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_token_by_token_with_a_cache_equals_one_forward(tmp_path: Path, name: str) -> None:
    model = stock(tmp_path, name)
    nn.quantize(model, 64, 4, class_predicate=divisible)
    expected = model(TOKENS)
    accelerate(model)
    cache = make_prompt_cache(model)
    steps = [model(TOKENS[:, :10], cache=cache)]  # a prompt, then one by one
    steps += [model(TOKENS[:, i : i + 1], cache=cache) for i in range(10, TOKENS.shape[1])]
    assert same(mx.concatenate(steps, axis=1), expected, "quantized")
    assert same(model(TOKENS), expected, "quantized")


def test_what_is_unsupported_is_named_and_left(tmp_path: Path) -> None:
    expected, model = (stock(tmp_path, "llama", tie_word_embeddings=False) for _ in range(2))
    for m in (expected, model):
        nn.quantize(m, 32, 4, mode="mxfp4", class_predicate=lambda p, m: "mlp" in p)
        nn.quantize(m, 64, 4, class_predicate=lambda p, m: "q_proj" in p)
        m.model.layers[1].self_attn.o_proj = LowRank(m.model.layers[1].self_attn.o_proj)
    report = accelerate(model)
    left = {p: why for p, why in report.left.items() if p not in blocks(model)}
    mlp = {p: why for p, why in left.items() if "mlp" in p}
    assert len(mlp) == 6
    assert set(mlp.values()) == {"mode 'mxfp4' has no native kernel"}
    own = "model.layers.1.self_attn.o_proj"
    assert left.keys() - mlp == {own}
    assert report.left[own] == "LowRank has no native counterpart"
    assert "model.layers.0.self_attn.q_proj" in report.swapped
    assert len(report.swapped) == 2 + 8 - 1
    assert same(model(TOKENS), expected(TOKENS), "quantized")


class LowRank(nn.Linear):  # type: ignore[misc]
    """A layer of somebody else: a subclass computes something else than its base."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.weight = linear.weight

    def __call__(self, x: mx.array) -> mx.array:
        return (x @ self.weight.T) * 2


def test_a_second_call_changes_nothing(tmp_path: Path) -> None:
    model = stock(tmp_path, "qwen3_moe")
    first = optiq.accelerate(model)
    before = {path: id(m) for path, m in leaves(model).items()}
    second = optiq.accelerate(model)
    assert first.swapped
    assert (second.swapped, second.left) == ([], first.left)
    assert {path: id(m) for path, m in leaves(model).items()} == before
