"""Ranks and beginnings of adapters, at equal parameters, on a real model and task.

    python -m bench.lora MODEL --original DENSE --data TRAIN.jsonl -o OUT.json
                         [--rows 500] [--held-out 100] [--seeds 3] [--rank 8] [--arms ...]
                         [--most 400] [--drift-rows 16] [--skip-qera]
    python -m bench.lora OUT.json     prints the tables of what is there

MODEL is quantized, DENSE what it was quantized from. TRAIN.jsonl holds GSM8K's rows, {"question",
"answer"}: the first `--rows` are trained on for one epoch, the next `--held-out` judge; with
`--most` only rows of so few characters are taken, which is cheaper. An arm is RANKS-INIT, such as
sensitivity-qera; `random` draws a rank for each layer. Seeds are paired: all arms of a seed see the
same batches. Reported: held-out loss in nats per token of the answer, and on held-out rows of the
bundled calibration mix, in nats per token, drift, KL(MODEL || adapted), and distance,
KL(DENSE || adapted). The distance of MODEL itself is beside them, and how much of it qera alone
takes away, before training (`--skip-qera` leaves that out). Every result is written as it is made,
and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import optiq
from optiq.base.machine import machine, versions
from optiq.calibration.files import load_rows
from optiq.calibration.render import render
from optiq.calibration.rows import split
from optiq.lora import ranks, start
from optiq.lora.data import read
from optiq.lora.layers import LowRank, put
from optiq.lora.options import Training
from optiq.models.places import place_at
from optiq.nn.accelerate import accelerate
from optiq.ops import kl_from_logits
from optiq.sources import load, resolve

ARMS = tuple(
    f"{how}-{init}"
    for init in ("zero", "qera")
    for how in ("uniform", "sensitivity", "bits", "random")
)
QERA_RANKS = (8, 16, 32)
DRIFT_TOKENS = 160  # of each held-out row

Json = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--original")
    parser.add_argument("--data", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--most", type=int, default=0, help="characters of a row; 0: any")
    parser.add_argument("--drift-rows", type=int, default=16, help="of general text")
    parser.add_argument("--skip-qera", action="store_true")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    args = parser.parse_args()
    if Path(args.model).is_file() and args.model.endswith(".json"):
        show(json.loads(Path(args.model).read_text()))
        return
    found: Json = json.loads(args.out.read_text()) if args.out.exists() else {"runs": {}}
    found |= {"machine": machine(), "versions": versions(), "arguments": vars(args) | {
        "data": args.data.name, "out": args.out.name, "model": Path(args.model).name,
        "original": Path(args.original).name,
    }}  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        data = write_data(args, Path(work) / "data")
        if "qera" not in found:
            found["qera"] = qera_alone(args, data)
            args.out.write_text(json.dumps(found, indent=1))
        for seed in range(args.seeds):
            for arm in args.arms:
                key = f"{arm}/{seed}"
                if key not in found["runs"]:
                    found["runs"][key] = run_arm(args, data, arm, seed, Path(work), found)
                    args.out.write_text(json.dumps(found, indent=1))
                    print(key, found["runs"][key], flush=True)
    show(found)


def write_data(args: argparse.Namespace, folder: Path) -> Path:
    folder.mkdir()
    read_rows = map(json.loads, args.data.read_text().splitlines())
    short = (r for r in read_rows if len(r["question"] + r["answer"]) <= (args.most or 1 << 30))
    rows = list(islice(short, args.rows + args.held_out))
    for name, part in (("train", rows[: args.rows]), ("valid", rows[args.rows :])):
        pairs = [{"prompt": r["question"], "completion": r["answer"]} for r in part]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(p) for p in pairs))
    return folder


def run_arm(
    args: argparse.Namespace, data: Path, arm: str, seed: int, work: Path, found: Json
) -> Json:
    how, init = arm.split("-")
    if how == "random":
        how = str(random_ranks(args, seed, work / f"{seed}.json"))
    if how == "sensitivity" and "sensitivity" in found:  # the same for all seeds, and takes a while
        file = work / "sensitivity.json"
        file.write_text(json.dumps(found["sensitivity"]))
        how = str(file)
    out, began = work / f"{arm}-{seed}", time.monotonic()
    iters = -(-args.rows // args.batch_size)
    result = optiq.lora.train(
        args.model,
        data,
        out,
        original=args.original if how == "sensitivity" or init == "qera" else None,
        iters=iters,
        eval_every=iters,
        batch_size=args.batch_size,
        rank=args.rank,
        ranks=how,
        init=init,
        learning_rate=args.lr,
        patience=0,
        recompute=False,
        held_out=args.held_out,
        seed=seed,
    )
    if how == "sensitivity":
        found["sensitivity"] = result.adapter.ranks
    before, after = (j.loss for j in result.judged)
    terms = dict(result.adapter.terms)
    return {
        "before": before,
        "after": after,
        "drift": distance(args, args.model, terms),
        "distance": distance(args, args.original, terms),
        "parameters": result.adapter.parameters,
        "tokens_per_second": result.tokens_per_second,
        "seconds": time.monotonic() - began,
    }


def random_ranks(args: argparse.Namespace, seed: int, file: Path) -> Path:
    """Ranks in proportion to a log-normal draw, of the budget of all."""
    modules = start.chosen(opened(args.model)[0], "all")
    draw = np.exp(np.random.default_rng([seed, 77]).normal(size=len(modules)))
    weights = {m.path: float(w) for m, w in zip(modules, draw, strict=True)}
    file.write_text(json.dumps(ranks.proportional(modules, args.rank, weights)))
    return file


def opened(name: str) -> tuple[Any, Any]:
    loaded = load(resolve(name), allow_quantized=True)
    accelerate(loaded.model, blocks=False)
    return loaded.model, loaded.tokenizer


def general_text(tokenizer: Any, most: int) -> list[list[int]]:
    rows = split(load_rows(), "heldout")[:most]
    return [render(row, tokenizer)[:DRIFT_TOKENS] for row in rows]


def divergence(p: Any, q: Any, text: list[list[int]]) -> list[float]:
    """KL(p || q) of each row, in nats per token."""
    import mlx.core as mx

    return [
        float(np.asarray(kl_from_logits(p(ids), q(ids))[0]).mean())
        for ids in (mx.array([tokens]) for tokens in text)
    ]


def distance(args: argparse.Namespace, name: str, terms: dict[str, LowRank]) -> float:
    """KL(the model `name` || MODEL with `terms`), in nats per token of general text."""
    (other, tokenizer), (adapted, _) = opened(name), opened(args.model)
    put(adapted, terms, Training().scale)
    return float(np.mean(divergence(other, adapted, general_text(tokenizer, args.drift_rows))))


def qera_alone(args: argparse.Namespace, data: Path) -> Json:
    """KL(DENSE || MODEL) by row, and with the repair of each rank, from moments of the task."""
    dense, tokenizer = opened(args.original)
    base, _ = opened(args.model)
    text = general_text(tokenizer, args.drift_rows)
    found: Json = {"0": divergence(dense, base, text)}
    if args.skip_qera:
        return found
    options = Training(rank=max(QERA_RANKS), init="qera")
    modules = start.chosen(base, "all")
    samples = read(data, tokenizer, options.max_length).train
    begin = start.Beginning(options, base, modules, samples, original=dense)
    terms = begin.make().terms
    for rank in QERA_RANKS:
        cut = {path: LowRank(t.a[:, :rank], t.b[:rank]) for path, t in terms.items()}
        layers = put(base, cut, options.scale)
        found[str(rank)] = divergence(dense, base, text)
        for path, layer in layers.items():
            place_at(base, path).set(layer.linear)
    return found


def show(found: Json) -> None:
    runs: dict[str, Json] = found["runs"]
    arms = list(dict.fromkeys(key.split("/")[0] for key in runs))
    first = arms[0]
    less = f"less than {first}"
    print(f"{'arm':20s} {'held-out loss':>22s} {less:>26s} {'drift':>16s} {'distance':>16s}")
    for arm in arms:
        of = {key.split("/")[1]: run for key, run in runs.items() if key.startswith(f"{arm}/")}
        losses = np.array([run["after"] for run in of.values()])
        far = [spread(np.array([run[k] for run in of.values()])) for k in ("drift", "distance")]
        paired = [
            runs[f"{first}/{seed}"]["after"] - run["after"]
            for seed, run in of.items()
            if f"{first}/{seed}" in runs
        ]
        print(
            f"{arm:20s} {spread(losses):>22s} {spread(np.array(paired)):>26s} "
            f"{far[0]:>16s} {far[1]:>16s}  n={len(of)}"
        )
    for rank, values in found.get("qera", {}).items():
        base = np.array(found["qera"]["0"])
        share = 1 - np.mean(values) / base.mean()
        label = "KL of the base" if rank == "0" else f"with qera {rank}"
        print(f"{label:20s} {spread(np.array(values)):>22s}  takes away {100 * share:.1f} %")


def spread(values: np.ndarray[Any, Any]) -> str:
    """Mean and the half width of a 95 % interval of it."""
    if len(values) < 2:
        return f"{values.mean():.4f}"
    t = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 1.96)
    return f"{values.mean():.4f} ± {t * values.std(ddof=1) / len(values) ** 0.5:.4f}"


if __name__ == "__main__":
    main()
