"""The merged layer is peft's: outputs, all three gradients, the reference, an adapter's scale; in 16 bits peft's own stays."""

import pytest
import torch
from peft.tuners.lora import Linear

from alignlab.lora import LoRA, adapt, adapters, switch
from alignlab.merged import Merged


class Two(torch.nn.Module):
    """A layer with a bias and one without, as peft and diffusers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = torch.nn.Linear(12, 20), torch.nn.Linear(20, 7, bias=False)
        self.requires_grad_(False)

    def add_adapter(self, config) -> None:
        from peft import inject_adapter_in_model

        inject_adapter_in_model(config, self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out(self.to_q(x).tanh())


def two(*, dtype: torch.dtype = torch.float32) -> Two:
    torch.manual_seed(0)
    net = Two().to(dtype)
    adapt(net, LoRA(rank=3, alpha=6), ["to_q", "to_out"])
    for p in net.parameters():
        if p.requires_grad:
            p.data.normal_()
    return net


def results(net: Two, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of an uneven sum of it in x and in every adapter."""
    x = x.clone().requires_grad_()
    out = net(x)
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_merged_is_pefts_layer(shape, scale):
    ours, theirs = two().double(), two().double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for layer in adapters(theirs):
        layer.__class__ = Linear
    for layer in (*adapters(ours), *adapters(theirs)):
        layer.scale_layer(scale)
    assert {type(layer) for layer in adapters(ours)} == {Merged}
    for one, other in zip(results(ours, x), results(theirs, x), strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives():
    """A reward may differentiate the image's gradient again: backward is itself differentiable."""
    net = two().double()
    torch.autograd.gradgradcheck(net, torch.randn(2, 12, dtype=torch.float64, requires_grad=True))


def test_switched_off_it_is_the_base_layer():
    net, x = two(), torch.randn(4, 12)
    switch(adapters(net), off=True)
    base = torch.nn.functional.linear(x, net.to_q.base_layer.weight, net.to_q.base_layer.bias)
    assert torch.equal(net.to_q(x), base)
    switch(adapters(net), off=False)
    assert not torch.equal(net.to_q(x), base)


def test_16_bits_keep_pefts_form():
    """W + s B A would be rounded to W's grid: an adapter of 1e-4 would be lost."""
    assert {type(layer) for layer in adapters(two(dtype=torch.bfloat16))} == {Linear}
