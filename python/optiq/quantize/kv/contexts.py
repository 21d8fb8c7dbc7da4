"""Long contexts: documents one after the other, each from its BOS on, as in a user's long chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...calibration import Sample, Tokenizer, batches, load_rows, split, text_name
from ...errors import CalibrationError

CONTEXT = 4096
SAMPLES = 4
LEAST = 64  # tokens; in less, a cache is hardly read

_ALL = 1 << 40  # tokens; a text gives what it has


@dataclass(frozen=True)
class Contexts:
    """Contexts to score with, to choose a plan by, and to judge the result on."""

    name: str
    scoring: list[Sample]
    selection: list[Sample]
    held_out: list[Sample]


def gather_contexts(
    tokenizer: Tokenizer, path: Path | None, *, length: int, samples: int, seed: int
) -> Contexts:
    """At most `samples` contexts of `length` tokens for each of the three, from the rows at `path`.

    No document is in two of them; held out are those that `calibration.split` holds out. Where the
    text is too short for two contexts (of which an error bar can be made), they are shorter.
    Raises CalibrationError for too little text.
    """
    rows = load_rows(path)
    name = text_name(path)
    documents = {
        which: _documents(split(rows, which), tokenizer, seed)
        for which in ("calibration", "selection", "heldout")
    }
    scoring, rest = pack(documents["calibration"], length, samples)
    selection, _ = pack([*documents["selection"], *rest], length, samples)
    held_out, _ = pack(documents["heldout"], length, samples)
    for which, found in (("scores", scoring), ("choice", selection), ("judgement", held_out)):
        if not found:
            raise CalibrationError(
                f"{name} has too little text for two contexts of {LEAST} tokens for the {which}; "
                "add rows"
            )
    return Contexts(name, scoring, selection, held_out)


def pack(documents: Sequence[Sample], length: int, count: int) -> tuple[list[Sample], list[Sample]]:
    """Up to `count` contexts of `length` tokens, and the documents that were not needed.

    Documents are joined in order, the last of a context is cut. Fewer tokens than two contexts
    have make two equal ones; none where these would be shorter than `LEAST`.
    """
    total = sum(len(d.tokens) for d in documents)
    length = min(length, total // 2)
    if length < LEAST:
        return [], list(documents)
    contexts: list[Sample] = []
    rest = list(documents)
    while rest and len(contexts) < count:
        tokens: list[int] = []
        first = rest[0]
        while rest and len(tokens) < length:
            tokens += rest.pop(0).tokens
        if len(tokens) < length:
            if len(contexts) != 1:
                break
            # The cut of the first took from the second; both give way.
            length = len(tokens)
            contexts[0] = Sample(contexts[0].domain, contexts[0].tokens[:length], contexts[0].line)
        contexts.append(Sample("mixed", tokens[:length], first.line))
    return contexts, rest


def _documents(rows: Sequence[dict[str, object]], tokenizer: Tokenizer, seed: int) -> list[Sample]:
    """All rows in a balanced, shuffled order: every stretch of them has all domains."""
    if not rows:
        return []
    return batches(rows, tokenizer, tokens=_ALL, max_length=_ALL, seed=seed).sequences
