"""The bundled mix: size, length, originality, and no overlap with the evaluation sets."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from optiq.calibration import batches, load_rows, render

ROWS = load_rows()
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
EVALS = {
    "mmlu": "mmlu/**/*.csv",
    "gsm8k": "gsm8k/*.jsonl",
    "ifeval": "ifeval/*.jsonl",
    "bfcl": "bfcl/**/*.json",
    "humaneval": "humaneval/*.gz",
}
WORDS = 13


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def grams(value: Any) -> set[tuple[str, ...]]:
    """Runs of 13 words, lower case and without punctuation, inside each string of `value`."""
    found = set()
    for text in strings(value):
        words = re.findall(r"\w+", text.lower())
        found.update(zip(*(words[start:] for start in range(WORDS)), strict=False))
    return found


def read(path: Path) -> Iterator[Any]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.reader(file)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


MIX = set().union(*(grams(row) for row in ROWS))


def assert_disjoint(paths: list[Path], unit: int) -> None:
    if not paths:
        pytest.skip(f"no data under {DATA}")
    seen = 0
    for path in paths:
        for item in read(path):
            shared = grams(item) & MIX
            assert not shared, f"{path.name}: {shared}"
            seen += 1
    assert seen >= unit


def test_32_rows_in_each_of_five_domains() -> None:
    counts = Counter(row["domain"] for row in ROWS)
    assert counts == dict.fromkeys(("prose", "reasoning", "code", "agent", "tool_call"), 32)
    assert [row["line"] for row in ROWS] == list(range(1, 161))


def test_no_row_repeats_another() -> None:
    owner: dict[tuple[str, ...], int] = {}
    for row in ROWS:
        for gram in grams(row):
            assert owner.setdefault(gram, row["line"]) == row["line"], gram
    texts = [json.dumps({**row, "line": 0}) for row in ROWS]
    assert len(set(texts)) == len(texts)


def test_tools_and_formats_vary() -> None:
    for domain in ("agent", "tool_call"):
        rows = [row for row in ROWS if row["domain"] == domain]
        names = [t["function"]["name"] for row in rows for t in row.get("tools", [])]
        assert len(names) == len(set(names)) >= 20
        assert 10 <= sum("tools" in row for row in rows) <= 22


def test_no_control_tokens_in_the_text() -> None:
    control = re.compile(r"<\|[^|>\s]+\|>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>")
    for row in ROWS:
        for text in strings(row):
            assert not control.search(text), (row["line"], text[:60])


def test_lengths_with_trained_tokenizers(tokenizer: TokenizerWrapper) -> None:
    # Vocabularies of 4,000 entries cut words into more pieces than a model's own does.
    for row in ROWS:
        assert 120 <= len(render(row, tokenizer)) <= 1_000, row["line"]


def test_with_a_real_model(real_tokenizer: TokenizerWrapper) -> None:
    bos = real_tokenizer.bos_token_id
    lengths = []
    for row in ROWS:
        tokens = render(row, real_tokenizer)
        assert bos is None or (tokens[0] == bos and tokens[1] != bos)
        lengths.append(len(tokens))
    # The rows were cut to length with the tokenizer of SmolLM2; others differ a little.
    low, high = (150, 500) if "SmolLM2" in real_tokenizer.name_or_path else (120, 560)
    assert min(lengths) >= low
    assert max(lengths) <= high
    for tokens in (2_000, 40_000):
        result = batches(ROWS, real_tokenizer, tokens=tokens)
        assert set(result.tokens_per_domain.values()) == {tokens // 5}
        assert not result.note


@pytest.mark.parametrize("name", EVALS)
def test_no_overlap_with_the_evaluation_sets(name: str) -> None:
    assert_disjoint(sorted((DATA / "evals").glob(EVALS[name])), unit=164)


def test_no_overlap_with_other_calibration_text() -> None:
    assert_disjoint(sorted((DATA / "calib").glob("*.jsonl")), unit=700)
