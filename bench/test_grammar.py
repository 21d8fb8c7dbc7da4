"""What a grammar costs a row and a token, at a vocabulary of 152,000: at most a millisecond.

The tokenizer is made here: bytes, and random merges of them that look like words and JSON.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optiq.chat.notation import named
from optiq.serve.grammar import AnswerForm, Grammars, Tool

VOCABULARY = 151_936
LETTERS = [*"etaoinshrdlucmfwypvbgkqjxz" * 3, *'ETAOINSHRD0123456789_-.",:{}[]()<>/', *"ĠĠĠĠĠĠĠĠĊ"]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}},
        "where": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "where"],
    "additionalProperties": False,
}
ADA = {
    "name": "Ada Lovelace",
    "age": 36,
    "tags": ["a", "b"],
    "where": {"street": "12 St James's Square, London, a rather long one", "zip": "12345"},
}
CALL = f'<tool_call>\n{{"name": "meet", "arguments": {json.dumps(ADA)}}}\n</tool_call>'
TAGS = "<tool_call>\n<function=meet>\n<parameter=name>\nAda Lovelace\n</parameter>\n<parameter=age>"
TAGS += '\n36\n</parameter>\n<parameter=tags>\n["a"]\n</parameter>\n<parameter=where>\n'
TAGS += json.dumps(ADA["where"]) + "\n</parameter>\n</function>\n</tool_call>"
TOOLS = (Tool("meet", PERSON, True), Tool("now", {"type": "object"}))
TEXT = "First I say what I am going to do, in some more words than are needed.\n"

CASES: dict[str, tuple[str, AnswerForm, str]] = {
    "json_object": ("json_tools", AnswerForm("json_object"), json.dumps(ADA, indent=2)),
    "json_schema": ("json_tools", AnswerForm("json_schema", PERSON), json.dumps(ADA)),
    "regex": ("json_tools", AnswerForm("regex", r"[A-Za-z ,.']{4,}"), TEXT.strip()),
    "a call": ("json_tools", AnswerForm(tools=TOOLS, tool_choice="required"), CALL),
    "text and a call": ("json_tools", AnswerForm(tools=TOOLS), TEXT + CALL),
    "a call in tags": ("qwen3_coder", AnswerForm(tools=TOOLS, tool_choice="required"), TAGS),
}


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    rng = random.Random(0)
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words, merges = list(LETTERS), []
    while len(vocabulary) < VOCABULARY - 1000:
        pair = (rng.choice(words), rng.choice(words[:4000]))
        word = "".join(pair)
        if len(word) <= 14 and word not in vocabulary:
            vocabulary[word] = len(vocabulary)
            words.append(word)
            merges.append(pair)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    backend.add_tokens(
        [AddedToken(text, special=False) for text in ("<tool_call>", "</tool_call>")]
    )
    return TokenizerWrapper(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    )


@pytest.mark.parametrize("case", CASES)
def test_masks(benchmark: Any, tokenizer: TokenizerWrapper, case: str) -> None:
    name, form, text = CASES[case]
    compiled = Grammars(tokenizer, named(name), VOCABULARY).compile(form)
    assert compiled is not None
    tokens = tokenizer.encode(text, add_special_tokens=False)

    def answer() -> None:
        guide = compiled()
        for token in tokens:
            words = np.zeros(-(-VOCABULARY // 32), np.uint32)
            guide.allow(words)
            assert words[token // 32] >> (token % 32) & 1
            guide.accept(token)

    benchmark.pedantic(answer, rounds=5, warmup_rounds=1)
    a_token = benchmark.stats.stats.min / len(tokens)
    benchmark.extra_info["ms a token"] = 1e3 * a_token
    assert a_token < 1e-3
