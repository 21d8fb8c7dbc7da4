"""The job of `optiq compare`: divergence and size of models against a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import calibration
from ..base.command import command_line
from ..base.machine import machine, versions
from ..errors import UsageError
from ..models.size import model_size
from ..nn.accelerate import accelerate
from ..sources import load, resolve
from .divergence import check_tokens, measure
from .results import Measured

TOKENS = 4096


@dataclass(frozen=True)
class Comparison:
    """What was measured of each model against `reference`, on `text`."""

    reference: str
    text: str
    models: Mapping[str, Measured]
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    *models: str | Path,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Measure `models` against `reference` (None: the first of them).

    A model is a folder, a hub id or a .gguf file, quantized or not. `text` is a file of rows to
    measure on, in place of the bundled mix's held-out ones; `tokens` of them are drawn by `seed`.
    Raises UsageError for fewer than two models, OptiqError for models with other tokenizers.
    """
    names = list(map(str, models))
    first = str(reference) if reference is not None else names.pop(0)
    if not names:
        raise UsageError("one model alone cannot be compared; give a second one or --reference")
    if len(set(names)) < len(names):
        raise UsageError("the same model is named twice; name different ones")
    if text is not None:
        rows = calibration.load_rows(text)
    else:
        rows = calibration.split(calibration.load_rows(), "heldout")
    base = load(resolve(first), allow_quantized=True)
    loaded = {name: load(resolve(name), allow_quantized=True) for name in names}
    drawn = calibration.batches(rows, base.tokenizer, tokens=tokens, seed=seed)
    tokenizers = {name: candidate.tokenizer for name, candidate in loaded.items()}
    check_tokens(base.tokenizer, tokenizers, drawn.sequences)
    sizes = {name: model_size(candidate.model) for name, candidate in loaded.items()}
    candidates = {name: candidate.model for name, candidate in loaded.items()}
    for model in (base.model, *candidates.values()):
        accelerate(model, exact=False)
    found = measure(base.model, candidates, drawn.sequences, progress=progress)
    measured = {name: Measured.of(found[name], *sizes[name]) for name in names}
    where = str(text or "optiq.jsonl, held-out rows")
    return Comparison(first, where, measured, command_line(), versions(), machine())
