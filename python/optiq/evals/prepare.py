"""The benchmarks of an evaluation, with their questions: everything that can fail early does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..errors import SourceError, UsageError
from ..planning.scores import ModelInfo
from ..sources import LoadedModel, Source, resolve
from . import data, programs
from .options import EvalOptions
from .task import Task
from .tasks.bfcl import Bfcl
from .tasks.gsm8k import Gsm8k
from .tasks.humaneval import HumanEval
from .tasks.ifeval import IfEval
from .tasks.kl import Kl
from .tasks.mmlu import Mmlu


def prepare(
    loaded: LoadedModel, source: Source, options: EvalOptions
) -> tuple[list[Task], dict[str, str]]:
    """The tasks that are asked for, and what of them has to be left out, and why."""
    tasks: list[Task] = []
    left_out = {}
    for name in options.tasks:
        if name == "kl":
            try:
                reference = _reference(source, options.reference)
                tasks.append(Kl(loaded.tokenizer, reference, limit=options.limit))
            except _NoReference as reason:
                if options.required:
                    raise UsageError(str(reason)) from reason
                left_out[name] = str(reason)
        elif name != "size":
            questions = data.load(name, options.data)
            ids = questions.ids
            if options.full:  # after the fixed sample; the examples of MMLU are not questions
                asked = set(ids)
                ids = ids + [i for i in questions.rows if i not in asked and "/dev/" not in i]
            tasks.append(_make(name, questions, ids[: options.limit], loaded.tokenizer))
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
    return HumanEval(questions, ids, chat=chat, run_program=programs.sandboxed())


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
        written = json.loads(plan.read_text(encoding="utf-8"))
        made_from = ModelInfo.from_json(written["model"])
        found = resolve(made_from.path or made_from.name)
    except (OSError, ValueError, LookupError, TypeError, SourceError) as error:
        raise _NoReference(
            f"the model this one was made from is not there ({error}); {fix}"
        ) from error
    if found.fingerprint != made_from.fingerprint:
        raise _NoReference(f"{found.name} is not the model this one was made from; {fix}")
    return found
