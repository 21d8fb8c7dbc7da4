"""The jobs that ranks share, on a tiny model; the ranks of the tests run this file.

python -m tests.distributed.jobs MODEL OUT convert kv frontier eval
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


def kv(model: Path, out: Path) -> None:
    optiq.kv_plan(model, out / "kv.json", context=192, samples=2, progress=False)


def frontier(model: Path, out: Path) -> None:
    scores = out / "model" / "optiq" / "sensitivity.json"
    optiq.frontier(model, out / "frontier", sizes=["5bpw"], scores=scores, **TEXT)  # type: ignore[arg-type]


def evaluate(model: Path, out: Path) -> None:
    optiq.evaluate(
        out / "model", out / "evals", tasks="kl", limit=3, reference=str(model), progress=False
    )


JOBS = {"convert": convert, "kv": kv, "frontier": frontier, "eval": evaluate}


def main() -> None:
    optiq.calibration.texts.SELECTION_TOKENS = 320  # as tests/conftest.py
    optiq.quantize.convert.PROMPTS = ()
    optiq.quantize.estimate._PROBE, optiq.quantize.estimate._LONG_ENOUGH = 0.02, 0.002
    model, out, *names = sys.argv[1:]
    for name in names:
        JOBS[name](Path(model), Path(out))


if __name__ == "__main__":
    main()
