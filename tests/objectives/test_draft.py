"""DRaFT's bookkeeping: laws of truncation, chunks, the penalty's branch. Its gradients are proved in
test_closed_forms.py."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from alignlab.engine.rollout import rollout
from alignlab.engine.samplers import ddim
from alignlab.objectives.draft import DRaFT
from tests.conftest import key, tiny_policy
from tests.engine.exact import pixels
from tests.objectives.updates import distance

N = 5


def gradient(policy, objective, chunks=([0, 1, 2, 3, 4, 5, 6, 7],), eta=1.0):
    """(loss, gradients) of one update over the rollouts of the given rows, as the train loop does it."""
    sampler = ddim(policy.family.scheduler, steps=N, eta=eta, guidance_scale=2.0)
    rows = sum(len(c) for c in chunks)

    def rollouts():
        for chunk in chunks:
            record = rollout(
                policy,
                sampler,
                key()[chunk],
                gradients=objective.plan(N, np.random.default_rng(0)),
                store="image",
            )
            yield replace(record, reward=pixels(record.images), share=len(chunk) / rows)

    (update,) = objective.updates(policy, rollouts(), 8, np.random.default_rng(0))
    total, grads = 0.0, [torch.zeros_like(p) for p in policy.parameters()]
    for share, batch in update.batches:
        loss, _ = objective.loss(policy, batch)
        for g, new in zip(grads, torch.autograd.grad(loss, policy.parameters()), strict=True):
            g += share * new
        total += share * loss.item()
    return total, grads


@pytest.mark.parametrize(
    "options",
    [
        {"k": 2},
        {"k": 2, "kl_coeff": 0.5},
        {"k": 1, "lv_samples": 2},
        {"k": 3, "kl_coeff": 0.1, "kl": "trajectory"},
    ],
)
def test_rollout_chunks_do_not_matter(tiny_sd, options):
    """One rollout of 8 samples, or 3 + 3 + 2: the same loss and gradient to 1e-5."""
    policy = tiny_policy(tiny_sd)
    loss, grads = gradient(policy, DRaFT(**options))
    loss_parts, grads_parts = gradient(policy, DRaFT(**options), ([0, 1, 2], [3, 4, 5], [6, 7]))
    assert loss_parts == pytest.approx(loss, rel=1e-5) and distance(grads_parts, grads) < 1e-5


def test_draftp_at_kl_coeff_0_is_draft(tiny_sd, monkeypatch):
    """kl_coeff = 0 equals DRaFT bit for bit, whatever the penalty's other keys, and never evaluates the
    reference."""
    policy = tiny_policy(tiny_sd)
    loss, grads = gradient(policy, DRaFT(k=2))
    monkeypatch.setattr(policy, "reference", None)  # calling it would fail
    loss_0, grads_0 = gradient(policy, DRaFT(k=2, kl_coeff=0.0, kl="trajectory", ref_grad="none"))
    assert loss == loss_0 and all(torch.equal(a, b) for a, b in zip(grads, grads_0, strict=True))


@pytest.mark.parametrize("kl", ["eps_guided", "eps_conditional", "trajectory"])
def test_penalty_is_exactly_0_at_the_start(tiny_sd, kl):
    """With a fresh LoRA the penalty adds exactly 0 to loss and gradient."""
    policy = tiny_policy(tiny_sd, size=0)
    loss, grads = gradient(policy, DRaFT(k=3))
    loss_kl, grads_kl = gradient(policy, DRaFT(k=3, kl_coeff=100.0, kl=kl))
    assert loss == loss_kl and all(torch.equal(a, b) for a, b in zip(grads, grads_kl, strict=True))


def test_penalty_by_hand(tiny_sd):
    """Away from the start it is kl_coeff times the plain mean of (eps - eps_ref)^2 over the kept steps,
    recomputed one by one."""
    policy = tiny_policy(tiny_sd)
    sampler = ddim(policy.family.scheduler, steps=N, eta=1.0, guidance_scale=2.0)
    objective = DRaFT(k=2, kl_coeff=3.0)
    with torch.no_grad():
        record = rollout(policy, sampler, key(3), gradients=objective.plan(N, np.random.default_rng(0)))
        record = replace(record, reward=pixels(record.images))
        total = 0.0
        for i in (N - 2, N - 1):
            x, t = record.latents[:, i], sampler.timesteps[i].expand(3)
            abar = policy.family.scheduler.alphas_cumprod[sampler.timesteps[i]]
            mine = policy.predict(x, t, record.cond, 2.0)
            with policy.reference():
                base = policy.predict(x, t, record.cond, 2.0)
            eps = [abar**0.5 * v + (1 - abar) ** 0.5 * x for v in (mine, base)]
            total += float((eps[0] - eps[1]).square().mean()) / 2
        loss, metrics = objective.loss(policy, record)
    assert float(loss) == pytest.approx(float(-record.reward.mean()) + 3 * total, rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(total, rel=1e-5)


def test_one_graph_at_a_time(tiny_sd):
    """An update turns each rollout into a micro-batch as it comes: when the third is sampled, the first has
    been freed."""
    policy, alive = tiny_policy(tiny_sd), []
    objective, sampler = DRaFT(k=1), ddim(policy.family.scheduler, steps=2, eta=0.0)

    def rollouts():
        for i in range(3):
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1
            record = rollout(
                policy, sampler, key(8)[[i]], gradients=objective.plan(2, np.random.default_rng(0))
            )
            record = replace(record, reward=pixels(record.images))
            alive.append(weakref.ref(record.images))
            yield record

    (update,) = objective.updates(policy, rollouts(), 1, np.random.default_rng(0))
    for _, batch in update.batches:
        objective.loss(policy, batch)[0].backward()
    assert len(alive) == 3


def test_truncation_laws():
    """fixed keeps the last K, spaced every N/K-th up to the last; per_rollout draws K ~ U{1..N}; per_step
    keeps step i with probability (i+1)/(N+1), never nothing (4 standard errors over 20,000 draws)."""
    rng, n, draws = np.random.default_rng(0), 6, 20_000
    assert DRaFT(k=2).plan(n, rng).steps == (4, 5) and DRaFT(k=None).plan(n, rng).steps == (0, 1, 2, 3, 4, 5)
    assert DRaFT(truncation="spaced", k=3).plan(n, rng).steps == (1, 3, 5) and DRaFT(
        truncation="spaced", k=4
    ).plan(7, rng).steps == (0, 2, 4, 6)
    plans = [DRaFT(truncation="per_rollout", k=9).plan(n, rng).steps for _ in range(draws)]
    assert all(steps == tuple(range(n - len(steps), n)) for steps in plans)
    share = np.bincount([len(steps) for steps in plans], minlength=n + 1)[1:] / draws
    assert np.abs(share - 1 / n).max() < 4 * np.sqrt(1 / n / draws)

    plans = [DRaFT(truncation="per_step").plan(n, rng).steps for _ in range(draws)]
    kept = np.array([[i in steps for i in range(n)] for steps in plans]).mean(0)
    law = np.arange(1, n + 1) / (n + 1)
    law[-1] += np.prod(1 - law)  # an empty draw keeps the last step
    assert np.abs(kept - law).max() < 4 * np.sqrt(0.25 / draws)
    assert all(steps for steps in plans) and any(
        steps != tuple(range(steps[0], n)) for steps in plans
    )  # gaps appear

    plans = [DRaFT(k=4, refl=True).plan(n, rng) for _ in range(draws)]
    assert all(plan.steps == (plan.stop,) for plan in plans)
    share = np.bincount([plan.stop for plan in plans], minlength=n) / draws
    assert not share[:2].any() and np.abs(share[2:] - 0.25).max() < 4 * np.sqrt(0.25 / draws)


def test_reward_cap(tiny_sd):
    """relu(c - r): samples above the cap pull no more, and the share of them is logged."""
    policy = tiny_policy(tiny_sd)
    record = rollout(policy, ddim(policy.family.scheduler, steps=2, eta=0.0), key(3))
    reward = torch.tensor([0.2, 1.5, 0.7], requires_grad=True)
    loss, metrics = DRaFT(reward_cap=1.0).loss(policy, replace(record, reward=reward))
    (slope,) = torch.autograd.grad(loss, reward)
    assert loss.item() == pytest.approx((0.8 + 0 + 0.3) / 3)
    torch.testing.assert_close(slope, torch.tensor([-1.0, 0.0, -1.0]) / 3)
    assert float(metrics["draft/capped"]) == pytest.approx(1 / 3)


def test_lv_terms_weigh_alike():
    """All 1 + n images of DRaFT-LV are predicted x0; without it the image is x_N."""
    plans = [DRaFT(lv_samples=n).plan(5, np.random.default_rng(0)) for n in (0, 2)]
    assert [(p.x0_image, p.renoise) for p in plans] == [(False, 0), (True, 2)]


def test_lv_reduction(tiny_sd):
    """ "sum", the paper's, is 1 + n times the mean."""
    policy = tiny_policy(tiny_sd)
    mean, total = (gradient(policy, DRaFT(k=1, lv_samples=2, lv_reduction=r)) for r in ("mean", "sum"))
    assert total[0] == pytest.approx(3 * mean[0], rel=1e-6)
    assert distance([g / 3 for g in total[1]], mean[1]) < 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "algo.k=0"),
        ({"k": 2, "lv_samples": 2}, "algo.lv_samples=2"),
        ({"refl": True, "lv_samples": 1}, "algo.lv_samples=1"),
        ({"truncation": "random"}, "algo.truncation"),
        ({"refl": True, "truncation": "spaced"}, "algo.truncation=spaced"),
        ({"kl": "kl"}, "algo.kl="),
        ({"reward_on": "x0"}, "algo.reward_on"),
        ({"kl_coeff": -0.1}, "kl_coeff=-0.1"),
    ],
)
def test_refusals(options, words):
    """Impossible settings are refused by key and value; so is K > N as soon as N is known."""
    with pytest.raises(ValueError, match=words):
        DRaFT(**options)
    with pytest.raises(ValueError, match=r"algo.k=6 exceeds sampler.steps=5"):
        DRaFT(k=6).plan(5, np.random.default_rng(0))


def test_trajectory_kl_needs_a_density(tiny_sd):
    """kl=trajectory declares that it needs noise, and refuses steps without any."""
    assert DRaFT(kl_coeff=1.0, kl="trajectory").needs_noise and not DRaFT(kl_coeff=1.0).needs_noise
    with pytest.raises(ValueError, match=r"sampler.eta"):
        gradient(tiny_policy(tiny_sd), DRaFT(k=1, kl_coeff=1.0, kl="trajectory"), eta=0.0)
