"""What memory follows from: the shapes of a model, and what a run of it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..base.memory import held_memory
from ..calibration import Sample
from ..formats import DENSE, UNIFORM4, Format
from ..models.roles import Module, allowed, fixed_bytes, quantizable
from ..models.shapes import blocks_of, dense_bytes, embedding_shape, widest_block
from ..sources import LoadedModel
from .replay.logits import LOGITS_BYTES
from .rounding.reference import choose

PROCESS = 240_000_000  # bytes of Python, MLX, mlx-lm and a small tokenizer
LATER = 160_000_000  # of it, what comes after the start: modules, what allocators keep

_COPIES, _BACK = 3, 5  # of a block's activations that a run holds at a time; on the way back
_LOGITS = 3  # the teacher's, a student's and the next one's
_BACK_LOGITS = 7  # theirs, what a product leaves, a softmax, its running sum, a mask, gradients


@dataclass(frozen=True)
class Shapes:
    """What a model's memory follows from."""

    modules: Sequence[Module]
    itemsize: int  # of a weight
    fixed: int  # bytes that are never quantized
    heads: int = 32
    experts: int = 8  # that a token goes to
    running: int | None = None  # bytes of what exact scores run; None: of the whole model
    process: int = PROCESS

    @property
    def dense(self) -> int:
        return self.fixed + dense_bytes(self.modules, self.itemsize)

    @property
    def block(self) -> int:
        """Bytes of the largest block."""
        each = blocks_of(self.modules).values()
        return max((dense_bytes(of, self.itemsize) for of in each), default=0)

    @property
    def passed(self) -> int:
        """Bytes of weights in a pass: of the largest block, and at the first also the embedding."""
        return self.block + self.outside

    @property
    def outside(self) -> int:
        """Bytes of the largest module outside the blocks: an embedding or a head."""
        return max((self.nbytes(m) for m in self.modules if m.block is None), default=0)

    def nbytes(self, module: Module) -> int:
        return DENSE.nbytes(module.shape, self.itemsize)

    def rounded(self, module: Module, menu: Sequence[Format]) -> list[int]:
        """Bytes of the module in each format of the menu that it may be rounded to."""
        formats = (fmt for fmt in allowed(module, menu) if fmt != DENSE)
        return [fmt.nbytes(module.shape, self.itemsize) for fmt in formats]

    def block_run(self, longest: int, *, back: bool = False) -> int:
        """A block's run on one sequence, or its way back."""
        block = widest_block(self.modules, self.experts)
        return (_BACK if back else _COPIES) * 4 * longest * (block + self.heads * longest)

    def logits(self, longest: int, *, back: bool = False) -> int:
        """The logits of a sequence, or of as much of it as is taken at a time; or the way back."""
        vocabulary, _ = embedding_shape(self.modules)
        copies = _BACK_LOGITS if back else _LOGITS
        return copies * min(LOGITS_BYTES, 4 * longest * vocabulary)

    def way_back(self, tokens: int) -> int:
        """What goes into and comes out of a block's layers, and a block's gradients."""
        _, width = embedding_shape(self.modules)
        return 4 * tokens * (widest_block(self.modules, self.experts) + 2 * width)

    def handed(self, tokens: int, ranks: int) -> dict[str, int]:
        """What a rank holds of the blocks of others: as many are divided as there are ranks."""
        if ranks == 1:
            return {}
        return {"of other ranks": self.way_back(tokens) + (ranks - 1) * self.block}


def shapes_of(loaded: LoadedModel, reference: str = "auto") -> Shapes:
    """The shapes of a model whose exact scores are measured in this `reference`."""
    modules, args = quantizable(loaded.model), getattr(loaded.model, "args", None)
    found = Shapes(
        modules,
        loaded.dtype.size,
        fixed_bytes(loaded.model, modules),
        getattr(args, "num_attention_heads", Shapes.heads),
        getattr(args, "num_experts_per_tok", None) or 1,
        process=max(PROCESS, held_memory() + LATER),
    )
    if choose(reference, found.dense)[0] == "bf16":
        return found
    four = sum(UNIFORM4.nbytes(m.shape, found.itemsize) for m in modules if UNIFORM4.fits(m.shape))
    return replace(found, running=found.fixed + four + max(map(found.nbytes, modules)))


def lengths_of(samples: Sequence[Sample]) -> list[int]:
    return [len(sample.tokens) for sample in samples] or [0]
