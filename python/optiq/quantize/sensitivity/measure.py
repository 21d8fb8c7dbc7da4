"""How much each format of each weight hurts: the divergence of the model's output, measured.

kl.py measures it exactly, one module and format at a time; fisher.py estimates it for all from one
backward pass. Both run in replay.py and render weights exactly as they would be shipped; rounds.py
combines them, and divides the work between ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ...base.machine import machine, versions
from ...base.memory import available_memory
from ...base.progress import Progress
from ...calibration import Calibration
from ...distributed.ranks import ALONE, World
from ...errors import UsageError
from ...formats import Format
from ...models.roles import Module, allowed, fixed_bytes, quantizable
from ...planning.scores import KIND, SCHEMA, describe_module
from ...planning.scores import read as load
from ...planning.size import parse_size
from ...sources import LoadedModel, Source
from ...sources.shards import header_bound
from ..rounding.weights import MINMAX, Rounding
from .checkpoint import Checkpoint, saved_reference
from .job import Job
from .memory import estimate
from .reference import choose, common, open_reference, weight_bytes
from .rounds import Rounds, measure_auto, smooth
from .store import save

__all__ = ["describe_model", "load", "measure", "save"]

_METHODS = ("auto", "kl", "fisher")


def measure(
    source: Source,
    *,
    menu: Sequence[Format],
    calibration: Calibration,
    loaded: LoadedModel | None = None,
    calibration_source: str = "optiq.jsonl",
    method: str = "auto",
    size: str = "uniform4",
    reference: str = "auto",
    rounding: Rounding = MINMAX,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    world: World = ALONE,
) -> dict[str, Any]:
    """Score every quantizable module of `source` in every format its shape and role allow.

    `loaded` is the model of `source` if it is loaded already. It is used up: its layers become
    native ones, and with the reference "uniform4" its weights 4-bit. `method` is "kl", "fisher" or
    "auto": fisher, but kl for experts, routers and what the plan at `size` hangs on (rounds.py).
    `reference` is "bf16", "uniform4" or "auto" (by memory, or as in the checkpoint that is
    resumed). Progress goes to `checkpoint`, from where `resume` goes on to the very same numbers;
    the file is left there when all is done. `seed` is at least 0 and below 2**32. The ranks of
    `world` share the work, and each returns the same.

    Returns the content of sensitivity.json. Raises UsageError for a wrong option, SourceError for
    a weight that is not finite, DistributedError for ranks of different jobs, and
    SensitivityError for a score that is not finite or a checkpoint of another measurement.
    """
    from ...nn.accelerate import accelerate
    from ...sources import load as load_model

    if not 0 <= seed < 2**32:
        raise UsageError(f"the seed {seed} is not between 0 and {2**32 - 1}; choose one that is")
    if method not in _METHODS:
        raise UsageError(f"unknown sensitivity method {method!r}; use {', '.join(_METHODS)}")
    parse_size(size, params=1, uniform4=1)
    started = time.monotonic()
    loaded = loaded or load_model(source)
    model = loaded.model
    modules = quantizable(model)
    described = describe_model(source, loaded, modules)
    # The memory that is free now may say otherwise than before the stop.
    kept = saved_reference(checkpoint) if resume and checkpoint and reference == "auto" else None
    nbytes = weight_bytes(model)
    offer = (kept, "as in the checkpoint") if kept else choose(reference, nbytes)
    chosen, why = common(world.gather(offer))
    progress = progress and world.rank == 0
    say = Progress(0, "", enabled=progress).say
    shared = f", shared by {world.size} ranks" if world.size > 1 else ""
    say(f"reference {chosen}: {why}; method {method}{shared}")
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
    world.same({**identity, "size": size})
    state = Checkpoint(checkpoint, identity, resume=resume, rank=world.rank)
    for theirs in world.gather(state.rounds):
        state.add(theirs)
    accelerate(model, blocks=False)  # layers are swapped, tapped and differentiated
    job = Job(
        model=model,
        modules=modules,
        formats={m.path: allowed(m, menu) for m in modules},
        sequences=[sample.tokens for sample in calibration.sequences],
        reference=open_reference(chosen, source, model, modules, rounding),
        checkpoint=state,
        rounding=rounding,
        seed=seed,
        progress=progress,
        world=world,
    )
    estimated = [m for m in modules if method == "fisher" or (method == "auto" and smooth(m))]
    needs = estimate(job, nbytes, described["itemsize"], estimated)
    say(
        f"memory: at most {sum(needs.values()) / 1e9:.2f} GB to measure ("
        + ", ".join(f"{part} {nbytes / 1e9:.2f}" for part, nbytes in needs.items())
        + f"); {available_memory() / 1e9:.1f} GB are available"
    )
    mx.reset_peak_memory()
    rounds = Rounds(job)

    def scores(**more: Any) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "model": described,
            "method": method,
            **more,
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
            "memory": {"stated": sum(needs.values()), "peak": mx.get_peak_memory()},
            "modules": [
                {
                    **describe_module(m),
                    "scores": {
                        str(fmt): rounds.scores[m.path][str(fmt)] for fmt in job.formats[m.path]
                    },
                }
                for m in modules
            ],
        }

    if method == "auto":
        return scores(auto=measure_auto(rounds, scores, size))
    rounds.run(method, job.formats)
    return scores()


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
