"""Carries out launch plans on the emulator, as csrc/metal/encoder.cpp does on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

import optiq  # noqa: F401
from optiq.ops import native
from optiq.ops.layer_cases import LayerCase
from tests.msl.emulator import APPLE, Chip, Counters, InOut, Module, Out

METAL = Path(__file__).parents[2] / "metal"
NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
NUMPY = {
    mx.float32: np.float32,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.uint32: np.uint32,
    mx.bool_: np.bool_,
}
Mode = Literal["check", "fast"]
Plan = dict[str, Any]


@functools.cache
def compiled(
    source: str, instantiations: frozenset[tuple[str, str]], mode: Mode, contracts: bool
) -> Module:
    chip = Chip(contracts=contracts)
    return Module(METAL / source, dict(sorted(instantiations)), mode=mode, chip=chip)


def compile_together(plans: Sequence[Plan], mode: Mode = "check") -> None:
    """Compile the kernels of many plans at once, in tens; later runs find them by name."""
    by_source: dict[str, dict[str, str]] = {}
    for launch in (launch for plan in plans for launch in plan["launches"]):
        by_source.setdefault(launch["source"], {})[launch["kernel"]] = launch["instantiation"]
    for source, kernels in by_source.items():
        names = sorted(name for name in kernels if (source, name, mode) not in _modules)
        for i in range(0, len(names), 16):
            chosen = frozenset((name, kernels[name]) for name in names[i : i + 16])
            for name, _ in chosen:
                _modules[source, name, mode] = (source, chosen, mode)


_modules: dict[tuple[str, str, Mode], tuple[str, frozenset[tuple[str, str]], Mode]] = {}


def module(launch: dict[str, Any], mode: Mode, contracts: bool = True) -> Module:
    key = (launch["source"], launch["kernel"], mode)
    alone = (launch["source"], frozenset([(launch["kernel"], launch["instantiation"])]), mode)
    return compiled(*_modules.get(key, alone), contracts)


def to_numpy(a: mx.array) -> np.ndarray:
    """bfloat16 travels as its bits."""
    return np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)


def to_mlx(a: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(a).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(a)


def run_arrays(
    plan: Plan,
    inputs: Sequence[np.ndarray],
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    mode: Mode = "check",
    shuffle: int | bool = False,
    chip: Chip = APPLE,
    held: Mapping[int, np.ndarray] = {},
) -> tuple[list[np.ndarray], Counters]:
    """The plan's outputs, and what its launches counted together.

    A temporary is written by the first launch that has it, and read by the later ones. `held`: what
    an output holds before, if launches add to it. Constants are not counted: a GPU has them in
    registers before a kernel starts.
    """
    results = [held.get(i, np.zeros(*output)) for i, output in enumerate(outputs)]
    temporaries: dict[int, np.ndarray] = {}
    total: Counters | None = None
    for launch in plan["launches"]:
        arguments: dict[int, Any] = {}
        written: list[tuple[Any, int]] = []
        for i, argument in enumerate(launch["arguments"]):
            if argument["kind"] == "input":
                arguments[i] = inputs[argument["index"]]
            elif argument["kind"] == "constants":
                arguments[i] = np.frombuffer(argument["bytes"], np.uint8)
            elif argument["index"] in held and argument["kind"] == "output":
                arguments[i] = InOut(results[argument["index"]])
                written.append((results, argument["index"]))
            elif argument["kind"] == "output":
                arguments[i] = Out(*outputs[argument["index"]])
                written.append((results, argument["index"]))
            elif argument["index"] in temporaries:
                arguments[i] = temporaries[argument["index"]]
            else:
                arguments[i] = Out((plan["temporaries"][argument["index"]],), np.uint8)
                written.append((temporaries, argument["index"]))
        out, counters = module(launch, mode, chip.contracts)(
            launch["kernel"],
            arguments,
            grid=launch["threadgroups"],
            threads=launch["threads"],
            shuffle=shuffle,
            chip=chip,
        )
        for (where, index), array in zip(written, out, strict=True):
            where[index] = array
        for i, argument in enumerate(launch["arguments"]):
            if argument["kind"] == "constants":
                counters = counters.without(i)
        total = counters if total is None else total + counters
    assert total is not None, "a plan without launches"
    return results, total


def run(
    plan: Plan,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    mode: Mode = "check",
    shuffle: int | bool = False,
    chip: Chip = APPLE,
) -> tuple[list[mx.array], Counters]:
    """The same on MLX arrays."""
    shapes = [(shape, NUMPY[dtype]) for shape, dtype in outputs]
    out, counters = run_arrays(plan, [to_numpy(a) for a in inputs], shapes, mode, shuffle, chip)
    return [to_mlx(a, dtype) for a, (_, dtype) in zip(out, outputs, strict=True)], counters


def plan_quantized_matmul(*arguments: Any, **keywords: Any) -> Plan:
    assert native.extension is not None, native.reason
    plan: Plan = native.extension.plan_quantized_matmul(*arguments, **keywords)
    return plan


def plan_quantized_attention(*arguments: Any, **keywords: Any) -> Plan:
    assert native.extension is not None, native.reason
    plan: Plan = native.extension.plan_quantized_attention(*arguments, **keywords)
    return plan


def native_layer(case: LayerCase) -> Any:
    """The extension's, of a case."""
    assert native.extension is not None, native.reason
    return case.layer.native(native.extension, case.h.dtype, case.formats)


def strides(a: mx.array) -> tuple[int, int, int]:
    """Of batch entry, head and token of a cache."""
    _, heads, tokens, last = a.shape
    return heads * tokens * last, tokens * last, last


def plan_layer(case: LayerCase, **options: Any) -> Plan:
    how = {"place": case.place, **options}
    k_strides, v_strides = map(strides, case.caches)
    plan: Plan = native_layer(case).plan(
        case.batch, k_strides=k_strides, v_strides=v_strides, **how
    )
    return plan


def run_layer(
    layer: Any, h: mx.array, keys: mx.array, values: mx.array, place: Sequence[int], **how: Any
) -> tuple[list[mx.array], Counters]:
    """h and the caches after a layer of the extension."""
    plan = layer.plan(h.shape[0], place, strides(keys), strides(values))
    inputs = [h, *(a[None] if a.ndim == 0 else a for a in layer.arrays)]
    held = {1 + i: to_numpy(a) for i, a in enumerate((keys, values))}
    shapes = [(a.shape, NUMPY[a.dtype]) for a in (h, keys, values)]
    out, counters = run_arrays(plan, [to_numpy(a) for a in inputs], shapes, held=held, **how)
    kinds = h.dtype, keys.dtype, values.dtype
    return [to_mlx(a, kind) for a, kind in zip(out, kinds, strict=True)], counters
