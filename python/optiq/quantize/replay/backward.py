"""One backward pass through a model under replay: the gradient at the output of every layer.

What is differentiated is sum_t log p(y_t) with every label y_t drawn from the model's own p, whose
gradients g make up the Fisher information, F = mean of g g' over the labels. The pass goes block
call by block call from the last to the first, from the recorded outputs of the blocks before. What
it holds at a time: the outputs of the blocks that are left, gradients at those that a block reads,
and the activations of one block on one sequence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ... import ops
from ...base.text import one_line
from ...models.roles import Module, Role
from ...nn.replay import ALL, Pass, Replay, Tape, arrays
from .gradients import Call, add_calls
from .logits import LOGITS_BYTES
from .streamed import Drop, keep
from .taps import Deltas, Taps


def survey(
    replay: Replay, tokens: Sequence[int], modules: Sequence[Module]
) -> tuple[set[str], str]:
    """Paths of the modules that a run calls as layers; and why it has no gradients, if it has none.

    A block that reads the keys and values of another has weights for its own all the same. In
    some model files gradients reach indices, where MLX has none. Only graphs are built.
    """
    ids = mx.array([list(tokens)])
    with Taps(replay, modules) as taps:
        replay.run(ids, (), ALL)
        called = set(taps.outputs)

        def last(deltas: Deltas) -> mx.array:
            taps.start(deltas)
            return mx.sum(replay.run(ids, (), ALL).hidden)

        try:
            mx.grad(last)(tree_map(mx.zeros_like, taps.outputs))
        except ValueError as error:  # MLX's, of the model file
            name = type(replay.model).__module__
            return called, f"{name} has no gradients ({one_line(error)})"
    return called, ""


Called = tuple[Module, list[list[Call]]]  # a module and its calls, by tape


class Backward:
    """A backward pass over `tapes` that go together; `keys` draw the labels of each.

    The tapes are used up. `after(block)` is called when a block is done with, `after(None)` when
    the head is.
    """

    def __init__(
        self,
        replay: Replay,
        tapes: Sequence[Tape],
        keys: Sequence[mx.array],
        after: Drop = keep,
    ) -> None:
        self.replay, self.tapes, self.keys, self.after = replay, tapes, keys, after
        # By tape and block call: gradients of the call's floating point outputs; None is 0.
        self.gradients: list[list[list[mx.array | None]]] = [
            [[None] * len(_floats(out)) for out in tape.outputs] for tape in tapes
        ]

    def groups(self, modules: Sequence[Module], together: int = 1) -> Iterator[list[Called]]:
        """The modules of `together` blocks, each with its calls and the gradients at their outputs,
        by tape.

        Blocks come last to first, then what is outside them; heads are left out.
        """
        replay, tapes = self.replay, self.tapes
        outside = [m for m in modules if m.block is None and m.role is not Role.HEAD]
        # By tape: calls of the modules outside the blocks, which any block's input may depend on.
        shared: list[dict[str, list[Call]]] = []
        for t, tape in enumerate(tapes):
            at_head = [_head_gradient(replay, tape, self.keys[t])]
            calls = self._back(t, len(replay.order), outside, at_head)
            shared.append({m.path: calls.get(m.path, []) for m in outside})
        self.after(None)
        waiting: list[dict[str, list[Call]]] = [defaultdict(list) for _ in tapes]
        group: list[Called] = []
        over: list[int] = []
        for n in reversed(range(len(replay.order))):
            block = replay.order[n]
            inside = [m for m in modules if m.block == block]
            for t in range(len(tapes)):
                calls = self._back(t, n, [*outside, *inside], self._taken(t, n))
                tapes[t].forget(n)
                for m in inside:
                    waiting[t][m.path] += calls.get(m.path, [])
                for path, earlier in shared[t].items():
                    shared[t][path] = add_calls(earlier, calls.get(path, []))
            if n == replay.order.index(block):
                group += [(m, [calls.pop(m.path) for calls in waiting]) for m in inside]
                over.append(block)
                if len(over) == together or n == 0:
                    yield group
                    group = []
                    for done in over:
                        self.after(done)
                    over = []
        yield [(m, [calls[m.path] for calls in shared]) for m in outside]

    def _taken(self, t: int, n: int) -> list[mx.array]:
        """The gradients of block call n, which are forgotten."""
        found, self.gradients[t][n] = self.gradients[t][n], []
        floats = _floats(self.tapes[t].outputs[n])
        return [mx.zeros_like(a) if g is None else g for a, g in zip(floats, found, strict=True)]

    def _back(
        self, t: int, n: int, modules: Sequence[Module], gradients: Sequence[mx.array]
    ) -> dict[str, list[Call]]:
        """Take `gradients`, at the floating point outputs of block call n, back through it.

        Adds what reaches earlier blocks' outputs to `self.gradients[t]`; returns the calls of
        `modules`. With n beyond the last block call, the start is the input of the head instead.
        """
        tape = self.tapes[t]
        live = range(n, min(n + 1, len(tape.outputs)))

        def target(run: Pass) -> list[mx.array]:
            return _floats(run.outputs[n] if live else run.hidden)

        with Taps(self.replay, modules) as taps:
            self.replay.run(tape.tokens, tape.outputs, live)  # for the shapes; nothing computes
            deltas = tree_map(mx.zeros_like, taps.outputs)

            def product(variables: dict[str, Any]) -> mx.array:
                taps.start(variables["deltas"])
                outputs = _with_floats(tape.outputs[:n], variables["outputs"])
                run = self.replay.run(tape.tokens, [*outputs, *tape.outputs[n:]], live)
                pairs = zip(target(run), gradients, strict=True)
                return sum((mx.sum(a * g) for a, g in pairs), mx.array(0.0))

            variables = {"outputs": _floats(tape.outputs[:n]), "deltas": deltas}
            if not arrays(variables):  # the first block, and nothing in it is asked for
                return {}
            found = mx.grad(product)(variables)
            arguments = taps.arguments
        # Most blocks read what the one before returned, and nothing else.
        reached = [mx.any(g != 0) for g in found["outputs"]]
        mx.eval(reached, found["deltas"], arrays(arguments))
        earlier = iter(zip(found["outputs"], reached, strict=True))
        for kept in self.gradients[t][:n]:
            for i, sum_ in enumerate(kept):
                gradient, any_ = next(earlier)
                if any_.item():
                    kept[i] = gradient if sum_ is None else sum_ + gradient
        mx.eval(self.gradients[t][:n])
        return {
            path: [
                (args, kwargs, g)
                for (args, kwargs), g in zip(arguments[path], found["deltas"][path], strict=True)
            ]
            for path in arguments
        }


def _head_gradient(replay: Replay, tape: Tape, key: mx.array) -> mx.array:
    """Gradient [1, T, d] at the head's input of sum_t log p(y_t), y_t drawn from p."""
    parts = []
    for rows in tape.chunks(LOGITS_BYTES):
        key, draw = mx.random.split(key)
        part = mx.grad(_likelihood(replay, tape, draw))(tape.hidden[0, rows])
        mx.eval(part)
        parts.append(part)
    return mx.concatenate(parts)[None]


def _likelihood(replay: Replay, tape: Tape, key: mx.array) -> Callable[[mx.array], mx.array]:
    def likelihood(rows: mx.array) -> mx.array:
        logits = replay.logits(tape, rows).astype(mx.float32)
        labels = ops.categorical(mx.stop_gradient(logits), key)
        return -mx.sum(ops.cross_entropy(logits, labels))

    return likelihood


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def _floats(tree: Any) -> list[mx.array]:
    """The floating point arrays among the leaves."""
    found: list[mx.array] = []
    tree_map(lambda leaf: found.append(leaf) if _is_float(leaf) else None, tree)
    return found


def _with_floats(tree: Any, floats: Sequence[mx.array]) -> Any:
    """The tree with its floating point leaves replaced by `floats`, in order."""
    rest = iter(floats)
    return tree_map(lambda leaf: next(rest) if _is_float(leaf) else leaf, tree)
