"""Online DPO: pairs of the run's own samples, when they are made anew, the reference that moves, and the
bookkeeping of a run."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from alignlab.data.pairing import Pairing
from alignlab.engine.rollout import NothingToLearn, Rollout, rollout
from alignlab.engine.samplers import ddim
from alignlab.objectives.dpo import DPO
from alignlab.objectives.dpo_online import OnlineDPO
from alignlab.train import train
from alignlab.training.unfinished_epoch import _as_it_is
from tests.conftest import PROMPTS, key, tiny_policy
from tests.objectives.updates import distance, exact_policy, updates_of
from tests.running import command_line, configured, lines, pairs, same_weights, stopped_and_resumed, tiny

SCORES = torch.tensor([0.5, 3.0, 2.0, 1.0, 5.0, 2.5, 9.0, 8.0])
"""Of "a cat", "a dog", "a cat", "a red bird", "a dog", "a cat", "", "two fish"."""
PAIRED = [(5, 0), (4, 1)]
"""Their best against their worst, where a prompt has two."""


def sampled(policy, scores=SCORES, **more) -> list[Rollout]:
    """Two rollouts of the eight prompts, with these rewards."""
    sampler, parts = ddim(policy.family.scheduler, steps=2, eta=0.0, guidance_scale=3.0), []
    with torch.no_grad():
        for rows in (slice(0, 4), slice(4, 8)):
            record = rollout(policy, sampler, key(8)[range(8)[rows]], store="image")
            named = {"clip": scores, **more}
            parts.append(
                replace(
                    record,
                    rewards={k: v[rows] for k, v in named.items()},
                    weights=dict.fromkeys(named, 1.0),
                    reward=sum(named.values())[rows],
                    share=0.5,
                )
            )
    return parts


def never():
    """A stream that must be left alone."""
    raise AssertionError("sampled")
    yield


def only(updates):
    """The one micro-batch of the one update."""
    (update,) = updates
    ((_, batch),) = update.batches
    return batch


def test_pairs_are_the_samples_own_latents(tiny_sd) -> None:
    """Winner and loser are the latents x_0 that the sampler ended at, with their prompt; the epoch is one
    pass over all pairs."""
    policy = tiny_policy(tiny_sd)
    records, objective = sampled(policy), OnlineDPO(pairing=Pairing(rule="all_pairs"), beta=100.0)
    batch = only(objective.updates(policy, iter(records), 8, np.random.default_rng(0)))
    x0 = Rollout.cat(records).latents[:, -1]
    expected = {(5, 2), (5, 0), (2, 0), (4, 1)}
    found = set()
    for m, prompt in enumerate(batch.prompts):
        rows = [int((x0 - batch.latents[who, m]).flatten(1).abs().sum(1).argmin()) for who in (0, 1)]
        assert all(
            torch.equal(x0[row], batch.latents[who, m]) and PROMPTS[row] == prompt
            for who, row in enumerate(rows)
        )
        found.add(tuple(rows))
    assert found == expected and len(batch.prompts) == 4 and len(objective.pool.latents) == 5
    assert torch.equal(policy.decode(x0[:4]), records[0].images)
    metrics = objective.epoch_metrics()
    assert metrics == {
        "dpo/pairs": 4.0,
        "dpo/ties": 0.0,
        "dpo/score_margin": (0.5 + 2.0 + 1.5 + 2.0) / 4,
        "dpo/age": 0.0,
    }


def test_it_samples_every_r_epochs(tiny_sd) -> None:
    """Epochs 1 and 4 of resample_every=3 take the whole stream; in the others it is left alone, and the old
    pairs have new draws."""
    policy, objective = tiny_policy(tiny_sd), OnlineDPO(resample_every=3)
    batches, ages = [], []
    for number in range(5):
        stream = iter(sampled(policy, SCORES if number == 0 else -SCORES)) if number % 3 == 0 else never()
        batches.append(only(objective.updates(policy, stream, 8, np.random.default_rng(number))))
        ages.append(objective.epoch_metrics()["dpo/age"])
        assert next(stream, None) is None if number % 3 == 0 else True
    assert ages == [0, 1, 2, 0, 1]

    def winners(batch):
        return {prompt: batch.latents[:, m] for m, prompt in enumerate(batch.prompts)}

    first, third, fourth = winners(batches[0]), winners(batches[2]), winners(batches[3])
    assert all(torch.equal(first[prompt], third[prompt]) for prompt in first)
    assert all(
        torch.equal(first[prompt], fourth[prompt].flip(0)) for prompt in first
    )  # the scores were turned round
    times = [sorted(zip(batch.prompts, batch.noise.uniform(-2).tolist(), strict=True)) for batch in batches]
    assert times[0] != times[1] != times[2]


def test_ties_and_no_pairs(tiny_sd, capsys) -> None:
    """Ties are counted and not trained on. With no pair at all the first epoch is one sentence; a later one
    says so and keeps its pairs."""
    policy = tiny_policy(tiny_sd)
    equal = torch.ones(8)
    said = r"8 images of 5 prompts make no pair by algo\.pairing \(2 ties\); lower algo\.pairing\.margin"
    with pytest.raises(NothingToLearn, match=said):
        next(OnlineDPO().updates(policy, iter(sampled(policy, equal)), 8, np.random.default_rng(0)))
    objective = OnlineDPO()
    half = SCORES.clone()
    half[4] = half[1]
    one = only(objective.updates(policy, iter(sampled(policy, half)), 8, np.random.default_rng(0)))
    assert one.prompts == ("a cat",) and objective.epoch_metrics()["dpo/ties"] == 1.0
    again = only(objective.updates(policy, iter(sampled(policy, equal)), 8, np.random.default_rng(1)))
    assert torch.equal(again.latents, one.latents) and objective.epoch_metrics()["dpo/ties"] == 2.0
    assert "warning: epoch 2: 8 images of 5 prompts make no pair" in capsys.readouterr().err


def test_several_rewards(tiny_sd) -> None:
    """Un-normalised, pairs go by the total that other objectives maximise; normalised, weighted or by
    dominance, by each raw reward, with the rewards' own weights unless the pairing has some."""
    policy, other = tiny_policy(tiny_sd), torch.tensor([7.0, 0, 0, 0, 0, 0, 0, 0])
    data = replace(
        Rollout.cat(sampled(policy, other=other)),
        weights={"clip": 1.0, "other": -2.0},
        reward=SCORES + 3 * other,
    )

    def found(**how):
        return [
            (pair.winner, pair.loser)
            for pair in OnlineDPO(pairing=Pairing(**how)).paired(PROMPTS, data).pairs
        ]

    assert found() == [(0, 2), (4, 1)]  # the total: what normalisation by the base model made of it, say
    assert found(normalise="zscore") == PAIRED  # clip - 2 other
    assert found(weights={"clip": 0.0}) == [(2, 0)]  # -2 other alone; the dogs tie
    assert found(rule="pareto", weights={"clip": 1.0, "other": 1.0}) == [(5, 2), (4, 1)]
    with pytest.raises(
        NothingToLearn, match=r"algo\.pairing\.weights\.hps names no reward of these candidates"
    ):
        objective = OnlineDPO(pairing=Pairing(weights={"hps": 1.0}))
        next(objective.updates(policy, iter([data]), 8, np.random.default_rng(0)))


@pytest.mark.parametrize("full", [False, True])
def test_the_loss_is_dpos(full, tiny_sd, tmp_path) -> None:
    """Of the same pairs and draws, bit for bit, while the reference is the pretrained model."""
    policy, objective = tiny_policy(tiny_sd, full=full), OnlineDPO(beta=100.0)
    if full:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.01)
    batch = only(objective.updates(policy, iter(sampled(policy)), 8, np.random.default_rng(0)))
    plain, _ = DPO(data=pairs(tmp_path), beta=100.0).loss(policy, batch)
    assert torch.equal(objective.loss(policy, batch)[0], plain) and plain.item() != pytest.approx(
        math.log(2), abs=1e-4
    )


@pytest.mark.parametrize("full", [False, True])
def test_the_reference_moves(full, tiny_sd) -> None:
    """With ref_update_every=2, epochs 1 and 3 begin at the policy itself: log 2, no drift, and a gradient;
    between them the reference stays where it was, though the weights move. What evaluations call the
    reference stays the pretrained model."""
    policy, objective = tiny_policy(tiny_sd, full=full), OnlineDPO(beta=100.0, ref_update_every=2)
    cond, t, x = policy.encode(["a cat"]), torch.tensor([500]), torch.randn(1, *policy.latent_shape)

    def pretrained():
        with policy.reference(), torch.no_grad():
            return policy.predict(x, t, cond, 1.0)

    before, found = pretrained(), []
    for number in range(4):
        batch = only(objective.updates(policy, iter(sampled(policy)), 8, np.random.default_rng(number)))
        loss, metrics = objective.loss(policy, batch)
        grads = torch.autograd.grad(loss, policy.parameters())
        found.append((loss.item(), float(metrics["dpo/winner_drift"])))
        assert any(g.abs().max() > 0 for g in grads)
        with torch.no_grad():
            for parameter, g in zip(policy.parameters(), grads, strict=True):
                parameter -= 1e-3 * g.sign()
    assert found[0] == found[2] == (pytest.approx(math.log(2), rel=1e-6), 0.0)
    assert found[1][1] != 0 != found[3][1] and found[1][0] != pytest.approx(math.log(2), rel=1e-3)
    assert torch.equal(pretrained(), before)


def test_micro_batch_size_does_not_matter(tiny_sd) -> None:
    """Loss and gradient of both updates agree to 1e-9 (float64) for micro-batches of 4 pairs, 3 and 1, with a
    reference of its own."""
    policy = exact_policy(tiny_sd)
    records = [replace(record, latents=record.latents.double()) for record in sampled(tiny_policy(tiny_sd))]
    options = {"beta": 100.0, "updates_per_epoch": 2, "prompt_dropout": 0.4, "ref_update_every": 1}
    pairing = Pairing(rule="all_pairs")
    whole = updates_of(policy, OnlineDPO(pairing=pairing, **options), records, 4)
    assert len(whole) == 2
    for size in (3, 1):
        got = updates_of(policy, OnlineDPO(pairing=pairing, **options), records, size)
        for (loss, grads), (loss_whole, grads_whole) in zip(got, whole, strict=True):
            assert loss == pytest.approx(loss_whole, rel=1e-9) and distance(grads, grads_whole) < 1e-9


RUN = (
    "algo=dpo_online",
    "prompts.per_prompt=2",
    "samples_per_step=6",
    "algo.beta=100",
    "algo.prompt_dropout=0.3",
)


def test_resume_is_exact(tiny_sd, tmp_path, monkeypatch) -> None:
    """Stopped after a reference update, in the middle of its pairs' life, and resumed, a run ends where the
    undisturbed one did, bit for bit; so does one whose samples a failing reward cut short."""
    c = configured(
        *tiny(tiny_sd, *RUN, "steps=5", "algo.resample_every=3", "algo.ref_update_every=2", "eval_every=5")
    )
    train(c, tmp_path / "one")
    for name, before in (
        ("two", 4),
        ("three", 3),
    ):  # in epoch 4 pairs are made anew, in epoch 3 the reference
        stopped_and_resumed(c, tmp_path / name, monkeypatch, before=before)
        assert lines(tmp_path / "one") == lines(tmp_path / name) and same_weights(
            tmp_path / "one", tmp_path / name
        )
    found = lines(tmp_path / "one")
    assert [line["reward_queries"] for line in found] == [6, 0, 0, 6, 0]
    assert [line["dpo/age"] for line in found] == [0, 1, 2, 0, 1]
    assert [round(line["loss"], 5) == round(math.log(2), 5) for line in found] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert "reward/mean" in found[0] and "reward/mean" not in found[1]


def test_its_state_is_copied_without_its_tensors(tiny_sd) -> None:
    """The loop copies an objective's state in every epoch; pools of latents and second sets of weights are
    shared, containers are not."""
    policy, objective = tiny_policy(tiny_sd), OnlineDPO(ref_update_every=1)
    only(objective.updates(policy, iter(sampled(policy)), 8, np.random.default_rng(0)))
    state = objective.state_dict()
    copied = _as_it_is(state)
    assert copied["pool"]["latents"] is state["pool"]["latents"] and copied["pool"] is not state["pool"]
    weights = state["reference"]["weights"]
    assert copied["reference"]["weights"] is not weights and all(
        a is b for a, b in zip(copied["reference"]["weights"], weights, strict=True)
    )
    again = OnlineDPO(ref_update_every=1)
    again.load_state_dict(copied)
    batch = only(again.updates(policy, iter(sampled(policy)), 8, np.random.default_rng(1)))
    assert again.epochs == 2 and len(batch.prompts) == 2


def test_it_learns(tiny_sd, tmp_path) -> None:
    """Brightness: after a few rounds the run's own samples are brighter, by three standard errors, and so is
    the evaluation."""
    words = [
        "samples_per_step=24",
        "micro_batch=24",
        "prompts.per_prompt=8",
        "steps=24",
        "eval_every=24",
        "lr=3e-3",
        "algo.beta=20",
    ]
    words += [
        "algo.pairing.rule=topk_bottomk",
        "algo.pairing.k=4",
        "checkpoint_every=0",
        "policy.lora.rank=8",
        "algo.prompt_dropout=0",
    ]
    summary = train(configured(*tiny(tiny_sd, "algo=dpo_online", *words)), tmp_path / "run")
    rewards = [line["reward/mean"] for line in lines(tmp_path / "run")]
    early, late = np.array(rewards[:6]), np.array(rewards[-6:])
    assert late.mean() - early.mean() > 3 * np.hypot(early.std(ddof=1), late.std(ddof=1)) / 6**0.5
    assert summary["final"]["reward"] > summary["base"]["reward"]


def test_the_command(tiny_sd, tmp_path, monkeypatch, capsys) -> None:
    """What cannot be is one sentence, before a model is loaded."""
    words = [*tiny(tiny_sd, *RUN), "steps=1", f"output_dir={tmp_path / 'a'}"]
    for more, said in {
        "prompts.per_prompt=1": "OnlineDPO compares the images of a prompt with each other, but "
        "prompts.per_prompt=1; set prompts.per_prompt=4, say",
        "policy.full=true policy.shard=true algo.ref_update_every=1": "policy.shard=true cannot hold a "
        "second set of weights",
        "algo.resample_every=0": "algo.resample_every=0 must be at least 1",
        "algo.ref_update_every=-1": "algo.ref_update_every=-1 must not be negative",
        "algo.pairing.rule=best": "algo.pairing.rule=best must be one of best_worst",
        "algo.pairing.k=0": "k=0 must be at least 1",
        "algo.pairing.weights={hps:1}": "algo.pairing.weights.hps names no reward; they are brightness",
        "kl_coeff=0.1": "kl_coeff=0.1: OnlineDPO has no KL term",
        "combine=rank": "combine=rank, but OnlineDPO makes no advantages of rewards",
    }.items():
        assert command_line(monkeypatch, *words, *more.split()) == 2
        found = capsys.readouterr().err
        assert said in found and len(found.splitlines()) == 1, found
    assert command_line(monkeypatch, *words, "reward=brightness", "algo.pairing.margin=100") == 2
    found = capsys.readouterr().err
    assert (
        "make no pair by algo.pairing (3 ties); lower algo.pairing.margin" in found
        and "Traceback" not in found
    )
