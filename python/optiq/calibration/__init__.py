"""Calibration text: rows of files -> balanced token sequences, each a sample from its start.

files.py reads, rows.py validates, render.py turns one row into tokens, batches.py picks and
balances, texts.py makes the three texts of a conversion.
CALIBRATION.md describes the bundled mix `optiq.jsonl` and the row format.
"""

from __future__ import annotations

from ..chat.template import Tokenizer
from .batches import Calibration, Sample, batches, token_hash
from .files import BUNDLED, load_rows
from .render import render
from .rows import check_row, split
from .texts import (
    CALIBRATION_TOKENS,
    HELD_OUT_TOKENS,
    SCORING_TOKENS,
    Texts,
    gather,
    gather_selection,
    gather_texts,
    text_name,
)

__all__ = [
    "BUNDLED",
    "CALIBRATION_TOKENS",
    "HELD_OUT_TOKENS",
    "SCORING_TOKENS",
    "Calibration",
    "Sample",
    "Texts",
    "Tokenizer",
    "batches",
    "check_row",
    "gather",
    "gather_selection",
    "gather_texts",
    "load_rows",
    "render",
    "split",
    "text_name",
    "token_hash",
]
