"""The job of `optiq sensitivity`: measure scores and write them to a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.checkpoint import check_unfinished
from ..base.files import check_writable
from ..calibration import SCORING_TOKENS, gather
from ..distributed.ranks import World, world
from ..planning.scores import Scores
from ..sources import load, resolve
from .options import Options
from .preflight import check_budget, check_replaceable, check_runs, check_weights, with_towers
from .prepare import choose_rounding
from .sensitivity.checkpoint import existing
from .sensitivity.measure import measure

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import OptionFields


def sensitivity(
    model: str | Path, out: str | Path | None = None, **options: Unpack[OptionFields]
) -> Scores:
    """Score every quantizable module of `model` in every format of the menu.

    With `out` the scores are also written there, and work in progress beside it, from where
    `resume=True` goes on. The processes that `mlx.launch` starts share the work; each returns all
    scores, and rank 0 writes them. `options` are the fields of `Options`; with `size` it is an
    error if no plan can be that small.

    Raises an OptiqError.
    """
    with world() as ranks:
        return score(str(model), Path(out) if out is not None else None, ranks, **options)


def score(model: str, out: Path | None, ranks: World, **options: Unpack[OptionFields]) -> Scores:
    """`sensitivity` on these ranks."""
    chosen = Options.parse(**options)
    chosen.check_no_memory("sensitivity")
    if ranks.rank != 0:
        chosen = replace(chosen, progress=False)
    checkpoint = None
    if out is not None:
        out = out.expanduser().resolve()
        checkpoint = checkpoint_of(out)
        if ranks.rank == 0:  # the one who writes the file
            check_replaceable(out, chosen.overwrite)
            check_writable(out)
        check_unfinished(existing(checkpoint), resume=chosen.resume, restart=chosen.restart)
    source = with_towers(resolve(model, revision=chosen.revision), chosen.towers)
    loaded = load(source)
    if "size" in options:
        check_budget(loaded, chosen.size, chosen.menu)
    tokens = chosen.tokens or SCORING_TOKENS
    text = gather(loaded.tokenizer, chosen.calibration, "calibration", tokens, chosen.seed)
    check_weights(source)
    check_runs(loaded, [s.tokens for s in text.sequences])
    rounding = choose_rounding(source, text, chosen, ranks)
    scores = measure(loaded, text, chosen, rounding=rounding, checkpoint=checkpoint, world=ranks)
    if out is not None and checkpoint is not None:
        if ranks.rank == 0:
            scores.save(out)
        ranks.gather(None)  # nobody forgets before the result is safe
        for file in existing(checkpoint):
            file.unlink(missing_ok=True)
    return scores


def checkpoint_of(out: Path) -> Path:
    """Where the work in progress of the scores at `out` lies."""
    return out.with_name(f"{out.name}.checkpoint")
