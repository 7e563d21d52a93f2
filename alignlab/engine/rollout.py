"""The engine: one `rollout()` for every objective, model and sampler, and the record it fills.

    for i in 0..N-1:   out_i = policy(x_i, t_i, c);   x_{i+1} = a_i x_i + b_i out_i + s_i z_i    (samplers.py)

Policy gradients need the latents and their log-probs; `replay` scores stored (sample, step) pairs again with
the same kernel. Reward gradients need the graph of some steps; `Gradients` says which, and everything before
the first of them runs without a graph. DRaFT, AlignProp, DRTune, ReFL and DRaFT-LV differ only in that
record.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from alignlab.engine.conditioning import Conditioning
from alignlab.engine.noise import FIRST, NoiseKey
from alignlab.engine.policy import Policy, guide
from alignlab.engine.samplers import Sampler


class NothingToLearn(ValueError):
    """The objective is left without a gradient, a density or its data; one sentence."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Says which model outputs of a rollout keep their graph."""

    steps: tuple[int, ...]
    """Ascending; the graph begins at the first, where x is a constant. Gaps are allowed: a gap's prediction
    is a constant, the latent still carries the gradient through it (a_i x_i)."""
    detach_input: bool = False
    """The network sees sg(x_i), so gradients flow along a_i x_i only (DRTune's stop-gradient)."""
    stop: int | None = None
    """Leave the chain at this step (ReFL) and take its predicted x0 as the image."""
    x0_image: bool = False
    """The image is the last step's predicted x0 rather than x_N."""
    renoise: int = 0
    """DRaFT-LV: this many more images a sample, each denoised from sg(x_N) brought back to the last step's
    noise level."""

    @staticmethod
    def last(k: int, n: int) -> "Gradients":
        """The last k of n steps."""
        return Gradients(steps=tuple(range(n - k, n)))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Records B images with their prompts, latents, log-probs and rewards.

    B counts the renoised images of DRaFT-LV too: they follow the B/(1 + renoise) samples.
    """

    prompts: tuple[str, ...]
    cond: Conditioning
    sampler: Sampler
    noise: NoiseKey
    slots: tuple[int, ...]
    """[S] ascending: the indices i of the stored latents x_i, 0..N."""
    latents: Tensor
    """[B, S, C, h, w] float32, x_T first; those after the first gradient step carry the graph."""
    log_probs: Tensor
    """[B, N] float32, mean over C, h, w; nan at steps without a density."""
    images: Tensor
    """[B, 3, H, W] in [0, 1], float32."""
    kept: tuple[int, ...] = ()
    """[K] the steps whose outputs were kept."""
    outputs: Tensor | None = None
    """[B, K, R, C, h, w] the kept steps' branches, with their graph."""
    renoised: int = 0
    """Renoised images for each sample."""
    share: float = 1.0
    """This rollout's share of the epoch's samples."""
    rewards: dict[str, Tensor] = field(default_factory=dict)
    """[B] float32 by name, each in its own unit; empty until the rollout is scored (training/scoring.py)."""
    weights: dict[str, float] = field(default_factory=dict)
    """The weight of each reward in the sum."""
    reward: Tensor | None = None
    """[B] float32, the weighted sum of the rewards, which is maximised; None until the rollout is scored."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def samples(self) -> int:
        """Counts the rows that are samples of the policy, not renoised copies."""
        return len(self) // (1 + self.renoised)

    def latent(self, rows: Tensor, steps: Tensor) -> Tensor:
        """Looks up x_i of each (row, i) pair, [M, C, h, w].

        Raises:
            IndexError: if one of them was not stored.
        """
        slot = torch.full((len(self.sampler) + 1,), -1, dtype=torch.long)
        slot[list(self.slots)] = torch.arange(len(self.slots))
        if bool((slot[steps] < 0).any()):
            raise IndexError(
                f"latents of steps {sorted(set(steps.tolist()))} were asked for, but only {self.slots} were "
                "stored"
            )
        device = self.latents.device
        return self.latents[rows.to(device), slot[steps].to(device)]

    @staticmethod
    def cat(parts: Sequence["Rollout"]) -> "Rollout":
        """Joins rollouts of one sampler into one, in their order and without graphs."""
        first = parts[0]
        prompts = tuple(p for part in parts for p in part.prompts)
        replicas = tuple(r for part in parts for r in part.noise.replicas)
        return replace(
            first,
            prompts=prompts,
            cond=Conditioning.cat([p.cond for p in parts]),
            noise=replace(first.noise, prompts=prompts, replicas=replicas),
            latents=torch.cat([p.latents.detach() for p in parts])
            if len(parts) > 1
            else first.latents.detach(),
            log_probs=torch.cat([p.log_probs.detach() for p in parts]),
            images=torch.cat([p.images.detach() for p in parts]),
            kept=(),
            outputs=None,
            rewards={k: torch.cat([p.rewards[k].detach() for p in parts]) for k in first.rewards},
            reward=None
            if first.reward is None
            else torch.cat([p.reward.detach() for p in parts if p.reward is not None]),
        )


Store = Literal["all", "image"] | Sequence[int]
"""Which latents a rollout keeps: all, x_N only, or those of the steps that will be trained on."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a rollout that is known before its first step."""

    graph: bool
    """False under `torch.no_grad()`: the outputs that are kept are constants."""
    end: int
    """Steps 0..end-1 are run: all N, or fewer where `Gradients.stop` leaves the chain."""
    kept: tuple[int, ...]
    """The steps whose outputs are kept, ascending."""
    first: int
    """The graph begins at this step: the first one kept, or `end` if there is none."""
    random: tuple[bool, ...]
    """[N] whether a step adds noise, and so has a density."""
    slots: tuple[int, ...]
    """The indices i of the latents x_i that are stored, ascending."""
    predicts_x0: bool
    """The image is the predicted x0 of the last step run, not the last latent."""
    detach_input: bool
    renoise: int
    """Both as in `Gradients`."""


def plan_of(sampler: Sampler, gradients: Gradients, store: Store, *, graph: bool) -> Plan:
    """Settles what a rollout runs, keeps and stores.

    Raises:
        NothingToLearn: if no gradient would reach the image.
    """
    n = len(sampler)
    end = n if gradients.stop is None else gradients.stop + 1
    kept = tuple(i for i in gradients.steps if i < end)
    predicts_x0 = gradients.x0_image or gradients.stop is not None
    if graph and kept and not predicts_x0 and not sampler.b[list(kept)].any():
        raise NothingToLearn(
            f"the kept steps {kept} are no-ops of this sampler (b = 0), so the image has no gradient; raise "
            "algo.k or set algo.reward_on=pred_x0"
        )
    trained = range(n) if store == "all" else () if store == "image" else store
    return Plan(
        graph=graph,
        end=end,
        kept=kept,
        first=kept[0] if kept else end,
        random=tuple(sampler.scored.tolist()),
        slots=tuple(sorted({end} | {j for i in (*trained, *kept) if i < end for j in (i, i + 1)})),
        predicts_x0=predicts_x0,
        detach_input=gradients.detach_input,
        renoise=gradients.renoise,
    )


def rollout(
    policy: Policy,
    sampler: Sampler,
    noise: NoiseKey,
    *,
    gradients: Gradients | None = None,
    store: Store = "all",
    offload: bool = False,
) -> Rollout:
    """Samples one image for each entry of `noise`.

    Args:
        gradients: the steps that keep their graph; None keeps none. Under `torch.no_grad()` their outputs are
            kept as constants.
        store: which latents to keep: "all", "image" (x_N only), or the steps that will be trained on (x_i and
            x_{i+1} of each). What gradient steps need is stored in any case.
        offload: keep the stored latents in host memory.
    """
    plan = plan_of(sampler, gradients or Gradients(steps=()), store, graph=torch.is_grad_enabled())
    b, shape, w = len(noise.prompts), policy.latent_shape, sampler.guidance_scale
    cond = policy.encode(noise.prompts)
    x = noise.normal(FIRST, shape, policy.device)
    latents = x.new_empty(b, len(plan.slots), *shape, device="cpu" if offload else None)
    if 0 in plan.slots:
        latents[:, 0] = x
    log_probs = torch.full((b, len(sampler)), float("nan"), device=policy.device)
    outputs, predicted = [], x

    for i in range(plan.end):
        with torch.set_grad_enabled(plan.graph and i >= plan.first):
            seen = x.detach() if plan.detach_input else x
            # In a gap between kept steps the output is a constant; a_i x_i still carries the gradient.
            with torch.set_grad_enabled(torch.is_grad_enabled() and i in plan.kept):
                branches = policy.branches(seen, sampler.timesteps[i].expand(b), cond, w)
            out = guide(branches, w)
            if i in plan.kept:
                outputs.append(branches)
            if i == plan.end - 1 and plan.predicts_x0:
                predicted = sampler.x0(i, x, out)
            mean = sampler.mean(i, x, out)
            x = sampler.draw(i, mean, noise.normal(i, shape, policy.device)) if plan.random[i] else mean
            if plan.random[i]:
                log_probs[:, i] = sampler.log_prob(i, x, mean).detach()
            if i + 1 in plan.slots:
                latents[:, plan.slots.index(i + 1)] = x

    with torch.set_grad_enabled(plan.graph and bool(plan.kept)):
        record = Rollout(
            prompts=noise.prompts,
            cond=replace(cond),  # without its guided copy, which ends with the steps or their graphs
            sampler=sampler,
            noise=noise,
            slots=plan.slots,
            latents=latents,
            log_probs=log_probs,
            images=policy.decode(predicted if plan.predicts_x0 else x),
            kept=plan.kept,
            outputs=torch.stack(outputs, 2).transpose(0, 1).transpose(1, 2) if outputs else None,
        )
        return _with_renoised(policy, record, plan.renoise) if plan.renoise else record


def _with_renoised(policy: Policy, record: Rollout, copies: int) -> Rollout:
    """Adds DRaFT-LV's images to a rollout of B samples, `copies` for each (arXiv 2309.17400, section 3).

    In the paper's indices x_1^j = alpha sg(x_0) + sigma noise_j, and the image is the x_0 predicted from it.
    """
    sampler, n, b = record.sampler, len(record.sampler), len(record)
    if record.kept != (n - 1,):
        raise ValueError(
            f"DRaFT-LV re-noises to the last step only, so K must be 1, not the steps {record.kept}"
        )
    rows = torch.arange(b).repeat(1 + copies)
    cond, last = record.cond[rows[b:]], n - 1
    x0 = record.latent(torch.arange(b), torch.full((b,), n)).detach()
    draws = [record.noise.normal(n + j, policy.latent_shape, policy.device) for j in range(copies)]
    x1 = torch.cat([sampler.renoise(last, x0, z) for z in draws])
    branches = policy.branches(x1, sampler.timesteps[last].expand(len(x1)), cond, sampler.guidance_scale)
    x0_j = sampler.x0(last, x1, guide(branches, sampler.guidance_scale))
    assert record.outputs is not None
    return replace(
        record,
        prompts=record.prompts * (1 + copies),
        cond=record.cond[rows],
        noise=record.noise[rows.tolist()],
        slots=(last, n),
        latents=torch.cat([record.latents[:, -2:], torch.stack([x1, x0_j], 1)]),
        log_probs=record.log_probs[rows],
        images=torch.cat([record.images, policy.decode(x0_j)]),
        outputs=torch.cat([record.outputs, branches.transpose(0, 1).unsqueeze(1)]),
        renoised=copies,
    )


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Holds what the current policy predicts at M stored (sample, step) pairs."""

    x: Tensor
    """[M, C, h, w] the stored latents x_i."""
    out: Tensor
    """[M, C, h, w] guided output, with its graph."""
    log_prob: Tensor
    """[M] float32, of the stored x_{i+1}, with its graph."""


def replay(policy: Policy, record: Rollout, rows: Tensor, steps: Tensor) -> Replay:
    """Predicts and scores the pairs (rows[m], steps[m]) again, rows and steps [M] long.

    Prediction, guidance and kernel are those of the rollout, so with unchanged weights the log-probs are too.
    """
    sampler = record.sampler
    x, x_next = (record.latent(rows, i).to(policy.device) for i in (steps, steps + 1))
    rows, steps = rows.to(policy.device), steps.to(policy.device)
    out = policy.predict(x, sampler.timesteps[steps], record.cond[rows], sampler.guidance_scale)
    return Replay(x=x, out=out, log_prob=sampler.log_prob(steps, x_next, sampler.mean(steps, x, out)))
