"""The linear-Gaussian world: every expectation of sections 1 and 2 of ALGORITHMS.md in closed form.

    data    x_0 ~ N(m, S),  x_t = alpha x_0 + sigma eps
    model   out = G_t x + h_t + W_i x + omega_i
            G, h: the exact E[target | x_t];  (W, omega): what is trained, 0 at the start
    u       out = G_t x + h_t + delta                  the unconditional branch: not trained
    chain   mu' = A mu + c,  M' = A M A^T + s^2 I,
            A = a I + b (G + w W),  c = b (h + w omega + (1 - w) delta)

so the output distribution, E[r], every truncated gradient (by autograd through this float64 recursion) and
the KL to the reference are exact. `World` stands in for `Policy` in rollout, replay and the objectives.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from alignlab.engine.conditioning import Conditioning
from alignlab.engine.forward_process import ForwardProcess
from alignlab.engine.noise import NoiseKey
from alignlab.engine.policy import guide
from alignlab.engine.rollout import Rollout
from alignlab.engine.samplers import Sampler

D = 2
MEAN = torch.tensor([0.8, -0.4], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.9, 0.3], [0.3, 0.4]], dtype=torch.float64)
DELTA = torch.tensor([0.3, -0.2], dtype=torch.float64)


def double(sampler: Sampler) -> Sampler:
    """The same float32-rounded table, calculated with in float64."""
    return replace(
        sampler, **{k: getattr(sampler, k).double() for k in ("a", "b", "s", "p", "q", "alpha", "sigma")}
    )


@dataclass(frozen=True, kw_only=True)
class Draws(NoiseKey):
    """Independent float64 normals, a whole batch from one generator: 10^5 images in milliseconds."""

    def normal(self, step: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + 1009 * self.epoch + step + 10)
        return torch.randn(len(self.prompts), *shape, generator=generator, dtype=torch.float64)


def draws(n: int, seed: int = 0) -> Draws:
    return Draws(seed=seed, stream="test", epoch=0, prompts=("",) * n, replicas=tuple(range(n)))


class World:
    """A `Policy` over latents [B, 1, 1, D] whose image is its latent.

    Args:
        scheduler: of diffusers; gives prediction type and noise levels.
        timesteps: the rows of W and omega: one correction for each of these timesteps, or a single one for
            all (None).
        bias_only: leave W at 0.
    """

    latent_shape = (1, 1, D)
    device = torch.device("cpu")
    dtype = torch.float32  # what Policy calls the model's precision
    sharded = False

    def __init__(self, scheduler: Any, timesteps: Tensor | None = None, *, bias_only: bool = False) -> None:
        self.family = SimpleNamespace(scheduler=scheduler)
        self.process = ForwardProcess.of(scheduler)
        self.timesteps = timesteps
        rows = 1 if timesteps is None else len(timesteps)
        self.W = torch.zeros(rows, D, D, dtype=torch.float64, requires_grad=not bias_only)
        self.omega = torch.zeros(rows, D, dtype=torch.float64, requires_grad=True)
        self.on = True
        self.references = self.rows = 0  # how often reference() was entered, how many rows the network saw

    def parameters(self) -> list[Tensor]:
        return [p for p in (self.W, self.omega) if p.requires_grad]

    def randomise(self, size: float = 0.15, seed: int = 1) -> "World":
        for p in self.parameters():
            p.data = size * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype)
        return self

    # -- the exact denoiser

    def exact(self, t: Tensor, mean: Tensor = MEAN, covariance: Tensor = COVARIANCE) -> tuple[Tensor, Tensor]:
        """G [M, D, D] and h [M, D] of E[target | x_t] for data N(mean, covariance), at timesteps t [M]."""
        row = (self.process.timesteps[None] - t[:, None]).abs().argmin(1)
        alpha, sigma = (
            self.process.alpha.double()[row, None, None],
            self.process.sigma.double()[row, None, None],
        )
        eye = torch.eye(D, dtype=torch.float64)
        inverse = torch.linalg.inv(alpha**2 * covariance + sigma**2 * eye)
        eps, x0 = (
            sigma * inverse,
            alpha * covariance @ inverse,
        )  # E[eps | x] = eps (x - alpha m), E[x0 | x] = m + x0 (x - alpha m)
        gain = {"epsilon": eps, "sample": x0, "flow": eps - x0, "v_prediction": alpha * eps - sigma * x0}[
            self.process.prediction
        ]
        constant = {"epsilon": 0.0, "sample": 1.0, "flow": -1.0, "v_prediction": -sigma[:, 0]}[
            self.process.prediction
        ]
        return gain, constant * mean - (gain @ (alpha * mean[:, None]))[..., 0]

    def correction(self, t: Tensor) -> Tensor:
        """[M] the rows of W and omega."""
        return (
            torch.zeros_like(t, dtype=torch.long)
            if self.timesteps is None
            else (self.timesteps[None] - t[:, None]).abs().argmin(1)
        )

    # -- Policy

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(text={"c": torch.zeros(len(prompts), 1)}, null={"c": torch.zeros(1, 1)})

    def branches(self, x: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        levels, which = t.unique(return_inverse=True)
        gain, constant = (v[which] for v in self.exact(levels))
        row = self.correction(levels)[which]
        flat = x.flatten(1).double()  # the real NoiseKey draws float32
        base = (gain @ flat[..., None])[..., 0] + constant
        out = base + (self.W[row] @ flat[..., None])[..., 0] + self.omega[row] if self.on else base
        self.rows += len(x)
        both = [out] if guidance_scale == 1 else [out, base + DELTA]
        return torch.stack(both).view(-1, *x.shape)

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        return guide(self.branches(x, t, cond, guidance_scale), guidance_scale)

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.on, self.references = False, self.references + 1
        yield
        self.on = True

    # -- closed forms

    def chain(
        self, sampler: Sampler, W: Tensor, omega: Tensor, *, frozen: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        """(mean, covariance) of x_0 .. x_N for the corrections W, omega; steps before `frozen` pass no
        gradient."""
        eye = torch.eye(D, dtype=torch.float64)
        mean, covariance = torch.zeros(D, dtype=torch.float64), eye
        moments = [(mean, covariance)]
        for i in range(len(sampler)):
            A, c = self.affine(sampler, W, omega, i)
            mean, covariance = A @ mean + c, A @ covariance @ A.T + sampler.s[i] ** 2 * eye
            if i < frozen:
                mean, covariance = mean.detach(), covariance.detach()
            moments.append((mean, covariance))
        return moments

    def affine(
        self, sampler: Sampler, W: Tensor, omega: Tensor, i: int, *, onto: str = "x_N"
    ) -> tuple[Tensor, Tensor]:
        """A and c of step i, x_{i+1} = A x_i + c + s z; or of its predicted x0."""
        a, b = (sampler.a[i], sampler.b[i]) if onto == "x_N" else (sampler.p[i], sampler.q[i])
        w, t = sampler.guidance_scale, sampler.timesteps[i : i + 1]
        (gain,), (constant,), row = *self.exact(t), self.correction(t)[0]
        A = a * torch.eye(D, dtype=torch.float64) + b * (gain + w * W[row])
        return A, b * (constant + w * omega[row] + (1 - w) * DELTA)

    def kls(self, sampler: Sampler, W: Tensor, omega: Tensor) -> Tensor:
        """[N] E[KL(step i || reference)], the full KL (summed over D); inf at steps with s = 0."""
        total = []
        for i, (mean, covariance) in enumerate(self.chain(sampler, W, omega)[:-1]):
            total.append(
                (sampler.b[i] / sampler.s[i]) ** 2 / 2 * self._squared(sampler, W, omega, i, mean, covariance)
            )
        return torch.stack(total)

    def eps_errors(self, sampler: Sampler, W: Tensor, omega: Tensor, *, frozen: int = 0) -> Tensor:
        """[N] E[mean over D of (eps - eps_ref)^2] of the guided prediction."""
        factor = (sampler.alpha * sampler.q / sampler.sigma) ** 2 / D
        chain = self.chain(sampler, W, omega, frozen=frozen)[:-1]
        return torch.stack(
            [factor[i] * self._squared(sampler, W, omega, i, *moments) for i, moments in enumerate(chain)]
        )

    def _squared(
        self, sampler: Sampler, W: Tensor, omega: Tensor, i: int, mean: Tensor, covariance: Tensor
    ) -> Tensor:
        row, w = self.correction(sampler.timesteps[i : i + 1])[0], sampler.guidance_scale
        dW, shift = w * W[row], w * (W[row] @ mean + omega[row])
        return shift @ shift + torch.trace(dW @ covariance @ dW.T)

    def gradient(self, value: Any) -> list[Tensor]:
        """Gradients of value(W, omega), a float64 scalar, at the present parameters."""
        grads = torch.autograd.grad(value(self.W, self.omega), self.parameters(), allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g for g, p in zip(grads, self.parameters(), strict=True)
        ]


@dataclass(frozen=True)
class Reward:
    """r(x) = w^T x - 1/2 (x - target)^T A (x - target), and its expectation under N(mean, covariance)."""

    w: Tensor
    A: Tensor
    target: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        return x @ self.w - ((x - self.target) @ self.A * (x - self.target)).sum(1) / 2

    def expected(self, mean: Tensor, covariance: Tensor) -> Tensor:
        away = mean - self.target
        return mean @ self.w - (away @ self.A @ away + torch.trace(self.A @ covariance)) / 2


_w = torch.tensor([1.0, -0.5], dtype=torch.float64)
_target = torch.tensor([0.2, 1.0], dtype=torch.float64)
LINEAR = Reward(_w, torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64))
QUADRATIC = Reward(0 * _w, torch.tensor([[1.0, 0.2], [0.2, 0.5]], dtype=torch.float64), _target)


def scored(record: Rollout, reward: Reward) -> Rollout:
    """The rollout with its reward."""
    return replace(record, reward=reward(record.images))


def z_scores(batches: Sequence[Sequence[Tensor]], exact: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How many standard errors the mean of independent gradient estimates is from the exact one, and how many
    the exact one is from 0 (the test's power); one number for each parameter.

    Args:
        batches: independent estimates of equal size, each a list of gradients.
    """
    flat = torch.stack([torch.cat([g.flatten() for g in batch]) for batch in batches])
    truth = torch.cat([g.flatten() for g in exact])
    error = flat.std(0) / len(flat) ** 0.5 + 1e-12
    return (flat.mean(0) - truth) / error, truth / error
