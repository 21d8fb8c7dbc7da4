"""The files that questions come in, and the rows they hold: one shape whatever the layout."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import EvalError

Row = dict[str, Any]
Files = Mapping[str, bytes]

LETTERS = "ABCD"


@dataclass(frozen=True)
class Layout:
    """Files that hold a data set, and how rows are made of them."""

    files: tuple[str, ...]
    rows: Callable[[Files], list[Row]]


def layouts(name: str, subjects: Sequence[str]) -> list[Layout]:
    """The files that a data set may come as: its origin's, its package's and the hub's.

    `subjects` are those of MMLU, which has two files of each.
    """
    if name == "mmlu":
        names = {
            f"{split}/{subject}_{split}.csv": (subject, split)
            for split in ("dev", "test")
            for subject in subjects
        }
        hub = tuple(f"all/{split}-00000-of-00001.parquet" for split in ("dev", "test"))
        return [
            Layout(tuple(names), lambda files: _mmlu_csv(names, files)),
            Layout(hub, _mmlu_parquet),
        ]
    if name == "gsm8k":
        hub = ("main/test-00000-of-00001.parquet",)
        return [
            Layout(("test.jsonl",), lambda f: _gsm8k(_json_lines(f["test.jsonl"]))),
            Layout(hub, lambda f: _gsm8k(_parquet(f[hub[0]]))),
        ]
    if name == "ifeval":
        return [
            Layout((file,), lambda f: _ifeval(_json_lines(*f.values())))
            for file in ("input_data.jsonl", "ifeval_input_data.jsonl")
        ]
    if name == "bfcl":
        return [
            Layout((file, f"possible_answer/{file}"), _bfcl)
            for file in ("BFCL_v3_simple.json", "BFCL_v4_simple_python.json")
        ]
    hub = ("openai_humaneval/test-00000-of-00001.parquet",)
    return [
        Layout(("HumanEval.jsonl.gz",), lambda f: _humaneval(_json_lines(_unzip(*f.values())))),
        Layout(("HumanEval.jsonl",), lambda f: _humaneval(_json_lines(*f.values()))),
        Layout(hub, lambda f: _humaneval(_parquet(f[hub[0]]))),
    ]


def _json_lines(content: bytes) -> list[Row]:
    return [json.loads(line) for line in content.decode("utf-8").split("\n") if line.strip()]


def _unzip(content: bytes) -> bytes:
    return gzip.decompress(content)


def _parquet(content: bytes) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise EvalError(
            "the hub's copy is a Parquet file: pip install 'optiq-mlx[evals]', or give other files "
            "with --data"
        ) from error
    rows: list[Row] = parquet.read_table(io.BytesIO(content)).to_pylist()
    return rows


def _mmlu_csv(names: Mapping[str, tuple[str, str]], files: Files) -> list[Row]:
    """The layout of hendrycks/test: no heading; question, four choices, letter."""
    rows = []
    for file, (subject, split) in names.items():
        lines = csv.reader(io.StringIO(files[file].decode("utf-8"), newline=""))
        for index, (question, *choices, letter) in enumerate(lines):
            rows.append(_mmlu(subject, split, index, question, choices, LETTERS.index(letter)))
    return rows


def _mmlu_parquet(files: Files) -> list[Row]:
    rows = []
    for file, split in zip(files, ("dev", "test"), strict=True):
        seen: dict[str, int] = {}
        for row in _parquet(files[file]):
            subject = row["subject"]
            index = seen[subject] = seen.get(subject, -1) + 1
            rows.append(
                _mmlu(subject, split, index, row["question"], row["choices"], row["answer"])
            )
    return rows


def _mmlu(
    subject: str, split: str, index: int, question: str, choices: Sequence[str], answer: int
) -> Row:
    if len(choices) != 4 or answer not in range(4):
        raise ValueError(f"question {index} of {subject} has no four choices and an answer")
    return {
        "id": f"{subject}/{split}/{index}",
        "subject": subject,
        "question": question,
        "choices": list(choices),
        "answer": answer,
    }


def _gsm8k(rows: Sequence[Row]) -> list[Row]:
    return [
        {"id": f"test/{index}", "question": row["question"], "answer": row["answer"]}
        for index, row in enumerate(rows)
    ]


def _humaneval(rows: Sequence[Row]) -> list[Row]:
    keys = ("prompt", "canonical_solution", "test", "entry_point")
    return [{"id": row["task_id"]} | {key: row[key] for key in keys} for row in rows]


def _ifeval(rows: Sequence[Row]) -> list[Row]:
    """Arguments of None stand for none: the hub's viewer fills rows up with them."""
    return [
        {
            "id": str(row["key"]),
            "prompt": row["prompt"],
            "instruction_id_list": row["instruction_id_list"],
            "kwargs": [
                {k: v for k, v in kwargs.items() if v is not None} for kwargs in row["kwargs"]
            ],
        }
        for row in rows
    ]


def _bfcl(files: Files) -> list[Row]:
    """Questions and answers of one category, under the ids of version 3."""
    questions, answers = (_json_lines(content) for content in files.values())
    truth = {row["id"]: row["ground_truth"] for row in answers}
    return [
        {
            "id": row["id"].replace("simple_python_", "simple_"),
            "question": row["question"],
            "function": row["function"],
            "ground_truth": truth[row["id"]],
        }
        for row in questions
    ]
