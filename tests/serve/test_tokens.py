"""Bytes of tokens, in the two ways in which tokenizers write them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from optiq.serve.tokens import TokenBytes
from tests.serve.servers import tiny_tokenizer

TEXTS = ("Hello world", "naïve ☕ 𝄞", "  two\n\ttabs", "日本語")


def pieces(tokenizer: Any, names: TokenBytes, text: str) -> list[bytes]:
    return [names[token] for token in tokenizer.encode(text, add_special_tokens=False)]


def test_byte_level() -> None:
    tokenizer = tiny_tokenizer()
    names = TokenBytes(tokenizer)
    for text in TEXTS:
        assert b"".join(pieces(tokenizer, names, text)).decode() == text
    assert names[3] == b"<|im_end|>"
    assert names[10**6] == b""  # a row of the embedding that is no token
    (half, *_) = tokenizer.encode("☕", add_special_tokens=False)
    assert names.text(half) == "\\xe2"


def test_byte_fallback() -> None:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁Hellow"]
    vocabulary = {word: id for id, word in enumerate(dict.fromkeys([*words, "▁w"]))}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "w")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer = SimpleNamespace(
        backend_tokenizer=backend,
        convert_ids_to_tokens=backend.id_to_token,
        encode=lambda text, **_: backend.encode(text).ids,
    )
    names = TokenBytes(tokenizer)
    for text in TEXTS:
        assert b"".join(pieces(tokenizer, names, text)).decode() == text
    assert names[len(vocabulary)] == b"<end>"
    assert b" w" in pieces(tokenizer, names, "lo wo")
