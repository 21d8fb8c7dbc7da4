"""Long contexts: whole documents in order, no token in two of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer

from optiq.calibration import Sample
from optiq.errors import CalibrationError
from optiq.quantize.kv.contexts import LEAST, gather_contexts, pack
from tests.tiny import BOS, tiny_folder


def documents(*lengths: int) -> list[Sample]:
    """Documents of distinct tokens."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [
        Sample("d", list(range(start, start + n)), i + 1)
        for i, (start, n) in enumerate(zip(starts, lengths, strict=True))
    ]


def test_contexts_are_documents_in_order_and_what_is_left_is_whole() -> None:
    contexts, rest = pack(documents(60, 60, 90, 100, 50, 40), 100, 2)
    assert [c.tokens for c in contexts] == [list(range(100)), list(range(120, 220))]
    assert [c.line for c in contexts] == [1, 3]
    assert [d.line for d in rest] == [5, 6]


def test_too_few_tokens_make_two_shorter_contexts() -> None:
    contexts, _ = pack(documents(50, 50, 50, 50), 4096, 4)
    assert [c.tokens for c in contexts] == [list(range(100)), list(range(100, 200))]
    # The cut of the first takes from the second, and both are as long as that.
    contexts, _ = pack(documents(150, 100), 4096, 4)
    assert [c.tokens for c in contexts] == [list(range(100)), list(range(150, 250))]
    assert pack(documents(LEAST, LEAST - 1), 4096, 4)[0] == []


def test_no_document_is_in_two_texts_and_each_starts_with_bos(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder(tmp_path))
    texts = gather_contexts(tokenizer, None, length=512, samples=3, seed=0)
    parts = texts.scoring, texts.selection, texts.held_out
    assert [[len(s.tokens) for s in part] for part in parts] == [[512] * 3] * 3
    contexts = [s for part in parts for s in part]
    assert len({s.line for s in contexts}) == len(contexts)
    assert all(s.tokens[0] == BOS for s in contexts)
    assert gather_contexts(tokenizer, None, length=512, samples=3, seed=0) == texts
    assert gather_contexts(tokenizer, None, length=512, samples=3, seed=1) != texts


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder(tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"domain": "a", "text": "word " * 12}) for _ in range(3)))
    with pytest.raises(CalibrationError, match="too little text for two contexts of 64 tokens"):
        gather_contexts(tokenizer, rows, length=512, samples=2, seed=0)
