"""What a training run is asked for, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TypedDict

from ..errors import UsageError

RANKS = ("uniform", "sensitivity", "bits")  # or a file
INITS = ("zero", "qera", "pissa")
TARGETS = ("all", "attention", "mlp")


class TrainingFields(TypedDict, total=False):
    """The fields of `Training`, as keyword arguments."""

    iters: int
    batch_size: int
    rank: int
    ranks: str
    init: str
    scale: float
    targets: str
    learning_rate: float
    warmup: int | None
    weight_decay: float
    clip: float
    max_length: int
    pack_length: int
    eval_every: int | None
    held_out: int
    patience: int
    save_every: int
    recompute: bool
    dpo: bool
    beta: float
    seed: int


@dataclass(frozen=True)
class Training:
    """One run of `optiq lora train`.

    An update is made from `batch_size` samples, which go through the model in packs of at most
    `pack_length` tokens: how many there are decides memory, not the result. The learning rate
    rises for `warmup` updates (None: a twentieth of all) and falls to a tenth as a cosine.
    `rank` sets the number of parameters: that of `rank` in every layer. `scale` multiplies the
    low-rank term, as in mlx-lm. `clip` bounds the norm of the gradient. Every `eval_every` updates
    (None: a tenth of all) the loss of at most `held_out` held-out samples is measured; after
    `patience` times without a lower one training stops (0: never). With `dpo` rows
    are preferences, and `beta` says how much a pair counts that is already apart.
    """

    iters: int = 200
    batch_size: int = 8
    rank: int = 8
    ranks: str = "uniform"
    init: str = "zero"
    scale: float = 2.0
    targets: str = "all"
    learning_rate: float = 2e-4
    warmup: int | None = None
    weight_decay: float = 0.01
    clip: float = 1.0
    max_length: int = 2048
    pack_length: int = 2048
    eval_every: int | None = None
    held_out: int = 100
    patience: int = 3
    save_every: int = 10
    recompute: bool = True
    dpo: bool = False
    beta: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("iters", 1), ("batch_size", 1), ("rank", 1), ("max_length", 8), ("pack_length", 8),
            ("held_out", 1), ("patience", 0), ("save_every", 1), ("seed", 0),
        ):  # fmt: skip
            if (value := getattr(self, name)) < least:
                raise UsageError(f"{name} is {value}; give at least {least}")
        for name in ("warmup", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < (1 if name == "eval_every" else 0):
                raise UsageError(f"{name} is {value}; give a positive number, or leave it out")
        for name in ("scale", "learning_rate", "clip", "beta"):
            if not (isfinite(value := getattr(self, name)) and value > 0):
                raise UsageError(f"{name} is {value}; give a positive number")
        if not (isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UsageError(f"weight_decay is {self.weight_decay}; give 0 or more")
        for name, known in (("init", INITS), ("targets", TARGETS)):
            if (word := getattr(self, name)) not in known:
                raise UsageError(f"{name} is {word!r}; use one of {', '.join(known)}")

    @property
    def warm(self) -> int:
        return self.iters // 20 if self.warmup is None else self.warmup

    @property
    def every(self) -> int:
        return max(1, self.iters // 10) if self.eval_every is None else self.eval_every


def default_init(original: object, dpo: bool) -> str:
    """How the matrices begin where nothing is asked for. `dpo` compares with the model as it is, so
    it begins there."""
    return "qera" if original is not None and not dpo else "zero"
