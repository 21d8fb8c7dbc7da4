"""Who is admitted, who reads and who decodes in the next step: plain state, no MLX, no clock.

A request waits, then reads its prompt slice by slice, then decodes with all others that do. Its
caches are reserved in full when it is admitted, so that no answer fails for memory on its way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile

from ...errors import OverloadedError

FEWEST = 2  # tokens of a slice
SHARED = 64  # tokens in common with a prompt that is being read, that are worth waiting for


class Phase(Enum):
    WAITING = "waiting"
    READING = "reading"
    DECODING = "decoding"


@dataclass(frozen=True)
class Limits:
    """Requests that run at a time, that wait besides, and bytes of caches that may be reserved."""

    running: int = 16
    waiting: int = 64
    nbytes: int = 1 << 62


@dataclass(frozen=True)
class Pace:
    """Seconds of a step that only decodes, and of a pass that reads, by token of its slice.

    What decodes may be in that pass.
    """

    step: float = 0.02
    token: float = 0.001


@dataclass
class Job:
    """One request: `length` tokens have to be read before it decodes, `done` of them are.

    A slice ends at each of `cuts`. A job of a prompt that others read waits for them if it can
    `share` what they read.
    """

    ticket: int
    client: str
    prompt: tuple[int, ...]
    length: int
    nbytes: int
    cuts: tuple[int, ...] = ()
    share: bool = False
    done: int = 0
    phase: Phase = Phase.WAITING


@dataclass(frozen=True)
class Slice:
    """Tokens `begin` to `end` of a prompt."""

    ticket: int
    begin: int
    end: int


@dataclass(frozen=True)
class Step:
    """A slice is read, and all of `decode` get a token."""

    read: Slice | None = None
    decode: tuple[int, ...] = ()


@dataclass
class Scheduler:
    """The jobs, and the plan of each step.

    While others decode, a pass that reads takes about `slower` times as long as a step that does
    not; else `alone` seconds. With a `grid`, slices end at its multiples and nowhere else but at
    cuts, whoever else is there.
    """

    limits: Limits = Limits()
    grid: int = 0
    slower: float = 2.0
    alone: float = 0.25
    _jobs: dict[int, Job] = field(default_factory=dict)
    _waiting: dict[str, deque[int]] = field(default_factory=dict)  # by client, who takes turns
    _turns: deque[int] = field(default_factory=deque)  # of readers
    _alike: dict[tuple[int, int], int] = field(default_factory=dict)  # tokens that two begin with

    def submit(self, job: Job) -> None:
        """Raises OverloadedError when as many as may already wait."""
        waiting = self.count(Phase.WAITING)
        if waiting >= self.limits.waiting:
            raise OverloadedError(
                f"{waiting} requests wait, the limit is {self.limits.waiting}; try again later",
                retry_after=1 + waiting // max(1, self.limits.running),
            )
        self._jobs[job.ticket] = job
        self._waiting.setdefault(job.client, deque()).append(job.ticket)

    def remove(self, ticket: int) -> None:
        """Of a job that is over, in any phase."""
        job = self._jobs.pop(ticket)
        self._alike = {pair: n for pair, n in self._alike.items() if ticket not in pair}
        if job.phase is Phase.WAITING:
            self._leave_queue(job)
        elif job.phase is Phase.READING:
            self._turns.remove(ticket)

    def skip(self, ticket: int, tokens: int) -> None:
        """A reader has the first `tokens` already."""
        job = self._jobs[ticket]
        job.done = tokens
        self._decode_if_read(job)

    def read(self, done: Slice) -> None:
        """A slice was read."""
        job = self._jobs[done.ticket]
        job.done = done.end
        self._decode_if_read(job)

    def again(self, ticket: int, length: int) -> None:
        """What a job has read is lost; now it has to read `length` tokens."""
        job = self._jobs[ticket]
        if job.phase is Phase.DECODING:
            self._turns.append(ticket)
        job.phase, job.done, job.length = Phase.READING, 0, length

    def admit(self) -> list[int]:
        """Those who fit become readers; or decode, where there is nothing to read."""
        admitted: list[int] = []
        later: set[int] = set()
        while True:
            running = sum(job.phase is not Phase.WAITING for job in self._jobs.values())
            job = self._next(later)
            if job is None or running >= self.limits.running:
                return admitted
            if self._others_read_it(job):
                later.add(job.ticket)
                continue
            if self.reserved + job.nbytes > self.limits.nbytes:
                # Nobody overtakes a large job, else it might wait for ever.
                return admitted
            self._leave_queue(job)
            job.phase = Phase.READING
            self._turns.append(job.ticket)
            self._decode_if_read(job)
            admitted.append(job.ticket)

    def plan(self, pace: Pace = Pace()) -> Step:
        """The next step of those who were admitted."""
        decode = tuple(t for t, job in self._jobs.items() if job.phase is Phase.DECODING)
        return Step(self._slice(pace, bool(decode)), decode)

    def count(self, phase: Phase) -> int:
        return sum(job.phase is phase for job in self._jobs.values())

    def phase(self, ticket: int) -> Phase:
        return self._jobs[ticket].phase

    @property
    def reserved(self) -> int:
        """Bytes of the caches of all who were admitted."""
        return sum(job.nbytes for job in self._jobs.values() if job.phase is not Phase.WAITING)

    def _next(self, later: set[int]) -> Job | None:
        """Of the client with the fewest running jobs, then the oldest, without those for later."""
        running: dict[str, int] = {}
        for job in self._jobs.values():
            if job.phase is not Phase.WAITING:
                running[job.client] = running.get(job.client, 0) + 1
        heads = [
            next((t for t in queue if t not in later), None) for queue in self._waiting.values()
        ]
        jobs = [self._jobs[ticket] for ticket in heads if ticket is not None]
        return min(jobs, key=lambda job: (running.get(job.client, 0), job.ticket), default=None)

    def _leave_queue(self, job: Job) -> None:
        queue = self._waiting[job.client]
        queue.remove(job.ticket)
        if not queue:
            del self._waiting[job.client]

    def _others_read_it(self, job: Job) -> bool:
        """Whether waiting for another reader saves more tokens than that one has to read."""
        return job.share and any(
            self._common(job, other) >= max(SHARED, other.length - other.done)
            for other in self._jobs.values()
            if other.phase is Phase.READING
        )

    def _common(self, job: Job, other: Job) -> int:
        """Tokens with which both prompts begin."""
        pair = job.ticket, other.ticket
        if pair not in self._alike:
            both = zip(job.prompt, other.prompt, strict=False)
            self._alike[pair] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
        return self._alike[pair]

    def _slice(self, pace: Pace, decoding: bool) -> Slice | None:
        if not self._turns:
            return None
        job = self._jobs[self._turns[0]]
        self._turns.rotate(-1)
        seconds = self.slower * pace.step if decoding else self.alone
        end = job.done + max(FEWEST, int(seconds / max(pace.token, 1e-9)))
        if self.grid:
            end = (job.done // self.grid + 1) * self.grid
        end = min([end, job.length, *(cut for cut in job.cuts if cut > job.done)])
        return Slice(job.ticket, job.done, end)

    def _decode_if_read(self, job: Job) -> None:
        if job.done >= job.length and job.phase is Phase.READING:
            job.phase = Phase.DECODING
            self._turns.remove(job.ticket)
