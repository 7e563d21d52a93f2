"""The averages that a run logs."""

import math

import pytest
import torch

from alignlab.journal import Averages


def test_averages_by_hand():
    """Scalars by share; one value a pair, over the pairs that have one; the largest of names ending in _max; a scalar's nan shows."""
    log, nan = Averages(), float("nan")
    log.add(0.75, {"loss": torch.tensor(1.0), "late": torch.tensor([1.0, nan, 0.0]), "gap_max": torch.tensor(2.0)})
    log.add(
        0.25, {"loss": torch.tensor(5.0), "late": torch.tensor([1.0]), "gap_max": torch.tensor(1.0), "bad": torch.tensor(nan)}
    )
    found = log.means()
    assert found["loss"] == pytest.approx(2.0) and found["gap_max"] == 2.0 and math.isnan(found["bad"])
    assert found["late"] == pytest.approx(2 / 3)  # 4 pairs in all, 3 of them late, each with the same weight
