"""The builder of the embedded world: its training loop goes on exactly where it was stopped."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from emoji_world.fit import fit


class Stopped(Exception):
    pass


def trained(folder: Path, *, stop_at: int | None = None) -> nn.Module:
    """A line through noisy points, drawn from both generators, in 12 steps; a checkpoint every 4."""
    torch.manual_seed(0)
    model, rng, calls = nn.Linear(3, 1), np.random.default_rng(0), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stopped
        x = torch.from_numpy(rng.normal(size=(8, 3))).float()
        return (model(x) - x.sum(1, keepdim=True) + torch.randn(8, 1)).square().mean()

    fit("line", model, loss, steps=12, lr=0.05, folder=folder, warmup=2, save_every=4, bf16=False, rng=rng)
    return model


def test_a_stopped_stage_goes_on_with_the_draws_that_were_next(tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    straight = trained(tmp_path / "once")
    with pytest.raises(Stopped):
        trained(tmp_path / "twice", stop_at=7)
    resumed = trained(tmp_path / "twice")
    assert torch.equal(resumed.weight, straight.weight) and torch.equal(resumed.bias, straight.bias)


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    done = trained(tmp_path)
    assert torch.equal(trained(tmp_path, stop_at=1).weight, done.weight)
