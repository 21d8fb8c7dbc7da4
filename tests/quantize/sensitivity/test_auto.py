"""`auto`: what it estimates, what it measures, where it stops, and that it goes on exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optiq.errors import UsageError
from optiq.formats import DENSE, Format, parse_menu
from optiq.models.places import place_at
from optiq.models.roles import Module, Role, fixed_bytes
from optiq.planning.contested import contests
from optiq.planning.scores import ModelInfo, Scores
from optiq.planning.size import UNIFORM4_SIZE, Size
from optiq.quantize.sensitivity import checkpoint, job, rounds
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


@pytest.mark.parametrize("name", ["llama tied", "llama untied", "qwen3_moe"])
def test_scores_are_those_of_the_method_they_name(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "EXACT_SHARE", 1.0)
    source = tiny_source(tmp_path, name)
    options: dict[str, Any] = {"menu": MENU, "calibration": TEXT, "progress": False}
    found = measure(source, size="5bpw", **options)
    by_method = {
        method: {(path, fmt): score for _, path, fmt, score in entries(each)}
        for method in ("kl", "fisher")
        for each in [measure(source, method=method, **options)]
    }
    methods = set()
    for role, path, fmt, score in entries(found):
        assert score == by_method[score["method"]][path, fmt]
        assert score["method"] == "kl" or role not in ("expert", "router", "head")
        methods.add(score["method"])
    assert methods == {"kl", "fisher"}
    assert (found["auto"]["contested"], found["auto"]["gain_left"]) == (0, 0)
    assert contests(Scores.from_json(found), Size.parse("5bpw")) == []
    measured = {
        path
        for role, path, _, score in entries(found)
        if score["method"] == "kl" and role not in ("expert", "router", "head")
    }
    assert found["auto"]["modules"] == len(measured) > 0
    assert 0 < found["auto"]["share"] < 1


def test_the_work_is_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(tmp_path, "llama tied")
    shares, gains = [], []
    for cap in (0.0, 0.05, 1.0):
        monkeypatch.setattr(rounds, "EXACT_SHARE", cap)
        found = measure(source, menu=MENU, calibration=TEXT, size="5bpw", progress=False)
        assert found["auto"]["share"] <= cap
        left = contests(Scores.from_json(found), Size.parse("5bpw"))
        assert found["auto"]["contested"] == len(left)
        assert found["auto"]["gain_left"] == pytest.approx(
            sum(contest.gain for contest in left), rel=1e-12
        )
        shares.append(found["auto"]["share"])
        gains.append(found["auto"]["gain_left"])
    assert shares[0] == 0 < shares[1] < shares[2]
    assert gains[0] > gains[1] > gains[2] == 0


def test_a_size_without_a_plan_leaves_the_estimates(tmp_path: Path) -> None:
    source = tiny_source(tmp_path, "llama tied")
    found = measure(source, menu=[Format("affine", 8, 64)], calibration=TEXT, progress=False)
    assert found["auto"]["contested"] is None
    assert found["auto"]["modules"] == 0
    with pytest.raises(UsageError, match="size 'small' is not understood"):
        measure(source, menu=MENU, calibration=TEXT, size="small", progress=False)


def test_it_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BATCH_TOKENS", 24)  # three batches
    monkeypatch.setattr(rounds, "EXACT_SHARE", 0.3)
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
        return measure(source, menu=MENU, calibration=TEXT, size="5bpw", progress=False,
                       checkpoint=kept, resume=resume)  # fmt: skip

    whole = run(False)
    total = saves
    assert total > 9  # fisher on three batches, experts in two blocks of each, and a contest
    for stop in (2, 5, total - 1):
        saves, limit = 0, stop
        with pytest.raises(KeyboardInterrupt):
            run(False)
        again = run(True)
        assert saves == total  # nothing was done twice
        assert (again["modules"], again["auto"]) == (whole["modules"], whole["auto"])


def test_another_size_goes_on_from_the_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "EXACT_SHARE", 0.3)
    source, kept = tiny_source(tmp_path, "llama tied"), tmp_path / "c.json"

    def run(size: str, **options: Any) -> Any:
        found = measure(source, menu=MENU, calibration=TEXT, size=size, progress=False, **options)
        return found["modules"], found["auto"]

    first, second = run("5bpw", checkpoint=kept), run("6bpw")
    assert first != second
    with monkeypatch.context() as patch:
        patch.setitem(rounds._METHODS, "fisher", lambda job: None)  # what is kept is enough
        assert run("6bpw", checkpoint=kept, resume=True) == second
        assert run("5bpw", checkpoint=kept, resume=True) == first


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts and routers exactly, against naive runs; the rest as if all were estimated."""
    monkeypatch.setattr(rounds, "EXACT_SHARE", 0.0)
    texts = cases.sequences(12, 15)
    work = cases.job(randomized(lambda: construct(name)), texts, G32)
    found = Rounds(work)
    fixed = fixed_bytes(work.model, work.modules)
    empty = replace(UNSCORED, model=ModelInfo(name, "", name, "float32", 4, fixed))
    measure_auto(found, empty, UNIFORM4_SIZE)
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
