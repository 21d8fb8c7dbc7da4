"""What `optiq convert` refuses: one line, the exit code, and nothing left behind."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import convert as stock_convert

from optiq.cli import main
from optiq.quantize import prepare as preparation
from optiq.sources import resolve
from tests.planned import scores_of
from tests.scored import PEER
from tests.tiny import tiny_folder

QUICK = ["--tokens", "320"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path, name="model")


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Run `optiq convert` in vain, without measuring anything."""

    def measure(*args: Any, **options: Any) -> None:
        raise AssertionError("measured in vain")

    for name in ("measure", "choose_rounding"):
        monkeypatch.setattr(preparation, name, measure)
    monkeypatch.chdir(tmp_path)

    def run(message: str, *arguments: str, code: int = 1) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert main(["convert", *QUICK, *arguments]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert err.startswith("optiq convert: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before

    return run


def rewrite(folder: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(file), weights, {"format": "mlx"})


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_truncated_or_garbled_weight_file(model: Path, refused: Callable[..., None]) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    for damaged in (data[:-100], data[:50], b"", b"\xff" * 100, data + b"x"):
        file.write_bytes(damaged)
        refused("model.safetensors is corrupt or truncated", "model", "-o", "out")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.down_proj.weight", math.nan),
        ("model.layers.0.input_layernorm.weight", math.inf),
        ("model.embed_tokens.weight", -math.inf),
    ],
)
def test_a_weight_that_is_not_finite(
    model: Path, refused: Callable[..., None], name: str, value: float
) -> None:
    def damage(weights: dict[str, mx.array]) -> None:
        last = mx.arange(weights[name].size).reshape(weights[name].shape) == weights[name].size - 1
        weights[name] = mx.where(last, value, weights[name])

    rewrite(model, damage)
    refused(f"the weight {name} holds NaN or infinite values", "model", "-o", "out")


def test_a_missing_tensor(model: Path, refused: Callable[..., None]) -> None:
    rewrite(model, lambda w: w.pop("model.norm.weight"))
    refused("model.norm.weight", "model", "-o", "out")


def test_a_missing_or_damaged_tokenizer(model: Path, refused: Callable[..., None]) -> None:
    (model / "tokenizer.json").write_text("{}")
    refused("the tokenizer of model cannot be loaded", "model", "-o", "out")
    (model / "tokenizer.json").unlink()
    refused("has no tokenizer", "model", "-o", "out")


def test_an_unknown_architecture_or_no_config(model: Path, refused: Callable[..., None]) -> None:
    configure(model, model_type="llama99")
    refused("the architecture 'llama99' is not in mlx-lm", "model", "-o", "out")
    configure(model, model_type="../os")
    refused("is not in mlx-lm", "model", "-o", "out")
    (model / "config.json").write_text("{")
    refused("config.json cannot be read", "model", "-o", "out")
    (model / "config.json").unlink()
    refused("has no config.json", "model", "-o", "out")


def test_a_model_that_is_not_there(refused: Callable[..., None]) -> None:
    refused("there is no folder none", "none", "-o", "out")
    refused("there is no file none.gguf", "none.gguf", "-o", "out")


def test_a_budget_below_the_smallest_possible(model: Path, refused: Callable[..., None]) -> None:
    for size in ("3bpw", "1000", "0.05MB"):
        refused("but the smallest possible with these", "model", "-o", "out", "--size", size)
    refused("raise --size", "model", "-o", "out", "--size", "5bpw", "--formats", "6,8")


def test_rows_that_do_not_divide_into_groups_of_64(
    tmp_path: Path,
    refused: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
    tiny_folder(tmp_path, name="narrow", hidden_size=96, intermediate_size=224, **heads)
    refused("raise --size or add 4g32 to --formats", "narrow", "-o", "out", "--size", "5bpw")
    monkeypatch.setattr("optiq.base.lines.EVERY", 0)  # what is said is printed at once
    assert main(["convert", *QUICK, "narrow", "-o", "out"]) == 1  # only to measure is left
    assert "15 modules stay unquantized: their rows do not divide" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [28, 200])
def test_float16_that_overflows(
    model: Path, refused: Callable[..., None], scale: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """With 28 a few tokens overflow, with 200 all."""

    def enlarge(weights: dict[str, mx.array]) -> None:
        for name, weight in weights.items():
            factor = scale if ".0.mlp." in name else 1
            weights[name] = (weight * factor).astype(mx.float16)

    configure(model, torch_dtype="float16")
    rewrite(model, enlarge)
    refused("overflows float16 at model.layers.0", "model", "-o", "out")
    configure(model, torch_dtype="bfloat16")
    assert main(["convert", *QUICK, "model", "-o", "out"]) == 1
    assert "measured in vain" in capsys.readouterr().err


def test_a_model_that_mlx_lm_cannot_run_here(
    model: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError("[metal_kernel] Only available with Metal.")

    monkeypatch.setattr("mlx_lm.models.llama.MLP.__call__", call)
    refused("cannot run model: [metal_kernel] Only available with Metal", "model", "-o", "out")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "4.8", "write 4.8bpw for bits per weight"),
        ("--size", "-5GB", "is not understood"),
        ("--formats", "q4_k", "format 'q4_k' is not understood"),
        ("--formats", "7", "7 bits is not an affine width"),
        ("--formats", "4g48", "group size 48 is not supported"),
        ("--formats", "", "format '' is not understood"),
    ],
)
def test_wrong_usage(
    model: Path, refused: Callable[..., None], option: str, value: str, message: str
) -> None:
    refused(message, "model", "-o", "out", f"{option}={value}", code=2)


def test_a_target_in_use(tmp_path: Path, model: Path, refused: Callable[..., None]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    refused("full exists and is not empty; choose another folder", "model", "-o", "full")
    refused("mine is a file; choose another folder", "model", "-o", "full/mine")
    refused("cannot be written: Not a directory", "model", "-o", "full/mine/out")
    refused("model exists and is not empty", "model", "-o", "model")
    refused("File name too long", "model", "-o", "x" * 300)


def test_a_folder_that_may_not_be_written(
    tmp_path: Path, model: Path, refused: Callable[..., None]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    refused("cannot be written: Permission denied", "model", "-o", "locked/out")


def test_a_full_disk(
    model: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=60_000))
    refused("will need 125,440 bytes but only 60,000 are free", "model", "-o", "out")


def test_bad_calibration_rows_are_named_by_line(
    tmp_path: Path, model: Path, refused: Callable[..., None]
) -> None:
    text = "The river turned silver when the evening light reached it. " * 5
    rows = [json.dumps({"domain": "prose", "text": text}) for _ in range(3)]
    file = tmp_path / "mix.jsonl"

    def with_line(line: str) -> list[str]:
        file.write_text("\n".join([*rows, line]))
        return ["model", "-o", "out", "--calibration", "mix.jsonl"]

    refused("mix.jsonl line 4: not JSON", *with_line('{"domain": '))
    refused("mix.jsonl line 4: the row has neither text", *with_line('{"domain": "x"}'))
    file.write_text("")
    refused("mix.jsonl: no rows", "model", "-o", "out", "--calibration", "mix.jsonl")
    file.write_text(rows[0])
    refused("a single row of each domain", "model", "-o", "out", "--calibration", "mix.jsonl")
    refused("none.jsonl: cannot be read", "model", "-o", "out", "--calibration", "none.jsonl")


def test_too_few_tokens_to_measure_on(model: Path, refused: Callable[..., None]) -> None:
    refused("10 calibration tokens are too few", "model", "-o", "out", "--tokens", "10")


def test_an_already_quantized_model(
    tmp_path: Path,
    model: Path,
    refused: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    stock_convert(str(model), str(tmp_path / "q4"), quantize=True, q_bits=4)
    capsys.readouterr()
    refused("q4 is already quantized (affine 4-bit)", "q4", "-o", "out")


def test_scores_that_do_not_belong(
    tmp_path: Path, model: Path, refused: Callable[..., None]
) -> None:
    other = resolve(str(tiny_folder(tmp_path, name="other", seed=1, num_hidden_layers=3)))
    scores = scores_of(other).to_json()
    file = tmp_path / "s.json"
    convert = ["model", "-o", "out", "--scores", "s.json"]
    file.write_text(json.dumps(scores))
    refused("s.json holds the scores of", *convert)
    refused("s.json holds the scores of", *convert, "--dry-run")
    file.write_text(json.dumps(scores | {"schema": 2}))
    refused("s.json has schema 2", *convert)
    file.write_text("[]")
    refused("s.json is not a sensitivity file", *convert)
    file.write_text(json.dumps(PEER | {"layers": PEER["layers"][1:2]}))
    refused("s.json names no layer of", *convert)
    file.unlink()
    refused("s.json cannot be read as scores", *convert)


def test_scores_cannot_hide_a_bad_weight(
    tmp_path: Path, model: Path, refused: Callable[..., None]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(model, lambda w: w.update({name: w[name] * math.nan}))
    (tmp_path / "s.json").write_text(json.dumps(scores_of(resolve(str(model))).to_json()))
    refused("the weight model.layers.1.mlp.up_proj", "model", "-o", "out", "--scores", "s.json")


def test_a_size_that_the_scores_cannot_give(
    tmp_path: Path, model: Path, refused: Callable[..., None]
) -> None:
    (tmp_path / "s.json").write_text(json.dumps(scores_of(resolve(str(model))).to_json()))
    given = ["model", "-o", "out", "--scores", "s.json"]
    refused("the smallest possible plan takes", *given, "--size", "3bpw")
    refused("no score for 2g64; measure again", *given, "--formats", "2,4")
