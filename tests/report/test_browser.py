"""The pages in headless Chromium, wide and narrow, light and dark: nothing lies out of sight."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from optiq.evals import runs
from optiq.evals.comparison import compare
from optiq.evals.page import evals_page
from optiq.formats import Format
from optiq.kv.report import (
    ExactTokens,
    KVModel,
    KVPoint,
    KVReport,
    KVText,
    Law,
    ScoredSlot,
    SlotScore,
)
from optiq.quality.answers import Answers
from optiq.quality.compare import Comparison
from optiq.quality.results import Divergence, Measured
from optiq.report import conversion_page
from optiq.report.comparison import comparison_page
from optiq.report.frontier import frontier_page
from optiq.report.kv import kv_page
from tests.evals.fakes import write_all
from tests.planning.test_pareto import frontier

from . import fakes
from .fakes import parse

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

# What a reader cannot see: figures beyond the edge of a table's frame, and a page that is too wide.
# Every module with every format is a table to scroll in, and is folded away.
SCRIPT = """
const seen = [], page = document.documentElement;
for (const box of document.querySelectorAll('.scroll'))
  if (!box.querySelector('.modules') && box.scrollWidth > box.clientWidth + 1)
    seen.push(box.querySelector('table').className + ' ' + box.scrollWidth + '>' + box.clientWidth);
if (page.scrollWidth > page.clientWidth) seen.push('page ' + page.scrollWidth);
const lum = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(x => { x /= 255;
  return x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4; });
  return .2126 * r + .7152 * g + .0722 * b; };
const back = lum(getComputedStyle(document.body).backgroundColor);
for (const e of document.querySelectorAll('p, small, td, th, a, .tick')) {
  const style = getComputedStyle(e), fore = lum(e.matches('.tick') ? style.fill : style.color);
  const plain = !e.closest('.map, .swatches') && style.backgroundColor === 'rgba(0, 0, 0, 0)';
  const ratio = (Math.max(fore, back) + .05) / (Math.min(fore, back) + .05);
  if (plain && e.getClientRects().length && ratio < 4.5) seen.push(e.tagName + ratio);
}
parent.document.title = JSON.stringify([innerWidth, seen]);
"""


def kv_report() -> KVReport:
    """30 caches, and the widths that are compared."""
    mean = {"mean": 0.0123, "se": 0.0017, "median": 0.002, "p95": 0.05, "p99": 0.2, "p999": 0.9}
    divergence = {
        "kl": {**mean, "max": 1.2}, "top1": {"mean": 0.95, "se": 0.01}, "ppl_ratio": 1.01,
        "tokens": 500, "sequences": 4, "text_sha256": "0" * 64,
    }  # fmt: skip
    widths = [Format("affine", bits, 64) for bits in (3, 4, 5, 6, 8)]
    slots = [
        ScoredSlot(
            i, side, 3, 64, 4096, i in (0, 29), widths[i % 5],
            {f: SlotScore(2.0**-f.bits / (1 + i), 1e-4, f.bits < 5) for f in widths},
        )
        for i in range(30)
        for side in "kv"
    ]  # fmt: skip
    names = ("chosen", "uniform K8/V8", "uniform K8/V4", "uniform K6/V6", "uniform K4/V4", "K3/V3")
    points = tuple(
        KVPoint(name, 60_000_000 - 8_000_000 * i, 0.01 * 3**i, Divergence.from_json(divergence))
        for i, name in enumerate(names)
    )
    text = KVText("optiq.jsonl", 0, 128, {"held-out": [4096] * 4}, {"held-out": "0" * 64})
    return KVReport(
        KVModel("SmolLM2-135M-Instruct", "0" * 64, "1" * 64, "llama"), 4096, "8/4", 6 * 10**7,
        59 * 10**6, 94 * 10**6, 23040, ExactTokens(128, 4, 10**6), "law", points[:3], 1.1, 0.9,
        tuple((8_000_000 * i, 0.5 * 2.0**-i) for i in range(1, 8)), points, Law(12, 1.0, 0.6, 1.7),
        tuple(slots), text, "optiq kv out -o kv.json",
        {"optiq": "0.1.0"}, {"cpu": "one", "cores": 2},
    )  # fmt: skip


def evals(folder: Path) -> str:
    """The page of two models' records."""
    write_all(folder / "a", 0.60, 0.10)
    write_all(folder / "b", 0.40, 0.20, seed=2, fingerprint="2" * 64)
    compared = compare(runs.load(folder / "a"), runs.load(folder / "b"))
    return evals_page(compared, ["/a/very/long/path/to/a-model-4bit", "out"])


def pages(folder: Path) -> dict[str, str]:
    plan, scores = parse(fakes.smollm2())
    said = "A sentence that is long enough to be wrapped in a narrow column. " * 3
    samples = [Answers("What is the capital of France?", said, said, "x" * 300, 48)]
    measured = plan.measured
    assert isinstance(measured, Measured)
    models = {
        "out": measured,
        "/a/very/long/path/to/another-model": replace(measured, nbytes=10**9),
    }
    return {
        "report": conversion_page(plan, scores, samples),
        "frontier": frontier_page(frontier()),
        "compare": comparison_page(Comparison("org/reference", "rows", models)),
        "kv": kv_page(kv_report()),
        "evals": evals(folder),
    }


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; on Debian: apt-get install chromium")
@pytest.mark.parametrize(("width", "scheme"), [(420, "dark"), (1200, "light")])
def test_every_table_is_whole(tmp_path: Path, width: int, scheme: str) -> None:
    for name, page in pages(tmp_path).items():
        shown = page.replace("</body>", f"<script>{SCRIPT}</script></body>")
        frame = (
            f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(shown)}">'
        )
        file = tmp_path / f"{name}.html"
        file.write_text(f"<!doctype html><title></title><body style='margin:0'>{frame}</iframe>")
        width_seen, hidden = look(file, scheme)
        assert width_seen == width
        assert hidden == [], name


def look(file: Path, scheme: str) -> tuple[int, list[str]]:
    """The width that the page was shown at, and what of it cannot be seen."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={file.parent / 'profile'}",
            *(["--force-dark-mode"] if scheme == "dark" else []),
            "--window-size=1300,1000",
            "--virtual-time-budget=2000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    found: tuple[int, list[str]] = tuple(json.loads(html.unescape(title[1])))
    return found
