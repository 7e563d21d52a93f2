"""What a policy saves and what it refuses. Its reference, guidance and precision are in test_rollout.py."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from alignlab.engine.policy import Policy
from alignlab.models.lora import LoRA
from alignlab.models.sd import StableDiffusion
from tests.conftest import PROMPTS, tiny_policy


def predictions(policy) -> torch.Tensor:
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([981, 500, 1])
    with torch.no_grad():
        return policy.predict(x, t, policy.encode(PROMPTS[:3]), 3.0)


@pytest.mark.parametrize("full", [False, True])
def test_state_round_trip(tiny_sd, full):
    """A fresh policy that loads a tuned one's state predicts the same, bit for bit, and its reference is
    still the base model."""
    tuned, fresh = tiny_policy(tiny_sd, full=full), tiny_policy(tiny_sd, size=0, full=full)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.01 * torch.randn_like(p))
    before = predictions(fresh)
    fresh.load_state_dict({k: v.clone() for k, v in tuned.state_dict().items()})
    assert torch.equal(predictions(fresh), predictions(tuned)) and not torch.equal(predictions(fresh), before)
    with fresh.reference():
        assert torch.equal(predictions(fresh), before)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in fresh.parameters())


@pytest.mark.parametrize("full", [False, True])
def test_saved_model_is_the_policy(tiny_sd, tmp_path, full):
    """What save() writes, loaded by plain diffusers, predicts what the policy does (LoRA alpha other than
    rank included)."""
    policy = tiny_policy(tiny_sd, full=full, alpha=2.0)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01 * torch.randn_like(p))
    policy.save(tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(str(tmp_path) if full else tiny_sd, safety_checker=None)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([981, 500, 1])
    cond = policy.encode(PROMPTS[:3])
    base = pipe.unet(x, t, cond.text["prompt_embeds"]).sample.detach()
    if not full:
        pipe.load_lora_weights(str(tmp_path))
    theirs = pipe.unet(x, t, cond.text["prompt_embeds"]).sample.detach()
    torch.testing.assert_close(theirs, policy.predict(x, t, cond, 1.0).detach(), rtol=1e-4, atol=1e-5)
    assert full or (theirs - base).abs().mean() > 0.05


def test_encoding_does_not_depend_on_the_batch(tiny_sd):
    """Embeddings are bit-equal in any batch, encoded once a prompt."""
    policy, calls = tiny_policy(tiny_sd), []
    encode = policy.family.encode
    policy.family.encode = lambda prompts: calls.append(prompts) or encode(prompts)
    whole = policy.encode(PROMPTS).text["prompt_embeds"]
    assert torch.equal(policy.encode(PROMPTS[3:5]).text["prompt_embeds"], whole[3:5])
    assert sorted(calls) == sorted([p] for p in set(PROMPTS))


@pytest.mark.parametrize("full", [False, True])
def test_on_a_cpu_convolutions_are_channels_last(tiny_sd, full):
    """Of the denoiser, its adapters, its copy and the decoder; the numbers are those of the other layout, to
    round-off."""
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([981, 500, 1])
    found = []
    for layout in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        policy = Policy(StableDiffusion(tiny_sd), full=full, lora=LoRA(targets=("to_q", "conv1")))
        modules = [policy.family.denoiser, *policy.family.frozen, *([policy._copy] if full else [])]
        weights = [w for module in modules for w in module.parameters() if w.dim() == 4]
        assert len(weights) > 20 and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
        for module in modules:
            torch.nn.Module.to(module, memory_format=layout)
        images = policy.decode(policy.predict(x, t, policy.encode(PROMPTS[:3]), 3.0))
        images.square().mean().backward()
        found.append([images.detach(), *(p.grad for p in policy.parameters())])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_in_16_bits_the_layout_is_torchs(tiny_sd):
    """There channels_last is slower on a CPU; asked for, it is given."""
    for asked in (False, True):
        policy = Policy(StableDiffusion(tiny_sd), precision="bf16", channels_last=asked)
        assert policy.family.denoiser.conv_out.weight.is_contiguous() is not asked


@pytest.mark.parametrize("knob", [{"decode_batch": 1}, {"text_on_host": True}])
def test_knobs_change_no_number(tiny_sd, knob, tmp_path):
    """Memory and speed keys: the same images and the same gradient of their mean, to round-off; a LoRA on
    convolutions is saved."""
    Policy(StableDiffusion(tiny_sd), lora=LoRA(targets=("to_q", "conv1")), **knob).save(tmp_path)
    assert any(tmp_path.glob("*.safetensors"))
    found = []
    for options in ({}, knob):
        policy = Policy(StableDiffusion(tiny_sd), full=True, checkpointing=True, **options)
        x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        out = policy.predict(x, torch.tensor([981, 500, 1]), policy.encode(PROMPTS[:3]), 3.0)
        images = policy.decode(out)
        images.square().mean().backward()
        found.append((images.detach(), [p.grad for p in policy.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compiled(tiny_sd):
    """torch.compile: the same predictions, of the policy and of its reference, and the same gradient."""
    found = []
    for compiled in (False, True):
        policy = tiny_policy(tiny_sd, compile=compiled)
        x, t = (
            torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
            torch.tensor([981, 500, 1]),
        )
        out = policy.predict(x, t, policy.encode(PROMPTS[:3]), 3.0)
        out.square().mean().backward()
        with policy.reference(), torch.no_grad():
            base = policy.predict(x, t, policy.encode(PROMPTS[:3]), 3.0)
        found.append([out.detach(), base, *(p.grad for p in policy.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_refusal():
    """A LoRA without rank is refused."""
    with pytest.raises(ValueError, match=r"policy.lora.rank=0"):
        LoRA(rank=0)
