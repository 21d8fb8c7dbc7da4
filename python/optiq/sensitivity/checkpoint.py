"""Where a measurement had got to, on disk after every step, so that it can go on after a stop."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from ..errors import SensitivityError
from .tally import Tally

_KIND = "optiq.sensitivity.checkpoint"


class Checkpoint:
    """The tally and the place in a measurement described by `identity` (anything JSON can hold).

    `place` is (batch, step): all steps before it are in the tally. `weight_errors` has by module
    path and format name what rounding does to the weight itself, as far as it is known. With `path`
    None nothing is written. With `resume` an existing file is continued; it must have the same
    identity.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], *, resume: bool) -> None:
        self._path = path
        self._identity = identity
        self.tally = Tally()
        self.weight_errors: dict[str, dict[str, float]] = {}
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
                "weight_errors": self.weight_errors,
            }
            write_json(self._path, state, indent=None)

    def check(self, batches: int, steps: Sequence[set[tuple[str, str]]], *, partial: bool) -> None:
        """Raise SensitivityError unless the tally is what it must be at this place.

        `steps` has the (module path, format name) that each step of a batch scores; without
        `partial`, only whole batches are saved.
        """
        if self._path is None:
            return
        batch, step = self.place
        last = len(steps) if partial and batch < batches else 0
        if batch > batches or step > last:
            _damaged(self._path, "its place is beyond the end")
        scored: set[tuple[str, str]] = set().union(*(steps if batch else steps[:step]))
        if {(path, fmt) for path, sums in self.tally.sums.items() for fmt in sums} != scored:
            _damaged(self._path, "its sums are not those of its place")

    def _read(self, path: Path) -> None:
        state = _read_state(path)
        theirs = state["identity"]
        differing = [k for k, v in self._identity.items() if theirs.get(k) != v]
        if differing:
            raise SensitivityError(
                f"the checkpoint {path} was made with another {', '.join(differing)}; "
                "repeat the original command, or leave out --resume to start anew"
            )
        self.tally = Tally(state["sums"])
        self.weight_errors = state["weight_errors"]
        batch, step = state["place"]
        self.place = (batch, step)


def saved_reference(path: Path) -> str | None:
    """The reference that the checkpoint at `path` was made with; None without a checkpoint."""
    if not path.exists():
        return None
    name = _read_state(path)["identity"].get("reference")
    return name if isinstance(name, str) else None


def _read_state(path: Path) -> dict[str, Any]:
    """What `Checkpoint.save` wrote, or a SensitivityError."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SensitivityError(
            f"{path} cannot be read ({error}); delete it or name another"
        ) from error
    except (ValueError, RecursionError) as error:
        _damaged(path, f"not JSON: {error}")
    if not isinstance(state, dict):
        _damaged(path, "not a JSON object")
    if state.get("kind") != _KIND:
        raise SensitivityError(f"{path} is not a checkpoint of optiq; delete it to start anew")
    if not isinstance(state.get("identity"), dict):
        _damaged(path, "no identity")
    if not _is_place(state.get("place")):
        _damaged(path, "its place is not two counts")
    if not _are_sums(state.get("sums")):
        _damaged(path, "its sums are not three finite numbers each")
    if not _are_errors(state.setdefault("weight_errors", {})):
        _damaged(path, "its weight errors are not finite numbers")
    return state


def _is_place(value: object) -> bool:
    # type() and not isinstance(): JSON's true is an int to Python.
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(n) is int and n >= 0 for n in value)
    )


def _are_sums(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(by_format, dict)
        and all(
            isinstance(sums, list)
            and len(sums) == 3
            and all(isinstance(x, float) and isfinite(x) for x in sums)
            for sums in by_format.values()
        )
        for by_format in value.values()
    )


def _are_errors(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(by_format, dict)
        and all(isinstance(x, float) and isfinite(x) for x in by_format.values())
        for by_format in value.values()
    )


def _damaged(path: Path, what: str) -> NoReturn:
    raise SensitivityError(f"{path} is damaged ({what}); delete it and start without --resume")


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
