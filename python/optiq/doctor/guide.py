"""The guide to a model: what its makers recommend, what it will take, and the commands to run.

The pages in docs/families are the same guides, without a model of yours.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import KVError, SourceError, UsageError
from ..formats import DENSE, Format
from ..kv.config import KVConfig
from ..kv.model import entries
from ..models.adaptable import adaptable
from ..models.families import FAMILIES, Family, Sampling, family_of
from ..models.roles import Module, Role, quantizable
from ..sources import resolve
from ..sources.building import build_anew
from ..sources.config import holders
from ..sources.folder import read_config

WIDTHS = (16, 8, 6, 5, 4)
CACHES = ("8/8", "8/4")
CONTEXT = 8192
ITEMSIZE = 2  # of bfloat16
WIDTH = 100  # characters of a line


@dataclass(frozen=True)
class Sizes:
    """Computed from a configuration: parameters, bytes of tensors by width, and of the cache.

    `weights` are those of every module that can be quantized in one width, groups of 64. `cache` is
    after `context` tokens: in 16 bits, and with keys and values in few, where that can be done.
    """

    parameters: int
    weights: Mapping[int, int]
    context: int
    cache: Mapping[str, int]
    longest: int | None
    targets: tuple[str, ...]
    experts: bool


@dataclass(frozen=True)
class Guide:
    """A family's guide, for `name`; `own` is what its generation_config.json says of sampling."""

    family: Family
    name: str
    sizes: Sizes | None
    own: Mapping[str, Any]
    departures: tuple[str, ...] = ()

    def __str__(self) -> str:
        *sections, ran = _sections(self)
        lines = "\n\n".join(sections).splitlines()
        folded = (line if line.startswith("|") else _folded(line) for line in lines)
        return "\n".join(folded) + f"\n\n{ran}"


def guide(model: str | Path) -> Guide:
    """The guide that fits `model`: a folder, hub id or .gguf file, or the name of a family.

    No weight is read. Raises UsageError for a model of a family that has none.
    """
    if family := next((f for f in FAMILIES if f.key == str(model)), None):
        example = family.example
        name = example.name if example else "MODEL"
        return Guide(family, name, sizes(dict(example.config)) if example else None, {})
    source = resolve(str(model))
    config = read_config(source.path) | source.settings
    family = family_of(config, FAMILIES)
    if family is None:
        raise UsageError(
            f"optiq has no guide for {config['model_type']}; it has guides for {', '.join(keys())}"
        )
    own = {k: v for k, v in _generation(source.path).items() if k in _SETTINGS}
    return Guide(family, str(model), sizes(config), own, source.departures)


def keys() -> tuple[str, ...]:
    """The names of the families that have a guide."""
    return tuple(family.key for family in FAMILIES)


def sizes(config: dict[str, Any]) -> Sizes:
    """What mlx-lm's model of `config` takes; its weights are not needed. SourceError if there is
    none."""
    model = build_anew(config)
    if model is None:
        raise SourceError(f"mlx-lm makes no model of this {config.get('model_type')} configuration")
    for part in (model, getattr(model, "language_model", None)):
        with contextlib.suppress(Exception):  # whatever a model file raises for no weights
            part.sanitize({})  # type: ignore[union-attr]  # Gemma 3 drops its head only here
    modules = quantizable(model)
    tensors: dict[str, Any] = dict(tree_flatten(model.parameters()))
    everything = sum(array.size for array in tensors.values())
    fixed = ITEMSIZE * (everything - sum(prod(m.shape) for m in modules))
    weights = {bits: fixed + sum(_nbytes(m, bits) for m in modules) for bits in WIDTHS}
    longest = [h.get("max_position_embeddings") for _, h in holders(config)]
    layers = adaptable(model)
    leaves = {m.path.rpartition(".")[2]: None for m in layers if m.role is not Role.EXPERT}
    return Sizes(
        everything, weights, CONTEXT, _cache(model), max(filter(None, longest), default=None),
        tuple(leaves), any(m.role is Role.EXPERT for m in layers),
    )  # fmt: skip


def _nbytes(module: Module, bits: int) -> int:
    fmt = DENSE if bits == 16 else Format("affine", bits, 64)
    return (fmt if fmt.fits(module.shape) else DENSE).nbytes(module.shape, ITEMSIZE)


def _cache(model: nn.Module) -> dict[str, int]:
    found = entries(model)
    sizes = {"16": KVConfig(found).nbytes(CONTEXT)}
    for text in CACHES:
        try:
            sizes[text] = KVConfig.uniform(found, text).nbytes(CONTEXT)
        except KVError:
            continue
    return sizes if sizes["16"] else {}


_SETTINGS = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty")


def _generation(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _sections(guide: Guide) -> Iterator[str]:
    family = guide.family
    yield f"# {family.title}"
    yield "Architectures: " + ", ".join(f"`{kind}`" for kind in family.model_types) + "."
    yield _sampling(guide)
    yield f"**Thinking.** {family.thinking}"
    yield f"**Cache.** {family.cache}"
    if guide.sizes:
        yield _sizes(guide.name, guide.sizes)
    said = [f"- {c.text} ({c.source})" for c in family.caveats]
    said += [f"- mlx-lm runs this model {departure}." for departure in guide.departures]
    yield "\n".join(["**To know before.**", "", *said])
    yield "## Commands\n\n```\n" + "\n".join(commands(guide)) + "\n```"


def _folded(line: str) -> str:
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _sampling(guide: Guide) -> str:
    rows = [f"| {s.use} | {_listed(s.settings())} | {s.source} |" for s in guide.family.sampling]
    table = ["| for | recommended | source |", "| --- | --- | --- |", *rows] if rows else []
    if guide.own:
        text = f"This model's own generation_config.json says {_listed(guide.own)}."
    elif (written := guide.family.written) and guide.family.vocabularies:
        text = (
            "Where generation_config.json has none, an export of the makers' models says "
            f"{_listed(written.settings())}."
        )
    else:
        text = "The model's own card and generation_config.json have what its makers recommend."
    return "\n".join([f"**Sampling.** {text}", *([""] if table else []), *table])


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def _sizes(name: str, sizes: Sizes) -> str:
    longest = f", {sizes.longest:,} tokens of context at most" if sizes.longest else ""
    rows = [f"| {bits} bits | {_gb(nbytes)} |" for bits, nbytes in sizes.weights.items()]
    rows += [
        f"| cache of {sizes.context:,} tokens, {_widths(text)} | {_gb(nbytes)} |"
        for text, nbytes in sizes.cache.items()
    ]
    targets = ", ".join(f"`{leaf}`" for leaf in sizes.targets)
    which = "unless `--targets` says otherwise they change all of them"
    if sizes.experts:
        which = "experts they cannot, so say `--targets attention`"
    billions = f"{sizes.parameters / 1e9:.2f} billion parameters"
    return "\n".join([
        f"**Sizes** of {name}, computed: {billions}{longest}. "
        "To run, a model takes its weights and its cache.",
        "", "| what | size |", "| --- | --- |", *rows, "",
        f"**Adapters** may change {targets}; {which}.",
    ])  # fmt: skip


def _widths(text: str) -> str:
    if text == "16":
        return "16 bits"
    return "keys in {} and values in {} bits".format(*text.split("/"))


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def commands(guide: Guide) -> list[str]:
    """What to run, in order."""
    sampling = guide.family.sampling[0] if guide.family.sampling else None
    experts = guide.sizes.experts if guide.sizes else guide.family.experts
    ask = f'optiq generate out -p "Why is the sky blue?" -m 64{_options(sampling)}'
    return [
        f"optiq convert {shlex.quote(guide.name)} -o out --size 5bpw",
        ask,
        "optiq kv out -o out/kv_config.json",
        f"{ask} --kv out/kv_config.json",
        f"optiq lora train out --data data -o adapter{' --targets attention' if experts else ''}",
        "optiq serve out --kv out/kv_config.json --adapter mine=adapter",
    ]


def _options(sampling: Sampling | None) -> str:
    if sampling is None:
        return ""
    names = {"temperature": "--temp", "top_p": "--top-p", "top_k": "--top-k", "min_p": "--min-p"}
    settings = sampling.settings()
    return "".join(f" {names[key]} {settings[key]:g}" for key in names if key in settings)
