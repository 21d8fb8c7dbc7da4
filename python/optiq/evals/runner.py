"""Run benchmarks on a model, wave by wave, into record files that a killed run can go on with."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ..base.machine import versions
from ..base.progress import Progress, silenced
from ..distributed.ranks import ALONE, World, world
from ..errors import EvalError
from ..models.size import model_size
from ..nn.accelerate import accelerate
from ..sources import LoadedModel, Source, load, resolve
from . import records
from .engine import Engine
from .options import EvalOptions
from .prepare import prepare
from .runs import FOLDER
from .summary import SIZE_FILE, Sizes, Summary, summarize
from .task import Task

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import EvalFields


def evaluate(
    model: str | Path, out: str | Path | None = None, **options: Unpack[EvalFields]
) -> Summary:
    """Evaluate `model` into the folder `out` (default: MODEL/optiq/evals): records and a summary.

    The options are those of `EvalOptions`, such as `tasks=("gsm8k", "kl")` and `limit=20`.
    Everything that can be checked before the first question is, and raises an OptiqError. The
    processes that `mlx.launch` starts share the questions; each returns the same, and rank 0
    writes.
    """
    with world() as ranks:
        return evaluate_together(ranks, model, out, **options)


def evaluate_together(
    ranks: World, model: str | Path, out: str | Path | None, **options: Unpack[EvalFields]
) -> Summary:
    """`evaluate` on these ranks."""
    asked = EvalOptions.parse(**options)
    source = resolve(str(model), revision=asked.revision)
    folder = default_folder(source, asked.limit) if out is None else Path(out).expanduser()
    if ranks.rank == 0:
        return _evaluate(ranks, source, folder, asked)
    with TemporaryDirectory() as own, silenced():
        return replace(_evaluate(ranks, source, Path(own), asked), folder=folder)


def _evaluate(ranks: World, source: Source, folder: Path, asked: EvalOptions) -> Summary:
    old = [path for name in asked.tasks if (path := _path(folder, name)).exists()]
    if old and not (asked.resume or asked.restart):
        raise EvalError(
            f"{old[0]} holds results already; --resume goes on with them, --restart discards them, "
            "-o OUT puts new ones elsewhere"
        )
    loaded = load(source, allow_quantized=True)
    sizes = _sizes(source, loaded)
    tasks, left_out = prepare(loaded, source, asked)
    headers = {task.name: _header(task, source, asked.limit) for task in tasks}
    ranks.same({name: {**asdict(of), "model": ""} for name, of in headers.items()})
    if asked.restart:
        for path in old:
            path.unlink()
    else:
        for name, header in headers.items():
            if _path(folder, name).exists():
                records.check(_path(folder, name), header)
    accelerate(loaded.model, exact=False)
    engine = Engine(loaded.model, loaded.tokenizer)
    if tasks:
        engine = engine.suited(source.name)
    if "size" in asked.tasks:
        sizes.save(folder)
    seconds = {}
    for task in tasks:
        started = time.monotonic()
        path, header = _path(folder, task.name), headers[task.name]
        if run(task, engine, path, header, progress=asked.progress, ranks=ranks):
            seconds[task.name] = round(time.monotonic() - started, 1)
        summarize(folder, seconds=seconds, left_out=left_out)
    return summarize(folder, seconds=seconds, left_out=left_out)


def run(
    task: Task,
    engine: Engine,
    path: Path,
    header: records.Header,
    *,
    progress: bool = True,
    ranks: World = ALONE,
) -> bool:
    """Bring the record file at `path` to its end; whether that was done from the beginning.

    The ranks take the waves in turn. Each has a file of its own with the records of all.
    """
    boundaries = list(accumulate(len(wave) for wave in task.waves))
    if path.exists():
        kept = records.resume(path, header, boundaries)
    else:
        records.create(path, header)
        kept = []
    kept = _of_ranks(ranks, kept)[0]
    if ranks.rank != 0:
        records.append(path, kept)
    items = [item.id for wave in task.waves for item in wave]
    if [record.id for record in kept] != items[: len(kept)]:
        raise EvalError(f"{path} holds other items than asked for; delete it and run again")
    waiting = [w for w, end in zip(task.waves, boundaries, strict=True) if end > len(kept)]
    with Progress(len(items), f"asking {task.name}", done=len(kept), enabled=progress) as bar:
        for first in range(0, len(waiting), ranks.size):
            turn = waiting[first : first + ranks.size]
            left = _Steps(bar, sum(map(len, turn)))
            found: list[records.Record] = []
            if ranks.rank < len(turn):
                found = task.run(replace(engine, finished=left.step), turn[ranks.rank])
            for of_rank in _of_ranks(ranks, found):
                records.append(path, of_rank)
            left.rest()
    return not kept


def _of_ranks(ranks: World, found: list[records.Record]) -> list[list[records.Record]]:
    """The records of every rank, in order."""
    if ranks.size == 1:
        return [found]
    each = ranks.gather([asdict(record) for record in found])
    return [[records.Record(**fields) for fields in of] for of in each]


class _Steps:
    """One step of the bar per finished sequence, in all exactly one per item of a wave."""

    def __init__(self, bar: Progress, items: int) -> None:
        self._bar, self._left = bar, items

    def step(self) -> None:
        if self._left > 0:
            self._left -= 1
            self._bar.step()

    def rest(self) -> None:
        while self._left > 0:
            self.step()


def default_folder(source: Source, limit: int | None) -> Path:
    """In the model folder; in the current one for what the hub or a converter made.

    Quick looks lie apart.
    """
    if source.kind == "folder":
        folder = source.path / FOLDER
    else:
        folder = Path(f"{Path(source.name).name}-evals")
    return folder / f"limit-{limit}" if limit else folder


def _header(task: Task, source: Source, limit: int | None) -> records.Header:
    return records.Header(
        task=task.name,
        protocol=task.protocol,
        model=source.label,
        fingerprint=source.fingerprint,
        data_sha256=task.data_sha256,
        items=sum(len(wave) for wave in task.waves),
        limit=limit,
        versions=versions(),
    )


def _path(out: Path, name: str) -> Path:
    return out / (SIZE_FILE if name == "size" else f"{name}.jsonl")


def _sizes(source: Source, loaded: LoadedModel) -> Sizes:
    files = [f for f in source.path.rglob("*") if f.is_file() and "optiq" not in f.parts]
    nbytes = {file: file.stat().st_size for file in files}
    return Sizes(
        model=source.label,
        fingerprint=source.fingerprint,
        **model_size(loaded.model)._asdict(),
        weight_file_bytes=sum(n for f, n in nbytes.items() if f.suffix == ".safetensors"),
        folder_bytes=sum(nbytes.values()),
    )
