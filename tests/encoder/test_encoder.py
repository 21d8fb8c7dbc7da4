"""csrc/metal/encoder.cpp with a stand-in for MLX's device: what it encodes is what the plan says,
in any order that the barriers leave open, and with memory that lives long enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from optiq.formats import Format
from optiq.ops import native
from optiq.ops.attention_cases import Attention
from optiq.ops.cases import Product
from optiq.ops.layer_cases import W4, LayerCase
from tests.metal.launcher import (
    native_layer,
    plan_quantized_matmul,
    run_arrays,
    run_layer,
    to_numpy,
)
from tests.metal.test_attention import plan as attention_plan
from tests.msl.emulator import KernelError

from .recorder import Dispatch, Encoder, EncoderError, needs_recorder

pytestmark = needs_recorder

Array = np.ndarray[Any, np.dtype[Any]]
ORDERS: dict[str, Callable[[list[Dispatch]], list[Dispatch]]] = {
    "in order": lambda together: together,
    "reversed": lambda together: together[::-1],
}


@dataclass(frozen=True)
class Step:
    """A plan, its inputs (an array, or the number of an earlier step's output) and outputs."""

    plan: dict[str, Any]
    inputs: Sequence[Array | int]
    outputs: Sequence[tuple[tuple[int, ...], Any]]


def product_step(rows: int = 4, x: Array | None = None, bits: int = 4, inner: int = 128) -> Step:
    case = Product(rows, 37, inner, bits, 64, "f16")
    given = to_numpy(case.activations()) if x is None else x
    plan = plan_quantized_matmul(rows, inner, [(37, (64, bits))], "float16", "float16")
    return Step(plan, [given, *map(to_numpy, case.quantized())], [((rows, 37), np.float16)])


def two_types() -> Step:
    """Weights of two types of scales: two launches that do not wait for each other."""
    cases = [Product(2, 24, 128, 4, 64, "f32"), Product(2, 24, 128, 4, 64, "f32", weights="f16")]
    one, other = (
        plan_quantized_matmul(2, 128, [(24, (64, 4))], "float32", scales)
        for scales in ("float32", "float16")
    )

    def moved(argument: dict[str, Any]) -> dict[str, Any]:
        by = {"input": 3 if argument.get("index") else 0, "output": 1}.get(argument["kind"], 0)
        return argument | ({"index": argument["index"] + by} if by else {})

    launch = other["launches"][0]
    second = launch | {"arguments": [moved(a) for a in launch["arguments"]]}
    plan = one | {"launches": [*one["launches"], second]}
    weights = [to_numpy(w) for case in cases for w in case.quantized()]
    return Step(plan, [to_numpy(cases[0].activations()), *weights], [((2, 24), np.float32)] * 2)


def attention_step() -> Step:
    """Keys in splits, and a launch that merges what they left in temporaries."""
    k8 = Format("affine", 8, 64)
    case = Attention(1, 300, 64, k8, k8, group=2)
    q, (k, v) = case.queries(), case.stored()
    given = case.arguments() | {"tune": "kv_split=128"}
    return Step(
        attention_plan(q, k, v, **given), [to_numpy(a) for a in (q, k, v)], [(q.shape, np.float32)]
    )


def copied() -> Step:
    """x with strides, which is copied first."""
    x = to_numpy(Product(4, 37, 128, 4, 64, "f16").activations())
    return product_step(x=np.repeat(x, 2, axis=1)[:, ::2])


def shifted() -> Step:
    """x at an offset of its buffer."""
    x = to_numpy(Product(4, 37, 128, 4, 64, "f16").activations())
    return product_step(x=np.concatenate([np.full(7, 9, x.dtype), x.ravel()])[7:].reshape(4, 128))


def sorted_experts() -> Step:
    """Where each expert's rows begin, and a launch that reads that."""
    case = Product(24, 3 * 37, 128, 4, 64, "f16")
    weight = [to_numpy(a).reshape(3, 37, -1) for a in case.quantized()]
    which = np.repeat(np.arange(3, dtype=np.uint32), [5, 0, 19])
    plan = plan_quantized_matmul(24, 128, [(37, (64, 4))], experts=3, sorted=True)
    return Step(plan, [to_numpy(case.activations()), *weight, which], [((24, 37), np.float16)])


def records(rows: int = 4, x: Array | int | None = None) -> Step:
    assert native.extension is not None
    fmt = Format("affine", 4, 32)
    plan = native.extension.plan_quantize_kv(rows, (32, (32, 4)), "float16")
    values = to_numpy(mx.random.normal((rows, 32), key=mx.random.key(1)).astype(mx.float16))
    words = 1 + 32 * fmt.bits // 32
    return Step(plan, [values if x is None else x], [((rows, words), np.uint32)])


def narrow(inputs: Sequence[Array | int]) -> Step:
    """A product with 32 outputs of 4 rows, of which `records` can be made."""
    case = Product(4, 32, 128, 4, 64, "f16")
    plan = plan_quantized_matmul(4, 128, [(32, (64, 4))], "float16", "float16")
    weights = map(to_numpy, case.quantized())
    x = to_numpy(case.activations())
    return Step(plan, [*(inputs or [x]), *weights], [((4, 32), np.float16)])


# Name -> steps, and for each dispatch whether a barrier comes before it.
WORK: dict[str, tuple[Callable[[], list[Step]], str]] = {
    "one": (lambda: [product_step()], "."),
    "two types": (lambda: [two_types()], ".."),
    "attention": (lambda: [attention_step()], ".|"),
    "split sums": (lambda: [product_step(17, inner=512)], ".|"),
    "sorted experts": (lambda: [sorted_experts()], ".|"),
    "copied": (lambda: [copied()], ".|"),
    "shifted": (lambda: [shifted()], "."),
    "one after another": (lambda: [narrow([]), records(x=0)], ".|"),
    "beside each other": (lambda: [narrow([]), product_step(2), records(x=0)], "..|"),
    "twice": (lambda: [attention_step(), copied(), attention_step()], ".|..|."),
}


def expected(steps: Sequence[Step]) -> list[Array]:
    """By the plans, one launch after the other."""
    done: list[Array] = []
    for step in steps:
        inputs = [np.ascontiguousarray(done[a] if isinstance(a, int) else a) for a in step.inputs]
        done += run_arrays(step.plan, inputs, step.outputs)[0]
    return done


def encoded(steps: Sequence[Step], encoder: Encoder) -> list[int]:
    outputs: list[int] = []
    for step in steps:
        inputs = [outputs[a] if isinstance(a, int) else encoder.array(a) for a in step.inputs]
        made = [encoder.output(*o) for o in step.outputs]
        encoder.run(step.plan, inputs, made)
        outputs += made
    return outputs


@pytest.mark.parametrize("work", WORK)
def test_it_encodes_what_the_plans_say(work: str) -> None:
    """To the bit, whatever runs first of what no barrier orders; and no barrier too many."""
    make, barriers = WORK[work]
    steps = make()
    truth = expected(steps)
    encoder = Encoder()
    outputs = encoded(steps, encoder)
    found = encoder.dispatches()
    if work != "twice":  # where a barrier orders more than it was asked to
        assert "".join("|" if d.after_barrier else "." for d in found) == barriers
    for order in ORDERS.values():
        encoder.execute(found, order)
        for got, right in zip(outputs, truth, strict=True):
            assert np.array_equal(encoder.contents(got), right)


# What is wrong -> a text of encoder.cpp, another in its place, and work that shows it.
PLANTED = {
    "a temporary that is not known to be written": (
        "encoder.set_output_array(temporaries[argument.index], int(i));",
        "encoder.set_input_array(temporaries[argument.index], int(i));",
        "attention",
    ),
    "a temporary that nobody keeps": ("encoder.add_temporary(temporary);", "", "attention"),
    "an output that is not known to be written": (
        "encoder.set_output_array(outputs[argument.index], int(i));",
        "encoder.set_input_array(outputs[argument.index], int(i));",
        "one after another",
    ),
    "a copy that nobody keeps": (
        "mx::metal::get_command_encoder(stream).add_temporary(copy);",
        "",
        "copied",
    ),
    "strides that are not heeded": ("row_contiguous(inputs[i], stream)", "inputs[i]", "copied"),
    "an input in the place of another": (
        "encoder.set_input_array(inputs[argument.index], int(i));",
        "encoder.set_input_array(inputs[argument.index], int(i == 2 ? 3 : i == 3 ? 2 : i));",
        "one",
    ),
    "constants in the wrong place": (
        "int(argument.bytes.size()), int(i));",
        "int(argument.bytes.size()), int(i) + 1);",
        "one",
    ),
    "constants that are cut short": (
        "int(argument.bytes.size()), int(i));",
        "int(argument.bytes.size()) - 4, int(i));",
        "one",
    ),
    "the kernel of another launch": (
        "static_cast<MTL::ComputePipelineState*>(compiled[l])",
        "static_cast<MTL::ComputePipelineState*>(compiled[0])",
        "attention",
    ),
    "threads in place of threadgroups": (
        "encoder.dispatch_threadgroups(size(launch.threadgroups), size(launch.threads));",
        "encoder.dispatch_threadgroups(size(launch.threads), size(launch.threadgroups));",
        "one",
    ),
    "an output of half the bytes": (
        "a.set_data(mx::allocator::malloc(a.nbytes()));",
        "a.set_data(mx::allocator::malloc(a.nbytes() / 8));",
        "attention",
    ),
}


# Each is a build of its own, of a second or two.
SHORT = list(PLANTED)[:4]


@pytest.mark.parametrize(
    "fault", [f if f in SHORT else pytest.param(f, marks=pytest.mark.schedules) for f in PLANTED]
)
def test_a_fault_in_the_encoder_shows(fault: str) -> None:
    old, new, work = PLANTED[fault]
    steps = WORK[work][0]()
    truth = expected(steps)
    encoder = Encoder((old, new))
    shows = False
    try:
        outputs = encoded(steps, encoder)
        for order in ORDERS.values():
            encoder.execute(encoder.dispatches(), order)
            found = [encoder.contents(a) for a in outputs]
            shows |= not all(map(np.array_equal, found, truth))
    except (EncoderError, KernelError, ValueError) as error:
        shows = bool(str(error))
    assert shows


STAGES = {
    "library": ({"fails": "library"}, "build metal library"),
    "function": ({"fails": "function"}, "load function"),
    "pipeline": ({"fails": "pipeline"}, "load kernel"),
    "threads": ({"allowed": 32}, "threads in a threadgroup"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("work", ["one", "attention"])
def test_where_a_stage_fails_nothing_is_encoded(stage: str, work: str) -> None:
    how, text = STAGES[stage]
    encoder = Encoder(**how)
    with pytest.raises(EncoderError, match=text):
        encoded(WORK[work][0](), encoder)
    assert not encoder.dispatches()
    assert encoder.lib.rec_temporaries() == 0


def test_a_library_is_made_once() -> None:
    encoder = Encoder()
    encoded([product_step(), product_step()], encoder)
    assert len({d.text for d in encoder.dispatches()}) == 1


LAYER = LayerCase("", (W4, W4, W4), W4, (W4, W4), W4, keys=30, width=64, hidden=64, heads=4)
NUMBERS = LAYER.width, LAYER.heads, LAYER.kv_heads, LAYER.dim, LAYER.hidden, 32, 4


def started(encoder: Encoder) -> tuple[int, list[int]]:
    """h and the caches of a layer; an output of 1 value stands where it has no array."""
    arrays = [np.atleast_1d(to_numpy(a)) for a in native_layer(LAYER).arrays]
    encoder.layer(NUMBERS, [encoder.array(a) for a in arrays])
    return encoder.array(to_numpy(LAYER.h)), [encoder.array(to_numpy(c)) for c in LAYER.caches]


def tokens(count: int) -> list[tuple[int, int, int]]:
    return [(n - 1, n, n + 3) for n in range(LAYER.keys, LAYER.keys + count)]


def test_a_layer_from_token_to_token() -> None:
    """In its caches, with nothing built after the first token; the result is that of the plans."""
    encoder, layer = Encoder(), native_layer(LAYER)
    h, caches = started(encoder)
    memory = [encoder.memory(c) for c in caches]
    right = [LAYER.h, *LAYER.caches]
    for i, place in enumerate(tokens(3)):
        h, *caches = encoder.token(h, caches, place)
        if i == 0:
            asked = encoder.lib.rec_asked()
        right = run_layer(layer, *right, place)[0]
    assert encoder.lib.rec_asked() == asked == 6
    assert [encoder.memory(c) for c in caches] == memory
    found = encoder.dispatches()
    assert "".join("|" if d.after_barrier else "." for d in found) == ".|||||" + "||||||" * 2
    encoder.execute(found)
    for got, expected in zip((h, *caches), right, strict=True):
        assert np.array_equal(encoder.contents(got), to_numpy(expected))


def test_a_cache_that_somebody_holds_is_copied() -> None:
    encoder = Encoder()
    h, caches = started(encoder)
    _, *copies = encoder.token(h, caches, LAYER.place, held=True)
    found = encoder.dispatches()
    assert [d.kernel.startswith("copy_rows") for d in found] == [True, True, *[False] * 6]
    encoder.execute(found)
    right = run_layer(native_layer(LAYER), LAYER.h, *LAYER.caches, LAYER.place)[0]
    for held, copy, before, after in zip(caches, copies, LAYER.caches, right[1:], strict=True):
        assert np.array_equal(encoder.contents(held), to_numpy(before))
        assert np.array_equal(encoder.contents(copy), to_numpy(after))


@pytest.mark.parametrize("stage", STAGES)
def test_where_a_stage_fails_nothing_of_a_layer_is_encoded(stage: str) -> None:
    how, text = STAGES[stage]
    encoder = Encoder(**how)
    with pytest.raises(EncoderError, match=text):
        encoder.token(*started(encoder), LAYER.place)
    assert not encoder.dispatches()
