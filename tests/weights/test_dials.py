"""The dials of a tuned model, and the ways to load and look at one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import alignlab
from alignlab import sample
from alignlab.engine.rollout import rollout
from alignlab.engine.samplers import ddim
from alignlab.train import train
from alignlab.weights.dials import Annealed, scale_lora
from alignlab.weights.load import dialled, policy_of
from tests.conftest import key, tiny_policy
from tests.running import command_line, configured, tiny


@torch.no_grad()
def test_the_scale_interpolates(tiny_sd: str) -> None:
    """0 is the base model bit for bit, 1 the tuned one again, whatever was set in between; a half is
    neither."""
    policy = tiny_policy(tiny_sd)
    sampler, noise = ddim(policy.family.scheduler, steps=3, eta=0.0, guidance_scale=2.0), key(4)
    tuned = rollout(policy, sampler, noise).images
    with policy.reference():
        base = rollout(policy, sampler, noise).images
    images = {}
    for scale in (0.5, 0.0, 1.0):
        scale_lora(policy, scale)
        images[scale] = rollout(policy, sampler, noise).images
    assert torch.equal(images[0.0], base) and torch.equal(images[1.0], tuned)
    assert (images[0.5] - base).abs().max() > 0.01 and (images[0.5] - tuned).abs().max() > 0.01


@torch.no_grad()
def test_annealed_guidance(tiny_sd: str) -> None:
    """out_i = g tuned + (1 - g) base with g = (i/N)^power, branch by branch; inside reference() it is the
    base model; a power must be positive."""
    policy = tiny_policy(tiny_sd)
    sampler = ddim(policy.family.scheduler, steps=4, eta=0.0, guidance_scale=2.0)
    x, t = torch.randn(3, *policy.latent_shape), sampler.timesteps[[3, 2, 0]]
    cond = policy.encode(["a cat", "a dog", "two fish"])
    tuned = policy.branches(x, t, cond, 2.0)
    with policy.reference():
        base = policy.branches(x, t, cond, 2.0)
    annealed = Annealed(policy, sampler, 2.0)
    for row, g in enumerate((9 / 16, 0.25, 0.0)):
        mixed = g * tuned[:, row] + (1 - g) * base[:, row]
        torch.testing.assert_close(annealed.branches(x, t, cond, 2.0)[:, row], mixed)
    with annealed.reference():
        torch.testing.assert_close(annealed.branches(x, t, cond, 2.0), base)
    assert dialled(policy, sampler) is policy
    with pytest.raises(ValueError, match="must be positive"):
        Annealed(policy, sampler, 0.0)


@pytest.fixture(scope="module")
def run(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that learned something."""
    there = tmp_path_factory.mktemp("run") / "run"
    train(configured(*tiny(tiny_sd, "algo=draft", "lr=0.005")), there)
    return there


@torch.no_grad()
def test_a_run_is_loaded_as_a_pipeline(run: Path) -> None:
    """`alignlab.load`: its UNet answers like the run's policy, which is not the base model."""
    pipe, policy = (
        alignlab.load(run),
        policy_of(_config(run)["model"], run=str(run), device="cpu"),
    )
    x, t, cond = torch.randn(2, *policy.latent_shape), torch.tensor([10, 700]), policy.encode(["cat", "dog"])
    theirs = pipe.unet(x, t, cond.text["prompt_embeds"]).sample
    mine = policy.branches(x, t, cond, 1.0)[0]
    torch.testing.assert_close(theirs, mine)
    with policy.reference():
        assert (policy.branches(x, t, cond, 1.0)[0] - mine).abs().max() > 1e-3
    with pytest.raises(alignlab.weights.load.RunError, match="no run folder"):
        alignlab.load(run / "nothing")


def _config(run: Path) -> dict:
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())


def test_the_sample_command(run: Path, tmp_path, monkeypatch, capsys) -> None:
    """Base above, tuned below, a column a noise; half of the tuning lies between; none of it is the base
    model."""
    for scale in (1, 0, 0.5):
        words = [
            f"run={run}",
            "prompt=[cat,dog]",
            "n=3",
            f"lora_scale={scale}",
            f"output={tmp_path}/{scale}.png",
            "device=cpu",
        ]
        assert command_line(monkeypatch, *words, command=sample) == 0
    rows = {
        scale: np.split(np.asarray(Image.open(tmp_path / f"{scale}.png")).astype(int)[2:], 4)
        for scale in (1, 0, 0.5)
    }
    for base, tuned, half, none in zip(
        rows[1][::2], rows[1][1::2], rows[0.5][1::2], rows[0][1::2], strict=True
    ):
        assert (none == base).all()
        assert 0 < np.abs(half - base).mean() < np.abs(tuned - base).mean()
    capsys.readouterr()
    for words, sentence in (
        ([f"run={run}", "n=0"], "n=0 must be at least 1"),
        ([f"run={tmp_path}/none"], "is no run folder"),
        ([f"run={run}", "annealing=-1"], "annealing=-1.0 must not be negative"),
        ([f"run={run}", "promt=cat"], "did you mean prompt"),
    ):
        assert command_line(monkeypatch, *words, command=sample) == 2
        err = capsys.readouterr().err
        assert sentence in err and "Traceback" not in err
