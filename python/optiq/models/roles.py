"""What each module of a model is for: the only place that looks at paths and classes.

Everything else asks here for a module's role, fused unit, block, floor and allowed formats. The
names are those of the model files in mlx-lm 0.32. A model file that says which of its modules must
not be quantized (`quant_predicate` giving False) is obeyed; the bit widths it fixes are noted, for
the comparison with stock, but here the scores decide.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from ..formats import DENSE, UNIFORM4, Format

if TYPE_CHECKING:  # a plan needs floors, not MLX
    import mlx.nn as nn


class Role(Enum):
    """What a weight does. Shared experts are MLP: every token runs through them."""

    EMBEDDING = "embedding"
    HEAD = "head"
    ATTENTION = "attention"  # softmax, latent and linear attention
    MLP = "mlp"
    ROUTER = "router"  # picks or weighs experts
    EXPERT = "expert"
    OTHER = "other"  # state-space and convolution mixers, adapters between streams


@dataclass(frozen=True)
class Module:
    """One module with a quantizable weight.

    `shape` is that of the unquantized weight: (out, in), (vocabulary, width) for an embedding,
    (experts, out, in) for expert layers, (heads, ...) for absorbed latent attention. Modules that
    multiply the same input share a `unit`. `block` is the index in `model.layers`, None outside.
    `tied` marks the embedding that is also the output head. `stock` is the format that mlx-lm's
    own converter gives this module whatever width is asked for, where its model file insists.
    """

    path: str
    role: Role
    unit: str
    shape: tuple[int, ...]
    block: int | None
    tied: bool = False
    stock: Format | None = None


# Router logits decide which weights run at all, so an error there is not a small one; embeddings
# and heads touch every token, and two bits were never tried for them.
_FLOORS = {Role.ROUTER: 8, Role.HEAD: 3, Role.EMBEDDING: 3}

_EMBEDDINGS = {"embed_tokens", "wte", "tok_embeddings", "word_embeddings", "embeddings", "embed_in"}
_HEADS = {"lm_head", "embed_out"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_ATTENTION = {
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "att_proj", "query_key_value", "Wqkv",
}  # fmt: skip
_MLP = {
    "gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "w1", "w2", "w3", "c_fc",
    "ff_proj", "ff_out", "fc_in", "fc_out", "dense_h_to_4h", "dense_4h_to_h",
}  # fmt: skip
# Leaves of one parent that multiply the same input, by the unit's name.
_UNITS = {
    "qkv": (
        "q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa", "wq", "wk", "wv",
        "c_q", "c_k", "c_v", "attn_query", "attn_key", "attn_value",
    ),
    "gate_up": ("gate_proj", "up_proj", "w1", "w3", "c_fc_0", "c_fc_1", "mlp_gate", "mlp_linear"),
    "in_proj": (
        "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a",
    ),
}  # fmt: skip
_UNIT_OF = {leaf: unit for unit, leaves in _UNITS.items() for leaf in leaves}
# Write back to the residual stream, so they run after their siblings.
_LAST = {
    "o_proj", "out_proj", "down_proj", "c_proj", "dense", "wo", "w2", "fc2", "proj_2",
    "dense_4h_to_h", "attn_out", "attn_resid", "ff_out", "fc_out", "output_linear", "linear_out",
    "mlp_resid",
}  # fmt: skip


def floor(role: Role) -> int:
    """The fewest bits a role may have; 2 means no floor."""
    return _FLOORS.get(role, 2)


def allowed(module: Module, menu: Sequence[Format]) -> tuple[Format, ...]:
    """The formats of `menu` that fit the module's shape and floor; dense when none does."""
    least = floor(module.role)
    fitting = tuple(f for f in menu if f.fits(module.shape) and f.bits >= least)
    return fitting or (DENSE,)


def role_of(path: str) -> Role:
    """The role as far as the path alone tells, for tables that come without a model."""
    parts = path.split(".")
    leaf, names = parts[-1], set(parts)
    if leaf in _EMBEDDINGS:
        return Role.EMBEDDING
    if leaf in _HEADS:
        return Role.HEAD
    if names & _ROUTERS:
        return Role.ROUTER
    if leaf in _ATTENTION or any("attn" in p or "attention" in p for p in parts):
        return Role.ATTENTION
    if names & {"experts", "switch_mlp"}:
        return Role.EXPERT
    if leaf in _MLP or any(
        p.startswith(("shared_expert", "feed_forward")) or "mlp" in p for p in parts
    ):
        return Role.MLP
    return Role.OTHER


def block_of(path: str) -> int | None:
    """The block index as far as the path alone tells."""
    match = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", path)
    return int(match[1]) if match else None


def unit_of(path: str) -> str:
    """The id of the fused unit: the parent's path and the unit's name, or the path itself."""
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{_UNIT_OF[leaf]}" if leaf in _UNIT_OF else path


def quantizable(model: nn.Module) -> list[Module]:
    """Every module of an unquantized mlx-lm model that can be stored quantized, in flow order."""
    found = _candidates(model)
    insisted = _stock_formats(model, found)
    blocks = _blocks(model)
    embeddings = [path for path, m in found.items() if hasattr(m, "as_linear")]
    vocabulary = found[embeddings[0]].weight.shape[0] if embeddings else None
    units = Counter(unit_of(path) for path in found)
    modules = []
    for path, m in found.items():
        shape = tuple(m.weight.shape)
        block = next((i for prefix, i in blocks.items() if path.startswith(prefix)), None)
        role = role_of(path)
        if hasattr(m, "as_linear"):
            role = Role.EMBEDDING
        elif block is None and (role is Role.HEAD or shape[0] == vocabulary):
            role = Role.HEAD
        elif hasattr(m, "num_experts") and role is not Role.ATTENTION:
            role = Role.EXPERT
        unit = unit_of(path)
        unit = unit if units[unit] > 1 else path
        modules.append(Module(path, role, unit, shape, block, stock=insisted.get(path)))
    if embeddings and not _has_head(model, modules):
        modules = [replace(m, tied=m.path == embeddings[0]) for m in modules]
    return _flow_order(modules)


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of `model.layers` by path, in order."""
    inside = {id(layer) for layer in getattr(model, "layers", None) or ()}
    return {path: m for path, m in reversed(model.named_modules()) if id(m) in inside}


def fixed_bytes(model: nn.Module, modules: Sequence[Module]) -> int:
    """Bytes of all tensors that are never quantized: norms, biases, convolutions, ..."""
    from mlx.utils import tree_flatten

    weights = {f"{m.path}.weight" for m in modules}
    tensors: dict[str, Any] = dict(tree_flatten(model.parameters()))
    return sum(array.nbytes for name, array in tensors.items() if name not in weights)


def _has_head(model: nn.Module, modules: Sequence[Module]) -> bool:
    """Whether other weights than the embedding's make the logits, quantizable or not."""
    from mlx.utils import tree_flatten

    names: dict[str, Any] = dict(tree_flatten(model.parameters()))
    return any(m.role is Role.HEAD for m in modules) or any(
        not _HEADS.isdisjoint(name.split(".")) for name in names
    )


def _candidates(model: nn.Module) -> dict[str, Any]:
    """Leaf modules that stock mlx-lm can store in any affine format, in definition order."""
    from ..base.modules import leaf_modules

    predicate = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    layers: dict[str, Any] = leaf_modules(model)
    return {
        path: m
        for path, m in layers.items()
        if hasattr(m, "to_quantized")
        and "mode" in inspect.signature(m.to_quantized).parameters
        and predicate(path, m)
    }


def _stock_formats(model: nn.Module, found: dict[str, Any]) -> dict[str, Format]:
    """What the model file's `quant_predicate` fixes for some modules, such as 8-bit routers."""
    predicate = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    fixed = {path: predicate(path, m) for path, m in found.items()}
    return {
        path: Format("affine", params["bits"], params.get("group_size", UNIFORM4.group_size))
        for path, params in fixed.items()
        if isinstance(params, dict) and params.get("mode", "affine") == "affine"
    }


def _blocks(model: nn.Module) -> dict[str, int]:
    """Path prefix of each block, by identity with `model.layers`."""
    index = {id(layer): i for i, layer in enumerate(getattr(model, "layers", None) or ())}
    named = model.named_modules()
    return {f"{path}.": index[id(m)] for path, m in named if id(m) in index}


def _flow_order(modules: list[Module]) -> list[Module]:
    """Embeddings, blocks, head; in a block routers run before experts, output projections last."""
    first: dict[str, int] = {}  # index of the first module at or below each path
    for i, m in enumerate(modules):
        parts = m.path.split(".")
        for depth in range(1, len(parts) + 1):
            first.setdefault(".".join(parts[:depth]), i)

    def key(m: Module) -> tuple[int, int, int, bool, bool]:
        if m.block is None:
            stage = {Role.EMBEDDING: 0, Role.HEAD: 3}.get(m.role, 1)
            return (stage, 0, 0, False, False)
        parent, _, leaf = m.path.rpartition(".")
        group = m.path if parent.endswith(f".{m.block}") else parent
        return (2, m.block, first[group], m.role is not Role.ROUTER, leaf in _LAST)

    return sorted(modules, key=key)


def is_head(module: Module) -> bool:
    """Whether the module's weight makes the logits."""
    return module.tied or module.role is Role.HEAD
