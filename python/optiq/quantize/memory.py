"""What memory a conversion takes at most, phase by phase, from shapes alone, before it starts.

Weights are read block by block, so what counts is the largest block or what is outside the blocks,
the recorded outputs of all blocks, and the work on one module. Activations are float32, as they are
on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from ..base.memory import Needs
from ..base.progress import tell
from ..calibration import Texts
from ..distributed.ranks import ALONE, World
from ..errors import UsageError
from ..models.roles import Module, Role, is_head
from ..models.shapes import blocks_of, embedding_shape
from ..sources import LoadedModel
from .footprint import Shapes, lengths_of, shapes_of
from .options import Options
from .preflight import budget_of
from .prepare import metered, texts_of
from .rounding import descent, moments
from .select import SMALL_BYTES
from .sensitivity import memory as sensitivity
from .sensitivity.rounds import exact

SCORES = "measuring sensitivity"
LEAST_TOKENS = 512  # of calibration text that --memory leaves

# H or G of the sequences that fit and, unless their rows are few, that judge; shrunk, three parts
_MATRICES = 5
_SAMPLES = 5  # inputs that stand for H: as they are, weighed, scaled, and as a descent reads them
_ROUNDINGS = 3  # of a layer of experts that are compared


def phases(
    shapes: Shapes, texts: Texts, options: Options, plan: int, ranks: int = 1
) -> Mapping[str, Needs]:
    """What each phase holds at most; `plan` are the bytes of the model to be written."""
    calibration = lengths_of(texts.calibration.sequences)
    found: dict[str, Needs] = {}
    if options.rounding != "minmax":
        found["measuring columns"] = _passing(shapes, lengths_of(metered(texts, options).sequences))
    if options.scores is None:
        found[SCORES] = sensitivity.needs(
            shapes, lengths_of(texts.scoring.sequences), options, ranks
        )
    if texts.selection:
        found["choosing formats"] = _judging(shapes, lengths_of(texts.selection), plan)
    if options.rounding not in ("search", "minmax"):
        found["fitting weights"] = _fitting(
            shapes, calibration, options, ranks, judged=bool(texts.selection)
        )
    largest = max((prod(m.shape) for m in shapes.modules), default=0)
    found["writing"] = Needs(
        {"process": shapes.process, "a weight": (shapes.itemsize + 2) * largest}
    )
    found["checking"] = _judging(shapes, lengths_of(texts.held_out.sequences), plan)
    return found


def peak(found: Mapping[str, Needs]) -> tuple[str, Needs]:
    """The phase that takes most, and what it takes."""
    return max(found.items(), key=lambda item: item[1].total)


def _passing(shapes: Shapes, lengths: Sequence[int]) -> Needs:
    """A run of all sequences, block by block."""
    _, width = embedding_shape(shapes.modules)
    return Needs(
        {
            "process": shapes.process,
            "weights": shapes.passed,
            "block outputs": 4 * 2 * sum(lengths) * width,
            "at work": shapes.block_run(max(lengths)),
        }
    )


def _judging(shapes: Shapes, lengths: Sequence[int], plan: int) -> Needs:
    """The source's run, then a rounded model's; their heads make logits together."""
    _, width = embedding_shape(shapes.modules)
    if shapes.dense <= SMALL_BYTES:
        weights = shapes.dense + plan
    else:
        weights = max(2 * shapes.block, sum(shapes.nbytes(m) for m in shapes.modules if is_head(m)))
        weights += shapes.outside
    return Needs(
        {
            "process": shapes.process,
            "weights": weights,
            "block outputs": 4 * 4 * sum(lengths) * width,
            "at work": max(shapes.block_run(max(lengths)), shapes.logits(max(lengths))),
        }
    )


def _fitting(
    shapes: Shapes, lengths: Sequence[int], options: Options, ranks: int, *, judged: bool
) -> Needs:
    """Fitted weights go to files as they come. A small source stays where these are `judged`."""
    _, width = embedding_shape(shapes.modules)
    outputs = 4 * sum(lengths) * width * (len(blocks_of(shapes.modules)) + 1)
    tokens = sum(lengths)
    inside = max(
        (
            _in_turn(shapes, of, tokens, options.together)
            for of in blocks_of(shapes.modules).values()
        ),
        default=0,
    )
    block, head = (of(max(lengths), back=True) for of in (shapes.block_run, shapes.logits))
    outside = max(
        (_fitting_rows(shapes, m, tokens, options) for m in shapes.modules if m.block is None),
        default=0,
    )
    return Needs(
        {
            "process": shapes.process,
            **({"source": shapes.dense} if judged and shapes.dense <= SMALL_BYTES else {}),
            "block outputs": min(descent.TAPE_BYTES, outputs),
            "gradients": 4 * tokens * 2 * width,
            "a block or head at work": max(
                shapes.passed + max(inside, block, head),
                outside,
            ),
            **shapes.handed(tokens, ranks),
        }
    )


def _changed(elements: int) -> int:
    """What a descent changes of a weight with so many elements, and how much that moves."""
    return 6 * 4 * min(moments.ELEMENTS, elements)


def _in_turn(shapes: Shapes, block: Sequence[Module], tokens: int, together: bool) -> int:
    """What the modules of a block still have waiting, and the work on the one whose turn it is."""
    waiting = [4 * tokens * _row(shapes, m) for m in block]
    each = (_fitting_one(shapes, m, tokens, together) for m in block)
    return max(sum(waiting[i:]) + one for i, one in enumerate(each))


def _fitting_rows(shapes: Shapes, module: Module, tokens: int, options: Options) -> int:
    """The work on some rows of an embedding or a head, and what was fitted, in parts and joined."""
    rows, columns = module.shape
    held = shapes.nbytes(module) + 2 * max(shapes.rounded(module, options.menu), default=0)
    rows = min(rows, descent.ROWS)
    if moments.few(tokens, columns):
        return held + _fitting_few(rows * columns, tokens * columns)
    return held + _MATRICES * 4 * columns**2 + _changed(rows * columns)


def _fitting_few(elements: int, inputs: int) -> int:
    """The work on so many weights, with the inputs in place of H."""
    return 4 * (_SAMPLES * inputs + 4 * min(moments.ELEMENTS, elements))


def _fitting_one(shapes: Shapes, module: Module, tokens: int, together: bool) -> int:
    out, columns = module.shape[-2:]
    together = moments.paired(module, together)
    if moments.sampled(module, tokens, together):
        return _fitting_few(out * columns, tokens * columns)
    change = 4 * 4 * out * columns  # of the weight, weighed
    if module.role is Role.EXPERT:
        rows = 4 * tokens * shapes.experts * columns  # laid out by expert
        rounded = _ROUNDINGS * prod(module.shape)  # of at most 8 bits
        changed = _changed(max(prod(module.shape), columns**2))
        return (_MATRICES + 2) * 4 * columns**2 + change + rows + rounded + changed
    squares = 4 * (columns**2 + (out**2 if together else 0))
    changed = _changed(max(out * columns, columns**2))
    matrices = _MATRICES - moments.few(tokens / moments.JUDGE_EVERY, columns)
    return max(matrices * squares, (matrices - 1) * squares + change) + changed


def _row(shapes: Shapes, module: Module) -> int:
    """Elements that go into and come out of a module for a token."""
    return sum(module.shape[-2:]) * (shapes.experts if module.role is Role.EXPERT else 1)


def affordable(
    loaded: LoadedModel, options: Options, world: World = ALONE
) -> tuple[Options, Texts, Needs]:
    """The options that keep to --memory, their texts, and what the largest phase takes.

    What takes too much is left out, and said: first exact scores, for which the model is held as a
    whole, then text. The ranks of `world` all leave out what is too much for one of them. Raises
    UsageError where that is not enough.
    """
    limit, shapes = options.memory, shapes_of(loaded, options.reference)
    plan = min(budget_of(loaded, options.size), shapes.dense)
    chosen = options
    while True:
        texts = texts_of(chosen, loaded.tokenizer)
        phase, needs = peak(phases(shapes, texts, chosen, plan, world.size))
        if limit is None or needs.total <= limit:
            break
        tokens = sum(len(sample.tokens) for sample in texts.calibration.sequences)
        routed = chosen.sensitivity == "auto" and exact(shapes.modules, "auto")
        if phase == SCORES and chosen.scores is None and routed:
            chosen = replace(chosen, sensitivity="fisher")
        elif tokens // 2 >= LEAST_TOKENS:
            chosen = replace(chosen, tokens=tokens // 2)
        else:
            raise UsageError(
                f"--memory {limit / 1e9:.2f}GB is not enough: {phase} takes {needs}; raise "
                f"--memory to {needs.total / 1e9:.2f}GB"
            )
    if world.size > 1:
        offers = world.gather([chosen.sensitivity, chosen.tokens])
        method = "fisher" if "fisher" in (of for of, _ in offers) else chosen.sensitivity
        fewest = min((n for _, n in offers if n), default=None)
        chosen = replace(chosen, sensitivity=method, tokens=fewest)
        texts = texts_of(chosen, loaded.tokenizer)
    if limit is not None and chosen != options:
        tell(
            f"to keep to --memory {limit / 1e9:.2f}GB: --sensitivity {chosen.sensitivity}, "
            f"{chosen.tokens or 'all'} calibration tokens"
        )
    return chosen, texts, needs
