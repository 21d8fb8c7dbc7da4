"""Small tokenizers of three kinds, trained on the bundled mix, behind mlx-lm's wrapper."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from optiq.calibration import load_rows

SPECIAL = ["<bos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
CHATML_TOOLS = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if not (tools and loop.first and m.role == 'system') %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls %}<tool_call>{"name": "{{ call.function.name }}", "arguments": \
{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}\
{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}\
<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{{ m['content'] | trim }}<end_of_turn>
{% endfor %}"""

# name -> (kind of tokenizer, chat template, BOS)
KINDS = {
    "chatml-tools": ("bpe", CHATML_TOOLS, "<bos>"),
    "chatml": ("bpe", CHATML, "<|im_start|>"),
    "gemma": ("unigram", GEMMA, "<bos>"),
    "plain": ("wordpiece", None, None),
}


@functools.cache
def _backend(kind: str) -> str:
    """A trained tokenizer as JSON."""
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=4000,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
        trainer = trainers.UnigramTrainer(
            vocab_size=4000,
            special_tokens=[*SPECIAL, "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=4000, special_tokens=["<unk>"], show_progress=False
        )
    texts = []
    for row in load_rows()[::2]:
        texts.append(row.get("text") or "\n".join(m.get("content", "") for m in row["messages"]))
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def build(kind: str, template: str | None, bos: str | None = None) -> TokenizerWrapper:
    """A wrapped tokenizer of one kind with any chat template and BOS."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(kind)), bos_token=bos, unk_token="<unk>"
    )
    fast.chat_template = template
    return TokenizerWrapper(fast)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., TokenizerWrapper]:
    return build


@pytest.fixture(scope="session", params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> TokenizerWrapper:
    return build(*KINDS[request.param])


@pytest.fixture(scope="session")
def real_tokenizer() -> TokenizerWrapper:
    folder = os.environ.get("OPTIQ_TEST_MODEL")
    if not folder:
        pytest.skip("OPTIQ_TEST_MODEL names no model folder")
    return load_tokenizer(Path(folder))
