"""How far whole configurations are from full-precision caches, decoding real contexts.

Every token's keys and values are quantized as they are written and read back by all that follow:
nothing here is estimated. The first half of a context is read in chunks, as a prompt is; at the
second, decoded in steps that see as many exact tokens as single ones do (see `measure.chunk`),
KL(full precision || configured) is measured. Contexts are clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from ...base.progress import Progress
from ...calibration import Sample, token_hash
from ...distributed.ranks import ALONE, World
from ...kv.config import KVConfig
from ...kv.model import make_cache
from ...ops import metal
from ...quality.divergence import LOGITS_BYTES, Table, compare_rows, summary
from ...quality.results import Divergence
from .decoding import CHUNK, states
from .measure import chunk


def measure_configs(
    model: nn.Module,
    configs: Mapping[str, KVConfig],
    contexts: Sequence[Sample],
    *,
    progress: bool = True,
    world: World = ALONE,
) -> dict[str, Divergence]:
    """The divergence of `model` with each configuration from itself in full precision.

    The ranks of `world` divide the contexts.
    """
    own = world.share([len(sample.tokens) for sample in contexts])
    found: dict[int, dict[str, list[list[float]]]] = {}
    with Progress(len(own) * (len(configs) + 1), "checking", enabled=progress) as bar:
        for i in own:
            columns = decode(model, configs, contexts[i].tokens)
            found[i] = {name: of.tolist() for name, of in columns.items()}
            bar.step(len(configs) + 1)
    of_all = world.join(found)
    tables: dict[str, Table] = {name: [np.array(of[name]) for of in of_all] for name in configs}
    digest = token_hash(contexts)
    return {name: summary(table, digest) for name, table in tables.items()}


@metal.restarts
def decode(
    model: nn.Module, configs: Mapping[str, KVConfig], tokens: list[int]
) -> dict[str, NDArray[np.float64]]:
    """Per configuration [3, T - T // 2 - 1]: `compare_rows` of the second half."""
    caches = {name: make_cache(model, config) for name, config in configs.items()}
    caches = {"": make_prompt_cache(model), **caches}
    half, end = len(tokens) // 2, len(tokens) - 1
    step = rows = min(chunk(config) for config in configs.values())
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in configs}
    start = 0
    while start < end:
        stop = min(start + CHUNK, half) if start < half else min(start + rows, end)
        ids, following = mx.array([tokens[start:stop]]), mx.array(tokens[start + 1 : stop + 1])
        p = None
        for name, cache in caches.items():
            logits = model(ids, cache=cache)[0]  # of the first half never computed
            mx.eval(states(cache))
            if start >= half:
                p = logits if p is None else p
                if name:
                    found[name].append(compare_rows(name, p, logits, following))
        rows = min(step, max(1, LOGITS_BYTES // (4 * logits.shape[-1])))
        start = stop
    return {name: np.concatenate(parts, axis=1) for name, parts in found.items()}
