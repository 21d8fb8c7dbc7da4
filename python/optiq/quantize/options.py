"""The options of the main job, read once from what users write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ..errors import UsageError
from ..formats import DEFAULT_MENU, Format, parse_menu
from ..planning.size import UNIFORM4_SIZE, Size

if TYPE_CHECKING:
    from typing_extensions import Unpack

EFFORTS = ("quick", "normal", "best")
METHODS = ("auto", "kl", "fisher")
REFERENCES = ("auto", "bf16", "uniform4")
TOWERS = ("keep", "8bit", "drop")
ROUNDINGS = ("descent", "search", "minmax")


class OptionFields(TypedDict, total=False):
    """What may be written for each field of `Options`."""

    size: str | float
    effort: str
    memory: str | int | None
    formats: str | Sequence[Format] | None
    sensitivity: str | None
    reference: str
    rounding: str | None
    calibration: str | Path | None
    tokens: int | None
    held_out_tokens: int | None
    scores: str | Path | None
    revision: str | None
    towers: str
    seed: int
    resume: bool
    restart: bool
    overwrite: bool
    progress: bool


@dataclass(frozen=True)
class Options:
    """How a model is measured, planned and rounded.

    Attributes:
        size: "uniform4" (the bytes of stock uniform 4-bit), "4.8bpw", "6.1GB" or bytes.
        effort: "quick" (Fisher scores, an eighth of the text, one plan), "normal" or "best" (twice
            the text; `convert` refines). Options that are given stand.
        memory: Bytes to take at most, such as "10GB"; None is what is free.
        formats: The menu, such as "3,4,5,6,8,bf16"; None is the usual one, or all that has scores.
        sensitivity: "kl" (exact, slow), "fisher" (one backward pass), or "auto": kl for experts
            and routers, fisher for the rest.
        reference: What scores are measured in: "bf16", "uniform4" (for models that do not fit
            memory) or "auto".
        rounding: "descent" (fitted to what each layer's output loses), "search" (the best scales
            are searched) or "minmax" (stock). None is the one that scores were measured
            for: "descent", or "minmax".
        calibration: JSON Lines of samples in place of the bundled mix.
        tokens: Of calibration text; None is 8,192 to round with, 2,048 of them to score with.
        held_out_tokens: Of the text that the result is measured on; None is 4,096.
        scores: A sensitivity.json to use instead of measuring.
        revision: Branch, tag or commit of a model on the hub.
        towers: What becomes of the vision and audio weights of a multimodal model: "keep" (as they
            are), "8bit" or "drop".
        seed: Of every draw; 0 to 2**32 - 1.
        resume: Go on with an interrupted run of the same job.
        restart: Discard what an interrupted run left.
        overwrite: Replace a result of optiq's that is there already.
        progress: Show progress on stderr.
    """

    size: Size = UNIFORM4_SIZE
    effort: str = "normal"
    memory: int | None = None
    formats: tuple[Format, ...] | None = None
    sensitivity: str = "auto"
    reference: str = "auto"
    rounding: str | None = None
    calibration: Path | None = None
    tokens: int | None = None
    held_out_tokens: int | None = None
    scores: Path | None = None
    revision: str | None = None
    towers: str = "keep"
    seed: int = 0
    resume: bool = False
    restart: bool = False
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UsageError(
                f"the seed {self.seed} is not between 0 and {2**32 - 1}; choose one that is"
            )
        _one_of("effort", self.effort, EFFORTS)
        _one_of("sensitivity method", self.sensitivity, METHODS)
        _one_of("reference", self.reference, REFERENCES)
        _one_of("choice of towers", self.towers, TOWERS)
        if self.rounding is not None:
            _one_of("rounding", self.rounding, ROUNDINGS)

    @classmethod
    def parse(cls, **fields: Unpack[OptionFields]) -> Options:
        """The options that `fields` say. Raises UsageError for one that is not understood."""
        given = {name: value for name, value in fields.items() if value is not None}
        parsed: dict[str, object] = {**_OF_EFFORT.get(fields.get("effort", ""), {}), **given}
        if "memory" in given:
            parsed["memory"] = _nbytes(given["memory"])
        if "size" in fields:
            parsed["size"] = Size.parse(fields["size"])
        if (formats := fields.get("formats")) is not None:
            parsed["formats"] = parse_menu(
                formats if isinstance(formats, str) else map(str, formats)
            )
        for name in ("calibration", "scores"):
            if parsed.get(name) is not None:
                parsed[name] = Path(str(parsed[name])).expanduser()
        return cls(**parsed)  # type: ignore[arg-type]

    def check_no_memory(self, command: str) -> None:
        """Raise UsageError if `memory` is given, which only a conversion keeps to."""
        if self.memory is not None:
            raise UsageError(f"{command} does not keep to memory={self.memory}; leave it out")

    @property
    def together(self) -> bool:
        """Whether rows of a layer are fitted together: most of the work on a large one."""
        return self.effort != "quick"

    @property
    def menu(self) -> tuple[Format, ...]:
        """The formats to measure."""
        return self.formats or DEFAULT_MENU


# What an effort sets. SmolLM2's KL by effort is in docs/how-it-works.md.
_OF_EFFORT: dict[str, dict[str, object]] = {
    "quick": {"sensitivity": "fisher", "tokens": 1024, "held_out_tokens": 1024},
    "best": {"tokens": 16384},
}


def _nbytes(written: object) -> int:
    nbytes = Size.parse(str(written)).nbytes
    if nbytes is None:
        raise UsageError(f"memory {written} is not a number of bytes; write 10GB or 512MiB")
    return int(nbytes)


def _one_of(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"unknown {what} {value!r}; use {', '.join(known[:-1])} or {known[-1]}")
