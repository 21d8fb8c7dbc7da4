"""Local folders: what is found, what is refused early and how, and what the fingerprint sees."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from optiq.errors import SourceError
from optiq.sources import resolve
from optiq.sources.folder import SAMPLE, SAMPLES
from optiq.sources.safetensors import DTYPE_BITS, read_header
from tests.tiny import KINDS, tiny_folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change config.json; a value of None takes the key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def refused(name: str | Path, **options: Any) -> str:
    """The one line with which `name` is refused."""
    with pytest.raises(SourceError) as caught:
        resolve(str(name), **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(name) in text
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_folder_is_taken_as_it_is(tmp_path: Path, kind: str) -> None:
    folder = tiny_folder(tmp_path, kind, shards=2)
    source = resolve(str(folder))
    assert (source.name, source.kind, source.path) == (str(folder), "folder", folder)
    assert source.revision is None


def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no folder nothing-here; a hub id is written organisation/model" in refused(
        "nothing-here"
    )
    assert "there is no folder" in refused("/no/such/folder")
    assert "there is no folder" in refused("../org/name")
    assert "no file" in refused("missing.gguf")
    Path("notes.txt").write_text("x")
    assert "is a file" in refused("notes.txt")


def test_a_revision_of_a_local_model_is_refused(tmp_path: Path) -> None:
    assert "only applies to a hub id" in refused(tiny_folder(tmp_path), revision="main")


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/llama").path == folder


def _move_weights(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


def _only_gguf(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "no model_type": (lambda f: edit_config(f, model_type=None), "no model_type"),
    "unknown model": (lambda f: edit_config(f, model_type="rocket"), "'rocket' is not in mlx-lm 0"),
    "odd model_type": (lambda f: edit_config(f, model_type="..llama"), "is not in mlx-lm"),
    "own code": (lambda f: edit_config(f, model_file="m.py"), "never runs code"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "download the weights"),
    "a GGUF": (lambda f: _move_weights(f, "m.gguf"), "m.gguf: give the .gguf file itself"),
    "PyTorch": (lambda f: _move_weights(f, "model.bin"), "convert the PyTorch weights"),
    "a GGUF alone": (_only_gguf, "model-Q4_K_M.gguf: give the .gguf file itself"),
    "Mistral's names": (lambda f: _move_weights(f, "consolidated.safetensors"), "download model*"),
    "other name": (lambda f: _move_weights(f, "w.safetensors"), "w.safetensors: rename"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 9000), "corrupt or truncated"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_folder_is_one_clear_line(tmp_path: Path, fault: str) -> None:
    folder = tiny_folder(tmp_path)
    break_, message = FAULTS[fault]
    break_(folder)
    assert message in refused(folder)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E4M3FNUZ", "F64", "F3_NEXT"])
def test_a_dtype_that_mlx_does_not_read_is_no_damage(tmp_path: Path, dtype: str) -> None:
    folder = tiny_folder(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight_packed"
    entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, DTYPE_BITS.get(dtype, 3)]}
    header = json.dumps({name: entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(entry["data_offsets"][1])
    (folder / "model-extra.safetensors").write_bytes(data)
    message = refused(folder)
    assert f"{name!r} has the" in message
    assert dtype in message
    assert "give the model with float32, float16 or bfloat16 weights" in message
    assert "corrupt" not in message


SHARD = "model-00002-of-00003.safetensors"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, shards=3)
    (folder / SHARD).unlink()
    assert f"lacks the shard {SHARD}" in refused(folder)


def test_a_shard_without_its_tensor_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, shards=3)
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / SHARD)
    assert f"{SHARD} lacks tensor" in refused(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    folder = tiny_folder(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json cannot be read" in refused(folder)


def test_every_module_of_mlx_lm_is_a_known_architecture(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    for model_type in ("mistral", "lfm2-vl", "phi-msft"):  # remapped, or with a hyphen
        edit_config(folder, model_type=model_type)
        resolve(str(folder))


def test_the_fingerprint_sees_config_and_headers(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    first = resolve(str(folder)).fingerprint
    assert len(first) == 64
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert resolve(str(copy)).fingerprint == first
    (copy / "generation_config.json").unlink()
    assert resolve(str(copy)).fingerprint == first
    edit_config(copy, rope_theta=20000.0)
    assert resolve(str(copy)).fingerprint != first
    other = tiny_folder(tmp_path, name="other", dtype="bfloat16")
    shutil.copy(folder / "config.json", other)
    assert resolve(str(other)).fingerprint != first
    named = Path(shutil.copytree(folder, tmp_path / "named"))
    weights = mx.load(str(named / "model.safetensors"))
    weights["model.norm.weights"] = weights.pop("model.norm.weight")
    mx.save_safetensors(str(named / "model.safetensors"), weights)
    assert resolve(str(named)).fingerprint != first


def test_the_fingerprint_sees_values(tmp_path: Path) -> None:
    """Of every tensor, also of one that is too large to be read whole."""
    folder = tiny_folder(tmp_path)
    first = resolve(str(folder)).fingerprint
    file = folder / "model.safetensors"
    header, sound = read_header(file), file.read_bytes()
    base = len(sound) - max(t.end for t in header.values())
    assert max(t.end - t.begin for t in header.values()) > SAMPLE * SAMPLES
    for name, tensor in header.items():
        where = slice(base + tensor.begin, base + tensor.end)
        changed = bytes(byte ^ 1 for byte in sound[where])
        file.write_bytes(sound[: where.start] + changed + sound[where.stop :])
        assert resolve(str(folder)).fingerprint != first, name
    file.write_bytes(sound)
    assert resolve(str(folder)).fingerprint == first
