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
from math import isfinite

from huggingface_hub import ModelCard

from ..base.command import without_folders
from ..evals.comparison import Compared
from ..planning.plan import Plan
from ..quality.results import Distribution, Divergence
from ..quality.statistics import Estimate, Quantiles
from ..report.text import MINUS, count, number, plus_minus, size
from .base_model import BaseModel
from .facts import NOT_MEASURED, Distance, Facts, MetricScore, RecordFile, by_format
from .front_matter import DATASETS, front_matter
from .markdown import code, inline, pairs, plain, table

TOO_FEW = "too few to tell"

_MARK = re.compile(r"\n<!-- optiq card ([0-9a-f]{64}) -->\n\Z")


def render(facts: Facts) -> str:
    """The card; its last line tells later changes of it."""
    sections = [
        _introduction(facts),
        _quality(facts),
        _divergence(facts),
        _quantization(facts.plan),
        _use(facts),
        _provenance(facts),
        _licence(facts.base),
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


def _introduction(facts: Facts) -> str:
    plan, base = facts.plan, facts.base
    origin = inline(base.name)
    if base.hub_id:
        origin = f"[{origin}](https://huggingface.co/{base.hub_id})"
    version = inline(plan.versions.get("optiq", "unknown"))
    differs = "".join(
        f"\n\n**Not as the original:** mlx-lm runs {inline(base.name)} {inline(departure)}."
        for departure in plan.model.departures
    )
    return (
        f"# {inline(facts.name)}\n\n"
        f"{origin} in **{plan.bpw:.2f} bits per weight** ({size(plan.nbytes)}), quantized "
        f"for MLX with optiq version **{version}**: how much each layer suffers from fewer bits "
        "was measured, and each has the width it deserves within an exact budget of bytes. "
        f"It is a plain mlx-lm model and needs nothing else to run.{differs}"
    )


def _quality(facts: Facts) -> str:
    stock = facts.uniform
    head = ["", "items", "score"]
    if stock:
        head += [stock.label, "difference", "verdict"]
    scores = [score for score in facts.scores if score.metric.task in DATASETS]
    rows = [*map(_score, scores), _capability(facts)]
    if stock:
        whole = None if any(score.too_few for score in scores) else facts.against_uniform
        compared = [*(None if score.too_few else score.against for score in scores), whole]
        rows = [row + _against(of) for row, of in zip(rows, compared, strict=True)]
    notes = [
        "Percent, with intervals of 95 % (clustered by subject for MMLU). Capability Score: mean "
        "of the five benchmarks in bold."
    ]
    if stock:
        notes.append(
            f"Stock {stock.label}, has {count(stock.nbytes)} bytes of tensors, this model "
            f"{count(facts.plan.nbytes)}. Differences are paired by item; a verdict holds "
            "after Holm's correction over the benchmarks and KL."
        )
    if any(score.limit for score in facts.scores):
        notes.append(
            "**Quick look**: only the first items of a benchmark were asked; such figures "
            "do not compare with any others."
        )
    body = table([head, *rows], words=1 if stock else 0)
    return f"## Benchmarks\n\n{body}\n\n{' '.join(notes)}"


def _score(score: MetricScore) -> list[str]:
    name = f"**{score.metric.label}**" if score.metric.main else score.metric.label
    if score.estimate is None:
        return [name, "", score.state]
    label = " (quick look)" if score.limit else ""
    shown = TOO_FEW if score.too_few else _percent(score.estimate)
    return [name + label, count(score.estimate.n), shown]


def _capability(facts: Facts) -> list[str]:
    five = [s for s in facts.scores if s.metric.task in DATASETS and s.metric.main]
    quick = " (quick look)" if any(score.limit for score in five) else ""
    shown = _percent(facts.capability) if facts.capability else "not all measured"
    if facts.capability and any(score.too_few for score in five):
        shown = TOO_FEW
    return [f"**Capability Score**{quick}", "", shown]


def _against(row: Compared | None) -> list[str]:
    """The score of the uniform build, the difference and the verdict."""
    if row is None:
        return [NOT_MEASURED, "", ""]
    paired = row.paired
    change = _points(paired.difference)
    if isfinite(paired.low):
        change += f" ({_points(paired.low)} to {_points(paired.high)})"
    return [_percent(row.first), change, row.verdict or ""]


def _points(change: float) -> str:
    """A difference of shares; what rounds to nothing has no sign."""
    return "0.0" if abs(change) < 0.0005 else f"{100 * change:+.1f}".replace("-", MINUS)


def _percent(estimate: Estimate) -> str:
    shown = f"{100 * estimate.value:.1f}"
    if not isfinite(estimate.low):
        return shown
    return f"{shown} ({100 * estimate.low:.1f}\N{EN DASH}{100 * estimate.high:.1f})"


def _divergence(facts: Facts) -> str:
    """KL to the base model: as convert measured it, stock beside it, and as eval did."""
    stock = facts.plan.uniform4
    columns = ["mean", "median", "95 %", "99 %", "99.9 %", "max"]
    rows = [
        ["", *columns, "same top token", "tokens"],
        _kl_row("this model", facts.plan.measured),
        _kl_row("stock uniform 4-bit", stock.measured if stock else None),
    ]
    if facts.kl:
        rows.append(_evaluated_row(facts.kl))
    text = (
        "KL divergence of the next-token distribution from that of the base model, in nats per "
        "token over the whole vocabulary, on text that nothing was fitted to. ± is one standard "
        "error, with documents as clusters."
    )
    if stock:
        text += f" Stock uniform 4-bit would take {count(stock.nbytes)} bytes of tensors."
    main = next(s for s in facts.scores if s.metric.task == "kl" and s.metric.main)
    if main.against and facts.uniform:
        paired = main.against.paired
        change = number(paired.difference)
        if isfinite(paired.low):
            change += f" ({number(paired.low)} to {number(paired.high)})"
        text += (
            f" As evaluated, the KL less that of stock {facts.uniform.label}, is {change}: "
            f"{main.against.verdict}."
        )
    return f"## Distance from the base model\n\n{table(rows)}\n\n{text}"


def _kl_row(name: str, measured: Divergence | None) -> list[str]:
    if measured is None:
        return [name, NOT_MEASURED, *[""] * 7]
    kl, top1 = measured.kl, measured.top1
    agree = plus_minus(100 * top1.mean, top1.se and 100 * top1.se)
    return [name, plus_minus(kl.mean, kl.se), *_tail(kl), f"{agree} %", count(measured.tokens)]


def _evaluated_row(found: Distance) -> list[str]:
    label = "this model, as evaluated" + ("" if found.to_base else " against another model")
    label += " (quick look)" if found.limit else ""
    kl = found.kl
    mean = number(kl.value)
    if isfinite(kl.low):
        mean += f" ({number(kl.low)}\N{EN DASH}{number(kl.high)})"
    return [label, mean, *_tail(found.tail), f"{_percent(found.top1)} %", count(kl.n)]


def _tail(kl: Distribution | Quantiles) -> list[str]:
    return [number(x) for x in (kl.median, kl.p95, kl.p99, kl.p999, kl.max)]


def _quantization(plan: Plan) -> str:
    rows = [["format", "modules", "weights", "bytes", "share", "of what"]]
    for total in by_format(plan):
        share = f"{100 * total.nbytes / plan.nbytes:.1f} %"
        figures = [str(total.modules), count(total.weights), count(total.nbytes), share]
        rows.append([f"`{total.format}`", *figures, ", ".join(total.roles)])
    fixed = plan.model.fixed_bytes
    share = f"{100 * fixed / plan.nbytes:.1f} %"
    rows.append(["not quantizable", "", "", count(fixed), share, "norms, biases and the like"])
    text = (
        f"`4g64` is 4 bits in groups of 64. In all {count(plan.nbytes)} bytes of tensors, "
        f"{plan.bpw:.3f} bits per weight, scales, biases, embeddings and norms included; the "
        f"budget was {count(plan.budget)} bytes ({inline(plan.asked)})."
    )
    if plan.predicted_kl is not None:
        text += (
            f" The sum of the scores predicts a KL of {number(plan.predicted_kl)} nats per token."
        )
    if plan.model.tower_bytes:
        text += (
            f" Beside them lie {count(plan.model.tower_bytes)} bytes of vision and audio weights: "
            "mlx-lm loads the language model, mlx-vlm all."
        )
    text += " `optiq/plan.json` has the format, bytes and score of every module."
    return f"## Quantization\n\n{table(rows, words=1)}\n\n{text}"


def _use(facts: Facts) -> str:
    name = plain(facts.repo or ".")
    quoted, literal = shlex.quote(name), json.dumps(name)
    where = "" if facts.repo else "In the folder of the model:\n\n"
    return f"""## Use with mlx-lm

{where}```bash
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


def _provenance(facts: Facts) -> str:
    plan = facts.plan
    machine = {key: plan.machine.get(key) for key in ("system", "arch", "cpu")}
    rows = [
        ("weights", code(facts.fingerprint)),
        ("made from", f"{inline(facts.base.name)}, {code(plan.model.fingerprint)}"),
        ("command", code(_without_folders(plan.command))),
        ("versions", pairs(plan.versions)),
        ("machine", pairs(machine)),
    ]
    if plan.calibration:
        rows.append(("calibration text", _text(plan.calibration.sha256, plan.calibration.tokens)))
    if plan.selection:
        rows.append(("selection text", _text(plan.selection.text_sha256, plan.selection.tokens)))
    if plan.measured:
        rows.append(("held-out text", _text(plan.measured.text_sha256, plan.measured.tokens)))
    rounding = plan.selection.rounding if plan.selection else "not recorded"
    rows += [("rounding", inline(rounding)), ("seed", str(plan.seed))]
    rows += [(f"{task} records", _run(run)) for task, run in facts.runs.items()]
    if facts.uniform:
        rows.append(("uniform build", code(facts.uniform.fingerprint)))
    return (
        "## How the numbers were made\n\n"
        + table([["", ""], *([key, value] for key, value in rows if value)], words=1)
        + "\n\nHashes are sha256: of config.json, the weight files' headers and samples of their "
        "values, of token streams, of questions and of record files. The records are in "
        "`optiq/evals`, one line for each item with its prompt's hash, the answer and the verdict."
    )


def _run(run: RecordFile) -> str:
    header = run.header
    parts = [
        inline(header.protocol),
        f"{count(header.items)} items" + (" (quick look)" if header.limit else ""),
        f"data {code(header.data_sha256[:12])}",
        f"file {code(run.sha256[:12])}",
        pairs(header.versions),
    ]
    return "; ".join(parts)


def _licence(base: BaseModel) -> str:
    if base.license is None:
        text = "Not recorded. That of the base model applies."
    else:
        name, link = base.license_name or base.license, base.license_link
        shown = f"[{inline(name)}]({link})" if _is_url(link) else inline(name)
        text = f"{shown}, as the base model."
    return f"## Licence\n\n{text}"


def _is_url(text: object) -> bool:
    return isinstance(text, str) and re.fullmatch(r"https?://[^\s<>()]+", text) is not None


def _text(sha256: str | None, tokens: int | None) -> str:
    return f"{count(tokens or 0)} tokens, {code(sha256)}" if sha256 else ""


def _without_folders(command: str) -> str:
    """The command, also of a plan of an earlier version, without what is about somebody's disk."""
    try:
        words = shlex.split(command)
    except ValueError:
        return ""
    return shlex.join(without_folders(words))
