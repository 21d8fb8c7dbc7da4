"""What llama.cpp's quantizer makes of the reference of `bench/quality.py`, for its own formats.

The reference is written as a float32 GGUF with the metadata of the file it came from, the
importance matrix is our second moments of each column, over the same text (what `llama-imatrix`
collects, and for the head as well), and `llama-quantize` does the rest. What it wrote is read back
as any GGUF is. Where rows do not divide by 256, llama.cpp takes other types for them.
"""

from __future__ import annotations

import json
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from optiq.errors import OptiqError
from optiq.sources.gguf.config import Mapped, map_tensors
from optiq.sources.gguf.convert import convert
from optiq.sources.gguf.file import read_gguf

TYPES = ("Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S")


def write(original: Path, folder: Path, out: Path) -> None:
    """The model of `folder`, which came from the GGUF `original`, as the GGUF `out`."""
    old = gguf.GGUFReader(original)
    config = json.loads((folder / "config.json").read_text())
    tensors = {k: v for f in folder.glob("*.safetensors") for k, v in mx.load(str(f)).items()}
    writer = gguf.GGUFWriter(out, str(old.fields["general.architecture"].contents()))
    for name, field in old.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for mapped in map_tensors(read_gguf(original), config):
        w = np.array(tensors[mapped.name].astype(mx.float32)) - np.float32(mapped.shift)
        if mapped.head_rows:
            halves = w.reshape(-1, 2, mapped.head_rows // 2, *w.shape[1:])
            w = halves.swapaxes(1, 2).reshape(w.shape)
        writer.add_tensor(_name(mapped, config), w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(mapped: Mapped, config: Mapping[str, Any]) -> str:
    """A file may also store the head of a model that ties it to the embedding, and the one with
    more bits is read."""
    tied = config["tie_word_embeddings"] and mapped.source.name == "output.weight"
    return "token_embd.weight" if tied else mapped.source.name


def write_importance(
    original: Path, folder: Path, importance: Mapping[str, mx.array], out: Path
) -> None:
    """`importance`, by module path, as llama.cpp stores it (in the older binary form)."""
    config = json.loads((folder / "config.json").read_text())
    entries = []
    for mapped in map_tensors(read_gguf(original), config):
        found = importance.get(mapped.name.removesuffix(".weight"))
        if found is not None and mapped.name.endswith(".weight"):
            entries.append((_name(mapped, config).encode(), np.array(found, np.float32)))
    with out.open("wb") as file:
        file.write(struct.pack("<i", len(entries)))
        for name, values in entries:
            file.write(struct.pack("<i", len(name)) + name)
            file.write(struct.pack("<ii", 1, values.size) + values.tobytes())
        file.write(struct.pack("<ii", 1, 0))  # one chunk, of a text without a name


@dataclass(frozen=True)
class Quantizer:
    """llama.cpp's `program` for the types `kinds`; references come from the GGUF `original`."""

    program: Path
    original: Path
    kinds: Sequence[str] = TYPES

    def models(
        self, folder: Path, importance: Mapping[str, mx.array]
    ) -> Iterator[tuple[str, Path, int, str]]:
        """Of each type its name, the folder it was read back to, its bytes, and what it took."""
        with tempfile.TemporaryDirectory() as scratch:
            here = Path(scratch)
            whole, matrix, made = here / "whole.gguf", here / "importance", here / "made.gguf"
            write(self.original, folder, whole)
            write_importance(self.original, folder, importance, matrix)
            for kind in self.kinds:
                command = [self.program, "--imatrix", matrix, whole, made, kind]
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
                if done.returncode:
                    said = (done.stderr or done.stdout).strip()[-400:]
                    raise OptiqError(f"{self.program.name} failed for {kind}: {said}")
                tensors = read_gguf(made).tensors.values()
                matrices = Counter(t.type.name for t in tensors if len(t.shape) > 1)
                types = ", ".join(f"{count} {name}" for name, count in matrices.most_common())
                yield kind, convert(made, here), sum(t.nbytes for t in tensors), types
