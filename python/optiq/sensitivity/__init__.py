"""How much each format of each weight hurts: the divergence of the model's output, measured.

kl.py measures it exactly, one module and format at a time; fisher.py estimates it for all from one
backward pass. Both run in replay.py and render weights exactly as they would be shipped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..calibration import Calibration
from ..errors import UsageError
from ..formats import DENSE, Format
from ..machine import machine, versions
from ..progress import Progress
from ..roles import Module, Role, allowed, fixed_bytes, quantizable
from ..rounding import MINMAX, Rounding
from ..scores import KIND, SCHEMA, describe_module
from ..scores import read as load
from ..shards import header_bound
from ..sources import LoadedModel, Source
from .checkpoint import Checkpoint, saved_reference
from .fisher import score_by_fisher
from .job import Job
from .kl import score_by_kl
from .reference import Bf16, Reference, Uniform4, choose, weight_bytes
from .store import save

__all__ = ["describe_model", "load", "measure", "save"]

_METHODS = {"kl": score_by_kl, "fisher": score_by_fisher}


def measure(
    source: Source,
    *,
    menu: Sequence[Format],
    calibration: Calibration,
    loaded: LoadedModel | None = None,
    calibration_source: str = "optiq.jsonl",
    method: str = "auto",
    reference: str = "auto",
    rounding: Rounding = MINMAX,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Score every quantizable module of `source` in every format its shape and role allow.

    `loaded` is the model of `source` if it is loaded already. It is used up: its layers become
    native ones, and with the reference "uniform4" its weights 4-bit. `method` is "kl", "fisher" or
    "auto" (kl for models with experts, else fisher), `reference` "bf16", "uniform4" or "auto" (by
    memory, or as in the checkpoint that is resumed). Progress goes to `checkpoint`, from where
    `resume` goes on to the very same numbers; the file is left there when all is done. `seed` is
    at least 0 and below 2**32. Returns the content of sensitivity.json. Raises UsageError for a
    wrong option, SourceError for a weight that is not finite, and
    SensitivityError for a score that is not or a checkpoint of another measurement.
    """
    from ..nn import accelerate
    from ..sources import load as load_model

    if not 0 <= seed < 2**32:
        raise UsageError(f"the seed {seed} is not between 0 and {2**32 - 1}; choose one that is")
    started = time.monotonic()
    loaded = loaded or load_model(source)
    model = loaded.model
    modules = quantizable(model)
    described = describe_model(source, loaded, modules)
    method = _choose_method(method, modules)
    # The memory that is free now may say otherwise than before the stop.
    kept = saved_reference(checkpoint) if resume and checkpoint and reference == "auto" else None
    chosen, why = (
        (kept, "as in the checkpoint")
        if kept in ("bf16", "uniform4")
        else choose(reference, weight_bytes(model))
    )
    Progress(0, "", enabled=progress).say(f"reference {chosen}: {why}; method {method}")
    lengths = [len(sample.tokens) for sample in calibration.sequences]
    identity = {
        "model": source.fingerprint,
        "calibration": calibration.sha256,
        "menu": [str(fmt) for fmt in menu],
        "method": method,
        "reference": chosen,
        "rounding": rounding.name,
        "seed": seed,
        "versions": versions(),
    }
    state = Checkpoint(checkpoint, identity, resume=resume)
    accelerate(model, blocks=False)  # layers are swapped, tapped and differentiated
    job = Job(
        model=model,
        modules=modules,
        formats={m.path: allowed(m, menu) for m in modules},
        sequences=[sample.tokens for sample in calibration.sequences],
        reference=_reference(chosen, source, model, modules, rounding),
        checkpoint=state,
        rounding=rounding,
        seed=seed,
        progress=progress,
    )
    state.check(len(job.batches()), _steps(job), partial=method == "kl")
    _METHODS[method](job)
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "model": described,
        "method": method,
        "metric": "nats per token",
        "reference": chosen,
        "rounding": rounding.name,
        "calibration": {
            "source": calibration_source,
            "tokens": sum(lengths),
            "sequences": len(lengths),
            "tokens_per_domain": calibration.tokens_per_domain,
            "sha256": calibration.sha256,
            "seed": seed,
        },
        "machine": machine(),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
        "modules": [
            {
                **describe_module(m),
                "scores": {
                    str(fmt): {"kl": 0.0, "se": 0.0, "mse": 0.0}
                    if fmt == DENSE
                    else state.tally.score(m.path, str(fmt), lengths)
                    | {"mse": state.weight_errors.get(m.path, {}).get(str(fmt))}
                    for fmt in job.formats[m.path]
                },
            }
            for m in modules
        ],
    }


def describe_model(
    source: Source, loaded: LoadedModel, modules: Sequence[Module]
) -> dict[str, Any]:
    """The "model" entry of sensitivity.json; `loaded` as it came from the source."""
    parameters: dict[str, mx.array] = dict(tree_flatten(loaded.model.parameters()))
    shapes = {name: array.shape for name, array in parameters.items()}
    return {
        "name": source.name,
        "fingerprint": source.fingerprint,
        "model_type": loaded.config["model_type"],
        "dtype": str(loaded.dtype).removeprefix("mlx.core."),
        "itemsize": loaded.dtype.size,
        "fixed_bytes": fixed_bytes(loaded.model, modules),
        "header_bytes": header_bound(shapes, {f"{m.path}.weight" for m in modules}),
    }


def _choose_method(method: str, modules: Sequence[Module]) -> str:
    if method not in ("auto", *_METHODS):
        raise UsageError(f"unknown sensitivity method {method!r}; use auto, kl or fisher")
    if method != "auto":
        return method
    routed = any(m.role in (Role.EXPERT, Role.ROUTER) for m in modules)
    return "kl" if routed else "fisher"


def _steps(job: Job) -> list[set[tuple[str, str]]]:
    """The (module path, format name) that each step of a batch scores: a step is a block."""
    return [
        {(m.path, str(fmt)) for m in modules for fmt in job.rounded(m)}
        for _, modules in groupby(job.modules, key=lambda m: m.block)
    ]


def _reference(
    name: str, source: Source, model: nn.Module, modules: Sequence[Module], rounding: Rounding
) -> Reference:
    if name == "bf16":
        return Bf16(model, modules)
    return Uniform4(source, model, modules, rounding)
