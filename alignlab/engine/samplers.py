"""A sampler is a table: every sampler that RL can use is Markov, Gaussian and linear.

    x_{i+1} = a_i x_i + b_i out_i + s_i z,   z ~ N(0, I)          x0_i = p_i x_i + q_i out_i

so N steps of DDIM(eta) or of the rectified-flow SDE are a handful of vectors, computed once in float64. One
kernel then serves sampling (draw x' from the mean), reinforcement learning (score a stored x') and reward
gradients.

    x_i                the latent before step i, from pure noise (i = 0, the x_T of papers) to i = N
    out_i              the network's guided output at x_i: eps, v, x0 or a velocity, as the model was trained
    x0_i               the image latent that the model predicts from x_i
    alpha_i, sigma_i   the noise level of x_i:  x_i = alpha_i x0 + sigma_i eps
    abar               alphas_cumprod of diffusers

Clipping, thresholding and multi-step solvers are not linear-Gaussian. They are refused on purpose.
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
    """Holds the table of N steps, one column a vector [N]. `ddim` and `flow` fill it."""

    guidance_scale: float = 1.0
    """w of u + w (c - u): one number for the rollout and the loss. 1 runs one branch."""
    timesteps: Tensor
    """[N] the time that the network is given, largest first: int64 for DDIM, float32 for flow."""
    a: Tensor
    """[N] float32, as all columns below: the weight of x_i in the mean of x_{i+1}."""
    b: Tensor
    """The weight of the output in that mean."""
    s: Tensor
    """The standard deviation of x_{i+1}; a step with s = 0 is deterministic and has no density."""
    p: Tensor
    """The weight of x_i in the predicted x0."""
    q: Tensor
    """The weight of the output in the predicted x0."""
    alpha: Tensor
    """The signal in x_i."""
    sigma: Tensor
    """The noise in x_i."""

    def __len__(self) -> int:
        return len(self.a)

    @property
    def scored(self) -> Tensor:
        """Tells which steps have a density, [N] bool. A step with s = 0 takes no part in an RL loss."""
        return self.s > 0

    def to(self, device: torch.device | str) -> "Sampler":
        """Returns the same table with its columns on a device."""
        columns: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name != "guidance_scale"
        }
        return replace(self, **{k: v.to(device) for k, v in columns.items()})

    # Below, x, out, mean and x_next are [M, C, h, w], and i is the step of all rows or of each row.

    def mean(self, i: Index, x: Tensor, out: Tensor) -> Tensor:
        """Computes the mean of x_{i+1} given x_i and the network's output."""
        return rows_of(self.a, i, x) * x + rows_of(self.b, i, x) * out

    def draw(self, i: Index, mean: Tensor, noise: Tensor) -> Tensor:
        """Draws x_{i+1} around its mean from standard normal noise of the same shape."""
        return mean + rows_of(self.s, i, mean) * noise

    def x0(self, i: Index, x: Tensor, out: Tensor) -> Tensor:
        """The image latent that the model predicts from x_i."""
        return rows_of(self.p, i, x) * x + rows_of(self.q, i, x) * out

    def log_prob(self, i: Index, x_next: Tensor, mean: Tensor) -> Tensor:
        """Computes log N(x_next; mean, s^2), [M] float32. No gradient passes through x_next.

        It is the mean over C, h, w and not the sum: exp of a difference of sums would overflow.
        """
        s = self.s[i]
        z = (x_next.detach() - mean) / rows_of(self.s, i, mean)
        return -z.square().mean((1, 2, 3)) / 2 - s.log() - 0.5 * math.log(2 * math.pi)

    def kl(self, i: Index, out: Tensor, out_ref: Tensor) -> Tensor:
        """Computes KL(policy || reference) of one step, [M], mean over C, h, w.

        Both Gaussians have the same s, so only their means differ.
        """
        return (self.b[i] / self.s[i]).square() * (out - out_ref).square().mean((1, 2, 3)) / 2

    def eps_error(self, i: Index, out: Tensor, out_ref: Tensor) -> Tensor:
        """Computes (eps - eps_ref)^2, [M], mean over C, h, w.

        For every parametrisation eps = (x - alpha x0)/sigma, and x0 = p x + q out.
        """
        return (self.alpha[i] * self.q[i] / self.sigma[i]).square() * (out - out_ref).square().mean((1, 2, 3))

    def renoise(self, i: Index, x0: Tensor, noise: Tensor) -> Tensor:
        """Adds noise to x0 until it has the noise level of x_i."""
        return rows_of(self.alpha, i, x0) * x0 + rows_of(self.sigma, i, x0) * noise


def rows_of(vector: Tensor, i: Index, like: Tensor) -> Tensor:
    """Takes vector[i], shaped so that it multiplies the rows of `like` [M, ...]."""
    value = vector[i]
    return value if value.ndim == 0 else value.view(-1, *[1] * (like.ndim - 1))


def _table(timesteps: Tensor, guidance_scale: float, **columns: Tensor) -> Sampler:
    """Rounds the float64 columns to float32, once and at the end."""
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
        steps: N, how many denoising steps an image takes. [sampling steps]
        eta: 0 is the deterministic ODE; 1 the ancestral (DDPM-like) sampler that DDPO uses. One for all
            steps, or one for each. [share of the ancestral sampler's noise]
        guidance_scale: w >= 0 of classifier-free guidance; 1 leaves it out. [factor]

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
    t = _ddim_timesteps(scheduler, steps)
    abar_all = scheduler.alphas_cumprod.double().cpu()
    abar = abar_all[t]
    # x_{i+1} has the noise level that DDIMScheduler.step gives it, whatever the spacing of the timesteps.
    before = t - int(config["num_train_timesteps"]) // steps
    abar_prev = torch.where(
        before >= 0, abar_all[before.clamp(min=0)], scheduler.final_alpha_cumprod.double()
    )

    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    p, q, eps_x, eps_out = _parametrisation(config["prediction_type"], alpha, sigma)
    unit_variance = ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).clamp(min=0)
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
    s = etas * unit_variance.sqrt()
    return _table(t, guidance_scale, a=a, b=b, s=s, p=p, q=q, alpha=alpha, sigma=sigma)


def _ddim_timesteps(scheduler: Any, steps: int) -> Tensor:
    """Reads the timesteps of a diffusers scheduler, [N] int64, largest first."""
    config: Mapping[str, Any] = scheduler.config
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
    return t


def _parametrisation(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Writes x0 and eps as linear functions of x and the network's output, by what it predicts.

    Returns:
        p, q, eps_x, eps_out, [N] each, of x0 = p x + q out and eps = eps_x x + eps_out out.
    """
    zeros, ones = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "epsilon":
        if bool((alpha <= 0).any()):
            raise ValueError(
                "epsilon prediction says nothing of x0 where alphas_cumprod is 0 (zero terminal SNR); use "
                "v_prediction"
            )
        return 1 / alpha, -sigma / alpha, zeros, ones
    if prediction == "v_prediction":
        return alpha, -sigma, sigma, alpha
    if prediction == "sample":
        return zeros, ones, 1 / sigma, -alpha / sigma
    raise ValueError(f"prediction_type={prediction!r} is not one of epsilon, v_prediction, sample")


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
        steps: N, how many denoising steps an image takes. [sampling steps]
        eta: noise scale, 0 for the ODE; Flow-GRPO uses 0.7. One for all steps, or one for each.
            [scale of the noise]
        guidance_scale: w >= 0 of classifier-free guidance; 1 leaves it out. [factor]
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
    scheduler.set_timesteps(steps)  # it shifts the sigmas, so they are read after it
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
