"""The jobs that ranks share, on a tiny model; the ranks of the tests run this file.

python -m tests.distributed.jobs MODEL OUT convert eval
"""

from __future__ import annotations

import sys
from pathlib import Path

import optiq
import optiq.calibration.texts
import optiq.quantize.convert
import optiq.quantize.estimate

TEXT = {"tokens": 640, "held_out_tokens": 320, "progress": False}


def convert(model: Path, out: Path, **more: bool) -> None:
    optiq.convert(model, out / "model", formats="3,4,6,8", **TEXT, **more)  # type: ignore[arg-type]


def evaluate(model: Path, out: Path) -> None:
    optiq.evaluate(
        out / "model", out / "evals", tasks="kl", limit=3, reference=str(model), progress=False
    )


JOBS = {"convert": convert, "eval": evaluate}


def main() -> None:
    optiq.calibration.texts.SELECTION_TOKENS = 320  # as tests/conftest.py
    optiq.quantize.convert.PROMPTS = ()
    optiq.quantize.estimate._PROBE, optiq.quantize.estimate._LONG_ENOUGH = 0.02, 0.002
    model, out, *names = sys.argv[1:]
    for name in names:
        JOBS[name](Path(model), Path(out))


if __name__ == "__main__":
    main()
