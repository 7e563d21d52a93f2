"""The engine on a real (tiny) U-Net: ratio, independence of the batch, gradients, memory. LoRA weights are
random, not 0."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignlab.engine.distance_to_base import drift
from alignlab.engine.noise import FIRST
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import Gradients, Rollout, replay, rollout
from alignlab.engine.samplers import Sampler, ddim, flow
from alignlab.fast.frozen_layers import freeze
from alignlab.models.sd import StableDiffusion
from alignlab.objectives.draft import DRaFT
from tests.conftest import PROMPTS, key, tiny_policy
from tests.engine.exact import Noise64, pixels, policy64
from tests.linear_gaussian import double

N = 5


def sampler_of(
    policy: Policy, kind: str = "ddim", *, steps: int = N, eta: float = 1.0, guidance: float = 1.0
) -> Sampler:
    return {"ddim": ddim, "flow": flow}[kind](
        policy.family.scheduler, steps=steps, eta=eta, guidance_scale=guidance
    )


def shuffled_pairs(record: Rollout) -> tuple[Tensor, Tensor]:
    pairs = torch.cartesian_prod(torch.arange(len(record)), record.sampler.scored.nonzero()[:, 0])
    return pairs[torch.randperm(len(pairs))].unbind(1)


# -- the ratio


@pytest.mark.parametrize(("kind", "eta"), [("ddim", 1.0), ("ddim", 0.3), ("flow", 0.7)])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_ratio_is_1_before_any_update(tiny_sd, kind, eta, guidance):
    """In float32 replay gives the rollout's log-probs exactly at the rollout's batch shape; at micro-batch 3
    of batch 8 with random (sample, step) pairs the ratio is within 2e-6 of 1 (2e-5 where s < 0.05: one ulp of
    x is then 1e-5 of s). The LoRA moves the images by >= 0.04."""
    policy = tiny_policy(
        tiny_sd, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0) if kind == "flow" else None
    )
    sampler = sampler_of(policy, kind, eta=eta, guidance=guidance)
    with torch.no_grad():
        record = rollout(policy, sampler, key())
        with policy.reference():
            assert (rollout(policy, sampler, key()).images - record.images).abs().mean() >= 0.04
    assert record.log_probs.isfinite().all() and record.log_probs.dtype == torch.float32
    rows = torch.arange(8)
    for i in range(N):
        steps = torch.full((8,), i)
        assert torch.equal(replay(policy, record, rows, steps).log_prob.detach(), record.log_probs[:, i])
    rows, steps = shuffled_pairs(record)
    with torch.no_grad():
        again = torch.cat(
            [
                replay(policy, record, rows[k : k + 3], steps[k : k + 3]).log_prob
                for k in range(0, len(rows), 3)
            ]
        )
    off = ((again - record.log_probs[rows, steps]).exp() - 1).abs()
    coarse = sampler.s[steps] < 0.05
    assert off[~coarse].max() <= 2e-6 and off[coarse].max() <= 2e-5


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_ratio_is_1_in_bf16_at_equal_shape(tiny_sd, guidance):
    """In bf16 the ratio is exactly 1 at the rollout's batch shape; latents and log-probs are float32."""
    policy = tiny_policy(tiny_sd, precision="bf16")
    with torch.no_grad():
        record = rollout(policy, sampler_of(policy, guidance=guidance), key())
    assert record.latents.dtype == record.log_probs.dtype == record.images.dtype == torch.float32
    for i in range(N):
        assert torch.equal(
            replay(policy, record, torch.arange(8), torch.full((8,), i)).log_prob.detach(),
            record.log_probs[:, i],
        )


def test_ratio_moves_after_an_update(tiny_sd):
    """The other side of the claim: a changed LoRA gives another log-prob, and its gradient reaches every LoRA
    weight."""
    policy = tiny_policy(tiny_sd)
    with torch.no_grad():
        record = rollout(policy, sampler_of(policy), key(2))
        for p in policy.parameters():
            p.add_(0.05)
    rows, steps = shuffled_pairs(record)
    now = replay(policy, record, rows, steps).log_prob
    assert (now.detach() - record.log_probs[rows, steps]).abs().max() > 1e-4
    now.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())


# -- independence of the batch


def test_image_does_not_depend_on_its_batch(tiny_sd):
    """Image i has bit-equal noise and an image within 1e-5 whether it is drawn in a batch of 8, of 3 (other
    order), or alone."""
    policy = tiny_policy(tiny_sd)
    sampler, whole = sampler_of(policy, guidance=5.0), key()
    with torch.no_grad():
        images = rollout(policy, sampler, whole).images
        for rows in ([6, 0, 3], [5]):
            part = rollout(policy, sampler, whole[rows])
            assert torch.equal(part.latents[:, 0], whole.normal(FIRST, policy.latent_shape)[rows])
            torch.testing.assert_close(part.images, images[rows], rtol=0, atol=1e-5)


def test_guidance_1_runs_one_branch(tiny_sd):
    """w = 1 evaluates the network on B rows a step, any other w on 2B, always in one call."""
    policy = tiny_policy(tiny_sd)
    seen: list[int] = []
    policy.family.denoiser.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with torch.no_grad():
        for guidance in (1.0, 5.0, 0.0):
            rollout(policy, sampler_of(policy, guidance=guidance), key(3))
    assert seen == [3] * N + [6] * (2 * N)


# -- the reference


def test_reference_is_the_base_model(tiny_sd):
    """Inside reference() the LoRA policy, and a full fine-tuned one, give the pretrained model's output bit
    for bit (LoRA's by its frozen layers); outside they do not, and what is trained stays trainable."""
    base = StableDiffusion(tiny_sd)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([981, 500, 1])
    text = {"prompt_embeds": torch.cat([base.encode([p])["prompt_embeds"] for p in PROMPTS[:3]]).detach()}
    with torch.no_grad():
        torch.nn.Module.to(base.denoiser, memory_format=torch.channels_last)  # as a policy's is on a CPU
        unfrozen = base.denoise(x, t, text)
        freeze(base.denoiser)
        frozen = base.denoise(x, t, text)
    torch.testing.assert_close(frozen, unfrozen, rtol=1e-4, atol=1e-5)
    lora, full = tiny_policy(tiny_sd), tiny_policy(tiny_sd, full=True)
    with torch.no_grad():
        for p in full.parameters():
            p.add_(0.01 * torch.randn_like(p))
    for policy, expected in ((lora, frozen), (full, unfrozen)):
        with torch.no_grad():
            cond = policy.encode(PROMPTS[:3])
            assert not torch.equal(policy.predict(x, t, cond, 1.0), expected)
            with policy.reference():
                assert torch.equal(policy.predict(x, t, cond, 1.0), expected)
        assert policy.predict(x, t, cond, 1.0).requires_grad and policy.parameters()
    assert all(name.endswith("weight") and p.dtype == torch.float32 for name, p in lora.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("full", [False, True])
def test_fresh_policy_is_the_reference(tiny_sd, full, precision):
    """At the start every distance to the reference and its gradient are exactly 0, in any precision, LoRA or
    full."""
    policy = tiny_policy(tiny_sd, size=0, full=full, precision=precision)
    record = rollout(policy, sampler_of(policy, guidance=3.0), key(2), gradients=Gradients.last(2, N))
    away = drift(policy, record)
    assert [v.item() for v in (away.eps_guided, away.eps_conditional, away.trajectory)] == [0, 0, 0]
    grads = torch.autograd.grad(away.eps_guided + away.trajectory, policy.parameters(), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


# -- gradients of the reward


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_draft_gradient_through_sampler_vae_and_reward(tiny_sd, k, eta):
    """The gradient through the last k of 4 guided U-Net steps, the VAE and a reward equals finite differences
    of the LoRA that move it in those steps only (float64, random directions), and is the same with and
    without checkpointing."""
    policy, grads = policy64(tiny_sd), []
    sampler = double(sampler_of(policy, steps=4, eta=eta, guidance=2.0))
    noise = Noise64(**key(2).__dict__)
    for checkpointing in (False, True):
        policy.checkpointing = checkpointing
        record = rollout(policy, sampler, noise, gradients=Gradients.last(k, 4), store="image")
        grads.append(torch.autograd.grad(pixels(record.images).mean(), policy.parameters()))
    assert record.images.dtype == torch.float64
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-15)

    policy.late, h = int(sampler.timesteps[4 - k]), 3e-5
    for seed in range(3):
        torch.manual_seed(seed)
        direction = [torch.randn_like(p) for p in policy.parameters()]
        values = []
        for sign in (1, -1):
            policy.direction = [sign * h * d for d in direction]
            with torch.no_grad():
                values.append(float(pixels(rollout(policy, sampler, noise, store="image").images).mean()))
        policy.direction = None
        slope = sum(float((g * d).sum()) for g, d in zip(grads[0], direction, strict=True))
        assert (
            slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6, abs=1e-11)
            and abs(slope) > 1e-6
        )


@pytest.mark.parametrize(
    "plan",
    [
        Gradients(steps=(0, 2, 4)),
        Gradients.last(1, N),
        Gradients(steps=(1, 3), x0_image=True),
        Gradients(steps=(0, 1, 2, 3, 4), detach_input=True),
        Gradients(steps=(3,), stop=3),
        Gradients(steps=(N - 1,), renoise=2),
    ],
    ids=str,
)
def test_every_plan_on_the_unet(tiny_sd, plan):
    """Gaps, detached inputs, ReFL's stop, predicted x0 and re-noised copies: shapes are the record's, only
    kept steps carry a graph, and the gradient with checkpointing is that without."""
    grads = []
    for checkpointing in (False, True):
        policy = tiny_policy(tiny_sd, checkpointing=checkpointing)
        record = rollout(policy, sampler_of(policy, guidance=2.0), key(3), gradients=plan, store="image")
        b, kept = 3 * (1 + plan.renoise), len(plan.steps)
        assert record.images.shape == (b, 3, 16, 16) and len(record) == b and record.samples == 3
        assert (
            record.kept == plan.steps
            and record.outputs.shape == (b, kept, 2, 4, 8, 8)
            and record.outputs.requires_grad
        )
        assert record.latents.shape[:2] == (b, len(record.slots)) and set(plan.steps) <= set(record.slots)
        assert record.images.dtype == torch.float32 and not record.log_probs.requires_grad
        if plan.renoise:
            assert not torch.allclose(record.images[3:6], record.images[6:9])
        grads.append(torch.autograd.grad(pixels(record.images).mean(), policy.parameters()))
        with torch.no_grad():  # the same plan under no_grad keeps constants
            constant = rollout(
                policy, sampler_of(policy, guidance=2.0), key(3), gradients=plan, store="image"
            )
        assert not constant.outputs.requires_grad and torch.equal(constant.images, record.images)
    assert any(g.any() for g in grads[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_the_prefix_runs_without_a_graph(tiny_sd):
    """Before the first kept step no module runs with gradients enabled; from it on, those of the kept steps
    do."""
    policy = tiny_policy(tiny_sd, checkpointing=False)
    seen: list[bool] = []
    policy.family.denoiser.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    rollout(policy, sampler_of(policy), key(1), gradients=Gradients(steps=(2, 4)))
    assert seen == [False, False, True, False, True]


def test_lora_gradients_survive_autocasts_weight_cache(tiny_sd):
    """Under bf16 with a no_grad prefix, and even inside a caller's autocast whose weight cache that prefix
    would fill without gradients, every float32 LoRA weight has a float32 gradient."""
    for outer in (False, True):
        policy = tiny_policy(tiny_sd, precision="bf16", checkpointing=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            record = rollout(policy, sampler_of(policy), key(2), gradients=Gradients.last(1, N))
        pixels(record.images).mean().backward()
        assert all(
            p.dtype == p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in policy.parameters()
        )


# -- what is stored


def test_stored_steps_replay_and_others_are_refused(tiny_sd):
    """A rollout that keeps only the latents of steps 1 and 3 replays the same log-probs there and refuses
    other steps by name."""
    policy = tiny_policy(tiny_sd)
    sampler = sampler_of(policy)
    with torch.no_grad():
        whole = rollout(policy, sampler, key(3))
        some = rollout(policy, sampler, key(3), store=(1, 3), offload=True)
        rows, steps = torch.tensor([0, 2, 1]), torch.tensor([1, 3, 3])
        assert some.slots == (1, 2, 3, 4, N) and some.latents.shape[1] == 5
        assert torch.equal(
            replay(policy, some, rows, steps).log_prob, replay(policy, whole, rows, steps).log_prob
        )
        assert torch.equal(some.images, whole.images) and torch.equal(some.log_probs, whole.log_probs)
        with pytest.raises(IndexError, match=r"steps \[0\]"):
            replay(policy, some, rows, torch.tensor([0, 0, 0]))
        only = rollout(policy, sampler, key(3), store="image")
    assert only.slots == (N,) and torch.equal(only.latents[:, 0], whole.latents[:, N])


def test_concatenated_rollouts_are_one(tiny_sd):
    """Two rollouts of a key's halves, put together, are the rollout of the key (to batch-shape rounding),
    noise key included."""
    policy = tiny_policy(tiny_sd)
    sampler, whole = sampler_of(policy), key(4)
    with torch.no_grad():
        one = replace(
            rollout(policy, sampler, whole), reward=torch.arange(4.0), rewards={"r": torch.arange(4.0)}
        )
        halves = [rollout(policy, sampler, whole[rows]) for rows in ([0, 1], [2, 3])]
    halves = [
        replace(h, reward=torch.arange(2.0) + 2 * i, rewards={"r": torch.arange(2.0) + 2 * i})
        for i, h in enumerate(halves)
    ]
    both = Rollout.cat(halves)
    assert both.prompts == one.prompts and both.noise == one.noise and len(both) == 4
    assert torch.equal(both.reward, one.reward) and torch.equal(both.rewards["r"], one.rewards["r"])
    torch.testing.assert_close(both.latents, one.latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        both.cond.text["prompt_embeds"], one.cond.text["prompt_embeds"], rtol=0, atol=0
    )


# -- memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensor storages made inside it that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.live -= size


def test_memory_is_flat_in_k(tiny_sd):
    """With checkpointing the peak of live tensor bytes of K = N = 10 is below twice that of K = 1, with
    DRaFT+'s reference pass or without it; without checkpointing it is more than 4 times."""
    peak = {}
    for checkpointing, k, kl_coeff in ((True, 1, 0.0), (True, 10, 0.0), (True, 10, 0.5), (False, 10, 0.0)):
        policy = tiny_policy(tiny_sd, checkpointing=checkpointing)
        objective = DRaFT(k=k, kl_coeff=kl_coeff)
        with LiveBytes() as memory:
            plan = objective.plan(10, np.random.default_rng(0))
            record = rollout(policy, sampler_of(policy, steps=10), key(4), gradients=plan, store="image")
            objective.loss(policy, replace(record, reward=pixels(record.images)))[0].backward()
        peak[checkpointing, k, kl_coeff] = memory.peak
    assert max(peak[True, 10, 0.0], peak[True, 10, 0.5]) < 2 * peak[True, 1, 0.0], peak
    assert peak[False, 10, 0.0] > 4 * peak[True, 1, 0.0], peak


def test_a_trajectory_is_one_stack_of_latents(tiny_sd):
    """Each step more adds its latents once to the peak of sampling, and nothing else; so does an epoch's
    record of one micro-batch."""
    policy, peak = tiny_policy(tiny_sd), {}
    for steps in (10, 50):
        with LiveBytes() as memory, torch.no_grad():
            record = Rollout.cat([rollout(policy, sampler_of(policy, steps=steps), key())])
        peak[steps] = memory.peak
    assert (peak[50] - peak[10]) / 40 == pytest.approx(record.latents[:, 0].nbytes, rel=0.05)


@pytest.mark.parametrize("full", [False, True])
def test_penalty_gradient_survives_checkpointing(tiny_sd, full):
    """The reference passes a gradient to its input; recomputed during backward it is still the frozen model
    (LoRA or full)."""
    grads = []
    for checkpointing in (False, True):
        policy = tiny_policy(tiny_sd, checkpointing=checkpointing, full=full)
        with torch.no_grad():
            torch.manual_seed(2)
            for p in policy.parameters():
                p.add_(0.02 * torch.randn_like(p))
        record = rollout(policy, sampler_of(policy, guidance=2.0), key(2), gradients=Gradients.last(3, N))
        away = drift(policy, record)
        grads.append(torch.autograd.grad(away.eps_guided, policy.parameters(), allow_unused=True))
    size = max(float(g.abs().max()) for g in grads[0] if g is not None)
    for plain, checkpointed in zip(*grads, strict=True):
        if plain is not None:
            torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5 * size)
