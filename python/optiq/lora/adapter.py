"""An adapter as a value and as a folder.

The folder is an mlx-lm adapter: `adapter_config.json` and `adapters.safetensors`, in which stock
`mlx_lm.load(adapter_path=)` wants one rank for all layers, so smaller ranks are padded with zeros.
Beside them lies `optiq/adapter.json`: the rank of each layer, the base it was made for, and how it
was made. Adapters that mlx-lm wrote are also read; their base is not known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..base.files import write_json
from ..base.tensors import write_tensors
from ..base.text import one_line
from ..errors import AdapterError, ExportError, SourceError
from ..models.roles import Module, Role, role_of
from ..sources.safetensors import data_start, read_header
from .layers import LowRank

WEIGHTS, CONFIG, OURS = "adapters.safetensors", "adapter_config.json", "optiq/adapter.json"
Json = dict[str, Any]
FloatArray = NDArray[np.float32]

_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class Base:
    """The model that an adapter was made for."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Adapter:
    """Low-rank terms by path of the layer; each adds scale * x @ a @ b to the layer's output.

    `blocks` is how many blocks the base has, 0 where that is not known. `made` says how it was
    made, as JSON. With an `invocation` it is an activated one (aLoRA, Greenewald et al. 2025): it
    works from the last place on where the prompt has these tokens, and not before. `magnitudes`
    are those of all its layers if it is of DoRA (Liu et al. 2024): the lengths of the rows of a
    weight with its term, which are scaled to them.
    """

    terms: Mapping[str, LowRank]
    scale: float
    base: Base | None = None
    blocks: int = 0
    made: Json = field(default_factory=dict)
    invocation: tuple[int, ...] = ()
    magnitudes: Mapping[str, mx.array] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        return {path: term.rank for path, term in self.terms.items()}

    @property
    def parameters(self) -> int:
        return sum(array.size for array in self._arrays())

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays())

    def _arrays(self) -> Iterator[mx.array]:
        for term in self.terms.values():
            yield from term
        yield from self.magnitudes.values()

    @cached_property
    def digest(self) -> str:
        """sha256 of all that decides what the adapter computes."""
        found = sha256(np.float64(self.scale).tobytes())
        if self.invocation:
            found.update(np.asarray(self.invocation, "<i8").tobytes())
        for path, pair in sorted(self.exact.items()):
            found.update(path.encode())
            for matrix in pair:
                found.update(str(matrix.shape).encode())
                found.update(np.ascontiguousarray(matrix).data)
        for path, magnitude in sorted(self.magnitudes.items()):
            found.update(path.encode())
            found.update(_float32(magnitude).data)
        return found.hexdigest()

    @cached_property
    def exact(self) -> Mapping[str, tuple[FloatArray, FloatArray]]:
        """The terms in float32, for NumPy. Beside a server's engine that is much faster than MLX:
        each evaluation of MLX gives Python's lock away, and has to wait for it after."""
        mx.eval([*self.terms.values()])
        return {path: (_float32(a), _float32(b)) for path, (a, b) in self.terms.items()}

    def check_everywhere(self, what: str) -> None:
        """Raise AdapterError for an activated adapter: `what` would make another one of it."""
        if self.invocation:
            raise AdapterError(
                f"{what} does not go with an activated adapter (aLoRA), which works on a part of "
                "the text; mount the folder of PEFT on a server"
            )

    def check_added(self, what: str) -> None:
        """Raise AdapterError for an adapter of DoRA: `what` needs one that only adds a term."""
        if self.magnitudes:
            raise AdapterError(
                f"{what} does not go with DoRA, which scales the output of layers; write a model "
                "with the adapter in its weights by optiq lora merge"
            )

    def check_in_blocks(self, what: str) -> None:
        """Raise AdapterError for an adapter of an embedding or a head: `what` has no room there."""
        if found := next(
            (p for p in self.terms if role_of(p) in (Role.EMBEDDING, Role.HEAD)), None
        ):
            raise AdapterError(
                f"{what} adds terms inside blocks only, and the adapter changes {found}; write a "
                "model with the adapter in its weights by optiq lora merge"
            )

    def check_finite(self) -> None:
        for path, pair in self.exact.items():
            more = [_float32(self.magnitudes[path])] if self.magnitudes else []
            if not all(np.isfinite(matrix).all() for matrix in (*pair, *more)):
                raise AdapterError(f"the adapter of {path} has numbers that are not finite")


def _float32(matrix: mx.array) -> FloatArray:
    if matrix.dtype not in (mx.float32, mx.float16):  # NumPy has no bfloat16
        matrix = matrix.astype(mx.float32)
    return np.asarray(matrix).astype(np.float32, copy=False)


def check_fits(adapter: Adapter, modules: Sequence[Module], base: Base | None = None) -> None:
    """Raise AdapterError unless the adapter belongs to `base` and fits its layers, `modules`."""
    if base is not None and adapter.base and adapter.base.fingerprint != base.fingerprint:
        raise AdapterError(
            f"the adapter was made for {adapter.base.name} ({adapter.base.fingerprint[:12]}), not "
            f"for {base.name} ({base.fingerprint[:12]}); use it with its own base"
        )
    known = {m.path: m for m in modules}
    for path, term in adapter.terms.items():
        module = known.get(path)
        if module is None:
            raise AdapterError(
                f"the adapter changes {path}, which is not a linear layer in a block of this "
                "model; use it with its own base"
            )
        if module.tied:
            raise AdapterError(
                f"the adapter changes {path}, which is the embedding and the head of this model; "
                "PEFT adds to one of the two, mlx-lm to both. Train it with linear layers only"
            )
        if module.role is Role.EXPERT:
            raise AdapterError(f"the adapter changes the experts of {path}; that is not supported")
        wanted = module.shape[1], module.shape[0]
        if module.role is Role.EMBEDDING:
            if adapter.magnitudes:
                raise AdapterError(f"the adapter changes {path} by DoRA; that is not supported")
            wanted = module.shape[0], module.shape[1]
        if (term.a.shape[0], term.b.shape[1]) != wanted or term.a.shape[1] != term.b.shape[0]:
            raise AdapterError(
                f"the adapter of {path} is {term.a.shape} and {term.b.shape}, but the layer takes "
                f"{wanted[0]} and gives {wanted[1]}; use it with its own base"
            )


def write(adapter: Adapter, out: Path) -> None:
    """Write the folder, each file whole or not at all, and read it back. Raises ExportError, and
    AdapterError for what mlx-lm does not know."""
    adapter.check_everywhere("mlx-lm's format")
    most = max(adapter.ranks.values())
    tensors = {f"{path}.m": magnitude for path, magnitude in adapter.magnitudes.items()}
    for path, (a, b) in adapter.terms.items():
        wider = most - a.shape[1]
        tensors[f"{path}.lora_a"] = mx.pad(a, [(0, 0), (0, wider)])
        tensors[f"{path}.lora_b"] = mx.pad(b, [(0, wider), (0, 0)])
    config = {
        "fine_tune_type": "dora" if adapter.magnitudes else "lora",
        "num_layers": adapter.blocks,
        "lora_parameters": {
            "rank": most,
            "scale": adapter.scale,
            "dropout": 0.0,
            "keys": sorted(adapter.terms),
        },
        **({"model": adapter.base.name} if adapter.base else {}),
    }
    ours = {
        "schema": 1,
        "kind": "optiq.adapter",
        "base": vars(adapter.base) if adapter.base else None,
        "blocks": adapter.blocks,
        "scale": adapter.scale,
        "ranks": adapter.ranks,
        "sha256": adapter.digest,
        "made": adapter.made,
    }
    write_tensors(out / WEIGHTS, tensors, {"format": "mlx"})
    write_json(out / OURS, ours)
    write_json(out / CONFIG, config)
    if read(out).digest != adapter.digest:
        raise ExportError(f"{out} does not read back as it was written; write it again")


def read(path: Path) -> Adapter:
    """The adapter in a folder of ours or of mlx-lm. Raises AdapterError."""
    path = path.expanduser()
    config = read_config(path)
    if "peft_type" in config and "lora_parameters" not in config:
        raise AdapterError(f"{path} is PEFT's; optiq lora export --to mlx converts it")
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{path} is of type {kind!r}; lora and dora are supported")
    try:
        scale = float(config["lora_parameters"]["scale"])
        blocks = int(config.get("num_layers", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{path / CONFIG} has no lora_parameters with a scale") from error
    tensors = read_tensors(path / WEIGHTS)
    magnitudes = {}
    if kind == "dora":
        magnitudes = {n[: -len(".m")]: tensors.pop(n) for n in list(tensors) if n.endswith(".m")}
    terms = {}
    for name in sorted(tensors):
        layer, _, leaf = name.rpartition(".")
        if leaf not in ("lora_a", "lora_b"):
            raise AdapterError(f"{path / WEIGHTS} holds {name}; only lora_a and lora_b are known")
        if not {f"{layer}.lora_a", f"{layer}.lora_b"} <= tensors.keys():
            raise AdapterError(f"{path / WEIGHTS} has only one half of {layer}")
        pair = tensors[f"{layer}.lora_a"], tensors[f"{layer}.lora_b"]
        if pair[0].ndim != 2 or pair[1].ndim != 2 or pair[0].shape[1] != pair[1].shape[0]:
            raise AdapterError(
                f"{layer} has {pair[0].shape} and {pair[1].shape} in {path / WEIGHTS}; two "
                "matrices of one rank are supported"
            )
        terms[layer] = LowRank(*pair)
    if not terms:
        raise AdapterError(f"{path / WEIGHTS} holds no layers")
    found = Adapter(
        terms, scale, magnitudes=of_all(path / WEIGHTS, magnitudes, terms, kind == "dora")
    )
    if (path / OURS).exists():
        found = _with_ours(path, replace(found, blocks=blocks), read_json(path / OURS))
    found.check_finite()
    return found


def of_all(
    file: Path, magnitudes: Mapping[str, mx.array], terms: Mapping[str, LowRank], dora: bool
) -> Mapping[str, mx.array]:
    """The magnitudes, if all layers of DoRA and no others have them. Raises AdapterError."""
    for path in {**terms, **magnitudes} if dora else ():
        wanted = (terms[path].b.shape[1],) if path in terms else None
        if path not in magnitudes or magnitudes[path].shape != wanted:
            raise AdapterError(f"the magnitudes of {path} in {file} do not fit its two halves")
    return magnitudes


def _with_ours(path: Path, adapter: Adapter, ours: Json) -> Adapter:
    try:
        ranks = {layer: int(rank) for layer, rank in ours["ranks"].items()}
        cut = {
            layer: LowRank(term.a[:, :rank], term.b[:rank])
            if (rank := ranks[layer]) != term.rank
            else term
            for layer, term in adapter.terms.items()
        }
        base = Base(**ours["base"]) if ours["base"] else None
        adapter = replace(adapter, terms=cut, base=base, made=ours["made"])
        recorded = ours["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"{path / OURS} is damaged ({error!r}); delete it to use the folder as mlx-lm does"
        ) from error
    if adapter.digest != recorded:
        raise AdapterError(
            f"{path / WEIGHTS} is not the file that {path / OURS} describes; restore it, or delete "
            f"{OURS} to use the folder as mlx-lm does"
        )
    return adapter


def read_config(folder: Path) -> Json:
    """The adapter_config.json of a folder of any kind. Raises AdapterError."""
    if not folder.is_dir():
        raise AdapterError(f"{folder} is not a folder; give the folder of an adapter")
    if not (folder / CONFIG).exists():
        raise AdapterError(
            f"{folder} has no {CONFIG}; give a folder that optiq lora train, mlx-lm or PEFT wrote"
        )
    return read_json(folder / CONFIG)


def read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(
            f"{path} cannot be read ({reason}); copy the folder of the adapter again"
        ) from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} is not a JSON object")
    return value


def read_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a file, read at once: beside an engine that is faster than `mx.load`."""
    try:
        infos = read_header(path)
        data = np.fromfile(path, np.uint8, offset=data_start(path, infos.values()))
    except (OSError, SourceError) as error:
        raise AdapterError(f"{path} cannot be read ({one_line(error)})") from error
    found = {}
    for name, info in infos.items():
        if info.dtype not in _DTYPES:
            raise AdapterError(
                f"{path} holds {name} as {info.dtype}; {', '.join(_DTYPES)} are supported"
            )
        part = data[info.begin : info.end].view(_DTYPES[info.dtype]).reshape(info.shape)
        array = mx.array(part)
        found[name] = array.view(mx.bfloat16) if info.dtype == "BF16" else array
    return found
