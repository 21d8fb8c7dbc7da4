"""MMLU: four choices; the answer is the letter the model finds likeliest next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ...errors import EvalError
from ..data import Questions
from ..engine import Engine, Prompt, Tokens
from ..layouts import LETTERS
from ..records import Record
from ..task import Item

SHOTS = 5


class Mmlu:
    """Bare text and no chat template, as lm-eval's `mmlu` asks; a wave is a subject.

    The five worked examples of a subject are run once for all of its questions.
    """

    name = "mmlu"
    protocol = f"mmlu/1: {SHOTS} shots as text, likeliest of four letters"

    def __init__(self, questions: Questions, ids: Sequence[str]) -> None:
        self.data_sha256 = questions.sha256
        rows = sorted((questions.rows[id] for id in ids), key=_place)
        self.waves = [
            [Item(row["id"], subject, row) for row in of]
            for subject, of in groupby(rows, key=lambda row: str(row["subject"]))
        ]
        self._examples = {
            wave[0].group: [questions.rows[f"{wave[0].group}/dev/{k}"] for k in range(SHOTS)]
            for wave in self.waves
        }

    def run(self, engine: Engine, wave: Sequence[Item]) -> list[Record]:
        subject = wave[0].group
        head = (
            "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n"
        )
        for row in self._examples[subject]:
            head += f"{_question(row)} {LETTERS[row['answer']]}\n\n"
        split = [_split(engine, head + _question(item.data)) for item in wave]
        scores = engine.log_likelihoods([c for c, _ in split], [e for _, e in split])
        records = []
        for item, (context, _), likelihoods in zip(wave, split, scores, strict=True):
            choice = max(range(len(LETTERS)), key=likelihoods.__getitem__)
            records.append(
                Record(
                    item.id,
                    item.group,
                    Prompt(context, 1).sha256,
                    LETTERS[choice],
                    {"accuracy": choice == item.data["answer"]},
                )
            )
        return records


def _split(engine: Engine, text: str) -> tuple[Tokens, list[Tokens]]:
    """What the four answers share as tokens, and the rest of each.

    Tokenized together with its answer, because a tokenizer may join " A" or keep the space apart.
    """
    whole = [engine.text(f"{text} {letter}") for letter in LETTERS]
    if len(set(map(tuple, whole))) < len(LETTERS):
        raise EvalError("the tokenizer knows no letters A to D; MMLU cannot be asked")
    shared = 0
    while len({tuple(tokens[: shared + 1]) for tokens in whole}) == 1:
        shared += 1
    return whole[0][:shared], [tokens[shared:] for tokens in whole]


def _question(row: Mapping[str, Any]) -> str:
    choices = zip(LETTERS, row["choices"], strict=True)
    lines = [row["question"].strip(), *(f"{letter}. {choice}" for letter, choice in choices)]
    return "\n".join([*lines, "Answer:"])


def _place(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["subject"], int(row["id"].rpartition("/")[2])
