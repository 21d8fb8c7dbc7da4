"""Whether the model has a row of its embedding for each token that it will meet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..base.text import one_line
from ..errors import SourceError
from .config import holders

_ROLES = ("bos", "eos", "pad", "unk")


def check_tokens(
    name: str, path: Path, model: nn.Module, tokenizer: Any, config: dict[str, Any]
) -> None:
    """Raise SourceError for a token in use beyond the embedding: its row would be read from what
    lies behind the matrix."""
    rows = _rows(model, config)
    if rows is None:
        return
    for where, token in _used(path, tokenizer, config):
        if token >= rows:
            raise SourceError(
                f"{name}: {where} is the token {token}, but the embedding has {rows} rows; use the "
                "tokenizer files that belong to the weights"
            )


def refusal(name: str, path: Path, error: Exception) -> str:
    """Why the tokenizer of the model `name` in `path` could not be loaded."""
    own = (_read(path / "tokenizer_config.json").get("auto_map") or {}).get("AutoTokenizer")
    if own:
        code = next(filter(None, own), "") if isinstance(own, list) else own
        return (
            f"the tokenizer of {name} needs the model's own code ({code}), which optiq never runs; "
            "give a model with a tokenizer.json and no auto_map in tokenizer_config.json"
        )
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as fault:  # the tokenizer is chosen by it
        if one_line(fault) == one_line(error):
            return f"the config.json of {name} is not valid: {one_line(error)}; correct that value"
    return (
        f"the tokenizer of {name} cannot be loaded: {one_line(error)}; "
        "copy the model's tokenizer files again"
    )


def _rows(model: nn.Module, config: dict[str, Any]) -> int | None:
    """Rows of the embedding of tokens; positions may have one of their own."""
    found = {
        module.weight.shape[0]
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
    }
    for _, holder in holders(config):
        if holder.get("vocab_size") in found:
            return int(holder["vocab_size"])
    return max(found, default=None)


def _used(path: Path, tokenizer: Any, config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Every special token that somebody names, with who does."""
    for role in _ROLES:
        if isinstance(token := getattr(tokenizer, f"{role}_token_id", None), int):
            yield f"the tokenizer's {role}_token", token
    for file, said in (
        ("config.json", {f"{role}_token_id": config.get(f"{role}_token_id") for role in _ROLES}),
        ("generation_config.json", _read(path / "generation_config.json")),
    ):
        for key, value in said.items():
            if key.endswith(("_token_id", "_token_ids")):
                for token in value if isinstance(value, list) else [value]:
                    if isinstance(token, int):
                        yield f"{key} of {file}", token
    templates = getattr(tokenizer, "chat_template", None) or {}
    texts = templates.values() if isinstance(templates, dict) else [templates]
    for token, number in tokenizer.get_added_vocab().items():
        if any(token in text for text in texts if isinstance(text, str)):
            yield f"{token} of the chat template", number


def _read(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
