"""What guidance's branches share is computed once: predictions and gradients are those of two whole
branches."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from alignlab.engine.conditioning import Conditioning
from alignlab.engine.policy import Policy
from alignlab.fast.shared_prefix import SharedStart, before_prompt
from alignlab.models.sd import StableDiffusion

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
NETWORKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sd1": ({}, ["conv_in", "resnets.0", "proj_in", "attn1", "to_q"]),
    "sd2": ({"use_linear_projection": True}, ["conv_in", "resnets.0", "proj_in", "attn1", "to_q"]),
    "emoji": (
        {"down_block_types": (PLAIN, CROSS)},
        ["conv_in", "resnets.0", "resnets.1", "downsamplers.0", "resnets.0", "proj_in", "attn1", "to_q"],
    ),
    "no self-attention": ({"only_cross_attention": True}, ["conv_in", "resnets.0", "proj_in"]),
    "unusual blocks": ({"down_block_types": ("SimpleCrossAttnDownBlock2D", CROSS)}, ["conv_in"]),
    "sdxl": (SDXL, []),
}


def unet(**config: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 2,
            "norm_num_groups": 8,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "down_block_types": (CROSS, CROSS),
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            **config,
        }
    )


class Family:
    """A U-Net that has no text encoder and no VAE."""

    frozen = text_encoders = ()
    lora_targets = ("to_q", "to_k", "to_v", "conv1")

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser

    def denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        added = {"text_embeds": text["text"][:, 0, :8], "time_ids": text["text"][:, 0, :6]}
        return self.denoiser(x, t, text["text"], added_cond_kwargs=added, return_dict=False)[0]


def numbers(policy: Policy) -> list[Tensor]:
    """Both branches, the reference's, and the gradient of their squares."""
    g = torch.Generator().manual_seed(1)
    cond = Conditioning(
        text={"text": torch.randn(3, 5, 16, generator=g)}, null={"text": torch.randn(1, 5, 16, generator=g)}
    )
    x = torch.randn(3, 4, 8, 8, generator=g).requires_grad_()
    t = torch.tensor([981, 500, 1])
    with policy.reference():
        base = policy.branches(x, t, cond, 3.0)
    out = policy.branches(x, t, cond, 3.0)
    (out.square().sum() + base.square().sum()).backward()
    gradients: Any = [x.grad, *(p.grad for p in policy.parameters())]
    for p in policy.parameters():
        p.grad = None
    return [base.detach(), out.detach(), *gradients]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_whole_branches(name: str, full: bool, checkpointing: bool) -> None:
    """Predictions and gradients are theirs to round-off: how a product of M rows is computed is the
    libraries' choice."""
    policy = Policy(Family(unet(**NETWORKS[name][0])), full=full, checkpointing=checkpointing)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    once = numbers(policy)
    policy.shared_start = SharedStart()  # of no network
    twice = numbers(policy)
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-4)
    assert (once[1][0] - once[1][1]).abs().max() > 0.01  # the branches differ
    assert (once[0] - once[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", NETWORKS)
def test_what_comes_before_the_prompt(name: str) -> None:
    """The convolutions and products whose outputs are the same under another prompt; where blocks are others
    than Stable Diffusion's, some of them."""
    config, expected = NETWORKS[name]
    network = unet(**config).eval()
    names = {module: key for key, module in network.named_modules()}
    found = [names[module] for module in before_prompt(network)]
    assert [key.endswith(end) for key, end in zip(found, expected, strict=True)] == [True] * len(expected)
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, key=key: seen.setdefault(key, []).append(out))
        for key, module in network.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    ]
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        for _ in range(2):
            Family(network).denoise(x, t, {"text": torch.randn(1, 5, 16)})
    for hook in hooks:
        hook.remove()
    cheap = {key for key in seen if "time_emb" in key}  # of one row an image
    same = {key for key, outs in seen.items() if torch.equal(*outs)} - cheap
    shared = {key for key in seen for own in found if key == own or key.startswith(f"{own}.")} - cheap
    assert shared == same if name in ("sd1", "sd2", "emoji") else shared < same


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_rows(tiny_sd: str, guidance_scale: float) -> None:
    """Guided, the first convolution sees each latent once and the last one twice; unguided, and called
    without a policy, every row is seen."""
    policy = Policy(StableDiffusion(tiny_sd))
    network: Any = policy.family.denoiser
    rows: list[tuple[str, int]] = []
    network.conv_in.register_forward_hook(lambda _, args, __: rows.append(("first", len(args[0]))))
    network.conv_out.register_forward_hook(lambda _, args, __: rows.append(("last", len(args[0]))))
    cond = policy.encode(["a cat", "a dog"])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
    with torch.no_grad():
        policy.predict(x, t, cond, guidance_scale)
        policy.family.denoise(torch.cat([x, x]), torch.cat([t, t]), cond.guided)
    assert rows == [("first", 2), ("last", 2 if guidance_scale == 1 else 4), ("first", 4), ("last", 4)]


@pytest.mark.parametrize("at_a_time", [1, 3, 4])
def test_a_family_that_calls_its_network_on_some_rows(at_a_time: int) -> None:
    """Nothing is shared: a part's halves are other latents, or one of them alone."""

    class InParts(Family):
        def denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
            parts = zip(*(v.split(at_a_time) for v in (x, t, text["text"])), strict=True)
            return torch.cat([super(InParts, self).denoise(x, t, {"text": part}) for x, t, part in parts])

    found = []
    for family in (InParts, Family):
        policy = Policy(family(unet()))  # type: ignore[arg-type]
        found.append(numbers(policy))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_the_embedded_models_share() -> None:
    """6 % of a guided pass's arithmetic, as the module says."""
    network: Any = StableDiffusion("emoji").denoiser.to("meta")
    start, counts = SharedStart(network), []
    for rows in (0, 2):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), start.shared(rows):
            network(*(torch.empty(size, device="meta") for size in ((2, 8, 12, 12), (2,), (2, 16, 128))))
        counts.append(counter.get_total_flops())
    assert 1 - counts[1] / counts[0] == pytest.approx(0.06, abs=0.005)


def test_it_ends_with_an_error() -> None:
    """What fails inside leaves nothing behind; nothing is shared outside."""
    network = unet()
    start, rows = SharedStart(network), []
    network.conv_in.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with pytest.raises(RuntimeError), start.shared(2):
        network(x, 1, text[:, :, :3])
    with torch.no_grad():
        network(x, 1, text)
    assert rows == [1, 2]
