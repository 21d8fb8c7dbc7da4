"""Every token that somebody names has a row of the embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optiq.errors import SourceError
from optiq.sources import load, resolve
from tests.tiny import VOCAB, tiny_folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def add_token(folder: Path, content: str, *, special: bool = True) -> None:
    """A token behind the last row of the embedding."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    token = {**added[0], "id": VOCAB, "content": content, "special": special}
    change(folder / "tokenizer.json", added_tokens=[*added, token])


def refused(folder: Path) -> str:
    for quantized in (False, True):  # to convert, and to run
        with pytest.raises(SourceError) as caught:
            load(resolve(str(folder)), allow_quantized=quantized)
    assert f"the embedding has {VOCAB} rows" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("special", [True, False])
def test_a_token_of_the_template(tmp_path: Path, special: bool) -> None:
    folder = tiny_folder(tmp_path)
    add_token(folder, "<extra>", special=special)
    load(resolve(str(folder)))  # nobody writes it
    change(folder / "tokenizer_config.json", chat_template="<extra>{{ messages }}")
    assert f"<extra> of the chat template is the token {VOCAB}" in refused(folder)


def test_a_token_of_a_further_template(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    add_token(folder, "<extra>")
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (templates / "tool_use.jinja").write_text("<extra>{{ messages }}")
    assert "<extra> of the chat template" in refused(folder)


def test_a_token_with_a_role(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    add_token(folder, "<extra>")
    change(folder / "tokenizer_config.json", pad_token="<extra>")
    assert f"the tokenizer's pad_token is the token {VOCAB}" in refused(folder)


@pytest.mark.parametrize("value", [VOCAB, [3, VOCAB + 7]])
def test_tokens_of_the_configs(tmp_path: Path, value: Any) -> None:
    folder = tiny_folder(tmp_path)
    change(folder / "generation_config.json", bos_token_id=value)
    assert "bos_token_id of generation_config.json" in refused(folder)
    change(folder / "generation_config.json", bos_token_id=None, pad_token_id=-1)
    load(resolve(str(folder)))
    change(folder / "config.json", pad_token_id=VOCAB)
    assert "pad_token_id of config.json" in refused(folder)


def test_an_embedding_with_more_rows_than_tokens(tmp_path: Path) -> None:
    load(resolve(str(tiny_folder(tmp_path, vocab_size=VOCAB + 64))))
