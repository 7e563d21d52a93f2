"""A sampler is a table: every sampler that RL can use is Markov, Gaussian and linear.

    x_{i+1} = a_i x_i + b_i out_i + s_i z,   z ~ N(0, I)          x0_i = p_i x_i + q_i out_i

so N steps of DDIM(eta) or of the rectified-flow SDE are a handful of vectors, computed once in float64. One
kernel then serves sampling (draw x' from the mean), reinforcement learning (score a stored x') and reward
gradients.

    alpha_i, sigma_i   the noise level of x_i:  x_i = alpha_i x0 + sigma_i eps
    abar               alphas_cumprod of diffusers

Left out on purpose: clipping, thresholding and multi-step solvers are not linear-Gaussian and are refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
Index = int | Tensor  # one step for the whole batch, or a LongTensor [M]: a step for each row
Eta = float | Sequence[float]  # one for all steps, or one for each


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """N steps from x_T (index 0) to the image latent (index N). Build with `ddim` or `flow`."""

    guidance_scale: float = 1.0
    """w of u + w (c - u): one number for the rollout and the loss. 1 runs one branch."""
    timesteps: Tensor
    """[N] what the network is told, in sampling order (int64 for DDIM, float32 for flow)."""
    a: Tensor
    b: Tensor
    s: Tensor
    p: Tensor
    q: Tensor
    alpha: Tensor
    sigma: Tensor
    """[N] float32 each."""

    def __len__(self) -> int:
        return len(self.a)

    @property
    def scored(self) -> Tensor:
        """[N] bool: steps with a density. A step with s = 0 has none and takes no part in an RL loss."""
        return self.s > 0

    def to(self, device: torch.device | str) -> "Sampler":
        columns: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name != "guidance_scale"
        }
        return replace(self, **{k: v.to(device) for k, v in columns.items()})

    # In what follows x, out, mean, x_next are [M, C, h, w] and i picks the step.

    def mean(self, i: Index, x: Tensor, out: Tensor) -> Tensor:
        return rows_of(self.a, i, x) * x + rows_of(self.b, i, x) * out

    def draw(self, i: Index, mean: Tensor, noise: Tensor) -> Tensor:
        return mean + rows_of(self.s, i, mean) * noise

    def x0(self, i: Index, x: Tensor, out: Tensor) -> Tensor:
        """The image latent that the model predicts from x_i."""
        return rows_of(self.p, i, x) * x + rows_of(self.q, i, x) * out

    def log_prob(self, i: Index, x_next: Tensor, mean: Tensor) -> Tensor:
        """[M] float32: log N(x_next; mean, s^2), *mean* over C, h, w (a sum's ratio overflows). x_next is a
        constant."""
        s = self.s[i]
        z = (x_next.detach() - mean) / rows_of(self.s, i, mean)
        return -z.square().mean((1, 2, 3)) / 2 - s.log() - 0.5 * math.log(2 * math.pi)

    def kl(self, i: Index, out: Tensor, out_ref: Tensor) -> Tensor:
        """[M] KL(policy || reference) of one step, mean over C, h, w. Both share s: only the means differ."""
        return (self.b[i] / self.s[i]).square() * (out - out_ref).square().mean((1, 2, 3)) / 2

    def eps_error(self, i: Index, out: Tensor, out_ref: Tensor) -> Tensor:
        """[M] mean over C, h, w of (eps - eps_ref)^2, eps derived from any parametrisation (eps = (x - alpha
        x0)/sigma)."""
        return (self.alpha[i] * self.q[i] / self.sigma[i]).square() * (out - out_ref).square().mean((1, 2, 3))

    def renoise(self, i: Index, x0: Tensor, noise: Tensor) -> Tensor:
        """x0 brought to the noise level of x_i."""
        return rows_of(self.alpha, i, x0) * x0 + rows_of(self.sigma, i, x0) * noise


def rows_of(vector: Tensor, i: Index, like: Tensor) -> Tensor:
    """vector[i], shaped to scale rows of `like`."""
    value = vector[i]
    return value if value.ndim == 0 else value.view(-1, *[1] * (like.ndim - 1))


def _table(timesteps: Tensor, guidance_scale: float, **columns: Tensor) -> Sampler:
    if guidance_scale < 0:
        raise ValueError(f"sampler.guidance_scale={guidance_scale} must not be negative; 1 is no guidance")
    return Sampler(
        timesteps=timesteps, guidance_scale=guidance_scale, **{k: v.float() for k, v in columns.items()}
    )


def ddim(scheduler: Any, *, steps: int, eta: Eta, guidance_scale: float = 1.0) -> Sampler:
    """DDIM(eta), Song et al. 2021 eq. 12, with the timesteps of a diffusers `DDIMScheduler`.

    Args:
        scheduler: a `DDIMScheduler`: betas, spacing, offset, `set_alpha_to_one` and prediction type are read
            from it.
        steps: N.
        eta: 0 is the deterministic ODE; 1 the ancestral (DDPM-like) sampler that DDPO uses. One for all
            steps, or one for each.
        guidance_scale: w >= 0.

    Raises:
        ValueError: if the scheduler clips or thresholds, eta is out of range, or its timesteps are unusable.
    """
    config: Mapping[str, Any] = scheduler.config
    for key in ("clip_sample", "thresholding"):
        if config.get(key):
            raise ValueError(
                f"scheduler.{key}=true makes the step non-linear, so it has no Gaussian density; set it to "
                "false"
            )
    train = int(config["num_train_timesteps"])
    if not 1 <= steps <= train:
        raise ValueError(f"sampler.steps={steps} is outside 1..{train}, the scheduler's training timesteps")
    scheduler.set_timesteps(steps)
    t = torch.as_tensor(scheduler.timesteps, dtype=torch.int64).cpu()
    if len(t) != steps or int(t.min()) < 0 or int(t.max()) >= train:
        raise ValueError(
            f"{config.get('timestep_spacing', 'leading')} spacing gives {len(t)} timesteps in "
            f"[{int(t.min())}, {int(t.max())}] for sampler.steps={steps}; {steps} within [0, {train - 1}] "
            "are needed: change sampler.steps or the scheduler's spacing"
        )
    abar_all = scheduler.alphas_cumprod.double().cpu()
    abar = abar_all[t]
    before = t - train // steps  # the previous timestep as DDIMScheduler.step takes it, whatever the spacing
    abar_prev = torch.where(
        before >= 0, abar_all[before.clamp(min=0)], scheduler.final_alpha_cumprod.double()
    )

    prediction: Prediction = config["prediction_type"]
    if prediction == "epsilon" and bool((abar <= 0).any()):
        raise ValueError(
            "epsilon prediction says nothing of x0 where alphas_cumprod is 0 (zero terminal SNR); use "
            "v_prediction"
        )
    sqrt_a, sqrt_n = abar.sqrt(), (1 - abar).sqrt()  # alpha, sigma
    zeros, ones = torch.zeros_like(abar), torch.ones_like(abar)
    if prediction == "epsilon":
        p, q, eps_x, eps_out = 1 / sqrt_a, -sqrt_n / sqrt_a, zeros, ones
    elif prediction == "v_prediction":
        p, q, eps_x, eps_out = sqrt_a, -sqrt_n, sqrt_n, sqrt_a
    elif prediction == "sample":
        p, q, eps_x, eps_out = zeros, ones, 1 / sqrt_n, -sqrt_a / sqrt_n
    else:
        raise ValueError(f"prediction_type={prediction!r} is not one of epsilon, v_prediction, sample")

    unit_variance = ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).clamp(
        min=0
    )  # exactly 0 where t' = t
    etas = torch.as_tensor(eta, dtype=torch.float64).expand(steps)
    room = 1 - abar_prev - etas**2 * unit_variance
    if bool((etas < 0).any()) or bool((room < -1e-12).any()):
        limit = ((1 - abar_prev) / unit_variance).sqrt()
        raise ValueError(
            f"sampler.eta={eta} is outside 0..{float(limit[unit_variance > 0].min()):.4f}, where DDIM's "
            "variance fits its noise level"
        )
    along = room.clamp(min=0).sqrt()
    a, b = abar_prev.sqrt() * p + along * eps_x, abar_prev.sqrt() * q + along * eps_out
    return _table(
        t, guidance_scale, a=a, b=b, s=etas * unit_variance.sqrt(), p=p, q=q, alpha=sqrt_a, sigma=sqrt_n
    )


def flow(
    scheduler: Any,
    *,
    steps: int,
    eta: Eta,
    guidance_scale: float = 1.0,
    last_step: Literal["sde", "ode"] = "sde",
) -> Sampler:
    """Rectified flow (SD3, FLUX), out = velocity: the SDE of Flow-GRPO (arXiv 2505.05470, eq. 9), Euler's ODE
    at eta = 0.

    g^2 = eta^2 sigma/(1 - sigma), where at sigma = 1 the *second* sigma stands in the denominator. The
    marginals are preserved as dt -> 0 only.

    Args:
        scheduler: a `FlowMatchEulerDiscreteScheduler`; its sigmas (shift included) are read, once.
        steps: N.
        eta: noise scale, 0 for the ODE; Flow-GRPO uses 0.7. One for all steps, or one for each.
        guidance_scale: w >= 0.
        last_step: "ode" makes the last step deterministic (and so unscored).

    Raises:
        ValueError: for a stochastic_sampling scheduler, a negative eta, or a single SDE step.
    """
    if scheduler.config.get("stochastic_sampling"):
        raise ValueError(
            "scheduler.stochastic_sampling=true is another sampler; set it to false and choose sampler.eta "
            "instead"
        )
    etas = torch.as_tensor(eta, dtype=torch.float64).expand(steps)
    if bool((etas < 0).any()) or (bool((etas > 0).any()) and steps < 2):
        raise ValueError(
            f"sampler.eta={eta} with sampler.steps={steps}: the flow SDE needs eta >= 0 and at least 2 steps"
        )
    scheduler.set_timesteps(steps)
    sigmas = torch.as_tensor(scheduler.sigmas).double().cpu()
    sigma, dt = sigmas[:-1], sigmas.diff()
    t = torch.as_tensor(scheduler.timesteps, dtype=torch.float32).cpu()
    denominator = 1 - torch.where(sigma >= 1, sigma[1] if steps > 1 else sigma, sigma)
    g2 = torch.where(etas > 0, etas**2 * sigma / denominator, 0.0)
    g2[-1] *= last_step == "sde"
    a = 1 + g2 / (2 * sigma) * dt
    b = (1 + g2 * (1 - sigma) / (2 * sigma)) * dt
    return _table(
        t,
        guidance_scale,
        a=a,
        b=b,
        s=(g2 * -dt).sqrt(),
        p=torch.ones_like(sigma),
        q=-sigma,
        alpha=1 - sigma,
        sigma=sigma,
    )
