"""DDPO's bookkeeping: pairs, shares, clip, KL. Its expectation is proved in test_closed_forms.py."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from alignlab.engine.rollout import Replay, rollout
from alignlab.engine.samplers import ddim
from alignlab.objectives import ddpo as module
from alignlab.objectives.advantages import PromptStatistics
from alignlab.objectives.ddpo import DDPO, Pairs
from tests.conftest import SD_SCHEDULE
from tests.linear_gaussian import LINEAR, World, double, draws, scored
from tests.objectives.updates import distance, unet_case, updates_of

DATA = Path(__file__).parents[1] / "stored"
D = 4 * 8 * 8


@pytest.mark.parametrize(
    "options",
    [{"estimator": "sf"}, {"estimator": "is"}, {"estimator": "is", "kl_coeff": 0.1, "kl_gradient": "exact"}],
)
def test_micro_batch_size_does_not_matter(tiny_sd, options):
    """Loss and gradient of every update agree to 1e-9 (float64) for micro-batches of 30 pairs, 7 and 1, ratio
    and KL away from their start."""
    policy, record = unet_case(tiny_sd, move=0.01, exact=True)
    whole = updates_of(policy, DDPO(updates_per_epoch=2, **options), [record], 30)
    for size in (7, 1):
        parts = updates_of(policy, DDPO(updates_per_epoch=2, **options), [record], size)
        assert len(parts) == len(whole) == (1 if options["estimator"] == "sf" else 2)
        for (loss, grads), (loss_whole, grads_whole) in zip(parts, whole, strict=True):
            assert loss == pytest.approx(loss_whole, rel=1e-9) and distance(grads, grads_whole) < 1e-9


def test_sf_is_one_update_whose_gradient_is_the_is_gradient_at_ratio_1(tiny_sd):
    """The score function takes exactly one update an epoch, whatever is asked, and equals importance sampling
    before it."""
    policy, record = unet_case(tiny_sd)
    sf = updates_of(policy, DDPO(estimator="sf", updates_per_epoch=3, inner_epochs=4), [record], 10)
    (importance,) = updates_of(policy, DDPO(estimator="is", updates_per_epoch=1), [record], 10)
    assert len(sf) == 1 and distance(sf[0][1], importance[1]) < 1e-5


def pairs_of(objective, record, policy=None, seed=0):
    """[updates] lists of (row, step) of an epoch."""
    updates = objective.updates(
        policy or World(DDIMScheduler(**SD_SCHEDULE)), iter([record]), 4, np.random.default_rng(seed)
    )
    return [
        [p for _, b in update.batches for p in zip(b.rows.tolist(), b.steps.tolist(), strict=True)]
        for update in updates
    ]


def linear_record(n=10, steps=8, **options):
    scheduler = DDIMScheduler(**SD_SCHEDULE, **options)
    with torch.no_grad():
        return scored(
            rollout(World(scheduler), double(ddim(scheduler, steps=steps, eta=1.0)), draws(n)), LINEAR
        )


def test_every_scored_pair_once_per_inner_epoch():
    """An inner epoch holds each (sample, scored step) once, in a new order each time; all steps of a sample
    fall in one update. The last step, with s = 0, is never among them."""
    record = linear_record(set_alpha_to_one=True)
    assert record.sampler.scored.tolist() == [True] * 7 + [False]
    assert record.log_probs[:, -1].isnan().all() and record.log_probs[:, :-1].isfinite().all()
    updates = pairs_of(DDPO(updates_per_epoch=3, inner_epochs=2), record)
    assert len(updates) == 6
    for inner in (updates[:3], updates[3:]):
        flat = [p for update in inner for p in update]
        assert sorted(flat) == [(r, i) for r in range(10) for i in range(7)]
        rows = [{r for r, _ in update} for update in inner]
        assert sorted(len(r) for r in rows) == [3, 3, 4] and not rows[0] & rows[1] and not rows[1] & rows[2]
    assert updates[:3] != updates[3:]


def test_timestep_fraction():
    """A fraction trains on that many scored steps of each sample, distinct, drawn anew for each sample and
    inner epoch."""
    record = linear_record(set_alpha_to_one=True)
    updates = pairs_of(DDPO(updates_per_epoch=1, inner_epochs=2, timestep_fraction=0.4), record)
    chosen = [[tuple(sorted(i for r, i in u if r == row)) for row in range(10)] for u in updates]
    assert all(len(set(steps)) == round(0.4 * 7) and 7 not in steps for u in chosen for steps in u)
    assert len(set(chosen[0])) > 3 and chosen[0] != chosen[1]
    (few,) = pairs_of(DDPO(updates_per_epoch=1, timestep_fraction=0.01), record)
    assert len(few) == 10  # never none


def test_advantages_are_the_whole_batchs_and_clipped():
    """Advantages are standardised once over all rollouts, clipped at 5, and shared by all steps of a
    sample."""
    record = linear_record()
    rewards = torch.tensor([0.0] * 9 + [100.0], dtype=torch.float64)
    whole, halves = (
        replace(record, reward=rewards),
        [replace(record, reward=rewards[::2]), replace(record, reward=rewards[1::2])],
    )
    halves = [
        replace(
            h, prompts=h.prompts[:5], latents=h.latents[:5], log_probs=h.log_probs[:5], images=h.images[:5]
        )
        for h in halves
    ]
    objective = DDPO(estimator="sf", advantage_clip=2.0, statistics=PromptStatistics(per_prompt=False))
    (update,) = objective.updates(
        World(DDIMScheduler(**SD_SCHEDULE)), iter([whole]), 1000, np.random.default_rng(0)
    )
    ((_, batch),) = update.batches
    assert (batch.advantages == batch.advantages[:, :1]).all() and float(batch.advantages.max()) == 2.0
    (update,) = objective.updates(
        World(DDIMScheduler(**SD_SCHEDULE)), iter(halves), 1000, np.random.default_rng(0)
    )
    ((_, both),) = update.batches
    expected = ((rewards - rewards.mean()) / rewards.std(correction=0)).clamp(max=2).float()
    torch.testing.assert_close(both.advantages[:, 0], torch.cat([expected[::2], expected[1::2]]))


def test_clip_bound():
    """c = clip 16384/D bounds the same true log-ratio at every D; 1/sqrtD and none are as named."""
    for dimensions in (1024, 16384, 65536):
        assert DDPO(clip=1e-4).clip_bound(dimensions) * dimensions == pytest.approx(1e-4 * 16384)
        assert DDPO(clip=1e-4, clip_scaling="1/sqrtD").clip_bound(dimensions) == pytest.approx(
            1e-4 * math.sqrt(16384 / dimensions)
        )
        assert DDPO(clip=1e-4, clip_scaling="none").clip_bound(dimensions) == 1e-4


def test_clipped_loss_is_trls_and_by_hand(monkeypatch):
    """On TRL's log-probs and advantages the loss is TRL's to 2e-5; and max(-A rho, -A clip(rho, e^-c, e^c))
    in a plain loop."""
    setting = json.loads((DATA / "trl_ddpo.json").read_text())["ppo"][0]
    arrays = {
        k.split(".")[2]: v
        for k, v in load_file(DATA / "trl_ddpo.safetensors").items()
        if k.startswith("ppo.0.")
    }
    record = replace(linear_record(8), log_probs=arrays["old_log_prob"][:, None])
    now = Replay(x=torch.zeros(8, 1, 1, 2), out=torch.zeros(8, 1, 1, 2), log_prob=arrays["log_prob"])
    monkeypatch.setattr(module, "replay", lambda *_: now)
    batch = Pairs(
        rollout=record,
        rows=torch.arange(8),
        steps=torch.zeros(8, dtype=torch.long),
        advantages=arrays["advantages"][:, None],
    )
    for clip in (setting["clip"], 0.3):
        loss, metrics = DDPO(clip=clip, clip_scaling="none").loss(World(DDIMScheduler(**SD_SCHEDULE)), batch)
        total, outside = 0.0, 0
        for a, new, old in zip(
            *(arrays[k].double().tolist() for k in ("advantages", "log_prob", "old_log_prob")), strict=True
        ):
            rho = math.exp(new - old)
            total += max(-a * rho, -a * min(max(rho, math.exp(-clip)), math.exp(clip))) / 8
            outside += abs(new - old) > clip
        assert (
            float(loss) == pytest.approx(total, rel=1e-5)
            and float(metrics["ddpo/clip_fraction"]) == outside / 8
        )
        if clip == setting["clip"]:
            assert float(loss) == pytest.approx(setting["loss"], rel=2e-5)


@pytest.mark.parametrize("estimator", ["sf", "is"])
def test_kl_is_zero_at_the_start_and_free_at_kl_coeff_0(tiny_sd, estimator):
    """With a fresh LoRA the KL term is exactly 0 and leaves loss and gradient bit for bit; kl_coeff = 0 never
    asks the reference."""
    policy, record = unet_case(tiny_sd, size=0)
    with_kl = updates_of(policy, DDPO(estimator=estimator, kl_coeff=10.0, kl_gradient="exact"), [record], 10)
    policy.reference = None  # calling it would fail
    without = updates_of(policy, DDPO(estimator=estimator), [record], 10)
    for (loss, grads), (loss_0, grads_0) in zip(with_kl, without, strict=True):
        assert loss == loss_0 and all(torch.equal(a, b) for a, b in zip(grads, grads_0, strict=True))


def test_metrics_say_what_happened(tiny_sd):
    """Before the update the log-ratio is 0 and nothing is clipped; after a move they are the plain means over
    the pairs."""
    for move in (0.0, 0.05):
        policy, record = unet_case(tiny_sd, move=move)
        objective = DDPO(updates_per_epoch=1)
        (update,) = objective.updates(policy, iter([record]), 1000, np.random.default_rng(0))
        ((_, batch),) = update.batches
        metrics = {k: float(v.nanmean()) for k, v in objective.loss(policy, batch)[1].items()}
        if move == 0:
            assert metrics["ddpo/log_ratio_max"] < 2e-5 and metrics["ddpo/clip_fraction"] == 0
        else:
            assert metrics["ddpo/log_ratio_max"] > 1e-3 and metrics["ddpo/approx_kl"] > 0
            assert metrics["ddpo/true_log_ratio_max"] == pytest.approx(D * metrics["ddpo/log_ratio_max"])
            bins = [metrics[f"ddpo/clip_fraction_{name}"] for name in ("early", "middle", "late")]
            sizes = [2, 2, 1]  # 5 steps in thirds: 0-1, 2-3, 4
            assert metrics["ddpo/clip_fraction"] == pytest.approx(np.average(bins, weights=sizes), abs=1e-6)


def test_anchor_in_bf16(tiny_sd):
    """In bf16 the old log-probs are taken again at the micro-batch's shape, so the ratio starts at 1 although
    the rollout ran at another: exactly where the slices are full."""
    policy, record = unet_case(tiny_sd, precision="bf16", n=6)
    objective = DDPO(updates_per_epoch=1)
    (update,) = objective.updates(policy, iter([record]), 3, np.random.default_rng(0))
    worst = max(float(objective.loss(policy, batch)[1]["ddpo/log_ratio_max"]) for _, batch in update.batches)
    assert worst == 0


def test_state_survives_a_checkpoint():
    """The advantages' buffers are the state, and come back."""
    first, second = DDPO(), DDPO()
    first.statistics.standardise(["a", "b", "a"], [1.0, 2.0, 3.0])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.statistics.rewards == first.statistics.rewards


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimator": "ppo"}, "algo.estimator=ppo"),
        ({"clip_scaling": "D"}, "algo.clip_scaling"),
        ({"kl_gradient": "none"}, "algo.kl_gradient"),
        ({"timestep_fraction": 0.0}, "algo.timestep_fraction=0.0"),
        ({"updates_per_epoch": 0}, "algo.updates_per_epoch=0"),
        ({"clip": 0.0}, "algo.clip=0.0"),
        ({"kl_coeff": -1.0}, "kl_coeff=-1.0"),
    ],
)
def test_refusals(options, words):
    """Impossible settings are refused by key and value."""
    with pytest.raises(ValueError, match=words):
        DDPO(**options)
