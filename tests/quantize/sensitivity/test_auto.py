"""`auto`: what it estimates, what it measures, and that it goes on exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optiq.formats import DENSE, Format, parse_menu
from optiq.models.places import place_at
from optiq.models.roles import Module, Role, fixed_bytes
from optiq.planning.scores import ModelInfo
from optiq.quantize.sensitivity import checkpoint, job
from optiq.quantize.sensitivity.fisher import score_by_fisher
from optiq.quantize.sensitivity.rounds import Rounds, measure_auto
from tests.architectures import construct
from tests.quantize.sensitivity import cases
from tests.quantize.sensitivity.cases import calibration, mean_kl, measure, randomized, tiny_source
from tests.scored import UNSCORED

TEXT = calibration(14, 23, 9)
MENU = parse_menu(["3g64", "4g64", "5g64", "6g64", "8g64"])
G32 = parse_menu(["4g32", "8g32"])
MIXTURES = ("gpt_oss", "deepseek_v3", "qwen3_next", "gemma4_text")


def entries(scores: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(role, path, format, score) of all that is scored."""
    for row in scores["modules"]:
        for fmt, score in row["scores"].items():
            if fmt != str(DENSE):
                yield row["role"], row["path"], fmt, score


@pytest.mark.parametrize("name", ["llama untied", "qwen3_moe"])
def test_scores_are_those_of_the_method_they_name(tmp_path: Path, name: str) -> None:
    source = tiny_source(tmp_path, name)
    options: dict[str, Any] = {"menu": MENU, "calibration": TEXT, "progress": False}
    found = measure(source, **options)
    by_method = {
        method: {(path, fmt): score for _, path, fmt, score in entries(each)}
        for method in ("kl", "fisher")
        for each in [measure(source, method=method, **options)]
    }
    for role, path, fmt, score in entries(found):
        assert score == by_method[score["method"]][path, fmt]
        assert (score["method"] == "kl") == (role in ("expert", "router", "head"))


def test_it_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BATCH_TOKENS", 24)  # three batches
    source, kept = tiny_source(tmp_path, "qwen3_moe"), tmp_path / "c.json"
    limit = 10**6
    saves = 0
    save = checkpoint.Checkpoint.save

    def stopping(self: checkpoint.Checkpoint) -> None:
        nonlocal saves
        save(self)
        saves += 1
        if saves == limit:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "save", stopping)

    def run(resume: bool) -> dict[str, Any]:
        return measure(
            source, menu=MENU, calibration=TEXT, progress=False, checkpoint=kept, resume=resume
        )

    whole = run(False)
    total = saves
    assert total == 9  # fisher on three batches, experts in two blocks of each
    for stop in (2, 5, total - 1):
        saves, limit = 0, stop
        with pytest.raises(KeyboardInterrupt):
            run(False)
        again = run(True)
        assert saves == total  # nothing was done twice
        assert again["modules"] == whole["modules"]


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts(name: str) -> None:
    """Experts and routers exactly, against naive runs; the rest as if all were estimated."""
    texts = cases.sequences(12, 15)
    work = cases.job(randomized(lambda: construct(name)), texts, G32)
    found = Rounds(work)
    fixed = fixed_bytes(work.model, work.modules)
    empty = replace(UNSCORED, model=ModelInfo(name, "", name, "float32", 4, fixed))
    measure_auto(found)
    everything = cases.job(randomized(lambda: construct(name)), texts, G32)
    score_by_fisher(everything)
    estimates = cases.scores(everything)
    stock, changed = (randomized(lambda: construct(name)) for _ in range(2))
    modules: dict[str, Module] = {m.path: m for m in work.modules}
    routed = 0
    for _, path, fmt, score in entries(found.fill(empty).to_json()):
        if modules[path].role in (Role.EXPERT, Role.ROUTER):
            parsed, slot = Format.parse(fmt), place_at(changed, path)
            dense = slot.get()
            with slot.holding(dense.to_quantized(parsed.group_size, parsed.bits)):
                exact = mean_kl(stock, changed, texts)
            assert score["kl"] == pytest.approx(exact, rel=0.02, abs=1e-5), path
            routed += 1
        else:
            assert score["kl"] == pytest.approx(estimates[path, fmt], rel=1e-5), path
    assert routed > 4
