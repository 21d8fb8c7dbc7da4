"""Metrics against float64 NumPy on the logits of a plain forward pass."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model
from numpy.typing import NDArray

from optiq.calibration import Sample, token_hash
from optiq.errors import OptiqError
from optiq.nn.accelerate import accelerate
from optiq.quality import divergence
from optiq.quality.divergence import check_tokens, clustered, measure, summary
from optiq.quality.results import Mean
from optiq.sources import load, resolve
from tests.tiny import KINDS, tiny_folder


def sequences() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample("prose", [1, *rng.integers(4, 380, n - 1).tolist()], i + 1)
        for i, n in enumerate((40, 9, 2, 23))
    ]


def pair(tmp_path: Path, kind: str = "llama") -> tuple[nn.Module, nn.Module]:
    """A model, and the same in 3 bits."""
    folder = tiny_folder(tmp_path, kind)
    reference, candidate = load_model(folder)[0], load_model(folder)[0]
    nn.quantize(candidate, 64, 3)
    return reference, candidate


def by_hand(reference: nn.Module, candidate: nn.Module) -> list[NDArray[np.float64]]:
    """Per sequence: KL, agreement and log-likelihood lost, [3, tokens - 1], in float64."""
    columns = []
    for sample in sequences():
        ids = mx.array([sample.tokens])
        p, q = (log_softmax(np.array(m(ids)[0, :-1])) for m in (reference, candidate))
        following = np.array(sample.tokens[1:])[:, None]
        lost = np.take_along_axis(p - q, following, axis=1)[:, 0]
        agree = p.argmax(-1) == q.argmax(-1)
        columns.append(np.stack([(np.exp(p) * (p - q)).sum(-1), agree, lost]))
    return columns


def log_softmax(x: NDArray[Any]) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def clustered_by_hand(values: list[NDArray[np.float64]]) -> tuple[float, float]:
    """Mean per token and the error of a ratio of sums over sequences."""
    total, tokens = sum(v.sum() for v in values), sum(len(v) for v in values)
    mean, s = total / tokens, len(values)
    squares = sum((v.sum() - mean * len(v)) ** 2 for v in values)
    return mean, math.sqrt(s / (s - 1) * squares) / tokens


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_equal_float64_numpy(tmp_path: Path, kind: str) -> None:
    reference, candidate = pair(tmp_path, kind)
    accelerate(reference)
    accelerate(candidate)
    expected = by_hand(reference, candidate)
    got = measure(reference, {"q3": candidate}, sequences())["q3"]

    kl = np.concatenate([c[0] for c in expected])
    close = {"rel": 1e-4, "abs": 1e-6}
    mean, se = clustered_by_hand([c[0] for c in expected])
    tail = [np.quantile(kl, q) for q in (0.5, 0.95, 0.99, 0.999, 1)]
    assert list(asdict(got.kl).values()) == pytest.approx([mean, se, *tail], **close)
    top1 = clustered_by_hand([c[1] for c in expected])
    assert (got.top1.mean, got.top1.se) == pytest.approx(top1, rel=1e-9)
    lost = np.concatenate([c[2] for c in expected])
    assert got.ppl_ratio == pytest.approx(math.exp(lost.mean()), rel=1e-5)
    assert (got.tokens, got.sequences) == (39 + 8 + 1 + 22, 4)
    assert got.text_sha256 == token_hash(sequences())
    assert mean > 0.01  # 3 bits do hurt


def test_a_model_against_itself(tmp_path: Path) -> None:
    model, _ = pair(tmp_path)
    got = measure(model, {"itself": model, "again": model}, sequences())
    for found in got.values():
        assert found.kl.mean == pytest.approx(0, abs=1e-7)
        assert found.kl.max == pytest.approx(0, abs=1e-6)
        assert found.top1 == Mean(1.0, 0.0)
        assert found.ppl_ratio == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences_in_chunks_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Also over the edge of a sliding window, 8 tokens in gemma3_text."""
    reference, candidate = pair(tmp_path, kind)
    whole = measure(reference, {"q3": candidate}, sequences())["q3"]
    for rows in (1, 5, 16):
        monkeypatch.setattr(divergence, "LOGITS_BYTES", 4 * 384 * rows)
        parts = measure(reference, {"q3": candidate}, sequences())["q3"]
        for key in ("kl", "top1"):
            same = pytest.approx(asdict(getattr(whole, key)), rel=1e-4, abs=1e-6)
            assert asdict(getattr(parts, key)) == same
        assert parts.ppl_ratio == pytest.approx(whole.ppl_ratio, rel=1e-5)


def test_the_error_is_clustered_by_sequence() -> None:
    rng = np.random.default_rng(1)
    values = [rng.normal(rng.normal(), 0.1, n) for n in (5, 50, 17)]
    found = clustered(values)
    assert (found.mean, found.se) == pytest.approx(clustered_by_hand(values), rel=1e-9)
    naive = np.concatenate(values).std() / math.sqrt(72)
    assert clustered_by_hand(values)[1] > 2 * naive
    assert clustered(values[:1]) == Mean(pytest.approx(values[0].mean()), None)
    one = summary([np.stack([abs(values[1]), np.ones(50), values[1]])])
    assert one.kl.se is None
    assert one.top1 == Mean(1.0, None)


def test_models_with_other_vocabularies_are_refused(tmp_path: Path) -> None:
    reference, _ = pair(tmp_path)
    other = load_model(tiny_folder(tmp_path, name="other", vocab_size=400))[0]
    with pytest.raises(OptiqError, match="other has 400 logits and the reference 384") as error:
        measure(reference, {"other": other}, sequences())
    assert "\n" not in str(error.value)


def test_models_with_other_tokens_are_refused(tmp_path: Path) -> None:
    a, b = (load(resolve(str(tiny_folder(tmp_path, name=n)))).tokenizer for n in "ab")
    check_tokens(a, {"b": b}, sequences())
    file = tmp_path / "b" / "tokenizer.json"
    used = sequences()[0].tokens[1]
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    one, two = a.convert_ids_to_tokens([used, 383])
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(data))
    changed = load(resolve(str(tmp_path / "b"))).tokenizer
    with pytest.raises(OptiqError, match=rf"token {used} is .* to b; compare models that share"):
        check_tokens(a, {"b": changed}, sequences())


def test_a_model_that_overflows_is_an_error_and_not_a_nan(tmp_path: Path) -> None:
    reference, candidate = pair(tmp_path)
    candidate.model.norm.weight = candidate.model.norm.weight * math.inf
    with pytest.raises(OptiqError, match="the reference or q3 gives NaN or infinite logits"):
        measure(reference, {"q3": candidate}, sequences())
