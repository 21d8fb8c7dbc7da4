"""Run a model from any block on, with what the blocks before it gave in a recorded run.

The entries of `model.layers` are replaced by wrappers for the length of a with block. A wrapper
whose block need not run returns the recorded output instead, whatever its structure; everything
between the blocks (masks, norms, scalings, logit caps) stays the model's own code. MLX is lazy, so
what only the skipped blocks would have needed is never computed.

Where later blocks read what a block writes to its cache, that is part of what the block returns:
it is recorded, and written again in the block's place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import checkpoint
from mlx.utils import tree_flatten, tree_map

from ..errors import SensitivityError
from ..models.blocks import whole_text_caches
from ..models.places import Place, Wrapper, place_at
from ..models.roles import Module, Role

ALL = range(1 << 30)  # every block call


@dataclass
class Tape:
    """One recorded run: `outputs[n]` is what the n-th block call returned."""

    tokens: mx.array  # [1, T]
    outputs: list[Any]
    hidden: mx.array  # [1, T, d], the input of the output head
    vocabulary: int

    def chunks(self, nbytes: int) -> Iterator[slice]:
        """The tokens in parts whose float32 logits take at most `nbytes`, or of one token."""
        rows = max(1, nbytes // (4 * self.vocabulary))
        for start in range(0, self.tokens.shape[1], rows):
            yield slice(start, start + rows)

    def forget(self, n: int) -> None:
        """Keep of what the n-th block call returned only the shapes."""
        self.outputs[n] = tree_map(
            lambda leaf: mx.zeros_like(leaf) if isinstance(leaf, mx.array) else leaf,
            self.outputs[n],
        )


@dataclass
class Pass:
    """One forward pass: outputs of the block calls that ran, input of the head, logits (lazy)."""

    outputs: dict[int, Any]
    hidden: mx.array
    logits: mx.array


class _Block(Wrapper):
    def __init__(self, inner: nn.Module, index: int, replay: Replay) -> None:
        super().__init__(inner)
        self.index = index
        self.replay = replay

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.replay.visit(self.index, self.inner, args, kwargs)


class _Head(Wrapper):
    def __init__(self, inner: nn.Module, tied: bool, replay: Replay) -> None:
        super().__init__(inner)
        self.tied = tied
        self.replay = replay

    def __call__(self, x: mx.array) -> mx.array:
        if self.tied:
            found: mx.array = self.inner(x)
            return found
        return self.replay.project(self.inner, x)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.replay.project(self.inner, x)


class Replay:
    """Wraps the blocks and the head of `model`; `modules` are its quantizable modules.

    A context manager: the model is its own again after the with block. `executions` counts the
    block calls that really ran. With `recompute`, gradients of a run keep the blocks' outputs only
    and run each block again on the way back.
    """

    def __init__(
        self, model: nn.Module, modules: Sequence[Module], *, recompute: bool = False
    ) -> None:
        self.executions = 0
        self._recompute = recompute
        self.order: list[int] = []  # block index of each block call of a forward pass
        self.model = model
        self._places = {m.path: place_at(model, m.path) for m in modules}
        self._wrapped: list[tuple[Place, Wrapper]] = []
        self._head = next((m for m in modules if m.tied or m.role is Role.HEAD), None)
        self._live = range(0)
        self._outputs: Sequence[Any] = ()
        self._rows: mx.array | None = None
        self._rows_head: nn.Module | None = None
        self._hidden: mx.array | None = None
        self._shared: list[Any] | None = None
        self._begin()

    def __enter__(self) -> Replay:
        blocks = list(self.model.layers)
        homes = _homes(self.model, blocks)
        for place, index in homes:
            self._wrap(place, _Block(place.get(), index, self))
        if self._head is not None:
            place = self._places[self._head.path]
            wrapper = _Head(place.get(), self._head.tied, self)
            self._wrap(place, wrapper)
            self._places[self._head.path] = Place(wrapper, "inner")
        return self

    def __exit__(self, *_: object) -> None:
        for place, wrapper in reversed(self._wrapped):
            place.set(wrapper.inner)
        self._wrapped.clear()
        if self._head is not None:
            self._places[self._head.path] = place_at(self.model, self._head.path)

    def place(self, path: str) -> Place:
        """Where the quantizable module `path` is while the blocks are wrapped."""
        return self._places[path]

    def record(self, tokens: Sequence[int], cache: list[Any] | None = None) -> Tape:
        """Run all blocks on one sequence and keep what they return."""
        tape = self._sketch(tokens, cache)
        mx.eval(arrays(tape.outputs), tape.hidden)
        return tape

    def record_together(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        after: Callable[[int | None], None] = lambda _: None,
        beside: Callable[[int | None, int], Any] = lambda *_: None,
        thin: bool = False,
    ) -> list[Tape]:
        """`record` each sequence, but run a block on all of them before the next one.

        `after(block)` is called when a block has run for the last time, `after(None)` when what is
        outside the blocks has. What `beside(block, sequence)` returns is evaluated with the block.
        With `thin` only shapes of what the blocks return are kept.
        """
        tapes = [self._sketch(tokens) for tokens in sequences]
        for n, block in enumerate(self.order):
            for t, tape in enumerate(tapes):
                mx.eval(arrays(tape.outputs[n]), beside(block, t))
                if thin and n:
                    tape.forget(n - 1)
            if block not in self.order[n + 1 :]:
                after(block)
            if n == 0:
                after(None)
        for t, tape in enumerate(tapes):
            mx.eval(tape.hidden, beside(None, t))
            if thin and self.order:  # some models call parts of their blocks
                tape.forget(len(self.order) - 1)
        after(None)
        return tapes

    def _sketch(self, tokens: Sequence[int], cache: list[Any] | None = None) -> Tape:
        """The run of all blocks on one sequence; nothing is computed."""
        ids = mx.array([list(tokens)])
        self.order = []
        run = self.run(ids, (), ALL, cache)
        outputs = [run.outputs[n] for n in range(len(run.outputs))]
        return Tape(ids, outputs, run.hidden, run.logits.shape[-1])

    def final(self, tape: Tape, module: Module) -> mx.array:
        """Run all blocks that `module` can change; returns the input of the head, [1, T, d]."""
        if module.role is Role.HEAD:
            return tape.hidden
        calls = len(self.order)
        if module.block is None:
            first = 0
        else:
            first = self.order.index(module.block) if module.block in self.order else calls
        hidden = self.run(tape.tokens, tape.outputs, range(first, calls)).hidden
        mx.eval(hidden)
        return hidden

    def logits(self, tape: Tape, rows: mx.array, head: nn.Module | None = None) -> mx.array:
        """Logits [n, vocabulary] of head inputs `rows` [n, d], by `head` or the model's own.

        The model's own code after the head (scaling, soft caps) is applied; no block runs.
        """
        self._rows, self._rows_head = rows, head
        try:
            run = self.run(tape.tokens, tape.outputs, range(0))
        finally:
            self._rows = self._rows_head = None
        return run.logits.squeeze(0)  # the gradient of an index would add up one by one

    def run(
        self,
        tokens: mx.array,
        outputs: Sequence[Any],
        live: range,
        cache: list[Any] | None = None,
    ) -> Pass:
        """One lazy forward pass that runs the block calls in `live`; others return `outputs`.

        Blocks that do not run leave their `cache` alone.
        """
        self._begin()
        self._live, self._outputs = live, outputs
        if cache is None:
            cache = self._shared = whole_text_caches(self.model)
        logits = self.model(tokens) if cache is None else self.model(tokens, cache=cache)
        # A model that multiplies by its head's weight itself: its logits stand for the input of
        # the head, which is then the identity.
        if self._hidden is None:
            hidden, logits = logits, logits if self._rows is None else self._rows[None]
        else:
            hidden = self._hidden
        return Pass(self._ran, hidden, logits)

    def visit(self, index: int, inner: nn.Module, args: Any, kwargs: Any) -> Any:
        """A block's call: run it or give what is recorded."""
        n = self._call
        self._call += 1
        given = {id(value) for value in (*args, *kwargs.values())}
        cache = next((c for c in self._shared or () if id(c) in given), None)
        if n not in self._live:
            return _written(handles(self._outputs[n]), cache)
        if n == len(self.order):
            self.order.append(index)
        self.executions += 1
        empty = cache is not None and cache.offset == 0
        # Run again, a block would write to its cache again.
        recompute = self._recompute and cache is None
        out = (checkpoint(inner) if recompute else inner)(*args, **kwargs)
        self._ran[n] = handles(_Writing(out, cache.state) if cache is not None and empty else out)
        return out

    def project(self, inner: Any, x: mx.array) -> mx.array:
        """The head's call: note its input; with `rows` set, answer for those instead."""
        self._hidden = copy.copy(x)
        if self._rows is not None:
            inner, x = self._rows_head or inner, self._rows[None]
        tied = self._head is not None and self._head.tied
        logits: mx.array = inner.as_linear(x) if tied else inner(x)
        return logits

    def _begin(self) -> None:
        self._call = 0
        self._ran: dict[int, Any] = {}
        self._hidden = None
        self._shared = None

    def _wrap(self, place: Place, wrapper: Wrapper) -> None:
        place.set(wrapper)
        self._wrapped.append((place, wrapper))


class _Writing(NamedTuple):
    """What a block returns that writes to a cache for later blocks, and what is in that then."""

    out: Any
    state: Any


def _written(recorded: Any, cache: Any) -> Any:
    """What a block returned; its cache is as it left it."""
    if not isinstance(recorded, _Writing):
        return recorded
    cache.state = recorded.state
    return recorded.out


def arrays(tree: Any) -> list[mx.array]:
    """The arrays among the leaves of nested lists, tuples and dicts."""
    leaves = cast(list[tuple[str, Any]], tree_flatten(tree))
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]


def handles(tree: Any) -> Any:
    """The tree with new array objects over the same values.

    `x += y` in a model file changes the array object in place, so what is kept is never shared.
    """
    return tree_map(lambda leaf: copy.copy(leaf) if isinstance(leaf, mx.array) else leaf, tree)


def _homes(model: nn.Module, blocks: list[nn.Module]) -> list[tuple[Place, int]]:
    """Every list entry of the model that is one of `blocks`, with the block's index."""
    index = {id(block): i for i, block in enumerate(blocks)}
    homes = [
        (Place(value, position), index[id(entry)])
        for module in model.modules()
        for value in module.values()
        if isinstance(value, list)
        for position, entry in enumerate(value)
        if id(entry) in index
    ]
    if {i for _, i in homes} != set(range(len(blocks))):
        raise SensitivityError(
            f"{type(model).__module__}.{type(model).__qualname__} does not keep the blocks of "
            "`model.layers` in lists, so they cannot be measured one by one"
        )
    return homes
