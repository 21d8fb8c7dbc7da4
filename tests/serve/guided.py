"""A guide, driven by tokens and by a random model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from optiq.chat.notation import Notation, notation
from optiq.serve.engine.request import Guide
from optiq.serve.grammar import Grammars, Tool
from tests.tiny import VOCAB, write_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["glad", "sad", None]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PRICE = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
        "thing": {"enum": ["kite", "null", 'a "b"']},
        "fresh": {"type": "boolean"},
        "note": {"type": "string", "maxLength": 6},
    },
    "required": ["thing"],
    "additionalProperties": False,
}
NOW = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = (Tool("price", PRICE, True), Tool("now", NOW, True))


def marks_as_text(folder: Path) -> TokenizerWrapper:
    """A tokenizer to which the marks of notations are plain text."""
    write_tokenizer(folder)
    return load(folder)


def words(guide: Guide, size: int) -> np.ndarray | None:
    """The tokens that may come next; None for any."""
    bits = np.zeros(-(-size // 32), np.uint32)
    if not guide.allow(bits):
        assert not bits.any()
        return None
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))


def accepts(guide: Guide, tokens: Iterable[int], ends: set[int], size: int = VOCAB) -> bool:
    """Whether these tokens are allowed one by one, and the answer may end after them."""
    for token in tokens:
        allowed = None if guide.done else words(guide, size)
        if guide.done or (allowed is not None and token not in allowed):
            return False
        guide.accept(token)
    if guide.done:
        return True
    allowed = words(guide, size)
    return allowed is None or ends <= set(allowed.tolist())


def sample(
    guide: Guide, tokenizer: TokenizerWrapper, rng: random.Random, most: int = 300
) -> str | None:
    """What a random model writes, which ends when it can; None if that takes too long."""
    tokens: list[int] = []
    while len(tokens) < most:
        if guide.done:
            break
        allowed = words(guide, VOCAB)
        assert allowed is not None
        assert allowed.size
        assert allowed.max() < len(tokenizer)
        if tokenizer.eos_token_id in allowed and rng.random() < 0.6:
            break
        token = int(allowed[rng.randrange(len(allowed))])
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
        guide.accept(token)
    else:
        return None
    return str(tokenizer.decode(tokens))


def encode(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def grammars(tokenizer: TokenizerWrapper, known: Notation | None = None) -> Grammars:
    return Grammars(tokenizer, known or notation(tokenizer), VOCAB)


def made(compiled: Callable[[], Guide] | None) -> Guide:
    assert compiled is not None
    return compiled()
