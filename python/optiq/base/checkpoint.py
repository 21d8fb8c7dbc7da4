"""Work in progress on disk, from where an interrupted job goes on.

A checkpoint says what its content depends on, its identity. A job goes on only with a checkpoint of
the same identity; what the content means is its owner's business.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from .files import write_json
from .text import cause

Identity = Mapping[str, Any]  # anything that JSON can hold


def write(path: Path, kind: str, identity: Identity, content: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path` in one step."""
    write_json(path, {"kind": kind, "identity": dict(identity), **content}, indent=None)


def read(path: Path, kind: str, identity: Identity | None = None) -> Mapping[str, Any]:
    """What `write` wrote, of this kind and with this identity (None: with any).

    Raises CheckpointError.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({cause(error)}); delete it or name another"
        ) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not JSON: {error}") from error
    if not isinstance(state, dict):
        raise damaged(path, "not a JSON object")
    if state.get("kind") != kind:
        raise CheckpointError(f"{path} is not a checkpoint of this job; start anew with --restart")
    if not isinstance(state.get("identity"), dict):
        raise damaged(path, "no identity")
    if identity is not None:
        check_identity(path, identity, state["identity"])
    return state


def check_identity(path: Path, ours: Identity, theirs: Identity) -> None:
    """Raise CheckpointError unless the checkpoint at `path` depends on the same as this job."""
    differing = [
        f"{key}: {_short(theirs.get(key))} then, {_short(value)} now"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    if differing:
        raise CheckpointError(
            f"{path} belongs to another job ({'; '.join(differing)}); repeat the original command, "
            "or use --restart to discard it (restart=True in Python)"
        )


def check_unfinished(files: Iterable[Path], *, resume: bool, restart: bool = False) -> None:
    """Raise UsageError rather than overwrite what an interrupted job left; `restart` removes it."""
    if resume and restart:
        raise UsageError(
            "--resume goes on with an interrupted run and --restart discards it; choose one"
        )
    left = [path for path in files if path.exists()]
    if left and restart:
        for path in left:
            path.unlink(missing_ok=True)  # another rank may have been faster
    elif left and not resume:
        raise UsageError(
            f"{left[0]} holds unfinished work; --resume goes on with it, --restart discards it "
            "(resume=True or restart=True in Python)"
        )


def damaged(path: Path, what: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({what}); start anew with --restart")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
