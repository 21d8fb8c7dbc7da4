"""The files of `optiq frontier`: those it writes in the end, and the points finished so far."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from ..base import checkpoint
from ..base.checkpoint import Identity, damaged
from ..base.files import check_absent, whole
from ..distributed.ranks import World
from ..errors import ExportError, UsageError
from ..planning.pareto import KIND, Frontier, Point
from ..planning.scores import Scores
from ..report import frontier as page
from . import preflight
from .prepare import SCORES

JSON, HTML = "frontier.json", "frontier.html"
_KIND = "optiq.frontier.checkpoint"


def check_replaceable(out: Path, *, scores: bool, overwrite: bool) -> None:
    """Raise UsageError unless all files to be written are missing, or ours and `overwrite`."""
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
        check_absent(path, overwrite)
    if scores:
        preflight.check_replaceable(out / SCORES, overwrite)


def write(frontier: Frontier, scores: Scores | None, out: Path) -> None:
    """Write the files into the folder `out`: all are complete before the first is in its place.

    Raises ExportError; then `out` is as it was, but that a folder may have been made.
    """
    texts = {HTML: page.frontier_page(frontier)}
    if scores is not None:
        texts[SCORES] = json.dumps(scores.to_json(), indent=1, allow_nan=False)
    texts[JSON] = json.dumps(frontier.to_json(), indent=1, allow_nan=False) + "\n"
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
    must have the same. Of the ranks of `world` the first reads and writes.
    """

    def __init__(self, path: Path, identity: Identity, *, resume: bool, world: World) -> None:
        self._path, self._identity, self._writes = path, identity, world.rank == 0
        self.points: dict[str, Point] = {}
        kept: Any = {}
        if resume and self._writes and path.exists():
            kept = checkpoint.read(path, _KIND, identity).get("points")
        self._take(world.gather(kept)[0])

    def add(self, point: Point) -> None:
        self.points[point.name] = point
        points = {name: point.to_json() for name, point in self.points.items()}
        if self._writes:
            checkpoint.write(self._path, _KIND, self._identity, {"points": points})

    def _take(self, points: Any) -> None:
        if not isinstance(points, dict):
            raise damaged(self._path, "no points")
        for name, point in points.items():
            try:
                self.points[name] = Point.from_json(point)
            except (KeyError, TypeError, ValueError) as error:
                raise damaged(self._path, f"{name} is not a measured model") from error
