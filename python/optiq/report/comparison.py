"""The page of `optiq compare`: models against a reference, as a chart and as a table."""

from __future__ import annotations

from ..quality.compare import Comparison
from ..quality.results import Measured
from .curve import Curve, Mark
from .document import document, drawings, facts, known, pairs, table
from .text import count, data, data_se, esc, number, size

KICKER = "optiq compare"
MARK = f'<meta name="generator" content="{KICKER}">'  # by which we know our own file again

_HEAD = ("model", "size", "bits per weight", "KL ± se", "KL 99 %", "same top token, % ± se",
         "perplexity ratio")  # fmt: skip


def comparison_page(found: Comparison) -> str:
    """The page about a comparison; `machine` and `versions` come from where it was made."""
    marks = [
        Mark(name, "plan", m.nbytes, m.kl.mean, m.kl.se, True) for name, m in found.models.items()
    ]
    first = next(iter(found.models.values()))
    rows = [
        ("Reference", esc(found.reference)),
        ("Text", esc(found.text)),
        ("Tokens", f"{count(first.tokens)} in {first.sequences} sequences"),
        ("Text sha256", known(first.text_sha256)),
        ("Command", known(found.command or None)),
        ("Versions", pairs(found.versions)),
        ("Machine", pairs(found.machine)),
    ]
    return document(
        found.reference,
        KICKER,
        f"""<p>{_verdict(found)}</p>
</header>
<section>
<h2>KL against size</h2>
<p>How far each model is from the reference, with one standard error up and down. Lower and further
left is better.</p>
<figure>{drawings(Curve([], marks))}</figure>
</section>
<section>
<h2>Every model</h2>
{table(_HEAD, [_row(name, m) for name, m in found.models.items()])}
<p>KL in nats per token, to the reference. ± is one standard error of the mean, with the tokens of
one sequence not taken as independent.</p>
</section>
<section>
<h2>How the numbers were made</h2>
{facts(rows)}
</section>""",
    )


def _verdict(found: Comparison) -> str:
    name, best = min(found.models.items(), key=lambda item: item[1].kl.mean)
    return (
        f"Nearest to the reference is <bdi>{esc(name)}</bdi>, with a KL of {data_se(best.kl)} nats "
        f"per token in {data(best.nbytes, size(best.nbytes))}."
    )


def _row(name: str, m: Measured) -> list[str]:
    return [
        esc(name),
        data(m.nbytes, size(m.nbytes)),
        data(m.bpw),
        data_se(m.kl),
        data(m.kl.p99),
        data_se(m.top1, scale=100),
        data(m.ppl_ratio, number(m.ppl_ratio, 4)),
    ]
