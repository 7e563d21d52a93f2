"""Diffusion-DPO: its three losses against the formula, what its pairs do to the model, and the bookkeeping of
a run."""

import json
import math

import numpy as np
import pytest
import torch

from alignlab import train as train_module
from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import noise_key
from alignlab.objectives.dpo import DPO, ImagePairs
from alignlab.objectives.regression import errors
from alignlab.train import train
from tests.conftest import tiny_policy
from tests.linear_gaussian import D, World
from tests.objectives.updates import SCHEDULERS, distance, exact_policy, updates_of
from tests.running import command_line, configured, lines, pairs, same_weights, tiny

PAIRS = 5


def linear_pairs(process: ForwardProcess, seed: int = 0) -> ImagePairs:
    latents = torch.randn(2, PAIRS, 1, 1, D, generator=torch.Generator().manual_seed(seed))
    key = noise_key([str(k) for k in range(PAIRS)], seed=seed, stream="t")
    return ImagePairs(process=process, latents=latents, prompts=("",) * PAIRS, noise=key)


@pytest.fixture
def table(tmp_path) -> str:
    return pairs(tmp_path / "pairs")


def tiny_dpo(tiny_sd: str, table: str, *more: str) -> list[str]:
    """Overrides of a run of about a second."""
    words = tiny(
        tiny_sd, "algo=dpo", f"algo.data={table}", "algo.beta=100", "algo.updates_per_epoch=2", *more
    )
    return words


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("prediction", SCHEDULERS)
def test_the_loss_is_the_formula(prediction, kind, reduction, table) -> None:
    """On the linear world, whose reference and policy are matrices: pair by pair in float64, for every kind
    of model."""
    scheduler, beta = SCHEDULERS[prediction], 3.0
    world = World(scheduler).randomise(0.4)
    process = ForwardProcess.of(scheduler)
    batch = linear_pairs(process)
    objective = DPO(data=table, loss=kind, beta=beta, mse_reduction=reduction)
    loss, metrics = objective.loss(world, batch)
    uniform, noise = batch.noise.uniform(-2), batch.noise.normal(0, (1, 1, D)).double()[:, 0, 0]
    total, right = 0.0, 0
    for m in range(PAIRS):
        row = int(uniform[m] * 1000)
        if prediction == "flow":
            s = 3.0 * (1 - row / 1000) / (1 + 2.0 * (1 - row / 1000))
            alpha, sigma = 1 - s, s
        else:
            abar = float(scheduler.alphas_cumprod[row].double())
            alpha, sigma = abar**0.5, (1 - abar) ** 0.5
        (G,), (b,) = world.exact(process.timesteps[row : row + 1])
        errors = {}
        for who, x0 in enumerate(batch.latents[:, m, 0, 0].double()):
            x, eps = alpha * x0 + sigma * noise[m], noise[m]
            target = {
                "epsilon": eps,
                "sample": x0,
                "flow": eps - x0,
                "v_prediction": alpha * eps - sigma * x0,
            }[prediction]
            reference = G @ x + b
            policy = reference + world.W[0].detach() @ x + world.omega[0].detach()
            for name, out in {"theta": policy, "ref": reference}.items():
                squares = (target - out).square()
                errors[name, who] = float(squares.sum() if reduction == "sum" else squares.sum() / D)
        inside = -0.5 * beta * (errors["theta", 0] - errors["theta", 1] - errors["ref", 0] + errors["ref", 1])
        right += inside > 0
        if kind == "sigmoid":
            total += math.log1p(math.exp(-inside))
        elif kind == "hinge":
            total += max(0.0, 1 - inside)
        else:
            total += (inside / beta - 1 / (2 * beta)) ** 2
    assert loss.item() == pytest.approx(total / PAIRS, rel=1e-4)
    assert metrics["dpo/implicit_accuracy"].item() == pytest.approx(right / PAIRS)
    assert (metrics["dpo/loser_drift"] - metrics["dpo/winner_drift"]).item() * beta / 2 * (
        D if reduction == "sum" else 1
    ) == pytest.approx(metrics["dpo/margin"].item(), rel=1e-4)
    assert world.on and world.references == 1


@pytest.mark.parametrize(("kind", "start"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 1 / 40_000)])
@pytest.mark.parametrize("full", [False, True])
def test_it_starts_at_no_preference(full, kind, start, tiny_sd, table) -> None:
    """Before the first update policy and reference are one: log 2, accuracy 1/2, no drift; and the gradient
    is not 0 but for ipo's own scale."""
    policy = tiny_policy(tiny_sd, size=0, full=full)
    objective = DPO(data=table, loss=kind, beta=100.0, pairs=6)
    (update,) = objective.updates(policy, iter([]), 6, np.random.default_rng(0))
    ((share, batch),) = update.batches
    loss, metrics = objective.loss(policy, batch)
    assert (
        share == 1
        and loss.item() == pytest.approx(start, rel=1e-6)
        and metrics["dpo/implicit_accuracy"] == 0.5
    )
    assert not any(float(metrics[f"dpo/{name}"]) for name in ("margin", "winner_drift", "loser_drift"))
    assert any(g.abs().max() > 0 for g in torch.autograd.grad(loss, policy.parameters()))


def test_equal_images_teach_nothing(tiny_sd, table) -> None:
    """Where winner and loser are one image the gradient is round-off (float64), and a pair's turned round is
    opposite at the start."""
    policy = exact_policy(tiny_sd)
    objective = DPO(data=table, beta=100.0, pairs=4)
    (update,) = objective.updates(policy, iter([]), 4, np.random.default_rng(0))
    ((_, batch),) = update.batches

    def gradient(latents):
        given = ImagePairs(
            process=batch.process, latents=latents.double(), prompts=batch.prompts, noise=batch.noise
        )
        loss, _ = objective.loss(policy, given)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters())])

    plain, same = gradient(batch.latents), gradient(batch.latents[:1].expand(2, -1, -1, -1, -1))
    assert plain.norm() > 1e-3 and same.norm() < 1e-9 * plain.norm()
    with torch.no_grad():
        for name, parameter in policy.family.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    torch.testing.assert_close(
        gradient(batch.latents.flip(0)), -gradient(batch.latents), rtol=1e-6, atol=1e-12
    )


def test_label_smoothing(table) -> None:
    """The mean of the pair's loss and of that of the pair turned round, weighted by the share of labels that
    are wrong; and the winner's and the loser's error, less those of the reference, are their drifts."""
    world = World(SCHEDULERS["epsilon"]).randomise(0.4)
    batch = linear_pairs(ForwardProcess.of(SCHEDULERS["epsilon"]))
    turned = ImagePairs(
        process=batch.process, latents=batch.latents.flip(0), prompts=batch.prompts, noise=batch.noise
    )
    (plain, metrics), (other, _) = (DPO(data=table, beta=3.0).loss(world, pair) for pair in (batch, turned))
    smooth, _ = DPO(data=table, beta=3.0, label_smoothing=0.2).loss(world, batch)
    assert smooth.item() == pytest.approx(0.8 * plain.item() + 0.2 * other.item(), rel=1e-6) != plain.item()
    with world.reference():
        reference = errors(world, batch).mean(1)
    for who, before in zip(("winner", "loser"), reference.tolist(), strict=True):
        assert float(metrics[f"dpo/{who}_error"]) - before == pytest.approx(
            float(metrics[f"dpo/{who}_drift"]), abs=1e-6
        )
    for options, words in (
        ({"label_smoothing": 0.5}, r"algo\.label_smoothing=0\.5 must be in \[0, 0\.5\)"),
        (
            {"label_smoothing": 0.1, "loss": "ipo"},
            r"algo\.label_smoothing=0\.1 belongs to algo\.loss=sigmoid, not ipo",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            DPO(data=table, **options)


def test_the_prediction_has_no_guidance(tiny_sd, table) -> None:
    """One branch: winners and losers of the policy and of the reference."""
    policy, seen = tiny_policy(tiny_sd), []
    policy.family.denoiser.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    objective = DPO(data=table, pairs=6)
    (update,) = objective.updates(policy, iter([]), 3, np.random.default_rng(0))
    for _, batch in update.batches:
        objective.loss(policy, batch)
    assert seen == [6, 6, 6, 6]


def test_micro_batch_size_does_not_matter(tiny_sd, table) -> None:
    """Loss and gradient of every update agree to 1e-9 (float64) for micro-batches of 6 pairs, 4 and 1; so do
    dropped prompts."""
    policy, options = (
        exact_policy(tiny_sd),
        {"beta": 100.0, "pairs": 12, "updates_per_epoch": 2, "prompt_dropout": 0.4},
    )
    whole = updates_of(policy, DPO(data=table, **options), [], 6)
    assert len(whole) == 2
    for size in (4, 1):
        for (loss, grads), (loss_whole, grads_whole) in zip(
            updates_of(policy, DPO(data=table, **options), [], size), whole, strict=True
        ):
            assert loss == pytest.approx(loss_whole, rel=1e-9) and distance(grads, grads_whole) < 1e-9


def test_draws(tiny_sd, table) -> None:
    """Timesteps are uniform (chi-square), new in each epoch and for a pair's second turn; prompts are dropped
    at their rate."""
    policy = tiny_policy(tiny_sd)
    objective = DPO(data=table, pairs=600, prompt_dropout=0.25)
    epochs = []
    for seed in (0, 1):
        (update,) = objective.updates(policy, iter([]), 600, np.random.default_rng(seed))
        ((_, batch),) = update.batches
        epochs.append(batch)
    first, second = ((10 * batch.noise.uniform(-2)).long() for batch in epochs)
    chi2 = float(((torch.bincount(first, minlength=10) - 60.0) ** 2 / 60).sum())
    assert chi2 < 30 and (first == second).float().mean() < 0.2  # 9 degrees of freedom: P(> 30) = 4e-4
    noise = epochs[0].noise.normal(0, (4, 8, 8)).flatten(1)
    assert len(torch.unique(noise[:, 0])) == 600
    assert 0.18 < sum(prompt == "" for prompt in epochs[0].prompts) / 600 < 0.32


def test_passes_over_the_data(tiny_sd, table) -> None:
    """Every pair comes once before any comes twice, over epochs that do not divide the data, and after a
    checkpoint too."""
    policy, seen = tiny_policy(tiny_sd), []
    objective = DPO(data=table, pairs=4)
    for epoch in range(3):  # 12 pairs of 6
        if epoch == 1:
            state, objective = objective.state_dict(), DPO(data=table, pairs=4)
            objective.load_state_dict(state)
        (update,) = objective.updates(policy, iter([]), 1, np.random.default_rng(epoch))
        seen += [int(batch.noise.prompts[0]) for _, batch in update.batches]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6)) and seen[:6] != seen[6:]
    assert objective.epoch_metrics() == {"dpo/pairs": 6.0, "dpo/ties": 1.0}


def test_it_learns_the_preference(tiny_sd, table, tmp_path) -> None:
    """On the pairs of a tiny run the implicit accuracy rises above 0.9 and the loss falls; relative to the
    reference, winners are predicted better than losers. Nothing is sampled or scored in training, and
    evaluations know of the reward."""
    words = tiny_dpo(
        tiny_sd,
        table,
        "steps=50",
        "samples_per_step=6",
        "micro_batch=6",
        "algo.updates_per_epoch=1",
        "lr=5e-3",
        "eval_every=50",
    )
    summary = train(configured(*words, "checkpoint_every=0", "policy.lora.rank=8"), tmp_path / "run")
    epochs = lines(tmp_path / "run")
    early, late = epochs[:5], epochs[-10:]

    def mean(part, name):
        return float(np.mean([line[name] for line in part]))

    assert early[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert mean(late, "dpo/implicit_accuracy") > 0.9 and mean(late, "loss") < 0.8 * math.log(2)
    assert mean(late, "dpo/winner_drift") < mean(late, "dpo/loser_drift") and mean(late, "dpo/margin") > mean(
        early, "dpo/margin"
    )
    assert all(
        line["reward_queries"] == 0 and "reward/mean" not in line and line["kl"] is None for line in epochs
    )
    assert "eval/reward" in epochs[-1] and summary["base"]["reward"] != summary["final"]["reward"]
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert (
        "tuned on preferred images with DPO" in card
        and "50 epochs of 6 pairs" in card
        and "pairs.jsonl" in card
    )


def test_resume_is_exact(tiny_sd, table, tmp_path, monkeypatch) -> None:
    """Stopped before its third epoch and resumed, a run ends where the undisturbed one did, bit for bit."""
    c = configured(*tiny_dpo(tiny_sd, table, "algo.prompt_dropout=0.3"))
    train(c, tmp_path / "one")
    real = train_module.train_epoch
    with monkeypatch.context() as patch:

        def stopping(lab, c, epoch):
            if epoch == 3:
                raise KeyboardInterrupt
            return real(lab, c, epoch)

        patch.setattr(train_module, "train_epoch", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(c, tmp_path / "two")
    train(c, tmp_path / "two")
    assert lines(tmp_path / "one") == lines(tmp_path / "two") and same_weights(
        tmp_path / "one", tmp_path / "two"
    )


def test_the_command(tiny_sd, table, tmp_path, monkeypatch, capsys) -> None:
    """It trains by the real command; a missing image, changed data and other numbers of pairs are one
    sentence each."""
    words = [*tiny_dpo(tiny_sd, table), "steps=1"]
    assert command_line(monkeypatch, *words, f"output_dir={tmp_path / 'run'}") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["samples_seen"] == 4
    capsys.readouterr()
    assert command_line(monkeypatch, *words, "algo.pairs=8", f"output_dir={tmp_path / 'a'}") == 2
    assert "algo.pairs=8 is not samples_per_step=4" in capsys.readouterr().err
    assert command_line(monkeypatch, *words, "kl_coeff=0.1", f"output_dir={tmp_path / 'a'}") == 2
    assert "kl_coeff=0.1: DPO has no KL term" in capsys.readouterr().err
    assert command_line(monkeypatch, *tiny(tiny_sd, "algo=dpo"), f"output_dir={tmp_path / 'a'}") == 2
    assert "algo.data has no value" in capsys.readouterr().err
    assert command_line(monkeypatch, *words, "algo.data=nowhere", f"output_dir={tmp_path / 'a'}") == 2
    assert (
        "algo.data=nowhere: there is no .jsonl, .csv or .parquet file of pairs there"
        in capsys.readouterr().err
    )
    broken = pairs(tmp_path / "broken", n=4)
    for path in (tmp_path / "broken").glob("loser_*.png"):
        path.write_bytes(b"no image")
    assert command_line(monkeypatch, *words, f"algo.data={broken}", f"output_dir={tmp_path / 'b'}") == 2
    said = capsys.readouterr().err
    assert "loser of a row of" in said and "is no image" in said and "Traceback" not in said


def test_a_try_is_small(table) -> None:
    """quick=true lowers the pairs of an epoch with the rest."""
    c = configured("algo=dpo", f"algo.data={table}", "quick=true")
    assert c.samples_per_step == c.algo["pairs"] == 8


def test_other_data_cannot_go_on(table, tmp_path) -> None:
    """A checkpoint knows how many pairs there were."""
    with pytest.raises(ValueError, match=r"algo\.data holds 3 pairs, but the run began with 6"):
        DPO(data=pairs(tmp_path / "other", n=3)).load_state_dict(DPO(data=table).state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "exp"}, "algo.loss=exp"),
        ({"mse_reduction": "max"}, "algo.mse_reduction=max"),
        ({"beta": 0.0}, "algo.beta=0.0"),
        ({"prompt_dropout": 1.5}, "algo.prompt_dropout=1.5"),
        ({"updates_per_epoch": 5, "pairs": 4}, "algo.updates_per_epoch=5"),
        ({"kl_coeff": 0.1}, "kl_coeff=0.1"),
    ],
)
def test_refusals(options, words, table) -> None:
    """Impossible settings, and a KL term that DPO has not, are refused by key and value."""
    with pytest.raises(ValueError, match=words):
        DPO(data=table, **options)
