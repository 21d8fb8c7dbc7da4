"""The engine: one thread that owns MLX and takes one step after the other for all requests.

A step reads a slice of one prompt and gives every running answer a token. Each sequence keeps the
caches that it would have alone (kv/rows.py), and its tokens are drawn from its own logits, so on
the CPU an answer is the same to the bit in any company. Whatever goes wrong ends one answer; where
the model itself raises, all are read again and go on.
"""

from __future__ import annotations

import atexit
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from ...base.text import one_line
from ...errors import DeadlineError, OverloadedError, RequestError, ServeError, TooLongError
from ...kv.rows import Caches, Unbatchable, beside, joined
from ...ops import metal
from .adapters import Adapters, Mounted
from .model import GROWTH, Measured, measure
from .request import Event, Failed, Finished, Piece, Reading, Request, Token
from .sampling import Floats, Sampler, choose
from .scheduler import Job, Limits, Pace, Phase, Scheduler, Slice
from .text import AnswerText

log = logging.getLogger("optiq.serve")

Listener = Callable[[Event], None]

FAILURES = 3  # of the model, after which an answer is given up
ALONE = 8  # steps that an answer takes alone after a failure, so that it is known whose it is
STOPPED = 5  # seconds after which a client may ask again: perhaps the server is restarted
KEEPING = 256  # tokens of a prompt after which what was read of it is kept
SMOOTHING = 0.2  # of the pace, by each new step


class Prefixes(Protocol):
    """Where caches of prompts are found and kept (see prefix.py)."""

    def find(self, tokens: Sequence[int], make: Callable[[], Caches]) -> tuple[Caches, int]: ...
    def keep(self, tokens: Sequence[int], caches: Caches, *, reading: bool = False) -> None: ...


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


@dataclass
class Stats:
    """Counters since the start, and what is there now."""

    running: int = 0
    waiting: int = 0
    kv_bytes: int = 0  # reserved
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    answers: int = 0
    cancelled: int = 0
    failed: int = 0
    restarts: int = 0
    step_seconds: float = 0.0  # of the last steps, smoothed
    overhead_seconds: float = 0.0  # of them, all but the model


@dataclass
class Answer:
    """One request on its way."""

    ticket: int
    request: Request
    listener: Listener
    sampler: Sampler
    text: AnswerText
    until: float  # time.monotonic() of its deadline
    adapter: Mounted | None = None
    adapted: int = 0  # tokens that are read before the adapter works
    caches: Caches = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    cached: int = 0
    failures: int = 0
    alone: int = 0  # steps still to take alone

    @property
    def next(self) -> int:
        """The token that is read in the next step."""
        return self.generated[-1] if self.generated else self.request.tokens[-1]

    @property
    def held(self) -> tuple[int, ...]:
        """The tokens that the caches hold when the answer decodes."""
        return (*self.request.tokens, *self.generated)[:-1]


class Engine:
    """Answers requests with one model. Call `start`, then `submit` from any thread."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        options: EngineOptions = EngineOptions(),
        prefix: Prefixes | None = None,
    ) -> None:
        """Raises ServeError for a model that does not run, or does not fit `options.memory`.

        `adapters` may be set before the start; then requests may name one.
        """
        self._model, self._tokenizer, self._prefix = model, tokenizer, prefix
        self.adapters: Adapters | None = None
        self._measured: Measured = measure(model, options.running, options.context)
        self.make_caches = self._measured.make_caches
        self.context = self._measured.context
        self.vocabulary = self._measured.vocabulary
        nbytes = self._measured.room(options.memory, options.beside)
        self._scheduler = Scheduler(
            Limits(options.running, options.waiting, nbytes), grid=self._measured.grid
        )
        self._pace = Pace(self._measured.step_seconds, self._measured.token_seconds)
        self._to_keep: tuple[Answer, int] | None = None  # who reads, and its tokens so far
        self._paced = 0  # rows of the steps whose pace it is
        self._eos = frozenset(tokenizer.eos_token_ids)
        self._answers: dict[int, Answer] = {}
        # By the tickets of a group: the caches of its answers, and as one.
        self._joined: dict[tuple[int, ...], tuple[list[Caches], Caches]] = {}
        self._cancelled: deque[int] = deque()
        self._tickets = count(1)
        self._changed = threading.Condition()
        self._stats = Stats()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="optiq-engine", daemon=True)

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def start(self) -> None:
        # What is loaded stays. A full collection would walk through all of it, and every answer
        # would wait for that: 0.03 to 0.1 s with a tokenizer of transformers.
        gc.collect()
        gc.freeze()
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
        length = len(request.tokens) - 1
        with self._changed:
            if self._closing:
                raise OverloadedError("the server is shutting down", STOPPED)
            ticket = next(self._tickets)
            self._scheduler.submit(
                Job(
                    ticket,
                    request.client,
                    request.tokens,
                    length,
                    self._measured.nbytes(length + request.max_tokens),
                    cuts=(*(request.boundaries if self._measured.grid else ()), adapted),
                    share=self._prefix is not None and adapter is None,
                )
            )
            self._answers[ticket] = Answer(
                ticket, request, listener, sampler, text, float(until), adapter, adapted
            )
            self._changed.notify()
        return ticket

    def cancel(self, ticket: int) -> None:
        """End an answer within a step; one that is over stays as it is."""
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify()

    def stats(self) -> Stats:
        with self._changed:
            waiting = self._scheduler.count(Phase.WAITING)
            return replace(
                self._stats,
                running=len(self._answers) - waiting,
                waiting=waiting,
                kv_bytes=self._scheduler.reserved,
            )

    def close(self, drain: float = 0.0) -> None:
        """Take no more requests, wait up to `drain` seconds for those there are, and stop."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._answers, drain)
            for ticket, answer in list(self._answers.items()):
                answer.until = -np.inf
                self._cancelled.append(ticket)
            self._changed.notify_all()
        atexit.unregister(self.close)
        gc.unfreeze()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
            _until_gone(self._thread)

    def _adapter(self, request: Request) -> tuple[Mounted | None, int]:
        """What is mounted under the name that is asked for, now, and where it begins to work."""
        if request.adapter is None:
            return None, 0
        if self.adapters is None:
            raise RequestError("this server has no adapters; leave the name of one out", "model")
        adapter = self.adapters.take(request.adapter)
        start = adapter.start(request.tokens)
        return (None, 0) if start is None else (adapter, start)

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
        nbytes, limit = self._measured.nbytes(n + most), self._scheduler.limits.nbytes
        if nbytes > limit:
            raise TooLongError(
                f"{n} tokens and an answer of {most} need {nbytes / 1e9:.2f} GB of caches, the "
                f"limit is {limit / 1e9:.2f} GB; lower max_tokens, or serve with more --memory"
            )
        return replace(request, max_tokens=most)

    # What follows runs in the engine's thread.

    def _work(self) -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            while True:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._answers or self._cancelled or self._closing
                    )
                    if self._closing and not self._answers:
                        self._changed.notify_all()
                        return
                try:
                    self._step()
                except Exception:  # a fault of the engine itself
                    log.exception("the engine failed; all answers end, and it starts anew")
                    self._stats.restarts += 1
                    for answer in list(self._answers.values()):
                        self._end(answer, Failed(ServeError("the engine failed; ask again")))

    def _step(self) -> None:
        self._drop_ended()
        with self._changed:
            admitted = self._scheduler.admit()
        for ticket in admitted:
            self._admit(self._answers[ticket])
        with self._changed:
            step = self._scheduler.plan(self._pace)
        # To copy what was read takes about as long as to read a slice: a step does one of them.
        keep, self._to_keep = self._to_keep, None
        part = None if keep else step.read
        started = time.perf_counter()
        if step.decode:
            self._stats.steps += 1
            groups = self._groups([self._answers[t] for t in step.decode])
            tickets = [tuple(answer.ticket for answer in group) for group in groups]
            self._joined = {key: self._joined[key] for key in tickets if key in self._joined}
            if part and self._beside(groups, part):
                self._decode(groups[0], part)
            else:
                self._note_step(len(step.decode), started, sum(map(self._decode, groups)))
                self._read(part)
        else:
            self._read(part)
        if part:
            taken = (time.perf_counter() - started) / (part.end - part.begin)
            self._pace = replace(self._pace, token=_smoothed(self._pace.token, taken))
        if keep and keep[0].ticket in self._answers:
            self._keep(*keep, reading=True)
        if not step.decode and not step.read:
            time.sleep(0.001)  # those who wait have to wait for memory or another reader

    def _note_step(self, rows: int, started: float, model: float) -> None:
        """What a step of decoding took that read nothing, and the model of it."""
        taken = time.perf_counter() - started
        self._pace, self._paced = replace(self._pace, step=_smoothed(self._pace.step, taken)), rows
        self._stats.step_seconds = self._pace.step
        self._stats.overhead_seconds = _smoothed(self._stats.overhead_seconds, taken - model)

    def _groups(self, rows: list[Answer]) -> list[list[Answer]]:
        """Who shares a pass through the model: all, or rows with and without an adapter apart."""
        groups = [[row] for row in rows if row.alone]
        rows = [row for row in rows if not row.alone]
        plain, adapted = self._measured.together, self.adapters.together if self.adapters else 1
        if self.adapters and self.adapters.alike and any(row.adapter for row in rows):
            shares = [(rows, min(plain, adapted))]
        else:
            shares = [
                ([row for row in rows if row.adapter is None], plain),
                ([row for row in rows if row.adapter is not None], adapted),
            ]
        for shared, most in shares:
            groups += [shared[i : i + most] for i in range(0, len(shared), most)]
        return groups

    def _beside(self, groups: list[list[Answer]], part: Slice) -> bool:
        """Whether the slice is read in the step of the only group, whose pace is known."""
        return (
            self._measured.beside
            and len(groups) == 1
            and len(groups[0]) == self._paced
            and all(a.adapter is None and not a.alone for a in groups[0])
            and self._answers[part.ticket].adapter is None
            and not self._answers[part.ticket].alone
        )

    def _drop_ended(self) -> None:
        """Answers that were cancelled, or whose time is over."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, deque()
        for ticket in cancelled:
            if ticket in self._answers:
                answer = self._answers[ticket]
                if answer.until == -np.inf:
                    stopped = OverloadedError("the server is shutting down", STOPPED)
                    self._end(answer, Failed(stopped))
                else:
                    self._end(answer, self._finished(answer, "cancelled"))
        now = time.monotonic()
        for answer in [a for a in self._answers.values() if a.until < now]:
            seconds = answer.request.deadline
            self._end(answer, Failed(DeadlineError(f"not answered within {seconds:g} seconds")))

    def _admit(self, answer: Answer) -> None:
        """Caches for a reader: those that hold most of what it has to read."""
        tokens, length = (*answer.held, answer.next), 0
        answer.caches = []
        if (prefix := self._prefix_of(answer, len(tokens))) is not None:
            try:
                answer.caches, length = prefix.find(tokens, self.make_caches)
                if self._prefix is not None and length < answer.adapted:
                    before = tokens[: answer.adapted + 1]
                    answer.caches, length = self._prefix.find(before, self.make_caches)
            except Exception:
                log.exception("the prefix cache failed; the prompt is read as a whole")
                answer.caches = []
        if not answer.caches:
            answer.caches, length = self.make_caches(), 0
        # Room for the whole prompt at once: growing a long cache copies all of it.
        _grow_by(answer.caches, len(tokens) + GROWTH)
        if not answer.generated:
            answer.cached = length
            self._stats.cached_tokens += length
        with self._changed:
            self._scheduler.skip(answer.ticket, length)

    def _read(self, part: Slice | None) -> None:
        if part is None or part.ticket not in self._answers:
            return
        answer = self._answers[part.ticket]
        tokens = answer.held[part.begin : part.end]
        try:
            model = self._model_of([answer] if part.begin >= answer.adapted else [])
            model(mx.array([tokens]), cache=answer.caches)
            mx.eval([cache.state for cache in answer.caches])
        except Exception as error:  # whatever a model or a kernel raises
            self._stumble([answer], error)
            return
        self._has_read(answer, part)

    def _has_read(self, answer: Answer, part: Slice) -> None:
        self._stats.prompt_tokens += part.end - part.begin
        with self._changed:
            self._scheduler.read(part)
        if part.end == len(answer.held):
            _grow_by(answer.caches, GROWTH)
        ends = (len(answer.held), answer.adapted, *answer.request.boundaries)
        if part.end in ends:
            self._keep(answer, part.end)
        elif part.end // KEEPING > part.begin // KEEPING:
            self._to_keep = answer, part.end
        total = len(answer.request.tokens)
        self._tell(answer, Reading(min(part.end + 1, total), total, answer.cached))

    def _decode(self, group: list[Answer], part: Slice | None = None) -> float:
        """One token for each, and `part` is read; returns the seconds that the model took."""
        started = time.perf_counter()
        reader = self._answers[part.ticket] if part else None
        try:
            logits = self._forward(group, part)
        except Unbatchable:
            if part:
                seconds = self._decode(group)
                self._read(part)
                return seconds
            return sum(self._decode([answer]) for answer in group)
        except Exception as error:  # whatever a model or a kernel raises
            self._stumble([*group, reader] if reader else group, error)
            return time.perf_counter() - started
        model = time.perf_counter() - started
        chosen = choose(logits, [answer.sampler for answer in group])
        for answer, token in zip(group, chosen, strict=True):
            answer.alone = max(0, answer.alone - 1)
            if isinstance(token, ServeError):
                self._end(answer, Failed(token))
            else:
                self._go_on(answer, token)
        if part and reader and reader.ticket in self._answers:
            self._has_read(reader, part)
        return model

    def _forward(self, group: list[Answer], part: Slice | None = None) -> Floats:
        """Logits `[B, V]` after the next token of each. `part` is read in the same pass."""
        inputs = [[answer.next] for answer in group]
        caches = [answer.caches for answer in group]
        if part:
            reader = self._answers[part.ticket]
            inputs += [[token] for token in reader.held[part.begin : part.end]]
            together = beside(caches, reader.caches, part.end - part.begin)
        elif len(group) == 1 and not self._measured.beside:
            together = caches[0]  # else one node for all blocks is faster, also for one row
        else:
            key = tuple(answer.ticket for answer in group)
            if key not in self._joined or self._joined[key][0] != caches:
                self._joined[key] = caches, joined(caches)
            together = self._joined[key][1]
        logits = self._model_of(group)(mx.array(inputs), cache=together)
        logits = logits[:, -1].astype(mx.float32)
        if self._measured.states:
            mx.eval(logits, [cache.state for each in caches for cache in each])
        return np.asarray(logits)

    def _model_of(self, group: list[Answer]) -> nn.Module:
        """The model for a group, with the adapters of its rows."""
        if self.adapters is None:
            return self._model
        rows = [answer.adapter for answer in group]
        in_use = (a.adapter for a in self._answers.values() if a.caches and a.adapter is not None)
        return self.adapters.model(rows, in_use)

    def _prefix_of(self, answer: Answer, length: int) -> Prefixes | None:
        """For the first tokens of it: what an adapter has read is not what the model has."""
        if answer.adapter is not None and self._prefix is not None and length > answer.adapted:
            return answer.adapter.prefix
        return self._prefix

    def _go_on(self, answer: Answer, token: Token) -> None:
        answer.generated.append(token.id)
        self._stats.generated_tokens += 1
        request, guide = answer.request, answer.request.guide
        if token.id in self._eos:
            self._finish(answer, "stop")
            return
        try:
            text = answer.text.add(token.id)
            done = guide is not None and guide.done
        except Exception as error:  # of a tokenizer or a grammar
            self._end(answer, Failed(ServeError(f"the token {token.id} has no text ({error})")))
            return
        self._tell(answer, Piece(text, (token,)))
        if answer.text.stopped is not None:
            self._finish(answer, "stop_text")
        elif done:
            self._finish(answer, "stop")
        elif len(answer.generated) >= request.max_tokens:
            self._finish(answer, "length")

    def _finish(self, answer: Answer, reason: str) -> None:
        if answer.ticket not in self._answers:  # its listener failed
            return
        if rest := answer.text.end():
            self._tell(answer, Piece(rest))
        if answer.text.stopped is not None:
            reason = "stop_text"
        self._keep(answer, len(answer.held))
        self._end(answer, self._finished(answer, reason))

    def _finished(self, answer: Answer, reason: str) -> Finished:
        return Finished(
            reason,
            len(answer.request.tokens),
            answer.cached,
            len(answer.generated),
            answer.text.stopped,
        )

    def _keep(self, answer: Answer, length: int, reading: bool = False) -> None:
        prefix = self._prefix_of(answer, length)
        if prefix is None or not length:
            return
        try:
            prefix.keep(answer.held[:length], answer.caches, reading=reading)
        except Exception:
            log.exception("the prefix cache failed; the answer goes on without it")

    def _stumble(self, group: list[Answer], error: Exception) -> None:
        """The model raised, and nobody knows what is in the caches: read all of it again.

        Those who stumble take some steps alone then, so that one that always fails is found.
        """
        metal.give_up(error)
        self._stats.restarts += 1
        log.error(
            "the model raised %s (%s); %d answers are read again",
            type(error).__name__, one_line(error), len(group),
        )  # fmt: skip
        for answer in group:
            answer.failures += 1
            answer.alone = ALONE
            if answer.failures >= FAILURES:
                self._end(answer, Failed(ServeError(f"the model failed: {one_line(error)}")))
                continue
            with self._changed:
                self._scheduler.again(answer.ticket, len(answer.held))
            self._admit(answer)

    def _tell(self, answer: Answer, event: Event) -> None:
        try:
            answer.listener(event)
        except Exception:
            log.exception("a listener failed; its answer ends")
            if answer.ticket in self._answers:
                self._end(answer, None)

    def _end(self, answer: Answer, event: Finished | Failed | None) -> None:
        with self._changed:
            del self._answers[answer.ticket]
            self._scheduler.remove(answer.ticket)
            if isinstance(event, Failed):
                self._stats.failed += 1
            elif isinstance(event, Finished) and event.reason == "cancelled":
                self._stats.cancelled += 1
            else:
                self._stats.answers += 1
            self._changed.notify_all()
        answer.caches = []
        self._joined = {}
        if event is not None:
            self._tell(answer, event)


def _grow_by(caches: Caches, tokens: int) -> None:
    """The room that these caches make when theirs is used up."""
    for cache in caches:
        if isinstance(cache, KVCache):
            cache.step = (tokens + GROWTH - 1) // GROWTH * GROWTH


def _until_gone(thread: threading.Thread) -> None:
    """Wait until the system has ended a thread that Python has.

    MLX frees what it compiled there, and needs Python for it: one that exits meanwhile aborts.
    """
    limit = time.monotonic() + 1
    while Path(f"/proc/self/task/{thread.native_id}").exists() and time.monotonic() < limit:
        time.sleep(0.001)


def _smoothed(before: float, now: float) -> float:
    return now if before == 0 else before + SMOOTHING * (now - before)
