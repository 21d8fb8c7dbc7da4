"""What a sensitivity.json says besides its modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optiq.formats import Format
from optiq.planning import plan
from optiq.planning.plan import Plan
from optiq.planning.scores import ModelInfo, Scores, TextInfo
from optiq.planning.size import Size

MODEL: dict[str, Any] = {
    "name": "m",
    "fingerprint": "f",
    "model_type": "llama",
    "dtype": "bfloat16",
    "itemsize": 2,
    "fixed_bytes": 1000,
}

PROVENANCE: dict[str, Any] = {
    "schema": 1,
    "kind": "optiq.sensitivity",
    "method": "kl",
    "metric": "nats per token",
    "reference": "bf16",
    "rounding": "minmax",
    "calibration": {
        "source": "optiq.jsonl",
        "tokens": 1000,
        "sequences": 4,
        "tokens_per_domain": {"prose": 1000},
        "sha256": "0" * 64,
        "seed": 0,
    },
    "machine": {"cpu": "x"},
    "versions": {"mlx": "0"},
    "seconds": 1.0,
}

# All that scores say besides their modules.
UNSCORED = Scores(
    model=ModelInfo.from_json(MODEL),
    modules=(),
    method="kl",
    reference="bf16",
    rounding="minmax",
    calibration=TextInfo.from_json(PROVENANCE["calibration"]),
    machine=PROVENANCE["machine"],
    versions=PROVENANCE["versions"],
    seconds=1.0,
)

# mlx-optiq's file of the same name: layers with their size, no shapes, no embeddings.
PEER: dict[str, Any] = {
    "base_model": "org/model",
    "candidate_bits": [4, 8],
    "group_size": 64,
    "metric": "kl_divergence_vs_reference",
    "layers": [
        {
            "layer_name": f"model.layers.{i}.mlp.{leaf}",
            "sensitivities": {"4": kl, "8": kl / 100},
            "param_count": 128 * 384,
            "metadata": {},
        }
        for i, leaf, kl in [(0, "up_proj", 0.5), (0, "gate", 0.1), (1, "up_proj", 0.001)]
    ],
}


def build(
    scores: Scores | dict[str, Any],
    size: str = "uniform4",
    menu: Sequence[Format] | None = None,
    **how: Any,
) -> Plan:
    """The plan of scores, parsed or as a file has them."""
    read = scores if isinstance(scores, Scores) else Scores.from_json(scores)
    return plan.build(read, Size.parse(size), menu, **how)
