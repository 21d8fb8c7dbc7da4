"""tokenizer.json from a GGUF's vocabulary: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

The pre-tokenizers are those of the models' own tokenizer.json, chosen by `tokenizer.ggml.pre`, and
the defaults where another key is missing are llama.cpp's (src/llama-vocab.cpp).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ...errors import SourceError
from .file import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> the family's rule for cutting text into words. A file without it, or with
# "default", does not say how: older converters also wrote so for Llama 3 and Qwen.
PRE_TOKENIZERS = {
    "gpt-2": "gpt2",
    "phi-2": "gpt2",
    "mpt": "gpt2",
    "olmo": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "codeshell": "digits",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "falcon3": "llama3",
    "smaug-bpe": "llama3",
    "dbrx": "llama3",
}
# Of these llama.cpp puts BOS in front and takes whole words from the vocabulary before merging.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3")
# End-of-turn tokens that chat models write where the file's EOS may be another.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "</s>")


class Vocabulary:
    """The `tokenizer.ggml.*` metadata of one file, checked."""

    def __init__(self, gguf: GgufFile) -> None:
        self.gguf = gguf
        tokens = self.strings("tokens")
        if len(set(tokens)) != len(tokens):
            raise self.error("a token occurs twice")
        rows = gguf.tensors["token_embd.weight"].shape[0]
        if len(tokens) > rows:
            raise self.error(f"it has {len(tokens)} tokens for {rows} embeddings")
        self.tokens = tokens
        has_types = self.get("token_type", np.ndarray) is not None
        self.types = self.numbers("token_type") if has_types else [NORMAL] * len(tokens)
        self.bos, self.eos, self.pad = (
            self.token_id(key) for key in ("bos_token_id", "eos_token_id", "padding_token_id")
        )
        if self.eos is None:
            raise self.error("it has no eos_token_id")

    def get(self, key: str, kind: type) -> Any:
        """The value of a key, or None; SourceError if it is not of type `kind`."""
        value = self.gguf.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and not isinstance(value, kind):
            raise self.error(f"{key} is not of type {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        values = self.get(key, list)
        if not values:
            raise self.error(f"it has no {key}")
        return list(values)

    def numbers(self, key: str) -> list[Any]:
        values = self.get(key, np.ndarray)
        if values is None or len(values) != len(self.tokens):
            raise self.error(f"it has no {key} for each token")
        return list(values.tolist())

    def token_id(self, key: str) -> int | None:
        value: int | None = self.get(key, int)
        if value is not None and not 0 <= value < len(self.tokens):
            raise self.error(f"{key} {value} is not one of {len(self.tokens)} tokens")
        return value

    def text(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.tokens[token_id]

    def error(self, reason: str) -> SourceError:
        return SourceError(
            f"{self.gguf.path}: the tokenizer cannot be rebuilt: {reason}; "
            "give the original Hugging Face model"
        )


def write_tokenizer(gguf: GgufFile, folder: Path) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json; returns the token ids for config.json.

    `eos_token_id` lists every token that ends an answer. Raises SourceError for a vocabulary or a
    pre-tokenizer that is not known, rather than cutting text differently from the model.
    """
    vocabulary = Vocabulary(gguf)
    model = vocabulary.get("model", str)
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(vocabulary)
    elif model == "llama":
        tokenizer, add_bos = _sentencepiece(vocabulary), True
    else:
        raise vocabulary.error(f"tokenizer.ggml.model {model!r} is not 'gpt2' or 'llama'")
    _add_special(vocabulary, tokenizer)
    stated = vocabulary.get("add_bos_token", bool)
    add_bos = add_bos if stated is None else stated
    _add_template(vocabulary, tokenizer, add_bos, bool(vocabulary.get("add_eos_token", bool)))
    tokenizer.save(str(folder / "tokenizer.json"))

    template = gguf.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise vocabulary.error("the chat template is not a string")
    # Qwen has no BOS; its files name <|endoftext|> because llama.cpp wants one.
    no_bos = not add_bos and str(gguf.metadata["general.architecture"]).startswith("qwen")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if no_bos else vocabulary.text(vocabulary.bos),
        "eos_token": vocabulary.text(vocabulary.eos),
        "pad_token": vocabulary.text(vocabulary.pad),
        "unk_token": vocabulary.text(vocabulary.token_id("unknown_token_id")),
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = template
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return {
        "bos_token_id": None if no_bos else vocabulary.bos,
        "eos_token_id": _stop_tokens(vocabulary, template),
        "pad_token_id": vocabulary.pad,
    }


def _byte_level(v: Vocabulary) -> tuple[Tokenizer, bool]:
    pre = v.get("pre", str)
    family = PRE_TOKENIZERS.get(pre or "")
    if family is None:
        missing = pre in (None, "", "default")
        what = (
            "the file does not name its pre-tokenizer (tokenizer.ggml.pre); optiq knows"
            if missing
            else (f"the pre-tokenizer {pre!r} is not one of")
        )
        raise v.error(f"{what} {', '.join(PRE_TOKENIZERS)}")
    last = max((i for i, kind in enumerate(v.types) if kind != UNUSED), default=0)
    vocab = {token: i for i, token in enumerate(v.tokens[: last + 1])}  # drops padding at the end
    pairs = []
    for merge in v.strings("merges"):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise v.error(f"the merge {merge!r} is not made of its tokens")
        pairs.append((left, right))
    whole_words = pre in _WHOLE_WORDS
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=whole_words))
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=family in ("gpt2", "digits")
    )
    if family == "gpt2":
        tokenizer.pre_tokenizer = byte_level
    else:
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        if family in ("qwen2", "llama3"):
            digits = "" if family == "qwen2" else "{1,3}"
            first = pre_tokenizers.Split(Regex(_WORDS % digits), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, whole_words


def _sentencepiece(v: Vocabulary) -> Tokenizer:
    scores = v.numbers("scores")
    # llama.cpp stores the spaces of user-defined tokens as spaces, older files as in SentencePiece.
    v.tokens = [
        t.replace("▁", " ") if kind == USER_DEFINED else t
        for t, kind in zip(v.tokens, v.types, strict=True)
    ]
    vocab = {t: i for i, t in enumerate(v.tokens)}
    if len(vocab) != len(v.tokens):
        raise v.error("two user-defined tokens differ only in ▁ and space")
    mergeable = {t: i for i, t in enumerate(v.tokens) if v.types[i] == NORMAL}
    unknown = v.text(v.token_id("unknown_token_id"))
    if unknown is None:
        unknown = next((v.tokens[i] for i, kind in enumerate(v.types) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(mergeable, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    to_underline = normalizers.Replace(" ", "▁")
    decode: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if v.get("add_space_prefix", bool) is not False:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_underline])
        decode.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = to_underline
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def _merges(ids: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best; BPE wants ranked pairs."""
    ranked = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[i], left, right, token[:cut], token[cut:]))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_special(v: Vocabulary, tokenizer: Tokenizer) -> None:
    # In order of id, and every one is in the vocabulary already, so that no id is made up.
    for i, kind in enumerate(v.types):
        if kind in (CONTROL, UNKNOWN) or i in (v.bos, v.eos, v.pad):
            token = AddedToken(v.tokens[i], special=True, normalized=False)
            tokenizer.add_special_tokens([token])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(v.tokens[i], special=False, normalized=False)])


def _add_template(v: Vocabulary, tokenizer: Tokenizer, bos: bool, eos: bool) -> None:
    if bos and v.bos is None:
        raise v.error("it wants a BOS token and names none")
    ends = {"bos": (v.bos, bos), "eos": (v.eos, eos)}
    used = {name: i for name, (i, wanted) in ends.items() if wanted and i is not None}
    if not used:
        return
    tokens = {name: v.tokens[i] for name, i in used.items()}

    def around(sequence: str) -> str:
        return " ".join(filter(None, (tokens.get("bos"), sequence, tokens.get("eos"))))

    tokenizer.post_processor = processors.TemplateProcessing(
        single=around("$A"),
        pair=f"{around('$A')} {around('$B:1')}",
        special_tokens=[(tokens[name], i) for name, i in used.items()],
    )


def _stop_tokens(v: Vocabulary, template: str | None) -> list[int]:
    assert v.eos is not None
    stops = {v.eos}
    if (end_of_turn := v.token_id("eot_token_id")) is not None:
        stops.add(end_of_turn)
    if template:
        ends = {"<|endoftext|>", *(token for token in _END_OF_TURN if token in template)}
        stops |= {i for i, k in enumerate(v.types) if k == CONTROL and v.tokens[i] in ends}
    return [v.eos, *sorted(stops - {v.eos})]
