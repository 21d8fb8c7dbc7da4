"""Run benchmarks on a model, wave by wave, into record files that a killed run can go on with."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..base.machine import versions
from ..base.progress import Progress
from ..errors import EvalError, SourceError, UsageError
from ..models.size import model_size
from ..nn.accelerate import accelerate
from ..quality.statistics import CAPABILITY as BENCHMARKS
from ..sources import LoadedModel, Source, resolve
from ..sources import load as load_source
from . import data, judge, records
from .engine import Engine
from .runs import FOLDER
from .summary import summarize, write_json
from .task import Task
from .tasks.bfcl import Bfcl
from .tasks.gsm8k import Gsm8k
from .tasks.humaneval import HumanEval
from .tasks.ifeval import IfEval
from .tasks.kl import Kl
from .tasks.mmlu import Mmlu

CAPABILITY = (*BENCHMARKS, "kl", "size")
SUITES = ("capability", *CAPABILITY)


def evaluate(
    model: str,
    *,
    suite: str = "capability",
    limit: int | None = None,
    full: bool = False,
    data_folder: Path | None = None,
    out: Path | None = None,
    reference: str | None = None,
    revision: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> tuple[dict[str, Any], Path]:
    """Run `suite` (all of it, or one part by name) and return the summary and its folder.

    Args:
        limit: Ask only the first so many items of each set: a quick look, in a folder of its own.
        full: Ask all items that a set has, not only the fixed sample.
        data_folder: Where the questions lie; see `data.load`.
        out: The folder of the records (default: MODEL/optiq/evals).
        reference: What the KL is to. Default: the model that optiq made this one from.
        resume: Go on with what the folder holds; finished parts are not run again.

    Everything that can be checked before the first question is, and raises an OptiqError.
    """
    if limit and full:
        raise UsageError("--full asks every item and --limit a few; give one of them")
    names = CAPABILITY if suite == "capability" else (suite,)
    source = resolve(model, revision=revision)
    out = out or default_folder(source, limit)
    if not resume and (found := [n for n in names if _path(out, n).exists()]):
        raise EvalError(
            f"{_path(out, found[0])} holds results already; --resume goes on, -o OUT puts new ones "
            "elsewhere"
        )
    loaded = load_source(source, allow_quantized=True)
    sizes = {"model": source.name, "fingerprint": source.fingerprint}
    sizes |= model_size(loaded.model) | _file_bytes(source.path)
    tasks, left_out = _prepare(
        names, loaded, source, limit, full, data_folder, reference, required=suite != "capability"
    )
    headers = {task.name: _header(task, source, limit) for task in tasks}
    if resume:
        for task in tasks:
            if _path(out, task.name).exists():
                records.check(_path(out, task.name), headers[task.name])
    accelerate(loaded.model)
    engine = Engine(loaded.model, loaded.tokenizer)
    if "size" in names:
        write_json(out / "size.json", sizes)
    seconds = {}
    for task in tasks:
        started = time.monotonic()
        if run(task, engine, _path(out, task.name), headers[task.name], progress=progress):
            seconds[task.name] = round(time.monotonic() - started, 1)
        summarize(out, seconds=seconds, left_out=left_out)
    return summarize(out, seconds=seconds, left_out=left_out), out


def run(
    task: Task, engine: Engine, path: Path, header: records.Header, *, progress: bool = True
) -> bool:
    """Bring the record file at `path` to its end; whether that was done from the beginning."""
    boundaries = list(accumulate(len(wave) for wave in task.waves))
    if path.exists():
        kept = records.resume(path, header, boundaries)
    else:
        records.create(path, header)
        kept = []
    items = [item.id for wave in task.waves for item in wave]
    if [record.id for record in kept] != items[: len(kept)]:
        raise EvalError(f"{path} holds other items than asked for; delete it and run again")
    with Progress(len(items), task.name, done=len(kept), enabled=progress) as bar:
        for wave, end in zip(task.waves, boundaries, strict=True):
            if end > len(kept):
                left = _Steps(bar, len(wave))
                found = task.run(replace(engine, finished=left.step), wave)
                records.append(path, found)
                left.rest()
    return not kept


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


def _prepare(
    names: Sequence[str],
    loaded: LoadedModel,
    source: Source,
    limit: int | None,
    full: bool,
    folder: Path | None,
    reference: str | None,
    required: bool,
) -> tuple[list[Task], dict[str, str]]:
    """The tasks with their questions, and what of a suite has to be left out, and why."""
    tasks: list[Task] = []
    left_out = {}
    for name in names:
        if name == "kl":
            try:
                tasks.append(Kl(loaded.tokenizer, _reference(source, reference), limit=limit))
            except _NoReference as reason:
                if required:
                    raise UsageError(str(reason)) from reason
                left_out[name] = str(reason)
        elif name != "size":
            questions = data.load(name, folder)
            ids = questions.ids
            if full:  # after the fixed sample; the examples of MMLU are no questions
                asked = set(ids)
                ids = ids + [i for i in questions.rows if i not in asked and "/dev/" not in i]
            tasks.append(_make(name, questions, ids[:limit], loaded.tokenizer))
    return tasks, left_out


def _make(name: str, questions: data.Questions, ids: Sequence[str], tokenizer: Any) -> Task:
    chat = bool(tokenizer.has_chat_template)
    if name == "mmlu":
        return Mmlu(questions, ids)
    if name == "gsm8k":
        return Gsm8k(questions, ids, chat=chat)
    if name == "ifeval":
        return IfEval(questions, ids, chat=chat)
    if name == "bfcl":
        return Bfcl(questions, ids, tokenizer)
    return HumanEval(questions, ids, chat=chat, judge=judge.sandboxed())


class _NoReference(Exception):
    """There is nothing to measure KL to; the text says why."""


def _reference(source: Source, name: str | None) -> Source:
    """The model to measure against: the one given, else the one that plan.json names."""
    if name is not None:
        return resolve(name)
    plan = source.path / "optiq" / "plan.json"
    fix = "--reference MODEL names the unquantized model"
    if not plan.is_file():
        raise _NoReference(f"optiq did not make this model, so it has no reference; {fix}")
    try:
        made_from = json.loads(plan.read_text(encoding="utf-8"))["model"]
        found = resolve(made_from["name"])
    except (OSError, ValueError, LookupError, TypeError, SourceError) as error:
        raise _NoReference(
            f"the model this one was made from is not there ({error}); {fix}"
        ) from error
    if found.fingerprint != made_from["fingerprint"]:
        raise _NoReference(f"{found.name} is not the model this one was made from; {fix}")
    return found


def _header(task: Task, source: Source, limit: int | None) -> records.Header:
    return records.Header(
        task=task.name,
        protocol=task.protocol,
        model=source.name,
        fingerprint=source.fingerprint,
        data_sha256=task.data_sha256,
        items=sum(len(wave) for wave in task.waves),
        limit=limit,
        versions=versions(),
    )


def _path(out: Path, name: str) -> Path:
    return out / ("size.json" if name == "size" else f"{name}.jsonl")


def _file_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the weight files, and of all that a download of the folder brings."""
    files = [file for file in folder.rglob("*") if file.is_file() and "optiq" not in file.parts]
    weights = sum(f.stat().st_size for f in files if f.suffix == ".safetensors")
    return {"weight_file_bytes": weights, "folder_bytes": sum(f.stat().st_size for f in files)}
