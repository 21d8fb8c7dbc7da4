"""The options of `optiq kv`, read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ...errors import UsageError
from ...kv.config import KVConfig
from .contexts import LEAST, SAMPLES
from .slots import MENU, Width, configured, parse_menu

if TYPE_CHECKING:
    from typing_extensions import Unpack

SIZE = "8/4"
# Most of what a coarse cache costs is in the last tokens and in the first, which a query attends to
# most (docs/measured.md has figures).
RECENT, SINK = 128, 4


class KVFields(TypedDict, total=False):
    """The options as users give them, see `kv_plan`; None stands for the default."""

    size: str | None
    context: int | None
    samples: int | None
    formats: str | None
    fp_recent: int | None
    fp_sink: int | None
    calibration: str | Path | None
    revision: str | None
    seed: int | None
    resume: bool | None
    restart: bool | None
    overwrite: bool | None
    progress: bool | None


@dataclass(frozen=True)
class CacheSize:
    """A size as it was written: a `share` of the 16-bit cache, or else uniform widths."""

    text: str
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> CacheSize:
        """Read "8/4" (widths of keys and values) or "40%"; UsageError for another text."""
        size = text.strip()
        if not size.endswith("%"):
            KVConfig.uniform((), size)
            return cls(text)
        try:
            share = float(size[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise UsageError(
                f"--size {text} is not a share of the 16-bit cache; write for example 40%"
            )
        return cls(text, share)

    def budget(self, config: KVConfig, context: int) -> int:
        """Bytes after `context` tokens; KVError for widths that keys and values do not have."""
        if self.share is None:
            return KVConfig.uniform(config.entries, self.text).nbytes(context)
        return int(self.share * configured(config, {}).nbytes(context))


@dataclass(frozen=True)
class KVOptions:
    """The options of `kv_plan`; `context` is None for the usual length."""

    size: CacheSize
    formats: Sequence[Width]
    context: int | None = None
    samples: int = SAMPLES
    fp_recent: int = RECENT
    fp_sink: int = SINK
    calibration: Path | None = None
    revision: str | None = None
    seed: int = 0
    resume: bool = False
    restart: bool = False
    overwrite: bool = False
    progress: bool = True

    @classmethod
    def parse(cls, **fields: Unpack[KVFields]) -> KVOptions:
        """Read options; UsageError for what no model can have."""
        given: dict[str, Any] = {key: of for key, of in fields.items() if of is not None}
        options = cls(
            size=CacheSize.parse(given.pop("size", SIZE)),
            formats=parse_menu(given.pop("formats", MENU)),
            calibration=Path(given.pop("calibration")) if "calibration" in given else None,
            **given,
        )
        if options.context is not None and options.context < LEAST:
            raise UsageError(
                f"--context {options.context} is too short to read back from; give {LEAST} or more"
            )
        return options
