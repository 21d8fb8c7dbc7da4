"""How work is divided between ranks and put together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_model

from optiq.distributed.ranks import World
from optiq.quantize.sensitivity import job as job_module
from optiq.quantize.sensitivity.job import Job
from tests.quantize.sensitivity import cases
from tests.quantize.sensitivity.cases import sequences, tiny_source


class Other(World):
    """A rank that hears `theirs` from the others, whatever it says."""

    theirs: tuple[Any, ...] = ()

    def gather(self, value: Any) -> list[Any]:
        return [*self.theirs[: self.rank], value, *self.theirs[self.rank :]]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Four batches of one, two, one and one sequence."""
    monkeypatch.setattr(job_module, "BATCH_TOKENS", 20)
    model, _ = load_model(tiny_source(tmp_path, "llama tied").path)
    return cases.job(model, sequences(15, 9, 8, 11, 30))


@pytest.mark.parametrize("ranks", [1, 2, 3, 20, 50])
def test_every_unit_is_done_once_and_ranks_do_as_much(work: Job, ranks: int) -> None:
    steps = work.blocks()
    assert [len(batch) for batch in work.batches()] == [1, 2, 1, 1]
    shares = []
    for rank in range(ranks):
        work.world = Other(rank, ranks)
        shares.append(work.share(steps))
    assert sorted(unit for share in shares for unit in share) == [
        (b, s) for b in range(4) for s in range(len(steps))
    ]
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_what_is_done_is_not_shared_again(work: Job) -> None:
    steps = work.blocks()
    totals = {m.path: {str(f): [1.0] for f in work.rounded(m)} for m in steps[1]}
    work.save((2, 1), totals)
    assert (2, 1) not in work.share(steps)
    assert work.done() == [(2, 1)]


def test_totals_come_in_the_order_of_the_sequences(work: Job) -> None:
    units = {"0/0": [1.0], "1/0": [2.0, 3.0], "2/0": [4.0], "3/0": [5.0]}
    found = {unit: {"a": {"4g64": column}} for unit, column in units.items()}
    for mine in (["3/0", "1/0"], ["0/0"], []):
        work.checkpoint.rounds.clear()
        work.checkpoint.add({work.name: {unit: found[unit] for unit in mine}})
        work.world = Other(1, 3)
        rest = [unit for unit in units if unit not in mine]
        parts = ({u: found[u] for u in rest[1:]}, {u: found[u] for u in rest[:1]})
        work.world.theirs = tuple((part, {}, {}) for part in parts)  # no weight errors, no flips
        assert work.collect() == {"a": {"4g64": [1.0, 2.0, 3.0, 4.0, 5.0]}}
