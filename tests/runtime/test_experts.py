"""Experts that stay on disk: the same answers in any memory, which is kept to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load_model, save_model

import optiq
from optiq.cli import main
from optiq.errors import SourceError, UsageError
from optiq.nn.accelerate import accelerate
from optiq.quantize.export import export
from optiq.runtime.experts import Reads, Streamed, reads_of, stream
from optiq.serve.engine.request import Request, Sampling
from optiq.serve.opening import open_model
from optiq.serve.options import Options
from optiq.sources import Source, resolve
from tests.architectures import COMMON, MODELS, construct
from tests.planned import scores_of
from tests.scored import build
from tests.serve.cases import ask
from tests.tiny import tiny_folder, write_tokenizer

EXPERTS = 16
LENGTHS = (1, 7, 60)  # tokens: as many experts as there is room for; more; sorted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in several widths, also within a layer."""
    parent = tmp_path_factory.mktemp("experts")
    source = resolve(str(tiny_folder(parent, "qwen3_moe", name="source", num_experts=EXPERTS)))
    export(source, build(scores_of(source), "5bpw"), parent / "out")
    return parent / "out"


@pytest.fixture(scope="module")
def each(folder: Path) -> int:
    """Bytes of one expert in all layers."""
    arrays: dict[str, mx.array] = dict(tree_flatten(load_model(folder, lazy=True)[0].parameters()))
    return sum(a.nbytes // EXPERTS for name, a in arrays.items() if "switch_mlp" in name)


def logits(model: nn.Module, tokens: int) -> mx.array:
    out: mx.array = model(mx.random.randint(0, 384, (1, tokens), key=mx.random.key(tokens)))
    return out


def compare(streamed: nn.Module, resident: nn.Module) -> Reads:
    """What was read for the same logits, to the bit."""
    for tokens in (*LENGTHS, *LENGTHS):
        assert mx.array_equal(logits(streamed, tokens), logits(resident, tokens)).item(), tokens
    reads = reads_of(streamed)
    assert reads is not None
    return reads


@pytest.mark.parametrize("held", [2, 5, EXPERTS, 100])
def test_logits_are_those_of_the_resident_model(folder: Path, each: int, held: int) -> None:
    memory = held * each + each // 2
    reads = compare(optiq.load(str(folder), expert_memory=memory)[0], optiq.load(str(folder))[0])
    assert reads.room == min(held, EXPERTS) * each <= memory
    if held >= EXPERTS:  # each is read once, at most
        assert reads.bytes_read <= EXPERTS * each
    else:
        assert reads.bytes_read > EXPERTS * each
    assert 0 < reads.hits < 1


@pytest.mark.parametrize(
    ("kind", "mode", "changes", "native"),
    [
        ("gpt_oss", "mxfp4", {"num_local_experts": EXPERTS}, True),  # with biases
        ("gpt_oss", None, {"num_local_experts": EXPERTS}, True),
        ("deepseek_v3", "affine", {"n_routed_experts": EXPERTS}, False),
        ("gemma4_text", "nvfp4", {"num_experts": EXPERTS}, True),
    ],
)
def test_families_and_modes(
    tmp_path: Path, kind: str, mode: str | None, changes: dict[str, Any], native: bool
) -> None:
    model = construct(kind, **changes)
    model.update(tree_map(lambda a: a + 0.1 * mx.random.normal(a.shape), model.parameters()))
    config = {"model_type": kind, **COMMON, **MODELS[kind], **changes}
    if mode:
        size = 16 if mode == "nvfp4" else 32
        nn.quantize(model, size, 4, mode=mode)
        config["quantization"] = {"group_size": size, "bits": 4, "mode": mode}
    save_model(tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tokenizer(tmp_path)
    resident, streamed = (load_model(tmp_path, lazy=True)[0] for _ in range(2))
    source = Source("it", "folder", tmp_path, None, "")
    with pytest.raises(UsageError) as info:
        stream(streamed, source, 1)
    stream(streamed, source, str(info.value).rpartition(" ")[2])  # the least
    if native:
        for one in (resident, streamed):
            accelerate(one, exact=False)
    assert compare(streamed, resident).read > 0


def test_the_least_used_expert_goes(folder: Path, each: int) -> None:
    """By hand: room for four, in the order in which they are asked for."""
    model = optiq.load(str(folder), expert_memory=4 * each)[0]
    layer: Any = model.model.layers[1].mlp.switch_mlp.up_proj
    assert type(layer) is Streamed
    reads = layer.slots.reads
    for asked, read in (
        ([0, 1], 2),
        ([2, 3], 2),
        ([1, 0], 0),
        ([4, 1], 1),
        ([0, 3], 0),
        ([2, 0], 1),
    ):
        before = reads.read, reads.found
        layer(mx.ones((1, 1, 1, 1, 64)), mx.array([[asked]]))
        assert (reads.read - before[0], reads.found - before[1]) == (read, 2 - read), asked


def test_what_waits_to_be_computed_keeps_its_experts(folder: Path, each: int) -> None:
    """Products are lazy, and slots are written to in place."""
    streamed = optiq.load(str(folder), expert_memory=2 * each)[0]
    resident = optiq.load(str(folder))[0]
    x = mx.random.normal((1, 1, 1, 1, 64))
    asked = [mx.array([[[e, e + 1]]]) for e in range(0, EXPERTS, 2)]
    found, expected = (
        [model.model.layers[0].mlp.switch_mlp.up_proj(x, e) for e in asked]
        for model in (streamed, resident)
    )
    assert all(mx.array_equal(a, b).item() for a, b in zip(found, expected, strict=True))


def test_a_budget_below_the_experts_of_a_token(folder: Path, each: int) -> None:
    with pytest.raises(UsageError, match=r"less than the 2 experts .* at least 0\.\d{3}GB") as info:
        optiq.load(str(folder), expert_memory=2 * each - 1)
    asked = str(info.value).rpartition(" ")[2]
    assert reads_of(optiq.load(str(folder), expert_memory=asked)[0])
    with pytest.raises(UsageError, match="has no experts"):
        optiq.load(str(tiny_folder(folder.parent, "llama")), expert_memory="1GB")
    with pytest.raises(UsageError, match="not a number of bytes"):
        optiq.load(str(folder), expert_memory="4bpw")


def test_experts_that_are_not_stored_together(folder: Path, tmp_path: Path) -> None:
    """As Hugging Face stores them, a tensor for each."""
    copy = tiny_folder(tmp_path, "qwen3_moe")
    tensors: Any = mx.load(str(copy / "model.safetensors"))
    for name in [name for name in tensors if "switch_mlp" in name]:
        for i, expert in enumerate(tensors.pop(name)):
            tensors[name.replace("switch_mlp", f"experts.{i}")] = expert
    mx.save_safetensors(str(copy / "model.safetensors"), tensors)
    optiq.load(str(copy))
    with pytest.raises(SourceError, match=r"convert the model first, or leave --expert-memory"):
        optiq.load(str(copy), expert_memory="1GB")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_files_that_change_while_they_are_read(copied: Path, folder: Path, each: int) -> None:
    file = copied / "model.safetensors"
    model = optiq.load(str(copied), expert_memory=3 * each)[0]
    logits(model, 3)
    whole = file.read_bytes()
    with file.open("r+b") as opened:
        opened.truncate(len(whole) // 2)
    with pytest.raises(SourceError, match=r"model.safetensors was changed .* load the model again"):
        mx.eval(logits(model, 60))
    before = file.stat().st_mtime_ns
    file.write_bytes(whole)  # the same bytes at another time are not trusted either
    assert file.stat().st_mtime_ns != before
    with pytest.raises(SourceError, match="was changed"):
        mx.eval(logits(model, 60))


def test_a_file_that_is_removed_stays_open(copied: Path, folder: Path, each: int) -> None:
    model = optiq.load(str(copied), expert_memory=3 * each)[0]
    shutil.rmtree(copied)
    compare(model, optiq.load(str(folder))[0])


def test_a_failed_read_leaves_the_layer_as_it_was(
    copied: Path, folder: Path, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = optiq.load(str(copied), expert_memory=3 * each)[0]
    logits(model, 7)
    preadv, calls = os.preadv, iter(range(10**6))

    def failing(*args: Any) -> int:
        if next(calls) == 5:
            raise OSError(5, "Input/output error")
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(SourceError, match=r"cannot be read any more: Input/output error"):
        mx.eval(logits(model, 60))
    compare(model, optiq.load(str(folder))[0])


def test_generate_says_what_was_read(
    folder: Path, each: int, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", str(folder), "-p", "The river", "-m", "6", "--json"]
    answers = []
    for memory in ([], ["--expert-memory", str(3 * each)]):
        assert main([*given, *memory]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    resident, streamed = answers
    assert streamed["text"] == resident["text"]
    assert resident["experts"] is None
    assert 0 < streamed["experts"]["room"] <= streamed["experts"]["budget"] == 3 * each
    assert streamed["experts"]["bytes_read"] > 0


def test_the_server_answers_the_same(folder: Path, each: int) -> None:
    texts = []
    for memory in (None, 3 * each):
        engine: Any = open_model(str(folder), Options(expert_memory=memory)).engine
        engine.start()
        try:
            request = Request(tuple(range(4, 70)), 8, Sampling(temperature=1, seed=3))
            texts.append(ask(engine, request).ids)
        finally:
            engine.close()
    assert texts[0] == texts[1]
    assert len(texts[0]) == 8
    with pytest.raises(UsageError, match="one model"):
        Options(models_dir=folder.parent, expert_memory=each)
