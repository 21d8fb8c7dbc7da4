"""GGUF to folder: the converted model computes what the original, or its rounding, computes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optiq.errors import SourceError
from optiq.sources import load, resolve
from optiq.sources.gguf.config import llama3_divisors
from optiq.sources.gguf.convert import to_bfloat16
from tests.sources.gguf.files import gguf_name, numpy_weights, rounded, write_gguf
from tests.tiny import EOS, tiny_folder

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
TOKENS = mx.array([[1, 40, 300, 77, 12, 200, 199, 61, 5, 90, 33, 21, 18, 250, 111]])


def stock_logits(folder: Path, weights: dict[str, mx.array] | None = None) -> np.ndarray:
    """The folder in stock mlx-lm, with other weights if given: float32 [1, tokens, vocab]."""
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    if weights:
        model.load_weights(list(weights.items()))
    return np.array(model(TOKENS).astype(mx.float32))


def converted(path: Path, cache: Path) -> tuple[Path, np.ndarray]:
    source = resolve(str(path), cache_dir=cache)
    assert (source.kind, source.revision) == ("gguf", None)
    logits = load(source).model(TOKENS)
    return source.path, np.array(logits.astype(mx.float32))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"attention_bias": True, "head_dim": 32}),
        ("llama", {"rope_scaling": LINEAR}),
        ("llama", {"rope_scaling": YARN}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": False}),
        ("gemma3_text", {}),
        ("gemma3_text", {"rope_scaling": LINEAR}),
        ("gemma3_text", {"num_hidden_layers": 7, "sliding_window_pattern": 6}),
        # As many blocks as Gemma 3 27B, whose queries are scaled by another rule.
        ("gemma3_text", {"num_hidden_layers": 62, "query_pre_attn_scalar": 16}),
    ],
)
def test_float32_file_gives_the_original_logits(
    tmp_path: Path, kind: str, config: dict[str, object]
) -> None:
    folder = tiny_folder(tmp_path, kind, seed=5, **config)
    # llama.cpp's own files leave out gemma's usual period of six.
    usual = config.get("sliding_window_pattern") == 6
    drop = ("gemma3.attention.sliding_window_pattern",) if usual else ()
    path = write_gguf(folder, tmp_path / "m.gguf", drop=drop)
    out, logits = converted(path, tmp_path / "cache")
    np.testing.assert_allclose(logits, stock_logits(folder), rtol=0, atol=1e-5)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"


def parts_of(parent: Path, **how: object) -> list[Path]:
    """A tiny model in parts of nine tensors, as the gguf package writes them."""
    write_gguf(tiny_folder(parent), parent / "m.gguf", split=9, **how)  # type: ignore[arg-type]
    return sorted(parent.glob("m-*.gguf"))


@pytest.mark.parametrize("type_name", ["F32", "Q8_0"])
def test_a_split_file_is_one_model_whichever_part_is_given(tmp_path: Path, type_name: str) -> None:
    parts = parts_of(tmp_path, kind=type_name)
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = write_gguf(tmp_path / "llama", tmp_path / "whole.gguf", type_name)
    _, want = converted(whole, tmp_path / "cache")
    for part in parts:
        _, logits = converted(part, tmp_path / "cache")
        np.testing.assert_array_equal(logits, want)


def _gone(parts: list[Path]) -> Path:
    parts[1].unlink()
    return parts[2]


def _renamed(parts: list[Path]) -> Path:
    return parts[0].rename(parts[0].with_name("first.gguf"))


def _other(parts: list[Path]) -> Path:
    parts[1].write_bytes(parts[2].read_bytes())
    return parts[1]


def _cut(parts: list[Path]) -> Path:
    os.truncate(parts[2], parts[2].stat().st_size - 64)
    return parts[2]


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (_gone, "m-00002-of-00003.gguf is not beside it; download it"),
        (_renamed, "one of 3 parts"),
        (_other, "says that it is part 2 of 3; download all parts again"),
        (_cut, "m-00003-of-00003.gguf is not a complete GGUF file"),
    ],
)
def test_a_split_file_that_is_not_whole_is_refused(
    tmp_path: Path, break_: Callable[[list[Path]], Path], message: str
) -> None:
    given = break_(parts_of(tmp_path))
    assert_refused(given, tmp_path / "cache", message)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_other_types_give_the_dequantized_weights_in_bfloat16(
    tmp_path: Path, kind: str, type_name: str
) -> None:
    folder = tiny_folder(tmp_path, kind, seed=6)
    expected = {
        name: mx.array(rounded(w, type_name)).astype(mx.bfloat16)
        for name, w in numpy_weights(folder).items()
    }
    path = write_gguf(folder, tmp_path / "m.gguf", type_name)
    out, logits = converted(path, tmp_path / "cache")
    stored = mx.load(str(out / "model.safetensors"))
    assert stored.keys() == expected.keys()
    for name, weight in stored.items():
        assert weight.dtype == mx.bfloat16
        # A gemma norm w is stored as the float32 sum 1 + w.
        atol = 2.0**-10 if kind == "gemma3_text" and "norm" in name else 0
        np.testing.assert_allclose(
            np.array(weight.astype(mx.float32)),
            np.array(expected[name].astype(mx.float32)),
            rtol=0,
            atol=atol,
            err_msg=name,
        )
    if kind != "gemma3_text":
        np.testing.assert_array_equal(logits, stock_logits(folder, expected))


def test_rows_are_dequantized_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path)
    path = write_gguf(folder, tmp_path / "m.gguf")
    _, whole = converted(path, tmp_path / "a")
    monkeypatch.setattr("optiq.sources.gguf.convert.CHUNK_ELEMENTS", 100)
    _, pieces = converted(path, tmp_path / "b")
    np.testing.assert_array_equal(whole, pieces)


@pytest.mark.parametrize("head_kind", ["F32", "BF16"])
def test_an_embedding_stored_twice_is_tied_and_the_better_one_kept(
    tmp_path: Path, head_kind: str
) -> None:
    folder = tiny_folder(tmp_path)
    embedding = numpy_weights(folder)["model.embed_tokens.weight"]
    extra = {"output.weight": (embedding, head_kind)}
    path = write_gguf(folder, tmp_path / "m.gguf", "Q8_0", extra=extra)
    out, _ = converted(path, tmp_path / "cache")
    stored = mx.load(str(out / "model.safetensors"))
    assert "lm_head.weight" not in stored
    kept = mx.array(embedding).astype(mx.bfloat16)
    assert mx.array_equal(stored["model.embed_tokens.weight"], kept)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_llama3_rope_divisors_become_the_config_that_makes_them(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = tiny_folder(tmp_path, head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    divisors = llama3_divisors(64, 500000.0, scaling).astype(np.float32)
    assert (divisors.min(), divisors.max()) == (1, 32)
    extra = {"rope_freqs.weight": (divisors, "F32")}
    out, logits = converted(
        write_gguf(folder, tmp_path / "m.gguf", extra=extra), tmp_path / "cache"
    )
    np.testing.assert_allclose(logits, stock_logits(folder), rtol=0, atol=1e-5)
    assert json.loads((out / "config.json").read_text())["rope_scaling"] == scaling
    extra = {"rope_freqs.weight": (divisors * np.linspace(1, 2, 32, dtype=np.float32), "F32")}
    with pytest.raises(SourceError, match="not the scaling of Llama"):
        resolve(str(write_gguf(folder, tmp_path / "n.gguf", extra=extra)), cache_dir=tmp_path)


def test_token_ids_and_end_of_turn(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    set_ = {"tokenizer.ggml.eos_token_id": 0}
    source = resolve(
        str(write_gguf(folder, tmp_path / "m.gguf", set_=set_)), cache_dir=tmp_path / "cache"
    )
    ids = json.loads((source.path / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 1, "eos_token_id": [0, EOS], "pad_token_id": 0}
    loaded = load(source)
    assert loaded.tokenizer.eos_token_ids == {0, EOS}
    assert loaded.config["eos_token_id"] == [0, EOS]


def test_a_file_is_converted_once(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    path = write_gguf(folder, tmp_path / "m.gguf")
    first = resolve(str(path), cache_dir=tmp_path / "cache")
    weights = first.path / "model.safetensors"
    made = weights.stat().st_mtime_ns
    assert resolve(str(path), cache_dir=tmp_path / "cache") == first
    assert weights.stat().st_mtime_ns == made
    # A cut-off copy in the cache is made again.
    os.truncate(weights, 100)
    assert resolve(str(path), cache_dir=tmp_path / "cache") == first
    # Another file under the same name is another model.
    write_gguf(tiny_folder(tmp_path, seed=1, name="other"), path)
    assert resolve(str(path), cache_dir=tmp_path / "cache").path != first.path


def test_the_cache_folder_is_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTIQ_CACHE", str(tmp_path / "c"))
    path = write_gguf(tiny_folder(tmp_path), tmp_path / "m.gguf")
    assert resolve(str(path)).path.parent == tmp_path / "c" / "gguf"


def _nan(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-4] + np.float32("nan").tobytes())


FAULTS = {
    "no GGUF": (lambda p: p.write_bytes(b"PK" * 100), "start with GGUF"),
    "empty": (lambda p: p.write_bytes(b""), "0 bytes"),
    "cut in the directory": (lambda p: os.truncate(p, 2000), "ends within its directory"),
    "cut in the tensors": (lambda p: os.truncate(p, p.stat().st_size - 64), "ends at byte"),
    "NaN": (_nan, "NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_one_clear_error_and_leaves_nothing(tmp_path: Path, fault: str) -> None:
    break_, message = FAULTS[fault]
    path = write_gguf(tiny_folder(tmp_path), tmp_path / "m.gguf")
    break_(path)
    assert_refused(path, tmp_path / "cache", message)


@pytest.mark.parametrize(
    ("set_", "drop", "message"),
    [
        ({"general.architecture": "mamba"}, (), "'mamba' is not supported"),
        (
            {"split.count": 3},
            (),
            "one of 3 parts; give them the names that llama-gguf-split writes",
        ),
        ({"llama.expert_count": 8}, (), "8 experts"),
        ({"llama.logit_scale": 0.25}, (), "llama.logit_scale 0.25 changes the model"),
        ({"llama.final_logit_softcapping": 30.0}, (), "llama.final_logit_softcapping 30.0"),
        ({"llama.attention.sliding_window": 64}, (), "a window of 64 tokens"),
        ({"llama.rope.dimension_count": 8}, (), "rope.dimension_count"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, (), "longrope"),
        ({"llama.block_count": 3}, (), "blk.2.attn_norm.weight' is missing"),
        ({"llama.block_count": 1}, (), "is not part of a llama model"),
        ({"llama.attention.head_count_kv": [2, 1]}, (), "head_count_kv"),
        ({"tokenizer.ggml.model": "t5"}, (), "'t5'"),
        ({"tokenizer.ggml.pre": "chameleon"}, (), "pre-tokenizer 'chameleon'"),
        ({"tokenizer.ggml.eos_token_id": 384}, (), "eos_token_id 384"),
        ({}, ("llama.context_length",), "context_length"),
        ({}, ("blk.1.ffn_up.weight",), "blk.1.ffn_up.weight' is missing"),
        ({}, ("tokenizer.ggml.tokens",), "no tokens"),
        ({}, ("tokenizer.ggml.merges",), "no merges"),
    ],
)
def test_what_is_not_understood_is_refused(
    tmp_path: Path, set_: dict[str, object], drop: tuple[str, ...], message: str
) -> None:
    path = write_gguf(tiny_folder(tmp_path), tmp_path / "m.gguf", set_=set_, drop=drop)
    assert_refused(path, tmp_path / "cache", message)


def test_a_tensor_type_that_cannot_be_dequantized_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    path = write_gguf(folder, tmp_path / "m.gguf")
    data = path.read_bytes()
    name = gguf_name("model.layers.1.mlp.up_proj.weight", "llama").encode()
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert data[at : at + 4] == bytes(4)  # F32
    path.write_bytes(data[:at] + (26).to_bytes(4, "little") + data[at + 4 :])  # I32
    assert_refused(path, tmp_path / "cache", "type I32")
    path.write_bytes(data[:at] + (999).to_bytes(4, "little") + data[at + 4 :])
    assert_refused(path, tmp_path / "cache", "type number 999")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write_gguf(tiny_folder(tmp_path), tmp_path / "m.gguf")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SourceError, match="OPTIQ_CACHE"):
        resolve(str(path), cache_dir=tmp_path / "cache")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    return write_gguf(tiny_folder(folder, num_hidden_layers=1), folder / "m.gguf")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_directory_is_never_another_exception(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(sound.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 12000))
        content[at] = data.draw(st.integers(0, 255))
    (folder / "m.gguf").write_bytes(content)
    message = None
    try:
        resolve(str(folder / "m.gguf"), cache_dir=folder / "cache")
    except SourceError as error:
        message = str(error)
    left = [*folder.glob("cache/gguf/*"), *folder.glob("cache/gguf/.*")]
    assert len(left) == (1 if message is None else 0)
    assert "\n" not in (message or "")


@given(st.integers(0, 2**32 - 1).map(np.uint32))
def test_bfloat16_rounding_is_mlx_rounding(bits: np.uint32) -> None:
    value = np.array([bits]).view(np.float32)
    if np.isfinite(value).all():
        expected = np.array(mx.array(value).astype(mx.bfloat16).view(mx.uint16))
        np.testing.assert_array_equal(to_bfloat16(value), expected)


def assert_refused(path: Path, cache: Path, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        resolve(str(path), cache_dir=cache)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert path.name in text
    assert not list(cache.glob("gguf/*"))
    assert not list(cache.glob("gguf/.*"))
