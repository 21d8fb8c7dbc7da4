"""What was measured, as plan.json and frontier.json have it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optiq.quality.divergence import summary
from optiq.quality.results import Divergence, Measured

TABLE = [np.random.default_rng(i).random((3, 50)) for i in range(3)]
DATA = summary(TABLE, "9f2c").to_json()


def test_all_of_a_summary_is_kept() -> None:
    assert Divergence.from_json(DATA).to_json() == DATA
    sized = DATA | {"nbytes": 1000, "bpw": 4.5}
    found = Measured.from_json(sized)
    assert found.to_json() == sized
    assert found == Measured.of(Divergence.from_json(DATA), 1000, 4.5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d["kl"].pop("p999"),
        lambda d: d["kl"].update(p42=1.0),
        lambda d: d.update(top1=None),
        lambda d: d.pop("ppl_ratio"),
    ],
)
def test_a_missing_metric_is_refused(damage: Callable[[dict[str, Any]], Any]) -> None:
    data = copy.deepcopy(DATA)
    damage(data)
    with pytest.raises((KeyError, TypeError)):
        Divergence.from_json(data)
