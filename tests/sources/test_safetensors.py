"""The header check takes what the safetensors library writes and never raises anything else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save, save_file

from optiq.errors import SourceError
from optiq.sources.safetensors import encode_header, read_header

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(4, dtype=np.int16),
    "scalar": np.array(3.0),
    "none": np.zeros((0, 4), np.float16),
}


def file_of(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "t.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", "np") as file:
        assert set(header) == set(file.keys())
        for name, info in header.items():
            part = file.get_slice(name)
            assert (info.dtype, list(info.shape)) == (part.get_dtype(), part.get_shape())


def test_reads_what_mlx_writes(tmp_path: Path) -> None:
    dtypes = [mx.bfloat16, mx.float16, mx.float32, mx.uint32, mx.uint8, mx.bool_]
    mx.save_safetensors(
        str(tmp_path / "t.safetensors"), {str(d): mx.zeros((3, 5), dtype=d) for d in dtypes}
    )
    header = read_header(tmp_path / "t.safetensors")
    assert {info.dtype for info in header.values()} == {"BF16", "F16", "F32", "U32", "U8", "BOOL"}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {"x": ("F32", (2, 3)), "y": ("BF16", (5,))}
    data = np.arange(6, dtype=np.float32)
    (tmp_path / "t.safetensors").write_bytes(
        encode_header(tensors, {"format": "pt"}) + data.tobytes() + bytes(10)
    )
    with safe_open(tmp_path / "t.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(file.get_tensor("x"), data.reshape(2, 3))
    loaded = mx.load(str(tmp_path / "t.safetensors"))
    assert loaded["y"].dtype == mx.bfloat16


X = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[1]", "not a JSON object"),
        (b'{"x":', "not valid JSON"),
        (b"[" * 10000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"x": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "x": 1}', "occurs twice"),
        ({"x": {**X, "dtype": "F33"}}, "unknown dtype 'F33'"),
        ({"x": {**X, "dtype": ["F32"]}}, "unknown dtype"),
        ({"x": {**X, "shape": [-2]}}, "malformed shape"),
        ({"x": {**X, "shape": [True, 2]}}, "malformed shape"),
        ({"x": {**X, "shape": [3]}}, "needs 12 bytes, it has 8"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "lacks"),
        ({"x": X, "y": X}, "an overlap before tensor 'y'"),
        ({"x": X, "y": {**X, "data_offsets": [12, 20]}}, "a hole before tensor 'y'"),
        ({"x": X, "y": {**X, "data_offsets": [8, 16]}}, "need 16 bytes, it has 8"),
        ({}, "need 0 bytes, it has 8"),
    ],
)
def test_each_broken_promise_is_named(tmp_path: Path, header: Any, message: str) -> None:
    path = file_of(tmp_path / "t.safetensors", header, bytes(8))
    with pytest.raises(SourceError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 8, 50, -1])
def test_truncation_is_found(tmp_path: Path, size: int) -> None:
    path = tmp_path / "t.safetensors"
    save_file(TENSORS, path)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(SourceError, match="corrupt or truncated"):
        read_header(path)


def test_a_missing_file_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no\.safetensors cannot be read"):
        read_header(tmp_path / "no.safetensors")


SOUND = save(TENSORS)


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4
    ),
    cut=st.one_of(st.none(), st.integers(0, len(SOUND))),
)
def test_any_damage_is_a_source_error_or_still_sound(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int | None
) -> None:
    content = bytearray(SOUND)
    for at, byte in edits:
        content[at] = byte
    path = tmp_path_factory.mktemp("damage") / "t.safetensors"
    path.write_bytes(content[:cut])
    message = None
    try:
        header = read_header(path)
    except SourceError as error:
        message = str(error)
    if message is None:  # what passes, the library reads too, and no tensor leaves the file
        with safe_open(path, "np") as file:
            assert set(file.keys()) == set(header)
        assert max(info.end for info in header.values()) <= len(content)
    else:
        assert "\n" not in message
