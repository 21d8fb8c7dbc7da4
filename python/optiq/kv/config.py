"""`kv_config.json`: the formats of keys and values, cache by cache.

An entry belongs to one cache of `make_prompt_cache(model)`, in that order. Which layers read it
is noted beside, as layers may share one and others have none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..base.files import whole
from ..errors import KVError, UsageError
from ..formats import DENSE, NO_KV_FORMAT, Format, is_kv_format

Json = dict[str, Any]

KINDS = ("full", "sliding", "mla", "recurrent")
_WIDTHS = re.compile(r"k?(\d+)(?:g(\d+))?(?:[/v](\d+)(?:g(\d+))?)?")


@dataclass(frozen=True)
class Entry:
    """One cache: what it holds per token and head, and in which formats.

    `kind`: "full" attention; "sliding", the last `window` tokens; "mla", where K is the latent that
    stands for keys and values and V the rotated key beside it; "recurrent" (states, and whatever
    else is not a pair of keys and values), which is left as it is. `layers` are the indices in
    `model.layers` that read it, several where layers share one. A vector has `k_dim` or `v_dim`
    elements, `kv_heads` of each per token; all 0 for a recurrent one. DENSE is left as it is.

    Raises KVError for a format that keys and values do not have, or that does not fit.
    """

    layers: tuple[int, ...]
    kind: str
    k: Format = DENSE
    v: Format = DENSE
    kv_heads: int = 0
    k_dim: int = 0
    v_dim: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise KVError(f"{self.kind!r} is not a kind of cache; use one of {', '.join(KINDS)}")
        for name, fmt, dim in (("K", self.k, self.k_dim), ("V", self.v, self.v_dim)):
            check_format(fmt)
            if fmt == DENSE:
                continue
            if self.kind == "recurrent":
                raise KVError(
                    f"a recurrent state (layers {list(self.layers)}) has no {name} format"
                )
            if dim % 8 or not dim:
                raise KVError(
                    f"{name} of {dim} elements (layers {list(self.layers)}) cannot be quantized; "
                    "use a multiple of 8, or 16 bits"
                )

    @property
    def quantized(self) -> bool:
        return (self.k, self.v) != (DENSE, DENSE)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token; a value left as it is counts as 16 bits, a recurrent state as 0."""
        parts = ((self.k, self.k_dim), (self.v, self.v_dim))
        return self.kv_heads * sum(vector_bytes(fmt, dim) for fmt, dim in parts)

    def nbytes(self, tokens: int) -> int:
        """Bytes of this cache after `tokens` tokens."""
        return self.bytes_per_token * (min(tokens, self.window) if self.window else tokens)

    def to_json(self) -> Json:
        shape = {name: getattr(self, name) for name in ("kv_heads", "k_dim", "v_dim", "window")}
        formats = {"k": _format_json(self.k), "v": _format_json(self.v)}
        size = {"bytes_per_token": self.bytes_per_token}
        return {"layers": list(self.layers), "kind": self.kind, **formats, **shape, **size}

    @classmethod
    def from_json(cls, data: Json) -> Entry:
        return cls(
            layers=tuple(int(i) for i in data["layers"]),
            kind=data["kind"],
            k=_format(data["k"]),
            v=_format(data["v"]),
            **{name: int(data[name]) for name in ("kv_heads", "k_dim", "v_dim", "window")},
        )


@dataclass(frozen=True)
class Identity:
    """What tells a model apart; None is unknown. Fingerprint and tokenizer are sha256."""

    name: str | None = None
    fingerprint: str | None = None
    tokenizer: str | None = None

    def to_json(self) -> Json:
        return {key: value for key, value in vars(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: Json) -> Identity:
        return cls(data.get("name"), data.get("fingerprint"), data.get("tokenizer"))


UNKNOWN = Identity()


@dataclass(frozen=True)
class KVConfig:
    """Formats for all caches of a model, and which vectors are kept exact besides.

    `fp_recent` last and `fp_sink` first tokens of full-attention caches are read in full precision.
    `provenance` says how the formats were chosen and what they cost, in any words of its maker.
    """

    entries: tuple[Entry, ...]
    fp_recent: int = 0
    fp_sink: int = 0
    model: Identity = UNKNOWN
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("fp_recent", "fp_sink"):
            if not 0 <= getattr(self, name) <= 65536:
                raise KVError(f"{name} is {getattr(self, name)}; give 0 to 65536 tokens")

    @classmethod
    def uniform(cls, entries: Sequence[Entry], text: str) -> KVConfig:
        """One pair of formats for all caches that hold keys and values: "8/4", "k8g64v4g32", "8".

        A width without a group has groups of 64 where they divide the vector, else of 32; 16 bits
        are left as they are. Of latents (MLA) the width of K is that of the latent, whose rotated
        key stays as it is.

        Raises UsageError for another text, KVError for a width that keys and values do not have.
        """
        match = _WIDTHS.fullmatch(text.strip().lower())
        if not match:
            raise UsageError(
                f"KV widths {text!r} are not understood; write 8/4 (K/V), k8v4, k8g64v4g32 or 8"
            )
        k_bits, k_group, v_bits, v_group = match.groups()
        if v_bits is None:
            v_bits, v_group = k_bits, k_group

        def chosen(entry: Entry) -> Entry:
            if entry.kind == "recurrent":
                return entry
            v = DENSE if entry.kind == "mla" else _fitting(v_bits, v_group, entry.v_dim)
            return replace(entry, k=_fitting(k_bits, k_group, entry.k_dim), v=v)

        return cls(tuple(map(chosen, entries)))

    @property
    def digest(self) -> str:
        """sha256 of what decides the contents of the caches."""
        facts = [[str(e.k), str(e.v)] for e in self.entries], self.fp_recent, self.fp_sink
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one more token in all full-attention caches."""
        return sum(e.bytes_per_token for e in self.entries if not e.window)

    def nbytes(self, tokens: int) -> int:
        """Bytes of all caches after `tokens` tokens, without recurrent states and exact vectors."""
        return sum(e.nbytes(tokens) for e in self.entries)

    def check(self, entries: Sequence[Entry], model: Identity = UNKNOWN) -> None:
        """Whether this is for a model that has these caches and this identity.

        Raises KVError that names the first difference.
        """
        for key in ("fingerprint", "tokenizer"):
            own, theirs = getattr(self.model, key), getattr(model, key)
            if own and theirs and own != theirs:
                raise KVError(
                    f"this KV configuration was made for another model ({key} {own[:12]}..., here "
                    f"{theirs[:12]}...); make one for this model with optiq kv"
                )
        if len(self.entries) != len(entries):
            raise KVError(
                f"this KV configuration has {len(self.entries)} caches and the model "
                f"{len(entries)}; make one for this model with optiq kv"
            )
        for i, (own_entry, entry) in enumerate(zip(self.entries, entries, strict=True)):
            for name in ("kind", "kv_heads", "k_dim", "v_dim", "window"):
                mine, its = getattr(own_entry, name), getattr(entry, name)
                if mine != its:
                    raise KVError(
                        f"cache {i} has {name} {mine} in this KV configuration and {its} in the "
                        "model; make one for this model with optiq kv"
                    )

    def to_json(self) -> Json:
        return {
            "format": "optiq.kv",
            "version": 1,
            "model": self.model.to_json(),
            "fp_recent": self.fp_recent,
            "fp_sink": self.fp_sink,
            "bytes_per_token": self.bytes_per_token,
            "entries": [{"cache": i, **e.to_json()} for i, e in enumerate(self.entries)],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Any, entries: Sequence[Entry] | None = None) -> KVConfig:
        """Read what `to_json` wrote, or a list of {"layer_idx", "bits", "group_size"}.

        The list has one width for K and V of each cache it names, as mlx-optiq writes it; what else
        is in a configuration then comes from the model's `entries`.

        Raises KVError.
        """
        if isinstance(data, list):
            return cls(_listed(data, entries))
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (
            "optiq.kv",
            1,
        ):
            raise KVError("this is not a KV configuration of this version; make one with optiq kv")
        try:
            if [e["cache"] for e in data["entries"]] != list(range(len(data["entries"]))):
                raise KVError("the entries are not those of caches 0, 1, ... in order")
            return cls(
                entries=tuple(Entry.from_json(e) for e in data["entries"]),
                fp_recent=int(data["fp_recent"]),
                fp_sink=int(data["fp_sink"]),
                model=Identity.from_json(data["model"]),
                provenance=dict(data["provenance"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise KVError(
                f"the KV configuration is incomplete ({error!r}); make it again with optiq kv"
            ) from error

    @classmethod
    def load(cls, path: str | Path, entries: Sequence[Entry] | None = None) -> KVConfig:
        """Read a file; see `from_json`. Raises KVError that names it."""
        if not Path(path).exists():
            raise KVError(
                f"{path} is neither a file nor bits such as 8/4 (keys/values), k8v4 or 8; optiq kv "
                "makes a file"
            )
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise KVError(f"the KV configuration {path} cannot be read: {reason}") from error
        try:
            return cls.from_json(data, entries)
        except KVError as error:
            raise KVError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all."""
        with whole(Path(path)) as (partial,):
            partial.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


def is_widths(text: str) -> bool:
    """Whether `text` is one that `KVConfig.uniform` reads."""
    return _WIDTHS.fullmatch(text.strip().lower()) is not None


def check_format(fmt: Format) -> None:
    """Raise KVError for a format that keys and values do not have."""
    if fmt != DENSE and not is_kv_format(fmt.bits, fmt.group_size):
        raise KVError(NO_KV_FORMAT.format(fmt) + ", or 16 bits")


def group_for(dim: int) -> int:
    """The group size of a width that names none: 64 where it divides the vector, else 32."""
    return 32 if dim % 64 else 64


def vector_bytes(fmt: Format, dim: int) -> int:
    """Bytes of one key or value of `dim` elements; of 2 bytes each where left as it is."""
    if fmt == DENSE:
        return 2 * dim
    from ..ops.attention import record_words  # here: a configuration needs no MLX

    return 4 * record_words(dim, fmt)


def _fitting(bits: str, group: str | None, dim: int) -> Format:
    if int(bits) == 16 and group is None:
        return DENSE
    return _affine(int(bits), int(group or group_for(dim)))


def _affine(bits: int, group: int) -> Format:
    if not is_kv_format(bits, group):
        raise KVError(NO_KV_FORMAT.format(f"{bits}g{group}") + ", or 16 bits")
    return Format("affine", bits, group)


def _format(data: Json) -> Format:
    if data["mode"] == "dense":
        return DENSE
    if data["mode"] != "affine":
        raise KVError(f"keys and values have no mode {data['mode']!r}; use affine or dense")
    return _affine(int(data["bits"]), int(data["group"]))


def _format_json(fmt: Format) -> Json:
    return {"bits": fmt.bits, "group": fmt.group_size, "mode": fmt.mode}


def _listed(rows: list[Any], entries: Sequence[Entry] | None) -> tuple[Entry, ...]:
    if entries is None:
        raise KVError("a list of widths alone says nothing of its model; give the model as well")
    found = list(entries)
    for row in rows:
        try:
            i, bits, group = int(row["layer_idx"]), int(row["bits"]), int(row["group_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise KVError(
                f"{row!r} is no {{layer_idx, bits, group_size}} of a list of KV widths"
            ) from error
        if not 0 <= i < len(found):
            raise KVError(f"the model has no cache {i}, only {len(found)} of them")
        fmt = DENSE if bits == 16 else _affine(bits, group)
        found[i] = replace(found[i], k=fmt, v=DENSE if found[i].kind == "mla" else fmt)
    return tuple(found)
