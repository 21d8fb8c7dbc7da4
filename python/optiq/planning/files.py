"""Files of scores, optiq's or mlx-optiq's sensitivity.json, and plans from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.command import command_line
from ..base.text import cause
from ..errors import SensitivityError, UsageError
from ..formats import DENSE, Format, parse_menu
from ..models.roles import Module, allowed, block_of, role_of, unit_of
from .plan import Plan, build
from .scores import FIX, ModelInfo, Score, Scored, Scores, TextInfo
from .size import Size


def read_scores(
    path: Path, *, model: ModelInfo | None = None, modules: Sequence[Module] | None = None
) -> Scores:
    """The scores in `path`.

    mlx-optiq's file knows neither shapes nor all modules: with `model` and `modules` of the model
    it is used for, those are taken, else what it lists is taken for the whole model.
    A model folder of optiq's stands for the scores in it. Raises SensitivityError naming the file
    and the fix.
    """
    if path.is_dir():
        folder, path = path, path / "optiq" / "sensitivity.json"
        if not path.is_file():
            raise SensitivityError(f"{folder} has no optiq/sensitivity.json; {FIX}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SensitivityError(
            f"{path} cannot be read as scores ({cause(error)}); {FIX}"
        ) from error
    if not isinstance(data, dict) or "layers" not in data or "kind" in data:
        return Scores.from_json(data, str(path))
    try:
        return _from_peer(data, str(path), model, modules)
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise SensitivityError(
            f"{path} is not understood as mlx-optiq's file ({error!r}); {FIX}"
        ) from error


def plan(
    scores: Scores | str | Path,
    size: str | float = "uniform4",
    formats: str | Sequence[Format] | None = None,
    *,
    seed: int = 0,
) -> Plan:
    """The plan of least predicted KL within `size`, of scores or a file of them.

    `formats` limits the menu; None stands for all that was measured. Raises an OptiqError.
    """
    wanted = Size.parse(size)
    menu = None
    if formats is not None:
        menu = parse_menu(formats if isinstance(formats, str) else map(str, formats))
    if not isinstance(scores, Scores):
        scores = read_scores(Path(scores).expanduser())
    return build(scores, wanted, menu, seed=seed, command=command_line())


def _from_peer(
    data: Mapping[str, Any],
    name: str,
    model: ModelInfo | None,
    modules: Sequence[Module] | None,
) -> Scores:
    """Scores from mlx-optiq's sensitivity.json.

    As there, a module without scores (it never measures embeddings, nor experts against bf16)
    gets the widest measured format, at no cost; such a module is marked `assumed`.
    """
    group = int(data.get("group_size", 64))
    widths = sorted({int(bits) for bits in data["candidate_bits"]})
    formats = {bits: DENSE if bits == 16 else Format("affine", bits, group) for bits in widths}
    layers = {str(layer["layer_name"]): layer for layer in data["layers"]}
    if modules is None:
        modules = [_listed(path, int(row["param_count"]), group) for path, row in layers.items()]
    if model is None:
        model = ModelInfo(data["base_model"], None, None, "bfloat16", itemsize=2, fixed_bytes=0)
    scored = tuple(
        _scored(m, layers[m.path]["sensitivities"] if m.path in layers else None, formats)
        for m in modules
    )
    if all(s.assumed for s in scored):
        raise SensitivityError(
            f"{name} names no layer of {model.name}; give the model it was made for"
        )
    found = Scores(
        model,
        scored,
        method="kl",
        reference="unknown",
        rounding="minmax",
        calibration=TextInfo(name, None, None, None, None, None),
        machine={},
        versions={},
    )
    return Scores.from_json(found.to_json(), name)  # checked


def _listed(path: str, parameters: int, group: int) -> Module:
    """A module of which only the size is known.

    An affine weight's bytes depend on size and group alone: (size / group, group) gives them.
    """
    shape = (parameters // group, group) if parameters % group == 0 else (1, parameters)
    return Module(path, role_of(path), unit_of(path), shape, block_of(path))


def _scored(
    module: Module, sensitivities: Mapping[str, float] | None, formats: Mapping[int, Format]
) -> Scored:
    fits = allowed(module, list(formats.values()))
    if sensitivities is None:
        widest = max((f for f in fits if f != DENSE), key=lambda f: f.bits, default=DENSE)
        return Scored(module, {widest: Score(0.0)}, assumed=True)
    kl = {formats[int(bits)]: float(value) for bits, value in sensitivities.items()}
    measured = sorted(fmt for fmt in kl if fmt != DENSE)
    if measured and kl[measured[-1]] > kl[measured[0]]:
        # Its other mode compares with a 4-bit model, so what more bits repair is what it scores.
        kl |= {fmt: max(0.0, kl[measured[-1]] - kl[fmt]) for fmt in measured}
    scores = {fmt: Score(kl[fmt]) for fmt in sorted(kl) if fmt in fits}
    return Scored(module, scores or {DENSE: Score(0.0)})
