"""What export refuses, and what is left after it fails: nothing."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from optiq.errors import ExportError, SourceError
from optiq.formats import DENSE, UNIFORM4
from optiq.planning.plan import Plan
from optiq.quantize import export as export_module
from optiq.quantize.export import export
from optiq.sources import Source, resolve, shards
from tests.planned import leftovers, scores_of, source_of, uniform
from tests.scored import build


def refused(match: str, source: Source, plan: Plan, out: Path, **options: Any) -> None:
    before = leftovers(out.parent)
    with pytest.raises(ExportError, match=match) as error:
        export(source, plan, out, **options)
    assert "\n" not in str(error.value)
    assert leftovers(out.parent) == before


def test_an_existing_folder_or_file_is_not_touched(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    refused(
        "exists and is not empty; choose another folder", source, uniform(source), tmp_path / "out"
    )
    refused("is a file", source, uniform(source), tmp_path / "out" / "mine")
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_an_unwritable_target(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    (tmp_path / "file").write_text("")
    plan = uniform(source)
    with pytest.raises(ExportError, match=r"cannot be written \(.*file exists.*choose a folder"):
        export(source, plan, tmp_path / "file" / "out")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write anywhere")
    refused(r"cannot be written \(.*Permission denied", source, plan, locked / "out")


def test_too_little_space_is_said_before_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path)
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: usage)
    refused("needs .* bytes but only 1,000 are free", source, uniform(source), tmp_path / "out")


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    source = source_of(tmp_path)
    plan = uniform(source)
    written: list[int] = []
    write = shards.write_tensor

    def failing(file: Any, array: mx.array) -> int:
        written.append(array.nbytes)
        if len(written) == 10:
            assert len(leftovers(tmp_path)) == 1  # the half-written folder
            raise failure
        return write(file, array)

    monkeypatch.setattr(shards, "write_tensor", failing)
    if isinstance(failure, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            export(source, plan, tmp_path / "out")
    else:
        refused(r"cannot be written .*no space left", source, plan, tmp_path / "out")
    assert len(written) == 10
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, name: str, value: float) -> None:
    source = source_of(tmp_path)
    file = source.path / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    weights[name] = mx.where(mx.arange(weights[name].shape[-1]) == 3, value, weights[name])
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    with pytest.raises(SourceError, match=f"{name} holds NaN or infinite"):
        export(source, uniform(source), tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_plan_for_another_model(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    other = source_of(tmp_path, "llama-untied")
    out = tmp_path / "out"
    refused("the plan is for .*source-llama-untied", source, uniform(other), out)

    data = uniform(other).to_json()
    data["model"]["fingerprint"] = None
    refused("embed_tokens is .*128.* in the model", source, Plan.from_json(data), out)
    data["modules"] = data["modules"][1:]
    data["nbytes"] -= uniform(other).modules[0].nbytes
    refused(r"embed_tokens is missing in the plan", other, Plan.from_json(data), out)

    plan = uniform(source)
    plan = replace(plan, model=replace(plan.model, fixed_bytes=plan.model.fixed_bytes + 4))
    refused("the plan counts fixed_bytes as", source, plan, out)


# Each of these makes the written folder differ from the plan in another way.
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip a byte", "was read back with other bytes"),
        ("drop a tensor", "it does not load"),
        ("truncate", "it does not load"),
        ("another dtype", "norm.weight is mlx.core.float16"),
        ("an extra tensor", "it does not load"),
        ("bits in config", "it does not load"),
        ("uniform config", "it does not load"),
        ("not quantized", "it does not load"),
        ("no tokenizer", "it does not load .*tokenizer"),
    ],
)
def test_what_differs_from_the_plan_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, message: str
) -> None:
    source = source_of(tmp_path, "llama-untied")
    plan = build(scores_of(source), "5bpw")
    verify = export_module._verify

    def damaged(folder: Path, *args: Any) -> None:
        file, config_file = folder / "model.safetensors", folder / "config.json"
        config = json.loads(config_file.read_text())
        quantization = config["quantization"]
        if damage == "flip a byte":
            data = bytearray(file.read_bytes())
            data[-5] ^= 1
            file.write_bytes(data)
        elif "tensor" in damage or "dtype" in damage:
            weights = mx.load(str(file))
            mx.eval(weights)
            if damage == "drop a tensor":
                weights.pop("model.norm.weight")
            elif damage == "another dtype":
                weights["model.norm.weight"] = weights["model.norm.weight"].astype(mx.float16)
            else:
                weights["model.norm.bias"] = weights["model.norm.weight"]
            mx.save_safetensors(str(file), weights, {"format": "mlx"})
        elif damage == "truncate":
            file.write_bytes(file.read_bytes()[:-1])
        elif damage == "bits in config":
            path = next(m.module.path for m in plan.modules if m.format.bits == 4)
            quantization[path]["bits"] = 8
        elif damage == "uniform config":
            quantization |= {m.module.path: UNIFORM4.config() for m in plan.modules}
        elif damage == "not quantized":
            path = next(m.module.path for m in plan.modules if m.format != DENSE)
            quantization[path] = False
        else:
            (folder / "tokenizer.json").unlink()
        config_file.write_text(json.dumps(config))
        verify(folder, *args)

    monkeypatch.setattr(export_module, "_verify", damaged)
    refused(f"the written model is not the plan: .*({message})", source, plan, tmp_path / "out")


def test_widths_and_bytes_are_compared_with_the_plan(tmp_path: Path) -> None:
    source = source_of(tmp_path, "qwen3_moe")
    plan = build(scores_of(source), "5.3bpw")
    out = tmp_path / "out"
    export(source, plan, out)
    parameters = dict(tree_flatten(load_model(out)[0].parameters()))
    layout = {n: shards.Spec.of(a.dtype, a.shape) for n, a in parameters.items()}
    checksums = {n: shards.checksum(a) for n, a in parameters.items()}
    export_module._verify(out, plan, layout, checksums)

    same = [m for m in plan.modules if m.module.shape == (4, 64, 64)]
    first = same[0]
    second = next(m for m in same if m.format != first.format)
    swap = {
        first.module.path: replace(first, format=second.format, nbytes=second.nbytes),
        second.module.path: replace(second, format=first.format, nbytes=first.nbytes),
    }
    modules = tuple(swap.get(m.module.path, m) for m in plan.modules)
    with pytest.raises(ExportError, match=f"{first.module.path} loads as mode, bits, group"):
        export_module._verify(out, replace(plan, modules=modules), layout, checksums)
    modules = tuple(swap.get(m.module.path, m) if m is first else m for m in plan.modules)
    with pytest.raises(ExportError, match=r"its tensors are .* bytes, not"):
        export_module._verify(out, replace(plan, modules=modules), layout, checksums)


def test_a_model_that_overflows_is_not_exported(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    file = source.path / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 0 + 3e38
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    source = resolve(str(source.path))
    refused("its logits are not finite", source, uniform(source), tmp_path / "out")
