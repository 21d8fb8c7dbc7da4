"""Every model file of mlx-lm converts and runs in stock and in `optiq.load`, or is refused at once.

`make families` runs them all and writes docs/families.md of what happened (conftest.py); some run
with every `make test`.
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
from tests.families.table import FAMILIES, UNTRIED, config_of, family_folder

FAST = ("afm7", "deepseek_v3", "gemma3n", "llama", "mamba2", "rwkv7")
PROMPT = mx.array([[3 + i * 37 % 350 for i in range(24)]])
PREFILL = 13  # tokens; the rest are decoded one by one, and turn a window of 8 over
CONVERTS = "converts"
# Nats, of products with activations of 16 bits; at the median token, as a router may pick another
# expert where two are about equal.
LEAST_KL = 1e-5


@pytest.mark.parametrize("name", FAST)
def test_some(name: str, tmp_path: Path) -> None:
    assert outcome(name, tmp_path) == CONVERTS


@pytest.mark.families
@pytest.mark.parametrize("name", sorted(FAMILIES, key=str.lower))
def test_all(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("family", name)
    record_property("outcome", outcome(name, tmp_path))


def test_every_model_file_is_in_the_table() -> None:
    """Or is known not to be."""
    files = Path(mlx_lm.__path__[0], "models").glob("*.py")
    models = {f.stem for f in files if "\nclass Model(" in f.read_text(encoding="utf-8")}
    configs = [config_of(name) for name in FAMILIES]
    tried = {c["model_type"] for c in configs}
    tried |= {c["text_config"]["model_type"] for c in configs if "text_config" in c}
    assert models - tried <= {*UNTRIED, "bailing_moe_v3"}  # a model_type of two files


def outcome(name: str, tmp_path: Path) -> str:
    """CONVERTS, or why optiq refuses it before it measures anything."""
    source, out = family_folder(tmp_path, name), tmp_path / "out"
    try:
        optiq.convert(source, out, tokens=320, held_out_tokens=320, progress=False)
    except OptiqError as error:
        assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing was measured
        return str(error).replace(str(source), name)
    stock, ours = (logits(load(str(out))[0]) for load in (mlx_lm.load, optiq.load))
    assert mx.median(ops.kl_from_logits(stock, ours)[0]).item() < LEAST_KL
    return CONVERTS


def logits(model: nn.Module) -> mx.array:
    """Of PROMPT as a prefill and single steps."""
    cache = make_prompt_cache(model)
    parts = [model(PROMPT[:, :PREFILL], cache=cache)]
    parts += [model(PROMPT[:, i : i + 1], cache=cache) for i in range(PREFILL, PROMPT.shape[1])]
    found = mx.concatenate(parts, axis=1)[0].astype(mx.float32)
    assert mx.all(mx.isfinite(found))
    return found
