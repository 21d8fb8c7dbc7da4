"""Where a measurement had got to, on disk after every step, so that it can go on after a stop."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import SensitivityError
from .tally import Tally

_KIND = "optiq.sensitivity.checkpoint"


class Checkpoint:
    """The tally and the place in a measurement described by `identity` (anything JSON can hold).

    `place` is (batch, step): all steps before it are in the tally. With `path` None nothing is
    written. With `resume` an existing file is continued; it must have the same identity.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], *, resume: bool) -> None:
        self._path = path
        self._identity = identity
        self.tally = Tally()
        self.place = (0, 0)
        if resume and path is not None and path.exists():
            self._read(path)

    def save(self, batch: int, step: int) -> None:
        """Note that everything before this place is done."""
        self.place = (batch, step)
        if self._path is not None:
            state = {
                "kind": _KIND,
                "identity": self._identity,
                "place": self.place,
                "sums": self.tally.sums,
            }
            write_json(self._path, state, indent=None)

    def _read(self, path: Path) -> None:
        state = read_json(path)
        if not isinstance(state, dict) or state.get("kind") != _KIND:
            raise SensitivityError(f"{path} is not a checkpoint of optiq; delete it to start anew")
        theirs = state["identity"]
        differing = [k for k, v in self._identity.items() if theirs.get(k) != v]
        if differing:
            raise SensitivityError(
                f"the checkpoint {path} was made with another {', '.join(differing)}; "
                "repeat the original command, or leave out --resume to start anew"
            )
        self.tally = Tally(state["sums"])
        batch, step = state["place"]
        self.place = (batch, step)


def read_json(path: Path) -> Any:
    """The content of a JSON file; SensitivityError names the file when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SensitivityError(
            f"{path} cannot be read ({error}); delete it or name another"
        ) from error


def write_json(path: Path, data: Any, *, indent: int | None) -> None:
    """Replace `path` in one step: a reader finds the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(data, indent=indent, allow_nan=False), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise SensitivityError(
            f"{path} cannot be written ({error}); free space or name another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
