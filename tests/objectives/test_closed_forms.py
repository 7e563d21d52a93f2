"""Every estimator against its exact value in the linear-Gaussian world (ALGORITHMS.md sections 3 and 5).

Monte-Carlo statements compare the mean of independent batches with the closed form in standard errors:
|z| < 4.5 for each of up to 24 parameters (a false alarm in 10^4 seeds; the seeds are fixed), and the exact
value is many standard errors from 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from alignlab.engine.distance_to_base import drift
from alignlab.engine.noise import noise_key
from alignlab.engine.rollout import Gradients, Rollout, rollout
from alignlab.engine.samplers import Sampler, ddim, flow
from alignlab.objectives.advantages import PromptStatistics
from alignlab.objectives.ddpo import DDPO
from alignlab.objectives.dpo import DPO, ImagePairs
from alignlab.objectives.draft import DRaFT
from alignlab.objectives.kto import KTO, Judged
from alignlab.objectives.regression import Examples
from alignlab.objectives.rwr import RWR
from alignlab.objectives.sft import SFT
from tests.conftest import SD_SCHEDULE
from tests.linear_gaussian import (
    COVARIANCE,
    DELTA,
    LINEAR,
    MEAN,
    QUADRATIC,
    D,
    Reward,
    World,
    double,
    draws,
    scored,
    z_scores,
)
from tests.running import pairs

REWARDS = pytest.mark.parametrize("reward", [LINEAR, QUADRATIC], ids=["linear", "quadratic"])
KINDS = pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
N, LIMIT = 4, 4.5


def world_of(
    kind: str, *, eta: float = 1.0, guidance: float = 1.0, to_one: bool = False, bias_only: bool = False
) -> tuple[World, Sampler]:
    """N steps, a correction for each, away from the reference. v prediction is guided."""
    if kind == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
        sampler = flow(scheduler, steps=N, eta=eta, guidance_scale=guidance)
    else:
        scheduler = DDIMScheduler(
            **SD_SCHEDULE, prediction_type=kind, set_alpha_to_one=to_one, steps_offset=1
        )
        sampler = ddim(scheduler, steps=N, eta=eta, guidance_scale=guidance)
    return World(scheduler, sampler.timesteps, bias_only=bias_only).randomise(), double(sampler)


def sampled(world: World, sampler: Sampler, reward: Reward, n: int, seed: int = 0) -> Rollout:
    with torch.no_grad():
        return scored(rollout(world, sampler, draws(n, seed)), reward)


def gradients(world: World, objective: DDPO | RWR, record: Rollout, batches: int) -> list[Sequence[Tensor]]:
    """The gradient of each micro-batch of the one update of an epoch."""
    pairs = len(record) * (int(record.sampler.scored.sum()) if isinstance(objective, DDPO) else 1)
    (update,) = objective.updates(world, iter([record]), pairs // batches, np.random.default_rng(0))
    return [
        torch.autograd.grad(objective.loss(world, batch)[0], world.parameters())
        for _, batch in update.batches
    ]


class Raw(PromptStatistics):
    """Advantages r - const: standardising with the batch's statistics is biased, and no part of the claim."""

    def standardise(self, prompts: Sequence[str], rewards: np.ndarray) -> np.ndarray:
        return rewards - 0.3

    def own_share(self, prompts: Sequence[str]) -> float:
        return 0.0


def ddpo(estimator: str, **options) -> DDPO:
    return DDPO(estimator=estimator, updates_per_epoch=1, advantage_clip=1e9, statistics=Raw(), **options)


def draft_gradients(
    world: World, sampler: Sampler, objective: DRaFT, reward: Reward, *, batches: int = 60, size: int = 1500
) -> list[Sequence[Tensor]]:
    plan, out = objective.plan(N, np.random.default_rng(0)), []
    for seed in range(batches):
        record = scored(rollout(world, sampler, draws(size, seed), gradients=plan, store="image"), reward)
        out.append(torch.autograd.grad(objective.loss(world, record)[0], world.parameters()))
    return out


def expected(
    world: World, sampler: Sampler, reward: Reward, *, frozen: int = 0
) -> Callable[[Tensor, Tensor], Tensor]:
    """(W, omega) -> E[r]; the first `frozen` steps are held fixed."""
    return lambda W, omega: reward.expected(*world.chain(sampler, W, omega, frozen=frozen)[-1])


def agree(batches: Sequence[Sequence[Tensor]], exact: Sequence[Tensor], *, power: float = 20.0) -> None:
    z, strength = z_scores(batches, exact)
    assert z.abs().max() < LIMIT, z
    assert strength.abs().max() > power, strength


# -- the chain


@KINDS
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_rollout_mean_and_covariance(kind, guidance):
    """A rollout's latents have, at every step, the mean and covariance of the affine recursion (guidance and
    flow included)."""
    world, sampler = world_of(kind, guidance=guidance, eta=0.7)
    record = sampled(world, sampler, LINEAR, 200_000)
    for i, (mean, covariance) in enumerate(world.chain(sampler, world.W, world.omega)):
        x = record.latents[:, i].flatten(1)
        second = torch.stack([x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1]], 1)
        exact = covariance + mean[:, None] * mean
        for values, truth in ((x, mean), (second, torch.stack([exact[0, 0], exact[1, 1], exact[0, 1]]))):
            z = (values.mean(0) - truth.detach()) / (values.std(0) / len(x) ** 0.5)
            assert z.abs().max() < LIMIT


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_exact_denoiser_samples_the_data(prediction):
    """Without correction DDIM at eta 1 ends at the data's own mean and covariance, at first order in 1/N: G
    and h are exact."""
    scheduler = DDIMScheduler(
        **SD_SCHEDULE | {"beta_end": 0.03}, prediction_type=prediction, timestep_spacing="trailing"
    )
    world, gap = World(scheduler), {}
    for steps in (250, 1000):
        sampler = double(ddim(scheduler, steps=steps, eta=1.0))
        mean, covariance = (v.detach() for v in world.chain(sampler, world.W, world.omega)[-1])
        gap[steps] = max(float((mean - MEAN).abs().max()), float((covariance - COVARIANCE).abs().max()))
    assert gap[1000] < 0.01 and gap[1000] < 0.3 * gap[250]


# -- DDPO


@REWARDS
@KINDS
@pytest.mark.parametrize("estimator", ["sf", "is"])
def test_ddpo_gradient(estimator, kind, reward):
    """E[grad L] = -grad E[r] / (N_s D), for the score function and for importance sampling at rho = 1, with A
    = r - const."""
    world, sampler = world_of(kind, guidance=2.0 if kind == "v_prediction" else 1.0)
    record = sampled(world, sampler, reward, 100_000)
    batches = gradients(world, ddpo(estimator), record, 50)
    value = expected(world, sampler, reward)
    agree(batches, world.gradient(lambda W, omega: -value(W, omega) / (N * D)))


def test_ddpo_loses_only_the_gradient_of_a_step_without_density():
    """With set_alpha_to_one the last step has s = 0 and b != 0: its parameters get no gradient although E[r]
    depends on them; the others get theirs over N_s = N - 1."""
    world, sampler = world_of("epsilon", to_one=True)
    record = sampled(world, sampler, QUADRATIC, 100_000)
    batches = gradients(world, ddpo("sf"), record, 50)
    value = expected(world, sampler, QUADRATIC)
    exact = world.gradient(lambda W, omega: -value(W, omega) / ((N - 1) * D))
    assert all(g[-1].abs().max() > 1e-3 for g in exact) and all(
        g[-1].abs().max() == 0 for batch in batches for g in batch
    )
    agree([[g[:-1] for g in batch] for batch in batches], [g[:-1] for g in exact])


@KINDS
@pytest.mark.parametrize("estimator", ["sf", "is"])
def test_ddpo_kl_gradient(estimator, kind):
    """With kl_gradient="exact" the expected gradient is that of (-E[r] + kl_coeff sum_i KL_i) / (N_s D): the
    direct term and the advantages' A_i - kl_coeff sum_{j>i} KL_j together. "direct" alone is biased."""
    world, sampler = world_of(kind, guidance=1.5 if kind == "v_prediction" else 1.0, eta=0.7)
    record = sampled(world, sampler, LINEAR, 100_000)
    beta, value = 0.7, expected(world, sampler, LINEAR)
    exact = world.gradient(
        lambda W, omega: (-value(W, omega) + beta * world.kls(sampler, W, omega).sum()) / (N * D)
    )
    agree(gradients(world, ddpo(estimator, kl_coeff=beta, kl_gradient="exact"), record, 50), exact)
    z, _ = z_scores(gradients(world, ddpo(estimator, kl_coeff=beta), record, 50), exact)
    assert z.abs().max() > 2 * LIMIT
    penalty = ddpo(estimator, kl_coeff=beta)
    (update,) = penalty.updates(world, iter([record]), len(record) * N, np.random.default_rng(0))
    kl = next(penalty.loss(world, batch)[1]["kl"] for _, batch in update.batches)
    assert float(kl) == pytest.approx(
        float(world.kls(sampler, world.W, world.omega).detach().mean()) / D, rel=0.02
    )


# -- DRaFT


@REWARDS
@KINDS
@pytest.mark.parametrize("k", [1, 2, N])
def test_draft_gradient(k, kind, reward):
    """E[grad DRaFT-N] = -grad E[r]; DRaFT-K's is the exact gradient with the first N - K steps held fixed."""
    world, sampler = world_of(kind, guidance=2.0 if kind == "v_prediction" else 1.0)
    exact = world.gradient(lambda W, omega: -expected(world, sampler, reward, frozen=N - k)(W, omega))
    if k < N:  # truncation, per-step form: the rows before N - K get nothing
        assert all(g[: N - k].abs().max() == 0 and g[N - k :].abs().max() > 1e-3 for g in exact)
    agree(draft_gradients(world, sampler, DRaFT(k=k), reward), exact)


@REWARDS
@pytest.mark.parametrize("k", [1, 3, N])
@pytest.mark.parametrize("reward_on", ["x_N", "pred_x0"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_draft_k_is_the_finite_difference_of_the_last_k_steps(eta, reward_on, k, reward):
    """Noise draw by noise draw: with one theta shared by all steps, DRaFT-K equals finite differences that
    move theta in the last K steps only, x_{N-K} frozen."""
    steps, sampler = world_of("epsilon", eta=eta, to_one=True)
    shared = World(steps.family.scheduler).randomise()
    objective, noise = DRaFT(k=k, reward_on=reward_on), draws(3)
    plan = objective.plan(N, np.random.default_rng(0))
    grads = torch.autograd.grad(
        objective.loss(shared, scored(rollout(shared, sampler, noise, gradients=plan), reward))[0],
        shared.parameters(),
    )

    def loss(theta: list[Tensor]) -> float:
        for p, base, moved in zip(steps.parameters(), shared.parameters(), theta, strict=True):
            p.data = torch.cat(
                [base.detach().expand(N - k, *base.shape[1:]), moved.expand(k, *moved.shape[1:])]
            )
        with torch.no_grad():
            return float(
                objective.loss(steps, scored(rollout(steps, sampler, noise, gradients=plan), reward))[0]
            )

    h = 1e-5
    for which, grad in enumerate(grads):
        for index in np.ndindex(*grad.shape):
            up, down = ([p.detach().clone() for p in shared.parameters()] for _ in range(2))
            up[which][index] += h
            down[which][index] -= h
            assert float(grad[index]) == pytest.approx((loss(up) - loss(down)) / (2 * h), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(
    "plan",
    [
        Gradients(steps=(0, 2, 3)),
        Gradients(steps=(1,)),
        Gradients(steps=(0, 1, 2, 3), detach_input=True),
        Gradients(steps=(1, 3), detach_input=True, x0_image=True),
        Gradients(steps=(2,), stop=2),
        Gradients(steps=(0, 1, 2), stop=2),
    ],
    ids=str,
)
def test_gaps_detached_inputs_and_stops_by_hand(plan):
    """AlignProp's gaps, DRTune's detached inputs and ReFL's stop are the dumbest loop with .detach() where
    the method says so."""
    world, sampler = world_of("epsilon")
    noise = draws(3)
    record = rollout(world, sampler, noise, gradients=plan)
    x = noise.normal(-1, (1, 1, D)).flatten(1)
    for i in range(N):
        (gain,), (constant,) = world.exact(sampler.timesteps[i : i + 1])
        seen = x.detach() if plan.detach_input else x
        out = seen @ (gain + world.W[i]).T + constant + world.omega[i]
        if i not in plan.steps:
            out = out.detach()
        x0 = sampler.p[i] * x + sampler.q[i] * out
        x = sampler.a[i] * x + sampler.b[i] * out + sampler.s[i] * noise.normal(i, (1, 1, D)).flatten(1)
        if i < plan.steps[0]:
            x = x.detach()
        if i == plan.stop:
            break
    image = x0 if plan.x0_image or plan.stop is not None else x
    torch.testing.assert_close(record.images.flatten(1), image, rtol=1e-12, atol=1e-12)
    mine = torch.autograd.grad(QUADRATIC(record.images).sum(), world.parameters())
    torch.testing.assert_close(
        mine, torch.autograd.grad(QUADRATIC(image).sum(), world.parameters()), rtol=1e-10, atol=1e-12
    )


def test_a_no_op_last_step_is_refused():
    """t = 0 without set_alpha_to_one makes the last step a no-op (b = 0): DRaFT-1 on x_N would have no
    gradient and is refused; on the predicted x0, or with K = 2, it has one."""
    scheduler = DDIMScheduler(**SD_SCHEDULE, set_alpha_to_one=False)
    sampler = double(ddim(scheduler, steps=N, eta=1.0))
    world = World(scheduler, sampler.timesteps).randomise()
    with pytest.raises(ValueError, match="no-op"):
        draft_gradients(world, sampler, DRaFT(k=1), LINEAR, batches=1, size=2)
    for objective in (DRaFT(k=1, reward_on="pred_x0"), DRaFT(k=2)):
        ((_, omega),) = draft_gradients(world, sampler, objective, LINEAR, batches=1, size=2)
        assert omega.abs().max() > 1e-3


def test_draft_lv_mean_and_variance():
    """DRaFT-LV: the re-noised terms have the mean of DRaFT-1's closed form (on the predicted x0) with x ~
    N(alpha E x_0, alpha^2 Var x_0 + sigma^2 I), which is not DRaFT-1's; given x_0 they are independent, so
    the variance of their mean is 1/n."""
    world, sampler = world_of("epsilon")
    last, b = N - 1, 60_000
    objective = DRaFT(k=1, lv_samples=2)
    plan = objective.plan(N, np.random.default_rng(0))
    batches = []
    for seed in range(40):
        record = rollout(world, sampler, draws(b // 40, seed), gradients=plan, store="image")
        batches.append(
            torch.autograd.grad(QUADRATIC(record.images[record.samples :]).mean(), world.parameters())
        )

    def renoised(W, omega):
        mean, covariance = (v.detach() for v in world.chain(sampler, W, omega)[-1])
        A, c = world.affine(sampler, W, omega, last, onto="x0")
        level = sampler.alpha[last] ** 2 * covariance + sampler.sigma[last] ** 2 * torch.eye(
            D, dtype=torch.float64
        )
        return QUADRATIC.expected(A @ (sampler.alpha[last] * mean) + c, A @ level @ A.T)

    agree(batches, world.gradient(renoised))
    z, _ = z_scores(batches, world.gradient(expected(world, sampler, QUADRATIC, frozen=last)))
    assert z.abs().max() > 2 * LIMIT

    variance = {}
    for n in (1, 2, 8):  # all rows share one x_0; a row's gradient with respect to omega is q dr/dx
        record = rollout(
            world, sampler, _same_x0(draws(b)), gradients=replace(plan, renoise=n), store="image"
        )
        assert record.images[:b].std(0).max() == 0
        (slope,) = torch.autograd.grad(QUADRATIC(record.images).sum(), record.images)
        copies = (sampler.q[last] * slope[b:]).view(n, b, D)
        assert copies[0].std(0).min() > 1e-4
        variance[n] = n * copies.mean(0).var(0)
        if n == 2:
            correlation = torch.stack([torch.corrcoef(copies[:, :, d])[0, 1] for d in range(D)])
            assert correlation.abs().max() < LIMIT / b**0.5
    for n in (2, 8):
        assert ((variance[n] / variance[1]) - 1).abs().max() < LIMIT * (4 / b) ** 0.5


def _same_x0(noise):
    """Draws whose sampler noise is the same for every row (so one x_0), and whose re-noising is not."""

    class Same(type(noise)):
        def normal(self, step, shape, device="cpu"):
            fresh = super().normal(step, shape, device)
            return fresh if step >= N else fresh[:1].expand_as(fresh)

    return Same(**noise.__dict__)


def test_draft_lv_with_no_samples_is_draft_1_and_averages_otherwise():
    """lv_samples = 0 equals DRaFT-1; with n the loss is the mean over the predicted x0 of the sample and of
    its n renoised copies."""
    world, sampler = world_of("epsilon")
    (plain,), (none,) = (
        draft_gradients(world, sampler, objective, QUADRATIC, batches=1, size=5)
        for objective in (DRaFT(k=1), DRaFT(k=1, lv_samples=0))
    )
    torch.testing.assert_close(plain, none, rtol=0, atol=0)
    (first,) = draft_gradients(world, sampler, DRaFT(k=1, reward_on="pred_x0"), QUADRATIC, batches=1, size=5)
    (three,) = draft_gradients(world, sampler, DRaFT(k=1, lv_samples=2), QUADRATIC, batches=1, size=5)
    record = rollout(world, sampler, draws(5), gradients=Gradients(steps=(N - 1,), renoise=2))
    assert record.samples == 5 and len(record) == 15
    renoised = torch.autograd.grad(-QUADRATIC(record.images[5:]).mean(), world.parameters())
    for whole, one, rest in zip(three, first, renoised, strict=True):
        torch.testing.assert_close(whole, (one + 2 * rest) / 3)


# -- DRaFT+


@KINDS
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_drift_values(kind, guidance):
    """drift() measures E of each distance: guided eps-MSE, its conditional form (1/w^2 of it when the other
    branch stays), and the trajectory KL per dimension and step."""
    world, sampler = world_of(kind, guidance=guidance, eta=0.7)
    with torch.no_grad():
        record = rollout(world, sampler, draws(100_000), gradients=Gradients.last(3, N))
        found = drift(world, record)
        eps = world.eps_errors(sampler, world.W, world.omega)[1:].mean()
        kl = world.kls(sampler, world.W, world.omega)[1:].mean() / D
    assert float(found.eps_guided) == pytest.approx(float(eps), rel=0.01)
    assert float(found.eps_conditional) == pytest.approx(float(eps) / guidance**2, rel=0.01)
    assert float(found.trajectory) == pytest.approx(float(kl), rel=0.01)


@KINDS
@pytest.mark.parametrize("k", [1, 3, N])
@pytest.mark.parametrize("kl", ["eps_guided", "trajectory"])
def test_draftp_optimum_of_a_bias(kl, k, kind):
    """Bias-only corrections, linear reward: the gradient vanishes, draw by draw, exactly at the predicted
    optimum omega_i = K D g_i / (2 kl_coeff kappa_i^2) (eps-MSE), omega_i = g_i / (beta b_i^2/s_i^2) with beta
    = kl_coeff/(K D) (trajectory), and kl_coeff times larger moves it kl_coeff times nearer."""
    kept = slice(N - k, N)
    for coeff in (0.5, 2.0):
        world, sampler = world_of(kind, eta=0.7, bias_only=True)
        world.W.zero_()
        (g,) = world.gradient(
            expected(world, sampler, LINEAR, frozen=N - k)
        )  # omega does not enter: E[r] is linear in it
        kappa = sampler.alpha * sampler.q / sampler.sigma
        weight = 2 * kappa**2 if kl == "eps_guided" else (sampler.b / sampler.s) ** 2
        if kind == "flow" and kl == "eps_guided" and k == N:
            # sigma = 1: eps is x itself, whatever the velocity, so this step is not penalised; leave it out
            g[0], weight[0] = 0, 1
        optimum = torch.zeros_like(g)
        optimum[kept] = (k * D * g / (coeff * weight[:, None]))[kept]
        world.omega.data = optimum
        ((grad,),) = draft_gradients(
            world, sampler, DRaFT(k=k, kl_coeff=coeff, kl=kl), LINEAR, batches=1, size=4
        )
        ((alone,),) = draft_gradients(world, sampler, DRaFT(k=k), LINEAR, batches=1, size=4)
        free = slice(1, N) if kind == "flow" and kl == "eps_guided" and k == N else kept
        torch.testing.assert_close(
            grad[free], torch.zeros_like(grad[free]), rtol=0, atol=1e-6 * float(alone.abs().max())
        )
        assert alone[free].abs().max() > 1e-3


@pytest.mark.parametrize("kl", ["eps_guided", "trajectory"])
@pytest.mark.parametrize("k", [2, N])
def test_draftp_optimum_needs_the_references_input_gradient(k, kl):
    """Quadratic reward, full affine correction: at the numeric optimum of the exact (truncated) objective the
    expected gradient is 0 with ref_grad="input", and is not with the published "none"."""
    world, sampler = world_of("epsilon")
    coeff, frozen = 0.5, N - k

    def objective(W, omega):
        if kl == "eps_guided":
            penalty = world.eps_errors(sampler, W, omega, frozen=frozen)[frozen:].mean()
        else:
            chain = world.chain(sampler, W, omega, frozen=frozen)[:-1]
            rate = (sampler.b / sampler.s) ** 2 / 2 / D
            penalty = torch.stack(
                [rate[i] * world._squared(sampler, W, omega, i, *chain[i]) for i in range(frozen, N)]
            ).mean()
        return -expected(world, sampler, QUADRATIC, frozen=frozen)(W, omega) + coeff * penalty

    solver = torch.optim.LBFGS(
        world.parameters(),
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        solver.zero_grad()
        value = objective(world.W, world.omega)
        value.backward()
        return value

    solver.step(closure)
    exact = world.gradient(objective)
    assert max(float(g.abs().max()) for g in exact) < 1e-7
    assert max(float(p.detach().abs().max()) for p in world.parameters()) > 0.05  # it moved
    options = {"k": k, "kl_coeff": coeff, "kl": kl}
    z, _ = z_scores(draft_gradients(world, sampler, DRaFT(**options), QUADRATIC), exact)
    assert z.abs().max() < LIMIT, z
    z, _ = z_scores(draft_gradients(world, sampler, DRaFT(**options, ref_grad="none"), QUADRATIC), exact)
    assert z.abs().max() > 2 * LIMIT, z


# -- RWR


@REWARDS
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_rwr_population_minimiser(prediction, guidance, reward):
    """One iteration with dense weights at raw temperature tau is minimised, at every training timestep, by
    the exact denoiser of p exp(r / tau), where p is the policy's own output: the gradient vanishes there, and
    not at the policy."""
    scheduler = DDIMScheduler(
        num_train_timesteps=8,
        beta_start=0.1,
        beta_end=0.6,
        clip_sample=False,
        prediction_type=prediction,
        set_alpha_to_one=False,
    )
    sampler, tau, b = double(ddim(scheduler, steps=4, eta=1.0, guidance_scale=guidance)), 1.5, 40_000
    world = World(scheduler, torch.arange(8)).randomise(0.05)
    record = replace(sampled(world, sampler, reward, b), noise=noise_key([""] * b, seed=0, stream="train"))
    with torch.no_grad():
        mean, covariance = world.chain(sampler, world.W, world.omega)[-1]
    precision = torch.linalg.inv(covariance)
    tilted = torch.linalg.inv(precision + reward.A / tau)
    centre = tilted @ (precision @ mean + (reward.A @ reward.target + reward.w) / tau)

    def place(m, c):
        (G, h), (base_G, base_h) = world.exact(torch.arange(8), m, c), world.exact(torch.arange(8))
        world.W.data = (G - base_G) / guidance
        world.omega.data = (h - base_h - (1 - guidance) * DELTA) / guidance

    options = {
        "weighting": "dense",
        "scope": "batch",
        "standardise": False,
        "inner_epochs": 1,
        "updates_per_epoch": 1,
    }
    zero = [torch.zeros_like(p) for p in world.parameters()]
    place(centre, tilted)
    z, _ = z_scores(gradients(world, RWR(temperature=tau, **options), record, 40), zero)
    assert z.abs().max() < LIMIT, z
    place(mean, covariance)  # self-imitation: the minimiser without weights
    z, _ = z_scores(gradients(world, RWR(temperature=tau, **options), record, 40), zero)
    assert z.abs().max() > 2 * LIMIT, z
    ess = RWR(temperature=1e6, **options).weights(record.prompts, record.reward.numpy())
    assert float(ess.std()) < 1e-4  # and with tau -> infinity the weights are gone


# -- images of one's own: DPO, KTO, SFT

WON, LOST = (
    MEAN + torch.tensor([0.5, 0.3], dtype=torch.float64),
    MEAN - torch.tensor([0.2, 0.6], dtype=torch.float64),
)
"""Means of the images that people preferred, and of those that they did not; both have the model's own
covariance."""
LEVELS = pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])


def levels_of(kind: str) -> World:
    """Eight training timesteps, with a correction for each, at the reference."""
    scheduler = DDIMScheduler(
        num_train_timesteps=8,
        beta_start=0.1,
        beta_end=0.6,
        clip_sample=False,
        prediction_type=kind,
        set_alpha_to_one=False,
    )
    return World(scheduler, torch.arange(8))


def images_of(means: Sequence[Tensor], m: int, seed: int, covariance: Tensor = COVARIANCE) -> Tensor:
    """[S, m, 1, 1, D] of N(mean, covariance), one row of images for each mean."""
    z = torch.randn(len(means), m, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (torch.stack([*means])[:, None] + z @ torch.linalg.cholesky(covariance).T)[:, :, None, None]


def exact_slope(world: World, mean: Tensor) -> list[Tensor]:
    """The gradient, at the reference, of E[e] for images of N(mean, COVARIANCE). The residual target - out
    has the mean h' - h, of the exact denoisers of those images and of the model's, and is uncorrelated with
    x_t: e = residual^2/D, at each of 8 timesteps."""
    (_, there), (_, here) = (world.exact(torch.arange(8), m, COVARIANCE) for m in (mean, MEAN))
    residual, x_t = there - here, world.process.alpha.double()[:, None] * mean
    return [-2 / D / 8 * residual[:, :, None] * x_t[:, None], -2 / D / 8 * residual]


@LEVELS
@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_first_gradients_of_preferences(kind, algorithm, tmp_path):
    """At the reference the gradient of both is that of two regressions: beta/4 (grad E[e of winners] - grad
    E[e of losers]) for DPO, beta/4 times the halves that are desirable and undesirable for KTO, weighted by
    lambda."""
    world, beta, table = levels_of(kind), 3.0, pairs(tmp_path)
    up, down = exact_slope(world, WON), exact_slope(world, LOST)
    found, m = [], 1500
    for seed in range(40):
        latents, prompts, noise = images_of((WON, LOST), m, seed), ("",) * m, draws(m, seed)
        if algorithm == "dpo":
            batch = ImagePairs(process=world.process, latents=latents, prompts=prompts, noise=noise)
            objective, exact = (
                DPO(data=table, beta=beta),
                [beta / 4 * (a - b) for a, b in zip(up, down, strict=True)],
            )
        else:
            objective, good = KTO(data=table, beta=beta, lambda_u=0.5), torch.arange(m) % 2 == 0
            mixed = torch.where(good[:, None, None, None], latents[0], latents[1])[None]
            batch = Judged(
                process=world.process,
                latents=mixed,
                prompts=prompts,
                noise=noise,
                desirable=good,
                reference=torch.empty(0),
                z0=0.0,
            )
            ((_, batch),) = objective._measured(world, [(1.0, batch)])
            exact = [beta / 4 * (a - 0.5 * b) / 2 for a, b in zip(up, down, strict=True)]
        loss, _ = objective.loss(world, batch)
        assert loss.item() == pytest.approx(np.log(2) if algorithm == "dpo" else (1 + 0.5) / 4)
        found.append(torch.autograd.grad(loss, world.parameters()))
    agree(found, exact)


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_the_mean_moves_to_the_winners(algorithm, tmp_path):
    """After a few hundred steps what is sampled has moved along winners minus losers, and against it where
    they are turned round."""
    table, moved = pairs(tmp_path), []
    for means in ((WON, LOST), (LOST, WON)):
        world = levels_of("epsilon")
        sampler = double(ddim(world.family.scheduler, steps=8, eta=1.0))
        start = world.chain(sampler, world.W, world.omega)[-1][0].detach()
        objective = DPO(data=table, beta=2.0) if algorithm == "dpo" else KTO(data=table, beta=2.0)
        descent = torch.optim.SGD(world.parameters(), lr=0.05)
        for seed in range(200):
            latents, prompts, noise = images_of(means, 200, seed), ("",) * 200, draws(200, seed)
            if algorithm == "dpo":
                batch = ImagePairs(process=world.process, latents=latents, prompts=prompts, noise=noise)
            else:
                good = torch.arange(200) % 2 == 0
                mixed = torch.where(good[:, None, None, None], latents[0], latents[1])[None]
                judged = {"desirable": good, "reference": torch.empty(0), "z0": 0.0}
                batch = Judged(process=world.process, latents=mixed, prompts=prompts, noise=noise, **judged)
                ((_, batch),) = objective._measured(world, [(1.0, batch)])
            descent.zero_grad()
            objective.loss(world, batch)[0].backward()
            descent.step()
        moved.append(
            float((world.chain(sampler, world.W, world.omega)[-1][0].detach() - start) @ (WON - LOST))
        )
    assert moved[0] > 0.1 and moved[1] < -0.1


@pytest.mark.parametrize("min_snr", [None, 0.5])
@LEVELS
def test_sft_population_minimiser(kind, min_snr, tmp_path):
    """At every training timestep, and whatever its weight, the exact denoiser of the images' own
    distribution: the gradient vanishes there, and not at the pretrained model."""
    world, objective = levels_of(kind), SFT(data=pairs(tmp_path), min_snr=min_snr)
    narrow = torch.tensor([[0.3, -0.1], [-0.1, 0.5]], dtype=torch.float64)
    levels, zero = torch.arange(8), [torch.zeros_like(p) for p in world.parameters()]
    (G, h), (base_G, base_h) = world.exact(levels, WON, narrow), world.exact(levels)
    for at_the_minimum in (True, False):
        world.W.data, world.omega.data = (
            (G - base_G, h - base_h) if at_the_minimum else (zero[0].clone(), zero[1].clone())
        )
        found = []
        for seed in range(40):
            latents = images_of((WON,), 1000, seed, narrow)
            batch = Examples(
                process=world.process, latents=latents, prompts=("",) * 1000, noise=draws(1000, seed)
            )
            found.append(torch.autograd.grad(objective.loss(world, batch)[0], world.parameters()))
        z, _ = z_scores(found, zero)
        assert z.abs().max() < LIMIT if at_the_minimum else z.abs().max() > 5 * LIMIT
