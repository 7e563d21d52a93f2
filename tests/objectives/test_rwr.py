"""RWR's weights and regression; its population minimiser is proved in test_closed_forms.py."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import noise_key
from alignlab.engine.rollout import rollout
from alignlab.engine.samplers import ddim
from alignlab.objectives.advantages import PromptStatistics
from alignlab.objectives.rwr import RWR, Weighted, _corruption
from tests.conftest import SD_SCHEDULE, key, tiny_policy
from tests.linear_gaussian import LINEAR, World, double, scored
from tests.objectives.updates import distance, unet_case, updates_of


@pytest.mark.parametrize("options", [{"weighting": "dense"}, {"quantile": 0.3}])
def test_micro_batch_size_does_not_matter(tiny_sd, options):
    """Loss and gradient of every update agree to 1e-9 (float64) for micro-batches of 6 samples, 4 and 1."""
    policy, record = unet_case(tiny_sd, exact=True)
    whole = updates_of(policy, RWR(inner_epochs=2, updates_per_epoch=2, **options), [record], 6)
    assert len(whole) == 4
    for size in (4, 1):
        for (loss, grads), (loss_whole, grads_whole) in zip(
            updates_of(policy, RWR(inner_epochs=2, updates_per_epoch=2, **options), [record], size),
            whole,
            strict=True,
        ):
            assert loss == pytest.approx(loss_whole, rel=1e-9) and distance(grads, grads_whole) < 1e-9


def test_dense_weights_by_hand():
    """n softmax(r / tau) over the batch, or within each prompt; mean 1 over each group, whatever constant is
    added to r."""
    prompts, rewards = ("a", "b", "a", "b", "b"), np.array([1.0, 2.0, 3.0, -1.0, 0.5])
    batch = RWR(weighting="dense", scope="batch", temperature=0.7).weights(prompts, rewards)
    np.testing.assert_allclose(batch, 5 * np.exp(rewards / 0.7) / np.exp(rewards / 0.7).sum())
    own = RWR(weighting="dense", scope="prompt", temperature=0.7).weights(prompts, rewards)
    for rows in ([0, 2], [1, 3, 4]):
        np.testing.assert_allclose(
            own[rows], len(rows) * np.exp(rewards[rows] / 0.7) / np.exp(rewards[rows] / 0.7).sum()
        )
    np.testing.assert_allclose(
        RWR(weighting="dense", scope="batch", temperature=0.7).weights(prompts, rewards + 1e4), batch
    )


def test_sparse_weights_by_hand():
    """1 for rewards at or above the quantile of the batch or the prompt, else 0."""
    prompts, rewards = ("a",) * 5 + ("b",) * 5, np.arange(10.0)
    assert RWR(scope="batch", quantile=0.8).weights(prompts, rewards).tolist() == [0] * 8 + [1, 1]
    assert RWR(scope="prompt", quantile=0.5).weights(prompts, rewards).tolist() == [0, 0, 1, 1, 1] * 2


def test_streaming_quantile_by_hand():
    """The quantile runs over the last `streaming` rewards, this epoch's included; where nothing reaches it
    the best sample stands."""
    objective, history = RWR(scope="batch", standardise=False, quantile=0.5, streaming=6), []
    for rewards in ([1.0, 5.0, 3.0, 2.0], [6.0, 7.0, 4.0, 8.0], [0.0, 1.0, 0.5, 0.2]):
        history = [*history, *rewards][-6:]
        expected = [float(r >= np.quantile(history, 0.5)) for r in rewards]
        if not any(expected):
            expected[int(np.argmax(rewards))] = 1.0
        assert objective.weights(("a",) * 4, np.array(rewards)).tolist() == expected
    strict = RWR(scope="batch", standardise=False, quantile=0.5, streaming=8)
    strict.weights(("a",) * 4, np.full(4, 10.0))
    strict.weights(("a",) * 4, np.full(4, 10.0))
    assert strict.weights(("a",) * 3, np.array([1.0, 3.0, 2.0])).tolist() == [0, 1, 0]


def weighted(policy, record, rows, weights, draw):
    return Weighted(
        rollout=record,
        process=ForwardProcess.of(policy.family.scheduler),
        rows=rows,
        weights=weights,
        draw=draw,
    )


def linear_case(n, rewards=None):
    scheduler = DDIMScheduler(**SD_SCHEDULE, set_alpha_to_one=False, steps_offset=1)
    world = World(scheduler).randomise()
    with torch.no_grad():
        record = scored(
            rollout(
                world, double(ddim(scheduler, steps=3, eta=1.0)), noise_key(["p"] * n, seed=0, stream="t")
            ),
            LINEAR,
        )
    return world, record if rewards is None else replace(record, reward=rewards)


def test_effective_sample_size():
    """(sum w)^2 / sum w^2 is logged, and for standardised Gaussian rewards is near n exp(-1/tau^2): 96 % at
    tau 5, 37 % at tau 1."""
    rewards = torch.from_numpy(np.random.default_rng(0).normal(50, 20, size=20_000))
    rewards = rewards.view(5000, 4)[:, 0]
    world, record = linear_case(len(rewards), rewards)
    for tau in (5.0, 1.0):
        objective = RWR(
            weighting="dense", scope="batch", temperature=tau, statistics=PromptStatistics(per_prompt=False)
        )
        next(objective.updates(world, iter([record]), 8, np.random.default_rng(0)))
        z = (rewards.numpy() - rewards.numpy().mean()) / rewards.numpy().std()
        w = np.exp(z / tau)
        ess = objective.epoch_metrics()["rwr/effective_sample_size"]
        assert ess == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-4) and ess / len(z) == pytest.approx(
            np.exp(-1 / tau**2), rel=0.15
        )


def test_loss_by_hand():
    """The loss of a batch is mean w |target - out|^2 on x_t = alpha_t x_0 + sigma_t eps, recomputed sample by
    sample."""
    world, record = linear_case(6)
    rows, weights = torch.tensor([4, 0, 3]), torch.tensor([0.5, 2.0, 1.0])
    loss, _ = RWR().loss(world, weighted(world, record, rows, weights, draw=1))
    t, noise = _corruption(record.noise[rows.tolist()], 1, 1000, torch.empty(3, 1, 1, 2))
    total = 0.0
    for m, row in enumerate(rows.tolist()):
        abar = float(world.family.scheduler.alphas_cumprod[t[m]])
        x_t = abar**0.5 * record.latents[row, -1] + (1 - abar) ** 0.5 * noise[m]
        out = world.predict(x_t[None], t[m : m + 1], record.cond, 1.0)[0]
        total += float(weights[m]) * float((noise[m] - out).detach().square().mean()) / 3
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_corruption_is_keyed_and_uniform():
    """Timestep and noise belong to the sample and the pass: the same in any slice, new in each pass, t
    uniform (chi-square)."""
    whole = noise_key(["a", "b"] * 2000, seed=0, stream="train")
    like = torch.empty(4000, 1, 1, 2)
    t, noise = _corruption(whole, 0, 10, like)
    t_part, noise_part = _corruption(whole[[3999, 7]], 0, 10, like[:2])
    assert torch.equal(t_part, t[[3999, 7]]) and torch.equal(noise_part, noise[[3999, 7]])
    t_next, noise_next = _corruption(whole, 1, 10, like)
    assert (t_next == t).float().mean() < 0.15 and not (noise_next == noise).any()
    assert not (whole.normal(0, (1, 1, 2)) == noise).any()  # nor the rollout's own draws
    chi2 = float(((torch.bincount(t, minlength=10) - 400.0) ** 2 / 400).sum())
    assert t.min() == 0 and t.max() == 9 and chi2 < 30  # 9 degrees of freedom: P(> 30) = 4e-4


def test_zero_weights():
    """Sparse zeros cost no forward pass. Dense weights that underflow still count in the mean: the loss is
    sum w_i e_i / n."""
    world, record = linear_case(10, torch.arange(10.0))
    sparse = RWR(quantile=0.75, standardise=False, inner_epochs=1, updates_per_epoch=1)
    world.rows = 0
    updates_of(world, sparse, [record], 4)
    assert world.rows == 3
    dense = RWR(
        weighting="dense",
        scope="batch",
        temperature=1e-3,
        standardise=False,
        inner_epochs=1,
        updates_per_epoch=1,
    )
    ((loss, _),) = updates_of(world, dense, [record], 4)
    only, _ = dense.loss(
        world, weighted(world, record, rows=torch.tensor([9]), weights=torch.ones(1), draw=0)
    )
    assert loss == pytest.approx(only.item(), rel=1e-6)


def test_inner_epochs_shuffle():
    """Each pass sees each sample once, in a new order and with new noise."""
    world, record = linear_case(12)
    passes = [[], []]
    for k, update in enumerate(
        RWR(weighting="dense", inner_epochs=2, updates_per_epoch=3).updates(
            world, iter([record]), 2, np.random.default_rng(0)
        )
    ):
        for _, batch in update.batches:
            assert batch.draw == k // 3
            passes[k // 3] += batch.rows.tolist()
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(12)) and passes[0] != passes[1]


def test_prediction_is_guided_like_the_rollouts(tiny_sd):
    """Two branches when the rollout's guidance is not 1."""
    policy, seen = tiny_policy(tiny_sd), []
    policy.family.denoiser.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    for guidance in (1.0, 3.0):
        with torch.no_grad():
            record = rollout(
                policy,
                ddim(policy.family.scheduler, steps=2, eta=0.0, guidance_scale=guidance),
                key(2),
                store="image",
            )
            seen.clear()
            RWR().loss(policy, weighted(policy, record, rows=torch.arange(2), weights=torch.ones(2), draw=0))
        assert seen == [2 if guidance == 1 else 4]


def test_state_survives_a_checkpoint():
    """Statistics and the streaming buffer come back, with its length."""
    first, second = (RWR(scope="batch", standardise=False, streaming=5) for _ in range(2))
    first.statistics.standardise(["a", "b"], [1.0, 2.0])
    first.weights(("a",) * 7, np.arange(7.0))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (
        second.recent == first.recent
        and second.recent.maxlen == 5
        and second.statistics.rewards == first.statistics.rewards
    )
    assert second.weights(("a",), np.array([9.0])).tolist() == first.weights(("a",), np.array([9.0])).tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weighting": "soft"}, "algo.weighting=soft"),
        ({"scope": "epoch"}, "algo.scope"),
        ({"temperature": 0.0}, "algo.temperature=0.0"),
        ({"quantile": 1.0}, "algo.quantile=1.0"),
        ({"inner_epochs": 0}, "algo.inner_epochs=0"),
        ({"streaming": 5, "standardise": False}, "algo.streaming=5.*scope=batch"),
        ({"streaming": 5, "scope": "batch"}, "algo.streaming=5.*standardise=false"),
        ({"kl_coeff": 0.1}, "kl_coeff=0.1"),
    ],
)
def test_refusals(options, words):
    """Impossible settings, and a KL term that RWR has not, are refused by key and value."""
    with pytest.raises(ValueError, match=words):
        RWR(**options)
