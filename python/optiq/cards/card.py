"""Write the model card of an exported folder: README.md, whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.files import whole
from ..errors import ExportError, UsageError
from ..sources.beside import SOURCE_CARD
from . import page
from .facts import Facts
from .gather import gather
from .options import CardOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import CardFields


@dataclass(frozen=True)
class Card:
    """A card that was written: where it is, and what it says."""

    path: Path
    facts: Facts


def card(model: str | Path, out: str | Path | None = None, **options: Unpack[CardFields]) -> Card:
    """Write the card of the folder `model` to `out` (default: its README.md).

    The options are those of `CardOptions`. A file that is there is replaced only if it is a card as
    it was written here, or the source's card as `optiq convert` copied it (optiq/source-card.md
    stays), or with `force`.
    """
    asked = CardOptions.parse(**options)
    folder = Path(model).expanduser()
    path = folder / "README.md" if out is None else Path(out).expanduser()
    if not asked.force:
        _check_replaceable(path, folder / SOURCE_CARD)
    facts = gather(folder, asked)
    text = page.render(facts)
    try:
        with whole(path) as (partial,):
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written ({error.strerror}); name another file with -o"
        ) from error
    return Card(path, facts)


def _check_replaceable(path: Path, source_card: Path) -> None:
    """Raise UsageError unless `path` does not exist or is a card that nobody changed."""
    if not path.exists() and not path.is_symlink():
        return
    try:
        said = path.read_bytes()
        copied = source_card.is_file() and said == source_card.read_bytes()
        ours = copied or page.is_unchanged(said.decode())
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise UsageError(
            f"{path} exists and was not written, or was changed since, by optiq card; name another "
            "file with -o, or replace it with --force"
        )
