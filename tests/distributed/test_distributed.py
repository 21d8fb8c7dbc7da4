"""Ranks find each other, hear each other's values, and say who is dead."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from optiq.base.checkpoint import check_unfinished
from optiq.distributed import wire
from optiq.distributed.ranks import ALONE, World, world
from optiq.distributed.watch import BEAT, Watch
from optiq.errors import DistributedError, UsageError
from optiq.quantize.sensitivity.checkpoint import existing
from tests.ports import free_ports, hostfile
from tests.tiny import tiny_folder

# Small batches, so that there are several to divide.
CLI = """
import sys
from optiq.cli import main
from optiq.quantize.sensitivity import job

job.BATCH_TOKENS = 200
sys.exit(main())
"""


def start(command: Sequence[str], folder: Path, count: int = 2) -> list[subprocess.Popen[str]]:
    """The processes that `mlx.launch -n count` would start."""
    shared = {**os.environ, "MLX_HOSTFILE": str(hostfile(folder, count))}
    shared["TRANSFORMERS_VERBOSITY"] = "error"
    return [
        subprocess.Popen(
            [sys.executable, *command], cwd=folder, env={**shared, "MLX_RANK": str(rank)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    try:
        found = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, found, strict=True)]


def test_alone() -> None:
    with world() as here:
        assert (here.rank, here.size) == (0, 1)
        assert here.gather({"a": 1}) == [{"a": 1}]
        here.same({"a": 1})


def test_one_process_of_a_batch_system_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    with world() as here:
        assert here is ALONE


def test_values_of_all_ranks(tmp_path: Path) -> None:
    code = (
        "import mlx.core as mx\n"
        "from optiq.distributed.ranks import world\n"
        "with world() as here:\n"
        "    print(here.gather([here.rank, 0.1 + here.rank / 3, 'x' * 5000 * here.rank]))\n"
        "    arrays = here.bring(mx.arange(2) + here.rank, to=1)\n"
        "    print(arrays and [array.tolist() for array in arrays])\n"
        "    print(here.join({n: str(n) for n in here.share([1, 3, 1, 1, 1])}))\n"
        "    here.same({'seed': 1, 'model': here.rank // 2})"
    )
    done = finish(start(["-c", code], tmp_path, count=3))
    for rank, (exit_code, out, err) in enumerate(done):
        gathered, brought, joined = map(eval, out.splitlines())
        assert gathered == [[r, 0.1 + r / 3, "x" * 5000 * r] for r in range(3)]
        assert brought == ([[0, 1], [1, 2], [2, 3]] if rank == 1 else None)
        assert joined == list("01234")
        assert exit_code == 1
        if rank == 0:
            assert "rank 2 has another model than rank 0" in err


def test_arrays_in_a_message(pair: tuple[socket.socket, socket.socket]) -> None:
    arrays = [
        mx.arange(6, dtype=mx.uint32).reshape(2, 3),
        mx.array([1.5, -3e38], dtype=mx.bfloat16),
        mx.array(True),
        mx.zeros((0, 4)),
    ]
    wire.send(pair[0], {"a": (arrays, None), "b": [0.1, {"c": "d"}]})
    found = wire.receive(pair[1])
    assert found["b"] == [0.1, {"c": "d"}]
    got, nothing = found["a"]
    assert nothing is None
    for one, other in zip(got, arrays, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert mx.array_equal(one, other)
    pair[0].close()
    with pytest.raises(ConnectionError):
        wire.receive(pair[1])


def test_work_is_divided_by_what_it_costs() -> None:
    assert World(1, 2).divide([5, 1, 3, 1, 1, 1]) == [0, 1, 1, 1, 0, 1]
    assert World(1, 2).share([5, 1, 3, 1, 1, 1]) == [1, 2, 3, 5]
    assert World(1, 3).share([]) == []


def test_other_options_on_a_rank_are_refused() -> None:
    class Pair(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, {**value, "seed": 7}]

    with pytest.raises(DistributedError, match="rank 1 has another seed than rank 0"):
        Pair(0, 2).same({"model": "a", "seed": 0})
    ALONE.same({"seed": 0})


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def watch_until(
    said: list[str | None], watch: Watch, seconds: float, expected: int = 1
) -> list[str | None]:
    with watch:
        until = time.monotonic() + seconds
        while len(said) < expected and time.monotonic() < until:
            time.sleep(0.01)
        return list(said)


def test_a_connection_that_ends_is_a_death(pair: tuple[socket.socket, socket.socket]) -> None:
    said: list[str | None] = []
    pair[1].close()
    assert watch_until(said, Watch(0, {1: pair[0]}, said.append), 5) == ["rank 1 died"]


def test_silence_is_a_death(pair: tuple[socket.socket, socket.socket]) -> None:
    said: list[str | None] = []
    began = time.monotonic()
    found = watch_until(said, Watch(0, {3: pair[0]}, said.append, silence=1.0), 10)
    assert found == ["rank 3 has not answered for 1 s"]
    assert 1 <= time.monotonic() - began < 3


def test_signs_of_life_are_none(pair: tuple[socket.socket, socket.socket]) -> None:
    said: list[str | None] = []
    other = Watch(1, {0: pair[1]}, said.append, silence=3 * BEAT)
    with other:
        watched = watch_until(said, Watch(0, {1: pair[0]}, said.append, silence=3 * BEAT), 5 * BEAT)
    assert watched == []


def test_the_others_hear_of_a_death_and_of_a_failure() -> None:
    """Rank 2 hears of rank 1 from rank 0, and leaves it to rank 0 to say so."""
    said: dict[int, list[str | None]] = {0: [], 2: []}
    for reason, expected in ((None, "rank 1 died"), (ValueError("bad"), "rank 1 failed: bad")):
        (a0, a1), (b0, b2) = socket.socketpair(), socket.socketpair()
        done = threading.Event()

        def second(b2: socket.socket = b2, done: threading.Event = done) -> None:
            with Watch(2, {0: b2}, said[2].append):
                done.wait(10)

        thread = threading.Thread(target=second)
        thread.start()
        with Watch(0, {1: a0, 2: b0}, said[0].append):
            if reason is None:
                a1.close()
            else:
                first = Watch(1, {0: a1}, said[0].append)
                first.__enter__()
                first.__exit__(type(reason), reason, None)
            until = time.monotonic() + 5
            while not (said[0] and said[2]) and time.monotonic() < until:
                time.sleep(0.01)
        done.set()
        thread.join()
        assert said == {0: [expected], 2: [None]}
        said[0].clear()
        said[2].clear()
        for s in (a1, b0, b2):
            s.close()


def scores(path: Path) -> Any:
    found = json.loads(path.read_text())
    return found["modules"], found.get("auto")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, and what one process measures of it by either method."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny_folder(folder, name="model")
    for method in ("auto", "kl"):
        command = [*job(method), "-o", f"{method}.json"]
        subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)
    return folder


def job(method: str) -> list[str]:
    options = ["--sensitivity", method, "--tokens", "640", "--formats", "3g64,4g64,5g64,6g64"]
    return ["-c", CLI, "sensitivity", "model", *options]


def launched_by_mlx(method: str, folder: Path) -> subprocess.CompletedProcess[str]:
    port = str(free_ports(2).start)
    launch = ["-c", "from mlx._distributed_utils.launch import main; main()"]
    return subprocess.run(
        [sys.executable, *launch, "-n", "2", "--starting-port", port, "--", sys.executable,
         *job(method), "-o", "out.json", "--json", "--overwrite"],
        cwd=folder, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["auto", "kl"])
def test_two_ranks_measure_what_one_does(alone: Path, method: str) -> None:
    done = launched_by_mlx(method, alone)
    assert (alone / "out.json").exists(), done.stderr  # mlx.launch says 0 whatever its ranks say
    assert scores(alone / "out.json") == scores(alone / f"{method}.json")
    assert json.loads(done.stdout) == json.loads((alone / "out.json").read_text())  # once
    assert not list(alone.glob("*.checkpoint*"))


@pytest.mark.parametrize("killed", [0, 1])
def test_a_dead_rank_is_named_and_the_run_goes_on(alone: Path, killed: int) -> None:
    out = alone / f"killed{killed}.json"
    command = [*job("kl"), "-o", out.name]
    processes = start(command, alone)
    mark = alone / (out.name + (".checkpoint.1" if killed else ".checkpoint"))
    until = time.monotonic() + 60
    while not mark.exists() and processes[killed].poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    processes[killed].send_signal(signal.SIGKILL)
    code, printed, err = finish(processes)[1 - killed]
    assert (code, printed) == (1, "")
    assert err == f"\noptiq: rank {killed} died; what is measured is kept, go on with --resume\n"
    assert not out.exists()

    with pytest.raises(UsageError, match="holds unfinished work; --resume goes on"):
        check_unfinished(existing(alone / (out.name + ".checkpoint")), resume=False)
    more = [*command, "--resume"]
    if killed:  # a single process goes on from the files of both
        subprocess.run([sys.executable, *more], cwd=alone, check=True, capture_output=True)
    else:
        assert [code for code, _, _ in finish(start(more, alone))] == [0, 0]
    assert scores(out) == scores(alone / "kl.json")
    assert not list(alone.glob("*.checkpoint*"))


def test_a_failing_rank_is_named(alone: Path) -> None:
    """Here because the model is not there for it, as on another machine."""
    code = "import os; os.environ['MLX_RANK'] == '1' and os.chdir('/')" + CLI
    processes = start(["-c", code, *job("kl")[2:], "-o", str(alone / "failed.json")], alone)
    (code, _, err), (other, _, reason) = finish(processes)
    assert (code, other) == (1, 1)
    assert reason.startswith("optiq sensitivity: there is no folder model")
    assert err.startswith("\noptiq: rank 1 failed: there is no folder model")


def test_a_rank_that_never_starts(tmp_path: Path) -> None:
    code = "from optiq.distributed import ranks as d\nd.JOIN = 2\nwith d.world(): pass"
    shared = {**os.environ, "MLX_HOSTFILE": str(hostfile(tmp_path, 2)), "MLX_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=shared, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == "optiq: not all ranks have started within 2 s\n"
