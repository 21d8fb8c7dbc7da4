"""Guesses from what was there before: where they stand and when they are made. No answer shows that
there were any."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.errors import ServeError
from optiq.kv.prefix import Key
from optiq.runtime.guesses import LONGEST, NGRAM, Lookup, worthwhile
from optiq.serve.engine.drafting import SLICE, Drafted, DraftModel
from optiq.serve.engine.engine import Engine, EngineOptions
from optiq.serve.engine.prefix import PrefixCache
from optiq.serve.engine.request import Request, Sampling
from tests.serve.cases import NEVER_ENDS, ask, ask_all, model_and_tokenizer

words = st.lists(st.integers(0, 3), max_size=60)


@settings(max_examples=300, deadline=None)
@given(words, words, st.integers(0, 20))
def test_a_guess_is_what_came_after_the_same_words(
    prompt: list[int], answer: list[int], most: int
) -> None:
    lookup = Lookup(prompt)
    for token in answer:
        lookup.add(token)
    tokens = [*prompt, *answer]
    last, n = tokens[-NGRAM:], len(tokens)
    earlier = [i for i in range(NGRAM, n) if tokens[i - NGRAM : i] == last]
    guess = lookup.guess(0.0, most)
    assert bool(guess) == (bool(earlier) and len(last) == NGRAM and most > 0)
    assert len(guess) <= most
    if guess:
        assert any(tokens[i : i + len(guess)] == guess for i in earlier)


def test_guesses_get_longer_while_they_are_right_and_stop_while_they_are_wrong() -> None:
    r = random.Random(1)
    page = [r.randrange(50) for _ in range(200)]
    copying = Lookup([*page, *page[:5]])
    lengths = []
    for token in page[5:60]:
        lengths.append(len(copying.guess(0.25, LONGEST)))
        copying.add(token)
    assert lengths[-1] == LONGEST > lengths[0]
    wandering = Lookup([])
    guessed = []
    for _ in range(3000):  # three letters: all of their triples were there before
        guessed.append(len(wandering.guess(0.5, LONGEST)))
        wandering.add(r.randrange(3))
    assert sum(guessed[300:]) < 300


@given(st.integers(1, 16), st.floats(1e-4, 1), st.floats(0, 1))
def test_a_guess_that_is_worth_it_brings_more_tokens_a_second(
    rows: int, step: float, row: float
) -> None:
    least = worthwhile(rows, step, row)
    plain = rows / step
    for chance, better in ((least * 1.01 + 1e-6, True), (least * 0.99 - 1e-6, False)):
        assert ((rows + chance) / (step + row) >= plain) == better or row == 0


class Cycle:
    """Lets one of three tokens come after the other, fourteen times."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allow(self, words: npt.NDArray[np.uint32]) -> bool:
        words[0] = 1 << (5 + len(self.taken) % 3)
        return True

    def accept(self, token: int) -> None:
        assert token == 5 + len(self.taken) % 3
        self.taken.append(token)

    @property
    def done(self) -> bool:
        return len(self.taken) >= 14


def asked() -> list[Request]:
    """Prompts that say the same several times; answers of all kinds."""
    r = random.Random(3)
    found = []
    for i in range(12):
        page = [r.randrange(4, 30) for _ in range(r.choice([6, 25]))]
        found.append(
            Request(
                tuple(page * r.choice([2, 4])),
                max_tokens=r.choice([1, 7, 40]),
                sampling=Sampling(
                    temperature=r.choice([0.0, 0.0, 0.8]),
                    logit_bias=r.choice([{}, NEVER_ENDS]),
                    repetition_penalty=r.choice([1.0, 1.1]),
                    seed=i,
                ),
                top_logprobs=r.choice([None, 2]),
                stop=r.choice([(), ("e",)]),
                guide=Cycle() if i % 4 == 0 else None,
            )
        )
    return found


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def made(kv: str | None, drafts: bool, draft: DraftModel | None = None) -> Engine:
        model, tokenizer = model_and_tokenizer(tmp_path / str(len(engines)), "llama", kv)
        prefix = PrefixCache(Key("a", "", kv or ""), 100_000_000)
        engine = Engine(model, tokenizer, EngineOptions(), prefix, draft=draft)
        assert engine._measured.drafts
        engine._measured = replace(engine._measured, drafts=drafts)
        engine.start()
        engines.append(engine)
        return engine

    yield made
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("kv", [None, "8/4"])
def test_answers_are_the_same_with_guesses(
    engine: Callable[..., Engine], kv: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and together, where each guess is read, right or wrong; and what is kept of them."""
    monkeypatch.setattr("optiq.serve.engine.steps.worthwhile", lambda *_: 0.0)
    plain, guessing = engine(kv, False), engine(kv, True)
    expected = [ask(plain, request).answer for request in asked()]
    assert [ask(guessing, request).answer for request in asked()] == expected
    together = ask_all(guessing, asked())
    assert [each.answer for each in together] == expected
    stats = guessing.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.cached_tokens > 0
    assert plain.stats().drafted_tokens == 0


def draft_model(tmp_path: Path, **config: object) -> DraftModel:
    draft = DraftModel(*model_and_tokenizer(tmp_path / "draft", "llama", **config))
    return draft


@pytest.mark.parametrize("good", [True, False])
def test_answers_are_the_same_with_a_draft_model(
    engine: Callable[..., Engine], tmp_path: Path, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is the model itself is nearly always right, another one hardly ever."""
    monkeypatch.setattr(Lookup, "guess", lambda *_: [])
    monkeypatch.setattr("optiq.serve.engine.drafting.PATIENCE", 1e9)
    guess = Drafted.guess
    monkeypatch.setattr(Drafted, "guess", lambda self, token, row, most: guess(self, 1e9, 0, most))
    draft = draft_model(tmp_path) if good else draft_model(tmp_path, hidden_size=128)
    plain, guessing = engine(None, False), engine(None, True, draft)
    draft.check(guessing._tokenizer)
    expected = [ask(plain, request).answer for request in asked()]
    assert [ask(guessing, request).answer for request in asked()] == expected
    assert [each.answer for each in ask_all(guessing, asked())] == expected
    stats = guessing.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert (stats.accepted_tokens > 0.15 * stats.drafted_tokens) == good


def test_a_draft_reads_what_the_conversation_says(tmp_path: Path) -> None:
    """After a long prompt, wrong guesses and pauses it guesses as one that begins anew."""
    draft = draft_model(tmp_path)
    r = random.Random(2)
    prompt = [r.randrange(4, 30) for _ in range(3 * SLICE)]
    old = Drafted(draft, prompt)
    assert old.guess(1e9, 0, 4) == old.guess(1e9, 0, 4) == []  # it is still reading
    for step in range(12):
        got = old.guess(1e9, 0, 5)
        new = Drafted(draft, prompt)
        while not (expected := new.guess(1e9, 0, 5)):
            pass
        assert got == expected
        assert len(got) == 5
        for token in got[: step % 6]:
            old.add(token)
            prompt.append(token)
        other = r.randrange(4, 30)
        old.add(other)
        prompt.append(other)


def test_guesses_that_do_not_pay_are_left(tmp_path: Path) -> None:
    draft = draft_model(tmp_path)
    drafted = Drafted(draft, [5, 6, 7])
    made = 0
    for _ in range(600):
        drafted._draft.seconds = 0.0
        made += len(drafted.guess(1e-9, 1e-10, 3))  # it takes far longer than a token is worth
        drafted.add(4)
    assert made <= 12


def test_a_draft_of_other_tokens_is_refused(tmp_path: Path) -> None:
    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(ServeError, match="the draft model has other tokens"):
        draft_model(tmp_path).check(Other())
    windowed = DraftModel(*model_and_tokenizer(tmp_path / "windowed", "gemma3_text"))
    with pytest.raises(ServeError, match="keeps a window or a state"):
        windowed.check(windowed._tokenizer)
