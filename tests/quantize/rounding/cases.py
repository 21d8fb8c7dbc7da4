"""H and G of tiny models from gradients of the stock model in NumPy, as an independent truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model

from optiq import ops
from optiq.formats import Format
from optiq.models.places import place_at
from optiq.models.roles import Module, Role, is_head, quantizable
from optiq.quantize.rounding.moments import FewMoments, InputMoments, Moments, Rows, few
from optiq.quantize.rounding.weights import Rounded
from optiq.sources import Source
from tests.quantize.sensitivity.cases import log_probabilities

Floats = np.ndarray[Any, np.dtype[np.float64]]
Expected = tuple[Floats, Floats, float]  # as in Moments
Both = tuple[Floats, Floats | None]  # H and G
SEED = 7


class Probe(nn.Module):
    """A layer that keeps its input and output, and adds `delta` to that."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.delta = inner, mx.array(0.0)
        self.input = self.output = mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        self.input, self.output = x, self.inner(x) + self.delta
        return self.output

    def as_linear(self, x: mx.array) -> mx.array:
        return self.inner.as_linear(x)


def labels_of(model: nn.Module, ids: mx.array, key: mx.array) -> mx.array:
    """The labels that a backward pass draws; it runs in single precision, as this does."""
    stored = model.parameters()
    model.set_dtype(mx.float32)
    _, draw = mx.random.split(key)
    labels = ops.categorical(model(ids)[0], draw)
    mx.eval(labels)
    model.update(stored)
    return labels[None]


def brute_force(
    model: nn.Module, modules: Sequence[Module], tokens: Sequence[int], key: mx.array
) -> dict[str, Both]:
    """H and G of each module over one sequence, from gradients at the outputs of stock layers."""
    head = next(m for m in modules if is_head(m))
    paths = [m.path for m in modules if m.role is not Role.HEAD]
    lookups = {m.path for m in modules if m.role is Role.EMBEDDING}
    alone = {m.path for m in modules if m.path.endswith(("gate_proj", "up_proj"))}
    originals = {path: place_at(model, path).get() for path in paths}
    probes = {path: Probe(inner) for path, inner in originals.items()}
    for path, probe in probes.items():
        place_at(model, path).set(probe)
    ids = mx.array([list(tokens)])
    model(ids)  # the probes see what goes in
    inputs = {path: np.array(probe.input, dtype=np.float64)[0] for path, probe in probes.items()}
    labels = labels_of(model, ids, key)

    def likelihood(deltas: dict[str, mx.array]) -> mx.array:
        for path, probe in probes.items():
            probe.delta = deltas[path]
        logits = model(ids).astype(mx.float32)
        return -mx.sum(nn.losses.cross_entropy(logits, labels))

    zeros = {path: mx.zeros(probe.output.shape[-2:]) for path, probe in probes.items()}
    found: dict[str, Both] = {}
    for path, delta in mx.grad(likelihood)(zeros).items():
        g = np.array(delta, dtype=np.float64)
        both = np.einsum("ti,tj->ij", g, g)
        if path in lookups:
            found[path] = both, None
        else:
            weights = np.sqrt(np.square(g).mean(axis=-1))
            h = np.einsum("t,ti,tj->ij", weights, inputs[path], inputs[path])
            found[path] = h, None if path in alone else both
    for path, inner in originals.items():
        place_at(model, path).set(inner)
    looked_up, _ = found.get(head.path, (0, None))
    found[head.path] = looked_up + _head(model, head, tokens), None
    return found


def _head(model: nn.Module, head: Module, tokens: Sequence[int]) -> Floats:
    """The expectation over all labels, each in turn."""
    slot, kept = place_at(model, head.path), []
    layer: Any = slot.get()
    if head.tied:
        layer.as_linear = lambda x: kept.append(x) or type(layer).as_linear(layer, x)
        model(mx.array([list(tokens)]))
        del layer.as_linear
    else:
        slot.set(probe := Probe(layer))
        model(mx.array([list(tokens)]))
        kept.append(probe.input)
        slot.set(layer)
    x = np.array(kept[0][0].astype(mx.float32), dtype=np.float64)
    weights = []
    for p in np.exp(log_probabilities(model, tokens)):
        gradients = np.eye(len(p)) - p  # a row for each label
        weights.append((p * np.square(gradients).sum(axis=-1)).sum())
    return np.einsum("t,ti,tj->ij", weights, x, x)


def brute_moments(
    source: Source,
    texts: Sequence[Sequence[int]],
    judges: Sequence[int],
    running: nn.Module | None = None,
) -> dict[str, tuple[Expected, Expected | None]]:
    """H and G of the sequences that are fitted to, and of those that judge; the former's noise."""
    dense, _ = load_model(source.path)
    model = running or dense
    modules = [m for m in quantizable(dense) if len(m.shape) == 2]
    keys = mx.random.split(mx.random.key(SEED), len(texts))
    each = [brute_force(model, modules, text, keys[t]) for t, text in enumerate(texts)]
    found = {}
    for path, (_, outputs) in each[0].items():
        inputs = expected_moments([of[path][0] for of in each], judges)
        found[path] = (
            inputs,
            None if outputs is None else expected_moments([of[path][1] for of in each], judges),
        )
    return found


def brute_experts(
    source: Source, module: Module, texts: Sequence[Sequence[int]]
) -> tuple[Floats, Floats]:
    """H [texts, experts, in, in] of a stacked layer, and each expert's rows [texts, experts]."""
    model, _ = load_model(source.path)
    experts, _, width = module.shape
    slot = place_at(model, module.path)
    slot.set(probe := ExpertProbe(slot.get()))
    keys = mx.random.split(mx.random.key(SEED), len(texts))
    found, rows = np.zeros((len(texts), experts, width, width)), np.zeros((len(texts), experts))
    for t, text in enumerate(texts):
        ids = mx.array([list(text)])
        probe.delta = mx.array(0.0)
        model(ids)  # the probe sees what goes in
        labels = labels_of(model, ids, keys[t])

        def likelihood(delta: mx.array, ids: mx.array = ids, labels: mx.array = labels) -> mx.array:
            probe.delta = delta
            logits = model(ids).astype(mx.float32)
            return -mx.sum(nn.losses.cross_entropy(logits, labels))

        x, chosen = probe.seen
        x = np.array(mx.broadcast_to(x, (*chosen.shape, 1, width)), dtype=np.float64)
        chosen = np.array(chosen).ravel()
        g = np.array(mx.grad(likelihood)(mx.zeros(probe.shape)), dtype=np.float64)
        weights = np.sqrt(np.square(g.reshape(len(chosen), -1)).mean(axis=-1))
        for e, weight, row in zip(chosen, weights, x.reshape(len(chosen), -1), strict=True):
            found[t, e] += weight * np.outer(row, row)
            rows[t, e] += 1
    return found, rows


class ExpertProbe(nn.Module):
    """The same of a layer of experts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.delta = inner, mx.array(0.0)

    def __call__(self, x: mx.array, chosen: mx.array, **kwargs: Any) -> mx.array:
        self.seen, out = (x, chosen), self.inner(x, chosen, **kwargs)
        self.shape = out.shape
        return out + self.delta


def expected_moments(
    each: Sequence[Floats], judges: Sequence[int], prior: Floats | None = None
) -> Expected:
    """Of the H of each sequence: entry by entry the variance of their sum, in correlations."""
    fitted = [h for t, h in enumerate(each) if t not in judges]
    judging = np.sum([h for t, h in enumerate(each) if t in judges], axis=0)
    fit, added = np.sum(fitted, axis=0), 0 if prior is None else prior
    root = np.sqrt(np.diag(fit + judging + added))
    scale = np.where(root > 0, np.outer(root, root), np.inf)
    variance = len(fitted) * np.var([h / scale for h in each], axis=0, ddof=1)
    fit = fit + added
    target = np.zeros_like(fit)
    if prior is not None:
        target = prior * np.sqrt(np.outer(np.diag(fit), np.diag(fit)))
        target /= np.sqrt(np.outer(np.diag(prior), np.diag(prior)))
    off = ~np.eye(len(fit), dtype=bool)
    observed = np.square((fit - target) / scale)[off].sum()
    share = min(1.0, variance[off].sum() / observed) if observed > 0 else 0.0
    return fit, judging, float(np.sqrt(share))


def check(
    found: tuple[InputMoments, Moments | None],
    expected: tuple[Expected, Expected | None],
    name: str,
    rel: float = 5e-4,
) -> None:
    for of, truth in zip(found, expected, strict=True):
        assert (of is None) == (truth is None), name
        if of is not None and truth is not None:
            check_one(of, truth, name, rel)


def check_one(found: InputMoments, expected: Expected, name: str, rel: float) -> None:
    *hessians, noise = expected
    for h, truth in zip((found.fit, found.judge), hessians, strict=True):
        if isinstance(found, FewMoments) or few(*h.shape):
            h = h.T @ h
        assert h.dtype == mx.float32
        np.testing.assert_allclose(np.array(h), truth, 0, rel * np.abs(truth).max(), err_msg=name)
    assert found.noise.item() == pytest.approx(noise, abs=10 * rel), name


def error(w: mx.array, v: Rounded, fmt: Format, h: mx.array | Floats) -> float:
    """tr((v - w) H (v - w)') in float64."""
    values = mx.dequantize(*v, fmt.group_size, fmt.bits)
    change = np.array(values, dtype=np.float64) - np.array(w, dtype=np.float64)
    return float(np.einsum("oi,ij,oj->", change, np.array(h, dtype=np.float64), change))


def correlated(n: int, tokens: int, count: int, scale: float = 1.0) -> list[Rows]:
    """Inputs of so many sequences whose columns share a few directions of uneven strength."""
    shared = mx.random.normal((n // 8, n), key=mx.random.key(0))
    columns = mx.exp(mx.random.normal((n,), key=mx.random.key(1)))
    keys = mx.random.split(mx.random.key(2), 2 * count)
    rows = []
    for a, b in zip(keys[:count], keys[count:], strict=True):
        x = mx.random.normal((tokens, n // 8), key=a) @ shared
        x = (x + 4 * mx.random.normal((tokens, n), key=b)) * columns * scale
        rows.append((x, mx.ones(tokens)))
    return rows
