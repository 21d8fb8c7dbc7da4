"""Native layers and fused blocks, and `accelerate`, which puts them into a model in place.

Each layer is its stock counterpart with the same parameters; only the product differs. On the
CPU activations are float32: the kernels accumulate in it anyway, and 16-bit activations would
only cost accuracy and conversions. So that nothing else is rounded to 16 bits on the way (as the
`1 + weight` of Gemma's norms would be), vectors such as norm weights also become float32. On a GPU
all dtypes stay.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..base.modules import leaf_modules
from ..base.text import dtype_name
from ..formats import AFFINE_BITS, AFFINE_GROUPS, Format
from ..models.blocks import Unknown, describe
from ..models.kinds import Kind, kind_of
from ..models.places import place_at
from ..models.roles import blocks as blocks_of
from ..ops import AffineWeight, matmul, metal, native
from .blocks import Fused, fuse, launchable
from .check import disagreement
from .gated import gate
from .layers import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedMultiLinear,
    QuantizedSwitchLinear,
    stock_classes,
)
from .parts import Description
from .stack import Stacked, stack, stackable
from .tiled import tile
from .tokenwise import norm_and_rotate
from .whole_text import attend_whole_texts


@dataclass
class Accelerated:
    """What was swapped, and what was left alone.

    `swapped`: paths of the layers that became native. `fused`: path of each block that runs as a
    whole -> what of it does. `left`: path of each other layer or block -> the reason.
    """

    swapped: list[str] = field(default_factory=list)
    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def accelerate(
    model: nn.Module, *, blocks: bool = True, exact: bool = True, repack: bool = False
) -> Accelerated:
    """Swap linear, embedding and expert layers of an mlx-lm model for native ones, in place.

    With `blocks`, decoder blocks of a known kind also run as a whole. Where the layers of a block
    are replaced, tapped or differentiated later, it runs layer by layer again; if that is all that
    you do, pass `blocks=False`, for which gated MLPs have a native activation with a gradient, and
    so have attention over a whole text, norms and rotations. A kind of block, MLP or norm is first
    compared with the original on random input, and left alone if the two disagree.

    On the CPU products with weights in few bits are as exact as those of float32. Without `exact`
    they read activations as 16-bit fixed point, each group by its largest value: 1.05 to 1.4 times
    as fast, at a KL of about 2e-7.

    With `repack`, on the CPU, the weights of quantized linear layers are put into the order in
    which products read them, for 1.1 to 1.4 times the speed. There is one copy of each weight. It
    looks as before: whoever reads a parameter, or saves the model, gets the bytes that it had, and
    the memory for them is taken then.

    On a Metal GPU quantized linear layers and embeddings are swapped, and blocks in which they
    share an input run with one launch for it. Quantized experts are swapped for the prompts in
    which their rows are sorted. All else stays stock. What an answer launches, token
    by token, is compiled and compared here, before the first token; a layer or block whose kernels
    fail is left as it is, with one warning. One that is slower than stock MLX on this chip is left
    without a warning (optiq.ops.contest), unless OPTIQ_METAL=1. On other GPUs nothing is swapped.
    What is native already is not in the report.
    """
    report = Accelerated()
    swaps: list[tuple[str, nn.Module]] = []
    refusals: dict[Any, str] = {}  # on a GPU, of each kind of layer
    classes = stock_classes()
    for path, module in leaf_modules(model).items():
        native_class = classes.get(type(module))
        if type(module) in classes.values():
            continue
        if native_class is None:
            weight = getattr(module, "weight", None)
            if isinstance(weight, mx.array) and weight.ndim > 1:
                report.left[path] = f"{type(module).__name__} has no native counterpart"
        elif reason := _unsupported(module) or _refusal(module, refusals):
            report.left[path] = reason
        else:
            swaps.append((path, native_class.adopt(module)))
            report.swapped.append(path)
    for path, module in swaps:
        module.exact = exact
        place_at(model, path).set(module)
    if native.on_cpu():
        model.apply(_exact)
    if not blocks:
        gate(model)
        attend_whole_texts(model)
        norm_and_rotate(model)
    elif native.on_cpu() or metal.enabled():
        _fuse_blocks(model, report)
    if repack:
        _repack(model)
    if metal.enabled():
        _rehearse(model)
    return report


def _repack(model: nn.Module) -> None:
    for module in leaf_modules(model).values():
        if isinstance(module, QuantizedLinear):
            tile(module)


def _rehearse(model: nn.Module) -> None:
    """Build the graph of two tokens, so that all they launch is tried: with the dtypes that reach
    each layer, and the kernels of the model's own cache, which the first makes."""
    with suppress(Exception):  # a model that is not a language model is tried later, as it runs
        cache = make_prompt_cache(model)
        for _ in range(2):
            model(mx.zeros((1, 1), dtype=mx.int32), cache=cache)


def _fuse_blocks(model: nn.Module, report: Accelerated) -> None:
    verdicts: dict[Any, str] = {}  # of each kind of block
    for path, block in blocks_of(model).items():
        if isinstance(block, Fused):
            continue
        try:
            anatomy = describe(block)
            description = Description(block, anatomy)
        except Unknown as reason:
            report.left[path] = str(reason)
            continue
        kind: tuple[Any, ...] = (type(block), anatomy)
        if description.meeting:
            if not native.on_cpu():
                report.left[path] = "its ranks meet between its halves"
                continue
            # Ranks may have other heads, but have to make the same trials.
            of_all = replace(anatomy.attention, heads=0, kv_heads=0)
            kind = type(block), replace(anatomy, attention=of_all)
        dtype = mx.float32
        if not native.on_cpu():
            launches, dtype = description.launches(), _dtype(block)
            named = [matmul.several(dtype, 1, parts) for parts in launches]
            shared = [parts for parts in launches if len(parts) > 1]
            if not shared and not launchable(block, anatomy):
                report.left[path] = (
                    "no quantized projections share an input, so a GPU gains nothing"
                )
                continue
            refused = [matmul.refusal_together(dtype, parts) for parts in shared]
            if shared and all(refused):
                report.left[path] = refused[0]
                continue
            kind = (*kind, *named)
        fused = fuse(block, anatomy)
        if kind not in verdicts:
            slower = "" if native.on_cpu() else _slower(block, fused, description, dtype)
            wrong = "" if slower else disagreement(block, fused, description.width, dtype)
            verdicts[kind] = slower or wrong
            if wrong and not native.on_cpu():
                metal.warn(matmul.OP, (path,), wrong)
        if verdicts[kind]:
            report.left[path] = verdicts[kind]
        else:
            place_at(model, path).set(fused)
            report.fused[path] = "attention and MLP" if anatomy.mlp else "attention"
    if native.on_cpu():
        _stack_blocks(model)


def _stack_blocks(model: nn.Module) -> None:
    """Let the module whose `layers` are all the blocks run them as one node."""
    paths = blocks_of(model)
    parents = {path.rpartition(".layers.")[0] for path in paths}
    if len(parents) == 1 and (parent := parents.pop()) and stackable(list(paths.values())):
        place = place_at(model, parent)
        if len(place.get()["layers"]) == len(paths) and not isinstance(place.get(), Stacked):
            place.set(stack(place.get()))


def quantized(
    module: nn.Module, codes: mx.array, scales: mx.array, biases: mx.array | None, fmt: Format
) -> nn.Module:
    """The native quantized layer that `module` becomes with its weight rounded to `fmt`.

    `module` is a Linear, Embedding, SwitchLinear or MultiLinear, stock or native; its bias is
    carried over.
    """
    out: nn.Module
    if isinstance(module, nn.Linear):
        out = QuantizedLinear.empty()
    elif isinstance(module, nn.Embedding):
        out = QuantizedEmbedding.empty()
        rows, dims = module.weight.shape
        out.num_embeddings, out.dims = rows, dims
    elif kind_of(module) is Kind.HEADS:
        out = QuantizedMultiLinear.empty()
    else:
        out = QuantizedSwitchLinear.empty()
        out.global_scale = None
    out.group_size, out.bits, out.mode = fmt.group_size, fmt.bits, fmt.mode
    out.exact = getattr(module, "exact", False)
    out.weight, out.scales, out.biases = codes, scales, biases
    if "bias" in module:
        out.bias = module["bias"]
    out.freeze()
    return out


def _refusal(module: nn.Module, seen: dict[Any, str]) -> str:
    """Why the Metal kernels do not compute the product of this layer at one row, or of experts at
    many."""
    if native.on_cpu():
        return ""
    weight = AffineWeight(
        module["weight"], module["scales"], module["biases"], module.group_size, module.bits
    )
    kind = weight.scales.dtype, weight.group_size, weight.bits, tuple(weight.scales.shape)
    if kind not in seen:
        refusal = matmul.refusal_sorted if weight.scales.ndim == 3 else matmul.refusal
        seen[kind] = refusal(weight.scales.dtype, weight)
    return seen[kind]


def _slower(block: nn.Module, fused: nn.Module, description: Description, dtype: mx.Dtype) -> str:
    """Why the whole block is left, or nothing: timed at one row, with no keys before it."""

    def work(block: nn.Module) -> Callable[[mx.array], mx.array]:
        def step(x: mx.array) -> mx.array:
            out = block(x, None, None)
            hidden: mx.array = out[0] if isinstance(out, tuple) else out
            return hidden

        return step

    products = " / ".join(
        " + ".join(f"{w.scales.shape[0]}x{w.bits} bits" for w in parts)
        for parts in description.launches()
    )
    heads = f"{description.attention['heads']} and {description.attention['kv_heads']} heads"
    name = (
        f"{type(block).__module__.rpartition('.')[2]}.{type(block).__name__}, {dtype_name(dtype)}, "
        f"{description.width} wide, {heads}, {products}"
    )
    x = mx.random.normal((1, 1, description.width), key=mx.random.key(0)).astype(dtype)
    try:
        return metal.slower(name, work(fused), work(block), x)
    except Exception as error:  # whatever a compiler, a driver or MLX raises
        why = f"it does not run ({error})"
        metal.warn(matmul.OP, (name,), why)
        return f"{metal.FAILED}: {why}"


def _dtype(block: nn.Module) -> mx.Dtype:
    """Of the activations: what most of its scales and vectors have."""
    arrays: dict[str, mx.array] = dict(tree_flatten(block.parameters()))
    floating = [a.dtype for a in arrays.values() if mx.issubdtype(a.dtype, mx.floating)]
    return max(floating, key=floating.count)


def _exact(parameter: mx.array) -> mx.array:
    vector = parameter.ndim <= 1 and mx.issubdtype(parameter.dtype, mx.floating)
    return parameter.astype(mx.float32) if vector else parameter


def _unsupported(module: nn.Module) -> str:
    if not native.on_cpu():
        if metal.enabled() is None:
            return "the default device is a GPU, where stock MLX runs it"
        if kind_of(module) is Kind.HEADS or not hasattr(module, "bits"):
            return "on a GPU stock MLX runs dense layers and those of heads"
    if not hasattr(module, "bits"):
        return ""
    if module.mode == "nvfp4" and native.on_cpu() and getattr(module, "global_scale", None) is None:
        return ""  # the stock product, but exact and, for many rows, faster
    if module.mode != "affine":
        return f"mode {module.mode!r} has no native kernel"
    if module.bits not in AFFINE_BITS or module.group_size not in AFFINE_GROUPS:
        return f"{module.bits} bits in groups of {module.group_size} have no native kernel"
    return ""
