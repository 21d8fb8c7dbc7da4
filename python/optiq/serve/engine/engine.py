"""The engine: one thread that owns MLX and takes one step after the other for all requests.

Each sequence keeps the caches that it would have alone (kv/rows.py), and its tokens are drawn from
its own logits, so on the CPU an answer is the same to the bit in any company. What becomes of a
request is in answers.py, what a step does in steps.py.
"""

from __future__ import annotations

import atexit
import gc
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...errors import RequestError, TooLongError
from ...runtime.guesses import Lookup
from .adapters import Adapters, Mounted
from .answers import Answer, Answers, Listener, Stats
from .drafting import Drafted, DraftModel
from .model import Measured, measure
from .request import Request
from .sampling import Sampler
from .scheduler import Limits, Scheduler
from .sequences import Prefixes, Sequences
from .steps import Steps
from .text import AnswerText

SWITCH_SECONDS = 0.0005  # after which a thread gives the interpreter to one that waits for it


@dataclass(frozen=True)
class EngineOptions:
    """How many answers are made at a time, and how many wait besides.

    `memory` is the most bytes of all together: weights, caches, work, and `beside`, what the prefix
    cache may take. `context` is the most tokens of a prompt and its answer, by default the model's.
    """

    running: int = 16
    waiting: int = 64
    memory: int | None = None
    beside: int = 0
    context: int | None = None


class Engine:
    """Answers requests with one model. Call `start`, then `submit` from any thread."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        options: EngineOptions = EngineOptions(),
        prefix: Prefixes | None = None,
        sequences: Callable[[nn.Module, Measured, Prefixes | None], Sequences] = Sequences,
        draft: DraftModel | None = None,
    ) -> None:
        """Raises ServeError for a model that does not run, or does not fit `options.memory`.

        `adapters` may be set before the start; then requests may name one. `draft` guesses what
        comes next; its weights count as `options.beside`.
        """
        self._tokenizer, self._draft = tokenizer, draft
        self._measured: Measured = measure(model, options.running, options.context)
        self.make_caches = self._measured.make_caches
        self.context = self._measured.context
        self.vocabulary = self._measured.vocabulary
        self._sequences = sequences(model, self._measured, prefix)
        nbytes = self._sequences.agreed(self._measured.room(options.memory, options.beside))
        limits = Limits(options.running, options.waiting, nbytes)
        self._scheduler = Scheduler(limits, grid=self._measured.grid)
        self._answers = Answers(self._scheduler, self._sequences, tokenizer.eos_token_ids)
        self._steps = Steps(self._measured, self._answers)
        self._thread = threading.Thread(target=self._work, name="optiq-engine", daemon=True)

    @property
    def adapters(self) -> Adapters | None:
        return self._sequences.adapters

    @adapters.setter
    def adapters(self, adapters: Adapters | None) -> None:
        self._sequences.adapters = adapters

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and not self._answers.closing and not self.fault

    @property
    def fault(self) -> str:
        """Why it answers no more; empty while it does."""
        return self._answers.fault

    def lose(self, fault: str) -> None:
        """End all answers with this error, from any thread; the engine's own may be held."""
        self._answers.lose(fault)

    def start(self) -> None:
        # What is loaded stays. A full collection would walk through all of it, and every answer
        # would wait for that: 0.03 to 0.1 s with a tokenizer of transformers.
        gc.collect()
        gc.freeze()
        # By default another thread goes on for 5 ms while the engine waits for the interpreter: up
        # to half a step, several times in each.
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._thread.start()
        atexit.register(self.close)  # a thread that is inside MLX when Python exits aborts

    def submit(self, request: Request, listener: Listener) -> int:
        """A ticket for one more answer; its events go to `listener`, in the engine's thread.

        `listener` must return at once. Raises RequestError, TooLongError or OverloadedError.
        """
        request = self._checked(request)
        adapter, adapted = self._adapter(request)
        sampler = Sampler(
            request.sampling, request.tokens, self.vocabulary, request.guide, request.top_logprobs
        )
        until = time.monotonic() + request.deadline if request.deadline is not None else np.inf
        text = AnswerText(self._tokenizer, request.stop)
        shared = adapter is None or (self.adapters is not None and self.adapters.beside)
        drafts = self._measured.drafts and shared
        lookup = Lookup(request.tokens) if drafts else None
        drafted = Drafted(self._draft, request.tokens) if drafts and self._draft else None
        answer = Answer(
            request, listener, sampler, text, float(until), adapter, adapted, lookup, drafted
        )
        nbytes = self._nbytes(len(request.tokens) - 1 + request.max_tokens)
        cuts = (*(request.boundaries if self._measured.grid else ()), adapted)
        return self._answers.submit(answer, nbytes, cuts)

    def cancel(self, ticket: int) -> None:
        """End an answer within a step; one that is over stays as it is."""
        self._answers.cancel(ticket)

    def stats(self) -> Stats:
        return self._answers.stats()

    def close(self, drain: float = 0.0) -> None:
        """Take no more requests, wait up to `drain` seconds for those there are, and stop."""
        self._answers.close(drain)
        atexit.unregister(self.close)
        gc.unfreeze()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
            _until_gone(self._thread)

    def _work(self) -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            while self._answers.wait():
                self._steps.take()

    def _adapter(self, request: Request) -> tuple[Mounted | None, int]:
        """What is mounted under the name that is asked for, now, and where it begins to work."""
        if request.adapter is None:
            return None, 0
        if self.adapters is None:
            raise RequestError("this server has no adapters; leave the name of one out", "model")
        adapter = self.adapters.take(request.adapter)
        start = adapter.start(request.tokens)
        return (None, 0) if start is None else (adapter, start)

    def _nbytes(self, tokens: int) -> int:
        """Of the caches of an answer."""
        draft = self._draft.token_bytes if self._draft else 0
        return self._measured.nbytes(tokens) + tokens * draft

    def _checked(self, request: Request) -> Request:
        """The request with an answer that fits the context."""
        n = len(request.tokens)
        if n == 0:
            raise RequestError("the prompt has no tokens; give some text", "prompt")
        for param, ids in (("prompt", request.tokens), ("logit_bias", request.sampling.logit_bias)):
            outside = next((t for t in ids if not 0 <= t < self.vocabulary), None)
            if outside is not None:
                raise RequestError(
                    f"token {outside} is not one of the model's {self.vocabulary}; "
                    "give ids of its tokenizer",
                    param,
                )
        if n >= self.context:
            raise TooLongError(
                f"the prompt has {n} tokens and the context {self.context}; shorten the prompt"
            )
        most = min(request.max_tokens, self.context - n)
        nbytes, limit = self._nbytes(n + most), self._scheduler.limits.nbytes
        if nbytes > limit:
            raise TooLongError(
                f"{n} tokens and an answer of {most} need {nbytes / 1e9:.2f} GB of caches, the "
                f"limit is {limit / 1e9:.2f} GB; lower max_tokens, or serve with more --memory"
            )
        return replace(request, max_tokens=most)


def _until_gone(thread: threading.Thread) -> None:
    """Wait until the system has ended a thread that Python has.

    MLX frees what it compiled there, and needs Python for it: one that exits meanwhile aborts.
    """
    limit = time.monotonic() + 1
    while Path(f"/proc/self/task/{thread.native_id}").exists() and time.monotonic() < limit:
        time.sleep(0.001)
