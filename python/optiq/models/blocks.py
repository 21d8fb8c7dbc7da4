"""How a decoder block of mlx-lm is built: which module plays which part, in which convention.

With `roles.py` the only place that looks at a block's class. A family is listed here after its
model file was read; `nn/check.py` still compares every kind of block with the original.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..sources.rotation import Rotation, of_module

if TYPE_CHECKING:
    import mlx.nn as nn


class Unknown(Exception):
    """Why a block cannot be described."""


@dataclass(frozen=True)
class Norms:
    """Paths of the norms around attention and MLP; None where there is none."""

    attention_in: str | None
    attention_post: str | None
    mlp_in: str | None
    mlp_post: str | None
    plus_one: bool = False  # stored as what is added to 1


@dataclass(frozen=True)
class Attention:
    """Paths of the projections, relative to the block, and what happens between them.

    `qkv` are three paths; or one whose rows are queries, keys and values; or two where the values
    are the keys before norm and rotation. `whole_norm`: q and k norms run over all heads together.
    `v_norm_eps`: of a norm without weights over each value head.
    """

    qkv: tuple[str, ...]
    out: str
    heads: int
    kv_heads: int
    scale: float
    rope: Rotation | None
    q_norm: str | None = None
    k_norm: str | None = None
    whole_norm: bool = False
    v_norm_eps: float | None = None
    sinks: str | None = None
    softcap: float = 0.0


@dataclass(frozen=True)
class Mlp:
    """Paths of gate and up (or of one matrix with the rows of both) and down."""

    gate_up: tuple[str, ...]
    down: str
    activation: str  # of the gate: "silu" or "gelu_tanh"


@dataclass(frozen=True)
class Block:
    """A block; without `mlp`, what stands at `feed_forward` runs as it is.

    `gain` multiplies what each half adds to the residual stream, whose sums stay finite in float16
    where it `saturates`. A block that `shares` also returns its keys and values, which later blocks
    may use, and ends with a gated input and a scale of its own.
    """

    norms: Norms
    attention: Attention
    mlp: Mlp | None
    feed_forward: str
    gain: float = 1.0
    saturates: bool = False
    shares: bool = False


_PRE = Norms("input_layernorm", None, "post_attention_layernorm", None)
_POST = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_BOTH = Norms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_BOTH_PLUS_ONE = replace(_BOTH, plus_one=True)
_GLM4 = Norms(
    "input_layernorm",
    "post_self_attn_layernorm",
    "post_attention_layernorm",
    "post_mlp_layernorm",
)
# File and class of the block -> norms, activation. (mistral, smollm3 and others are llama blocks.)
_FAMILIES: dict[tuple[str, str], tuple[Norms, str]] = {
    ("ernie4_5", "DecoderLayer"): (_PRE, "silu"),
    ("exaone4", "TransformerBlock"): (_POST, "silu"),
    ("gemma2", "TransformerBlock"): (_BOTH_PLUS_ONE, "gelu_tanh"),
    ("gemma3_text", "TransformerBlock"): (_BOTH_PLUS_ONE, "gelu_tanh"),
    ("gemma4_text", "DecoderLayer"): (_BOTH, "gelu_tanh"),
    ("glm4", "Glm4DecoderLayer"): (_GLM4, "silu"),
    ("gpt_oss", "TransformerBlock"): (_PRE, "silu"),
    ("granite", "TransformerBlock"): (_PRE, "silu"),
    ("helium", "HeliumDecoderLayer"): (_PRE, "silu"),
    ("internlm3", "TransformerBlock"): (_PRE, "silu"),
    ("llama", "TransformerBlock"): (_PRE, "silu"),
    ("mimo", "TransformerBlock"): (_PRE, "silu"),
    ("mixtral", "MixtralDecoderLayer"): (_PRE, "silu"),
    ("olmo2", "TransformerBlock"): (_POST, "silu"),
    ("olmo3", "Olmo3DecoderLayer"): (_POST, "silu"),
    ("phi3", "TransformerBlock"): (_PRE, "silu"),
    ("qwen2", "TransformerBlock"): (_PRE, "silu"),
    ("qwen2_moe", "Qwen2MoeDecoderLayer"): (_PRE, "silu"),
    ("qwen3", "TransformerBlock"): (_PRE, "silu"),
    ("qwen3_moe", "Qwen3MoeDecoderLayer"): (_PRE, "silu"),
    ("seed_oss", "TransformerBlock"): (_PRE, "silu"),
}
_SATURATING = {("gemma3_text", "TransformerBlock")}
_SHARING = {("gemma4_text", "DecoderLayer")}
_HEADS = ("n_heads", "num_attention_heads")
_KV_HEADS = ("n_kv_heads", "num_key_value_heads")


def describe(block: nn.Module) -> Block:
    """The anatomy of a block of an mlx-lm model. Raises Unknown with the reason."""
    family = (_file(block), type(block).__name__)
    if family not in _FAMILIES:
        raise Unknown(f"{'.'.join(family)} is a block whose computation is not described")
    norms, activation = _FAMILIES[family]
    place = next((p for p in ("mlp", "block_sparse_moe") if p in block), None)
    if place is None or "self_attn" not in block:
        raise Unknown(f"{'.'.join(family)} has no self_attn and mlp")
    if "experts" in block:
        raise Unknown("its experts run beside an MLP")
    return Block(
        norms=norms,
        attention=_attention(block["self_attn"]),
        mlp=_mlp(block[place], place, activation),
        feed_forward=place,
        gain=float(getattr(block, "residual_multiplier", 1.0)),
        saturates=family in _SATURATING,
        shares=family in _SHARING,
    )


def _attention(a: Any) -> Attention:
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    if "qkv_proj" in a:
        qkv = ("qkv_proj",)
    elif getattr(a, "use_k_eq_v", False):
        qkv = ("q_proj", "k_proj")
    missing = [p for p in (*qkv, "o_proj") if p not in a]
    if missing:
        raise Unknown(f"self_attn has no {', '.join(missing)}")
    heads = _first(a, *_HEADS)
    head_dim = a.head_dim if hasattr(a, "head_dim") else None
    scale = _first(a, "scale", "sm_scale")
    normed = "q_norm" in a
    return Attention(
        qkv=tuple(f"self_attn.{p}" for p in qkv),
        out="self_attn.o_proj",
        heads=heads,
        kv_heads=_first(a, *_KV_HEADS),
        scale=float(scale),
        rope=_rope(a["rope"]) if "rope" in a else None,
        q_norm="self_attn.q_norm" if normed else None,
        k_norm="self_attn.k_norm" if normed else None,
        v_norm_eps=float(a["v_norm"].eps) if "v_norm" in a else None,
        whole_norm=normed and heads > 1 and a.q_norm.weight.size == heads * (head_dim or 0),
        sinks="self_attn.sinks" if "sinks" in a else None,
        softcap=float(getattr(a, "attn_logit_softcapping", None) or 0.0),
    )


def set_heads(block: nn.Module, heads: int, kv_heads: int) -> None:
    """Tell a described block that its projections have so many heads now."""
    attention: Any = block["self_attn"]
    for names, n in ((_HEADS, heads), (_KV_HEADS, kv_heads)):
        for name in names:
            if hasattr(attention, name):
                setattr(attention, name, n)


def _mlp(mlp: Any, place: str, activation: str) -> Mlp | None:
    """None for anything but a plain gated MLP, such as experts."""
    for gate_up in (("gate_proj", "up_proj"), ("gate_up_proj",)):
        if set(mlp.children()) == {*gate_up, "down_proj"}:
            return Mlp(tuple(f"{place}.{p}" for p in gate_up), f"{place}.down_proj", activation)
    return None


def _rope(rope: Any) -> Rotation | None:
    """Raises Unknown for rotations that change with the length of the text."""
    kind = type(rope).__name__
    if kind == "NoPE":
        return None
    if (found := of_module(rope)) is None:
        raise Unknown(f"its rotation {kind} is not described")
    return found


def _first(module: Any, *names: str) -> Any:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise Unknown(f"{type(module).__name__} has no {names[0]}")


def _file(block: nn.Module) -> str:
    package, _, name = type(block).__module__.rpartition(".")
    return name if package == "mlx_lm.models" else type(block).__module__


_CACHE_OF_LAYER = "layer_idx_to_cache_idx"


def whole_text_caches(model: nn.Module) -> list[Any] | None:
    """Empty caches for a run of a whole text; None where the model is the same without.

    In Gemma 3n and AFM late layers read keys and values from the cache of an earlier one. Without
    caches those of Gemma 3n make their own, which is not what decoding does.
    """
    from mlx_lm.models.cache import make_prompt_cache

    reading = (_CACHE_OF_LAYER, "kv_reuse_layers")
    if not any(hasattr(module, name) for module in _around_blocks(model) for name in reading):
        return None
    caches: list[Any] = make_prompt_cache(model)
    return caches


def _around_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that are not in a list: this is asked for every run, and blocks have many."""
    import mlx.nn as nn

    yield module
    for child in module.values():
        if isinstance(child, nn.Module):
            yield from _around_blocks(child)


def cache_readers(model: nn.Module, caches: int) -> tuple[tuple[int, ...], ...]:
    """Indices in `model.layers` of the layers that read each cache, () where that is not known.

    In Gemma 3n and 4 late layers read the cache of an earlier one.
    """
    layers = len(model.layers)
    source = list(range(layers))
    for _, module in model.named_modules():
        for name in (_CACHE_OF_LAYER, "previous_kvs"):
            source = list(getattr(module, name, source))
    if caches != layers and source == list(range(layers)):
        return ((),) * caches
    return tuple(tuple(i for i, c in enumerate(source) if c == n) for n in range(caches))


def latent_rank(model: nn.Module, layers: tuple[int, ...]) -> int:
    """Elements of the latent that stands for keys and values in these layers (MLA), else 0."""
    ranks = (
        getattr(module, "kv_lora_rank", None)
        for i in layers[:1]
        for _, module in model.layers[i].named_modules()
    )
    return next((int(rank) for rank in ranks if rank), 0)
