"""Exported folders against stock mlx-lm, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load as stock_load
from mlx_lm.convert import convert as stock_convert
from mlx_lm.utils import load_model

from optiq.formats import UNIFORM4
from optiq.models.roles import quantizable
from optiq.planning.plan import Plan
from optiq.quantize import export as export_module
from optiq.quantize.export import export
from optiq.quantize.rounding.weights import MINMAX
from optiq.sources import Source, beside, load, resolve
from tests.planned import VARIANTS, leftovers, scores_of, source_of, uniform
from tests.scored import build
from tests.tiny import tiny_folder

TOKENS = mx.array([[1, 5, 9, 200, 17, 33, 4]])


def by_hand(source: Source, plan: Plan) -> nn.Module:
    """The source quantized in memory by MLX itself, with the dict of the plan's config."""
    model, _ = load_model(source.path)
    config = plan.quantization()
    nn.quantize(model, class_predicate=lambda p, m: config.get(p, False))
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_equals_quantizing_in_memory(tmp_path: Path, variant: str) -> None:
    source = source_of(tmp_path, variant)
    scores = scores_of(source)
    plan = build(scores, "5.3bpw")
    assert len({m.format for m in plan.modules}) >= 3
    export(source, plan, tmp_path / "out", scores=scores)

    got, tokenizer = stock_load(str(tmp_path / "out"))
    expected = by_hand(source, plan)
    stored = dict(tree_flatten(got.parameters()))
    for name, array in tree_flatten(expected.parameters()):
        assert mx.array_equal(stored.pop(name), array), name
    assert not stored
    assert mx.array_equal(got(TOKENS), expected(TOKENS))
    assert tokenizer.encode("The river") == stock_load(str(source.path))[1].encode("The river")


def test_folder_is_what_it_says(tmp_path: Path) -> None:
    source = source_of(tmp_path, "qwen3_moe")
    scores = scores_of(source)
    plan = build(scores, "uniform4")
    out = tmp_path / "out"
    export(source, plan, out, scores=scores)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "optiq/plan.json",
        "optiq/sensitivity.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((out / "config.json").read_text())
    original = json.loads((source.path / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == plan.quantization()
    assert {k: v for k, v in config.items() if not k.startswith("quantization")} == original
    for module in quantizable(load(source).model):
        assert module.path in config["quantization"]

    assert Plan.from_json(json.loads((out / "optiq/plan.json").read_text())) == plan
    assert build(json.loads((out / "optiq/sensitivity.json").read_text())) == build(scores)

    tensors, metadata = mx.load(str(out / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert sum(t.nbytes for t in tensors.values()) == plan.nbytes <= plan.budget
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(tensors), "model.safetensors")
    params = sum(v.size for _, v in tree_flatten(load(source).model.parameters()))
    assert index["metadata"] == {"total_size": plan.nbytes, "total_parameters": params}
    assert leftovers(tmp_path) == ["out"]


def test_uniform_plan_is_stock_uniform_quantization(tmp_path: Path) -> None:
    source = source_of(tmp_path, "llama-untied")
    plan = uniform(source)
    assert {m.format for m in plan.modules} == {UNIFORM4}
    export(source, plan, tmp_path / "out")
    model, _ = load_model(source.path)
    nn.quantize(model, 64, 4)
    got, _ = load_model(tmp_path / "out")
    assert mx.array_equal(got(TOKENS), model(TOKENS))
    stock = tree_flatten(model.parameters())
    assert plan.nbytes == sum(v.nbytes for _, v in stock)


def test_shards_are_within_the_limit(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    plan = uniform(source)
    export(source, plan, tmp_path / "out", shard_bytes=30_000)
    files = sorted((tmp_path / "out").glob("model*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert len(files) >= 3
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    for file in files:
        tensors = mx.load(str(file))
        total = sum(t.nbytes for t in tensors.values())
        assert total <= 30_000 or len(tensors) == 1
        assert {n for n, f in index["weight_map"].items() if f == file.name} == set(tensors)
    got, _ = load_model(tmp_path / "out")
    assert mx.array_equal(got(TOKENS), by_hand(source, plan)(TOKENS))


@pytest.mark.parametrize("named", ["bfloat16", None])
def test_tensors_of_another_dtype(tmp_path: Path, named: str | None) -> None:
    """Planned weights take the model's dtype; others, too, where config.json names it."""
    source = source_of(tmp_path, "llama-bf16")
    config = source.path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "torch_dtype": named}))
    file = source.path / "model.safetensors"
    weights = mx.load(str(file))
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        weights[name] = weights[name].astype(mx.float32)
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    source = resolve(str(source.path))
    export(source, uniform(source), tmp_path / "out")
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert stored["model.norm.weight"].dtype == (mx.bfloat16 if named else mx.float32)
    q = "model.layers.0.self_attn.q_proj"
    expected = mx.quantize(weights[f"{q}.weight"].astype(mx.bfloat16), 64, 4)
    for part, array in zip(("weight", "scales", "biases"), expected, strict=True):
        assert stored[f"{q}.{part}"].dtype == array.dtype
        assert mx.array_equal(stored[f"{q}.{part}"], array)


def test_an_empty_folder_is_taken_and_parents_are_made(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    (tmp_path / "out").mkdir()
    export(source, uniform(source), tmp_path / "out")
    export(source, uniform(source), tmp_path / "a" / "b")
    assert (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "a" / "b" / "config.json").exists()


def test_a_folder_that_is_there_is_filled(tmp_path: Path) -> None:
    """Somebody may stand in it."""
    source = source_of(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    before = out.stat().st_ino
    export(source, uniform(source), out)
    assert out.stat().st_ino == before
    assert leftovers(tmp_path) == ["out"]
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    load_model(out)


@pytest.mark.parametrize("name", ["out [v2]", "out?", "a*b"])
def test_a_target_that_looks_like_a_pattern(tmp_path: Path, name: str) -> None:
    source = source_of(tmp_path)
    export(source, uniform(source), tmp_path / name)
    assert (tmp_path / name / "model.safetensors").exists()


CARD = "---\nlicense: mit\nlanguage: [en, no]\n---\n# The source\n"
BESIDE = {  # what is no part of the model's own files, and what is
    "README.md": CARD,
    "LICENSE": "a licence",
    "LICENCE.md": "another",
    "NOTICE.txt": "a notice",
    "USE_POLICY.md": "a policy",
    "modeling_own.py": "# code",
    "tekken.json": "{}",
    "merges.txt": "",
    "preprocessor_config.json": "{}",
    "additional_chat_templates/tool_use.jinja": "{{ tools | tojson }}",
}
NOT_KEPT = ("trainer_state.json", "notes.md", "optimizer.pt")


def test_whatever_stock_convert_copies_or_keeps_is_there(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    path = source.path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    (source.path / "chat_template.jinja").write_text(config.pop("chat_template"))
    path.write_text(json.dumps(config))
    (source.path / "additional_chat_templates").mkdir()
    for name, text in {**BESIDE, **dict.fromkeys(NOT_KEPT, "")}.items():
        (source.path / name).write_text(text)
    out, stock = tmp_path / "out", tmp_path / "stock"
    export(source, uniform(source), out)
    stock_convert(str(source.path), str(stock), quantize=True)

    assert files(stock) <= files(out)
    copied = files(source.path) - {"config.json", "model.safetensors", *NOT_KEPT}
    assert copied >= BESIDE.keys()
    for name in copied:
        assert (out / name).read_bytes() == (source.path / name).read_bytes()
    assert (out / "optiq/source-card.md").read_text() == CARD
    assert files(out).isdisjoint(NOT_KEPT)
    made = json.loads((stock / "config.json").read_text())
    ours = json.loads((out / "config.json").read_text())
    assert made.keys() <= ours.keys()
    got, want = (stock_load(str(p))[1].chat_template for p in (out, stock))
    assert got == want
    assert list(got) == ["default", "tool_use"]


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def test_a_vocabulary_under_a_name_that_only_the_tokenizer_knows(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    (source.path / "words.bin").write_text("words")
    assert source.path / "words.bin" not in beside.kept(source.path)
    assert source.path / "words.bin" in beside.kept(source.path, ["words.bin", None])


def test_stock_reads_what_was_handed_on(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, name="source", rope_theta=5000.0, tie_word_embeddings=False)
    want, _ = load_model(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    source = resolve(str(folder))
    export(source, uniform(source), tmp_path / "out")
    nn.quantize(want, 64, 4)
    got, _ = load_model(tmp_path / "out")
    assert mx.array_equal(got(TOKENS), want(TOKENS))


def test_weights_are_released_one_by_one(tmp_path: Path) -> None:
    """Peak memory grows with the largest tensor, not with the model."""
    folder = tiny_folder(tmp_path, name="source", num_hidden_layers=24, intermediate_size=512)
    source = resolve(str(folder))
    loaded = load(source)
    plan = uniform(source)
    largest = max(v.nbytes for _, v in tree_flatten(loaded.model.parameters()))
    total = sum(v.nbytes for _, v in tree_flatten(loaded.model.parameters()))
    assert total > 30 * largest
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in export_module._tensors(loaded, plan, MINMAX):
        pass
    assert mx.get_peak_memory() - before < 6 * largest
