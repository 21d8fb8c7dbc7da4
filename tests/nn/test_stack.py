"""All blocks of a model as one node, against the same blocks one by one: equal to the bit."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

import optiq
from optiq.kv import attach, route
from optiq.kv.rows import Unbatchable, can_forget, joined, ragged
from optiq.nn.stack import Stacked, Together, stack
from optiq.ops import native
from tests import architectures
from tests.kv.models import prompts


@pytest.fixture(autouse=True)
def only_native(kernels: None) -> None:
    if not native.active():
        pytest.skip("blocks run as one in the extension only")


def prepared(kind: str, kv: str | None = None, bits: int = 0) -> Any:
    mx.random.seed(3)
    model: Any = architectures.construct(kind)
    if bits:
        nn.quantize(model, 32, bits)
    model = attach(model, kv) if kv else model
    optiq.accelerate(model)
    route(model)
    return model


def read(model: nn.Module, lengths: tuple[int, ...]) -> list[list[Any]]:
    """Sequences of caches that have read prompts of such lengths."""
    sequences = []
    for prompt in prompts(*lengths):
        caches: list[Any] = make_prompt_cache(model)
        mx.eval(model(mx.array([prompt]), cache=caches), [c.state for c in caches])
        sequences.append(caches)
    return sequences


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a model, whether its blocks ran as one."""
    seen: list[bool] = []
    compute = Together._compute

    def spy(self: Together, x: mx.array, mask: Any) -> bool:
        seen.append(compute(self, x, mask))
        return seen[-1]

    monkeypatch.setattr(Together, "_compute", spy)
    return seen


@pytest.mark.parametrize(
    ("kind", "kv"), [("mistral", None), ("mistral", "8/4"), ("gemma3_text", None)]
)
def test_a_stack_is_as_its_blocks(kind: str, kv: str | None, runs: list[bool]) -> None:
    """Past the window, and where a cache grows; in a step in which it does, the blocks run."""
    model = prepared(kind, kv)
    one_by_one = copy.deepcopy(model)
    one_by_one.model._unforeseen = True
    stacked, alone = read(model, (5, 251, 30)), read(one_by_one, (5, 251, 30))
    assert isinstance(model.model, Stacked)
    for step in range(12):
        tokens = mx.array([[2 + (7 * step + i) % 50] for i in range(3)])
        got = model(tokens, cache=joined(stacked))
        expected = one_by_one(tokens, cache=joined(alone))
        assert mx.array_equal(got, expected), step
    for a, b in zip(stacked, alone, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.offset == y.offset
    assert runs.count(True) >= 8
    assert not all(runs)


@pytest.mark.parametrize(
    ("kind", "kv", "right"),
    [("mistral", None, True), ("mistral", "8/4", True), ("granite", None, False)],
)
def test_embedding_and_norm_are_in_the_node(
    kind: str, kv: str | None, right: bool, runs: list[bool]
) -> None:
    """Where a model has nothing else there (Granite scales its embedding), and as they are now."""
    model = prepared(kind, kv, bits=4)
    one_by_one = copy.deepcopy(model)
    one_by_one.model._unforeseen = True
    stacked, alone = read(model, (5, 30)), read(one_by_one, (5, 30))
    together = joined(stacked)
    for step in range(8):
        if step == 4:
            for each in (model, one_by_one):
                each.model.embed_tokens.scales = 2 * each.model.embed_tokens.scales
        tokens = mx.array([[2 + step], [9 - step]])
        got, expected = model(tokens, cache=together), one_by_one(tokens, cache=joined(alone))
        assert mx.array_equal(got, expected), step
        assert model.model._ends.right is right
    assert runs == [True] * (2 if right else 8)  # its own code ran once for each embedding
    assert [c.offset for c in stacked[0]] == [c.offset for c in alone[0]]


@pytest.mark.parametrize(("kind", "kv"), [("mistral", None), ("mistral", "8/4")])
def test_a_prompt_read_beside_others_is_as_read_alone(
    kind: str, kv: str | None, runs: list[bool]
) -> None:
    """In slices of any length, also while a cache grows, when the blocks run one by one."""
    model = prepared(kind, kv)
    shared, alone = read(model, (5, 250, 3)), read(model, (5, 250, 3))
    prompt = prompts(300)[0]
    begin = 3
    for step, n in enumerate((1, 2, 9, 13, 5, 7, 3, 4)):
        tokens, part = [[4 + step], [9 + step]], prompt[begin : begin + n]
        batch = mx.array([*tokens, *([t] for t in part)])
        got = model(batch, cache=ragged(shared[:2], [1, 1, n], shared[2]))
        expected = model(mx.array(tokens), cache=joined(alone[:2]))
        mx.eval(model(mx.array([part]), cache=alone[2]))
        assert mx.array_equal(got, expected), step
        begin += n
    last = mx.array([prompt[begin:]])
    assert mx.array_equal(model(last, cache=shared[2]), model(last, cache=alone[2]))
    assert {True, False} == set(runs)


def test_only_caches_of_all_tokens_are_read_beside_others() -> None:
    model = prepared("gemma3_text")
    sequences = read(model, (5, 4))
    with pytest.raises(Unbatchable, match="caches of all tokens"):
        ragged(sequences[:1], [1, 3], sequences[1])


@pytest.mark.parametrize(
    ("kind", "kv", "can"),
    [("mistral", None, True), ("mistral", "8/4", True), ("gemma3_text", None, False)],
)
def test_who_can_read_guesses_and_forget_them(kind: str, kv: str | None, can: bool) -> None:
    model = prepared(kind, kv)
    assert can_forget(model, lambda: make_prompt_cache(model)) == can


def test_a_cache_that_somebody_else_holds_is_not_written_to(runs: list[bool]) -> None:
    model = prepared("mistral")
    sequences = read(model, (20, 9))
    held = sequences[0][0].keys
    before = held + 0
    mx.eval(before)
    mx.eval(model(mx.array([[3], [4]]), cache=joined(sequences)))
    assert runs == [False]
    assert mx.array_equal(held, before)
    del held
    mx.eval(model(mx.array([[3], [4]]), cache=joined(sequences)))
    assert runs == [False, True]


def test_a_model_that_touches_what_its_blocks_give_runs_block_by_block(runs: list[bool]) -> None:
    class Doubling(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.embed_tokens, self.layers, self.norm = inner.embed_tokens, inner.layers, inner.norm

        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            h = self.embed_tokens(inputs)
            for layer, c in zip(self.layers, cache, strict=True):
                h = 2 * layer(h, None, c)
            y: mx.array = self.norm(h)
            return y

    model = prepared("mistral")
    plain, stacked = Doubling(model.model), stack(Doubling(model.model))
    tokens = mx.array([[3], [4]])
    sequences = read(model, (20, 9))
    expected = plain(tokens, cache=joined(copy.deepcopy(sequences)))
    mx.eval(expected)
    own = read(model, (20, 9))
    assert mx.array_equal(stacked(tokens, cache=joined(own)), expected)
    assert own[0][0].offset == 21
    assert runs == [True]  # and found out
    stacked(tokens, cache=joined(own))
    assert runs == [True]  # it is left alone


def test_a_replaced_block_runs_as_itself(runs: list[bool]) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.use_sliding = inner, False

        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            y: mx.array = self.inner(x, mask, cache)
            return y

    model = prepared("mistral")
    sequences, others = read(model, (20, 9)), read(model, (20, 9))
    tokens = mx.array([[3], [4]])
    expected = model(tokens, cache=joined(sequences))
    mx.eval(expected)
    model.model.layers[1] = Wrapped(model.model.layers[1])
    assert mx.array_equal(model(tokens, cache=joined(others)), expected)
    assert runs == [True, False]


def test_settled_rows_are_those_of_the_model_that_reads_them() -> None:
    """A model and the one with adapters take turns over the same caches."""
    one = prepared("mistral")
    other = copy.deepcopy(one)
    layer = other.model.layers[1].mlp.down_proj
    layer.weight = 2 * layer.weight
    settled, expected = read(one, (20, 9)), read(one, (20, 9))
    rows = joined(settled, settled=True)
    for step, model in enumerate((one, other, one, other)):
        tokens = mx.array([[3 + step], [4]])
        assert mx.array_equal(model(tokens, cache=rows), model(tokens, cache=joined(expected)))
