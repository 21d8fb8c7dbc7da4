"""Vision and audio weights of a source: kept byte for byte, in 8 bits, or dropped; all counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import optiq
from optiq.errors import UsageError
from optiq.quantize.convert import convert
from optiq.quantize.export import export
from optiq.sources import Source, resolve
from optiq.sources.folder import check_folder
from tests.families.table import family_folder
from tests.planned import scores_of
from tests.scored import build
from tests.tiny import tiny_folder

TOKENS = mx.array([[1, 5, 9, 200, 17, 33, 4]])
MATRIX = "model.vision_tower.encoder.layers.0.mlp.up_proj.linear.weight"
# As Gemma 4 has them: some are not matrices, a bound may be infinite.
SHAPES: dict[str, tuple[int, ...]] = {
    MATRIX: (96, 64),
    "model.vision_tower.patch_embedder.position_embedding_table": (2, 10, 64),
    "model.vision_tower.encoder.layers.0.input_layernorm.weight": (64,),
    "model.vision_tower.encoder.layers.0.mlp.up_proj.output_max": (),
    "model.audio_tower.layers.0.lconv1d.depthwise_conv1d.weight": (64, 1, 5),
    "model.embed_vision.embedding_projection.weight": (64, 96),
}


def gemma4(parent: Path, dtype: mx.Dtype = mx.float32) -> tuple[Source, dict[str, mx.array]]:
    """A tiny Gemma 4 with pieces of towers, and these."""
    folder = family_folder(parent, "gemma4")
    file = folder / "model.safetensors"
    weights: Any = mx.load(str(file))
    text = {
        name.replace("language_model.model.", "model.language_model."): array
        for name, array in weights.items()
    }
    media = {
        name: mx.random.normal(shape, key=mx.random.key(i)).astype(dtype)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    media["model.vision_tower.encoder.layers.0.mlp.up_proj.output_max"] = mx.array(mx.inf, dtype)
    mx.save_safetensors(str(file), text | media, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"vision_config": {"hidden_size": 64}, "audio_config": None}
    (folder / "config.json").write_text(json.dumps(config))
    return resolve(str(folder)), media


def stored(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in folder.glob("model*.safetensors"):
        found |= mx.load(str(file))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_towers_are_kept_byte_for_byte(tmp_path: Path, dtype: mx.Dtype) -> None:
    source, media = gemma4(tmp_path, dtype)
    plan = build(scores_of(source), "5.3bpw")
    out = tmp_path / "out"
    export(source, plan, out)
    files = stored(out)
    for name, array in media.items():
        kept = files.pop(name.removeprefix("model."))
        assert kept.dtype == array.dtype
        assert mx.array_equal(kept, array)
    model, config = load_model(out)  # stock, strictly
    assert files.keys() == dict(tree_flatten(model.parameters())).keys()
    assert config["vision_config"] == {"hidden_size": 64}
    assert "audio_config" in config
    assert plan.model.tower_bytes == sum(array.nbytes for array in media.values())
    # Without towers the language model is the same to the bit.
    export(replace(source, towers=None), replaced(plan), tmp_path / "text")
    np.testing.assert_array_equal(model(TOKENS), load_model(tmp_path / "text")[0](TOKENS))
    assert "vision_config" not in json.loads((tmp_path / "text" / "config.json").read_text())
    # What was exported is a source again, as far as reading goes.
    assert resolve(str(out)).towers == replace(
        source.towers, tensors=resolve(str(out)).towers.tensors
    )


def replaced(plan: Any) -> Any:
    return replace(plan, model=replace(plan.model, tower_bytes=0))


def test_towers_in_8_bits(tmp_path: Path) -> None:
    source, media = gemma4(tmp_path)
    assert source.towers
    source = replace(source, towers=source.towers.rounded())
    plan = build(scores_of(source), "uniform4")
    out = tmp_path / "out"
    export(source, plan, out)
    files = stored(out)
    config = json.loads((out / "config.json").read_text())
    for name, array in media.items():
        name = name.removeprefix("model.")
        path = name.removesuffix(".weight")
        if array.ndim == 2 and array.shape[-1] == 64:
            entry = config["quantization"][path]
            assert entry == {"bits": 8, "group_size": 64, "mode": "affine"}
            parts = (files[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
            back = mx.dequantize(*parts, bits=8, group_size=64)
            step = (array.max(-1) - array.min(-1)).max().item() / 255
            assert mx.abs(back - array).max().item() <= step
        else:
            assert mx.array_equal(files[name], array)
            assert path not in config["quantization"]
    names = {name.removeprefix("model.") for name in media}
    held = [a.nbytes for n, a in files.items() if not n.startswith("language_model.")]
    assert plan.model.tower_bytes == sum(held)
    assert names <= files.keys()


def test_a_size_in_bytes_is_that_of_the_weight_files(tmp_path: Path) -> None:
    source, media = gemma4(tmp_path)
    bare = replace(source, towers=None)
    scores, alone = scores_of(source), scores_of(bare)
    nbytes = 400_000
    plan = build(scores, f"{nbytes}B")
    export(source, plan, tmp_path / "out")
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) <= nbytes
    less = build(alone, f"{nbytes}B").budget - plan.budget
    assert less >= sum(array.nbytes for array in media.values())
    assert build(scores, "5bpw").nbytes == build(alone, "5bpw").nbytes


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    text = str(tiny_folder(tmp_path))
    with pytest.raises(UsageError, match="has no vision or audio weights; leave --towers 8bit out"):
        convert(text, tmp_path / "out", towers="8bit", progress=False)
    source, _ = gemma4(tmp_path)
    assert source.towers
    with pytest.raises(UsageError, match=r"not known to load in mlx-vlm for kimi_vl; use --towers"):
        replace(source.towers, model_type="kimi_vl").rounded()


def test_towers_that_mlx_lm_would_stumble_over_are_left_out(tmp_path: Path) -> None:
    """MLX reads 8-bit floats as integers, so they could not be written as they are."""
    source, _ = gemma4(tmp_path)
    file = source.path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header["model.audio_tower.layers.0.lconv1d.depthwise_conv1d.weight"]
    entry |= {"dtype": "F8_E4M3", "shape": [64, 4, 5]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    towers = resolve(str(source.path)).towers
    assert towers is not None
    assert not towers.tensors
    assert len(check_folder(source.path).files[file.name]) == len(header) - 1


@pytest.mark.parametrize("rounded", [False, True])
def test_a_card_counts_towers(
    tmp_path: Path, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source, _ = gemma4(tmp_path)
    assert source.towers
    if rounded:
        source = replace(source, towers=source.towers.rounded())
    plan = build(scores_of(source), "uniform4")
    out = tmp_path / "out"
    export(source, plan, out)
    text = optiq.card(out).path.read_text()
    assert f"{plan.nbytes:,} bytes of tensors" in text
    assert f"{plan.model.tower_bytes:,} bytes of vision and audio weights" in text
    lost = stored(out)
    del lost["vision_tower.encoder.layers.0.input_layernorm.weight"]
    for file in out.glob("model*"):
        file.unlink()
    mx.save_safetensors(str(out / "model.safetensors"), lost, {"format": "mlx"})
    with pytest.raises(UsageError, match="is not the plan of the weights beside it"):
        optiq.card(out)
