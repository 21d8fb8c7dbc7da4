"""convert() on tiny models: what it writes, against stock mlx-lm and NumPy."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import generate as stock_generate
from mlx_lm import load as stock_load
from mlx_lm.utils import load_model

import optiq
from optiq.calibration import gather
from optiq.errors import ExportError, UsageError
from optiq.formats import DEFAULT_MENU, DENSE, Format
from optiq.models.roles import allowed, floor, quantizable
from optiq.planning.plan import Plan
from optiq.planning.proposals import propose
from optiq.planning.size import UNIFORM4_SIZE
from optiq.quantize import convert as conversion
from optiq.quantize import prepare as preparation
from optiq.quantize.convert import Result, convert
from optiq.quantize.prepare import CHECKPOINT, work_folder
from optiq.quantize.sensitivity.checkpoint import Checkpoint
from optiq.runtime.generate import answer
from optiq.sources.rotation import of_module, rotation
from tests.report.page import read, rows
from tests.tiny import tiny_folder

QUICK: dict[str, Any] = {"tokens": 320, "held_out_tokens": 320, "progress": False}
TOKENS = mx.array([[1, 5, 9, 200, 17, 33, 4, 250, 11, 12, 13, 14]])


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("size", ["uniform4", "6bpw"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"dtype": "bfloat16"}),
        ("llama", {"tie_word_embeddings": False}),
        ("qwen3_moe", {}),
        ("gemma3_text", {}),
        ("gemma3_text", {"dtype": "bfloat16"}),
    ],
)
def test_the_folder_is_the_plan_and_runs_in_stock_mlx_lm(
    tmp_path: Path, kind: str, config: dict[str, Any], size: str
) -> None:
    folder = tiny_folder(tmp_path, kind, name="model", **config)
    out = tmp_path / "out"
    result = convert(str(folder), out, size=size, **QUICK)
    plan = result.plan

    tensors = mx.load(str(out / "model.safetensors"))
    nbytes = sum(t.nbytes for t in tensors.values())
    assert nbytes == plan.nbytes == result.nbytes
    assert 0.99 * plan.budget <= nbytes <= plan.budget
    quantization = json.loads((out / "config.json").read_text())["quantization"]
    for planned in plan.modules:
        path, fmt = planned.module.path, planned.format
        assert quantization[path] == fmt.config()
        assert fmt.bits >= floor(planned.module.role)
        if fmt != DENSE:
            expected_shape = (*planned.module.shape[:-1], planned.module.shape[-1] * fmt.bits // 32)
            assert tensors[f"{path}.weight"].shape == expected_shape
    assert {m.module.path for m in plan.modules} == quantization.keys() - {
        "group_size",
        "bits",
        "mode",
    }
    stored = json.loads((out / "optiq" / "plan.json").read_text())
    assert Plan.from_json(stored) == plan
    assert json.loads((out / "optiq" / "sensitivity.json").read_text()) == result.scores.to_json()
    assert "<html" in (out / "optiq" / "report.html").read_text()
    assert names(out / "optiq") == ["plan.json", "report.html", "sensitivity.json"]
    assert names(tmp_path) == ["model", "out"]

    stock, tokenizer = stock_load(str(out))
    assert isinstance(stock_generate(stock, tokenizer, "The river", max_tokens=4), str)
    stock.set_dtype(mx.float32)
    ours, _ = optiq.load(str(out))
    expected, got = stock(TOKENS), ours(TOKENS)
    # Activations in 16-bit fixed point, as in tests/nn/test_accelerate.py.
    assert mx.abs(got - expected).max().item() <= 1e-3 * mx.abs(expected).max().item()


def test_the_measured_kl_is_that_of_the_exported_folder(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, name="model")
    result = convert(str(folder), tmp_path / "out", size="5bpw", **QUICK)
    original, tokenizer = stock_load(str(folder))
    held_out = gather(tokenizer, None, "heldout", 320, 0)
    exported, _ = load_model(tmp_path / "out")
    total = count = 0.0
    for sample in held_out.sequences:
        p, q = (log_softmax(m(mx.array([sample.tokens]))[0, :-1]) for m in (original, exported))
        total += (np.exp(p) * (p - q)).sum()
        count += len(p)
    assert result.kl == pytest.approx(total / count, rel=1e-3)
    assert result.plan.measured is not None
    assert result.plan.measured.nbytes == result.nbytes
    assert result.plan.measured.bpw == result.plan.bpw
    uniform4 = result.plan.uniform4
    assert uniform4 is not None
    assert uniform4.measured is not None
    assert uniform4.measured.nbytes == uniform4.nbytes
    assert not {s.line for s in held_out.sequences} & {
        s.line for s in gather(tokenizer, None, "calibration", 320, 0).sequences
    }


def log_softmax(logits: mx.array) -> Any:
    x = np.array(logits, dtype=np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_every_expert_tensor_has_a_measured_score(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "qwen3_moe")
    result = convert(str(folder), tmp_path / "out", **QUICK)
    assert result.scores.method == "auto"
    modules = quantizable(load_model(folder)[0])
    rows = {scored.module.path: scored.scores for scored in result.scores.modules}
    experts = [m for m in modules if len(m.shape) == 3]
    assert len(experts) == 6
    for m in experts:
        for fmt in allowed(m, DEFAULT_MENU):
            assert (rows[m.path][fmt].kl > 0) is (fmt != DENSE)
            assert fmt == DENSE or rows[m.path][fmt].method == "kl"


def test_scores_are_used_again_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path, name="model")
    first = convert(str(folder), tmp_path / "first", size="5bpw", **QUICK)
    monkeypatch.setattr(preparation, "measure", None)
    given = tmp_path / "first" / "optiq" / "sensitivity.json"
    again = convert(str(folder), tmp_path / "again", size="5bpw", scores=given, **QUICK)
    assert again.plan == first.plan
    weights = [tmp_path / out / "model.safetensors" for out in ("first", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    other = convert(str(folder), tmp_path / "other", size="6bpw", scores=given, **QUICK)
    assert other.nbytes > first.nbytes


def test_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, name="model")
    digests = set()
    for name in ("a", "b"):
        convert(str(folder), tmp_path / name, seed=3, **QUICK)
        file = (tmp_path / name / "model.safetensors").read_bytes()
        digests.add(hashlib.sha256(file).hexdigest())
    assert len(digests) == 1


def test_a_menu_limits_what_is_measured_and_chosen(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, name="model")
    menu = [Format("affine", 4, 64), Format("affine", 8, 64)]
    for i, formats in enumerate((menu, "4g64,8g64")):
        out = tmp_path / f"{i}"
        result = convert(str(folder), out, size="7bpw", formats=formats, **QUICK)
        assert {m.format for m in result.plan.modules} == set(menu)
        assert set(result.scores.modules[0].scores) == set(menu)


def test_a_dry_run_writes_no_folder_and_its_scores_are_taken_up(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, name="model")
    out = tmp_path / "out"
    planned = convert(str(folder), out, dry_run=True, **QUICK)
    assert planned.path is None
    assert planned.kl is None
    assert names(tmp_path) == ["model", "out.optiq-work"]
    written = convert(str(folder), out, resume=True, **QUICK)
    assert names(tmp_path) == ["model", "out"]
    assert planned.scores.modules == written.scores.modules
    plans = propose(written.scores, UNIFORM4_SIZE)
    assert planned.plan.modules == plans["scores"].modules
    assert written.plan.selection is not None
    assert written.plan.modules == plans[written.plan.selection.chosen].modules


@pytest.mark.parametrize("method", ["kl", "fisher"])
def test_an_interrupted_run_goes_on_to_the_same_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    folder = str(tiny_folder(tmp_path, name="model"))
    monkeypatch.setattr("optiq.quantize.sensitivity.job.BATCH_TOKENS", 200)
    job: dict[str, Any] = {"sensitivity": method, "formats": "3,4,bf16", **QUICK}
    saves, stop = 0, 0
    save = Checkpoint.save

    def interrupted(self: Checkpoint) -> None:
        nonlocal saves
        save(self)
        saves += 1
        if saves == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", interrupted)
    whole = convert(folder, tmp_path / "whole", **job)

    out = tmp_path / "out"
    total, saves, stop = saves, 0, 6 if method == "kl" else 1  # in the second batch, or before it
    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, **job)
    assert names(tmp_path) == ["model", "out.optiq-work", "whole"]
    assert names(work_folder(out)) == [CHECKPOINT]
    (checkpoint,) = work_folder(out).iterdir()
    units = json.loads(checkpoint.read_text())["rounds"][f"0 {method}"]
    assert len(units) == saves
    resumed = convert(folder, out, resume=True, **job)
    assert resumed.scores.modules == whole.scores.modules
    assert resumed.plan.modules == whole.plan.modules
    assert saves == total  # nothing was measured twice
    assert names(tmp_path) == ["model", "out", "whole"]


def test_a_failure_after_measuring_keeps_the_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path, name="model")
    out = tmp_path / "out"
    export = conversion.export

    def full(*args: Any, **options: Any) -> None:
        raise ExportError("the disk is full; free space")

    monkeypatch.setattr(conversion, "export", full)
    with pytest.raises(ExportError, match=r"disk is full; free space; the scores are kept, --res"):
        convert(str(folder), out, **QUICK)
    assert names(tmp_path) == ["model", "out.optiq-work"]
    monkeypatch.setattr(conversion, "export", export)
    monkeypatch.setattr("optiq.quantize.sensitivity.fisher._Batch.score", None)
    convert(str(folder), out, resume=True, **QUICK)
    assert names(tmp_path) == ["model", "out"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("x")])
def test_a_failure_while_comparing_leaves_no_folder_without_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    folder = tiny_folder(tmp_path, name="model")

    def failing(*args: Any, **options: Any) -> None:
        assert (tmp_path / "out" / "config.json").exists()
        raise failure

    monkeypatch.setattr(conversion.Judge, "compare", failing)
    with pytest.raises(type(failure)):
        convert(str(folder), tmp_path / "out", **QUICK)
    assert names(tmp_path) == ["model", "out.optiq-work"]


def test_without_memory_for_the_source_the_result_is_measured_but_gives_no_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path, name="model")
    whole = convert(str(folder), tmp_path / "whole", reference="bf16", **QUICK)
    write = conversion._write
    monkeypatch.setattr(conversion, "_write", lambda *args: write(*args[:-1], 0))  # no room is left
    monkeypatch.setattr(conversion, "_answers", None)
    result = convert(str(folder), tmp_path / "out", reference="bf16", **QUICK)
    assert result.kl == whole.kl


def test_a_model_that_does_not_fit_memory_is_scored_in_4_bits(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "qwen3_moe", name="model")
    result = convert(str(folder), tmp_path / "out", reference="uniform4", **QUICK)
    assert result.scores.reference == "uniform4"
    assert result.kl is not None
    assert 0 < result.kl < math.inf


def test_the_target_may_be_the_current_folder_or_behind_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path, name="model")
    for name in ("here", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(str(folder), tmp_path / "link", **QUICK)
    monkeypatch.chdir(tmp_path / "here")
    convert(str(folder), ".", **QUICK)
    assert (tmp_path / "real" / "config.json").exists()
    assert (tmp_path / "here" / "config.json").exists()
    assert names(tmp_path) == ["here", "link", "model", "real"]


def test_the_function_stays_callable_after_its_module_is_imported(tmp_path: Path) -> None:
    """A submodule of the same name would take its place in the package."""
    import optiq.quantize.convert
    import optiq.quantize.sensitivity.measure

    assert optiq.convert is convert
    assert optiq.Result is Result
    assert callable(optiq.load)
    assert callable(optiq.accelerate)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = optiq.nothing


def test_a_size_in_bytes_bounds_the_file(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama", name="model")
    for size in (70_000, 90_000):
        out = tmp_path / f"out{size}"
        convert(str(folder), out, size=str(size), **QUICK)
        nbytes = (out / "model.safetensors").stat().st_size
        assert 0.97 * size <= nbytes <= size


def test_uniform4_is_what_stock_mlx_lm_writes(tmp_path: Path) -> None:
    """Also where a model file insists on 8-bit routers."""
    from mlx_lm import convert as stock_convert

    folder = tiny_folder(tmp_path, "qwen3_moe", name="model")
    stock_convert(str(folder), str(tmp_path / "stock"), quantize=True, q_bits=4, q_group_size=64)
    stock = mx.load(str(tmp_path / "stock" / "model.safetensors"))
    result = convert(str(folder), tmp_path / "out", **QUICK)
    assert result.plan.uniform4
    assert result.plan.uniform4.nbytes == sum(t.nbytes for t in stock.values())


def test_paths_and_numbers_as_arguments(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama", name="model")
    result = convert(
        folder, tmp_path / "out", size=80_000, formats=[Format("affine", 4, 64)], **QUICK
    )
    assert result.plan.asked == "80000"
    with pytest.raises(UsageError, match="list of formats is empty"):
        convert(folder, tmp_path / "none", formats=[], **QUICK)


def test_how_mlx_lm_departs_from_the_original_goes_with_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a rotation that mlx-lm computes otherwise is the original's, in stock mlx-lm as well."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    window = {"sliding_window": 64, "use_sliding_window": True, "max_position_embeddings": 512}
    folder = tiny_folder(
        tmp_path, "qwen2", name="m", rope_scaling=yarn | {"truncate": False}, **window
    )
    out = tmp_path / "out"
    result = convert(folder, out, **QUICK)
    said = (
        "without its attention window of 64 tokens; for longer texts it is not the original model"
    )
    assert said in capsys.readouterr().err
    for name in ("plan.json", "sensitivity.json"):
        written = json.loads((out / "optiq" / name).read_text())
        assert written["model"]["departures"] == [said]
    assert said in (out / "optiq/report.html").read_text()
    assert Plan.from_json(json.loads((out / "optiq/plan.json").read_text())) == result.plan
    model, _ = load_model(out)
    found = of_module(model.layers[0].self_attn.rope)
    wanted = rotation({**yarn, "truncate": False, "rope_theta": 1e6}, window, 16)
    assert found is not None
    assert wanted is not None
    assert wanted.like(found)


def printed(text: str) -> str:
    """As a page shows it."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def test_the_report_has_answers_of_all_three_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optiq.quantize.convert.PROMPTS", ("Why?", "What is it?"))
    monkeypatch.setattr("optiq.quantize.convert.TOKENS", 6)
    folder = tiny_folder(tmp_path, name="model")
    convert(folder, tmp_path / "out", sensitivity="fisher", formats="4,8", **QUICK)
    page = read((tmp_path / "out" / "optiq" / "report.html").read_text())
    table = next(t for t in page.all("table") if "answers" in t.classes)
    asked = rows(table)
    assert list(asked) == ["Why?", "What is it?"]
    model, tokenizer = stock_load(str(folder))
    rounded = optiq.load(tmp_path / "out")
    for prompt, (source, ours, _) in asked.items():
        assert source.text == printed(answer(model, tokenizer, prompt, 6))
        assert ours.text == printed(answer(*rounded, prompt, 6))
