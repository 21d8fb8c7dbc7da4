"""What `bench/quality.py` hands to llama.cpp's quantizer, and reads back."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from bench import gguf
from optiq.errors import OptiqError
from optiq.sources import resolve
from tests.sources.gguf.files import numpy_weights, write_gguf
from tests.tiny import tiny_folder

# Stands in for llama-quantize: keeps what it was given, and copies the model.
PROGRAM = """#!{python}
import shutil, sys
_, option, importance, model, out, kind = sys.argv
if kind == "BAD":
    sys.exit("no such type")
shutil.copy(importance, "{kept}")
shutil.copy(model, out)
"""


def quantizer(tmp_path: Path, original: Path, *kinds: str) -> gguf.Quantizer:
    program = tmp_path / "llama-quantize"
    program.write_text(PROGRAM.format(python=sys.executable, kept=tmp_path / "importance"))
    program.chmod(0o755)
    return gguf.Quantizer(program, original, kinds)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_the_program_gets_the_model_and_the_importance_of_its_columns(
    tmp_path: Path, kind: str
) -> None:
    original = write_gguf(tiny_folder(tmp_path, kind, seed=5), tmp_path / "m.gguf")
    folder = resolve(str(original), cache_dir=tmp_path / "cache").path
    path = "model.layers.1.mlp.down_proj"
    shapes = {name: w.shape for name, w in numpy_weights(folder).items()}
    squares = mx.arange(shapes[f"{path}.weight"][1]).astype(mx.float32)
    found = quantizer(tmp_path, original, "Q4_K_S").models(folder, {path: squares})
    for name, made, nbytes, types in found:
        expected = numpy_weights(folder)
        read = numpy_weights(made)
        assert read.keys() == expected.keys()
        for tensor, w in read.items():
            np.testing.assert_allclose(w, expected[tensor], 0, 1e-6, err_msg=tensor)
        matrices = sum(len(shape) > 1 for shape in shapes.values())
        assert (name, types) == ("Q4_K_S", f"{matrices} F32")
        assert nbytes == 4 * sum(map(np.size, expected.values()))
    data = (tmp_path / "importance").read_bytes()
    entries, length = struct.unpack_from("<ii", data)
    assert (entries, data[8 : 8 + length]) == (1, b"blk.1.ffn_down.weight")
    calls, values = struct.unpack_from("<ii", data, 8 + length)
    assert (calls, values) == (1, squares.size)
    np.testing.assert_array_equal(
        np.frombuffer(data, np.float32, values, 16 + length), np.array(squares)
    )


def test_what_the_program_says_is_the_error(tmp_path: Path) -> None:
    original = write_gguf(tiny_folder(tmp_path, "llama", seed=5), tmp_path / "m.gguf")
    folder = resolve(str(original), cache_dir=tmp_path / "cache").path
    with pytest.raises(OptiqError, match="llama-quantize failed for BAD: no such type"):
        next(quantizer(tmp_path, original, "BAD").models(folder, {}))
