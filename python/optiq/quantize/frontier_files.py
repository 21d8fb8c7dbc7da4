"""The files of `optiq frontier`: those it writes in the end, and the points finished so far."""

from __future__ import annotations

import contextlib
import json
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from ..base.files import whole, write_json
from ..errors import ExportError, OptiqError, UsageError
from ..report import frontier as page
from . import preflight
from .prepare import SCORES

Json = dict[str, Any]

JSON, HTML = "frontier.json", "frontier.html"
KIND = "optiq.frontier"
_KIND = "optiq.frontier.checkpoint"


def check_replaceable(out: Path, *, scores: bool) -> None:
    """Raise UsageError unless every file to be written is missing or of our making."""
    marks = {JSON: f'"kind": "{KIND}"', HTML: page.MARK}
    for name, mark in marks.items():
        path = out / name
        if not path.exists() and not path.is_symlink():
            continue
        try:
            ours = path.is_file() and mark in path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            ours = False
        if not ours:
            raise UsageError(
                f"{path} exists and was not made by optiq frontier; choose another folder"
            )
    if scores:
        preflight.check_replaceable(out / SCORES)


def write(result: Json, scores: Json | None, out: Path) -> None:
    """Write the files into the folder `out`: all are complete before the first is in its place.

    Raises ExportError; then `out` is as it was, but that a folder may have been made.
    """
    texts = {
        HTML: page.render(result),
        **({SCORES: json.dumps(scores, indent=1, allow_nan=False)} if scores else {}),
        JSON: json.dumps(result, indent=1, allow_nan=False) + "\n",
    }
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with whole(*(out / name for name in texts)) as partial:
            for path, text in zip(partial, texts.values(), strict=True):
                path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ExportError(
            f"{out} cannot be written ({error.strerror}); free space, then --resume loses nothing"
        ) from error
    finally:
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()  # where nothing came into it


class Finished:
    """The points that are measured, by name, on disk at `path` as soon as they are.

    `identity` says what they depend on; with `resume` those of an earlier run are taken over, and
    must have the same.
    """

    def __init__(self, path: Path, identity: Json, *, resume: bool) -> None:
        self._path, self._identity = path, identity
        self.points: dict[str, Json] = {}
        if resume and path.exists():
            self._read()

    def add(self, name: str, point: Json) -> None:
        self.points[name] = point
        state = {"kind": _KIND, "identity": self._identity, "points": self.points}
        write_json(self._path, state, indent=1)

    def _read(self) -> None:
        try:
            state = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            self._damaged(str(error))
        if not isinstance(state, dict) or state.get("kind") != _KIND:
            self._damaged("not of optiq frontier")
        theirs, points = state.get("identity"), state.get("points")
        if not isinstance(theirs, dict) or not isinstance(points, dict):
            self._damaged("no identity or no points")
        differing = [key for key, value in self._identity.items() if theirs.get(key) != value]
        if differing:
            raise UsageError(
                f"{self._path} was made with another {', '.join(differing)}; repeat the original "
                "command, or delete it to start anew"
            )
        for name, point in points.items():
            if not _is_point(point):
                self._damaged(f"{name} is no measured model")
        self.points = points

    def _damaged(self, what: str) -> NoReturn:
        raise OptiqError(f"{self._path} is damaged ({what}); delete it and start again")


def _is_point(point: Any) -> bool:
    try:
        return "family" in point and point["nbytes"] > 0 and isfinite(point["kl"]["mean"])
    except (KeyError, TypeError):
        return False
