"""A model card in Markdown with front matter, in the style of the mlx-community's.

The same rules as for every page: nothing is shown that is not in the facts, and what was not
measured says so. Figures of a quick look (--limit) are labelled and kept out of the front matter,
from where the hub would list them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCard

from ..report.text import MINUS, count, number, plus_minus, size
from .front_matter import DATASETS, front_matter
from .markdown import code, inline, pairs, plain, table

Json = dict[str, Any]

_MARK = re.compile(r"\n<!-- optiq card ([0-9a-f]{64}) -->\n\Z")
MISSING = "not measured"


def render(facts: Json) -> str:
    """The card for what `optiq.card.gather` returns; its last line tells later changes of it."""
    sections = [
        _introduction(facts),
        _quality(facts),
        _divergence(facts),
        _quantization(facts["plan"]),
        _use(facts["name"]),
        _provenance(facts),
        _licence(facts["base"]),
    ]
    card = ModelCard(f"---\n{front_matter(facts).to_yaml()}\n---\n\n" + "\n\n".join(sections))
    text = str(card)
    return f"{text}\n\n<!-- optiq card {_digest(text)} -->\n"


def is_unchanged(text: str) -> bool:
    """Whether `text` is a card of `render`, as it was written."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start() - 1])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _introduction(facts: Json) -> str:
    plan, base = facts["plan"], facts["base"]
    origin = inline(base["name"])
    if base["hub_id"]:
        origin = f"[{origin}](https://huggingface.co/{base['hub_id']})"
    version = inline(plan["versions"].get("optiq", "unknown"))
    return (
        f"# {inline(facts['name'])}\n\n"
        f"{origin} in **{plan['bpw']:.2f} bits per weight** ({size(plan['nbytes'])}), quantized "
        f"for MLX with optiq version **{version}**: how much each layer suffers from fewer bits "
        "was measured, and each has the width it deserves within an exact budget of bytes. "
        "It is a plain mlx-lm model and needs nothing else to run."
    )


def _quality(facts: Json) -> str:
    stock = facts["uniform"]
    head = ["", "items", "score"]
    if stock:
        head += [stock["label"], "difference", "verdict"]
    rows = [_score(row, stock) for row in facts["metrics"] if row["task"] in DATASETS]
    rows.append(_capability(facts, stock))
    notes = [
        "Percent, with intervals of 95 % (clustered by subject for MMLU). Capability Score: mean "
        "of the five benchmarks in bold."
    ]
    if stock:
        notes.append(
            f"Stock {stock['label']}, has {count(stock['nbytes'])} bytes of tensors, this model "
            f"{count(facts['plan']['nbytes'])}. Differences are paired by item; a verdict holds "
            "after Holm's correction over the benchmarks and KL."
        )
    if any(row["limit"] for row in facts["metrics"]):
        notes.append(
            "**Quick look**: only the first items of a benchmark were asked; such figures "
            "do not compare with any others."
        )
    body = table([head, *rows], words=1 if stock else 0)
    return f"## Benchmarks\n\n{body}\n\n{' '.join(notes)}"


def _score(row: Json, stock: Json | None) -> list[str]:
    name = f"**{row['label']}**" if row["main"] else row["label"]
    estimate, against = row["estimate"], row["against_uniform"]
    if estimate is None:
        cells = [name, "", row["state"]]
    else:
        label = " (quick look)" if row["limit"] else ""
        cells = [name + label, count(estimate["n"]), _percent(estimate)]
    if stock:
        cells += _against(against) if against else [MISSING, "", ""]
    return cells


def _against(row: Json) -> list[str]:
    paired = row["paired"]
    change = _points(paired["difference"])
    if paired["low"] is not None:
        change += f" ({_points(paired['low'])} to {_points(paired['high'])})"
    return [_percent(row["first"]), change, row["verdict"] or ""]


def _points(change: float) -> str:
    """A difference of shares; what rounds to nothing has no sign."""
    return "0.0" if abs(change) < 0.0005 else f"{100 * change:+.1f}".replace("-", MINUS)


def _capability(facts: Json, stock: Json | None) -> list[str]:
    against = facts["against_uniform"]
    five = [row for row in facts["metrics"] if row["task"] in DATASETS and row["main"]]
    name = "**Capability Score**"
    if any(row["limit"] for row in five):
        name += " (quick look)"
    value = _percent(facts["capability"]) if facts["capability"] else "not all measured"
    cells = [name, "", value]
    if stock:
        cells += _against(against) if against else [MISSING, "", ""]
    return cells


def _percent(estimate: Json) -> str:
    shown = f"{100 * estimate['value']:.1f}"
    if estimate["low"] is None:
        return shown
    return f"{shown} ({100 * estimate['low']:.1f}\N{EN DASH}{100 * estimate['high']:.1f})"


def _divergence(facts: Json) -> str:
    """KL to the base model: as convert measured it, stock beside it, and as eval did."""
    plan, run = facts["plan"], facts["kl"]
    columns = ["mean", "median", "95 %", "99 %", "99.9 %", "max"]
    rows = [["", *columns, "same top token", "tokens"]]
    for name, measured in (
        ("this model", plan["measured"]),
        ("stock uniform 4-bit", plan["uniform4"].get("measured")),
    ):
        rows.append(_kl_row(name, measured) if measured else [name, MISSING, *[""] * 7])
    if run:
        label = "this model, as evaluated" + ("" if run["to_base"] else " against another model")
        label += " (quick look)" if run["limit"] else ""
        kl, top1 = run["kl"], run["top1"]
        mean = number(kl["value"])
        if kl["low"] is not None:
            mean += f" ({number(kl['low'])}\N{EN DASH}{number(kl['high'])})"
        rows.append([label, mean, *_tail(kl), f"{_percent(top1)} %", count(kl["n"])])
    text = (
        "KL divergence of the next-token distribution from that of the base model, in nats per "
        "token over the whole vocabulary, on text that nothing was fitted to. ± is one standard "
        "error, with documents as clusters."
    )
    nbytes = plan["uniform4"].get("nbytes")
    if nbytes:
        text += f" Stock uniform 4-bit would take {count(nbytes)} bytes of tensors."
    main = next(row for row in facts["metrics"] if row["task"] == "kl" and row["main"])
    if against := main["against_uniform"]:
        paired = against["paired"]
        change = number(paired["difference"])
        if paired["low"] is not None:
            change += f" ({number(paired['low'])} to {number(paired['high'])})"
        text += (
            f" As evaluated, the KL less that of stock {facts['uniform']['label']}, is {change}: "
            f"{against['verdict']}."
        )
    return f"## Distance from the base model\n\n{table(rows)}\n\n{text}"


def _kl_row(name: str, measured: Json) -> list[str]:
    kl, top1 = measured["kl"], measured["top1"]
    agree = plus_minus(100 * top1["mean"], top1["se"] and 100 * top1["se"])
    mean = plus_minus(kl["mean"], kl["se"])
    return [name, mean, *_tail(kl), f"{agree} %", count(measured["tokens"])]


def _tail(kl: Json) -> list[str]:
    return [number(kl[key]) for key in ("median", "p95", "p99", "p999", "max")]


def _quantization(plan: Json) -> str:
    rows = [["format", "modules", "weights", "bytes", "share", "of what"]]
    for row in plan["formats"]:
        share = f"{100 * row['nbytes'] / plan['nbytes']:.1f} %"
        figures = [str(row["modules"]), count(row["weights"]), count(row["nbytes"]), share]
        rows.append([f"`{row['format']}`", *figures, ", ".join(row["roles"])])
    fixed = plan["model"]["fixed_bytes"]
    share = f"{100 * fixed / plan['nbytes']:.1f} %"
    rows.append(["not quantizable", "", "", count(fixed), share, "norms, biases and the like"])
    budget, predicted = plan["budget"], plan["objective"]["predicted_kl"]
    text = (
        f"`4g64` is 4 bits in groups of 64. In all {count(plan['nbytes'])} bytes of tensors, "
        f"{plan['bpw']:.3f} bits per weight, scales, biases, embeddings and norms included; the "
        f"budget was {count(budget['bytes'])} bytes ({inline(budget['asked'])})."
    )
    if predicted is not None:
        text += f" The sum of the scores predicts a KL of {number(predicted)} nats per token."
    text += " `optiq/plan.json` has the format, bytes and score of every module."
    return f"## Quantization\n\n{table(rows, words=1)}\n\n{text}"


def _use(name: str) -> str:
    quoted, literal = shlex.quote(plain(name)), json.dumps(plain(name))
    return f"""## Use with mlx-lm

```bash
pip install mlx-lm
mlx_lm.generate --model {quoted} --prompt "hello"
```

```python
from mlx_lm import load, generate

model, tokenizer = load({literal})

prompt = "hello"

if tokenizer.chat_template is not None:
    messages = [{{"role": "user", "content": prompt}}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False,
    )

response = generate(model, tokenizer, prompt=prompt, verbose=True)
```

## Use with optiq

The same model on optiq's own kernels:

```bash
pip install optiq-mlx
optiq generate {quoted} -p "hello"
```"""


def _provenance(facts: Json) -> str:
    plan, calibration = facts["plan"], facts["plan"]["calibration"]
    measured, selection = plan["measured"] or {}, plan["selection"] or {}
    rows = [
        ("weights", code(facts["fingerprint"])),
        ("made from", f"{inline(facts['base']['name'])}, {code(plan['model']['fingerprint'])}"),
        ("command", code(_without_folders(plan["command"]))),
        ("versions", pairs(plan["versions"])),
        ("machine", pairs({k: plan["machine"].get(k) for k in ("system", "arch", "cpu")})),
        ("calibration text", _text(calibration.get("sha256"), calibration.get("tokens"))),
        ("selection text", _text(selection.get("text_sha256"), selection.get("tokens"))),
        ("held-out text", _text(measured.get("text_sha256"), measured.get("tokens"))),
        ("rounding", inline(selection.get("rounding") or "not recorded")),
        ("seed", str(plan["seed"])),
    ]
    rows += [(f"{task} records", _run(run)) for task, run in facts["runs"].items()]
    if facts["uniform"]:
        rows.append(("uniform build", code(facts["uniform"]["fingerprint"])))
    rows = [(key, value) for key, value in rows if value]
    return (
        "## How the numbers were made\n\n"
        + table([["", ""], *map(list, rows)], words=1)
        + "\n\nHashes are sha256: of config.json, the weight files' headers and samples of their "
        "values, of token streams, of questions and of record files. The records are in "
        "`optiq/evals`, one line for each item with its prompt's hash, the answer and the verdict."
    )


def _run(run: Json) -> str:
    parts = [
        inline(run["protocol"]),
        f"{count(run['items'])} items" + (" (quick look)" if run["limit"] else ""),
        f"data {code(run['data_sha256'][:12])}",
        f"file {code(run['file_sha256'][:12])}",
        pairs(run["versions"]),
    ]
    return "; ".join(parts)


def _licence(base: Json) -> str:
    if base["license"] is None:
        text = "Not recorded. That of the base model applies."
    else:
        name = base["license_name"] or base["license"]
        link = base["license_link"]
        shown = f"[{inline(name)}]({link})" if _is_url(link) else inline(name)
        text = f"{shown}, as the base model."
    return f"## Licence\n\n{text}"


def _is_url(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"https?://[^\s<>()]+", text) is not None


def _text(sha256: str | None, tokens: int | None) -> str:
    return f"{count(tokens or 0)} tokens, {code(sha256)}" if sha256 else ""


def _without_folders(command: str) -> str:
    """A command with the last part of every path: the rest is about somebody's disk."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    return shlex.join(PurePath(w).name if w.startswith(("/", "~", ".")) else w for w in words)
