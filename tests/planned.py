"""Tiny sources with random scores, for tests of what happens between a plan and a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from optiq.formats import DEFAULT_MENU, DENSE
from optiq.models.roles import Module, allowed, quantizable
from optiq.planning.plan import Plan, uniform_plan
from optiq.planning.scores import ModelInfo, Score, Scored, Scores
from optiq.quantize.describe import describe_model
from optiq.sources import Source, load, resolve
from tests.scored import UNSCORED
from tests.tiny import tiny_folder

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"hidden_size": 128}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-bf16": ("llama", {"dtype": "bfloat16"}),
    "qwen2": ("qwen2", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma3_text": ("gemma3_text", {}),
    "shards": ("llama", {"shards": 3}),
}


def source_of(parent: Path, variant: str = "llama") -> Source:
    kind, config = VARIANTS[variant]
    return resolve(str(tiny_folder(parent, kind, name=f"source-{variant}", **config)))


def describe(source: Source) -> tuple[ModelInfo, list[Module]]:
    loaded = load(source)
    modules = quantizable(loaded.model)
    return describe_model(loaded, modules), modules


def scores_of(source: Source) -> Scores:
    """Random scores that fall with the bits: they make every plan mix many formats."""
    model, modules = describe(source)
    rng = np.random.default_rng(0)
    scored = []
    for m in modules:
        spread = rng.lognormal(0, 2)
        scores = {
            f: Score(0.0 if f == DENSE else spread * 4.0**-f.bits, 0.0)
            for f in allowed(m, DEFAULT_MENU)
        }
        scored.append(Scored(m, scores))
    return replace(UNSCORED, model=model, modules=tuple(scored))


def uniform(source: Source) -> Plan:
    return uniform_plan(*describe(source))


def leftovers(parent: Path) -> list[str]:
    return sorted(p.name for p in parent.iterdir() if not p.name.startswith("source"))
