"""What guessing from earlier text brings: a file written again with a change, and free text.

    python -m bench.drafts MODEL FILE [ROUNDS]

MODEL is to return the Python FILE with its first class renamed, at temperature 0, and to tell a
story at temperature 1. Each is done with and without guesses in turn, in one engine; the answers
have to be the same. Printed are tokens per second after the first token, and with over without,
with quartiles.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import optiq
from optiq.serve.engine.engine import Engine, EngineOptions
from optiq.serve.engine.request import Event, Failed, Finished, Piece, Request, Sampling

TOKENS = 400  # of an answer
STORY = "Tell a long story about a fox, a river and a lamp."


def ask(engine: Engine, request: Request) -> tuple[list[int], float]:
    """Tokens, and how many a second came after the first."""
    over = threading.Event()
    times: list[float] = []
    ids: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, Piece):
            times.extend(time.perf_counter() for _ in event.tokens)
            ids.extend(token.id for token in event.tokens)
        elif isinstance(event, (Finished, Failed)):
            over.set()

    engine.submit(request, listen)
    over.wait()
    return ids, (len(ids) - 1) / (times[-1] - times[0])


def main() -> None:
    model, tokenizer = optiq.load(sys.argv[1])
    code = Path(sys.argv[2]).read_text()
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    found = re.search(r"class (\w+)", code)
    assert found, "FILE has no class"
    edit = f"Return this file with the class {found[1]} renamed to Other, and nothing else."
    engine = Engine(model, tokenizer, EngineOptions(running=4))
    assert engine._measured.drafts, "this model has no guesses"
    engine.start()
    jobs = {
        "edit": (f"{edit}\n```python\n{code}```", Sampling(temperature=0)),
        "free text": (STORY, Sampling(temperature=1, seed=1)),
    }
    for name, (text, sampling) in jobs.items():
        messages = [{"role": "user", "content": text}]
        prompt = tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        speeds: dict[bool, list[float]] = {False: [], True: []}
        answers = []
        before = engine.stats()
        for _ in range(rounds):
            for guess in (False, True):
                engine._measured = replace(engine._measured, drafts=guess)
                ids, speed = ask(engine, Request(prompt, TOKENS, sampling))
                answers.append(ids)
                speeds[guess].append(speed)
        assert all(ids == answers[0] for ids in answers), "an answer changed"
        stats = engine.stats()
        drafted = (stats.drafted_tokens - before.drafted_tokens) // rounds
        accepted = (stats.accepted_tokens - before.accepted_tokens) // rounds
        low, middle, high = np.quantile(np.divide(speeds[True], speeds[False]), [0.25, 0.5, 0.75])
        print(
            f"{name}: prompt {len(prompt)}, answer {len(answers[0])} tokens, "
            f"{np.median(speeds[False]):.1f} -> {np.median(speeds[True]):.1f} tokens/s, "
            f"{middle:.2f} [{low:.2f}, {high:.2f}] times, {accepted} of {drafted} guesses right",
            flush=True,
        )
    engine.close()


if __name__ == "__main__":
    main()
