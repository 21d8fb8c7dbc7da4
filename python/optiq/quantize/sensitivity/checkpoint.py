"""What a measurement has found, on disk after every unit of work, so that it can go on.

A unit is one step of one batch of one round (see job.py). What it finds does not depend on what
was done before it, so units may be done in any order, by any rank, before or after a stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path

from ...base import checkpoint
from ...base.checkpoint import Identity, damaged

# By module path and format name: KL in nats summed over the tokens, of each sequence.
Totals = dict[str, dict[str, list[float]]]
Rounds = dict[str, dict[str, Totals]]  # by the names of the round and of the unit

_KIND = "optiq.sensitivity.checkpoint"


class Checkpoint:
    """The units done of a measurement described by `identity`.

    With `path` None nothing is written. Rank r writes a file of its own, see `rank_path`; with
    `resume` those of all ranks that are there are continued, and must have the same identity.
    """

    def __init__(
        self, path: Path | None, identity: Identity, *, resume: bool, rank: int = 0
    ) -> None:
        self._path = path and rank_path(path, rank)
        self._identity = identity
        self.rounds: Rounds = {}
        for file in existing(path) if resume and path else []:
            self.add(_read(file, identity))

    def units(self, name: str) -> dict[str, Totals]:
        """What the round `name` has found, by unit."""
        return self.rounds.setdefault(name, {})

    def add(self, rounds: Rounds) -> None:
        """Take over what another rank, or an earlier run, has found."""
        for name, units in rounds.items():
            self.units(name).update(units)

    def save(self) -> None:
        """Write what there is."""
        if self._path is not None:
            checkpoint.write(self._path, _KIND, self._identity, {"rounds": self.rounds})

    def check(self, name: str, expected: Mapping[str, tuple[set[tuple[str, str]], int]]) -> None:
        """Raise CheckpointError unless the units done of a round are units of `expected`.

        It has, by name, the (module path, format name) that a unit scores and on how many
        sequences.
        """
        for unit, totals in self.units(name).items():
            scored, sequences = expected.get(unit, (set(), 0))
            if {(path, fmt) for path, of in totals.items() for fmt in of} != scored or any(
                len(column) != sequences for of in totals.values() for column in of.values()
            ):
                assert self._path is not None
                raise damaged(
                    self._path, f"unit {unit} of round {name} does not belong to this measurement"
                )


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
    name = checkpoint.read(files[0], _KIND)["identity"].get("reference")
    return name if name in ("bf16", "uniform4") else None


def _read(path: Path, identity: Identity) -> Rounds:
    rounds = checkpoint.read(path, _KIND, identity).get("rounds")
    if not isinstance(rounds, dict) or not all(
        isinstance(units, dict) and all(map(_are_totals, units.values()))
        for units in rounds.values()
    ):
        raise damaged(path, "its units are not finite numbers by module and format")
    return rounds


def _are_totals(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(by_format, dict)
        and all(
            isinstance(column, list) and all(isinstance(x, float) and isfinite(x) for x in column)
            for column in by_format.values()
        )
        for by_format in value.values()
    )
