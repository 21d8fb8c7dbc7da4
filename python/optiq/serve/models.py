"""The names under which the model is served."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from .protocols.problems import Refusal


@dataclass(frozen=True)
class Listed:
    """A model that clients may ask for; its context is known once it has been loaded."""

    name: str
    created: int
    context: int | None
    loaded: bool = True
    pinned: bool = True


@dataclass(frozen=True)
class Models:
    """One model; `aliases` are other names for it, with `*` for anything: `claude-*`.

    Equal requests with equal seeds have equal answers while `fingerprint` is the same.
    """

    name: str
    created: int
    context: int
    fingerprint: str
    aliases: tuple[str, ...] = ()

    @property
    def listed(self) -> Listed:
        return Listed(self.name, self.created, self.context)

    def find(self, name: str | None) -> str:
        """The true name of the model that a request asks for; None asks for the one there is."""
        if name is None or name == self.name or any(fnmatchcase(name, a) for a in self.aliases):
            return self.name
        raise Refusal(
            404,
            "model_not_found",
            f"the model {name!r} is not served here; ask for {self.name!r}, or start the server "
            "with --alias",
        )
