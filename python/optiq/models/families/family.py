"""A family of models, and which one a config.json belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """What the makers recommend for `use`; None is left as the runtime has it. `source` says so."""

    use: str
    source: str
    temperature: float
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None

    def settings(self) -> dict[str, float | int]:
        """By the names of generation_config.json."""
        named = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
        }
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Caveat:
    """Something to know before, and where it is from."""

    text: str
    source: str


@dataclass(frozen=True)
class Example:
    """A model of the family: its id on the hub, and what its config.json says of its size."""

    name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """`model_types` are those of config.json, `vocabularies` how many tokens the makers' own have.

    `written` is what an export says in generation_config.json where the source has no sampling of
    its own: None where the makers' models differ among themselves.
    """

    key: str
    title: str
    model_types: tuple[str, ...]
    vocabularies: tuple[int, ...]
    sampling: tuple[Sampling, ...]
    written: Sampling | None
    thinking: str
    cache: str
    caveats: tuple[Caveat, ...]
    example: Example | None = None
    experts: bool = False  # whether the makers' models have them; for a guide without sizes

    def defaults(self, config: Mapping[str, Any]) -> dict[str, float | int]:
        """What an export adds to generation_config.json for a model of the makers: one with another
        vocabulary is somebody else's, of the same architecture."""
        vocabulary = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        if self.written is None or vocabulary not in self.vocabularies:
            return {}
        return self.written.settings()


def family_of(config: Mapping[str, Any], families: Sequence[Family]) -> Family | None:
    """The family of a config.json, by its own model_type or that of its language model."""
    inner = config.get("text_config")
    kinds = (config.get("model_type"), inner.get("model_type") if isinstance(inner, dict) else None)
    return next((f for kind in kinds for f in families if kind in f.model_types), None)
