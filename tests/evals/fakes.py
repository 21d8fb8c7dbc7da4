"""Record files of models that were never asked: seeded answers of any quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from optiq.evals import records
from optiq.evals.metrics import of_task
from optiq.evals.records import Header, Record

ITEMS = {"mmlu": 228, "gsm8k": 200, "ifeval": 150, "bfcl": 120, "humaneval": 164, "kl": 12}
BENCHMARKS = tuple(task for task in ITEMS if task != "kl")


def write_run(
    folder: Path,
    task: str,
    quality: float,
    *,
    seed: int = 0,
    items: int | None = None,
    **header: Any,
) -> Path:
    """`folder / task.jsonl`: a model right in a share `quality` of items (or of that mean KL).

    The luck of each item is the same for every model, so that two are paired; `seed` is a model's
    own luck; `header` overrides its fields.
    """
    items = ITEMS[task] if items is None else items
    head = Header(
        **{
            "task": task,
            "protocol": f"{task}/1",
            "model": "m",
            "fingerprint": "0" * 64,
            "data_sha256": "d" * 64,
            "items": items,
            "limit": None,
            "versions": {"optiq": "0.1.0", "mlx": "0.32.4", "mlx_lm": "0.32.2"},
            **header,
        }
    )
    path = folder / f"{task}.jsonl"
    records.create(path, head)
    common, own = np.random.default_rng(7), np.random.default_rng(seed)
    found = [_record(task, i, quality, common, own) for i in range(items)]
    records.append(path, found)
    return path


def write_all(folder: Path, quality: float, kl: float, *, seed: int = 0, **header: Any) -> Path:
    """All five benchmarks and KL."""
    for task in ITEMS:
        write_run(folder, task, kl if task == "kl" else quality, seed=seed, **header)
    return folder


def _record(
    task: str, i: int, quality: float, common: np.random.Generator, own: np.random.Generator
) -> Record:
    luck = 0.8 * common.random(8) + 0.2 * own.random(8)
    tokens = 20 + i
    noise = common.gamma(0.5, 2, tokens)
    metrics: dict[str, Any] = {}
    for k, metric in enumerate(of_task(task)):
        if task == "kl":
            values = quality * noise if metric.divergence else noise < 1
            metrics[metric.name] = [float(value) for value in values]
        elif metric.listed:
            metrics[metric.name] = [bool(x < quality) for x in luck[: 1 + i % 3]]
        else:
            metrics[metric.name] = bool(luck[k] < quality)
    group = f"subject {i % 57}" if task == "mmlu" else ""
    return Record(f"{task}/{i}", group, f"{i:064x}", "an answer", metrics)
