"""Loading: stock mlx-lm classes, weights left on disk, and one clear line for what fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import convert as stock_convert
from mlx_lm.utils import load_model, quantize_model, save_model

from optiq.errors import SourceError
from optiq.sources import check_finite, load, resolve
from optiq.sources.loading import CHECKED
from tests.families.table import family_folder
from tests.tiny import BOS, EOS, KINDS, tiny_folder, write_tokenizer

TOKENS = mx.array([[1, 40, 300, 77, 12]])


def refused(folder: Path, **options: Any) -> str:
    source = resolve(str(folder))
    with pytest.raises(SourceError) as caught:
        load(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_stock_model(tmp_path: Path, kind: str) -> None:
    folder = tiny_folder(tmp_path, kind, shards=2)
    stock, config = load_model(folder)
    loaded = load(resolve(str(folder)))
    assert type(loaded.model) is type(stock)
    assert loaded.config == config
    assert loaded.dtype == mx.float32
    np.testing.assert_array_equal(loaded.model(TOKENS), stock(TOKENS))
    assert loaded.tokenizer.encode("Hello")[0] == BOS
    assert loaded.tokenizer.eos_token_ids == {EOS}


def test_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, dtype="bfloat16")
    path = str(folder / "model.safetensors")
    weights = mx.load(path)
    norms = {n: w.astype(mx.float32) for n, w in weights.items() if "norm" in n}
    mx.save_safetensors(path, {**weights, **norms})
    assert load(resolve(str(folder))).dtype == mx.bfloat16


@pytest.mark.parametrize("named", ["bfloat16", "float16", "float32", None])
def test_what_is_converted_has_the_dtype_that_mlx_lm_gives_it(
    tmp_path: Path, named: str | None
) -> None:
    folder = tiny_folder(tmp_path, name="source", torch_dtype=named)
    source = resolve(str(folder))
    stock_convert(str(folder), str(tmp_path / "stock"))
    stock, _ = load_model(tmp_path / "stock")
    ours = dict(tree_flatten(load(source).model.parameters()))
    for name, array in tree_flatten(stock.parameters()):
        assert ours[name].dtype == array.dtype
        assert mx.array_equal(ours[name], array)
    kept = load(source, allow_quantized=True).model.parameters()
    assert {array.dtype for _, array in tree_flatten(kept)} == {mx.float32}  # what runs as it is


def test_a_model_file_that_exits_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "olmo"}))
    assert "To run olmo install ai2-olmo" in refused(folder)
    assert capsys.readouterr().out == ""


def test_a_model_file_that_skips_the_constructor_can_be_frozen(tmp_path: Path) -> None:
    model = load(resolve(str(family_folder(tmp_path, "recurrent_gemma")))).model
    model.freeze()
    assert tree_flatten(model.trainable_parameters()) == []


def test_weights_stay_on_disk_until_used(tmp_path: Path) -> None:
    big = {"hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 8}
    folder = tiny_folder(tmp_path, head_dim=16, **big)
    assert (folder / "model.safetensors").stat().st_size > 50e6
    source = resolve(str(folder))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    loaded = load(source)
    assert mx.get_peak_memory() - before < 1e6
    check_finite("norm", loaded.model.model.norm.weight)
    assert mx.get_peak_memory() - before < 1e6


def quantized_folder(tmp_path: Path) -> Path:
    """A tiny model as stock mlx-lm quantizes it."""
    folder = tiny_folder(tmp_path, name="original")
    model, config = load_model(folder)
    model, config = quantize_model(model, config, group_size=64, bits=4)
    out = tmp_path / "quantized"
    save_model(out, model)
    (out / "config.json").write_text(json.dumps(config))
    write_tokenizer(out)
    return out


def test_a_quantized_model_is_only_taken_where_allowed(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path)
    assert "already quantized (affine 4-bit); give the unquantized original" in refused(folder)
    loaded = load(resolve(str(folder)), allow_quantized=True)
    assert loaded.dtype == mx.float32
    stock, _ = load_model(folder)
    np.testing.assert_array_equal(loaded.model(TOKENS), stock(TOKENS))


def configured(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewritten(folder: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    path = str(folder / "model.safetensors")
    weights = {name: mx.array(w) for name, w in mx.load(path).items()}
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(path, weights)


def packed(folder: Path) -> None:
    """Packed weights beside the others, in a form that no loading would reach."""
    name = "model.layers.0.mlp.up_proj.weight_packed"
    rewritten(folder, lambda weights: weights.update({name: mx.zeros(8, dtype=mx.uint8)}))


STALE = [
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
    {"quantization_config": {"load_in_4bit": True}},
    {"quantization": {"group_size": 64, "bits": 4}},
    {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0",
                             "weight_block_size": [32, 32]}},
]  # fmt: skip


@pytest.mark.parametrize("stale", STALE, ids=range(len(STALE)))
def test_dense_weights_beside_a_stale_quantization_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stale: dict[str, Any]
) -> None:
    folder = tiny_folder(tmp_path, dtype="bfloat16")
    want = load_model(folder)[0](TOKENS)
    configured(folder, **stale)
    loaded = load(resolve(str(folder)))
    np.testing.assert_array_equal(loaded.model(TOKENS).astype(mx.float32), want.astype(mx.float32))
    assert not loaded.config.get("quantization")
    said = capsys.readouterr().err.strip()
    if "fp8" not in str(stale):
        assert said.startswith(f"optiq: {folder}: config.json says ")
        assert "\n" not in said


def test_a_bitnet_of_plain_weights_is_refused(tmp_path: Path) -> None:
    """It rounds them while it runs."""
    folder = tiny_folder(tmp_path)
    configured(folder, quantization_config={"quant_method": "bitnet"})
    assert "already quantized (bitnet)" in refused(folder)


@pytest.mark.parametrize("name", ["in [4bit]", "a*b", "what?"])
def test_a_path_that_looks_like_a_pattern(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path, name=name)
    want = load_model(tiny_folder(tmp_path))[0](TOKENS)
    np.testing.assert_array_equal(load(resolve(str(folder))).model(TOKENS), want)


@pytest.mark.parametrize(
    "method",
    ["gptq", "awq", "bitsandbytes", "mxfp4", "modelopt", "bitnet", "hqq"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_every_declared_method_is_refused(tmp_path: Path, method: str, nested: bool) -> None:
    folder = tiny_folder(tmp_path)
    packed(folder)
    declared = {"quantization_config": {"quant_method": method, "bits": 4}}
    configured(folder, **({"text_config": declared} if nested else declared))
    said = f"is already quantized ({method}); give the unquantized original model"
    assert said in refused(folder)


def test_where_quantization_is_allowed_mlx_lm_decides(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    configured(folder, quantization_config={"quant_method": "bitsandbytes"})
    load(resolve(str(folder)), allow_quantized=True)
    configured(folder, quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    assert "Unsupported modelopt quant_algo: FP8" in refused(folder, allow_quantized=True)


@pytest.mark.parametrize("declared", [{"load_in_4bit": True}, [4], "4-bit"])
def test_a_quantization_without_a_method_is_refused(tmp_path: Path, declared: Any) -> None:
    folder = tiny_folder(tmp_path)
    packed(folder)
    configured(folder, quantization_config=declared)
    assert "already quantized (by an unnamed method)" in refused(folder)


@pytest.mark.parametrize("nothing", [None, {}])
def test_an_empty_declaration_declares_nothing(tmp_path: Path, nothing: Any) -> None:
    folder = tiny_folder(tmp_path)
    configured(folder, quantization_config=nothing)
    load(resolve(str(folder)))


def test_the_file_of_modelopt_is_seen(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    packed(folder)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    assert "already quantized (modelopt)" in refused(folder)


@pytest.mark.parametrize(("suffix", "method"), [("g_idx", "gptq"), ("qweight", "packed weights")])
def test_packed_weights_without_a_declaration_are_refused(
    tmp_path: Path, suffix: str, method: str
) -> None:
    folder = tiny_folder(tmp_path)
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    rewritten(folder, lambda weights: weights.update({name: mx.zeros(8, dtype=mx.int32)}))
    assert f"already quantized ({method})" in refused(folder)


def test_fp8_is_taken_where_it_is_what_it_says(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    configured(folder, quantization_config={"quant_method": "fp8"})
    load(resolve(str(folder)))  # as after mlx-lm's own conversion: the weights are floats
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    rewritten(folder, lambda weights: weights.update({name: mx.ones((1, 1))}))
    assert "(fp8) but model.layers.0.mlp.up_proj.weight holds" in refused(folder)


@pytest.mark.parametrize("dtype", [mx.uint8, mx.int32])
@pytest.mark.parametrize("module", ["model.layers.1.mlp.up_proj", "model.embed_tokens"])
def test_a_weight_of_integers_is_named(tmp_path: Path, dtype: mx.Dtype, module: str) -> None:
    folder = tiny_folder(tmp_path)
    name = f"{module}.weight"
    rewritten(folder, lambda weights: weights.update({name: weights[name].astype(dtype)}))
    said = f"the weight {name} of {folder} holds {str(dtype).removeprefix('mlx.core.')}"
    assert said in refused(folder)


def test_what_mlx_lm_refuses_is_one_line(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, name="shape")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    assert "cannot load" in refused(folder)
    del config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "num_hidden_layers" in refused(folder)
    folder = tiny_folder(tmp_path, name="missing")
    path = str(folder / "model.safetensors")
    weights = mx.load(path)
    weights.pop("model.norm.weight")
    mx.save_safetensors(path, weights)
    assert "model.norm.weight" in refused(folder)


@pytest.mark.parametrize("text", ["{", '{"version": "1.0"}', '{"model": 3}'])
def test_a_broken_tokenizer_is_one_line(tmp_path: Path, text: str) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "tokenizer.json").write_text(text)
    assert f"the tokenizer of {folder} cannot be loaded" in refused(folder)


def test_a_config_that_transformers_does_not_take_is_not_the_tokenizers_fault(
    tmp_path: Path,
) -> None:
    folder = tiny_folder(tmp_path, tie_word_embeddings=False)
    configured(folder, tie_word_embeddings=None)
    assert f"the config.json of {folder} is not valid" in refused(folder)


def test_a_tokenizer_with_its_own_code_is_refused_without_asking(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]},
    }
    path.write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    said = refused(folder)
    assert "needs the model's own code (own.OwnTokenizer), which optiq never runs" in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_weight_that_is_not_finite_is_named(value: float, dtype: mx.Dtype) -> None:
    weight = mx.zeros((4, 8), dtype=dtype)
    check_finite("model.layers.3.w", weight)
    weight[2, 5] = value
    with pytest.raises(SourceError, match=r"model\.layers\.3\.w holds NaN or infinite"):
        check_finite("model.layers.3.w", weight)


def test_packed_codes_are_always_finite() -> None:
    check_finite("w", mx.full((4,), 2**32 - 1, dtype=mx.uint32))


def test_a_weight_is_checked_in_less_memory_than_it_takes() -> None:
    weight = mx.zeros((3 * CHECKED + 1,), mx.bfloat16)
    mx.eval(weight)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    check_finite("w", weight)
    assert mx.get_peak_memory() - before < weight.nbytes // 2
    weight[-1] = mx.nan
    with pytest.raises(SourceError, match="the weight w holds NaN"):
        check_finite("w", weight)
