"""The sampler tables against diffusers, TRL and the formulas of ALGORITHMS.md section 1."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.samplers import Sampler, ddim, flow
from tests.conftest import SD_SCHEDULE

DATA = Path(__file__).parents[1] / "stored"
SPACINGS, PREDICTIONS = ("leading", "linspace", "trailing"), ("epsilon", "v_prediction", "sample")
TRL = json.loads((DATA / "trl_ddpo.json").read_text())


def double(scheduler):
    """diffusers' arithmetic in float64: its float32 alphas lose 9e-5 to cancellation, which is no part of the
    claim."""
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = (
        scheduler.alphas_cumprod.double(),
        scheduler.final_alpha_cumprod.double(),
    )
    return scheduler


def sampler64(sampler: Sampler) -> Sampler:
    return replace(
        sampler, **{k: getattr(sampler, k).double() for k in ("a", "b", "s", "p", "q", "alpha", "sigma")}
    )


def latents(*, dtype=torch.float64, n=3):
    return (torch.randn(2, 4, 3, 3, dtype=dtype) for _ in range(n))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_diffusers_ddim(eta, prediction):
    """Every step of every spacing, offset, set_alpha_to_one and N agrees with DDIMScheduler.step to the
    table's float32 rounding."""
    for spacing, offset, to_one, steps in itertools.product(SPACINGS, (0, 1), (False, True), (4, 10, 50)):
        options = {
            "timestep_spacing": spacing,
            "steps_offset": offset,
            "set_alpha_to_one": to_one,
            "prediction_type": prediction,
        }
        scheduler = double(DDIMScheduler(**SD_SCHEDULE, **options))
        table = ddim(scheduler, steps=steps, eta=eta)
        assert torch.equal(table.timesteps, scheduler.timesteps) and len(table) == steps
        for i, t in enumerate(scheduler.timesteps):
            x, out, z = latents()
            theirs = scheduler.step(out, t, x, eta=eta, variance_noise=z if eta else None)
            scale = 1 + float(table.p[i].abs() + table.q[i].abs())
            mine = sampler64(table).draw(i, sampler64(table).mean(i, x, out), z)
            torch.testing.assert_close(
                mine,
                theirs.prev_sample,
                rtol=0,
                atol=1e-6 * scale,
                msg=lambda m, o=options, i=i: f"{o} step {i}: {m}",
            )
            torch.testing.assert_close(
                sampler64(table).x0(i, x, out), theirs.pred_original_sample, rtol=0, atol=1e-6 * scale
            )


def test_ddim_float32_agrees_within_diffusers_own_cancellation():
    """In float32 on both sides the difference stays below 9e-5 (ALGORITHMS.md section 5), relative to the
    step's own scale."""
    worst = 0.0
    for spacing, prediction, steps in itertools.product(SPACINGS, PREDICTIONS, (10, 50)):
        scheduler = DDIMScheduler(**SD_SCHEDULE, timestep_spacing=spacing, prediction_type=prediction)
        table = ddim(scheduler, steps=steps, eta=1.0)
        for i, t in enumerate(scheduler.timesteps):
            x, out, z = latents(dtype=torch.float32)
            theirs = scheduler.step(out, t, x, eta=1.0, variance_noise=z).prev_sample
            worst = max(
                worst,
                float(
                    (table.draw(i, table.mean(i, x, out), z) - theirs).abs().max()
                    / theirs.abs().max().clamp(min=1)
                ),
            )
    assert worst < 9e-5


@pytest.mark.parametrize("case", range(len(TRL["ddim"])))
def test_ddim_log_prob_is_trls(case):
    """TRL 0.23.1's drawn latents (generator seed 7) and its log-probs of drawn and given latents, to 2e-5
    relative in float32."""
    setting, arrays = TRL["ddim"][case], load_file(DATA / "trl_ddpo.safetensors")
    case = {k.split(".", 2)[2]: v for k, v in arrays.items() if k.startswith(f"ddim.{case}.")}
    table = ddim(DDIMScheduler(**setting["config"]), steps=setting["steps"], eta=setting["eta"])
    steps = (table.timesteps[None] == case["timestep"][:, None]).nonzero()[:, 1]  # [2], a step for each row
    mean = table.mean(steps, case["sample"], case["model_output"])
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    drawn = table.draw(steps, mean, noise)
    torch.testing.assert_close(drawn, case["drawn_prev_seed7"], rtol=2e-5, atol=2e-5)
    for x_next in ("drawn", "given"):
        x = case["drawn_prev_seed7"] if x_next == "drawn" else case["given_prev"]
        torch.testing.assert_close(
            table.log_prob(steps, x, mean), case[f"{x_next}_log_prob"], rtol=2e-5, atol=2e-5
        )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_at_eta_0_is_diffusers_euler(shift):
    """Without noise the flow table is FlowMatchEulerDiscreteScheduler.step, shift applied once."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    table = flow(scheduler, steps=10, eta=0.0)
    scheduler.set_timesteps(10)
    torch.testing.assert_close(table.timesteps, scheduler.timesteps)
    assert not table.scored.any()
    (x,) = latents(dtype=torch.float32, n=1)
    mine = x
    for i, t in enumerate(scheduler.timesteps):
        out = torch.sin(3 * mine) + mine
        torch.testing.assert_close(table.x0(i, mine, out), mine - scheduler.sigmas[i] * out)
        x, mine = scheduler.step(out, t, x, return_dict=False)[0], table.mean(i, mine, out)
        torch.testing.assert_close(mine, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last_step", ["sde", "ode"])
def test_flow_sde_is_the_formula(last_step):
    """Flow-GRPO's SDE, term by term in a plain loop, with the second sigma in the denominator where sigma =
    1."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    table = flow(scheduler, steps=8, eta=0.7, last_step=last_step)
    sigmas = scheduler.sigmas.tolist()
    assert sigmas[0] == 1.0
    for i in range(8):
        sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        g2 = 0.7**2 * sigma / (1 - (sigmas[1] if sigma == 1 else sigma))
        if last_step == "ode" and i == 7:
            g2 = 0.0
        x, out, z = latents()
        mean = x * (1 + g2 / (2 * sigma) * dt) + out * (1 + g2 * (1 - sigma) / (2 * sigma)) * dt
        torch.testing.assert_close(sampler64(table).mean(i, x, out), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            sampler64(table).draw(i, mean, z), mean + math.sqrt(g2 * -dt) * z, rtol=1e-6, atol=1e-6
        )
    assert table.scored.all() if last_step == "sde" else table.scored.tolist() == [True] * 7 + [False]


def test_flow_sde_keeps_the_ode_marginals_as_steps_grow():
    """On N(m, S) the SDE's exact second moment converges to the ODE's (a little slower than 1/N: g^2 is
    singular at sigma = 1), and both to the data's; at small N they differ."""
    m, spread = 1.5, 0.6

    def second_moment(steps, eta):
        table = sampler64(
            flow(FlowMatchEulerDiscreteScheduler(num_train_timesteps=100_000), steps=steps, eta=eta)
        )
        mean, var = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        for a, b, s, alpha, sigma in zip(table.a, table.b, table.s, table.alpha, table.sigma, strict=True):
            slope = (sigma - alpha * spread**2) / (alpha**2 * spread**2 + sigma**2)
            gain = a + b * slope  # E[eps - x0 | x] = slope (x - alpha m) - m
            mean, var = gain * mean - b * (slope * alpha * m + m), gain**2 * var + s**2
        return float(var + mean**2)

    gap = {n: abs(second_moment(n, 0.7) - second_moment(n, 0.0)) for n in (8, 100, 200, 400, 800)}
    assert gap[8] > 0.05
    for n in (100, 200, 400):
        assert 0.5 < gap[2 * n] / gap[n] < 0.66
    assert second_moment(800, 0.7) == pytest.approx(spread**2 + m**2, rel=5e-3)


def test_log_prob_and_kl_are_torch_distributions():
    """log_prob and kl of one step are those of torch's Normal, as means over C, h, w; x_next takes no
    gradient."""
    table = sampler64(ddim(DDIMScheduler(**SD_SCHEDULE), steps=10, eta=0.7))
    steps = torch.tensor([2, 7])
    x, out, ref = latents()
    x_next = torch.randn_like(x, requires_grad=True)
    out.requires_grad_()
    mean, mean_ref, s = table.mean(steps, x, out), table.mean(steps, x, ref), table.s[steps].view(2, 1, 1, 1)
    mine, theirs = torch.distributions.Normal(mean, s), torch.distributions.Normal(mean_ref, s)
    torch.testing.assert_close(table.log_prob(steps, x_next, mean), mine.log_prob(x_next).mean((1, 2, 3)))
    torch.testing.assert_close(
        table.kl(steps, out, ref), torch.distributions.kl_divergence(mine, theirs).mean((1, 2, 3))
    )
    torch.testing.assert_close(table.log_prob(2, x_next, mean)[0], table.log_prob(steps, x_next, mean)[0])
    table.log_prob(steps, x_next, mean).sum().backward()
    assert x_next.grad is None and out.grad.abs().max() > 0


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "flow"])
def test_x0_and_eps_error_of_every_parametrisation(prediction):
    """From x_i and the training target x0() finds x_0; eps_error has the factors of ALGORITHMS.md section 5;
    renoise() and ForwardProcess.noised() reach the same level."""
    if prediction == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        table = sampler64(flow(scheduler, steps=10, eta=0.5))
        process, at = (
            ForwardProcess.of(scheduler),
            lambda i: (process.timesteps - table.timesteps[i]).abs().argmin(),
        )
        factor = 1 - table.sigma
    else:
        scheduler = DDIMScheduler(**SD_SCHEDULE, prediction_type=prediction)
        table = sampler64(ddim(scheduler, steps=10, eta=0.5))
        process, at = ForwardProcess.of(scheduler), lambda i: table.timesteps[i]
        factor = {
            "epsilon": torch.ones_like(table.alpha),
            "v_prediction": table.alpha,
            "sample": -table.alpha / table.sigma,
        }[prediction]
    for i in range(10):
        x0, eps, shift = latents()
        x = table.renoise(i, x0, eps)
        row = at(i).expand(2)
        torch.testing.assert_close(
            process.noised(row, x0, eps), x, rtol=0, atol=2e-6 if prediction != "flow" else 2e-3
        )
        target = process.target(row, x0, eps)
        found = table.x0(i, x, target)
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-5 if prediction != "flow" else 1e-6)
        expected = (factor[i] * shift).square().mean((1, 2, 3))
        torch.testing.assert_close(table.eps_error(i, target + shift, target), expected, rtol=1e-5, atol=0)
        if factor[i] != 0:  # the definition: eps = (x - alpha x0) / sigma
            eps_of = lambda out, i=i, x=x: (x - table.alpha[i] * table.x0(i, x, out)) / table.sigma[i]  # noqa: E731
            torch.testing.assert_close(
                expected,
                (eps_of(target + shift) - eps_of(target)).square().mean((1, 2, 3)),
                rtol=1e-5,
                atol=0,
            )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_forward_process_is_diffusers_training(prediction):
    """noised and target are add_noise and get_velocity at every timestep asked."""
    scheduler = DDIMScheduler(**SD_SCHEDULE, prediction_type=prediction)
    process = ForwardProcess.of(scheduler)
    t = torch.tensor([0, 999])
    x0, eps = latents(dtype=torch.float32, n=2)
    torch.testing.assert_close(process.noised(t, x0, eps), scheduler.add_noise(x0, eps, t))
    target = {"epsilon": eps, "sample": x0, "v_prediction": scheduler.get_velocity(x0, eps, t)}[prediction]
    torch.testing.assert_close(process.target(t, x0, eps), target, rtol=1e-5, atol=1e-6)
    assert len(process) == 1000 and torch.equal(process.timesteps, torch.arange(1000))


def test_forward_process_of_a_flow_is_diffusers_scale_noise():
    """The flow's T noise levels and timesteps are the scheduler's own (shift included), its target eps -
    x0."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = ForwardProcess.of(scheduler)
    torch.testing.assert_close(process.sigma, scheduler.sigmas[: len(process)], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.timesteps, scheduler.timesteps, rtol=1e-6, atol=1e-4)
    x0, eps = latents(dtype=torch.float32, n=2)
    rows = torch.tensor([0, 700])
    torch.testing.assert_close(
        process.noised(rows, x0, eps),
        scheduler.scale_noise(x0, scheduler.timesteps[rows], eps),
        rtol=1e-5,
        atol=1e-6,
    )
    assert torch.equal(process.target(rows, x0, eps), eps - x0)


@pytest.mark.parametrize(
    ("build", "scheduler"), [(ddim, DDIMScheduler(**SD_SCHEDULE)), (flow, FlowMatchEulerDiscreteScheduler())]
)
def test_an_eta_for_each_step(build, scheduler):
    """Each step is that of the sampler with its eta; those at 0 are the ODE's and have no density. One number
    is the same for all."""
    etas = [0.7, 0.0, 0.3, 0.0, 0.0]
    mixed, names = (
        build(scheduler, steps=5, eta=etas),
        ("timesteps", "a", "b", "s", "p", "q", "alpha", "sigma"),
    )
    for i, eta in enumerate(etas):
        whole = build(scheduler, steps=5, eta=eta)
        assert all(torch.equal(getattr(mixed, name)[i], getattr(whole, name)[i]) for name in names)
    assert mixed.scored.tolist() == [True, False, True, False, False]
    same, one = build(scheduler, steps=5, eta=[0.7] * 5), build(scheduler, steps=5, eta=0.7)
    assert all(torch.equal(getattr(same, name), getattr(one, name)) for name in names)


def test_steps_without_density():
    """s = 0 at eta > 0 happens at the last step only: abar' = 1 (b != 0), or t = 0 with abar' = abar (a
    no-op: a = 1, b = 0)."""
    to_one = ddim(DDIMScheduler(**SD_SCHEDULE, set_alpha_to_one=True), steps=10, eta=1.0)
    no_op = ddim(DDIMScheduler(**SD_SCHEDULE, set_alpha_to_one=False), steps=10, eta=1.0)
    offset = ddim(DDIMScheduler(**SD_SCHEDULE, set_alpha_to_one=False, steps_offset=1), steps=10, eta=1.0)
    assert to_one.scored.tolist() == no_op.scored.tolist() == [True] * 9 + [False] and offset.scored.all()
    assert abs(float(to_one.b[-1])) > 1e-3
    assert float(no_op.a[-1]) == pytest.approx(1, abs=1e-7) and float(no_op.b[-1]) == pytest.approx(
        0, abs=1e-7
    )
    assert not ddim(DDIMScheduler(**SD_SCHEDULE), steps=10, eta=0.0).scored.any()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ddim(DDIMScheduler(clip_sample=True), steps=10, eta=1.0), "clip_sample"),
        (lambda: ddim(DDIMScheduler(**SD_SCHEDULE, thresholding=True), steps=10, eta=1.0), "thresholding"),
        (
            lambda: ddim(
                DDIMScheduler(**SD_SCHEDULE, steps_offset=1, set_alpha_to_one=False), steps=50, eta=1.05
            ),
            "eta=1.05",
        ),
        (lambda: ddim(DDIMScheduler(**SD_SCHEDULE), steps=10, eta=-0.1), "eta=-0.1"),
        (
            lambda: ddim(
                DDIMScheduler(**SD_SCHEDULE, rescale_betas_zero_snr=True, timestep_spacing="trailing"),
                steps=10,
                eta=1.0,
            ),
            "zero terminal SNR",
        ),
        (lambda: ddim(DDIMScheduler(**SD_SCHEDULE), steps=0, eta=1.0), "steps=0"),
        (lambda: ddim(DDIMScheduler(**SD_SCHEDULE), steps=1001, eta=1.0), "steps=1001"),
        (lambda: ddim(DDIMScheduler(**SD_SCHEDULE, steps_offset=1), steps=1000, eta=1.0), "1000"),
        (lambda: ddim(DDIMScheduler(**SD_SCHEDULE), steps=10, eta=1.0, guidance_scale=-1), "guidance_scale"),
        (
            lambda: ddim(DDIMScheduler(**SD_SCHEDULE, prediction_type="flow"), steps=10, eta=1.0),
            "prediction_type",
        ),
        (
            lambda: flow(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), steps=10, eta=0.5),
            "stochastic_sampling",
        ),
        (lambda: flow(FlowMatchEulerDiscreteScheduler(), steps=10, eta=-0.5), "eta=-0.5"),
        (lambda: flow(FlowMatchEulerDiscreteScheduler(), steps=1, eta=0.5), "at least 2"),
    ],
)
def test_refusals(build, words):
    """What is not linear-Gaussian, or has no density where one is needed, is refused with the key and the
    value."""
    with pytest.raises(ValueError, match=words):
        build()


def test_eta_limit_of_stable_diffusion():
    """eta may go up to 1.046 for SD's schedule at N = 50, the limit that the refusal names."""
    scheduler = DDIMScheduler(**SD_SCHEDULE, steps_offset=1, set_alpha_to_one=False)
    ddim(scheduler, steps=50, eta=1.045)
    with pytest.raises(ValueError, match=r"1\.0456"):
        ddim(scheduler, steps=50, eta=1.2)


def test_zero_terminal_snr_works_with_v_prediction():
    """With v prediction a first step at pure noise is finite and starts from x0 = -out."""
    scheduler = DDIMScheduler(
        **SD_SCHEDULE,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    table = ddim(scheduler, steps=10, eta=1.0)
    assert float(table.p[0]) == pytest.approx(0, abs=1e-3) and float(table.q[0]) == pytest.approx(
        -1, abs=1e-6
    )
    assert all(torch.isfinite(getattr(table, k)).all() for k in "abspq")
