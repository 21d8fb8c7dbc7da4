"""HumanEval: complete a Python function; the program runs in the sandbox."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .. import humaneval
from ..data import Questions
from ..engine import Engine, Prompt
from ..records import Metrics
from ..task import Item
from .generation import Generation

MAX_TOKENS = 512

INSTRUCTION = (
    "Complete the following Python function. Answer with the whole function, with all the imports "
    "it needs, in one ```python code block.\n\n```python\n{prompt}```"
)


class Outcome(NamedTuple):
    """Whether a program passed its test; `note` says why not."""

    passed: bool
    note: str = ""


class RunProgram(Protocol):
    """Runs a program against its test, in a sandbox."""

    def __call__(self, code: str, test: str, entry_point: str) -> Outcome:
        """Whether the untrusted `code` defines an `entry_point` that passes `test`.

        `test` is trusted, defines check(candidate) and is run apart from `code`. Any number of
        threads may ask at a time.
        """


class HumanEval(Generation):
    """A chat model is asked for a code block; a model without a template completes the prompt."""

    name = "humaneval"
    workers = os.cpu_count() or 1

    def __init__(
        self, questions: Questions, ids: Sequence[str], *, chat: bool, run_program: RunProgram
    ) -> None:
        super().__init__(questions, ids)
        self._chat = chat
        self._run_program = run_program
        style = "instruction" if chat else "completion"
        self.protocol = f"humaneval/2: {style}, greedy, at most {MAX_TOKENS} tokens, pass@1"

    def prompt(self, engine: Engine, item: Item) -> Prompt:
        prompt, entry_point = item.data["prompt"], item.data["entry_point"]
        if not self._chat:
            return Prompt(engine.text(prompt.rstrip()), MAX_TOKENS, humaneval.base_stop)
        message = {"role": "user", "content": INSTRUCTION.format(prompt=prompt)}
        return Prompt(
            engine.chat([message]),
            MAX_TOKENS,
            lambda text: humaneval.instruct_stop(text, entry_point),
        )

    def score(self, item: Item, answer: str) -> tuple[Metrics, str]:
        prompt, entry_point = item.data["prompt"], item.data["entry_point"]
        if self._chat:
            code = humaneval.extract(answer, entry_point)
            if code is None:
                return self.failed(item), f"no code that defines {entry_point}"
            program = humaneval.instruct_program(prompt, code, entry_point)
        else:
            program = prompt.rstrip() + answer + "\n"
        test = humaneval.test_program(prompt, item.data["test"], entry_point)
        outcome = self._run_program(program, test, entry_point)
        return {"pass": outcome.passed}, outcome.note

    def failed(self, item: Item) -> Metrics:
        return {"pass": False}
