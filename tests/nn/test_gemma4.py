"""Blocks of Gemma 4, which pass keys and values on: fused, they give what the originals give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from optiq.nn.accelerate import accelerate
from tests.nn.test_accelerate import TOKENS, divisible, same, stock
from tests.nn.test_blocks import decode

DENSE = {"enable_moe_block": False, "num_hidden_layers": 4}
KINDS: dict[str, dict[str, Any]] = {
    # As E2B and E4B: the last layers have no keys and values, each has an input of its own.
    "shared": {
        **DENSE,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
    },
    # As 31B: values are the keys in full attention.
    "keys are values": {
        **DENSE,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
}
FUSED = {"shared": 2, "keys are values": 4}  # blocks


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[str], tuple[nn.Module, nn.Module]]:
    """The same 4-bit model with fused blocks and as it was."""

    def make(kind: str) -> tuple[nn.Module, nn.Module]:
        models = [stock(tmp_path, "gemma4_text", **KINDS[kind]) for _ in range(2)]
        for m in models:
            nn.quantize(m, 64, 4, class_predicate=divisible)
        report = accelerate(models[0])
        assert set(report.fused.values()) == {"attention and MLP"}
        assert len(report.fused) == FUSED[kind]
        left = {why for path, why in report.left.items() if path.startswith("model.layers")}
        assert left == ({"self_attn has no k_proj, v_proj"} if kind == "shared" else set())
        return models[0], models[1]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind: str, pair: Any) -> None:
    model, expected = pair(kind)
    logits = expected(TOKENS)
    assert same(model(TOKENS), logits, "quantized")
    assert same(decode(model, make_prompt_cache(model)), logits, "quantized")


@pytest.mark.parametrize("kind", KINDS)
def test_batches(kind: str, pair: Any) -> None:
    prompts = [TOKENS[0, :n].tolist() for n in (5, 17, 9)]
    answers = []
    for model in pair(kind):
        generator = BatchGenerator(model, max_tokens=8)
        uids = generator.insert(prompts)
        text: dict[int, list[int]] = {uid: [] for uid in uids}
        for _ in range(12):
            for r in generator.next()[1]:
                text[r.uid].append(r.token)
        answers.append([text[uid] for uid in uids])
    assert answers[0] == answers[1]
    assert all(len(a) == 8 for a in answers[0])


def test_experts_beside_an_mlp_are_left(tmp_path: Path) -> None:
    report = accelerate(stock(tmp_path, "gemma4_text"))
    assert report.fused == {}
    assert report.left["model.layers.0"] == "its experts run beside an MLP"
