"""Rows as tokens: what is learned, what is refused, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

from optiq.errors import AdapterError
from optiq.lora.data import Sample, read
from tests.tiny import BOS, EOS, write_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where?"},
    {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [
            {"type": "function", "function": {"name": "find", "arguments": {"city": "Lisbon"}}}
        ],
    },
    {"role": "tool", "content": "Here."},
    {"role": "assistant", "content": "Here it is."},
]
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {}}}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(folder)


def of(tmp_path: Path, tokenizer: Any, *rows: Any, most: int = 512) -> tuple[Sample, ...]:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return read(file, tokenizer, most).train


def learned(sample: Sample, tokenizer: Any) -> str:
    return str(tokenizer.decode([sample.tokens[i] for i in sample.trained]))


def test_what_the_assistant_says_is_learned_and_nothing_else(
    tmp_path: Path, tokenizer: Any
) -> None:
    (sample,) = of(tmp_path, tokenizer, {"messages": TURNS, "tools": TOOLS})
    call = '{"name": "find", "arguments": {"city": "Lisbon"}}'
    assert learned(sample, tokenizer) == (
        f"Let me look.<tool_call>\n{call}\n</tool_call><|im_end|>Here it is.<|im_end|>"
    )
    assert sample.tokens[0] == BOS
    assert '"find"' in tokenizer.decode(list(sample.tokens[: sample.trained[0]]))  # the tools


def test_a_completion_is_learned_and_a_text_is_learned_as_a_whole(
    tmp_path: Path, tokenizer: Any
) -> None:
    pair, text = of(
        tmp_path, tokenizer, {"prompt": "2 + 2?", "completion": "Four."}, {"text": "The river."}
    )
    assert learned(pair, tokenizer) == "Four.<|im_end|>"
    assert learned(text, tokenizer) == "The river.<|im_end|>"
    assert text.tokens[-1] == EOS


def test_every_twentieth_row_is_held_out_where_no_file_is(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"number {i}"} for i in range(41)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    data = read(file, tokenizer, 64)
    assert [s.line for s in data.valid] == [20, 40]
    assert len(data.train) == 39
    (tmp_path / "train.jsonl").write_text(file.read_text())
    (tmp_path / "valid.jsonl").write_text('{"text": "judge by this"}')
    data = read(tmp_path, tokenizer, 64)
    assert (len(data.train), len(data.valid)) == (41, 1)


def test_long_rows_are_cut_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "long " * 50}) + '\n{"text": "short"}')
    data = read(file, tokenizer, 16)
    assert [len(s.tokens) <= 16 for s in data.train] == [True, True]
    assert data.cut == 1
    assert data.train[0].trained[-1] == 15


GOOD = '{"text": "fine"}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "a list"),
        ('{"question": "?"}', "the row has keys question"),
        ('{"prompt": "?"}', "completion is missing"),
        ('{"prompt": "", "completion": "x"}', "prompt is missing or empty"),
        ('{"messages": []}', "messages is empty"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no message is the assistant's"),
        ('{"messages": [{"role": "king", "content": "hi"}]}', "role"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"text": ""}', "text is"),
        ('{"prompt": "' + "long " * 60 + '", "completion": "x"}', "nothing in its first 64"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, tokenizer: Any, line: str, reason: str) -> None:
    (tmp_path / "train.jsonl").write_text(f"{GOOD}\n\n{line}\n{GOOD}")
    with pytest.raises(AdapterError, match=r"train\.jsonl line 3") as caught:
        read(tmp_path, tokenizer, 64)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_rows_says_what_it_needs(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(AdapterError, match=r"no train\.jsonl"):
        read(tmp_path, tokenizer, 64)
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(AdapterError, match="no rows"):
        read(tmp_path, tokenizer, 64)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_turn(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tokenizer.chat_template.replace(
        "{{ message.content or '' }}",
        "{{ (message.content or '').split('</think>')[-1] if not loop.last "
        "else (message.content or '') }}",
    )
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>well</think>1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2"},
    ]
    with pytest.raises(AdapterError, match=r"line 1: .*messages\[1\]"):
        of(tmp_path, tokenizer, {"messages": turns})
    (last,) = of(tmp_path, tokenizer, {"messages": turns[:2]})
    assert learned(last, tokenizer) == "<think>well</think>1<|im_end|>"
