"""Every model file of mlx-lm converts and runs in stock and in `optiq.load`, or is refused at once.

So do the other jobs. `make families` runs them all and writes docs/families.md of what happened
(conftest.py); some run with every `make test`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache

import optiq
from optiq import ops
from optiq.errors import OptiqError
from tests.evals import questions
from tests.families.conftest import COLUMNS
from tests.families.table import FAMILIES, UNTRIED, config_of, family_folder

FAST = ("afm7", "deepseek_v3", "gemma3n", "iquestloopcoder", "llama", "mamba2", "rwkv7")
PROMPT = mx.array([[3 + i * 37 % 350 for i in range(24)]])
PREFILL = 13  # tokens; the rest are decoded one by one, and turn a window of 8 over
WORKS = "yes"
TEXT = {"tokens": 320, "held_out_tokens": 320, "progress": False}
# Nats, of products with activations of 16 bits; at the median token, as a router may pick another
# expert where two are about equal.
LEAST_KL = 1e-5


@pytest.mark.parametrize("name", FAST)
def test_some(name: str, tmp_path: Path) -> None:
    assert converted(name, tmp_path) == WORKS


@pytest.mark.families
@pytest.mark.parametrize("name", sorted(FAMILIES, key=str.lower))
def test_all(
    name: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs: dict[str, Callable[[Path], str]] = {
        "converts": lambda top: converted(name, top),
        "bfloat16": lambda top: converted(name, top, "bfloat16"),
        "--refine": lambda top: converted(name, top, refine_tokens=320),
        "kv": lambda top: kept(name, top),
        "eval": lambda top: evaluated(name, top, monkeypatch),
    }
    assert (*jobs,) == COLUMNS
    record_property("family", name)
    found = {}
    for column, job in jobs.items():
        (top := tmp_path / column).mkdir()
        try:
            found[column] = job(top)
        except Exception as error:  # all columns are wanted
            found[column] = f"fails: {type(error).__name__}: {error}"
        record_property(column, found[column])
    assert not any(outcome.startswith("fails") for outcome in found.values()), found


def test_every_model_file_is_in_the_table() -> None:
    """Or is known not to be."""
    files = Path(mlx_lm.__path__[0], "models").glob("*.py")
    models = {f.stem for f in files if "\nclass Model(" in f.read_text(encoding="utf-8")}
    configs = [config_of(name) for name in FAMILIES]
    tried = {c["model_type"] for c in configs}
    tried |= {c["text_config"]["model_type"] for c in configs if "text_config" in c}
    assert models - tried <= {*UNTRIED, "bailing_moe_v3"}  # a model_type of two files


def converted(name: str, top: Path, dtype: str = "float32", refine_tokens: int = 0) -> str:
    """WORKS, or why optiq refuses it before it measures anything."""
    source, out = family_folder(top, name, dtype), top / "out"
    if refusal := refused(lambda: optiq.convert(source, out, refine_tokens=refine_tokens, **TEXT)):
        assert [path.name for path in top.iterdir()] == [name]  # nothing was measured
        return refusal.replace(str(source), name)
    stock, ours = (load(str(out))[0] for load in (mlx_lm.load, optiq.load))
    stock.set_dtype(mx.float32)  # its products in bfloat16 are 0.05 nats from their own in float32
    assert mx.median(ops.kl_from_logits(logits(stock), logits(ours))[0]).item() < LEAST_KL
    return WORKS


def kept(name: str, top: Path) -> str:
    """The same of formats for keys and values."""
    source, out = family_folder(top, name), top / "kv.json"
    if refusal := refused(
        lambda: optiq.kv_plan(source, out, samples=1, context=192, progress=False)
    ):
        assert [path.name for path in top.iterdir()] == [name]
        return refusal.replace(str(source), name)
    logits(optiq.load(str(source), kv=out)[0])
    return WORKS


def evaluated(name: str, top: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same of some questions: four answers each, in batches, after a beginning they share."""
    source, out = family_folder(top, name), top / "results"
    data = questions.write(top / "data", monkeypatch)
    options = {"tasks": ("mmlu",), "data": data, "limit": 4, "progress": False}
    if refusal := refused(lambda: optiq.evaluate(source, out, **options)):
        assert not out.exists()
        return refusal.replace(str(source), name)
    return WORKS


def refused(job: Callable[[], object]) -> str:
    """Why optiq refuses the job, in one line, if it does."""
    try:
        job()
    except OptiqError as error:
        return str(error).partition("\n")[0]
    return ""


def logits(model: nn.Module) -> mx.array:
    """Of PROMPT as a prefill and single steps."""
    cache = make_prompt_cache(model)
    parts = [model(PROMPT[:, :PREFILL], cache=cache)]
    parts += [model(PROMPT[:, i : i + 1], cache=cache) for i in range(PREFILL, PROMPT.shape[1])]
    found = mx.concatenate(parts, axis=1)[0].astype(mx.float32)
    assert mx.all(found < mx.inf)  # a masked word is at minus infinity
    return found
