"""What mlx-lm would make, against the folders that `mlx_lm.convert` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import convert as stock_convert

from optiq.errors import UsageError
from optiq.models import stock
from optiq.models.size import model_size
from optiq.sources import load, resolve
from tests.tiny import tiny_folder

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"dtype": "bfloat16", "num_hidden_layers": 8, "tie_word_embeddings": False}),
    "qwen3_moe": ("qwen3_moe", {}),  # its model file insists on 8 bits for routers
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", [3, "mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_it_is_what_mlx_lm_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, how: int | str
) -> None:
    name, config = MODELS[kind]
    folder = tiny_folder(tmp_path, name, **config)
    out = tmp_path / "stock"
    options: dict[str, Any] = {"q_bits": how}
    if isinstance(how, str):
        options = {"quant_predicate": how, "q_group_size": 64}
    stock_convert(str(folder), str(out), quantize=True, **options)
    capsys.readouterr()

    given = {"bits": how} if isinstance(how, int) else {"recipe": how}
    model = stock.quantize(load(resolve(str(folder))), **given)
    assert capsys.readouterr().out == ""  # the result of --json is all that may be there
    ours: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    theirs = mx.load(str(out / "model.safetensors"))
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype
        assert mx.array_equal(ours[key], array), key
    assert model_size(model).nbytes == sum(a.nbytes for a in theirs.values())
    config = json.loads((out / "config.json").read_text())["quantization"]
    quantized = [(path, m) for path, m in model.named_modules() if hasattr(m, "bits")]
    assert len(quantized) > 10
    for path, module in quantized:
        expected = config.get(path, config)
        assert (module.bits, module.group_size) == (expected["bits"], expected["group_size"])


def test_the_recipes_are_those_of_mlx_lm() -> None:
    assert set(stock.recipes()) >= {"mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"}


def test_a_recipe_that_does_not_apply_is_named(tmp_path: Path) -> None:
    loaded = load(resolve(str(tiny_folder(tmp_path))))
    with pytest.raises(UsageError, match=r"cannot apply mixed_9_9 to this model: Invalid quant"):
        stock.quantize(loaded, recipe="mixed_9_9")
