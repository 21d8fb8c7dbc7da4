"""The layers of a model, by path."""

from __future__ import annotations

import mlx.nn as nn
from mlx.utils import tree_flatten


def leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules without modules in them, by path, in definition order."""
    return dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
