"""Every answer is the one that its request would have had alone, whatever else happens."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from optiq.errors import DeadlineError, OverloadedError, RequestError, ServeError, TooLongError
from optiq.kv.prefix import Key
from optiq.serve.engine.engine import Engine, EngineOptions
from optiq.serve.engine.prefix import PrefixCache
from optiq.serve.engine.request import Failed, Finished, Request, Sampling
from optiq.serve.engine.scheduler import Limits, Pace
from tests.serve.cases import (
    NEVER_ENDS,
    Asked,
    ask,
    ask_all,
    model_and_tokenizer,
    prompt,
    requests,
)

Make = Callable[..., Engine]
KINDS = [("llama", None), ("llama", "8/4"), ("gemma3_text", None), ("qwen3_moe", "8")]
ENDLESS = Sampling(temperature=0, logit_bias=NEVER_ENDS)


@pytest.fixture
def started() -> Iterator[Callable[[Engine], Engine]]:
    engines: list[Engine] = []

    def start(engine: Engine) -> Engine:
        engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture
def make(tmp_path: Path, started: Callable[[Engine], Engine]) -> Make:
    def made(
        kind: str = "llama", kv: str | None = None, prefix: Any = None, **options: Any
    ) -> Engine:
        model, tokenizer = model_and_tokenizer(tmp_path, kind, kv)
        return started(Engine(model, tokenizer, EngineOptions(**options), prefix))

    return made


@pytest.mark.parametrize(("kind", "kv"), KINDS)
def test_an_answer_is_the_same_in_any_company(make: Make, kind: str, kv: str | None) -> None:
    engine, r = make(kind, kv), random.Random(1)
    asked = requests(seed=5, count=14)
    alone = [ask(engine, request).answer for request in asked]
    cancelled = {3, 7}

    def disturb(i: int, so_far: list[Asked]) -> None:
        time.sleep(r.random() * 0.004)
        if i - 2 in cancelled:
            so_far[i - 2].cancel()

    for _ in range(2):
        order = r.sample(range(len(asked)), len(asked))
        together = ask_all(engine, [asked[i] for i in order], disturb)
        for place, i in enumerate(order):
            if place not in cancelled:
                assert together[place].answer == alone[i]
    assert engine.stats().kv_bytes == engine.stats().running == 0


@pytest.mark.parametrize("tokens", [8, 24, 1000])
def test_the_slices_of_a_prompt_do_not_matter(
    make: Make, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    engine = make()
    request = Request(prompt(random.Random(2), 300), 12, ENDLESS, top_logprobs=4)
    expected = ask(engine, request).answer
    pace = Pace(step=1.0, token=1.5 / tokens)
    plan = engine._scheduler.plan
    monkeypatch.setattr(engine._scheduler, "plan", lambda _: plan(pace))
    beside = Asked(engine, Request((5, 6), 200, ENDLESS))
    assert ask(engine, request).answer == expected
    beside.cancel()
    assert isinstance(beside.result().last, Finished)


@pytest.mark.parametrize(("kind", "kv"), [("llama", None), ("llama", "8/4")])
def test_a_prefix_from_the_cache_does_not_matter(make: Make, kind: str, kv: str | None) -> None:
    engine = make(kind, kv, PrefixCache(Key("model"), 1 << 30))
    first = Request(prompt(random.Random(3), 150), 30, ENDLESS, top_logprobs=2)
    cold = ask(engine, first)
    warm = ask(engine, first)
    assert (cold.last.cached_tokens, warm.last.cached_tokens) == (0, 149)
    assert warm.answer == cold.answer
    # The next turn replays the answer, and more.
    turn = Request((*first.tokens, *cold.ids, 17, 18, 19), 20, ENDLESS, top_logprobs=2)
    second = ask(engine, turn)
    assert second.last.cached_tokens == 150 + 30 - 1
    assert second.answer == ask(make_again(engine), turn).answer


def make_again(engine: Engine) -> Engine:
    """The same engine without a prefix cache."""
    engine._sequences.prefix = None
    return engine


def test_prompts_that_begin_alike_are_read_once(make: Make) -> None:
    engine = make(prefix=PrefixCache(Key("model"), 1 << 30))
    shared = prompt(random.Random(4), 300)
    asked = [Request((*shared, i), 5, ENDLESS) for i in range(3, 9)]
    answers = ask_all(engine, asked)
    assert sum(a.last.cached_tokens >= 256 for a in answers) == len(asked) - 1
    assert engine.stats().prompt_tokens < 2 * len(shared)


def test_seeds(make: Make) -> None:
    engine = make()

    def drawn(seed: int | None) -> list[int]:
        return ask(engine, Request((5, 6, 7), 30, Sampling(seed=seed, logit_bias=NEVER_ENDS))).ids

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)


def test_greedy_answers_are_those_of_mlx_lm(make: Make, tmp_path: Path) -> None:
    engine = make()
    tokens = prompt(random.Random(6), 40)
    got = ask(engine, Request(tokens, 25, ENDLESS)).ids
    sequence = list(tokens)
    for _ in range(25):
        logits = engine._sequences.model(mx.array([sequence]))[0, -1]
        logits[mx.array(list(NEVER_ENDS))] -= 100
        sequence.append(int(mx.argmax(logits).item()))
    assert got == sequence[len(tokens) :]


def test_log_probabilities_are_those_of_the_model(make: Make) -> None:
    engine = make()
    tokens = prompt(random.Random(7), 20)
    sampling = Sampling(temperature=0.5, top_k=3, seed=1, logit_bias=NEVER_ENDS)
    answer = ask(engine, Request(tokens, 5, sampling, top_logprobs=20))
    for i, token in enumerate(answer.tokens):
        logits = engine._sequences.model(mx.array([[*tokens, *answer.ids[:i]]]))[0, -1]
        exact = np.array(logits, dtype=np.float64)
        exact -= np.log(np.exp(exact).sum())
        best = np.argsort(-exact)[:20]
        # Keys and values are float16 in the engine.
        assert token.logprob == pytest.approx(exact[token.id], abs=5e-3)
        assert {t for t, _ in token.top} == set(best.tolist())
        assert [p for _, p in token.top] == pytest.approx(exact[best].tolist(), abs=5e-3)


def test_a_stop_text_ends_the_answer_and_is_not_in_it(make: Make) -> None:
    engine = make()
    request = Request((5, 6), 40, ENDLESS)
    whole = ask(engine, request).text
    stop = whole[10:14]
    answer = ask(engine, Request((5, 6), 40, ENDLESS, stop=("not there", stop)))
    assert answer.text == whole[: whole.index(stop)]
    assert (answer.last.reason, answer.last.stop) == ("stop_text", stop)
    assert answer.last.generated_tokens < 40


def test_the_model_may_end_its_answer(make: Make) -> None:
    engine = make()
    ends = {engine._tokenizer.eos_token_id: 100.0}
    answer = ask(engine, Request((5, 6), 40, Sampling(temperature=0, logit_bias=ends)))
    assert (answer.text, answer.ids) == ("", [])
    assert (answer.last.reason, answer.last.generated_tokens) == ("stop", 1)


def test_an_answer_fits_the_context(make: Make) -> None:
    engine = make(context=64)
    answer = ask(engine, Request(tuple(range(3, 53)), 1000, ENDLESS))
    assert (answer.last.reason, answer.last.generated_tokens) == ("length", 14)
    with pytest.raises(TooLongError, match="64 tokens and the context 64"):
        engine.submit(Request(tuple(range(3, 67)), 1), lambda event: None)


@pytest.mark.parametrize(
    "request_", [Request((), 5), Request((1, 384), 5), Request((1, -1), 5),
                 Request((1,), 5, Sampling(logit_bias={384: 1.0}))],
)  # fmt: skip
def test_tokens_that_the_model_does_not_have_are_refused(make: Make, request_: Request) -> None:
    with pytest.raises(RequestError):
        make().submit(request_, lambda event: None)


class Faulty(nn.Module):
    """A model that raises, or gives no numbers, where `fault` says so of its input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.__dict__["fault"] = lambda tokens: None
        self.__dict__["nan"] = None

    @property
    def layers(self) -> Any:
        return self.model.layers

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits = self.model(tokens, cache=cache)
        self.__dict__["fault"](tokens)
        if self.__dict__["nan"] is not None:
            hit = (tokens == self.__dict__["nan"]).any(axis=1)
            logits = mx.where(hit[: len(logits), None, None], mx.nan, logits)
        return logits


@pytest.fixture
def faulty(tmp_path: Path, started: Callable[[Engine], Engine]) -> tuple[Engine, dict[str, Any]]:
    """An engine, and where the faults of its model are set."""
    model, tokenizer = model_and_tokenizer(tmp_path)
    wrapped = Faulty(model)
    return started(Engine(wrapped, tokenizer)), wrapped.__dict__


def test_a_model_that_raises_once_ends_nothing(faulty: tuple[Engine, dict[str, Any]]) -> None:
    engine, model = faulty
    asked = requests(seed=8, count=8, longest=60)
    alone = [ask(engine, request).answer for request in asked]
    calls = iter(range(10_000))

    def sometimes(tokens: mx.array) -> None:
        if next(calls) in (5, 17):  # an answer may meet both; at three it is given up
            raise RuntimeError("a kernel failed")

    model["fault"] = sometimes
    assert [a.answer for a in ask_all(engine, asked)] == alone
    assert engine.stats().restarts == 2


def test_a_request_on_which_the_model_always_fails_fails_alone(
    faulty: tuple[Engine, dict[str, Any]],
) -> None:
    engine, model = faulty
    asked = [Request((5 + i, 6), 30, ENDLESS) for i in range(6)]
    alone = [ask(engine, request).answer for request in asked]
    bad = Request((200, 99), 30, ENDLESS)

    def always(tokens: mx.array) -> None:
        if bool((tokens == 99).any()):
            raise RuntimeError("this token cannot be computed")

    model["fault"] = always
    answers = ask_all(engine, [*asked[:3], bad, *asked[3:]])
    failed = answers.pop(3).last
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ServeError)
    assert "this token cannot be computed" in str(failed.error)
    assert [a.answer for a in answers] == alone


def test_logits_that_are_not_numbers_end_their_answer_alone(
    faulty: tuple[Engine, dict[str, Any]],
) -> None:
    engine, model = faulty
    asked = [Request((5 + i, 6), 30, ENDLESS) for i in range(4)]
    alone = [ask(engine, request).answer for request in asked]
    model["nan"] = 98
    answers = ask_all(engine, [*asked, Request((5, 98), 30, ENDLESS)])
    assert "not numbers" in str(answers[-1].last.error)
    assert [a.answer for a in answers[:-1]] == alone


class OnlyEven:
    """A guide: even tokens from 10 on, at most `most` of them; it may raise at some point."""

    def __init__(self, most: int, fails: str = "") -> None:
        self.most, self.fails, self.count = most, fails, 0

    def allow(self, words: Any) -> bool:
        if self.fails == "allow" and self.count == 2:
            raise ValueError("no state")
        words[:] = 0x55555555
        words[0] &= 0xFFFFFC00
        if self.fails == "nothing" and self.count == 2:
            words[:] = 0
        return True

    def accept(self, token: int) -> None:
        if self.fails == "accept" and self.count == 2:
            raise ValueError("no state")
        self.count += 1

    @property
    def done(self) -> bool:
        return self.count >= self.most


def test_a_guide_decides_what_may_come(make: Make) -> None:
    answer = ask(make(), Request((5, 6), 50, Sampling(seed=1, temperature=2.0), guide=OnlyEven(9)))
    assert len(answer.ids) == 9
    assert all(t % 2 == 0 and t >= 10 for t in answer.ids)
    assert answer.last.reason == "stop"


@pytest.mark.parametrize("fails", ["allow", "accept", "nothing"])
def test_a_guide_that_fails_ends_its_answer_alone(make: Make, fails: str) -> None:
    engine = make()
    other = Request((5, 6), 20, ENDLESS)
    alone = ask(engine, other).answer
    failed, beside = ask_all(engine, [Request((7, 8), 20, guide=OnlyEven(9, fails)), other])
    assert "grammar" in str(failed.last.error)
    assert beside.answer == alone


def test_a_listener_that_fails_ends_its_answer_alone(make: Make) -> None:
    engine = make()
    other = Request((5, 6), 20, ENDLESS)
    alone = ask(engine, other).answer

    def fail(event: Any) -> None:
        raise OSError("the client has gone")

    engine.submit(Request((7, 8), 300, ENDLESS), fail)
    assert ask(engine, other).answer == alone
    assert engine.stats().running == 0


def test_an_answer_can_be_cancelled_at_any_time(make: Make) -> None:
    engine = make(running=1)
    running = Asked(engine, Request((5, 6), 400, ENDLESS))
    waiting = Asked(engine, Request((5, 6), 400, ENDLESS))
    waiting.cancel()
    assert waiting.result().last.reason == "cancelled"
    running.cancel()
    assert running.result().last.generated_tokens < 400
    running.cancel()  # once more does nothing
    engine.cancel(12345)
    assert ask(engine, Request((5, 6), 3, ENDLESS)).last.reason == "length"
    assert engine.stats().cancelled == 2


def test_a_deadline(make: Make) -> None:
    engine = make(running=1)
    blocks = Asked(engine, Request((5, 6), 400, ENDLESS))
    late = Asked(engine, Request((5, 6), 400, ENDLESS, deadline=0.0))
    failed = late.result().last
    assert isinstance(failed.error, DeadlineError)
    blocks.cancel()
    blocks.result()


def test_what_does_not_fit_waits_and_then_is_refused(make: Make) -> None:
    engine = make(running=2, waiting=3)
    hold = threading.Event()
    engine.submit(Request((5, 6), 1, ENDLESS), lambda event: hold.wait(10) and None)
    time.sleep(0.05)
    asked = [Asked(engine, Request((5, 6), 5, ENDLESS)) for _ in range(3)]
    with pytest.raises(OverloadedError) as refused:
        engine.submit(Request((5, 6), 5), lambda event: None)
    assert refused.value.retry_after >= 1
    hold.set()
    assert len({a.result().text for a in asked}) == 1


def test_memory_is_reserved_before_an_answer_starts(make: Make) -> None:
    engine = make()
    one = engine._measured.nbytes(100)
    engine._scheduler.limits = Limits(nbytes=2 * one)
    seen: set[int] = set()

    def watch(event: Any) -> None:
        seen.add(engine.stats().kv_bytes)

    for i in range(6):
        engine.submit(Request((5 + i, 6), 50, ENDLESS), watch)
    while engine.stats().answers < 6:
        time.sleep(0.01)
    assert 2 * one in seen
    assert max(seen) <= 2 * one
    engine._scheduler.limits = Limits(nbytes=one)
    with pytest.raises(TooLongError, match="lower max_tokens"):
        engine.submit(Request((5, 6), 511), lambda event: None)


def test_too_little_memory_is_said_at_once(tmp_path: Path) -> None:
    model, tokenizer = model_and_tokenizer(tmp_path)
    with pytest.raises(ServeError, match="--memory allows"):
        Engine(model, tokenizer, EngineOptions(memory=1000))
    fits = Engine(model, tokenizer, EngineOptions(memory=100_000_000))
    less = Engine(model, tokenizer, EngineOptions(memory=100_000_000, beside=30_000_000))
    rooms = [e._scheduler.limits.nbytes for e in (fits, less)]
    assert rooms[0] - rooms[1] == pytest.approx(30_000_000, rel=0.2)  # work is measured each time
    with pytest.raises(ServeError, match="--memory allows"):
        Engine(model, tokenizer, EngineOptions(memory=100_000_000, beside=99_990_000))


def test_a_fault_of_the_engine_ends_all_answers_and_not_the_engine(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    with monkeypatch.context() as patch:
        patch.setattr("optiq.serve.engine.steps.choose_one", lambda *_: 1 / 0)
        assert "the engine failed" in str(ask(engine, Request((5, 6), 5, ENDLESS)).last.error)
    assert ask(engine, Request((5, 6), 5, ENDLESS)).last.reason == "length"


def test_an_engine_that_lost_a_rank_ends_answers_and_takes_no_more(make: Make) -> None:
    engine = make()
    running = Asked(engine, Request((5, 6), 400, ENDLESS))
    engine.lose("the server lost a rank (rank 1 died); ask again")
    assert "rank 1 died" in str(running.result().last.error)
    assert not engine.ready
    with pytest.raises(OverloadedError, match="lost a rank"):
        engine.submit(Request((5, 6), 4, ENDLESS), lambda event: None)


def test_closing_ends_answers(make: Make) -> None:
    engine = make()
    long = Asked(engine, Request((5, 6), 500, ENDLESS))
    engine.close()
    assert isinstance(long.result().last, (Finished, Failed))


def test_closing_waits_for_answers(make: Make) -> None:
    engine = make()
    short = Asked(engine, Request((5, 6), 3, ENDLESS))
    engine.close(drain=60)
    assert short.result().last.reason == "length"
    with pytest.raises(ServeError, match="shutting down"):
        engine.submit(Request((5, 6), 3), lambda event: None)
    assert not engine.ready
