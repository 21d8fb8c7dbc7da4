"""Text as tokens come, against the tokenizer's own text of all of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

from optiq.serve.engine.text import AnswerText
from tests.tiny import VOCAB, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def run(tokenizer: Any, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Any]:
    """The pieces until a stop text, and what says which one it was."""
    text = AnswerText(tokenizer, stop)
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped is not None:
            break
    return [*pieces, text.end()], text.stopped


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(3, VOCAB - 1), max_size=40))
def test_pieces_are_the_text(tokenizer: Any, tokens: list[int]) -> None:
    pieces, _ = run(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_a_character_is_never_cut(tokenizer: Any, text: str) -> None:
    """Each token is one byte or a few."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces, _ = run(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    if "\ufffd" not in tokenizer.decode(tokens):
        assert not any("\ufffd" in piece for piece in pieces)


words = st.text(alphabet="abä", max_size=25)
stops = st.lists(st.text(alphabet="abä", min_size=1, max_size=4), max_size=3).map(tuple)


@settings(max_examples=300, deadline=None)
@given(words, stops)
def test_an_answer_ends_before_the_first_stop_text(
    tokenizer: Any, text: str, stop: tuple[str, ...]
) -> None:
    tokens = [t for c in text for t in tokenizer.encode(c, add_special_tokens=False)]
    pieces, stopped = run(tokenizer, tokens, stop)
    ends = [(text.index(s) + len(s), text.index(s), s) for s in stop if s in text]
    if not ends:
        assert ("".join(pieces), stopped) == (text, None)
    else:
        first = min(end for end, _, _ in ends)  # nothing is known of what comes later
        cut = min(at for end, at, _ in ends if end == first)
        assert "".join(pieces) == text[:cut]
        assert stopped in stop


def test_nothing_is_held_back_without_need(tokenizer: Any) -> None:
    text = AnswerText(tokenizer, ("stop",))
    tokens = [t for c in "a sto" for t in tokenizer.encode(c, add_special_tokens=False)]
    assert [text.add(t) for t in tokens] == ["a", " ", "", "", ""]
    assert text.add(tokenizer.encode("x", add_special_tokens=False)[0]) == "stox"
