"""What mlx-lm itself makes of a source: uniform widths and its mixed recipes, by its own code."""

from __future__ import annotations

import contextlib
import io

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import leaf_modules
from ..base.text import one_line
from ..errors import UsageError
from ..formats import UNIFORM4
from ..sources import LoadedModel
from ..sources.folder import mlx_lm_version

# "uniform 3..8": the affine widths of stock mlx-lm but 2, which no model survives.
UNIFORM_WIDTHS = (3, 4, 5, 6, 8)


def recipes() -> tuple[str, ...]:
    """The names of mlx-lm's mixed recipes, such as "mixed_4_6"."""
    from mlx_lm.convert import QUANT_RECIPES

    return tuple(QUANT_RECIPES)


def quantize(loaded: LoadedModel, *, bits: int = 4, recipe: str | None = None) -> nn.Module:
    """What `mlx_lm.convert -q` makes of `loaded`: `bits` in groups of 64, or one of `recipes()`.

    Takes over `loaded.model`, whose weights should still be lazy: each is rounded and dropped in
    its turn. Raises UsageError where the recipe does not know the model's layers.
    """
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    model, group = loaded.model, UNIFORM4.group_size
    try:
        predicate = mixed_quant_predicate_builder(recipe, model, group) if recipe else None
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            quantize_model(model, loaded.config, group, bits, quant_predicate=predicate)
    except Exception as error:  # mlx-lm's own, of many kinds
        raise UsageError(
            f"mlx-lm {mlx_lm_version()} cannot apply {recipe or f'{bits} bits'} to this model: "
            f"{one_line(error)}"
        ) from error
    for layer in leaf_modules(model).values():
        mx.eval(layer.parameters())
    return model
