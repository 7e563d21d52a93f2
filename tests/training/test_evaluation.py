"""An evaluation is the same for every run: its own noise, no seed, no batch size."""

import json
from typing import Any

import pytest
import torch

from alignlab.engine.noise import NoiseKey
from alignlab.train import train
from alignlab.training.evaluation import measure_all
from alignlab.training.setup import Lab
from tests.running import configured, tiny


def test_noise_is_its_own(tiny_sd, tmp_path, monkeypatch) -> None:
    """Evaluations of runs with different seeds draw the same noise; training draws other noise in every seed
    and epoch, never theirs."""
    drawn: dict[str, set[bytes]] = {}
    normal = NoiseKey.normal

    def watched(self: NoiseKey, step: int, shape: Any, device: Any = "cpu") -> torch.Tensor:
        out = normal(self, step, shape, device)
        for row in out if len(shape) == 3 else ():
            drawn.setdefault(f"{label} {self.stream}", set()).add(row.numpy().tobytes())
        return out

    monkeypatch.setattr(NoiseKey, "normal", watched)
    base = {}
    for seed in (0, 1):
        label = f"seed {seed}:"
        train(
            configured(*tiny(tiny_sd, f"seed={seed}", "steps=2", "algo=ddpo", "reward=jpeg_compressibility")),
            tmp_path / str(seed),
        )
        base[seed] = json.loads((tmp_path / str(seed) / "summary.json").read_text())["base"]
    for stream in ("eval", "final", "drift"):
        assert drawn[f"seed 0: {stream}"] == drawn[f"seed 1: {stream}"]
    streams = [drawn[f"seed {seed}: train"] for seed in (0, 1)] + [
        drawn[f"seed 0: {s}"] for s in ("eval", "final", "drift")
    ]
    assert sum(map(len, streams)) == len(set().union(*streams))  # no draw in two of them
    assert (
        len(drawn["seed 0: train"]) == 2 * 4 * 4
    )  # epochs x samples x (x_T and 3 steps, one of them perhaps without noise)
    assert base[0] == base[1]  # the base model is the same, whatever the seed of its untrained adapters


def test_batch_size(tiny_sd) -> None:
    """One image at a time or all at once: images to 1e-5, numbers to 1e-5, and diversity is taken within
    prompts."""
    measured = {}
    for batch in (1, 5, 64):
        c = configured(*tiny(tiny_sd, f"evaluation.batch={batch}", "evaluation.final_images=3"))
        measured[batch] = measure_all(Lab.from_config(c), c)
    for batch in (1, 5):
        torch.testing.assert_close(measured[batch].images, measured[64].images, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            measured[batch].rewards["brightness"], measured[64].rewards["brightness"], rtol=0, atol=1e-5
        )
        assert measured[batch].lpips == pytest.approx(measured[64].lpips, rel=1e-4)
    lab, images = Lab.from_config(c), measured[64].images
    assert len(images) == 3 * 3
    naive = [
        float(lab.diversity.pairwise(images[k : k + 3])[i, j])
        for k in (0, 3, 6)
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert sum(measured[64].lpips) / 3 == pytest.approx(sum(naive) / len(naive), rel=1e-5)
