"""A model with an adapter under training: the loss as a function of the adapter's arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError
from ..models.adaptable import adaptable, head
from ..models.places import place_at
from ..nn.gated import gate
from ..nn.replay import ALL, Replay, Tape
from ..ops import cross_entropy
from .data import Sample
from .layers import LowRank, put
from .packing import Pack, pack, packable, segments

LOGITS_BYTES = 64 << 20  # of float32 logits at a time

Parameters = dict[str, mx.array]  # "<path>.lora_a" and "<path>.lora_b"


class Tuned:
    """`model` with `terms` beside its layers and `minus` taken away, in place. A context manager.

    With `recompute`, a pass keeps the outputs of the blocks only and runs each again on the way
    back. `alone` says why samples cannot share a pass; it is empty where they can.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Mapping[str, LowRank],
        scale: float,
        *,
        minus: Mapping[str, LowRank] | None = None,
        recompute: bool,
    ) -> None:
        gate(model)
        self.alone = packable(model)
        self._model = model
        self._head = head(model)
        modules = [*adaptable(model), *([self._head] if self._head else [])]
        model.freeze()
        self._layers = put(model, terms, scale, minus)
        self._replay = Replay(model, modules, recompute=recompute)

    def __enter__(self) -> Tuned:
        self._replay.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._replay.__exit__()

    def parameters(self) -> Parameters:
        """The arrays to train, as they are."""
        return {
            f"{path}.{name}": layer[name]
            for path, layer in self._layers.items()
            for name in ("lora_a", "lora_b")
        }

    def set(self, parameters: Parameters) -> None:
        for path, layer in self._layers.items():
            layer.lora_a = parameters[f"{path}.lora_a"]
            layer.lora_b = parameters[f"{path}.lora_b"]

    def remove(self) -> None:
        """Give the model its own layers back."""
        for path, layer in self._layers.items():
            place_at(self._model, path).set(layer.linear)

    def packs(self, samples: Sequence[Sample], most: int) -> list[Pack]:
        """The samples in passes of at most `most` tokens."""
        return [Pack((s,)) for s in samples] if self.alone else pack(samples, most)

    def losses(self, packed: Pack) -> mx.array:
        """-log p of each token to learn [n], not computed yet."""
        ids = mx.array([packed.tokens])
        caches = None if self.alone else segments(self._model, packed.ends)
        run = self._replay.run(ids, (), ALL, caches)
        outputs = [run.outputs[n] for n in range(len(run.outputs))]
        tape = Tape(ids, outputs, run.hidden, run.logits.shape[-1])
        targets = mx.array(packed.learned)
        rows = run.hidden[0, targets - 1]
        labels = ids[0, targets]

        def part(rows: mx.array, labels: mx.array) -> mx.array:
            return cross_entropy(self._replay.logits(tape, rows), labels)

        step = max(1, LOGITS_BYTES // (4 * tape.vocabulary))
        return part(rows, labels) if len(targets) <= step else _in_parts(part, rows, labels, step)

    def summed(self, packed: Pack) -> mx.array:
        """The sum of `losses`."""
        return mx.sum(self.losses(packed))

    def loss_and_gradients(
        self, parameters: Parameters, of: Callable[[], mx.array]
    ) -> tuple[float, Parameters]:
        """The value of `of` and its gradient at the parameters."""

        def loss(parameters: Parameters) -> mx.array:
            self.set(parameters)
            return of()

        try:
            value, gradients = mx.value_and_grad(loss)(parameters)
        except ValueError as error:  # MLX's: an operation of the model file has no gradient
            raise AdapterError(
                f"{type(self._model).__module__} has no gradients ({error}); this model cannot be "
                "trained here"
            ) from error
        mx.eval(value, gradients)
        self.set(parameters)
        found: Any = value.item()
        return float(found), gradients


def _in_parts(
    of: Callable[[mx.array, mx.array], mx.array], rows: mx.array, labels: mx.array, step: int
) -> mx.array:
    """`of(rows, labels)`, whose values belong to a row each, `step` rows at a time. The gradient
    computes each part again. A part waits for the one before it, or all would exist at once."""

    def parts(make: Callable[[mx.array, slice], mx.array], rows: mx.array) -> mx.array:
        found: list[mx.array] = []
        for i in range(0, rows.shape[0], step):
            at = slice(i, i + step)
            found.append(make(mx.depends([rows[at]], found[-1:])[0] if found else rows[at], at))
        return mx.concatenate(found)

    @mx.custom_function
    def whole(rows: mx.array) -> mx.array:
        return parts(lambda x, at: of(x, labels[at]), rows)

    @whole.vjp
    def gradient(rows: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        def of_part(x: mx.array, at: slice) -> mx.array:
            return mx.vjp(lambda x: of(x, labels[at]), [x], [cotangent[at]])[1][0]

        return parts(of_part, rows)

    found: Any = whole(rows)
    return found  # type: ignore[no-any-return]
