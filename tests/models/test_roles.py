"""Roles over stock mlx-lm models: what is listed, what it is for, in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from optiq.formats import DEFAULT_MENU, DENSE, UNIFORM4, Format, parse_menu
from optiq.models.roles import (
    Module,
    Role,
    allowed,
    block_of,
    fixed_bytes,
    floor,
    quantizable,
    role_of,
    unit_of,
)
from optiq.models.shapes import embedding_shape
from tests.architectures import construct
from tests.families.table import family_folder
from tests.tiny import KINDS, tiny_folder


def block_roles(model: nn.Module, block: int) -> list[tuple[str, str]]:
    """(path within the block, role), in flow order."""
    modules = [m for m in quantizable(model) if m.block == block]
    return [(m.path.split(f".{block}.", 1)[1], m.role.value) for m in modules]


ATTENTION = [(f"self_attn.{x}_proj", "attention") for x in "qkvo"]
GLU = ("gate_proj", "up_proj", "down_proj")


def test_tied_and_untied_llama(tmp_path: Path) -> None:
    for tied in (True, False):
        folder = tiny_folder(tmp_path, name=f"{tied}", tie_word_embeddings=tied)
        model, _ = load_model(folder)
        modules = quantizable(model)
        embedding, last = modules[0], modules[-1]
        assert (embedding.path, embedding.role) == ("model.embed_tokens", Role.EMBEDDING)
        assert embedding.tied is tied
        assert embedding.shape == (384, 64)
        assert embedding.block is None
        assert (last.role is Role.HEAD) is not tied
        if not tied:
            assert (last.path, last.block, last.shape) == ("lm_head", None, (384, 64))
        for block in (0, 1):
            assert block_roles(model, block) == ATTENTION + [(f"mlp.{x}", "mlp") for x in GLU]
        assert [m.block for m in modules if m.block is not None] == [0] * 7 + [1] * 7


def test_fused_units(tmp_path: Path) -> None:
    model, _ = load_model(tiny_folder(tmp_path))
    units = {m.path: m.unit for m in quantizable(model)}
    at = "model.layers.1"
    assert {units[f"{at}.self_attn.{x}_proj"] for x in "qkv"} == {f"{at}.self_attn.qkv"}
    assert {units[f"{at}.mlp.{x}_proj"] for x in ("gate", "up")} == {f"{at}.mlp.gate_up"}
    for alone in (f"{at}.self_attn.o_proj", f"{at}.mlp.down_proj", "model.embed_tokens"):
        assert units[alone] == alone


def test_qwen3_moe(tmp_path: Path) -> None:
    model, _ = load_model(tiny_folder(tmp_path, "qwen3_moe"))
    experts = [(f"mlp.switch_mlp.{x}", "expert") for x in GLU]
    assert block_roles(model, 1) == [*ATTENTION, ("mlp.gate", "router"), *experts]
    shapes = {m.path: m.shape for m in quantizable(model)}
    assert shapes["model.layers.0.mlp.switch_mlp.down_proj"] == (4, 64, 64)
    assert shapes["model.layers.0.mlp.gate"] == (4, 64)


def test_gemma3_text(tmp_path: Path) -> None:
    model, _ = load_model(tiny_folder(tmp_path, "gemma3_text"))
    modules = quantizable(model)
    assert modules[0].tied
    assert sum(m.tied for m in modules) == 1
    assert [m.block for m in modules[1:]] == [i for i in range(4) for _ in range(7)]


@pytest.mark.parametrize("kind", KINDS)
def test_lists_what_stock_quantizes_and_accounts_for_every_byte(tmp_path: Path, kind: str) -> None:
    model, _ = load_model(tiny_folder(tmp_path, kind))
    modules = quantizable(model)
    weights = sum(UNIFORM4.nbytes(m.shape, 4) for m in modules)
    fixed = fixed_bytes(model, modules)
    total = sum(v.nbytes for _, v in tree_flatten(model.parameters()))
    assert fixed + sum(DENSE.nbytes(m.shape, 4) for m in modules) == total
    seen = []
    nn.quantize(
        model, 64, 4, class_predicate=lambda p, m: hasattr(m, "to_quantized") and not seen.append(p)
    )
    assert sorted(seen) == sorted(m.path for m in modules)
    assert fixed + weights == sum(v.nbytes for _, v in tree_flatten(model.parameters()))


def test_gpt_oss_router_runs_before_its_experts() -> None:
    experts = [(f"mlp.experts.{x}", "expert") for x in GLU]
    assert block_roles(construct("gpt_oss"), 0) == [*ATTENTION, ("mlp.router", "router"), *experts]


def test_deepseek_latent_attention_and_shared_experts() -> None:
    model = construct("deepseek_v3")
    latent = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "embed_q", "unembed_out", "o_proj"]
    assert block_roles(model, 1) == [
        *[(f"self_attn.{x}", "attention") for x in latent],
        *[(f"mlp.switch_mlp.{x}", "expert") for x in GLU],
        *[(f"mlp.shared_experts.{x}", "mlp") for x in GLU],
    ]
    modules = {m.path: m for m in quantizable(model)}
    at = "model.layers.0.self_attn"
    assert modules[f"{at}.embed_q"].shape == (4, 32, 32)
    assert modules[f"{at}.q_a_proj"].unit == modules[f"{at}.kv_a_proj_with_mqa"].unit


def test_qwen3_next_mixes_linear_and_softmax_attention() -> None:
    model = construct("qwen3_next")
    linear = ["in_proj_qkvz", "in_proj_ba", "out_proj"]
    moe = [
        ("mlp.gate", "router"),
        ("mlp.shared_expert_gate", "router"),
        *[(f"mlp.switch_mlp.{x}", "expert") for x in GLU],
        *[(f"mlp.shared_expert.{x}", "mlp") for x in GLU],
    ]
    assert block_roles(model, 0) == [*[(f"linear_attn.{x}", "attention") for x in linear], *moe]
    assert block_roles(model, 1) == [*ATTENTION, *moe]
    units = [m.unit for m in quantizable(model) if "in_proj" in m.path]
    assert units == ["model.layers.0.linear_attn.in_proj"] * 2


def test_gemma4_text() -> None:
    model = construct("gemma4_text")
    outside = [(m.path, m.role.value, m.tied) for m in quantizable(model) if m.block is None]
    assert outside == [
        ("model.embed_tokens", "embedding", True),
        ("model.embed_tokens_per_layer", "embedding", False),
        ("model.per_layer_model_projection", "other", False),
    ]
    assert block_roles(model, 0) == [
        *ATTENTION,
        *[(f"mlp.{x}", "mlp") for x in GLU],
        ("router.proj", "router"),
        *[(f"experts.switch_glu.{x}", "expert") for x in GLU],
        ("per_layer_input_gate", "other"),
        ("per_layer_projection", "other"),
    ]


def test_phi3_fused_projections_are_units_of_their_own() -> None:
    model = construct("phi3")
    assert block_roles(model, 0) == [
        ("self_attn.qkv_proj", "attention"),
        ("self_attn.o_proj", "attention"),
        ("mlp.gate_up_proj", "mlp"),
        ("mlp.down_proj", "mlp"),
    ]
    assert all(m.unit == m.path for m in quantizable(model))


def test_gpt2_ties_the_token_embedding_not_the_positions() -> None:
    modules = quantizable(construct("gpt2"))
    assert [(m.path, m.tied) for m in modules[:2]] == [("model.wte", True), ("model.wpe", False)]
    assert [m.role for m in modules[2:6]] == [Role.ATTENTION] * 2 + [Role.MLP] * 2


def test_state_space_and_convolution_mixers_are_other() -> None:
    mamba = construct("mamba2")
    assert block_roles(mamba, 0) == [("mixer.in_proj", "other"), ("mixer.out_proj", "other")]
    assert quantizable(mamba)[0].tied
    assert block_roles(construct("lfm2"), 0) == [
        ("conv.in_proj", "other"),
        ("conv.out_proj", "other"),
        *[(f"feed_forward.{x}", "mlp") for x in ("w1", "w3", "w2")],
    ]


class Custom(nn.Module):
    """A head that is not named lm_head, a model file's veto, a width no group divides."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(40, 64)
        self.layers = [nn.Sequential(nn.Linear(64, 72))]
        self.odd = nn.Linear(72, 64)
        self.dense = nn.Linear(64, 64)
        self.to_logits = nn.Linear(64, 40)

    @property
    def quant_predicate(self) -> Any:
        return lambda path, module: path != "dense"


def test_a_custom_model() -> None:
    model = Custom()
    modules = {m.path: m for m in quantizable(model)}
    assert list(modules) == ["tok", "odd", "layers.0.layers.0", "to_logits"]
    assert modules["to_logits"].role is Role.HEAD
    assert not modules["tok"].tied
    assert modules["layers.0.layers.0"].block == 0
    assert allowed(modules["odd"], DEFAULT_MENU) == (DENSE,)
    assert allowed(modules["odd"], parse_menu("4")) == (DENSE,)
    biases = 4 * (72 + 64 + 64 + 40)
    assert fixed_bytes(model, list(modules.values())) == biases + 4 * 64 * 64


def test_floors_and_allowed_formats() -> None:
    assert [floor(r) for r in (Role.ROUTER, Role.HEAD, Role.EMBEDDING)] == [8, 3, 3]
    assert {floor(r) for r in (Role.ATTENTION, Role.MLP, Role.EXPERT, Role.OTHER)} == {2}

    def names(role: Role, width: int) -> list[str]:
        module = Module("x", role, "x", (8, width), 0)
        return [str(f) for f in allowed(module, parse_menu("2,4,8,bf16"))]

    assert names(Role.MLP, 128) == ["2g64", "2g128", "4g64", "4g128", "8g64", "8g128", "bf16"]
    assert names(Role.HEAD, 128) == ["4g64", "4g128", "8g64", "8g128", "bf16"]
    assert names(Role.ROUTER, 64) == ["8g64", "bf16"]
    assert names(Role.MLP, 96) == ["bf16"]
    router = Module("x", Role.ROUTER, "x", (8, 64), 0)
    assert allowed(router, [Format("affine", 4, 64)]) == (DENSE,)


@pytest.mark.parametrize(
    ("path", "role", "block", "unit"),
    [
        ("lm_head", Role.HEAD, None, "lm_head"),
        ("model.embed_tokens", Role.EMBEDDING, None, "model.embed_tokens"),
        (
            "language_model.model.layers.12.mlp.up_proj",
            Role.MLP,
            12,
            "language_model.model.layers.12.mlp.gate_up",
        ),
        ("model.layers.3.mlp.gate", Role.ROUTER, 3, "model.layers.3.mlp.gate"),
        ("model.layers.3.mlp.router.gate", Role.ROUTER, 3, "model.layers.3.mlp.router.gate"),
        (
            "model.layers.3.mlp.switch_mlp.up_proj",
            Role.EXPERT,
            3,
            "model.layers.3.mlp.switch_mlp.gate_up",
        ),
        (
            "model.layers.3.mlp.shared_experts.down_proj",
            Role.MLP,
            3,
            "model.layers.3.mlp.shared_experts.down_proj",
        ),
        ("transformer.h.7.attn.c_attn", Role.ATTENTION, 7, "transformer.h.7.attn.c_attn"),
        ("backbone.layers.0.mixer.q_proj", Role.ATTENTION, 0, "backbone.layers.0.mixer.qkv"),
    ],
)
def test_from_the_path_alone(path: str, role: Role, block: int | None, unit: str) -> None:
    assert (role_of(path), block_of(path), unit_of(path)) == (role, block, unit)


def test_reads_no_weight(tmp_path: Path) -> None:
    """Lazy weights stay on disk while a model is described."""
    model, _ = load_model(tiny_folder(tmp_path), lazy=True)
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"")
    modules = quantizable(model)
    assert fixed_bytes(model, modules) == 5 * 64 * 4
    with pytest.raises(RuntimeError):
        mx.eval(model.model.norm.weight)


def test_a_width_without_a_group_size_is_stocks() -> None:
    model = construct("phi3")
    type(model).quant_predicate = property(lambda self: lambda path, module: {"bits": 8})
    try:
        assert {m.stock for m in quantizable(model)} == {Format("affine", 8, 64)}
    finally:
        del type(model).quant_predicate


def test_a_head_that_is_no_module_leaves_the_embedding_untied(tmp_path: Path) -> None:
    model, _ = load_model(family_folder(tmp_path, "talkie"))
    modules = quantizable(model)
    assert [m.role for m in modules if m.block is None] == [Role.EMBEDDING]
    assert not any(m.tied for m in modules)


def test_an_embedding_that_may_not_be_quantized(tmp_path: Path) -> None:
    modules = quantizable(load_model(family_folder(tmp_path, "bailing_moe_v3"))[0])
    assert all(m.block is not None for m in modules)
    rows, width = embedding_shape(modules)
    assert rows >= 384
    assert width >= 64
