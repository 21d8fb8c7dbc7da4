"""KL per byte on a real model, against stock rounding and stock recipes.

    python -m bench.quality MODEL --text FOLDER [--seeds 3] [--also NAME=FOLDER ...] [-o OUT.json]
        [--llama-quantize PROGRAM [--gguf-types Q4_K_S ...]]

MODEL is a folder or a .gguf file. The weights of a GGUF lie on the grid of their old format, which
favours grids like it; so they are first moved by a uniform random part of a step, within the step
(`dithered`), and rounded to bfloat16. That model is the reference, and each seed is another draw of
it, of the calibration samples and of the labels.

Protocol: windows of 512 tokens, the second half scored, float32 activations, KL(reference ||
candidate) in nats over the full vocabulary, mean over windows with its standard error (a window
comes from one document or a few short ones). FOLDER holds .jsonl files with a "text" in each row, a
domain per file; each gives the same number of windows. optiq's own bundled samples, with which it
calibrates and selects, are not among them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import optiq
from bench import gguf
from optiq.base.machine import machine, versions
from optiq.calibration.texts import CALIBRATION_TOKENS, SCORING_TOKENS, gather, gather_selection
from optiq.formats import Format, parse_menu
from optiq.models import stock
from optiq.models.roles import is_head, quantizable
from optiq.models.size import model_size
from optiq.nn.accelerate import accelerate
from optiq.nn.replay import Replay
from optiq.planning.plan import Plan, build, uniform_plan
from optiq.planning.proposals import propose
from optiq.planning.size import Size
from optiq.quantize.options import Options
from optiq.quantize.prepare import choose_rounding
from optiq.quantize.rounding.descent import descend
from optiq.quantize.rounding.render import render_model
from optiq.quantize.rounding.weights import MINMAX, Rounding
from optiq.quantize.select import decide
from optiq.quantize.sensitivity.measure import measure as measure_scores
from optiq.sources import Source, load, resolve

WINDOW, SCORED = 512, 256
ROWS = 128  # of logits at a time

Json = dict[str, Any]


def dithered(source: Source, out: Path, seed: int) -> None:
    """A copy of the folder whose matrices no longer lie on the grid of a 4-bit-class GGUF.

    A row's blocks of 32 have a step each: the range by 15 (Q4_1, Q4_K), or for embeddings, which
    are stored in 8 bits, the largest magnitude by 127.
    """
    shutil.copytree(source.path, out)
    rng = np.random.default_rng(seed)
    for file in out.glob("*.safetensors"):
        tensors = mx.load(str(file))
        for name, array in tensors.items():
            if array.ndim != 2:
                continue
            w = np.array(array.astype(mx.float32)).reshape(-1, 32)
            if "embed" in name:
                step = np.abs(w).max(axis=-1, keepdims=True) / 127
            else:
                step = np.ptp(w, axis=-1, keepdims=True) / 15
            w = w + step * rng.uniform(-0.5, 0.5, w.shape)
            tensors[name] = mx.array(w.reshape(array.shape).astype(np.float32)).astype(array.dtype)
        mx.eval(tensors)
        file.unlink()  # it may still be mapped
        mx.save_safetensors(str(file), tensors, metadata={"format": "mlx"})


def windows(tokenizer: Any, folder: Path, count: int, seed: int) -> list[list[int]]:
    """`count` windows of each file in `folder`, from documents in random order."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        random.Random(f"{seed}/{file.stem}").shuffle(texts)
        bos, part, made = tokenizer.bos_token_id, [], 0
        for text in texts:
            part += tokenizer.encode(text, add_special_tokens=False)[:WINDOW]
            if len(part) >= WINDOW and made < count:
                found.append([*([bos] if bos is not None else []), *part][:WINDOW])
                part, made = [], made + 1
    return found


class Protocol:
    """Measures students against the model of `source` on `text`."""

    def __init__(self, source: Source, text: list[list[int]]) -> None:
        model = load(source).model
        self.text, self.modules = text, quantizable(model)
        self.head = next(m.path for m in self.modules if is_head(m))
        accelerate(model)
        self.teacher = Replay(model, self.modules)
        self.teacher.__enter__()
        self.tapes = [self.teacher.record(tokens) for tokens in text]
        for tape in self.tapes:  # only the shapes are needed from here on
            tape.outputs = [mx.zeros(tape.hidden.shape)] * len(tape.outputs)

    def __call__(self, student: nn.Module) -> Json:
        means, top = [], []
        with Replay(student, self.modules) as replay:
            head = replay.place(self.head).get()
            for tape, tokens in zip(self.tapes, self.text, strict=True):
                hidden = replay.record(tokens).hidden
                kl, agree = [], []
                for start in range(WINDOW - SCORED, WINDOW, ROWS):
                    rows = slice(start, start + ROWS)
                    p = self.teacher.logits(tape, tape.hidden[0, rows])
                    q = self.teacher.logits(tape, hidden[0, rows], head)
                    both = optiq.ops.compare_logits(p, q)
                    kl.append(np.array(both.kl, dtype=np.float64))
                    agree.append(np.array(both.agree, dtype=np.float64))
                means.append(np.concatenate(kl).mean())
                top.append(np.concatenate(agree).mean())
        se = float(np.std(means, ddof=1) / len(means) ** 0.5)
        return {"kl": float(np.mean(means)), "se": se, "top1": float(np.mean(top))}


def run(
    name: str,
    folder: Path,
    text: Path,
    count: int,
    seed: int,
    at: list[str],
    also: Json,
    llama: gguf.Quantizer | None = None,
) -> Json:
    """All figures of one seed."""
    times: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        times[what] = time.monotonic() - start
        print(f"{what}: {times[what]:.1f} s", flush=True)

    source = resolve(str(folder))
    loaded = load(source)
    measure = Protocol(source, windows(loaded.tokenizer, text, count, seed))
    calibration = gather(loaded.tokenizer, None, "calibration", CALIBRATION_TOKENS, seed)
    selecting = gather_selection(loaded.tokenizer, None, seed)
    results: dict[str, Json] = {}

    def judge_model(label: str, student: nn.Module, size: Json) -> Json:
        results[label] = {**size, **measure(student)}
        print(f"{label:34s} {results[label]}", flush=True)
        return results[label]

    def judge_stored(label: str, student: nn.Module) -> Json:
        """Of a model as it came from its files: running it natively changes dtypes, so sizes."""
        stored = model_size(student)
        accelerate(student)
        return judge_model(label, student, stored._asdict())

    def judge(label: str, plan: Plan, rounding: Rounding = MINMAX) -> Json:
        student = render_model(load(source), plan, rounding=rounding)
        return judge_model(label, student, {"nbytes": plan.nbytes, "bpw": plan.bpw})

    options = Options.parse(
        formats="3,4,5,6,8,bf16", sensitivity="fisher", reference="bf16", seed=seed, progress=False
    )
    with timed("importance"):
        search = choose_rounding(source, calibration, options)
    scoring = gather(loaded.tokenizer, None, "calibration", SCORING_TOKENS, seed)
    with timed("fisher scores"):
        scores = measure_scores(load(source), scoring, options, rounding=search)
    with timed("fisher scores, min/max, {4, 8}"):
        two = replace(options, formats=parse_menu("4g64,8g64"))
        peer = measure_scores(load(source), scoring, two)

    model = scores.model
    modules = quantizable(load(source, lazy=True).model)
    with timed("search of all modules and formats"):
        for m, weight in _weights(source):
            for fmt in parse_menu("3,4,5,6,8"):
                if fmt.fits(m.shape):
                    mx.eval(optiq.ops.quantize(weight, fmt, search.importance[m.path]))

    def fit(plan: Plan, rounding: Rounding = search) -> Rounding:
        return descend(
            source, plan, calibration, rounding, reference="bf16", seed=seed, progress=False
        )

    uniform4 = uniform_plan(model, modules)
    judge("stock uniform 4-bit", uniform4)
    for bits, group in ((3, 64), (4, 32), (5, 64), (6, 64), (8, 64)):
        judge(
            f"stock uniform {bits}g{group}",
            uniform_plan(model, modules, Format("affine", bits, group)),
        )
    judge("uniform 4-bit, search", uniform4, search)
    with timed("descent"):
        fitted = fit(uniform4)
    judge("uniform 4-bit, descent", uniform4, fitted)
    stock_mixed = stock.quantize(load(source, lazy=True), recipe="mixed_4_6")
    mixed = judge_stored("mlx-lm mixed_4_6", stock_mixed)
    parameters = 8 * uniform4.nbytes / uniform4.bpw
    judge("{4, 8} by scores, min/max, 5.0 bpw", build(peer, Size.parse("5bpw")))
    sizes = {"4.5": "uniform4", "5.0": "5bpw", "6.0": "6bpw", "mixed_4_6": f"{mixed['bpw']:.6f}bpw"}
    if llama:
        for kind, quantized, nbytes, types in llama.models(folder, search.importance):
            student = load(resolve(str(quantized))).model
            accelerate(student)
            theirs = {"nbytes": nbytes, "bpw": 8 * nbytes / parameters, "types": types}
            judge_model(f"llama.cpp {kind}", student, theirs)
            sizes[kind] = f"{theirs['bpw']:.6f}bpw"
            at = [*at, kind]
    for label in at:
        size = Size.parse(sizes.get(label, f"{label}bpw"))
        with timed(f"decision at {label} bpw"):
            plan, rounding = decide(
                source, propose(scores, size, seed=seed), search, selecting, fit, progress=False
            )
        found = judge(f"optiq, {label} bpw", plan, rounding)
        found["selection"] = plan.selection and asdict(plan.selection)
    for label, other in also.items():
        judge_stored(label, load(resolve(other), allow_quantized=True).model)
    return {"seed": seed, "model": name, "seconds": times, "results": results}


def _weights(source: Source) -> Iterator[tuple[Any, mx.array]]:
    model = load(source).model
    leaves = dict(model.named_modules())
    for m in quantizable(model):
        yield m, leaves[m.path].weight


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=6, help="of each file in the folder")
    parser.add_argument("--sizes", nargs="*", default=["4.5", "5.0", "6.0", "mixed_4_6"])
    parser.add_argument("--also", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--llama-quantize", type=Path, metavar="PROGRAM")
    parser.add_argument("--gguf-types", nargs="+", default=gguf.TYPES, metavar="TYPE")
    parser.add_argument("-o", "--out", type=Path, default=Path("quality.json"))
    args = parser.parse_args()
    source = resolve(args.model)
    runs = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            reference = Path(folder) / "reference"
            dithered(source, reference, seed)
            also = dict(pair.split("=", 1) for pair in args.also)
            llama = args.llama_quantize and gguf.Quantizer(
                args.llama_quantize, Path(args.model), args.gguf_types
            )
            runs.append(
                run(source.name, reference, args.text, args.windows, seed, args.sizes, also, llama)
            )
        args.out.write_text(
            json.dumps({"machine": machine(), "versions": versions(), "runs": runs}, indent=1)
        )


if __name__ == "__main__":
    main()
