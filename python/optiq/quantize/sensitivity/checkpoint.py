"""What a measurement has found, on disk after every unit of work, so that it can go on.

A unit is one step of one batch of one round (see job.py). What it finds does not depend on what
was done before it, so units may be done in any order, by any rank, before or after a stop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from ...base.files import write_json
from ...errors import SensitivityError

# By module path and format name: KL in nats summed over the tokens, of each sequence.
Totals = dict[str, dict[str, list[float]]]

_KIND = "optiq.sensitivity.checkpoint"


class Checkpoint:
    """The units done of a measurement described by `identity` (anything JSON can hold).

    `rounds` has, by the names of the round and of the unit, the unit's totals. With `path` None
    nothing is written. Rank r writes a file of its own, see `rank_path`; with `resume` those of
    all ranks that are there are continued, and must have the same identity.
    """

    def __init__(
        self, path: Path | None, identity: dict[str, Any], *, resume: bool, rank: int = 0
    ) -> None:
        self._path = path and rank_path(path, rank)
        self._identity = identity
        self.rounds: dict[str, dict[str, Totals]] = {}
        for file in existing(path) if resume and path else []:
            self._read(file)

    def units(self, name: str) -> dict[str, Totals]:
        """What the round `name` has found, by unit."""
        return self.rounds.setdefault(name, {})

    def add(self, rounds: dict[str, dict[str, Totals]]) -> None:
        """Take over what another rank, or an earlier run, has found."""
        for name, units in rounds.items():
            self.units(name).update(units)

    def save(self) -> None:
        """Write what there is."""
        if self._path is not None:
            state = {"kind": _KIND, "identity": self._identity, "rounds": self.rounds}
            write_json(self._path, state, indent=None)

    def check(self, name: str, expected: Mapping[str, tuple[set[tuple[str, str]], int]]) -> None:
        """Raise SensitivityError unless the units done of a round are units of `expected`.

        It has, by name, the (module path, format name) that a unit scores and on how many
        sequences.
        """
        for unit, totals in self.units(name).items():
            scored, sequences = expected.get(unit, (set(), 0))
            if {(path, fmt) for path, of in totals.items() for fmt in of} != scored or any(
                len(column) != sequences for of in totals.values() for column in of.values()
            ):
                raise SensitivityError(
                    f"{self._path} is damaged (unit {unit} of round {name} is none of this "
                    "measurement); delete it and start without --resume"
                )

    def _read(self, path: Path) -> None:
        state = _read_state(path)
        theirs = state["identity"]
        differing = [k for k, v in self._identity.items() if theirs.get(k) != v]
        if differing:
            raise SensitivityError(
                f"the checkpoint {path} was made with another {', '.join(differing)}; "
                "repeat the original command, or leave out --resume to start anew"
            )
        self.add(state["rounds"])


def rank_path(path: Path, rank: int) -> Path:
    """The checkpoint of one rank of a distributed measurement; rank 0 has `path` itself."""
    return path if rank == 0 else path.with_name(f"{path.name}.{rank}")


def existing(path: Path) -> list[Path]:
    """The checkpoints that are there, of all ranks."""
    ranks = path.parent.glob(f"{path.name}.*") if path.parent.exists() else ()
    others = sorted(other for other in ranks if other.suffix[1:].isdecimal())
    return [path, *others] if path.exists() else others


def saved_reference(path: Path) -> str | None:
    """The reference that the checkpoint at `path` was made with; None without a checkpoint."""
    files = existing(path)
    if not files:
        return None
    name = _read_state(files[0])["identity"].get("reference")
    return name if name in ("bf16", "uniform4") else None


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
    rounds = state.get("rounds")
    if not isinstance(rounds, dict) or not all(
        isinstance(units, dict) and all(map(_are_totals, units.values()))
        for units in rounds.values()
    ):
        _damaged(path, "its units are not finite numbers by module and format")
    return state


def _are_totals(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(by_format, dict)
        and all(
            isinstance(column, list) and all(isinstance(x, float) and isfinite(x) for x in column)
            for column in by_format.values()
        )
        for by_format in value.values()
    )


def _damaged(path: Path, what: str) -> NoReturn:
    raise SensitivityError(f"{path} is damaged ({what}); delete it and start without --resume")
