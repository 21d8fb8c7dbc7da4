"""The weight errors beside the scores are those of stock quantization, in float64."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model

from optiq.formats import DENSE, UNIFORM4, Format, parse_menu
from optiq.quantize.rounding.render import render_layer
from optiq.quantize.rounding.weights import MINMAX
from optiq.quantize.sensitivity import weight_error
from optiq.quantize.sensitivity.weight_error import relative_error
from tests.quantize.sensitivity.cases import calibration, measure, tiny_source

MENU = parse_menu("3g64,8g32,nvfp4,bf16")


def naive(w: mx.array, fmt: Format) -> float:
    options = {"group_size": fmt.group_size, "bits": fmt.bits, "mode": fmt.mode}
    stored = mx.dequantize(*mx.quantize(w, **options), **options)
    exact, rounded = (np.array(a.astype(mx.float32), dtype=np.float64) for a in (w, stored))
    return float(((rounded - exact) ** 2).sum() / (exact**2).sum())


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama tied", "fisher"), ("llama untied", "fisher"), ("llama untied", "kl"),
     ("qwen3_moe", "kl")],
)  # fmt: skip
def test_of_every_module_and_format(tmp_path: Path, name: str, method: str) -> None:
    source = tiny_source(tmp_path, name)
    found = measure(
        source, menu=MENU, calibration=calibration(14, 23), method=method, progress=False
    )
    stock = dict(load_model(source.path)[0].named_modules())
    unknown = []
    for row in found["modules"]:
        for fmt, score in row["scores"].items():
            if score["mse"] is None:
                unknown.append(row["path"])
            elif fmt != str(DENSE):
                expected = naive(stock[row["path"]].weight, Format.parse(fmt))
                assert score["mse"] == pytest.approx(expected, rel=1e-5), (row["path"], fmt)
    # Of an embedding that is no head, the backward pass rounds only the rows it looks up.
    looked_up = (name, method) == ("llama untied", "fisher")
    assert set(unknown) == ({"model.embed_tokens"} if looked_up else set())


@pytest.mark.parametrize(
    ("elements", "rows"), [(1 << 22, 64), (128 * 64, 64), (128 * 16, 16), (1, 1)]
)
def test_of_a_large_weight_some_rows_stand_for_all(
    elements: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_error, "ELEMENTS", elements)
    dense = nn.Linear(128, 64)
    found = relative_error(dense, render_layer(dense, UNIFORM4, MINMAX, "a"))
    assert found == pytest.approx(naive(dense.weight[:: 64 // rows], UNIFORM4), rel=1e-5)
    assert found == pytest.approx(naive(dense.weight, UNIFORM4), rel=0.5)


def test_a_weight_of_zeros_has_no_error() -> None:
    dense = nn.Linear(64, 8)
    dense.weight = mx.zeros((8, 64))
    assert relative_error(dense, render_layer(dense, UNIFORM4, MINMAX, "a")) == 0
