"""How much memory a measurement will take, from shapes alone, before it starts.

What is counted is bounded by the model's shapes, by its longest sequence and by constants:
BATCH_TOKENS of block outputs, LOGITS_BYTES of logits, HEAD_BYTES of rounded heads,
GRADIENT_BYTES of weight gradients. Activations are float32, as they are on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ...base.memory import Needs
from ...formats import DENSE
from ...models.roles import Module, is_head
from ...models.shapes import blocks_of, dense_bytes, embedding_shape, widest_block
from ..replay.logits import LOGITS_BYTES
from . import fisher, kl, weight_error
from .job import Job

# Arrays of the size of the logits, of an attention's weights or of a layer's output that are held
# at a time: going forward, and with what is kept for the way back.
_FORWARD, _BACKWARD = 3, 5
_HEADS, _EXPERTS = 32, 8  # of a model that does not say


def estimate(
    job: Job, weights: int, itemsize: int, backward: Sequence[Module], *, passing: bool
) -> Needs:
    """What a measurement takes at most.

    `weights` are the bytes of all unquantized parameters, `itemsize` those of one element, and
    `backward` the modules that get fisher scores. With `passing` blocks are only passed over, so
    the model is never held as a whole. "at work" is the largest of what is never
    held together: a block's run, the logits of a group of heads, one module's rounding.
    """
    lengths = [[len(job.sequences[i]) for i in batch] for batch in job.batches()]
    batch = max(map(sum, lengths))
    longest = max(max(of) for of in lengths)
    vocabulary, width = embedding_shape(job.modules)
    args = getattr(job.model, "args", None)
    heads = getattr(args, "num_attention_heads", _HEADS)
    experts = getattr(args, "num_experts_per_tok", _EXPERTS)
    block = widest_block(job.modules, experts)
    rows = min(longest, max(1, LOGITS_BYTES // (4 * vocabulary)))
    copies = _BACKWARD if backward else _FORWARD
    running = copies * 4 * longest * (block + heads * longest)
    logits = copies * 4 * rows * vocabulary
    parts = {
        "weights": _weights(job, weights, itemsize, passing),
        "block outputs": 4 * batch * (len(job.model.layers) + 1) * width,
    }
    scoring = running + max((_rounded(job, m, itemsize) for m in job.modules), default=0)
    if backward:
        inside = [m for m in backward if job.rounded(m) and m.block is not None]
        largest = 4 * max(map(fisher.scored_elements, inside), default=1)
        together = min(max(map(len, lengths)), max(1, fisher.GRADIENT_BYTES // largest))
        parts["gradients"] = 4 * batch * (2 * width + block)
        scoring = max(running, (together + 3) * largest + itemsize * largest // 4)
    at_head = logits + sum(_rounded(job, m, itemsize) for m in job.modules if is_head(m))
    return Needs({**parts, "at work": max(scoring, at_head)})


def _weights(job: Job, dense: int, itemsize: int, passing: bool) -> int:
    """Of the running model, and of the one module that is read at full precision beside it.

    Where blocks are passed over: of a block, or of what is outside the blocks.
    """
    sizes = [DENSE.nbytes(m.shape, itemsize) for m in job.modules]
    if passing and job.reference.name == "bf16":
        each = blocks_of(job.modules).values()
        outside = sum(n for n, m in zip(sizes, job.modules, strict=True) if m.block is None)
        largest = max((dense_bytes(of, itemsize) for of in each), default=0)
        return dense - sum(sizes) + max(outside, largest)
    running = [job.reference.running(m.path).nbytes(m.shape, itemsize) for m in job.modules]
    return dense if running == sizes else dense - sum(sizes) + sum(running) + max(sizes)


def _rounded(job: Job, module: Module, itemsize: int) -> int:
    """Of a module in one format, or a head in a group of them, with float32 copies of some rows."""
    dense = DENSE.nbytes(module.shape, itemsize)
    sizes = sorted((f.nbytes(module.shape, itemsize) for f in job.rounded(module)), reverse=True)
    together = max(1, kl.HEAD_BYTES // dense) if is_head(module) else 1
    copied = min(weight_error.ELEMENTS, prod(module.shape))
    return sum(sizes[:together]) + 2 * 4 * copied if sizes else 0
