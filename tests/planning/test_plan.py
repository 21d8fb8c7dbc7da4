"""Plans: sizes, exact bytes, floors, and re-planning from files alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from optiq.errors import BudgetError, SensitivityError, UsageError
from optiq.formats import DEFAULT_MENU, DENSE, UNIFORM4, Format, parse_menu
from optiq.models.roles import Module, Role, floor
from optiq.planning.plan import Plan, uniform_plan
from optiq.planning.scores import ModelInfo
from optiq.planning.size import Size
from tests.scored import PROVENANCE, build

FIXED = 13_824


def row(path: str, role: Role, shape: tuple[int, ...], rng: Any, block: int | None = None) -> Any:
    spread = rng.lognormal(0, 1.5)
    scores = {
        str(f): {"kl": 0.0 if f == DENSE else spread * 4.0**-f.bits, "se": 0.0}
        for f in DEFAULT_MENU
        if f.fits(shape)
    }
    at = {"path": path, "role": role.value, "unit": path, "block": block, "shape": list(shape)}
    return {**at, "scores": scores}


def scores_of(blocks: int = 4, hidden: int = 128, inner: int = 384, *, moe: bool = False) -> Any:
    rng = np.random.default_rng(0)
    rows = [row("model.embed_tokens", Role.EMBEDDING, (512, hidden), rng)]
    for i in range(blocks):
        at = f"model.layers.{i}"
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows.append(row(f"{at}.self_attn.{leaf}", Role.ATTENTION, (hidden, hidden), rng, i))
        if moe:
            rows.append(row(f"{at}.mlp.gate", Role.ROUTER, (8, hidden), rng, i))
        rows.append(row(f"{at}.mlp.up_proj", Role.MLP, (inner, hidden), rng, i))
        rows.append(row(f"{at}.mlp.down_proj", Role.MLP, (hidden, inner), rng, i))
    rows.append(row("lm_head", Role.HEAD, (512, hidden), rng))
    model = {
        "name": "m",
        "fingerprint": "f",
        "model_type": "llama",
        "dtype": "bfloat16",
        "itemsize": 2,
        "fixed_bytes": FIXED,
    }
    return {**PROVENANCE, "model": model, "modules": rows}


def stock_bytes(data: Any, bits: int = 4, group: int = 64) -> int:
    """Codes, and a bf16 scale and bias per group, of a uniform model, counted by hand."""
    total = FIXED
    for module in data["modules"]:
        n = math.prod(module["shape"])
        fits = module["shape"][-1] % group == 0
        total += n * bits // 8 + n // group * 4 if fits else 2 * n
    return total


def test_uniform4_is_the_bytes_of_stock_and_is_met_within_a_percent() -> None:
    data = scores_of()
    plan = build(data)
    assert plan.uniform4
    assert plan.budget == stock_bytes(data) == plan.uniform4.nbytes
    assert 0.99 * plan.budget <= plan.nbytes <= plan.budget
    assert plan.gap == 0.0
    at4 = sum(m["scores"]["4g64"]["kl"] for m in data["modules"])
    assert plan.predicted_kl is not None
    assert plan.predicted_kl < at4
    params = FIXED // 2 + sum(math.prod(m["shape"]) for m in data["modules"])
    assert plan.bpw == pytest.approx(8 * plan.nbytes / params, rel=1e-15)
    for module, got in zip(data["modules"], plan.modules, strict=True):
        assert got.module.path == module["path"]
        assert got.kl == module["scores"][str(got.format)]["kl"]
        assert got.nbytes == got.format.nbytes(module["shape"], 2)


@pytest.mark.parametrize("size", ["3.7bpw", "4.8bpw", "6bpw", "0.4MB", "390KiB", "400000"])
def test_no_plan_is_above_its_budget(size: str) -> None:
    plan = build(scores_of(), size)
    assert plan.asked == size
    assert 0.98 * plan.budget <= plan.nbytes <= plan.budget


def test_a_generous_budget_keeps_everything_dense() -> None:
    plan = build(scores_of(), "1GB")
    assert {m.format for m in plan.modules} == {DENSE}
    assert plan.predicted_kl == 0.0


@pytest.mark.parametrize("size", ["uniform4", "3.9bpw", "8bpw"])
def test_floors_are_constraints(size: str) -> None:
    plan = build(scores_of(moe=True), size)
    for planned in plan.modules:
        assert planned.format.bits >= floor(planned.module.role)
    routers = [m for m in plan.modules if m.module.role is Role.ROUTER]
    assert len(routers) == 4
    assert all(m.format.bits >= 8 for m in routers)


def test_a_menu_limits_the_formats_but_not_what_fits_nothing() -> None:
    data = scores_of()
    odd = row("model.layers.0.odd", Role.OTHER, (16, 72), np.random.default_rng(1), 0)
    data["modules"].append(odd)
    assert odd["scores"] == {"bf16": {"kl": 0.0, "se": 0.0}}
    plan = build(data, "6bpw", parse_menu("4,8"))
    formats = {m.module.path: m.format for m in plan.modules}
    assert formats.pop("model.layers.0.odd") == DENSE
    assert {f.bits for f in formats.values()} == {4, 8}


def test_budget_below_the_smallest_plan_names_both_sizes() -> None:
    data = scores_of()
    least = stock_bytes(data, 4, 128)
    with pytest.raises(BudgetError, match=f"{least - 1:,} bytes .* {least:,} bytes"):
        build(data, str(least - 1), parse_menu("4g128,8g64,bf16"))
    assert build(data, str(least), parse_menu("4g128,8g64,bf16")).nbytes == least


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("uniform4", 777), ("4.8bpw", 600), ("4.801 bpw", 600), ("6.1GB", 6_100_000_000),
        ("75mb", 75_000_000), ("1.5KiB", 1536), ("2MiB", 2 * 2**20), ("0.1GiB", 107374182),
        ("123", 123), ("1_000", 1000), ("123B", 123),
    ],
)  # fmt: skip
def test_sizes(text: str, nbytes: int) -> None:
    assert Size.parse(text).budget(params=1000, uniform4=777) == nbytes


def test_a_size_in_bytes_is_one_of_files() -> None:
    """The header of the weight files comes off sizes in bytes, not off bits per weight."""
    assert Size.parse("5000").budget(params=1000, uniform4=777, beside=600) == 4400
    assert Size.parse("5kB").budget(params=1000, uniform4=777, beside=600) == 4400
    assert Size.parse("500B").budget(params=1000, uniform4=777, beside=600) == 0
    assert Size.parse("8bpw").budget(params=1000, uniform4=777, beside=600) == 1000
    assert Size.parse("uniform4").budget(params=1000, uniform4=777, beside=600) == 777


@pytest.mark.parametrize("text", ["", "4.8", "4.8bit", "-5GB", "1e9", "uniform8", "GB", "4..8bpw"])
def test_sizes_that_are_not_understood(text: str) -> None:
    with pytest.raises(UsageError, match=r"write (uniform4, 4\.8bpw|\S+ for bits per)"):
        Size.parse(text).budget(params=1000, uniform4=777)


def test_json_round_trip() -> None:
    plan = build(scores_of(moe=True), "5bpw", command="optiq plan", seed=3)
    data = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(data) == plan
    assert Plan.from_json(data).to_json() == data
    assert set(data) == {
        "schema", "kind", "model", "budget", "nbytes", "bpw", "objective", "measured", "modules",
        "selection", "calibration", "seed", "command", "versions", "machine", "uniform4",
    }  # fmt: skip
    assert data["budget"]["asked"] == "5bpw"
    assert (data["seed"], data["calibration"]["tokens"], data["machine"]) == (3, 1000, {"cpu": "x"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(kind="other"),
        lambda d: d.update(schema=2),
        lambda d: d.pop("budget"),
        lambda d: d.update(nbytes=d["nbytes"] + 1),
        lambda d: d["modules"][0].update(format="3g64"),
        lambda d: d["modules"][0].update(role="boss"),
    ],
)
def test_a_damaged_plan_is_refused(damage: Any) -> None:
    data = build(scores_of()).to_json()
    damage(data)
    with pytest.raises(UsageError, match="make it"):
        Plan.from_json(data)


def test_quantization_dict_lists_every_module() -> None:
    plan = build(scores_of(moe=True), "uniform4")
    config = plan.quantization()
    assert (config["group_size"], config["bits"], config["mode"]) == (64, 4, "affine")
    for m in plan.modules:
        entry = config[m.module.path]
        if m.format == DENSE:
            assert entry is False
        else:
            expected = (m.format.bits, m.format.group_size, "affine")
            assert (entry["bits"], entry["group_size"], entry["mode"]) == expected
    assert len(config) == 3 + len(plan.modules)


def test_uniform_plan_leaves_what_does_not_fit_dense() -> None:
    modules = [
        Module("a", Role.MLP, "a", (64, 128), 0),
        Module("b", Role.ROUTER, "b", (8, 72), 0),
    ]
    plan = uniform_plan(ModelInfo("m", None, None, "float32", 4, 10), modules)
    assert [m.format for m in plan.modules] == [UNIFORM4, DENSE]
    assert plan.nbytes == 10 + (64 * 128 // 2 + 2 * 4 * 128) + 8 * 72 * 4 == plan.budget
    assert plan.predicted_kl is None


def test_a_format_that_was_not_measured_is_asked_for() -> None:
    with pytest.raises(SensitivityError, match=r"no score for 2g64; measure again"):
        build(scores_of(), "uniform4", [Format("affine", 2, 64), DENSE])


def test_dense_costs_nothing_where_it_was_not_in_the_menu() -> None:
    data = scores_of()
    for module in data["modules"]:
        module["scores"].pop("bf16")
    for data["reference"] in ("bf16", "uniform4"):
        assert build(data, "1GB", [UNIFORM4, DENSE]).predicted_kl == 0.0


def test_a_large_file_is_planned_in_a_second() -> None:
    data = scores_of(blocks=84, hidden=2048, inner=6144)
    assert len(data["modules"]) == 506
    start = time.perf_counter()
    plan = build(json.loads(json.dumps(data)), "4.8bpw")
    json.dumps(plan.to_json())
    assert time.perf_counter() - start < 1
    assert plan.gap == 0.0


def test_planning_needs_no_mlx() -> None:
    names = ", ".join(f"optiq.planning.{name}" for name in ("files", "proposals", "prediction"))
    code = f"import {names}, sys; print([m for m in sys.modules if m.startswith('mlx')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
