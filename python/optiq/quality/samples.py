"""What scores are made of: values of items, checked, and summed by cluster. NumPy only."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import OptiqError

Floats = NDArray[np.float64]
Groups = Sequence[Hashable] | None  # the cluster of each item; None: every item is its own


def finite(values: ArrayLike) -> Floats:
    """The values as [items], at least one."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise OptiqError("a score needs a list of at least one finite number")
    return array


def right(values: ArrayLike) -> Floats:
    """Right or wrong answers as 1 and 0."""
    array = finite(values)
    if not np.isin(array, (0, 1)).all():
        raise OptiqError("an answer is right or wrong; score other numbers by their mean")
    return array


def change(first: Floats, second: Floats) -> Floats:
    """Second less first, for each item."""
    _check_paired(first, second)
    return second - first


def per_cluster(
    values: Floats, counts: ArrayLike | None = None, groups: Groups = None
) -> tuple[Floats, Floats]:
    """Sums of values and of counts (1 each by default) over the items of each cluster."""
    number = np.ones(len(values)) if counts is None else finite(counts)
    _check_paired(values, number)
    if (number <= 0).any():
        raise OptiqError("an item with a count of 0 has no mean; leave it out")
    if groups is None:
        return values, number
    if len(groups) != len(values):
        raise OptiqError(f"{len(values)} items have {len(groups)} groups; give each item one")
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    cluster = [numbers[group] for group in groups]
    sums, counted = (np.bincount(cluster, weights) for weights in (values, number))
    return sums.astype(np.float64), counted.astype(np.float64)


def _check_paired(first: Floats, second: Floats) -> None:
    if len(first) != len(second):
        raise OptiqError(f"{len(first)} and {len(second)} items cannot be paired")
