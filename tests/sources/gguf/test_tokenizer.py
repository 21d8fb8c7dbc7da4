"""The rebuilt tokenizer cuts text as the original does."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from optiq.errors import SourceError
from optiq.sources import load, resolve
from optiq.sources.gguf.file import read_gguf
from optiq.sources.gguf.tokenizer import write_tokenizer
from tests.sources.gguf.files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    write_gguf,
)
from tests.tiny import BOS, EOS, tiny_folder

TEXTS = [
    "The river turned silver.",
    "  two  spaces\n\n\tand a tab, naïve café 你好 🙂\n",
    "it's 12345 and I'LL",
    "<|im_start|>user\nhi<|im_end|>",
]


A = 68  # the token "a" of the tiny tokenizer


def from_gguf(path: Path, out: Path) -> Tokenizer:
    write_tokenizer(read_gguf(path), out)
    return Tokenizer.from_file(str(out / "tokenizer.json"))


def test_byte_level_tokens_are_the_originals(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    path = write_gguf(folder, tmp_path / "m.gguf")
    tokenizer = load(resolve(str(path), cache_dir=tmp_path / "cache")).tokenizer
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == original.encode(text).ids
        assert ids[0] == BOS
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.bos_token_id == BOS
    assert tokenizer.eos_token_ids == {0, EOS}
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["it", "'s", "Ġ12345", "Ġ", "Ġand", "ĠI", "'", "LL", "!!", "Ċ", "Ċ", "x"]),
        ("smollm", ["it", "'s", *"Ġ12345", "Ġ", "Ġand", "ĠI", "'", "LL", "!!", "Ċ", "Ċ", "x"]),
        ("qwen2", ["it", "'s", *"Ġ12345", "Ġ", "Ġand", "ĠI", "'LL", "!!ĊĊ", "x"]),
        ("llama-bpe", ["it", "'s", "Ġ", "123", "45", "Ġ", "Ġand", "ĠI", "'LL", "!!ĊĊ", "x"]),
    ],
)
def test_words_are_cut_as_the_model_family_does(tmp_path: Path, pre: str, words: list[str]) -> None:
    tokenizer = from_gguf(write_gguf(tiny_folder(tmp_path), tmp_path / "m.gguf", pre=pre), tmp_path)
    text = "it's 12345  and I'LL!!\n\nx"
    assert [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == words


def test_defaults_where_the_file_says_nothing(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    drop = ("tokenizer.ggml.add_bos_token",)
    for pre, ids in (("gpt-2", [A]), ("llama-bpe", [BOS, A])):
        path = write_gguf(folder, tmp_path / "m.gguf", drop=drop, pre=pre)
        assert from_gguf(path, tmp_path).encode("a").ids == ids


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("pre", [None, "", "default", "rocket"])
def test_a_file_that_does_not_say_how_words_are_cut(
    tmp_path: Path, arch: str, pre: str | None
) -> None:
    drop = ("tokenizer.ggml.pre",) if pre is None else ()
    path = write_gguf(tiny_folder(tmp_path, arch), tmp_path / "m.gguf", drop=drop, pre=pre or "")
    with pytest.raises(SourceError, match=r"pre-tokenizer .*give the original"):
        from_gguf(path, tmp_path)


def test_llama3_takes_whole_words_before_merging(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, vocab_size=385)
    set_ = with_tokens(folder, ["Ġqqq"], [NORMAL])
    for pre, count in (("gpt-2", 4), ("llama-bpe", 1)):
        path = write_gguf(folder, tmp_path / "m.gguf", set_=set_, pre=pre)
        encoded = from_gguf(path, tmp_path).encode(" qqq", add_special_tokens=False)
        assert len(encoded.ids) == count


def with_tokens(folder: Path, more: list[str], types: list[int]) -> dict[str, Any]:
    """The metadata of the tiny vocabulary with `more` tokens at its end."""
    vocab = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return {
        "tokenizer.ggml.tokens": [*sorted(vocab, key=vocab.get), *more],
        "tokenizer.ggml.token_type": [CONTROL] * 4 + [NORMAL] * (len(vocab) - 4) + types,
    }


def test_user_defined_and_unused_tokens(tmp_path: Path) -> None:
    more = ["<tool▁call>", "[PAD385]", "[PAD386]"]
    folder = tiny_folder(tmp_path, vocab_size=387)
    set_ = with_tokens(folder, more, [USER_DEFINED, UNUSED, UNUSED])
    path = write_gguf(folder, tmp_path / "m.gguf", set_=set_)
    tokenizer = load(resolve(str(path), cache_dir=tmp_path / "cache")).tokenizer
    assert len(tokenizer) == 385
    assert tokenizer.encode("a<tool▁call>", add_special_tokens=False) == [A, 384]
    assert tokenizer.decode([A, 384], skip_special_tokens=True) == "a<tool▁call>"


def test_more_tokens_than_embeddings_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tiny_folder(tmp_path, vocab_size=300), tmp_path / "m.gguf")
    with pytest.raises(SourceError, match="384 tokens for 300 embeddings"):
        from_gguf(path, tmp_path)


def test_qwen_has_no_bos(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "qwen2")
    set_ = {"tokenizer.ggml.add_bos_token": False}
    path = write_gguf(folder, tmp_path / "m.gguf", set_=set_, pre="qwen2")
    tokenizer = load(resolve(str(path), cache_dir=tmp_path / "cache")).tokenizer
    assert tokenizer.bos_token is None
    assert tokenizer.encode("a") == [A]


@pytest.fixture(scope="module", params=[True, False], ids=["llama", "gemma"])
def sentencepiece_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Tokenizer]:
    """A SentencePiece model and the tokenizer rebuilt from a GGUF of it: with the space that
    Llama 2 puts in front, or with tokens of many spaces as in Gemma."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter((Path(__file__).parents[2] / "tiny.py").read_text().split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=384,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=request.param,
        remove_extra_whitespaces=False,
        user_defined_symbols=[] if request.param else ["▁▁", "<b>"],
        num_threads=1,
        minloglevel=2,
    )
    truth = spm.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(truth.get_piece_size())
    pieces = [truth.id_to_piece(i) for i in ids]
    set_ = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [p.replace("▁▁", "  ") if p == "▁▁" else p for p in pieces],
        "tokenizer.ggml.scores": [truth.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [_type(truth, i) for i in ids],
        "tokenizer.ggml.bos_token_id": truth.bos_id(),
        "tokenizer.ggml.eos_token_id": truth.eos_id(),
        "tokenizer.ggml.padding_token_id": truth.unk_id(),
        "tokenizer.ggml.unknown_token_id": truth.unk_id(),
        "tokenizer.ggml.add_space_prefix": request.param,
    }
    tiny = tiny_folder(folder, vocab_size=len(pieces))
    path = write_gguf(tiny, folder / "m.gguf", set_=set_, drop=("tokenizer.chat_template",))
    return truth, from_gguf(path, folder)


def _type(truth: Any, i: int) -> int:
    if truth.is_unknown(i):
        return UNKNOWN
    if truth.is_control(i):
        return CONTROL
    if truth.id_to_piece(i) in ("▁▁", "<b>"):
        return USER_DEFINED
    return BYTE if truth.is_byte(i) else NORMAL


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from([" ", "  ", "the", "config", "<b>", "_", "\n", "é", "return ", "x"]),
            max_size=12,
        ).map("".join),
    )
)
def test_sentencepiece_tokens_are_the_originals(
    sentencepiece_pair: tuple[Any, Tokenizer], text: str
) -> None:
    truth, tokenizer = sentencepiece_pair
    # SentencePiece ends at a zero byte, and both may see ▁ only as a space.
    text = text.replace("\0", "").replace("▁", "")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == truth.encode(text)
    assert tokenizer.encode(text).ids == [truth.bos_id(), *ids]
