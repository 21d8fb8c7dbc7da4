"""What there is to choose for: the keys and the values of every cache that can be quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import UsageError
from ...formats import DENSE, NO_KV_FORMAT, Format, is_kv_format
from ...kv.config import Entry, KVConfig, group_for, vector_bytes

MENU = "3,4,5,6,8,bf16"

# Fewest bits: of keys; and unless measured safe, of all in the first and the last cache.
KEYS, ENDS = 4, 8

Width = Format | int  # bits alone have the groups that suit a slot


@dataclass(frozen=True)
class Slot:
    """Keys ("k") or values ("v") of the `cache`-th cache: `heads` vectors of `dim` per token.

    `held` is how many tokens the cache holds after the context that sizes are stated for; `end`
    says whether it is the first or the last cache.
    """

    cache: int
    side: str
    heads: int
    dim: int
    held: int
    end: bool = False

    @property
    def name(self) -> str:
        return f"{self.cache}.{self.side}"

    def nbytes(self, fmt: Format) -> int:
        """Bytes after the context."""
        return self.held * self.heads * vector_bytes(fmt, self.dim)

    def offered(self, menu: Sequence[Width]) -> list[Format]:
        """The menu as this slot may have it, by rising bits: groups of 64 where they divide, or 32.

        Raises UsageError when nothing is wide enough for keys.
        """
        suits = group_for(self.dim)
        formats = {f if isinstance(f, Format) else Format("affine", f, suits) for f in menu}
        found = [f for f in formats if self.side == "v" or f.bits >= KEYS]
        if all(f == DENSE for f in found):
            raise UsageError(f"keys need {KEYS} bits or more; add {KEYS} or 8 to --formats")
        return sorted(found, key=lambda f: (f.bits, -f.group_size))


def slots_of(entries: Sequence[Entry], context: int) -> list[Slot]:
    """The slots of a model's caches. Beside a latent (MLA) the rotated key is left as it is."""
    found = []
    for i, entry in enumerate(entries):
        dims = {"k": entry.k_dim, "v": 0 if entry.kind == "mla" else entry.v_dim}
        held = min(context, entry.window) if entry.window else context
        for side, dim in dims.items():
            if entry.kind != "recurrent" and dim and dim % 8 == 0:
                found.append(Slot(i, side, entry.kv_heads, dim, held))
    caches = {slot.cache for slot in found}
    ends = {min(caches), max(caches)} if caches else set()
    return [replace(slot, end=slot.cache in ends) for slot in found]


def configured(config: KVConfig, formats: Mapping[str, Format]) -> KVConfig:
    """`config` with the formats of slots by name; slots not named are DENSE."""
    entries = tuple(
        replace(e, k=formats.get(f"{i}.k", DENSE), v=formats.get(f"{i}.v", DENSE))
        for i, e in enumerate(config.entries)
    )
    return replace(config, entries=entries)


def parse_menu(text: str) -> tuple[Width, ...]:
    """Read `--formats`: widths, and formats such as 4g32 or bf16 (left as it is)."""
    menu: list[Width] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        fmt = Format.parse(item)
        if fmt != DENSE and not is_kv_format(fmt.bits, fmt.group_size):
            raise UsageError(NO_KV_FORMAT.format(item) + ", as in 4g32, or bf16")
        menu.append(fmt if fmt == DENSE or "g" in item else fmt.bits)
    if all(fmt == DENSE for fmt in menu):
        raise UsageError(f"--formats {text!r} has no width; write for example {MENU}")
    return tuple(dict.fromkeys(menu))
