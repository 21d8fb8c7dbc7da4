"""Batches: equal tokens per domain, whole samples from their start, reproducible."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from optiq.calibration import Calibration, batches, load_rows, render, split
from optiq.calibration.rows import SPLITS
from optiq.errors import CalibrationError

ROWS = load_rows()
BY_LINE = {row["line"]: row for row in ROWS}


class Letters:
    """One token for each character, no BOS, no template."""

    bos_token_id = None
    has_chat_template = False
    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]


def rows_of(**lengths: list[int]) -> list[dict[str, Any]]:
    return [{"domain": d, "text": "x" * n} for d, sizes in lengths.items() for n in sizes]


def shares(calibration: Calibration) -> list[float]:
    total = sum(calibration.tokens_per_domain.values())
    return [count / total for count in calibration.tokens_per_domain.values()]


@pytest.mark.parametrize("tokens", [160, 2000, 9_999, 40_000, 10**6])
def test_the_bundled_mix_is_balanced(tokenizer: TokenizerWrapper, tokens: int) -> None:
    result = batches(ROWS, tokenizer, tokens=tokens)
    assert len(result.tokens_per_domain) == 5
    assert all(0.15 <= share <= 0.25 for share in shares(result))
    total = sum(result.tokens_per_domain.values())
    if result.note:
        assert f"asked for {tokens} tokens, reached " in result.note
        assert total > 30_000
    else:
        assert total == tokens // 5 * 5


def test_each_sequence_is_a_sample_from_its_start(tokenizer: TokenizerWrapper) -> None:
    result = batches(ROWS, tokenizer, tokens=20_000, max_length=256)
    assert len({sample.line for sample in result.sequences}) == len(result.sequences)
    cut = 0
    for sample in result.sequences:
        full = render(BY_LINE[sample.line], tokenizer)
        assert sample.domain == BY_LINE[sample.line]["domain"]
        assert 32 <= len(sample.tokens) <= 256
        assert sample.tokens == full[: len(sample.tokens)]
        cut += len(sample.tokens) < min(len(full), 256)
    assert cut <= 10


def test_counts_and_hash_describe_the_sequences(tokenizer: TokenizerWrapper) -> None:
    result = batches(ROWS, tokenizer, tokens=5_000)
    stream = b"".join(
        struct.pack(f"<{len(s.tokens) + 1}i", len(s.tokens), *s.tokens) for s in result.sequences
    )
    assert result.sha256 == hashlib.sha256(stream).hexdigest()
    for domain, count in result.tokens_per_domain.items():
        assert count == sum(len(s.tokens) for s in result.sequences if s.domain == domain)


def test_the_seed_decides(tokenizer: TokenizerWrapper) -> None:
    first, again, other = (batches(ROWS, tokenizer, tokens=5_000, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first.sha256 != other.sha256


def test_every_prefix_is_balanced_up_to_one_sample(tokenizer: TokenizerWrapper) -> None:
    result = batches(ROWS, tokenizer, tokens=30_000)
    counts = dict.fromkeys(result.tokens_per_domain, 0)
    for sample in result.sequences:
        counts[sample.domain] += len(sample.tokens)
        assert max(counts.values()) - min(counts.values()) <= 512


def test_held_out_rows_share_nothing_with_calibration(tokenizer: TokenizerWrapper) -> None:
    parts = [split(ROWS, part) for part in SPLITS]
    assert [len(part) for part in parts] == [120, 20, 20]
    lines = [{s.line for s in batches(p, tokenizer, tokens=6_000).sequences} for p in parts]
    assert len(set.union(*lines)) == sum(map(len, lines))


def test_a_short_domain_lowers_the_others() -> None:
    result = batches(rows_of(a=[100] * 9, b=[100, 50], c=[400]), Letters(), tokens=1_000)
    assert result.tokens_per_domain == {"a": 150, "b": 150, "c": 150}
    assert result.note == (
        "asked for 1000 tokens, reached 450: domain 'b' has only 150, "
        "and all domains are kept equal"
    )


def test_rows_too_short_are_left_out() -> None:
    """Also their domain, if it has no others."""
    rows = rows_of(a=[7, 90, 1, 90, 7, 7], b=[7], c=[90, 90])
    result = batches(rows, Letters(), tokens=300)
    assert result.tokens_per_domain == {"a": 150, "c": 150}
    assert result.note == "left out 5 rows under 8 tokens (lines 1, 3, 5, ...)"
    short = batches(rows, Letters(), tokens=500).note
    assert short.startswith("left out 5 rows under 8 tokens")
    assert short.endswith("kept equal")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(32, 700), min_size=1, max_size=8), min_size=1, max_size=4),
    st.integers(150, 3_000),
    st.integers(32, 600),
)
def test_shares_are_exact(lengths: list[list[int]], tokens: int, max_length: int) -> None:
    rows = rows_of(**{f"d{index}": sizes for index, sizes in enumerate(lengths)})
    result = batches(rows, Letters(), tokens=tokens, max_length=max_length)
    capacity = min(sum(min(size, max_length) for size in sizes) for sizes in lengths)
    share = min(tokens // len(lengths), capacity)
    # A sample in the way of the last 32 tokens gives way, so up to 63 may stay unfilled
    # when the domain has no further sample.
    for domain, count in result.tokens_per_domain.items():
        assert share - 63 <= count <= share, domain
    assert all(32 <= len(s.tokens) <= max_length for s in result.sequences)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {"tokens": 500}, "no calibration rows"),
        (rows_of(a=[3, 7]), {"tokens": 500}, "no calibration rows of 8 tokens or more"),
        (rows_of(a=[90], b=[90]), {"tokens": 63}, "ask for at least 64"),
        (rows_of(a=[90], b=[20]), {"tokens": 500}, "domain 'b' has only 20 tokens"),
        (rows_of(a=[90]), {"tokens": 500, "max_length": 31}, "max_length is 31"),
    ],
)
def test_what_cannot_be_balanced_is_refused(
    rows: list[dict[str, Any]], options: dict[str, int], message: str
) -> None:
    with pytest.raises(CalibrationError) as fault:
        batches(rows, Letters(), **options)
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)
