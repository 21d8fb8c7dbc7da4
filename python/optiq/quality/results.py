"""What a comparison of a model with a reference gives. No MLX, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Mean:
    """A mean over tokens and its standard error; None where one cluster alone gives none."""

    mean: float
    se: float | None


@dataclass(frozen=True)
class Distribution(Mean):
    """A mean over tokens, quantiles of the single tokens, and the largest."""

    median: float
    p95: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True)
class Divergence:
    """How far the next-token distribution of a model is from that of a reference.

    `kl` is KL(reference || model) in nats per token, `top1` the share of tokens where both agree on
    the most likely one, `ppl_ratio` the model's perplexity over the reference's.
    """

    kl: Distribution
    top1: Mean
    ppl_ratio: float
    tokens: int
    sequences: int
    text_sha256: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Divergence:
        """What `to_json` wrote. Raises KeyError or TypeError for anything else."""
        return Divergence(
            kl=Distribution(**data["kl"]),
            top1=Mean(**data["top1"]),
            ppl_ratio=data["ppl_ratio"],
            tokens=data["tokens"],
            sequences=data["sequences"],
            text_sha256=data.get("text_sha256"),
        )


@dataclass(frozen=True)
class Measured(Divergence):
    """The divergence of a model of this size: bytes of all tensors, bits per logical parameter."""

    nbytes: int
    bpw: float

    @classmethod
    def of(cls, divergence: Divergence, nbytes: int, bpw: float) -> Measured:
        return cls(**vars(divergence), nbytes=nbytes, bpw=bpw)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        """What `to_json` wrote. Raises KeyError or TypeError for anything else."""
        return cls.of(Divergence.from_json(data), data["nbytes"], data["bpw"])
