"""Benchmarks that are answered with text: ask in waves, cut thoughts off, score each answer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ...base.text import one_line
from ...errors import OptiqError
from ..data import Questions
from ..engine import Engine, Prompt
from ..records import Metrics, Record
from ..task import Item

# Several batches deep: while the longest answers of one finish, the next ones are being written.
WAVE = 64

_THOUGHT = re.compile(r"\A\s*<think>.*?(</think>\s*|\Z)", re.DOTALL)


class Generation(ABC):
    """Base of the benchmarks with written answers. `workers` answers are scored at a time."""

    name: str
    protocol: str
    workers = 1

    def __init__(self, questions: Questions, ids: Sequence[str]) -> None:
        self.data_sha256 = questions.sha256
        items = [Item(id, "", questions.rows[id]) for id in ids]
        self.waves = [items[i : i + WAVE] for i in range(0, len(items), WAVE)]

    @abstractmethod
    def prompt(self, engine: Engine, item: Item) -> Prompt: ...

    @abstractmethod
    def score(self, item: Item, answer: str) -> tuple[Metrics, str]:
        """Metrics of an answer, and a note where the verdict is not the usual one, or ""."""

    @abstractmethod
    def failed(self, item: Item) -> Metrics:
        """The metrics of an answer that cannot be scored."""

    def run(self, engine: Engine, wave: Sequence[Item]) -> list[Record]:
        prompts = [self.prompt(engine, item) for item in wave]
        answers = engine.answers(prompts)
        with ThreadPoolExecutor(self.workers) as pool:
            verdicts = list(pool.map(self._verdict, wave, answers))
        return [
            Record(item.id, item.group, prompt.sha256, answer, metrics, note)
            for item, prompt, answer, (metrics, note) in zip(
                wave, prompts, answers, verdicts, strict=True
            )
        ]

    def _verdict(self, item: Item, answer: str) -> tuple[Metrics, str]:
        text = without_thought(answer)
        if not text.strip():
            return self.failed(item), "the answer is empty"
        try:
            return self.score(item, text)
        except OptiqError:
            raise  # such as no sandbox: that says nothing about the answer
        except Exception as error:  # an answer may be anything
            return self.failed(item), f"cannot be scored: {type(error).__name__} {one_line(error)}"


def without_thought(answer: str) -> str:
    """The answer after a leading <think> ... </think>; nothing if the thought never ends."""
    return _THOUGHT.sub("", answer)
