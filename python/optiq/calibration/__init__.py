"""Calibration text: rows of JSON Lines -> balanced token sequences, each a sample from its start.

rows.py reads and validates, render.py turns one row into tokens, batches.py picks and balances.
CALIBRATION.md describes the bundled mix `optiq.jsonl` and the row format.
"""

from __future__ import annotations

from .batches import Calibration, Sample, batches, token_hash
from .render import Tokenizer, render
from .rows import BUNDLED, check_row, load_rows, split

__all__ = [
    "BUNDLED",
    "Calibration",
    "Sample",
    "Tokenizer",
    "batches",
    "check_row",
    "load_rows",
    "render",
    "split",
    "token_hash",
]
