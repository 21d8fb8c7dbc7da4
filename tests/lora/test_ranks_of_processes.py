"""Two processes under mlx.launch give what one gives."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from optiq import lora
from tests.distributed.test_distributed import CLI, finish, start
from tests.lora.models import mixed_folder, rows, write_rows


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path)
    data = write_rows(tmp_path / "data", rows(10), rows(3, 1))
    one = lora.train(
        str(folder), data, tmp_path / "one", progress=False,
        iters=4, batch_size=5, rank=2, learning_rate=1e-3, pack_length=64,
    )  # fmt: skip
    command = ["-c", CLI, "lora", "train", str(folder), "--data", str(data), "-o", "two"]
    command += ["--iters", "4", "--batch-size", "5", "--rank", "2", "--lr", "1e-3"]
    command += ["--pack-length", "64"]
    for code, _, errors in finish(start(command, tmp_path)):
        assert code == 0, errors
    two = lora.read(tmp_path / "two")
    assert two.ranks == one.adapter.ranks
    for path, term in one.adapter.terms.items():
        for a, b in zip(term, two.terms[path], strict=True):
            assert mx.abs(a - b).max() <= 1e-5
    assert not list(tmp_path.glob("*.optiq-training*"))
