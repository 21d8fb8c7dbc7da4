"""The front matter of a model card: what the hub reads, and lists under "evaluation results"."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCardData

from .facts import Facts, MetricScore, by_format

# Data set on the hub, its name, split, and what the hub calls the metric.
DATASETS = {
    "mmlu": ("cais/mmlu", "MMLU", "test", "accuracy"),
    "gsm8k": ("openai/gsm8k", "GSM8K", "test", "exact_match"),
    "ifeval": ("google/IFEval", "IFEval", "train", "prompt_level_strict_acc"),
    "bfcl": ("gorilla-llm/Berkeley-Function-Calling-Leaderboard", "BFCL", "simple", "accuracy"),
    "humaneval": ("openai/openai_humaneval", "HumanEval", "test", "pass@1"),
}


def front_matter(facts: Facts) -> ModelCardData:
    """Figures of quick looks stay out of it."""
    base, plan = facts.base, facts.plan
    results = [
        _result(score, facts.runs[score.metric.task].header.protocol)
        for score in facts.scores
        if score.metric.task in DATASETS and score.metric.main
        if score.estimate and not score.limit
    ]
    return ModelCardData(
        base_model=base.hub_id,
        library_name="mlx",
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        language=base.language,
        model_name=facts.name if results else None,
        pipeline_tag="text-generation",
        tags=["mlx", "optiq", "mixed-precision", f"{round(plan.bpw)}-bit"],
        eval_results=results or None,
        base_model_relation="quantized" if base.hub_id else None,
        quantization={
            "method": "optiq",
            "bits_per_weight": round(plan.bpw, 3),
            "formats": [str(total.format) for total in by_format(plan)],
        },
    )


def _result(score: MetricScore, protocol: str) -> EvalResult:
    """A score as the hub takes it: the value in percent, and how it came."""
    metric, estimate = score.metric, score.estimate
    assert estimate is not None
    dataset, name, split, hub_metric = DATASETS[metric.task]
    value, low, high = (
        round(metric.scale * x, 2) for x in (estimate.value, estimate.low, estimate.high)
    )
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=name,
        dataset_split=split,
        metric_type=hub_metric,
        metric_name=metric.label,
        metric_value=value,
        metric_args={
            "items": estimate.n,
            "interval_95": [low, high],
            "protocol": protocol,
        },
        verified=False,
    )
