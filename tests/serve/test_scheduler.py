"""The scheduler, driven by random events against what it promises."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.errors import OverloadedError
from optiq.serve.engine.scheduler import Job, Limits, Pace, Phase, Scheduler, Slice

LIMITS = Limits(running=3, waiting=4, nbytes=100)


def job(ticket: int, length: int = 10, nbytes: int = 10, client: str = "", **more: object) -> Job:
    return Job(ticket, client, tuple(range(length + 1)), length, nbytes, **more)  # type: ignore[arg-type]


@dataclass
class Seen:
    """What the outside world knows of a job."""

    length: int
    nbytes: int
    client: str
    cuts: tuple[int, ...]
    read: int = 0
    admitted: bool = False
    tokens: int = 0
    slices: list[Slice] = field(default_factory=list)


jobs = st.tuples(
    st.integers(0, 40), st.integers(1, 60), st.sampled_from("abc"),
    st.lists(st.integers(1, 40), max_size=3).map(tuple),
)  # fmt: skip
events = st.lists(
    st.one_of(
        jobs.map(lambda j: ("submit", j)),
        st.integers(0, 30).map(lambda n: ("end", n)),
        st.integers(0, 30).map(lambda n: ("again", n)),
        st.just(("step", 0)),
        st.just(("step", 0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(events, st.sampled_from([0, 16]))
def test_every_job_reads_all_of_its_prompt_in_order_and_then_decodes(
    happens: list[tuple[str, object]], grid: int
) -> None:
    scheduler, seen = Scheduler(LIMITS, grid=grid), {}
    tickets = iter(range(1000))

    def step() -> None:
        for ticket in scheduler.admit():
            seen[ticket].admitted = True
        plan = scheduler.plan(Pace(step=0.01, token=0.001))
        for ticket in plan.decode:
            assert seen[ticket].read == seen[ticket].length
            seen[ticket].tokens += 1
        ready = {t for t, s in seen.items() if s.admitted and s.read == s.length}
        assert set(plan.decode) == ready  # nobody who can go on is left out
        if plan.read:
            of = seen[plan.read.ticket]
            assert of.admitted
            assert plan.read.begin == of.read < plan.read.end <= of.length
            inside = range(plan.read.begin + 1, plan.read.end)
            assert not set(inside) & set(of.cuts)
            if grid:
                assert all(i % grid for i in inside)
                assert plan.read.end % grid == 0 or plan.read.end in (of.length, *of.cuts)
            of.read = plan.read.end
            scheduler.read(plan.read)
        admitted = [s for s in seen.values() if s.admitted]
        assert len(admitted) <= LIMITS.running
        assert scheduler.reserved == sum(s.nbytes for s in admitted) <= LIMITS.nbytes

    for kind, value in happens:
        if kind == "submit":
            length, nbytes, client, cuts = value  # type: ignore[misc]
            ticket = next(tickets)
            waiting = sum(not s.admitted for s in seen.values())
            new = Job(ticket, client, tuple(range(length + 1)), length, nbytes, cuts=cuts)
            if waiting >= LIMITS.waiting:
                with pytest.raises(OverloadedError):
                    scheduler.submit(new)
            else:
                scheduler.submit(new)
                seen[ticket] = Seen(length, nbytes, client, cuts)
        elif kind == "step":
            step()
        elif seen:
            ticket = sorted(seen)[value % len(seen)]  # type: ignore[operator]
            if kind == "end":
                scheduler.remove(ticket)
                del seen[ticket]
            elif seen[ticket].admitted and seen[ticket].length:
                scheduler.again(ticket, seen[ticket].length)
                seen[ticket].read = 0
    for _ in range(2000):  # all of them finish if each answer ends after two tokens
        if not seen:
            break
        step()
        for ticket in [t for t, s in seen.items() if s.tokens >= 2]:
            scheduler.remove(ticket)
            del seen[ticket]
    assert not seen


def test_clients_take_turns() -> None:
    scheduler = Scheduler(Limits(running=2, waiting=100))
    for ticket in range(20):
        scheduler.submit(job(ticket, 0, client="many"))
    for ticket in range(20, 23):
        scheduler.submit(job(ticket, 0, client="few"))
    order = []
    for _ in range(6):
        order += scheduler.admit()
        for ticket in [t for t in order if t in scheduler._jobs]:
            scheduler.remove(ticket)
    assert [t >= 20 for t in order[:6]].count(True) == 3


def test_a_large_job_is_not_overtaken_for_ever() -> None:
    scheduler = Scheduler(Limits(running=8, waiting=8, nbytes=100))
    scheduler.submit(job(1, nbytes=60))
    assert scheduler.admit() == [1]
    scheduler.submit(job(2, nbytes=90))
    scheduler.submit(job(3, nbytes=10))
    assert scheduler.admit() == []
    scheduler.remove(1)
    assert scheduler.admit() == [2, 3]


def test_readers_take_turns_and_slices_are_short_while_others_decode() -> None:
    scheduler, pace = Scheduler(Limits()), Pace(step=0.010, token=0.001)
    scheduler.submit(job(1, 4000))
    scheduler.submit(job(2, 4000))
    scheduler.admit()
    first, second = scheduler.plan(pace).read, scheduler.plan(pace).read
    assert first
    assert second
    assert {first.ticket, second.ticket} == {1, 2}
    assert first.end == 250  # a quarter of a second
    scheduler.submit(job(3, 0))
    scheduler.admit()
    step = scheduler.plan(pace)
    assert step.decode == (3,)
    assert step.read
    assert step.read.end - step.read.begin == 20  # in two steps of 10 ms


def test_a_job_waits_for_another_that_reads_what_it_can_share() -> None:
    scheduler = Scheduler(Limits())
    scheduler.submit(job(1, 500, share=True))
    scheduler.submit(job(2, 500, share=True))
    scheduler.submit(Job(3, "", tuple(range(1000, 1501)), 500, 10, share=True))
    assert scheduler.admit() == [1, 3]
    while scheduler.phase(1) is not Phase.DECODING:
        assert scheduler.phase(2) is Phase.WAITING
        plan = scheduler.plan()
        assert plan.read
        scheduler.read(plan.read)
        scheduler.admit()
    assert scheduler.phase(2) is Phase.READING
