"""The averages that a run logs."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from alignlab.training.progress import Averages, peak_memory_mb


def test_averages_by_hand():
    """Scalars by share; one value a pair, over the pairs that have one; the largest of names ending in _max;
    a scalar's nan shows."""
    log, nan = Averages(), float("nan")
    log.add(
        0.75, {"loss": torch.tensor(1.0), "late": torch.tensor([1.0, nan, 0.0]), "gap_max": torch.tensor(2.0)}
    )
    log.add(
        0.25,
        {
            "loss": torch.tensor(5.0),
            "late": torch.tensor([1.0]),
            "gap_max": torch.tensor(1.0),
            "bad": torch.tensor(nan),
        },
    )
    found = log.means()
    assert found["loss"] == pytest.approx(2.0) and found["gap_max"] == 2.0 and math.isnan(found["bad"])
    assert found["late"] == pytest.approx(2 / 3)  # 4 pairs in all, 3 of them late, each with the same weight


def test_peak_memory_is_the_process_own():
    """A process that another one starts does not count what that one had; and the peak stays when the memory
    is given back."""
    ballast = np.ones(2**24)  # 128 MiB
    mine = peak_memory_mb(torch.device("cpu"))
    assert mine > ballast.nbytes / 2**20
    code = (
        "import torch; from alignlab.training.progress import peak_memory_mb; "
        "print(peak_memory_mb(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50 < float(done.stdout) < mine - 100
    del ballast
    assert peak_memory_mb(torch.device("cpu")) > mine - 1  # the kernel counts pages in batches
