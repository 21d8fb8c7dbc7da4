"""Launch plans are right before any kernel runs: limits, tile choices, overrides."""

from __future__ import annotations

from itertools import product

import pytest

from optiq.ops import native

from .launcher import plan_quantized_matmul

ONE = [(64, (64, 4))]


@pytest.mark.parametrize("gpu", ["applegpu_g13g", "applegpu_g16s", "applegpu_g14d", "unknown"])
def test_launches_keep_to_metals_limits(gpu: str) -> None:
    for rows, x, k_lanes in product(range(1, 40), ("float16", "float32"), (4, 8, 16, 32)):
        for results in (1, 4):
            tune = f"k_lanes={k_lanes},results={results},results_wide={results},stage_from=1"
            plan = plan_quantized_matmul(rows, 1024, ONE, x, x, gpu=gpu, tune=tune)
            launch = plan["launches"][0]
            for each in plan["launches"]:
                assert 32 <= each["threads"][0] <= 1024
                assert all(n >= 1 for n in each["threadgroups"])
            if launch["source"] == "qmv.metal" and launch["instantiation"].endswith("true>"):
                assert compiled_rows(launch) * k_lanes * 9 * 16 <= 32768


def compiled_rows(launch: dict[str, str]) -> int:
    return int(launch["instantiation"].split(", ")[3])


def test_tiles_of_mixed_weights_are_not_padded() -> None:
    """One grid of as many tiles as the weights have, none of them for nothing."""
    weights = [(4096, (64, 4)), (1024, (64, 8)), (1000, (32, 6))]
    (launch,) = plan_quantized_matmul(1, 4096, weights, gpu="applegpu_g13g")["launches"]
    alone = 0
    for weight in weights:
        (single,) = plan_quantized_matmul(1, 4096, [weight], gpu="applegpu_g13g")["launches"]
        alone += single["threadgroups"][0]
    assert launch["threadgroups"] == (alone, 1, 1)


def test_qmm_takes_over_where_the_tuning_says() -> None:
    for rows, expected in ((16, "qmv.metal"), (17, "qmm.metal")):
        assert plan_quantized_matmul(rows, 64, ONE)["launches"][0]["source"] == expected
    sources = [plan_quantized_matmul(m, 64, ONE, tune="qmm_from=9") for m in (8, 9)]
    assert [p["launches"][0]["source"] for p in sources] == ["qmv.metal", "qmm.metal"]


@pytest.mark.parametrize(("gpu", "enough"), [("g13g", 32), ("g15s", 80), ("g14d", 160)])
def test_a_small_weight_fills_the_gpu(gpu: str, enough: int) -> None:
    """Where it has columns enough: a threadgroup adds up at least 256 of them."""
    shapes = product((17, 32, 64, 128, 512), ((64, 576), (192, 576), (576, 1536), (1024, 4096)))
    for rows, (out, inner) in shapes:
        plan = plan_quantized_matmul(rows, inner, [(out, (64, 4))], gpu=f"applegpu_{gpu}")
        across, down, _ = plan["launches"][0]["threadgroups"]
        tiles = -(-out // 32)
        assert across * down >= enough or across >= tiles * (inner // 256)
        assert len(plan["launches"]) == 1 + len(plan["temporaries"])
        if plan["temporaries"]:
            assert tiles * down < enough  # else nothing is split
            assert plan["temporaries"] == [4 * rows * out * across // tiles]
    (launch,) = plan_quantized_matmul(17, 4096, ONE, tune="narrow_from=0")["launches"]
    assert launch["instantiation"].endswith("false>")


def test_the_environment_overrides_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIQ_TUNE", "results=2,simdgroups=4")
    (launch,) = plan_quantized_matmul(1, 64, ONE, gpu="applegpu_g13g")["launches"]
    assert launch["instantiation"] == "qmv<half, half, 16, 1, 2, 8, 4, false>"


@pytest.mark.parametrize(
    "tune", ["results", "results=3", "results=x", "result=4", "results=4,", "=", "results=4;x=1"]
)
def test_a_wrong_override_names_what_is_right(tune: str) -> None:
    if tune == "results=4,":
        plan_quantized_matmul(1, 64, ONE, tune=tune)  # a trailing comma is no harm
        return
    with pytest.raises(ValueError, match=r"OPTIQ_TUNE: .* results=1\|2\|4\|8"):
        plan_quantized_matmul(1, 64, ONE, tune=tune)


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_to_compute_is_no_launch(rows: int) -> None:
    weights = [(0, (64, 4))] if rows else ONE
    assert plan_quantized_matmul(rows, 64, weights)["launches"] == []


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((1, 64, []), "no weight"),
        ((1, 64, [(8, (64, 7))]), "bits is 7"),
        ((1, 64, [(8, (48, 4))]), "group_size is 48"),
        ((1, 96, [(8, (64, 4))]), "no multiple of 64"),
        ((1, 64, [*ONE, *ONE], "float16", "float16", False), "several weights"),
        ((1, 64, [*ONE, *ONE], "float16", "float16", True, 4), "several weights"),
        ((1, 64, ONE, "int8"), "dtype is 'int8'"),
    ],
)
def test_what_no_kernel_does_is_an_error(arguments: tuple[object, ...], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        plan_quantized_matmul(*arguments)


def test_a_kernel_that_takes_fewer_threads_is_named() -> None:
    assert native.extension is not None, native.reason
    native.extension.require_threads("qmv_half", 896, 896)
    with pytest.raises(RuntimeError, match=r"qmv_half asks for 1024 threads .* allows it 896"):
        native.extension.require_threads("qmv_half", 1024, 896)


def test_a_temporary_beyond_an_array_is_an_error() -> None:
    assert native.extension is not None, native.reason
    assert native.extension.array_size(2**31 - 1) == 2**31 - 1
    for size in (2**31, 2**32 + 5):
        with pytest.raises(RuntimeError, match=f"a temporary of {size} bytes"):
            native.extension.array_size(size)
