"""A LoRA layer as one product is peft's layer: outputs, gradients, scale, switched off, merged, with two
adapters. In 16 bits peft's stays."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Conv2d, Linear
from torch import nn

from alignlab.fast.lora_product import LowRank, LowRankConvolution, OneConvolution, OneProduct
from alignlab.models.lora import LoRA, adapt, adapters, switch


class Two(nn.Module):
    """A layer with a bias and one without, and a convolution of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out, self.conv = (
            nn.Linear(12, 20),
            nn.Linear(20, 7, bias=False),
            nn.Conv1d(1, 1, 1),
        )
        self.requires_grad_(False)

    def add_adapter(self, config: LoraConfig, name: str = "default") -> None:
        inject_adapter_in_model(config, self, adapter_name=name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out(self.to_q(x).tanh())


class TwoConvolutions(Two):
    """One with a bias and a stride, one without."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Conv2d(3, 8, 3, stride=(2, 1), padding=(1, 0))
        self.to_out = nn.Conv2d(8, 5, (3, 1), bias=False)
        self.requires_grad_(False)


def two(*, dtype: torch.dtype = torch.float32, kind: type[Two] = Two) -> Two:
    torch.manual_seed(0)
    net = kind().to(dtype)
    adapt(net, LoRA(rank=3, alpha=6), ["to_q", "to_out", "conv"])
    return randomised(net)


def randomised(net: Two) -> Two:
    for p in net.parameters():
        if p.requires_grad:
            p.data.normal_()
    return net


def pefts(net: Two) -> Two:
    for layer in adapters(net):
        layer.__class__ = {OneProduct: Linear, OneConvolution: Conv2d}.get(type(layer), type(layer))
    return net


def results(net: Two, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of an uneven sum of it in x and in every adapter."""
    x = x.clone().requires_grad_()
    out = net(x)
    (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "shape, kind", [((12,), Two), ((5, 12), Two), ((2, 3, 12), Two), ((2, 3, 12, 9), TwoConvolutions)]
)
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_pefts_layer(shape, kind, scale, layout):
    ours, theirs = two(kind=kind).double().to(memory_format=layout), pefts(two(kind=kind).double())
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for layer in (*adapters(ours), *adapters(theirs)):
        layer.scale_layer(scale)
    assert type(ours.to_q) is type(ours.to_out) is {Two: OneProduct, TwoConvolutions: OneConvolution}[kind]
    assert type(theirs.to_q) is {Two: Linear, TwoConvolutions: Conv2d}[kind]
    found, expected = results(ours, x), results(theirs, x)
    assert len(found) == 2 + 4
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape, kind", [((2, 3, 12), Two), ((2, 3, 12, 9), TwoConvolutions)])
def test_it_is_pefts_layer_in_float32(shape, kind):
    """Whose products are oneDNN's."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found, expected = (
        results(net, x)
        for net in (two(kind=kind).to(memory_format=torch.channels_last), pefts(two(kind=kind)))
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_finite_differences():
    """First and second ones, in x, A and B: a reward may differentiate the image's gradient again."""
    g = torch.Generator().manual_seed(0)
    x, W, A, B = (
        torch.randn(size, dtype=torch.float64, generator=g) for size in ((2, 3, 5), (4, 5), (2, 5), (4, 2))
    )
    trained = tuple(t.requires_grad_() for t in (x, A, B))
    torch.autograd.gradcheck(lambda x, A, B: LowRank.apply(x, W, None, A, B, 0.7), trained)
    torch.autograd.gradgradcheck(lambda x, A, B: LowRank.apply(x, W, None, A, B, 0.7), trained)


def test_gradients_of_a_convolution_are_those_of_finite_differences():
    g, how = torch.Generator().manual_seed(0), ((2, 1), (1, 0))
    sizes = (1, 2, 5, 6), (3, 2, 3, 2), (2, 2, 3, 2), (3, 2, 1, 1)
    x, W, A, B = (torch.randn(size, dtype=torch.float64, generator=g) for size in sizes)
    trained = tuple(t.requires_grad_() for t in (x, A, B))
    torch.autograd.gradcheck(lambda x, A, B: LowRankConvolution.apply(x, W, None, A, B, 0.7, *how), trained)
    torch.autograd.gradgradcheck(
        lambda x, A, B: LowRankConvolution.apply(x, W, None, A, B, 0.7, *how), trained
    )


def test_switched_off_it_is_the_base_layer():
    net, x = two(), torch.randn(4, 12)
    switch(adapters(net), off=True)
    assert torch.equal(
        net.to_q(x), nn.functional.linear(x, net.to_q.base_layer.weight, net.to_q.base_layer.bias)
    )
    switch(adapters(net), off=False)
    assert not torch.equal(net.to_q(x), net.to_q.base_layer(x))


@pytest.mark.parametrize("kind, shape", [(Two, (4, 12)), (TwoConvolutions, (2, 3, 12, 9))])
def test_other_states_are_left_to_peft(kind, shape):
    """An adapter merged into the weight is not added again; two adapters are both added."""
    net, x = two(kind=kind), torch.randn(shape)
    apart = net(x)
    for layer in (net.to_q, net.to_out):
        layer.merge()
    torch.testing.assert_close(net(x), apart, rtol=1e-4, atol=1e-4)
    ours, theirs = two(kind=kind), pefts(two(kind=kind))
    for one in (ours, theirs):
        one.add_adapter(
            LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False), "second"
        )
        one.to_q.set_adapter(["default", "second"])
        torch.manual_seed(2)
        randomised(one)
    assert ours.to_q.active_adapters == ["default", "second"]
    assert torch.equal(ours(x), theirs(x))


def test_what_stays_pefts():
    """Convolutions of one dimension; and 16 bits, where W + s B A would be rounded to W's grid: an adapter of
    1e-4 would be lost."""
    assert type(two().conv) not in (OneProduct, OneConvolution, Linear)
    assert type(two(dtype=torch.bfloat16).to_q) is Linear
    assert type(two(dtype=torch.bfloat16, kind=TwoConvolutions).to_q) is Conv2d
