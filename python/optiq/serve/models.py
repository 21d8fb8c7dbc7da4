"""The names under which the model is served."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from .engine.sums import Weights, parse, written
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
    """One model; `aliases` are other names for it, with `*` for anything: `claude-*`. With one of
    `adapters` it is called `name:adapter`.

    Equal requests with equal seeds have equal answers while `fingerprint` is the same.
    """

    name: str
    created: int
    context: int
    fingerprint: str
    aliases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()

    def find(self, name: str | None, adapters: Weights | None = None) -> str:
        """The true name of what a request asks for; None asks for the one model there is.

        Raises Refusal, and RequestError for a sum that cannot be read.
        """
        if adapters is None and name is not None:
            before, colon, after = name.rpartition(":")
            if colon and not self._is_ours(name) and self._is_ours(before):
                name, adapters = before, parse(after)
        if name is not None and not self._is_ours(name):
            raise Refusal(
                404,
                "model_not_found",
                f"the model {name!r} is not served here; ask for {self.name!r}, or start the "
                "server with --alias",
            )
        for adapter in adapters or ():
            if adapter not in self.adapters:
                mounted = ", ".join(self.adapters) or "none"
                raise Refusal(
                    404,
                    "model_not_found",
                    f"no adapter {adapter!r} is mounted; mounted are {mounted}",
                )
        return f"{self.name}:{written(adapters)}" if adapters else self.name

    def adapter_of(self, true_name: str) -> str | None:
        """The adapter, or the sum of several, in what `find` has returned."""
        return None if true_name == self.name else true_name.removeprefix(f"{self.name}:")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *(f"{self.name}:{adapter}" for adapter in self.adapters))

    def listed(self, true_name: str) -> Listed:
        return Listed(true_name, self.created, self.context)

    def _is_ours(self, name: str) -> bool:
        return name == self.name or any(fnmatchcase(name, a) for a in self.aliases)
