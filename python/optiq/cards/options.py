"""What a card is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..errors import UsageError
from ..sources.hub import is_repo_id

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CardFields(TypedDict, total=False):
    """The options of `optiq.card`; see `CardOptions`."""

    name: str | None
    base_model: str | None
    license: str | None
    uniform: str | Path | None
    force: bool


@dataclass(frozen=True)
class CardOptions:
    """
    Attributes:
        name: What the card calls the model, such as its hub id (default: the folder's name).
        base_model: The hub id of what it was made from (default: as plan.json has it).
        license: Its licence (default: that of the base model's card, where it is known).
        uniform: A model folder of stock uniform quantization of the same bytes, with records.
        force: Replace whatever file is there; else only a card that nobody changed.
    """

    name: str | None = None
    base_model: str | None = None
    license: str | None = None
    uniform: Path | None = None
    force: bool = False

    @classmethod
    def parse(cls, **fields: Unpack[CardFields]) -> CardOptions:
        """Check the options as a user gives them; UsageError names the fix."""
        given: dict[str, Any] = dict(fields)
        if (uniform := given.pop("uniform", None)) is not None:
            uniform = Path(uniform).expanduser()
        options = cls(**given, uniform=uniform)
        if options.base_model is not None and not is_repo_id(options.base_model):
            raise UsageError(
                f"--base-model {options.base_model} is not a hub id like organisation/model"
            )
        return options
