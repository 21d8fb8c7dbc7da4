"""IFEval: instructions whose obedience a program can check."""

from __future__ import annotations

from collections.abc import Sequence

from .. import ifeval
from ..data import Questions
from ..engine import Engine, Prompt
from ..records import Metrics
from ..task import Item
from .generation import Generation

MAX_TOKENS = 1280  # as lm-eval has it


class IfEval(Generation):
    """The prompt is the user's whole message; bare text for a model without a chat template."""

    name = "ifeval"

    def __init__(self, questions: Questions, ids: Sequence[str], *, chat: bool) -> None:
        super().__init__(questions, ids)
        for id in ids:  # a missing package is told now and not after hours
            row = questions.rows[id]
            ifeval.validate(row["instruction_id_list"], row["kwargs"])
        style = "a chat" if chat else "text"
        self.protocol = f"ifeval/1: zero shot as {style}, greedy, at most {MAX_TOKENS} tokens"

    def prompt(self, engine: Engine, item: Item) -> Prompt:
        text = item.data["prompt"]
        chat = [{"role": "user", "content": text}]
        return Prompt(engine.chat(chat) if engine.has_chat else engine.text(text), MAX_TOKENS)

    def score(self, item: Item, answer: str) -> tuple[Metrics, str]:
        row = item.data
        verdict = ifeval.check(row["prompt"], answer, row["instruction_id_list"], row["kwargs"])
        metrics: Metrics = {
            "prompt_strict": all(verdict.strict),
            "prompt_loose": all(verdict.loose),
            "instructions_strict": verdict.strict,
            "instructions_loose": verdict.loose,
        }
        return metrics, ""

    def failed(self, item: Item) -> Metrics:
        nothing = [False] * len(item.data["instruction_id_list"])
        return {
            "prompt_strict": False,
            "prompt_loose": False,
            "instructions_strict": nothing,
            "instructions_loose": nothing,
        }
