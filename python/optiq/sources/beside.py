"""The files of a model beside its config and weights: what is downloaded, and what exports keep."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

CARD = Path("README.md")
# Where an export has a copy of it: `optiq card` replaces the other one.
SOURCE_CARD = Path("optiq/source-card.md")
# Texts that belong to the model, wherever it goes.
_TEXTS = (
    str(CARD), "LICEN[CS]E*", "licen[cs]e*", "COPYING*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# What tokenizers, generation settings and own code of Hugging Face models are made of.
_LOADED = (
    "tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "*.model", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja",
    "additional_chat_templates/*.jinja", "generation_config.json", "*processor_config.json", "*.py",
)  # fmt: skip

# What mlx_lm.load downloads, so that both find the other's snapshot complete.
NEEDED = (
    "*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model",
    "*.txt", "*.jsonl", "*.jinja",
)  # fmt: skip
DOWNLOADED = (*NEEDED, *_TEXTS, "*.model")


def kept(folder: Path, vocabulary: Iterable[str | None] = ()) -> list[Path]:
    """The files of `folder` that every model made from it also has.

    `vocabulary` are the names of files that its tokenizer knows of besides.
    """
    patterns = (*_LOADED, *_TEXTS, *filter(None, vocabulary))
    return sorted({f for pattern in patterns for f in folder.glob(pattern) if f.is_file()})
