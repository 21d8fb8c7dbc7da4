"""Steps of the batch: each reads a slice of one prompt and gives every running answer a token.

Whatever goes wrong ends one answer; where the model itself raises, all are read again and go on.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from ...base.text import one_line
from ...errors import ServeError
from ...kv.rows import Unbatchable
from ...ops import metal
from ...runtime.guesses import LONGEST, MOST, smoothed, worthwhile
from .answers import Answer, Answers
from .model import Measured
from .request import Reading
from .sampling import Floats, choose_one
from .scheduler import Pace, Slice, Step

log = logging.getLogger("optiq.serve")

FAILURES = 3  # of the model, after which an answer is given up
ALONE = 8  # steps that an answer takes alone after a failure, so that it is known whose it is
KEEPING = 256  # tokens of a prompt after which what was read of it is kept


class Steps:
    """Takes steps for `answers`, in one thread."""

    def __init__(self, measured: Measured, answers: Answers) -> None:
        self._measured, self._answers = measured, answers
        self._sequences = answers.sequences
        self._pace = Pace(measured.step_seconds, measured.token_seconds)
        self._paced = 0  # rows of the steps whose pace it is
        self._row = measured.token_seconds  # what a token more costs that is guessed
        self._guessed = 0  # tokens in this step
        self._drafting = 0.0  # seconds in which a model guessed them
        self._to_keep: tuple[Answer, int] | None = None  # who reads, and its tokens so far

    def take(self) -> None:
        """One step."""
        try:
            self._take(self._answers.plan(self._pace))
        except Exception:  # a fault of the engine itself
            log.exception("the engine failed; all answers end, and it starts anew")
            self._answers.counters.restarts += 1
            self._answers.fail_all(ServeError("the engine failed; ask again"))

    def _take(self, step: Step) -> None:
        # To copy what was read takes about as long as to read a slice: a step does one of them.
        keep, self._to_keep = self._to_keep, None
        part = None if keep else step.read
        self._guessed, self._drafting = 0, 0.0
        started = time.perf_counter()
        if step.decode:
            self._answers.counters.steps += 1
            groups = self._groups([self._answers[t] for t in step.decode])
            if part and self._beside(groups, part):
                self._decode(groups[0], part)
            else:
                self._note_step(len(step.decode), started, sum(map(self._decode, groups)))
                started = time.perf_counter()  # the slice takes a pass of its own
                self._read(part)
        else:
            self._read(part)
        if part:
            taken = (time.perf_counter() - started) / (part.end - part.begin)
            self._pace = replace(self._pace, token=smoothed(self._pace.token, taken))
        if keep and self._answers.has(keep[0].ticket):
            self._answers.keep(*keep, reading=True)
        if not step.decode and not step.read:
            time.sleep(0.001)  # those who wait have to wait for memory or another reader

    def _note_step(self, rows: int, started: float, model: float) -> None:
        """What a step of decoding took that read no prompt, and the model of it."""
        taken = time.perf_counter() - started - self._drafting
        if self._guessed:
            more = max(0.0, taken - self._pace.step) / self._guessed
            self._row = smoothed(self._row, more)
            return
        self._pace, self._paced = replace(self._pace, step=smoothed(self._pace.step, taken)), rows
        counters = self._answers.counters
        counters.step_seconds = self._pace.step
        counters.overhead_seconds = smoothed(counters.overhead_seconds, taken - model)

    def _drafts(self, group: list[Answer]) -> list[list[int]]:
        """What each reads beside its next token: the guesses that are worth their rows."""
        drafts: list[list[int]] = [[] for _ in group]
        if len(group) != self._paced or any(a.alone for a in group):
            return drafts
        least, left = worthwhile(len(group), self._pace.step, self._row), MOST
        for i, answer in enumerate(group):
            room = answer.request.max_tokens - len(answer.generated) - 1
            most = min(LONGEST, left, room)
            if answer.lookup is not None:
                drafts[i] = answer.lookup.guess(least, most)
            if answer.drafted is not None and not drafts[i]:
                started = time.perf_counter()
                drafts[i] = answer.drafted.guess(self._pace.step / len(group), self._row, most)
                self._drafting += time.perf_counter() - started
            left -= len(drafts[i])
        return drafts

    def _groups(self, rows: list[Answer]) -> list[list[Answer]]:
        """Who shares a pass through the model: all, or rows with and without an adapter apart."""
        groups = [[row] for row in rows if row.alone]
        rows = [row for row in rows if not row.alone]
        adapters = self._sequences.adapters
        plain, adapted = self._measured.together, adapters.together if adapters else 1
        if adapters and adapters.alike and any(row.adapter for row in rows):
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
        rows = [*groups[0], self._answers[part.ticket]]
        adapters = self._sequences.adapters
        return (
            self._measured.beside
            and len(groups) == 1
            and len(groups[0]) == self._paced
            and not any(a.alone for a in rows)
            and (not any(a.adapter for a in rows) or (adapters is not None and adapters.beside))
        )

    def _read(self, part: Slice | None) -> None:
        if part is None or not self._answers.has(part.ticket):
            return
        answer = self._answers[part.ticket]
        tokens = answer.held[part.begin : part.end]
        try:
            self._sequences.read(part.ticket, part.begin, tokens)
        except Exception as error:  # whatever a model or a kernel raises
            self._stumble([answer], error)
            return
        self._has_read(answer, part)

    def _has_read(self, answer: Answer, part: Slice) -> None:
        self._answers.has_read(part)
        ends = (len(answer.held), answer.adapted, *answer.request.boundaries)
        if part.end in ends:
            self._answers.keep(answer, part.end)
        elif part.end // KEEPING > part.begin // KEEPING:
            self._to_keep = answer, part.end
        total = len(answer.request.tokens)
        self._answers.tell(answer, Reading(min(part.end + 1, total), total, answer.cached))

    def _decode(self, group: list[Answer], part: Slice | None = None, guess: bool = True) -> float:
        """Tokens for each, and `part` is read; returns the seconds that the model took."""
        started = time.perf_counter()
        reader = self._answers[part.ticket] if part else None
        drafts = self._drafts(group) if guess and not part else [[] for _ in group]
        try:
            logits = self._forward(group, drafts, part)
        except Unbatchable:
            if part:
                seconds = self._decode(group)
                self._read(part)
                return seconds
            if any(drafts):
                return self._decode(group, guess=False)
            return sum(self._decode([answer]) for answer in group)
        except Exception as error:  # whatever a model or a kernel raises
            self._stumble([*group, reader] if reader else group, error)
            return time.perf_counter() - started
        model = time.perf_counter() - started
        self._guessed += sum(map(len, drafts))
        highest = logits.max(axis=1)  # NaN where the row has any
        row = 0
        for answer, draft in zip(group, drafts, strict=True):
            answer.alone = max(0, answer.alone - 1)
            self._draw(answer, draft, logits[row:], highest[row:])
            row += 1 + len(draft)
        if part and reader and self._answers.has(reader.ticket):
            self._has_read(reader, part)
        return model

    def _draw(self, answer: Answer, draft: list[int], logits: Floats, highest: Floats) -> None:
        """The next tokens of an answer, as far as its draft was right, and one more."""
        right = 0
        for guessed in (*draft, None):
            token = choose_one(logits[right], float(highest[right]), answer.sampler)
            if isinstance(token, ServeError):
                self._answers.fail(answer, token)
                return
            self._answers.go_on(answer, token)
            if not self._answers.has(answer.ticket) or token.id != guessed:
                break
            right += 1
        if draft:
            self._answers.counters.drafted_tokens += len(draft)
            self._answers.counters.accepted_tokens += right
            if self._answers.has(answer.ticket):
                self._sequences.cut(answer.ticket, len(answer.held))

    def _forward(
        self, group: list[Answer], drafts: list[list[int]], part: Slice | None = None
    ) -> Floats:
        """Logits `[rows, V]` after the next token of each, and after each of its draft. `part` is
        read in the same pass."""
        tickets = [answer.ticket for answer in group]
        inputs = [[answer.next, *draft] for answer, draft in zip(group, drafts, strict=True)]
        if part is None:
            return self._sequences.logits(tickets, inputs)
        tokens = self._answers[part.ticket].held[part.begin : part.end]
        return self._sequences.logits(tickets, inputs, part.ticket, part.begin, tokens)

    def _stumble(self, group: list[Answer], error: Exception) -> None:
        """The model raised, and nobody knows what is in the caches: read all of it again.

        Those who stumble take some steps alone then, so that one that always fails is found.
        """
        metal.give_up(error)
        self._answers.counters.restarts += 1
        log.error(
            "the model raised %s (%s); %d answers are read again",
            type(error).__name__, one_line(error), len(group),
        )  # fmt: skip
        for answer in group:
            if not self._answers.has(answer.ticket):  # all ended when a rank was lost
                continue
            answer.failures += 1
            answer.alone = ALONE
            if answer.failures >= FAILURES:
                self._answers.fail(answer, ServeError(f"the model failed: {one_line(error)}"))
            else:
                self._answers.read_again(answer)
