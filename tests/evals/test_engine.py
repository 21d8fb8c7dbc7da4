"""Batches give what one sequence at a time gives, and that is what the whole forward pass says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from optiq.errors import EvalError
from optiq.evals.engine import Engine, Prompt, shared_length
from optiq.runtime.loading import load
from tests.tiny import BOS, EOS, tiny_folder

HEAD = list(range(40, 70))  # longer than a window of gemma3_text


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3_text"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tiny_folder(tmp_path_factory.mktemp("engine"), request.param)
    return Engine(*load(str(folder)), batch=4)


def prompts(n: int, *, shared: bool = False, seed: int = 0) -> list[list[int]]:
    """`n` prompts of lengths that differ."""
    rng = np.random.default_rng(seed)
    rests = [rng.integers(5, 380, rng.integers(1, 24)).tolist() for _ in range(n)]
    return [[BOS, *(HEAD if shared else []), *rest] for rest in rests]


def log_p(engine: Engine, tokens: list[int]) -> np.ndarray:
    """log p of every token that may follow, by one pass without cache, in float64."""
    logits = np.array(engine.model(mx.array([tokens]))[0, -1].astype(mx.float32), dtype=np.float64)
    return np.asarray(logits - np.logaddexp.reduce(logits))


def greedy(engine: Engine, tokens: list[int]) -> Iterator[int]:
    tokens = list(tokens)
    while True:
        tokens.append(int(log_p(engine, tokens).argmax()))
        yield tokens[-1]


def by_hand(engine: Engine, prompt: Prompt) -> str:
    written: list[int] = []
    for token in greedy(engine, prompt.tokens):
        if token == EOS:
            break
        written.append(token)
        text = engine.tokenizer.decode(written)
        if prompt.stop and (end := prompt.stop(text)) is not None:
            return str(text[:end])
        if len(written) == prompt.max_tokens:
            break
    return str(engine.tokenizer.decode(written))


@pytest.mark.parametrize("shared", [False, True])
def test_answers_are_greedy(engine: Engine, shared: bool) -> None:
    asked = [Prompt(tokens, 3 + i) for i, tokens in enumerate(prompts(11, shared=shared))]
    assert engine.answers(asked) == [by_hand(engine, prompt) for prompt in asked]


def test_batched_is_single(engine: Engine) -> None:
    asked = [Prompt(tokens, 12) for tokens in prompts(9, shared=True, seed=1)]
    assert engine.answers(asked) == [engine.answers([prompt])[0] for prompt in asked]


def test_an_answer_ends_where_its_stop_says(engine: Engine) -> None:
    """Within a token, too; the others of the batch are not disturbed."""

    def after_five(text: str) -> int | None:
        return 5 if len(text) >= 5 else None

    asked = [Prompt(t, 16, after_five if i % 2 else None) for i, t in enumerate(prompts(7))]
    answers = engine.answers(asked)
    assert answers == [by_hand(engine, prompt) for prompt in asked]
    assert all(len(answer) <= 5 for answer in answers[1::2])
    assert any(len(answer) > 5 for answer in answers[::2])


def test_the_end_of_a_turn_ends_the_answer(tmp_path: Path) -> None:
    engine = Engine(*load(str(tiny_folder(tmp_path))))
    weight = np.array(engine.model.model.embed_tokens.weight)
    first = next(greedy(engine, [BOS, 50]))
    weight[[first, EOS]] = weight[[EOS, first]]  # now what came first is the end
    engine.model.model.embed_tokens.weight = mx.array(weight)
    assert engine.answers([Prompt([BOS, 50], 8)]) == [""]


def test_each_finished_sequence_is_told(engine: Engine) -> None:
    told: list[None] = []
    counting = Engine(engine.model, engine.tokenizer, 4, lambda: told.append(None))
    counting.answers([Prompt(tokens, 2 + i) for i, tokens in enumerate(prompts(6))])
    assert len(told) == 6


@pytest.mark.parametrize("shared", [False, True])
def test_log_likelihoods(engine: Engine, shared: bool) -> None:
    """Endings of one token and of several, that share their beginning or not."""
    contexts = prompts(7, shared=shared, seed=2)
    endings = [[[7], [8], [9, 10], [9, 11, 12]] for _ in contexts]
    found = engine.log_likelihoods(contexts, endings)
    for context, options, values in zip(contexts, endings, found, strict=True):
        for option, value in zip(options, values, strict=True):
            steps = [log_p(engine, context + option[:k])[t] for k, t in enumerate(option)]
            # Activations in 16-bit fixed point, as in tests/nn/test_accelerate.py.
            assert value == pytest.approx(sum(steps), abs=5e-3)


def test_what_sequences_share() -> None:
    head = list(range(20))
    assert shared_length([[*head, 1, 2], [*head, 3], [*head, 1]]) == 20
    assert shared_length([[*head, 1], head]) == 19  # something is left to run of each
    assert shared_length([[*head, 1]]) == 0
    assert shared_length([[1, *head], [2, *head]]) == 0
    assert shared_length([[1, 2, 3], [1, 2, 4]]) == 0  # too little to be worth it


def test_one_bos(engine: Engine) -> None:
    chat = engine.chat([{"role": "user", "content": "hello"}])
    text = engine.tokenizer.decode(chat)
    assert chat.count(BOS) == 1
    assert text.endswith("<|im_start|>assistant\n")
    assert engine.text("hello").count(BOS) == 1


@pytest.mark.parametrize("shared", [False, True])
def test_one_by_one_is_batched(engine: Engine, shared: bool) -> None:
    """What is asked where mlx-lm has no batches of the model's caches."""
    alone = replace(engine, batch=1)
    asked = [Prompt(tokens, 3 + i) for i, tokens in enumerate(prompts(6, shared=shared))]
    assert alone.answers(asked) == engine.answers(asked)
    contexts, endings = prompts(4, shared=shared, seed=2), [[[7], [9, 10]]] * 4
    found, want = (np.array(e.log_likelihoods(contexts, endings)) for e in (alone, engine))
    np.testing.assert_allclose(found, want, atol=5e-3)


def test_batches_are_left_where_mlx_lm_has_none(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.suited("m") == engine

    def broken(*args: object, **options: object) -> None:
        raise ValueError("no batching\nwith history")

    # The package has a function of the module's name.
    monkeypatch.setattr(sys.modules["mlx_lm.generate"], "BatchGenerator", broken)
    assert engine.suited("m").batch == 1

    class Broken(type(engine.model)):  # type: ignore[misc]
        def __call__(self, *args: object, **options: object) -> None:
            raise RuntimeError("no kernel\nfor this")

    model = Broken.__new__(Broken)
    model.__dict__.update(engine.model.__dict__)
    dict.update(model, engine.model)
    with pytest.raises(EvalError, match=r"cannot generate with m: no kernel for this$"):
        replace(engine, model=model).suited("m")
