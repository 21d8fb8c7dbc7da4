"""An answer is held to its form after its reasoning, which has a budget."""

from __future__ import annotations

from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from optiq.serve.grammar import AnswerForm
from tests.chat.templates import family, wrapped
from tests.serve.guided import (
    PERSON,
    accepts,
    encode,
    grammars,
    made,
    words,
)
from tests.tiny import VOCAB


@pytest.fixture(scope="module")
def thinker() -> TokenizerWrapper:
    return family("qwen3")


def ids(tokenizer: TokenizerWrapper, *marks: str) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(mark)) for mark in marks]


def test_a_grammar_begins_after_the_reasoning(thinker: TokenizerWrapper) -> None:
    compiler = grammars(thinker)
    ends = {thinker.eos_token_id}
    begun = compiler.compile(AnswerForm("choice", ["yes"], reasoning=True))
    open = compiler.compile(AnswerForm("choice", ["yes"]))
    thought = "Let me see <tool_call> {x</think>"
    for text, inside, outside in [
        (f"{thought}yes", True, False),
        (f"<think>{thought}yes", True, True),
        ("yes", False, True),
        (f"{thought}no", False, False),
        ("Let me see", False, False),
    ]:
        assert accepts(made(begun), encode(thinker, text), ends) is inside, text
        assert accepts(made(open), encode(thinker, text), ends) is outside, text


def test_an_answer_cannot_end_inside_its_reasoning(thinker: TokenizerWrapper) -> None:
    guide = made(grammars(thinker).compile(AnswerForm("json_object", reasoning=True)))
    allowed = words(guide, VOCAB)
    assert allowed is not None
    assert thinker.eos_token_id not in allowed
    assert set(range(len(thinker))) - {thinker.eos_token_id} == set(allowed.tolist())
    assert not guide.done


@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("kind", ["text", "json_object"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_budget_of_reasoning(
    thinker: TokenizerWrapper, budget: int, kind: Any, inside: bool
) -> None:
    form = AnswerForm(kind, reasoning=inside, reasoning_budget=budget)
    guide = made(grammars(thinker).compile(form))
    start, end = ids(thinker, "<think>", "</think>")
    if not inside:
        first = words(guide, VOCAB)
        assert first is None or start in first
        guide.accept(start)
    for token in encode(thinker, "hmm, so")[:budget]:
        allowed = words(guide, VOCAB)
        assert allowed is None or token in allowed
        guide.accept(token)
    assert words(guide, VOCAB) == [end]
    guide.accept(end)
    allowed = words(guide, VOCAB)
    if kind == "text":
        assert allowed is None
    else:
        assert allowed is not None
        assert {thinker.decode([t])[0] for t in allowed.tolist()} == {"{"}


def test_reasoning_that_ends_by_itself_keeps_to_its_budget(thinker: TokenizerWrapper) -> None:
    guide = made(grammars(thinker).compile(AnswerForm(reasoning=True, reasoning_budget=4)))
    start, end = ids(thinker, "<think>", "</think>")
    for token in [*encode(thinker, "ab"), end, *encode(thinker, "many words of text"), start]:
        assert words(guide, VOCAB) is None
        guide.accept(token)
    assert words(guide, VOCAB) is None
    guide.accept(encode(thinker, "a")[0])
    assert words(guide, VOCAB) == [end]


def test_harmony_reasons_in_its_own_channel() -> None:
    tokenizer = family("harmony")
    compiler = grammars(tokenizer)
    ends = {tokenizer.eos_token_id}
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    final = '<|channel|>final<|message|>{"name": "Ada", "age": 36}'
    compiled = compiler.compile(AnswerForm("json_schema", PERSON))
    for text, valid in [
        (final, True),
        (thought + final, True),
        (thought, False),
        ('{"name": "Ada", "age": 36}', False),
        (final.replace("36", "360"), False),
    ]:
        assert accepts(made(compiled), encode(tokenizer, text), ends) is valid, text
    budget = made(compiler.compile(AnswerForm("json_schema", PERSON, reasoning_budget=3)))
    tokens = encode(tokenizer, "<|channel|>analysis<|message|>abc")
    for token in tokens:
        allowed = words(budget, VOCAB)
        assert allowed is not None
        assert token in allowed
        budget.accept(token)
    assert words(budget, VOCAB) == ids(tokenizer, "<|end|>")


def test_marks_of_several_tokens() -> None:
    special = ("<s>", "</s>", "<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")
    tokenizer = wrapped("{{ tools }}{{ messages }}", special)
    guide = made(grammars(tokenizer).compile(AnswerForm(reasoning=True, reasoning_budget=2)))
    for token in encode(tokenizer, "ab"):
        guide.accept(token)
    forced = []
    while (allowed := words(guide, VOCAB)) is not None:
        (token,) = allowed.tolist()
        forced.append(token)
        guide.accept(token)
    assert tokenizer.decode(forced) == "<|close|>think<|sep|>"
