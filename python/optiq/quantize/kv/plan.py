"""The whole job of `optiq kv`: score, propose, let real KL decide, measure what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ...base.command import command_line
from ...base.machine import machine, versions
from ...calibration import Sample, token_hash
from ...errors import UsageError
from ...kv.config import KVConfig
from ...kv.model import entries, identity
from ...nn.accelerate import accelerate
from ...quality.statistics import rank_correlation
from ...sources import load, resolve
from ..sensitivity.checkpoint import Checkpoint
from . import choose
from .contexts import CONTEXT, LEAST, SAMPLES, Texts, gather
from .files import KIND, Files
from .judge import judge
from .measure import TAIL, Scores, measure
from .slots import MENU, Slot, budget_of, configured, parse_menu, slots_of

Json = dict[str, Any]

# Most of what a coarse cache costs is in the last tokens and in the first, which a query attends to
# most (docs/kv-cache.md has figures).
RECENT, SINK = 128, 4

# Uniform pairs that the frontier shows for comparison, as far as the menu has them.
COMPARED = ("8/8", "8/4", "6/4", "4/4")


def plan_kv(
    model: str | Path,
    out: str | Path,
    *,
    size: str = "8/4",
    context: int | None = None,
    samples: int = SAMPLES,
    formats: str = MENU,
    fp_recent: int = RECENT,
    fp_sink: int = SINK,
    calibration: str | Path | None = None,
    revision: str | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> Json:
    """Choose formats for the keys and values of every cache of `model`; write them to `out`.

    Args:
        model: A folder, hub id or .gguf file, quantized or not.
        out: The kv_config.json to write. Beside it go OUT.report.json and OUT.report.html.
        size: "8/4", the bytes of 8-bit keys and 4-bit values, or "40%" of the 16-bit cache.
        context: Tokens of a context, over which sizes are stated, too (default: 4096, or what the
            model allows).
        samples: How many contexts to score on, to choose on, and to judge on, at most.
        formats: Widths that may be chosen, such as "3,4,5,6,8,bf16".
        fp_recent, fp_sink: Last and first tokens that are read in full precision, which `size`
            does not count.
        calibration: JSON Lines of rows in place of the bundled mix.
        resume: Go on with an interrupted run of the same job.

    Returns the content of the report. Raises an OptiqError; then `out` is as it was.
    """
    files = Files(Path(out))
    files.check(resume)
    menu = parse_menu(formats)
    source = resolve(str(model), revision=revision)
    loaded = load(source, allow_quantized=True)
    length = _context(context, loaded.config)
    dense = KVConfig(entries(loaded.model), fp_recent, fp_sink, identity(source))
    slots = slots_of(dense.entries, length)
    if not slots:
        raise UsageError(f"{source.name} has no cache of keys and values that can be quantized")
    budget = budget_of(size, dense, length)
    choose.check_budget(slots, menu, budget)
    texts = gather(loaded.tokenizer, calibration, length=length, samples=samples, seed=seed)
    accelerate(loaded.model)
    tail = min(TAIL, len(texts.scoring[0].tokens) // 4)
    how = {
        "model": source.fingerprint,
        "text": token_hash(texts.scoring),
        "tail": tail,
        "formats": [str(f) for f in menu],
        "versions": versions(),
    }
    scores, law = measure(
        loaded.model,
        KVConfig(dense.entries),  # a prompt is read in chunks, past whose end nothing is exact
        slots,
        menu,
        texts.scoring,
        tail=tail,
        checkpoint=Checkpoint(files.checkpoint, how, resume=resume),
        progress=progress,
    )
    proposals = choose.propose(slots, scores, budget, size.strip())
    found = _decide(loaded.model, dense, slots, scores, budget, proposals, texts, progress)
    formats_of = found.pop("formats")
    config = configured(dense, formats_of)
    made = {"command": command_line(), "versions": versions(), "machine": machine()}
    text = _describe(texts, tail, seed)
    report = {
        "kind": KIND,
        "schema": 1,
        "model": {**dense.model, "model_type": loaded.config["model_type"]},
        "context": length,
        "budget": {"asked": size, "bytes": budget},
        "nbytes": config.nbytes(length),
        "dense_nbytes": dense.nbytes(length),
        "bytes_per_token": config.bytes_per_token,
        "exact": {"recent": fp_recent, "sink": fp_sink, "nbytes": _exact_bytes(dense)},
        **found,
        "law": law,
        "scores": [
            {
                **slot.to_json(),
                "format": str(formats_of[slot.name]),
                "scores": {str(f): s.to_json() for f, s in scores[slot.name].items()},
            }
            for slot in slots
        ],
        "text": text,
        **made,
    }
    provenance = {
        key: report[key] for key in ("context", "budget", "nbytes", "dense_nbytes", "chosen")
    }
    provenance |= {"measured": found["points"][0], "text": text, **made}
    files.write(replace(config, provenance=provenance), report)
    return report


def _context(asked: int | None, config: Json) -> int:
    """Tokens of a context: what was asked for, or the usual number as far as the model allows."""
    text_config = config.get("text_config") or {}
    most = config.get("max_position_embeddings") or text_config.get("max_position_embeddings")
    if asked is None:
        return min(CONTEXT, most or CONTEXT)
    if asked < LEAST:
        raise UsageError(f"--context {asked} is too short to read back from; give {LEAST} or more")
    if most and asked > most:
        raise UsageError(f"--context {asked} is longer than the {most} positions the model has")
    return asked


def _exact_bytes(dense: KVConfig) -> int:
    """Bytes of a request's exact tokens, which come on top of its records."""
    a_token = sum(e.bytes_per_token for e in dense.entries if e.kind == "full")
    return a_token * (dense.fp_recent + dense.fp_sink)


def _decide(
    model: nn.Module,
    dense: KVConfig,
    slots: Sequence[Slot],
    scores: Scores,
    budget: int,
    proposals: Mapping[str, choose.Formats],
    texts: Texts,
    progress: bool,
) -> Json:
    """The proposal of least measured KL, and what was measured of it and of uniform widths."""
    pairs = choose.pairs(slots, scores)

    def described(name: str, formats: choose.Formats, metrics: Json) -> Json:
        return {
            "name": name,
            "nbytes": choose.size(slots, formats),
            "predicted": choose.predicted(scores, formats),
            **metrics,
        }

    def measured(formats: Mapping[str, choose.Formats], contexts: Sequence[Sample]) -> list[Json]:
        configs = {name: configured(dense, of) for name, of in formats.items()}
        metrics = judge(model, configs, contexts, progress=progress)
        return [described(name, of, metrics[name]) for name, of in formats.items()]

    candidates = measured(proposals, texts.selection)
    best = min(candidates, key=lambda c: (c["kl"]["mean"], c["nbytes"]))
    formats = proposals[best["name"]]
    others = {name: pairs[name] for name in COMPARED if name in pairs}
    if (uniform := choose.uniform(slots, scores, budget)) and uniform not in others.values():
        others["uniform"] = uniform
    points = measured({"optiq": formats, **others}, texts.held_out)
    ratios = [(c["predicted"], c["kl"]["mean"]) for c in candidates if c["predicted"]]
    return {
        "formats": formats,
        "chosen": best["name"],
        "candidates": candidates,
        "ratio": best["kl"]["mean"] / best["predicted"] if best["predicted"] else None,
        "rank_correlation": rank_correlation(ratios),
        "frontier": [list(point) for point in choose.frontier(slots, scores)],
        "points": points,
    }


def _describe(texts: Texts, tail: int, seed: int) -> Json:
    parts = {
        "scoring": texts.scoring,
        "selection": texts.selection,
        "held_out": texts.held_out,
    }
    lengths = {name: [len(s.tokens) for s in part] for name, part in parts.items()}
    hashes = {name: token_hash(part) for name, part in parts.items()}
    return {"source": texts.name, "seed": seed, "tail": tail, "tokens": lengths, "sha256": hashes}
