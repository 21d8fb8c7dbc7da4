"""Rows of training data as tokens, with a mark on those that the loss counts.

A row is `{"messages", "tools"?}`, `{"prompt", "completion"}` or `{"text"}`, one JSON object on each
line. What the assistant says is learned, and the token that ends its turn; of a text every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..calibration.files import load_rows
from ..calibration.rows import Row, check_row
from ..chat.template import chat_text, encode
from ..errors import AdapterError, CalibrationError

HELD_OUT = 20  # without a valid.jsonl, one row of 20 is held out
FORMS = '{"messages": [...]}, {"prompt": "...", "completion": "..."} or {"text": "..."}'


@dataclass(frozen=True)
class Sample:
    """`trained` are the places of the tokens to learn; a token is learned from those before it."""

    tokens: tuple[int, ...]
    trained: tuple[int, ...]
    line: int


E = TypeVar("E")


@dataclass(frozen=True)
class Data(Generic[E]):
    """Examples to train on and to judge by; `cut` rows were longer than allowed."""

    train: tuple[E, ...]
    valid: tuple[E, ...]
    cut: int


Make = Callable[[Row], tuple[E, bool]]  # the example of a row, and whether it was cut


def read(path: Path, tokenizer: Any, max_length: int) -> Data[Sample]:
    """The samples of `path`: a folder with train.jsonl and perhaps valid.jsonl, or one file.

    Without a valid.jsonl every 20th row is held out. A sample is cut after `max_length` tokens.
    Raises AdapterError that names file and line.
    """
    return read_with(path, check, lambda row: shortened(sample(row, tokenizer), max_length))


def read_with(path: Path, checked: Callable[[object], Row], make: Make[E]) -> Data[E]:
    """The same of rows of another kind."""
    train_file, valid_file = files_of(path)
    train = _examples(train_file, checked, make)
    if valid_file is not None:
        valid = _examples(valid_file, checked, make)
    else:
        valid = train[HELD_OUT - 1 :: HELD_OUT]
        train = [each for i, each in enumerate(train) if i % HELD_OUT != HELD_OUT - 1]
    cut = sum(was_cut for _, was_cut in (*train, *valid))
    return Data(tuple(e for e, _ in train), tuple(e for e, _ in valid), cut)


def files_of(path: Path) -> tuple[Path, Path | None]:
    """The file to train on, and the one to judge by."""
    path = path.expanduser()
    if path.is_file():
        return path, None
    train, valid = path / "train.jsonl", path / "valid.jsonl"
    if not train.is_file():
        raise AdapterError(
            f"{path} has no train.jsonl; give a folder with that file, or a .jsonl file"
        )
    return train, valid if valid.is_file() else None


def _examples(file: Path, checked: Callable[[object], Row], make: Make[E]) -> list[tuple[E, bool]]:
    try:
        rows = load_rows(file, checked)
    except CalibrationError as error:
        raise AdapterError(str(error)) from error
    found = []
    for row in rows:
        try:
            found.append(make(row))
        except AdapterError as error:
            raise AdapterError(f"{file} line {row['line']}: {error}") from None
    return found


def check(value: object) -> Row:
    """`value` as a row to train on; raises CalibrationError."""
    if isinstance(value, dict) and ("prompt" in value or "completion" in value):
        for key in ("prompt", "completion"):
            if not isinstance(value.get(key), str) or not value[key].strip():
                raise CalibrationError(f"{key} is missing or empty; expected {FORMS}")
        return dict(value)
    if isinstance(value, dict) and not {"messages", "text"} & value.keys():
        raise CalibrationError(f"the row has keys {', '.join(value) or 'none'}; expected {FORMS}")
    row = check_row({**value, "domain": "training"} if isinstance(value, dict) else value)
    if "messages" in row and all(m["role"] != "assistant" for m in row["messages"]):
        raise CalibrationError("no message is the assistant's; expected at least one to learn")
    return row


def sample(row: Row, tokenizer: Any) -> Sample:
    """The tokens of a checked row. Raises AdapterError."""
    if "text" in row:
        tokens = _ended(encode(row["text"], tokenizer), tokenizer)
        return Sample(tuple(tokens), tuple(range(1, len(tokens))), row["line"])
    if "prompt" in row and not tokenizer.has_chat_template:
        prompt = encode(row["prompt"], tokenizer)
        answer = list(tokenizer.encode(row["completion"], add_special_tokens=False))
        tokens = _ended([*prompt, *answer], tokenizer)
        return Sample(tuple(tokens), tuple(range(len(prompt), len(tokens))), row["line"])
    messages = row.get("messages") or [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    return conversation(messages, row.get("tools"), tokenizer, row["line"])


def conversation(messages: list[Row], tools: list[Row] | None, tokenizer: Any, line: int) -> Sample:
    """A conversation in the model's own template; every turn of the assistant is learned.

    A turn begins after the tokens of the prompt that asks for it, as it does when the model
    answers, so its place is found by comparing tokens: the template is not looked into.
    """
    full = encode(chat_text(messages, tokenizer, tools).text, tokenizer)
    trained: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:i]
        asked = chat_text(before, tokenizer, tools, answer=True).text if before else ""
        said = chat_text(messages[: i + 1], tokenizer, tools).text
        begin, end = (_common(encode(text, tokenizer), full) for text in (asked, said))
        if end <= begin or (trained and begin <= trained[-1]):
            raise AdapterError(
                f"the chat template writes messages[{i}] in another way once more follows, so what "
                "to learn is not known; give each of its answers a row that ends with it"
            )
        trained += range(max(begin, 1), _end_of_turn(full, begin, end, tokenizer))
    tokens = full
    if trained and not set(tokens[trained[-1] :]) & set(tokenizer.eos_token_ids):
        tokens = _ended(full[: trained[-1] + 1], tokenizer)
        trained.append(len(tokens) - 1)
    return Sample(tuple(tokens), tuple(trained), line)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    most = min(len(a), len(b))
    return next((i for i in range(most) if a[i] != b[i]), most)


def _end_of_turn(tokens: Sequence[int], begin: int, end: int, tokenizer: Any) -> int:
    """After the last token of the turn that ends generation; white space follows it."""
    stops = [i for i in range(begin, end) if tokens[i] in tokenizer.eos_token_ids]
    return stops[-1] + 1 if stops else end


def _ended(tokens: list[int], tokenizer: Any) -> list[int]:
    ends = tokenizer.eos_token_ids
    if not ends or (tokens and tokens[-1] in ends):
        return tokens
    return [*tokens, next(iter(sorted(ends)))]


def shortened(sample: Sample, most: int) -> tuple[Sample, bool]:
    """The sample cut after `most` tokens, and whether it was longer."""
    trained = tuple(i for i in sample.trained if i < most)
    long = len(sample.tokens) > most
    if not trained:
        what = f"in its first {most} tokens" if long else "in it"
        raise AdapterError(
            f"nothing {what} is to be learned; shorten the prompt, raise --max-length, or remove "
            "the row"
        )
    return Sample(sample.tokens[:most], trained, sample.line), long
