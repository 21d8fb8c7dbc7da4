"""The front matter of a model card: what the hub reads, and lists under "evaluation results"."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

Json = dict[str, Any]

# Data set on the hub, its name, split, and what the hub calls the metric.
DATASETS = {
    "mmlu": ("cais/mmlu", "MMLU", "test", "accuracy"),
    "gsm8k": ("openai/gsm8k", "GSM8K", "test", "exact_match"),
    "ifeval": ("google/IFEval", "IFEval", "train", "prompt_level_strict_acc"),
    "bfcl": ("gorilla-llm/Berkeley-Function-Calling-Leaderboard", "BFCL", "simple", "accuracy"),
    "humaneval": ("openai/openai_humaneval", "HumanEval", "test", "pass@1"),
}


def front_matter(facts: Json) -> ModelCardData:
    """For what `optiq.card.gather` returns. Figures of quick looks stay out of it."""
    base, plan = facts["base"], facts["plan"]
    results = [
        result
        for row in facts["metrics"]
        if (result := _result(row, facts["runs"].get(row["task"]))) is not None
    ]
    return ModelCardData(
        base_model=base["hub_id"],
        library_name="mlx",
        license=base["license"],
        license_name=base["license_name"],
        license_link=base["license_link"],
        language=base["language"],
        model_name=facts["name"] if results else None,
        pipeline_tag="text-generation",
        tags=["mlx", "optiq", "mixed-precision"],
        eval_results=results or None,
        base_model_relation="quantized" if base["hub_id"] else None,
        quantization={
            "method": "optiq",
            "bits_per_weight": round(plan["bpw"], 3),
            "formats": [row["format"] for row in plan["formats"]],
        },
    )


def _result(row: Json, run: Json | None) -> EvalResult | None:
    """A main metric of a whole run as the hub takes it: the value in percent, and how it came."""
    if row["task"] not in DATASETS or not row["main"] or not row["estimate"] or row["limit"]:
        return None
    dataset, name, split, metric = DATASETS[row["task"]]
    estimate, percent = row["estimate"], row["scale"]
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=name,
        dataset_split=split,
        metric_type=metric,
        metric_name=row["label"],
        metric_value=round(percent * estimate["value"], 2),
        metric_args={
            "items": estimate["n"],
            "interval_95": [round(percent * estimate[key], 2) for key in ("low", "high")],
            "protocol": run and run["protocol"],
        },
        verified=False,
    )
