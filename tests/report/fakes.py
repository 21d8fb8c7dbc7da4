"""Plans and scores as `optiq convert` writes them, built by code: shapes are the real models',
scores are random but ordered (narrower is worse, first and last blocks are sensitive)."""

from __future__ import annotations

from math import exp, prod
from random import Random
from typing import Any

from optiq.formats import DEFAULT_MENU, Format
from optiq.planning.plan import Plan
from optiq.planning.scores import Scores

Json = dict[str, Any]
Pair = tuple[Json, Json]  # plan, scores
Spec = tuple[str, str, str, int | None, list[int]]  # path, role, unit, block, shape

FLOORS = {"embedding": 3, "head": 3, "router": 8}
BASE = {"q": 0.3, "k": 0.25, "v": 1.6, "o": 0.8, "gate": 0.7, "up": 0.9, "down": 1.5}


def dense_specs(blocks: int, hidden: int, ffn: int, kv: int, vocab: int, tied: bool) -> list[Spec]:
    specs: list[Spec] = [("model.embed_tokens", "embedding", "embed", None, [vocab, hidden])]
    for b in range(blocks):
        at = f"model.layers.{b}"
        for name, out in (("q", hidden), ("k", kv), ("v", kv)):
            path = f"{at}.self_attn.{name}_proj"
            specs.append((path, "attention", f"{at}.qkv", b, [out, hidden]))
        specs.append((f"{at}.self_attn.o_proj", "attention", f"{at}.o", b, [hidden, hidden]))
        for name in ("gate", "up"):
            specs.append((f"{at}.mlp.{name}_proj", "mlp", f"{at}.gate_up", b, [ffn, hidden]))
        specs.append((f"{at}.mlp.down_proj", "mlp", f"{at}.down", b, [hidden, ffn]))
    if not tied:
        specs.append(("lm_head", "head", "head", None, [vocab, hidden]))
    return specs


def moe_specs(blocks: int) -> list[Spec]:
    """Qwen-MoE-like: block 0 has a dense MLP, the others a router, experts and a shared expert."""
    specs: list[Spec] = []
    for spec in dense_specs(blocks, 2048, 6144, 512, 151936, tied=False):
        path, _, _, block, _ = spec
        if block == 0 or block is None or ".mlp." not in path:
            specs.append(spec)
            continue
        if not path.endswith("gate_proj"):
            continue
        mlp = path.removesuffix(".gate_proj")
        specs.append((f"{mlp}.gate", "router", f"{mlp}.gate", block, [128, 2048]))
        for name, shape in (("gate", [768, 2048]), ("up", [768, 2048]), ("down", [2048, 768])):
            for kind, role, dims in (
                ("switch_mlp", "expert", [128, *shape]),
                ("shared_expert", "mlp", shape),
            ):
                specs.append((f"{mlp}.{kind}.{name}_proj", role, f"{mlp}.{kind}", block, dims))
        specs.append((f"{mlp}.shared_expert_gate", "router", f"{mlp}.seg", block, [1, 2048]))
    return specs


def score(spec: Spec, blocks: int, rng: Random) -> dict[str, dict[str, float]]:
    path, _, _, block, shape = spec
    leaf = path.rpartition(".")[2].removesuffix("_proj")
    scale = 25e-3 if block is None else 4e-4 * BASE.get(leaf, 1.0) * exp(rng.gauss(0, 0.5))
    if block is not None:
        scale *= 1 + 6 * exp(-block / 1.2) + 2 * exp(-(blocks - 1 - block) / 1.5)
    scores: dict[str, dict[str, float]] = {}
    for fmt in DEFAULT_MENU:
        if not fmt.fits(shape):
            continue
        kl = 0.0
        if fmt.mode == "affine":
            kl = scale * 4.2 ** (4 - fmt.bits) * (fmt.group_size / 64) ** 0.3
            kl *= rng.uniform(0.9, 1.1)
        scores[str(fmt)] = {"kl": kl, "se": kl * rng.uniform(0.05, 0.12)}
    return scores


def choose(modules: list[Json], budget: int) -> dict[str, Format]:
    """Greedy by KL saved per byte: enough for a picture, and independent of optiq.allocation."""
    menus = {}
    for m in modules:
        menu = [
            (f.nbytes(m["shape"]), m["scores"][str(f)]["kl"], f)
            for f in map(Format.parse, m["scores"])
            if f.bits >= FLOORS.get(m["role"], 0)
        ]
        menus[m["path"]] = sorted(menu)
    at = dict.fromkeys(menus, 0)
    used = sum(menu[0][0] for menu in menus.values())
    while True:
        steps = [
            ((menu[at[p]][1] - kl) / (n - menu[at[p]][0]), p, j)
            for p, menu in menus.items()
            for j, (n, kl, _) in enumerate(menu)
            if n > menu[at[p]][0] and used + n - menu[at[p]][0] <= budget
        ]
        gain, path, j = max(steps, default=(0.0, "", 0))
        if gain <= 0:
            return {p: menu[at[p]][2] for p, menu in menus.items()}
        used += menus[path][j][0] - menus[path][at[path]][0]
        at[path] = j


def metrics(mean: float, nbytes: int, params: int) -> Json:
    return {
        "kl": {
            "mean": mean,
            "se": mean * 0.0341,
            "median": mean * 0.2113,
            "p95": mean * 4.017,
            "p99": mean * 9.731,
            "p999": mean * 27.19,
            "max": mean * 61.83,
        },
        "top1": {"mean": 1 - mean * 1.5037, "se": 0.00413},
        "ppl_ratio": 1 + mean * 0.4071,
        "nbytes": nbytes,
        "bpw": 8 * nbytes / params,
        "tokens": 20480,
        "sequences": 80,
        "text_sha256": "9f2c4be01d77a6c3" * 4,
    }


def build(name: str, specs: list[Spec], blocks: int, fixed: int, model_type: str) -> Pair:
    """(plan, scores) at the bytes of uniform 4-bit."""
    rng = Random(0)
    modules: list[Json] = [
        {
            "path": s[0],
            "role": s[1],
            "unit": s[2],
            "block": s[3],
            "shape": s[4],
            "stock": "8g64" if s[1] == "router" else None,  # as in mlx-lm's model files
            "scores": score(s, blocks, rng),
        }
        for s in specs
    ]
    stock = sum(Format.parse(m["stock"] or "4g64").nbytes(m["shape"]) for m in modules) + fixed
    formats = choose(modules, stock - fixed)
    planned = [
        {key: m[key] for key in ("path", "role", "unit", "block", "shape", "stock")}
        | {"format": str(f), "nbytes": f.nbytes(m["shape"]), "kl": m["scores"][str(f)]["kl"]}
        for m in modules
        for f in [formats[m["path"]]]
    ]
    params = sum(prod(m["shape"]) for m in modules) + fixed // 2
    nbytes = sum(m["nbytes"] for m in planned) + fixed
    predicted = sum(m["kl"] for m in planned)
    model = {
        "name": name,
        "fingerprint": "4d1a" * 16,
        "model_type": model_type,
        "dtype": "bfloat16",
        "itemsize": 2,
        "fixed_bytes": fixed,
    }
    machine = {"cpu": "Intel Xeon", "cores": 2, "memory": "8.3 GB", "os": "Linux 6.1"}
    versions = {"optiq": "0.1.0", "mlx": "0.32.4", "mlx_lm": "0.32.2"}
    domains = {"prose": 1633, "reasoning": 1641, "code": 1630, "agent": 1652, "tool_call": 1636}
    calibration = {
        "source": "optiq.jsonl",
        "tokens": 8192,
        "sequences": 36,
        "tokens_per_domain": domains,
        "sha256": "c0ffee12" * 8,
        "seed": 0,
    }
    scores = {
        "schema": 1,
        "kind": "optiq.sensitivity",
        "model": model,
        "method": "kl",
        "metric": "nats per token",
        "reference": "bf16",
        "rounding": "minmax",
        "calibration": calibration,
        "machine": machine,
        "versions": versions,
        "seconds": 311.4,
        "modules": modules,
    }
    plan = {
        "schema": 1,
        "kind": "optiq.plan",
        "model": model,
        "budget": {"asked": "uniform4", "bytes": stock},
        "nbytes": nbytes,
        "bpw": 8 * nbytes / params,
        "objective": {"predicted_kl": predicted, "bound": predicted * 0.9996, "gap": 4e-4},
        "measured": metrics(predicted * 1.09, nbytes, params),
        "modules": planned,
        "calibration": calibration,
        "seed": 0,
        "command": f"optiq convert {name} -o out --size uniform4",
        "versions": versions,
        "machine": machine,
        "uniform4": {"nbytes": stock, "measured": metrics(predicted * 2.31, stock, params)},
    }
    return plan, scores


def parse(pair: Pair) -> tuple[Plan, Scores]:
    plan, scores = pair
    return Plan.from_json(plan), Scores.from_json(scores)


def smollm2() -> Pair:
    specs = dense_specs(30, 576, 1536, 192, 49152, tied=True)
    return build("HuggingFaceTB/SmolLM2-135M-Instruct", specs, 30, 61 * 576 * 2, "llama")


def moe() -> Pair:
    return build("Qwen/Qwen3-30B-A3B", moe_specs(12), 12, 25 * 2048 * 2, "qwen3_moe")


def tiny() -> Pair:
    return build("tiny", dense_specs(2, 64, 128, 64, 256, tied=False), 2, 5 * 64 * 2, "llama")
