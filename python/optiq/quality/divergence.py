"""How far candidates are from a reference model, measured on text neither was fitted to.

KL is KL(reference || candidate) of the next-token distribution over the full vocabulary, in nats,
at every position of every sequence but the last. Sequences are independent documents, so the
standard error of a mean over tokens is clustered by sequence. The perplexity ratio is
exp(mean of log p_reference(next) - log p_candidate(next)); above 1 the candidate is worse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..base.progress import Progress
from ..calibration import Sample, token_hash
from ..errors import OptiqError
from ..ops import metal
from .results import Distribution, Divergence, Mean
from .statistics import mean_per_token, quantiles

# Bytes of float32 logits of one model at a time; longer sequences run in chunks with a cache.
LOGITS_BYTES = 128 << 20

Table = list[NDArray[np.float64]]  # per sequence [columns, tokens]


def measure(
    reference: nn.Module,
    candidates: Mapping[str, nn.Module],
    sequences: Sequence[Sample],
    *,
    progress: bool = True,
) -> dict[str, Divergence]:
    """How far each candidate is from the reference."""
    digest = token_hash(sequences)
    found = tables(reference, candidates, sequences, progress=progress)
    return {name: summary(table, digest) for name, table in found.items()}


def tables(
    reference: nn.Module,
    candidates: Mapping[str, nn.Module],
    sequences: Sequence[Sample],
    *,
    progress: bool = False,
) -> dict[str, Table]:
    """`columns` of each sequence."""
    found: dict[str, Table] = {name: [] for name in candidates}
    total = sum(len(s.tokens) for s in sequences)
    with Progress(total, "checking", enabled=progress) as bar:
        for sample in sequences:
            for name, column in columns(reference, candidates, sample.tokens).items():
                found[name].append(column)
            bar.step(len(sample.tokens))
    return found


def check_tokens(
    reference: Any, candidates: Mapping[str, Any], sequences: Sequence[Sample]
) -> None:
    """Raise OptiqError unless the tokenizers agree on what the tokens of `sequences` stand for."""
    used = sorted({token for sample in sequences for token in sample.tokens})
    expected = reference.convert_ids_to_tokens(used)
    for name, tokenizer in candidates.items():
        for token, a, b in zip(used, expected, tokenizer.convert_ids_to_tokens(used), strict=True):
            if a != b:
                raise OptiqError(
                    f"token {token} is {a!r} to the reference and {b!r} to {name}; "
                    "compare models that share a tokenizer"
                )


def summary(table: Table, text_sha256: str | None = None) -> Divergence:
    """The figures of a table: per sequence the rows KL, agreement (0 or 1) and log-likelihood lost.

    `text_sha256` is of the token stream, see `calibration.token_hash`.
    """
    kl = np.concatenate([columns[0] for columns in table])
    lost = np.concatenate([columns[2] for columns in table])
    mean = clustered([columns[0] for columns in table])
    return Divergence(
        kl=Distribution(mean.mean, mean.se, *quantiles(kl)),
        top1=clustered([columns[1] for columns in table]),
        ppl_ratio=exp(float(lost.mean())),
        tokens=len(kl),
        sequences=len(table),
        text_sha256=text_sha256,
    )


def clustered(values: Sequence[NDArray[np.float64]]) -> Mean:
    """Mean over all tokens, and its standard error with sequences as clusters."""
    return Mean(*mean_per_token([float(v.sum()) for v in values], [len(v) for v in values]))


@metal.restarts
def columns(
    reference: nn.Module, candidates: Mapping[str, nn.Module], tokens: list[int]
) -> dict[str, NDArray[np.float64]]:
    """Per candidate [3, T - 1]: KL, agreement and log-likelihood lost, for each next token.

    Raises OptiqError for vocabularies of two sizes and for logits that are not finite.
    """
    from mlx_lm.models.cache import make_prompt_cache

    models = {"": reference, **candidates}
    caches = {name: make_prompt_cache(model) for name, model in models.items()}
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in candidates}
    start, rows = 0, 1  # one row first: the vocabulary is not known before
    while start < len(tokens) - 1:
        stop = min(start + rows, len(tokens) - 1)
        ids, following = mx.array([tokens[start:stop]]), mx.array(tokens[start + 1 : stop + 1])
        p = _logits(reference, ids, caches[""])
        for name, model in candidates.items():
            q = _logits(model, ids, caches[name])
            if q.shape != p.shape:
                raise OptiqError(
                    f"{name} has {q.shape[-1]} logits and the reference {p.shape[-1]}; "
                    "compare models that share a tokenizer"
                )
            found[name].append(compare_rows(name, p, q, following))
        rows = max(1, LOGITS_BYTES // (4 * p.shape[-1]))
        start = stop
    return {name: np.concatenate(parts, axis=1) for name, parts in found.items()}


def _logits(model: nn.Module, ids: mx.array, cache: list[Any]) -> mx.array:
    logits: mx.array = model(ids, cache=cache)[0]
    mx.eval(logits)
    return logits


def compare_rows(name: str, p: mx.array, q: mx.array, following: mx.array) -> NDArray[np.float64]:
    """[3, n] of n rows of logits: KL, agreement and log-likelihood lost, float64.

    Raises OptiqError, calling the candidate `name`, where a logit is not finite.
    """
    both = ops.compare_logits(p, q)
    at = following[:, None]
    log_p = mx.take_along_axis(p, at, axis=-1)[:, 0].astype(mx.float32) - both.lse_p
    log_q = mx.take_along_axis(q, at, axis=-1)[:, 0].astype(mx.float32) - both.lse_q
    rows = mx.stack([both.kl, both.agree.astype(mx.float32), log_p - log_q])
    columns = np.array(rows, dtype=np.float64)
    if not np.isfinite(columns).all():
        raise OptiqError(
            f"the reference or {name} gives NaN or infinite logits; check each with optiq generate"
        )
    return columns
