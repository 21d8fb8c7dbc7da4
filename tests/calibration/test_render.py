"""A row as tokens: one BOS, text as it is, chats by the model's own template."""

from __future__ import annotations

from collections.abc import Callable

from mlx_lm.tokenizer_utils import TokenizerWrapper

from optiq.calibration import load_rows, render

from .conftest import CHATML_TOOLS

ROWS = load_rows()


def test_every_row_has_exactly_one_bos_in_front(tokenizer: TokenizerWrapper) -> None:
    bos = tokenizer.bos_token_id
    for row in ROWS:
        tokens = render(row, tokenizer)
        if bos is None:
            continue
        assert tokens[0] == bos
        assert tokens[1] != bos
        if tokenizer.bos_token == "<bos>":  # the other template opens every turn with its BOS
            assert tokens.count(bos) == 1


def test_a_text_row_is_bos_and_the_text(tokenizer: TokenizerWrapper) -> None:
    row = next(row for row in ROWS if "text" in row)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert render(row, tokenizer) == bos + tokenizer.encode(row["text"], add_special_tokens=False)


def test_a_complete_template_is_used_as_it_is(
    make_tokenizer: Callable[..., TokenizerWrapper],
) -> None:
    tokenizer = make_tokenizer("bpe", CHATML_TOOLS, "<bos>")
    for row in (row for row in ROWS if "messages" in row):
        stock = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"))
        assert render(row, tokenizer) == [tokenizer.bos_token_id, *stock]
