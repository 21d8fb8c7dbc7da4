"""What memory a measurement takes at most, from shapes alone, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ...base.memory import Needs
from ...models.roles import Module, is_head
from ...models.shapes import blocks_of, embedding_shape
from ..footprint import Shapes
from ..options import Options
from . import fisher, kl, weight_error
from .job import BATCH_TOKENS
from .rounds import exact


def needs(shapes: Shapes, lengths: Sequence[int], options: Options, ranks: int) -> Needs:
    """Of texts of these `lengths` in tokens, divided between so many ranks."""
    tokens = min(sum(lengths), max(BATCH_TOKENS, max(lengths)))
    _, width = embedding_shape(shapes.modules)
    inside = [m for m in shapes.modules if m.block is not None]
    outputs = 4 * tokens * width * (len(blocks_of(inside)) + 1)
    largest = 4 * max(map(fisher.scored_elements, inside), default=1)
    together = min(len(lengths), max(1, fisher.GRADIENT_BYTES // largest))
    head = max((_rounded(shapes, m, options) for m in shapes.modules if is_head(m)), default=0)
    logits = shapes.logits(max(lengths))
    inside_rounded = max((_rounded(shapes, m, options) for m in inside), default=0)
    compared = 2 * 4 * min(weight_error.ELEMENTS, max(prod(m.shape) for m in shapes.modules))
    at_block = max(
        shapes.block_run(max(lengths), back=True), (together + 2) * largest + inside_rounded
    )
    head_back = shapes.logits(max(lengths), back=True)
    passing = {
        "weights": shapes.passed,
        # The head comes before the blocks, so no gradients of theirs are held then.
        "at work": max(
            compared + max(shapes.way_back(tokens) + at_block, head + logits), head_back
        ),
        **shapes.handed(tokens, ranks),
    }
    # Exact scores run the model again and again, when the gradients are gone.
    weights = shapes.dense if shapes.running is None else shapes.running
    running = shapes.block_run(max(lengths))
    running_model = {"weights": weights, "at work": compared + head + max(running, logits)}
    methods = [passing] if options.sensitivity != "kl" else []
    if exact(shapes.modules, options.sensitivity):
        methods.append(running_model)
    found = (
        Needs({"process": shapes.process, "block outputs": outputs, **parts}) for parts in methods
    )
    return max(found, key=lambda needs: needs.total)


def _rounded(shapes: Shapes, module: Module, options: Options) -> int:
    """What is scored of a module in all formats, or a head in those that are held together."""
    sizes = shapes.rounded(module, options.menu)
    if is_head(module):
        return sum(sorted(sizes)[-max(1, kl.HEAD_BYTES // shapes.nbytes(module)) :])
    scored = fisher.scored_elements(module) / prod(module.shape)
    return int(scored * (sum(sizes) + shapes.itemsize * prod(module.shape)))
