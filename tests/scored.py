"""What a sensitivity.json says besides its modules."""

from __future__ import annotations

from typing import Any

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
