"""Tiny models, token sequences and jobs; and scores computed naively, as an independent truth."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.utils import load_model

from optiq.calibration import Calibration, Sample, token_hash
from optiq.distributed.ranks import ALONE, World
from optiq.formats import DENSE, Format, parse_menu
from optiq.models.roles import Module, allowed, quantizable
from optiq.nn.accelerate import accelerate
from optiq.quality.statistics import mean_per_token
from optiq.quantize.options import Options
from optiq.quantize.rounding.reference import Bf16
from optiq.quantize.rounding.weights import MINMAX, Rounding
from optiq.quantize.sensitivity import measure as measuring
from optiq.quantize.sensitivity.checkpoint import Checkpoint
from optiq.quantize.sensitivity.job import Job
from optiq.sources import LoadedModel, Source, load, resolve
from tests.tiny import tiny_folder

MENU = parse_menu(["3g64", "4g64", "8g64", "8g32", "bf16"])
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {"num_hidden_layers": 3}),
    "llama untied": ("llama", {"num_hidden_layers": 3, "tie_word_embeddings": False}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma3_text": ("gemma3_text", {}),
}


def tiny_source(parent: Path, name: str, **config: Any) -> Source:
    kind, fixed = MODELS[name]
    return resolve(str(tiny_folder(parent, kind, name=name.replace(" ", "_"), **fixed, **config)))


def sequences(*lengths: int, seed: int = 0, vocab: int = 384) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, vocab) for _ in range(n)] for n in lengths]


def calibration(*lengths: int, seed: int = 0) -> Calibration:
    samples = [Sample("prose", s, i) for i, s in enumerate(sequences(*lengths, seed=seed))]
    return Calibration(samples, token_hash(samples), {"prose": sum(lengths)})


def job(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    menu: Sequence[Format] = MENU,
    only: Sequence[str] | None = None,
    seed: int = 0,
) -> Job:
    """Score `model` (accelerated in place) against itself; `only` some paths."""
    modules = quantizable(model)
    accelerate(model, blocks=False)
    formats = {
        m.path: allowed(m, menu) if only is None or m.path in only else (DENSE,) for m in modules
    }
    checkpoint = Checkpoint(None, {}, resume=False)
    reference = Bf16(model, modules)
    return Job(model, modules, formats, texts, reference, checkpoint, MINMAX, seed, False)


def measure(
    source: Source,
    *,
    menu: Sequence[Format] = MENU,
    calibration: Calibration,
    loaded: LoadedModel | None = None,
    method: str = "auto",
    rounding: Rounding = MINMAX,
    checkpoint: Path | None = None,
    world: World = ALONE,
    **options: Any,
) -> dict[str, Any]:
    """A whole measurement, as sensitivity.json has it."""
    chosen = Options.parse(formats=menu, sensitivity=method, **options)
    found = measuring.measure(
        loaded or load(source),
        calibration,
        chosen,
        rounding=rounding,
        checkpoint=checkpoint,
        world=world,
    )
    return found.to_json()


def scores(job: Job) -> dict[tuple[str, str], float]:
    """Mean scores by (path, format)."""
    lengths = [len(tokens) for tokens in job.sequences]
    return {
        (path, fmt): mean_per_token(totals, lengths)[0]
        for path, formats in job.collect().items()
        for fmt, totals in formats.items()
    }


def randomized(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A constructed model, the same each time, with all parameters random and float32."""
    mx.random.seed(seed)
    model = build()
    key = mx.random.key(seed)

    def draw(old: mx.array) -> mx.array:
        nonlocal key
        if not mx.issubdtype(old.dtype, mx.floating):
            return old
        key, use = mx.random.split(key)
        noise = mx.random.normal(old.shape, key=use)
        return 0.8 * noise * old.shape[-1] ** -0.5 if old.ndim > 1 else old + 0.1 * noise

    model.update(tree_map(draw, model.parameters()))
    return model


def log_probabilities(model: nn.Module, tokens: Sequence[int]) -> np.ndarray:
    """[T, vocabulary] float64, of one full forward pass of the model as it is."""
    logits = model(mx.array([list(tokens)]))[0].astype(mx.float32)
    x = np.array(logits, dtype=np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def mean_kl(reference: nn.Module, candidate: nn.Module, texts: Sequence[Sequence[int]]) -> float:
    total = 0.0
    for tokens in texts:
        p, q = log_probabilities(reference, tokens), log_probabilities(candidate, tokens)
        total += float((np.exp(p) * (p - q)).sum())
    return total / sum(len(tokens) for tokens in texts)


def stock_quantized(source: Source, formats: dict[str, Format]) -> nn.Module:
    """The model as stock mlx-lm loads it, with stock quantized layers at the paths of `formats`."""
    model, _ = load_model(source.path)
    for path, fmt in formats.items():
        if fmt != DENSE:
            layers = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
            options = {"group_size": fmt.group_size, "bits": fmt.bits, "mode": fmt.mode}
            layer = layers[path].to_quantized(**options)
            model.update_modules(tree_unflatten([(path, layer)]))
    return model


def by_path(model: nn.Module) -> dict[str, Module]:
    return {m.path: m for m in quantizable(model)}
