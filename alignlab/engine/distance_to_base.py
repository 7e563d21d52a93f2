"""How far the policy has moved from the frozen model, at the latents it visits itself.

DRaFT+ penalises it (objectives/draft.py); every evaluation reports it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.engine.policy import Policy, guide
from alignlab.engine.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far the kept steps of a rollout are from the frozen model, mean over B, the kept steps and C, h,
    w."""

    eps_guided: Tensor
    """[] mean (eps - eps_ref)^2 of the guided prediction: what DRaFT+ publishes as its KL."""
    eps_conditional: Tensor
    """[] the same of the conditional branch."""
    trajectory: Tensor | None
    """[] KL per step over the steps with s > 0; None if there are none."""


def drift(policy: Policy, record: Rollout, *, through_input: bool = True) -> Drift:
    """Compares a rollout's kept outputs with the reference at the same latents.

    Args:
        through_input: let gradients pass through the reference's input x_i. Without (the published form) the
            gradient at the true optimum is not zero for K > 1.
    """
    sampler, w = record.sampler, record.sampler.guidance_scale
    if record.outputs is None:
        raise ValueError("this rollout kept no outputs; pass `gradients` to rollout()")
    guided, conditional, trajectory = [], [], []
    for k, i in enumerate(record.kept):
        x = record.latents[:, record.slots.index(i)].to(policy.device)
        moves = through_input and k > 0  # the graph begins at the first kept step: its input is a constant
        with policy.reference(), torch.set_grad_enabled(moves and torch.is_grad_enabled()):
            ref = policy.branches(
                x if moves else x.detach(), sampler.timesteps[i].expand(len(x)), record.cond, w
            )
        outputs = record.outputs[:, k].transpose(0, 1)  # [R, B, C, h, w]
        out, out_ref = guide(outputs, w), guide(ref, w)
        guided.append(sampler.eps_error(i, out, out_ref))
        conditional.append(sampler.eps_error(i, outputs[0], ref[0]))
        if bool(sampler.scored[i]):
            trajectory.append(sampler.kl(i, out, out_ref))
    mean = [torch.stack(v).mean() if v else None for v in (guided, conditional, trajectory)]
    assert mean[0] is not None and mean[1] is not None
    return Drift(eps_guided=mean[0], eps_conditional=mean[1], trajectory=mean[2])
