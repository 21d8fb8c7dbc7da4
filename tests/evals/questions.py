"""Small made-up data sets in the shapes of the real ones, and a manifest that knows them.

No sentence here is of a benchmark.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optiq.evals import data
from optiq.evals.data import Published

SUBJECTS = ("astronomy", "world_history")
FUNCTION = {
    "name": "shop.price",
    "description": "Price of a thing.",
    "parameters": {
        "type": "dict",
        "properties": {
            "thing": {"type": "string", "description": "which"},
            "weights": {"type": "array", "items": {"type": "float"}},
        },
        "required": ["thing"],
    },
}


def write(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All five sets under `root`; the manifest is replaced by one that fits them."""
    for subject in SUBJECTS:
        for split, count in (("dev", 5), ("test", 4)):
            lines = [
                f'"Is {subject} no. {i}, here,"" odd?"" "," yes{i}",no,maybe,both,{"ABCD"[i % 4]}'
                for i in range(count)
            ]
            _write(root / f"mmlu/{split}/{subject}_{split}.csv", "\n".join(lines) + "\n")
    gsm8k = [
        {"question": f"What is {i} and {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"}
        for i in range(6)
    ]
    _write_lines(root / "gsm8k/test.jsonl", gsm8k)
    ifeval = [
        {
            "key": 10 + i,
            "prompt": f"Write {i} words, \u2028 no commas.",
            "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
            "kwargs": [{}, {}],
        }
        for i in range(3)
    ]
    _write_lines(root / "ifeval/input_data.jsonl", ifeval)
    chat = [[{"role": "user", "content": "What does a kite cost?"}]]
    bfcl = [{"id": f"simple_{i}", "question": chat, "function": [FUNCTION]} for i in range(3)]
    truth = [
        {
            "id": f"simple_{i}",
            "ground_truth": [{"shop.price": {"thing": ["kite"], "weights": [""]}}],
        }
        for i in range(3)
    ]
    _write_lines(root / "bfcl/BFCL_v3_simple.json", bfcl)
    _write_lines(root / "bfcl/possible_answer/BFCL_v3_simple.json", truth)
    humaneval = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": "import math\n\ndef helper(x):\n    return x\n\n"
            f'def double{i}(x):\n    """Twice x."""\n',
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n"
            f"    assert candidate(2) == helper(4) == double{i}(2)\n",
            "entry_point": f"double{i}",
        }
        for i in range(4)
    ]
    _write_lines(root / "humaneval/HumanEval.jsonl", humaneval)
    fit_manifest(root, monkeypatch)
    return root


def fit_manifest(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Published]:
    """The manifest of what lies under `root`."""
    manifest = {"mmlu": Published(0, [], [], SUBJECTS)}
    monkeypatch.setattr(data, "manifest", lambda: manifest)
    for name in data.HUB:
        rows, _ = data._first(name, [("here", data._in(root / name))])
        assert rows is not None
        ids = [row["id"] for row in rows if "/dev/" not in row["id"]]
        subjects = SUBJECTS if name == "mmlu" else ()
        manifest[name] = Published(len(rows), [data.digest(rows)], ids[::-1], subjects)
    return manifest


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
