"""The updates of one epoch, their gradients, and how far apart two of them are."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from alignlab.engine.rollout import rollout
from alignlab.engine.samplers import ddim
from tests.conftest import SD_SCHEDULE, key, tiny_policy
from tests.engine.exact import Noise64, policy64
from tests.linear_gaussian import double


def unet_case(path, *, move=0.0, n=6, size=0.75, exact=False, **options):
    """A rollout of 5 steps with rewards on the tiny U-Net (exact: in float64), and the policy moved by `move`
    after it."""
    policy = policy64(path) if exact else tiny_policy(path, size=size, **options)
    sampler = ddim(policy.family.scheduler, steps=5, eta=1.0, guidance_scale=2.0)
    with torch.no_grad():
        record = (
            rollout(policy, double(sampler), Noise64(**key(n).__dict__))
            if exact
            else rollout(policy, sampler, key(n))
        )
        torch.manual_seed(5)
        for p in policy.parameters():
            p.add_(move * torch.randn_like(p))
    return policy, replace(record, reward=torch.linspace(-1, 2, n))


def updates_of(policy, objective, rollouts, micro_batch, seed=0):
    """[(loss, gradients)] of each update of an epoch, accumulated with the shares as the train loop does.
    `rollouts` is empty for objectives that learn from a user's own data."""
    out = []
    for update in objective.updates(policy, iter(rollouts), micro_batch, np.random.default_rng(seed)):
        total, grads, shares = 0.0, [torch.zeros_like(p) for p in policy.parameters()], 0.0
        for share, batch in update.batches:
            loss, _ = objective.loss(policy, batch)
            for g, new in zip(grads, torch.autograd.grad(loss, policy.parameters()), strict=True):
                g += share * new
            total, shares = total + share * loss.item(), shares + share
        assert shares == pytest.approx(1)
        out.append((total, grads))
    return out


def distance(a, b):
    """Relative distance of two lists of gradients."""
    flat_a, flat_b = (torch.cat([g.flatten() for g in grads]) for grads in (a, b))
    return float((flat_a - flat_b).norm() / flat_b.norm())


SCHEDULERS = {
    **{
        kind: DDIMScheduler(**SD_SCHEDULE, prediction_type=kind, set_alpha_to_one=False, steps_offset=1)
        for kind in ("epsilon", "v_prediction", "sample")
    },
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def exact_policy(tiny_sd: str):
    """In float64, the VAE too."""
    policy = policy64(tiny_sd)
    encode = policy.family.encode_images
    policy.family.encode_images = lambda images: encode(images.double())
    return policy
