"""Diffusion-KTO: its loss against the formula, z0 over a whole update, and the bookkeeping of a run."""

import json
import math

import numpy as np
import pytest
import torch

from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import noise_key
from alignlab.objectives.kto import KTO, Judged
from alignlab.train import train
from tests.conftest import tiny_policy
from tests.linear_gaussian import D, World
from tests.objectives.updates import SCHEDULERS, distance, exact_policy, updates_of
from tests.running import command_line, configured, lines, pairs, same_weights, stopped_and_resumed, tiny

IMAGES = 7
GOOD = torch.tensor([True, False, True, True, False, True, False])


@pytest.fixture
def table(tmp_path) -> str:
    return pairs(tmp_path / "pairs")


def judged(process: ForwardProcess, good: torch.Tensor = GOOD, seed: int = 0) -> Judged:
    latents = torch.randn(1, len(good), 1, 1, D, generator=torch.Generator().manual_seed(seed))
    key = noise_key([str(k) for k in range(len(good))], seed=seed, stream="t")
    return Judged(
        process=process,
        latents=latents,
        prompts=("",) * len(good),
        noise=key,
        desirable=good,
        reference=torch.empty(0),
        z0=0.0,
    )


@pytest.mark.parametrize("z0", ["balanced", "clamped"])
@pytest.mark.parametrize("prediction", SCHEDULERS)
def test_the_loss_is_the_formula(prediction, z0, table) -> None:
    """On the linear world, image by image in float64, for every kind of model and both z0, two micro-batches
    sharing theirs."""
    scheduler, beta, weights = SCHEDULERS[prediction], 3.0, {True: 1.5, False: 0.5}
    world, process = World(scheduler).randomise(0.4), ForwardProcess.of(scheduler)
    objective = KTO(data=table, beta=beta, lambda_d=weights[True], lambda_u=weights[False], z0=z0)
    parts = [judged(process), judged(process, GOOD[:3], seed=1)]
    gains = []
    for batch in parts:
        uniform, noise = batch.noise.uniform(-2), batch.noise.normal(0, (1, 1, D)).double()[:, 0, 0]
        for m in range(len(batch.prompts)):
            row = int(uniform[m] * 1000)
            if prediction == "flow":
                s = 3.0 * (1 - row / 1000) / (1 + 2.0 * (1 - row / 1000))
                alpha, sigma = 1 - s, s
            else:
                abar = float(scheduler.alphas_cumprod[row].double())
                alpha, sigma = abar**0.5, (1 - abar) ** 0.5
            (G,), (b,) = world.exact(process.timesteps[row : row + 1])
            x0, eps = batch.latents[0, m, 0, 0].double(), noise[m]
            x = alpha * x0 + sigma * eps
            target = {
                "epsilon": eps,
                "sample": x0,
                "flow": eps - x0,
                "v_prediction": alpha * eps - sigma * x0,
            }[prediction]
            reference = G @ x + b
            theta = reference + world.W[0].detach() @ x + world.omega[0].detach()
            e_ref, e_theta = (float((target - out).square().sum() / D) for out in (reference, theta))
            gains.append((e_ref - e_theta, bool(batch.desirable[m])))
    better, worse = ([g for g, good in gains if good is which] for which in (True, False))
    everyone = [g for g, _ in gains]
    centre = (np.mean(better) + np.mean(worse)) / 2 if z0 == "balanced" else max(0.0, np.mean(everyone))
    assert z0 == "clamped" or centre != pytest.approx(
        np.mean(everyone), rel=1e-3
    )  # so that the test can tell
    totals = [
        weights[good] * (1 - 1 / (1 + math.exp(-(1 if good else -1) * beta * (g - centre))))
        for g, good in gains
    ]
    measured = objective._measured(world, [(0.7, parts[0]), (0.3, parts[1])])
    losses = [objective.loss(world, batch) for _, batch in measured]
    assert losses[0][0].item() == pytest.approx(np.mean(totals[:7]), rel=1e-4)
    assert losses[1][0].item() == pytest.approx(np.mean(totals[7:]), rel=1e-4)
    assert objective.epoch_metrics()["kto/z0"] == pytest.approx(centre, rel=1e-4, abs=1e-9)
    metrics = losses[0][1]
    mine = np.array([g for g, _ in gains[:7]])
    assert np.nanmean(metrics["kto/desirable_gain"].numpy()) == pytest.approx(
        mine[GOOD.numpy()].mean(), rel=1e-4
    )
    assert np.nanmean(metrics["kto/undesirable_gain"].numpy()) == pytest.approx(
        mine[~GOOD.numpy()].mean(), rel=1e-4
    )
    right = [bool(g > centre) == good for g, good in gains[:7]]
    assert metrics["kto/implicit_accuracy"].item() == pytest.approx(np.mean(right))
    assert world.on and world.references == 2  # the losses do not ask the reference again


def test_z0_of_one_kind_and_its_order(table) -> None:
    """An update with one kind of images has that one's mean; 10^5 gains in any order have the same z0, to the
    last bit."""
    objective, draw = KTO(data=table), np.random.default_rng(0)
    gains, good = draw.normal(size=100_000) * 10 ** draw.uniform(-8, 2, 100_000), draw.random(100_000) < 0.8
    assert objective.z0_of(gains, np.ones_like(good)) == pytest.approx(gains.mean())
    order = draw.permutation(100_000)
    assert objective.z0_of(gains, good) == objective.z0_of(gains[order], good[order])
    assert objective.z0_of(gains, good) == pytest.approx((gains[good].mean() + gains[~good].mean()) / 2)
    assert KTO(data=table, z0="clamped").z0_of(-np.abs(gains), good) == 0


@pytest.mark.parametrize("full", [False, True])
def test_it_starts_undecided(full, tiny_sd, table) -> None:
    """Before the first update g = z0 = 0: half of each weight, accuracy 1/2; and there is a gradient."""
    policy = tiny_policy(tiny_sd, size=0, full=full)
    objective = KTO(data=table, beta=100.0, lambda_d=1.0, lambda_u=0.5, images=12)
    (update,) = objective.updates(policy, iter([]), 12, np.random.default_rng(0))
    ((share, batch),) = update.batches
    loss, metrics = objective.loss(policy, batch)
    assert share == 1 and batch.desirable.sum() == 6  # winners and losers of six pairs
    assert loss.item() == pytest.approx((1.0 + 0.5) / 4, rel=1e-6) and metrics["kto/implicit_accuracy"] == 0.5
    assert objective.epoch_metrics() == {
        "kto/images": 12.0,
        "kto/desirable": 6.0,
        "kto/ties": 1.0,
        "kto/z0": 0.0,
    }
    assert any(g.abs().max() > 0 for g in torch.autograd.grad(loss, policy.parameters()))


@pytest.mark.parametrize("z0", ["balanced", "clamped"])
def test_micro_batch_size_does_not_matter(z0, tiny_sd, table) -> None:
    """Loss and gradient of every update agree to 1e-9 (float64) for micro-batches of 8 images, 3 and 1; so do
    dropped prompts."""
    policy = exact_policy(tiny_sd)
    options = {
        "beta": 100.0,
        "images": 16,
        "updates_per_epoch": 2,
        "prompt_dropout": 0.4,
        "lambda_u": 0.7,
        "z0": z0,
    }
    whole = updates_of(policy, KTO(data=table, **options), [], 8)
    assert len(whole) == 2
    for size in (3, 1):
        for (loss, grads), (loss_whole, grads_whole) in zip(
            updates_of(policy, KTO(data=table, **options), [], size), whole, strict=True
        ):
            assert loss == pytest.approx(loss_whole, rel=1e-9) and distance(grads, grads_whole) < 1e-9


def test_it_learns_the_labels(tiny_sd, table) -> None:
    """Steps on the images of one update, with its timesteps and noise, sort the desirable above the
    undesirable."""
    policy = tiny_policy(tiny_sd, size=0, rank=8)
    objective, descent = KTO(data=table, beta=30.0, images=12), torch.optim.Adam(policy.parameters(), lr=1e-2)
    (update,) = objective.updates(policy, iter([]), 12, np.random.default_rng(0))
    batches, seen = list(update.batches), []
    for _ in range(16):
        ((_, batch),) = batches = objective._measured(policy, batches)
        loss, metrics = objective.loss(policy, batch)
        descent.zero_grad()
        loss.backward()
        descent.step()
        seen.append((loss.item(), metrics["kto/implicit_accuracy"].item()))
    assert seen[0] == (pytest.approx(0.5), 0.5) and seen[-1][0] < 0.4 and seen[-1][1] > 0.8, seen


def test_a_run(tiny_sd, table, tmp_path) -> None:
    """Nothing is sampled or scored in training; gains are those of each kind; the card says what was learned
    from."""
    words = tiny(tiny_sd, "algo=kto", f"algo.data={table}", "algo.beta=100", "samples_per_step=6")
    train(configured(*words), tmp_path / "run")
    epochs = lines(tmp_path / "run")
    assert epochs[0]["loss"] == pytest.approx(0.5, rel=1e-5) and epochs[0]["kto/desirable_gain"] == 0.0
    assert all(
        line["reward_queries"] == 0 and "reward/mean" not in line and line["kl"] is None for line in epochs
    )
    assert epochs[-1]["kto/z0"] == pytest.approx(
        (epochs[-1]["kto/desirable_gain"] + epochs[-1]["kto/undesirable_gain"]) / 2, rel=0.5
    )
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert (
        "tuned on labelled images with KTO" in card
        and "4 epochs of 6 images" in card
        and "pairs.jsonl" in card
    )


def test_resume_is_exact(tiny_sd, table, tmp_path, monkeypatch) -> None:
    """Stopped before its third epoch and resumed, a run ends where the undisturbed one did, bit for bit."""
    words = (
        "algo=kto",
        f"algo.data={table}",
        "algo.beta=100",
        "algo.updates_per_epoch=2",
        "algo.prompt_dropout=0.3",
    )
    c = configured(*tiny(tiny_sd, *words))
    train(c, tmp_path / "one")
    stopped_and_resumed(c, tmp_path / "two", monkeypatch, before=3)
    assert lines(tmp_path / "one") == lines(tmp_path / "two") and same_weights(
        tmp_path / "one", tmp_path / "two"
    )


def test_the_command(tiny_sd, table, tmp_path, monkeypatch, capsys) -> None:
    """It trains by the real command; what cannot be is one sentence, before a model is loaded."""
    words = [*tiny(tiny_sd, "algo=kto", f"algo.data={table}", "algo.beta=100"), "steps=1"]
    assert command_line(monkeypatch, *words, f"output_dir={tmp_path / 'run'}") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["samples_seen"] == 4
    capsys.readouterr()
    for word, said in {
        "algo.images=8": "algo.images=8 is not samples_per_step=4",
        "kl_coeff=0.1": "kl_coeff=0.1: KTO has no KL term",
        "algo.data=nowhere": "algo.data=nowhere: there is no .jsonl, .csv or .parquet file of labelled "
        "images there",
        "algo.z0=mean": "algo.z0=mean must be one of balanced, clamped",
    }.items():
        assert command_line(monkeypatch, *words, word, f"output_dir={tmp_path / 'a'}") == 2
        assert said in capsys.readouterr().err
    assert configured(*words, "samples_per_step=64", "micro_batch=64", "quick=true").algo["images"] == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "algo.beta=0.0 must be positive"),
        ({"z0": "mean"}, "algo.z0=mean is not one of"),
        ({"lambda_d": -1.0}, "algo.lambda_d=-1.0 and algo.lambda_u=1.0 must not be negative"),
        ({"lambda_d": 0.0, "lambda_u": 0.0}, "nor both 0"),
        ({"prompt_dropout": 1.5}, "algo.prompt_dropout=1.5"),
        (
            {"updates_per_epoch": 5, "images": 4},
            "algo.updates_per_epoch=5 must be at least 1 and at most algo.images=4",
        ),
    ],
)
def test_refusals(options, words, table) -> None:
    with pytest.raises(ValueError, match=words):
        KTO(data=table, **options)
