"""How the formats of a KV configuration were found: kv_config.report.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import KVError
from ..formats import Format
from ..quality.results import Divergence
from .config import Identity

Json = dict[str, Any]

KIND = "optiq.kv.report"


@dataclass(frozen=True)
class SlotScore:
    """KL in nats per token that one slot in one format causes, and its standard error (by context).

    `measured`, or else by the law of how KL falls with the width.
    """

    kl: float
    se: float | None
    measured: bool


SlotScores = dict[str, dict[Format, SlotScore]]  # by slot


@dataclass(frozen=True)
class ScoredSlot:
    """Keys ("k") or values ("v") of the `cache`-th cache: the format it got, and all scores.

    A token has `heads` vectors of `dim` elements. `held` tokens are in the cache after the context;
    `end` says whether it is the first or the last cache.
    """

    cache: int
    side: str
    heads: int
    dim: int
    held: int
    end: bool
    format: Format
    scores: Mapping[Format, SlotScore]

    def to_json(self) -> Json:
        scores = {str(fmt): asdict(score) for fmt, score in self.scores.items()}
        return {**vars(self), "format": str(self.format), "scores": scores}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScoredSlot:
        scores = {Format.parse(fmt): SlotScore(**score) for fmt, score in data["scores"].items()}
        return cls(**{**data, "format": Format.parse(data["format"]), "scores": scores})


@dataclass(frozen=True)
class KVPoint:
    """Formats for all slots: their bytes after the context, the sum of scores, and real decoding
    against caches in full precision."""

    name: str
    nbytes: int
    predicted: float
    divergence: Divergence

    @property
    def kl(self) -> float:
        return self.divergence.kl.mean

    def to_json(self) -> Json:
        size = {"name": self.name, "nbytes": self.nbytes, "predicted": self.predicted}
        return size | self.divergence.to_json()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KVPoint:
        return cls(data["name"], data["nbytes"], data["predicted"], Divergence.from_json(data))


@dataclass(frozen=True)
class Law:
    """Predicted over measured KL where more widths were measured than needed; None if nowhere."""

    checked: int
    median: float | None
    least: float | None
    most: float | None


@dataclass(frozen=True)
class KVModel(Identity):
    """What tells the model apart (see `kv.identity`), and its type."""

    model_type: str | None = None


@dataclass(frozen=True)
class ExactTokens:
    """Last and first tokens that are read in full precision, and their bytes beside the budget."""

    recent: int
    sink: int
    nbytes: int


@dataclass(frozen=True)
class KVText:
    """The contexts: their lengths in tokens and sha256, by what they were for.

    Scores are made from the last `tail` tokens of each.
    """

    source: str
    seed: int
    tail: int
    tokens: Mapping[str, list[int]]
    sha256: Mapping[str, str]


@dataclass(frozen=True)
class KVReport:
    """What was chosen, from what, and how it measures.

    Sizes are bytes after `context` tokens: `budget` of the size `asked` for, `nbytes` of what was
    `chosen`, `dense_nbytes` in 16 bits. `candidates` were measured on text of their own, `ratio` is
    measured over predicted KL of the chosen one, `rank_correlation` that of both over all.
    `frontier` has the least predicted KL by bytes. `points` were measured on held-out text: the
    chosen formats first, then uniform widths.
    """

    model: KVModel
    context: int
    asked: str
    budget: int
    nbytes: int
    dense_nbytes: int
    bytes_per_token: int
    exact: ExactTokens
    chosen: str
    candidates: tuple[KVPoint, ...]
    ratio: float | None
    rank_correlation: float | None
    frontier: tuple[tuple[int, float], ...]
    points: tuple[KVPoint, ...]
    law: Law
    scores: tuple[ScoredSlot, ...]
    text: KVText
    command: str
    versions: Mapping[str, str]
    machine: Mapping[str, Any]

    def to_json(self) -> Json:
        """The contents of kv_config.report.json."""
        return {
            "kind": KIND,
            "schema": 1,
            "model": asdict(self.model),
            "context": self.context,
            "budget": {"asked": self.asked, "bytes": self.budget},
            "nbytes": self.nbytes,
            "dense_nbytes": self.dense_nbytes,
            "bytes_per_token": self.bytes_per_token,
            "exact": asdict(self.exact),
            "chosen": self.chosen,
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "ratio": self.ratio,
            "rank_correlation": self.rank_correlation,
            "frontier": [list(point) for point in self.frontier],
            "points": [point.to_json() for point in self.points],
            "law": asdict(self.law),
            "scores": [slot.to_json() for slot in self.scores],
            "text": asdict(self.text),
            "command": self.command,
            "versions": dict(self.versions),
            "machine": dict(self.machine),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KVReport:
        """Read what `to_json` wrote; KVError when it is another file or incomplete."""
        if data.get("kind") != KIND or data.get("schema") != 1:
            raise KVError("this is not a report of this version of optiq kv; make it again")
        try:
            return cls(
                model=KVModel(**data["model"]),
                context=data["context"],
                asked=data["budget"]["asked"],
                budget=data["budget"]["bytes"],
                nbytes=data["nbytes"],
                dense_nbytes=data["dense_nbytes"],
                bytes_per_token=data["bytes_per_token"],
                exact=ExactTokens(**data["exact"]),
                chosen=data["chosen"],
                candidates=tuple(map(KVPoint.from_json, data["candidates"])),
                ratio=data["ratio"],
                rank_correlation=data["rank_correlation"],
                frontier=tuple((nbytes, kl) for nbytes, kl in data["frontier"]),
                points=tuple(map(KVPoint.from_json, data["points"])),
                law=Law(**data["law"]),
                scores=tuple(map(ScoredSlot.from_json, data["scores"])),
                text=KVText(**data["text"]),
                command=data["command"],
                versions=data["versions"],
                machine=data["machine"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise KVError(f"the report is incomplete ({error!r}); make it again") from error
