"""The answers on their way: each from its submission to the last event that its client gets."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from ...errors import DeadlineError, OverloadedError, ServeError
from ...runtime.guesses import Lookup
from .adapters import Mounted
from .drafting import Drafted
from .request import Event, Failed, Finished, Piece, Request, Token
from .sampling import Sampler
from .scheduler import Job, Pace, Phase, Scheduler, Slice, Step
from .sequences import Sequences
from .text import AnswerText

log = logging.getLogger("optiq.serve")

Listener = Callable[[Event], None]

STOPPED = 5  # seconds after which a client may ask again: perhaps the server is restarted


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
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the drafted ones
    answers: int = 0
    cancelled: int = 0
    failed: int = 0
    restarts: int = 0
    step_seconds: float = 0.0  # of the last steps, smoothed
    overhead_seconds: float = 0.0  # of them, all but the model


@dataclass
class Answer:
    """One request on its way."""

    request: Request
    listener: Listener
    sampler: Sampler
    text: AnswerText
    until: float  # time.monotonic() of its deadline
    adapter: Mounted | None = None
    adapted: int = 0  # tokens that are read before the adapter works
    lookup: Lookup | None = None
    drafted: Drafted | None = None
    ticket: int = 0
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
        """The tokens that its caches hold when it decodes."""
        return (*self.request.tokens, *self.generated)[:-1]


class Answers:
    """All of them, by their tickets, with one lock around them and the scheduler."""

    def __init__(self, scheduler: Scheduler, sequences: Sequences, eos: Iterable[int]) -> None:
        self.scheduler, self.sequences = scheduler, sequences
        self.counters = Stats()
        self.closing = False
        self.fault = ""  # why none can be made any more
        self._eos = frozenset(eos)
        self._answers: dict[int, Answer] = {}
        self._cancelled: deque[int] = deque()
        self._tickets = count(1)
        self._changed = threading.Condition()

    # From any thread.

    def submit(self, answer: Answer, nbytes: int, cuts: tuple[int, ...]) -> int:
        """A ticket. Its caches take `nbytes`. Raises OverloadedError."""
        request = answer.request
        with self._changed:
            if self.closing or self.fault:
                raise OverloadedError(self.fault or "the server is shutting down", STOPPED)
            ticket = next(self._tickets)
            self.scheduler.submit(
                Job(
                    ticket,
                    request.client,
                    request.tokens,
                    len(request.tokens) - 1,
                    nbytes,
                    cuts=cuts,
                    share=self.sequences.prefix is not None and answer.adapter is None,
                )
            )
            answer.ticket = ticket
            self._answers[ticket] = answer
            self._changed.notify()
        return ticket

    def cancel(self, ticket: int) -> None:
        """End an answer within a step; one that is over stays as it is."""
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify()

    def stats(self) -> Stats:
        with self._changed:
            waiting = self.scheduler.count(Phase.WAITING)
            return replace(
                self.counters,
                running=len(self._answers) - waiting,
                waiting=waiting,
                kv_bytes=self.scheduler.reserved,
            )

    def close(self, drain: float) -> None:
        """Take no more, wait up to `drain` seconds for those there are, and end the rest."""
        with self._changed:
            self.closing = True
            self._changed.wait_for(lambda: not self._answers, drain)
            for ticket, answer in list(self._answers.items()):
                answer.until = -np.inf
                self._cancelled.append(ticket)
            self._changed.notify_all()

    def lose(self, fault: str) -> None:
        """End all, and take no more: the engine's thread may be held for ever."""
        with self._changed:
            self.fault = fault
        self.fail_all(ServeError(fault))

    # What follows is called in the engine's thread.

    def has(self, ticket: int) -> bool:
        """Whether its answer is not over."""
        return ticket in self._answers

    def __getitem__(self, ticket: int) -> Answer:
        return self._answers[ticket]

    def wait(self) -> bool:
        """Until there is something to do; False when nothing will be any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._answers or self._cancelled or self.closing)
            over = self.closing and not self._answers
            if over:
                self._changed.notify_all()
        return not over

    def plan(self, pace: Pace) -> Step:
        """The next step, after the answers that are over went and those who fit came in."""
        self._drop_ended()
        with self._changed:
            admitted = self.scheduler.admit()
        for ticket in admitted:
            self._admit(self._answers[ticket])
        with self._changed:
            return self.scheduler.plan(pace)

    def has_read(self, part: Slice) -> None:
        self.counters.prompt_tokens += part.end - part.begin
        with self._changed:
            self.scheduler.read(part)

    def read_again(self, answer: Answer) -> None:
        """All that it has, because what its caches hold is not known."""
        with self._changed:
            self.scheduler.again(answer.ticket, len(answer.held))
        self._admit(answer)

    def go_on(self, answer: Answer, token: Token) -> None:
        """With one more token, which may be the last."""
        answer.generated.append(token.id)
        self.counters.generated_tokens += 1
        if answer.lookup is not None:
            answer.lookup.add(token.id)
        if answer.drafted is not None:
            answer.drafted.add(token.id)
        request, guide = answer.request, answer.request.guide
        if token.id in self._eos:
            self._finish(answer, "stop")
            return
        try:
            text = answer.text.add(token.id)
            done = guide is not None and guide.done
        except Exception as error:  # of a tokenizer or a grammar
            self.fail(answer, ServeError(f"the token {token.id} has no text ({error})"))
            return
        self.tell(answer, Piece(text, (token,)))
        if answer.text.stopped is not None:
            self._finish(answer, "stop_text")
        elif done:
            self._finish(answer, "stop")
        elif len(answer.generated) >= request.max_tokens:
            self._finish(answer, "length")

    def keep(self, answer: Answer, length: int, reading: bool = False) -> None:
        """The caches of its first tokens, for prompts that begin with them."""
        self.sequences.keep(answer.ticket, answer.held[:length], reading)

    def tell(self, answer: Answer, event: Event) -> None:
        try:
            answer.listener(event)
        except Exception:
            log.exception("a listener failed; its answer ends")
            if self.has(answer.ticket):
                self._end(answer, None)

    def fail(self, answer: Answer, error: ServeError) -> None:
        self._end(answer, Failed(error))

    def fail_all(self, error: ServeError) -> None:
        for answer in list(self._answers.values()):
            self.fail(answer, error)

    def _drop_ended(self) -> None:
        """Answers that were cancelled, or whose time is over."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, deque()
        for ticket in cancelled:
            if ticket in self._answers:
                answer = self._answers[ticket]
                if answer.until == -np.inf:
                    self.fail(answer, OverloadedError("the server is shutting down", STOPPED))
                else:
                    self._end(answer, self._finished(answer, "cancelled"))
        now = time.monotonic()
        for answer in [a for a in list(self._answers.values()) if a.until < now]:
            seconds = answer.request.deadline
            self.fail(answer, DeadlineError(f"not answered within {seconds:g} seconds"))

    def _admit(self, answer: Answer) -> None:
        """Caches for a reader: those that hold most of what it has to read."""
        tokens = (*answer.held, answer.next)
        length = self.sequences.open(answer.ticket, tokens, answer.adapter, answer.adapted)
        if not answer.generated:
            answer.cached = length
            self.counters.cached_tokens += length
        with self._changed:
            self.scheduler.skip(answer.ticket, length)

    def _finish(self, answer: Answer, reason: str) -> None:
        if not self.has(answer.ticket):  # its listener failed
            return
        if rest := answer.text.end():
            self.tell(answer, Piece(rest))
        if answer.text.stopped is not None:
            reason = "stop_text"
        self.sequences.cut(answer.ticket, len(answer.held))
        self.keep(answer, len(answer.held))
        self._end(answer, self._finished(answer, reason))

    def _finished(self, answer: Answer, reason: str) -> Finished:
        return Finished(
            reason,
            len(answer.request.tokens),
            answer.cached,
            len(answer.generated),
            answer.text.stopped,
        )

    def _end(self, answer: Answer, event: Finished | Failed | None) -> None:
        with self._changed:
            if self._answers.pop(answer.ticket, None) is None:
                return  # `lose` was first
            self.scheduler.remove(answer.ticket)
            if isinstance(event, Failed):
                self.counters.failed += 1
            elif isinstance(event, Finished) and event.reason == "cancelled":
                self.counters.cancelled += 1
            else:
                self.counters.answers += 1
            self._changed.notify_all()
        self.sequences.close(answer.ticket)
        if event is not None:
            self.tell(answer, event)
