"""Scores: the law between widths, what is measured of it, and that a run can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from optiq.calibration import Sample
from optiq.errors import CheckpointError, KVError
from optiq.formats import DENSE, Format
from optiq.kv import KVConfig, entries, make_cache
from optiq.quantize.kv import measure as module
from optiq.quantize.kv.measure import Scoring, by_law, chunk, complete, measure_slots, to_measure
from optiq.quantize.kv.slots import Slot, configured, parse_menu, slots_of
from optiq.quantize.sensitivity.checkpoint import Checkpoint
from tests.families.table import family_folder
from tests.tiny import tiny_folder

MENU = parse_menu("3,4,5,6,8,bf16")
KEYS, VALUES = (Slot(0, side, heads=2, dim=64, held=100) for side in "kv")
TAIL = 16


def width(bits: int) -> Format:
    return Format("affine", bits, 64)


def texts(count: int = 2) -> list[Sample]:
    rng = np.random.default_rng(1)
    return [Sample("d", [int(t) for t in rng.integers(4, 384, 64)], i) for i in range(count)]


def run(model: nn.Module, path: Path | None = None, **options: Any) -> Any:
    dense = KVConfig(entries(model), **options)
    slots = slots_of(dense.entries, 64)
    checkpoint = Checkpoint(path, {}, resume=path is not None)
    job = Scoring(model, dense, slots, MENU, texts(), TAIL)
    return measure_slots(job, checkpoint, progress=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load_model(tiny_folder(tmp_path_factory.mktemp("measure")))[0]


def test_the_narrowest_and_a_middle_format_are_measured() -> None:
    assert to_measure(KEYS, MENU, everything=False) == [width(4), width(6)]
    assert to_measure(VALUES, MENU, everything=False) == [width(3), width(5)]
    assert to_measure(VALUES, MENU, everything=True) == [width(b) for b in (3, 4, 5, 6, 8)]
    assert to_measure(VALUES, parse_menu("8,4g32"), everything=False) == [
        Format("affine", 4, 32),
        width(8),
    ]


@pytest.mark.parametrize("exponent", [1.2, 2.0, 3.7])
def test_the_law_is_exact_where_it_holds(exponent: float) -> None:
    true = {width(b): 0.7 * (2**b - 1) ** -exponent for b in (3, 4, 5, 6, 8)}
    known = {f: (true[f], true[f] / 10) for f in (width(3), width(5))}
    for fmt, score in complete(VALUES, MENU, known).items():
        if fmt != DENSE:
            assert score.kl == pytest.approx(true[fmt], rel=1e-9)
            assert score.se == pytest.approx(true[fmt] / 10, rel=1e-9)
            assert score.measured is (fmt in known)


def test_noise_gives_no_wild_law() -> None:
    """Slopes stay within bounds; below the noise a score is small, never negative."""
    steep = by_law(width(8), {width(3): (1.0, None), width(5): (1e-7, None)})
    assert steep.kl == pytest.approx(1e-7 * (31 / 255) ** 4)
    rising = by_law(width(8), {width(3): (1e-3, None), width(5): (2e-3, None)})
    assert rising.kl == pytest.approx(2e-3 * (31 / 255))
    negative = complete(VALUES, MENU, {width(3): (-1e-7, 1e-7), width(5): (-1e-7, 1e-7)})
    assert all(0 <= score.kl <= 1e-8 for score in negative.values())


def test_a_score_is_the_kl_of_the_tail(model: nn.Module) -> None:
    """Against float64 logits of the stock model that decodes off one quantized cache."""
    scores, law = run(model)
    assert law.checked > 0
    dense = KVConfig(entries(model))
    for name, fmt in (("0.k", Format("affine", 4, 32)), ("1.v", Format("affine", 3, 32))):
        index = int(name[0])
        means = []
        for sample in texts():
            p_caches, q_caches = make_prompt_cache(model), make_prompt_cache(model)
            context, tail = sample.tokens[:-TAIL], sample.tokens[-TAIL:]
            for caches in (p_caches, q_caches):
                model(mx.array([context]), cache=caches)
            stock = q_caches[index]
            q_caches[index] = make_cache(model, configured(dense, {name: fmt}))[index]
            q_caches[index].update_and_fetch(*stock.keys_and_values())
            kls = []
            for token in tail:
                p, q = (
                    np.array(model(mx.array([[token]]), cache=c)[0, 0], dtype=np.float64)
                    for c in (p_caches, q_caches)
                )
                p, q = (x - np.logaddexp.reduce(x) for x in (p, q))
                kls.append(np.sum(np.exp(p) * (p - q)))
            means.append(np.mean(kls))
        assert scores[name][fmt].measured
        assert scores[name][fmt].kl == pytest.approx(np.mean(means), rel=1e-3)
        spread = abs(means[0] - means[1]) / 2  # two contexts of one length
        assert scores[name][fmt].se == pytest.approx(spread, rel=1e-2)


def test_caches_that_no_block_is_given_are_refused(tmp_path: Path) -> None:
    looped, _ = load_model(family_folder(tmp_path, "iquestloopcoder"))
    with pytest.raises(KVError, match="iquestloopcoder does not hand its caches to its blocks"):
        run(looped)


def test_it_is_deterministic_and_goes_on_from_what_is_done(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = run(model)
    calls = []
    probe = module._probe

    def stopping(decoder: Any, context: Any, *rest: Any) -> Any:
        calls.append(context)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return probe(decoder, context, *rest)

    path = tmp_path / "checkpoint.json"
    with monkeypatch.context() as patch:
        patch.setattr(module, "_probe", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(model, path)
    calls.clear()
    monkeypatch.setattr(module, "_probe", lambda *a: (calls.append(a[1]), probe(*a))[1])
    assert run(model, path) == once
    assert len(calls) == 2  # of two contexts with two caches, two were done
    path.write_text(path.read_text().replace('"0.k"', '"9.k"'))
    with pytest.raises(CheckpointError, match="damaged"):
        run(model, path)


def test_exact_tokens_lower_the_scores_and_shorten_the_steps(model: nn.Module) -> None:
    plain, _ = run(model)
    exact, _ = run(model, fp_recent=32, fp_sink=4)
    fmt = Format("affine", 4, 32)
    assert exact["0.k"][fmt].kl < plain["0.k"][fmt].kl
    assert [chunk(KVConfig((), fp_recent=n)) for n in (0, 1, 64, 8192)] == [512, 1, 16, 512]
