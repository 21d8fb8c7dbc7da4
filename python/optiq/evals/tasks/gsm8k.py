"""GSM8K: grade school word problems, three worked examples, the answer reasoned step by step."""

from __future__ import annotations

from collections.abc import Sequence

from .. import gsm8k
from ..data import Questions
from ..engine import Engine, Prompt
from ..records import Metrics
from ..task import Item
from .generation import Generation

MAX_TOKENS = 512

# The first three exemplars of Wei et al. (arXiv:2201.11903, appendix G), as lm-eval has them.
SHOTS = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After "
        "they are done, there will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So "
        "there must have been 21 - 15 = 6. The answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the "
        "parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they "
        "have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. "
        "After eating 35, they had 74 - 35 = 39. The answer is 39.",
    ),
)


class Gsm8k(Generation):
    """Examples as earlier turns of the chat; as text for a model without a chat template."""

    name = "gsm8k"

    def __init__(self, questions: Questions, ids: Sequence[str], *, chat: bool) -> None:
        super().__init__(questions, ids)
        style = "earlier turns" if chat else "text"
        self.protocol = f"gsm8k/2: 3 CoT shots as {style}, greedy, at most {MAX_TOKENS} tokens"

    def prompt(self, engine: Engine, item: Item) -> Prompt:
        question = f"Q: {item.data['question']}\nA:"
        if not engine.has_chat:
            shots = "".join(f"Q: {q}\nA: {a}\n\n" for q, a in SHOTS)
            return Prompt(engine.text(shots + question), MAX_TOKENS, _next_question)
        messages = []
        for q, a in SHOTS:
            messages.append({"role": "user", "content": f"Q: {q}\nA:"})
            messages.append({"role": "assistant", "content": a})
        messages.append({"role": "user", "content": question})
        return Prompt(engine.chat(messages), MAX_TOKENS, _next_question)

    def score(self, item: Item, answer: str) -> tuple[Metrics, str]:
        gold = gsm8k.gold(item.data["answer"])
        return {
            "strict": gsm8k.strict(answer) == gold,
            "flexible": gsm8k.flexible(answer) == gold,
        }, ""

    def failed(self, item: Item) -> Metrics:
        return {"strict": False, "flexible": False}


def _next_question(text: str) -> int | None:
    """lm-eval's stop: the model goes on to ask itself the next question."""
    at = text.find("Q:")
    return at if at >= 0 else None
