"""The texts of a conversion: to score and round with, to choose a plan by, to judge the result on.

They come from different rows of one file (`rows.split`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..base.progress import tell
from ..chat.template import Tokenizer
from ..errors import CalibrationError
from .batches import Calibration, Sample, TooLittleText, batches
from .files import BUNDLED, load_rows
from .rows import split

# To round with. Scores need fewer: plans from the scores of 2,048 tokens lost 0.6 % at most
# against those of 8,192 (docs/quality.md).
CALIBRATION_TOKENS = 8192
SCORING_TOKENS = 2048
SELECTION_TOKENS = 4096
HELD_OUT_TOKENS = 4096


@dataclass(frozen=True)
class Texts:
    """Sequences to score with, to round with, to choose a plan by (maybe none), and to judge it on.

    Those to score with come from the same rows as those to round with.
    """

    scoring: Calibration
    calibration: Calibration
    selection: list[Sample]
    held_out: Calibration


def gather_texts(
    tokenizer: Tokenizer, path: Path | None, seed: int, tokens: int, held_out_tokens: int
) -> Texts:
    """All texts of a conversion from the rows at `path` (None: the bundled mix).

    Raises CalibrationError where there are too few.
    """
    calibration = gather(tokenizer, path, "calibration", tokens, seed)
    scoring = calibration
    if tokens > SCORING_TOKENS:
        scoring = gather(tokenizer, path, "calibration", SCORING_TOKENS, seed)
    return Texts(
        held_out=gather(tokenizer, path, "heldout", held_out_tokens, seed),
        selection=gather_selection(tokenizer, path, seed, held_out_tokens),
        scoring=scoring,
        calibration=calibration,
    )


def text_name(path: Path | None) -> str:
    """What a plan calls the rows at `path`."""
    return BUNDLED.name if path is None else path.resolve().name


def gather(
    tokenizer: Tokenizer, path: Path | None, which: str, tokens: int, seed: int
) -> Calibration:
    """Sequences from the "calibration" or the "heldout" rows at `path` (None: the bundled mix).

    Raises CalibrationError where there are too few.
    """
    rows = split(load_rows(path), which)
    if not rows:
        raise CalibrationError(
            f"{text_name(path)} has a single row of each domain, and one of two is held out to "
            "judge the result; add rows"
        )
    found = batches(rows, tokenizer, tokens=tokens, seed=seed)
    if found.note:
        tell(f"{which} text of {text_name(path)}: {found.note}")
    return replace(found, source=text_name(path))


def gather_selection(
    tokenizer: Tokenizer, path: Path | None, seed: int, held_out_tokens: int = HELD_OUT_TOKENS
) -> list[Sample]:
    """Sequences from the "selection" rows at `path`; none where they are too few, which is said.

    No more tokens than the result is judged on.
    """
    rows = split(load_rows(path), "selection")
    tokens = min(SELECTION_TOKENS, held_out_tokens)
    try:
        return batches(rows, tokenizer, tokens=tokens, seed=seed).sequences
    except TooLittleText as error:
        tell(f"selection text of {text_name(path)}: none, plans are not compared ({error})")
        return []
