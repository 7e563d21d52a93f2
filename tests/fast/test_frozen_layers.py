"""Frozen layers are torch's: outputs, first and second gradients, in float32 and under autocast. A
convolution keeps no input; unfrozen ones train."""

import pytest
import torch
from torch import nn

from alignlab.fast import frozen_layers as frozen
from alignlab.fast.frozen_layers import ConvolutionInput, FrozenConv2d, FrozenLinear, LinearInput, freeze


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(6, 6, 3, stride=2, padding=(1, 2), bias=False),
        nn.Tanh(),
        nn.Linear(6, 7),
        nn.Tanh(),
        nn.Linear(7, 2, bias=False),
    )


def both() -> tuple[nn.Sequential, nn.Sequential]:
    ours, theirs = net(), net().requires_grad_(False)
    freeze(ours)
    return ours, theirs


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(
        2, 3, 10, 9, generator=torch.Generator().manual_seed(1), dtype=dtype, requires_grad=True
    )


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, the gradient of its squares in x, and that of the gradient's squares."""
    out = module(x)
    (first,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return [out, first, second]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_torchs_layers(dtype):
    ours, theirs = both()
    assert [type(layer) for layer in ours[::2]] == [FrozenConv2d, FrozenConv2d, FrozenLinear, FrozenLinear]
    torch.testing.assert_close(gradients(ours.to(dtype), x(dtype)), gradients(theirs.to(dtype), x(dtype)))


def test_a_gradient_that_is_not_differentiated_again():
    """oneDNN gives it."""
    ours, theirs = both()
    found = [torch.autograd.grad(module(image := x()).square().sum(), image) for module in (ours, theirs)]
    torch.testing.assert_close(*found)


def test_finite_differences():
    g = torch.Generator().manual_seed(0)
    image, weight, rows, W = (
        torch.randn(size, dtype=torch.float64, generator=g)
        for size in ((1, 2, 5, 4), (3, 2, 3, 3), (2, 3), (4, 3))
    )
    how = (2, 1), (1, 2)
    torch.autograd.gradcheck(lambda x: ConvolutionInput.apply(x, weight, None, *how), image.requires_grad_())
    torch.autograd.gradcheck(lambda x: LinearInput.apply(x, W, None), rows.requires_grad_())
    torch.autograd.gradgradcheck(lambda x: ConvolutionInput.apply(x, weight, None, *how), image)
    torch.autograd.gradgradcheck(lambda x: LinearInput.apply(x, W, None), rows)


def test_autocast():
    """In bf16 as torch's, and back to a float32 gradient."""
    ours, theirs = both()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(image := x()), theirs(other := x())
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    for out in (found, expected):
        out.float().square().sum().backward()
    assert image.grad.dtype == torch.float32
    torch.testing.assert_close(image.grad, other.grad, rtol=0.05, atol=0.05)


def test_no_input_is_kept():
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        for module in both():
            kept.append(torch.Size([]))
            module[0](x())
    assert kept == [(), (6, 3, 3, 3), (), (2, 3, 10, 9), (6, 3, 3, 3)]


def test_unfrozen_ones_train():
    """Their weights' gradients are torch's, to the bit."""
    ours, theirs = both()
    for module in (ours, theirs):
        module.requires_grad_(True)
        module(x()).square().sum().backward()
    assert all(
        torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_what_stays_torchs(monkeypatch):
    """Grouped, circular, dilated and 'same' convolutions; all products without oneDNN."""
    kinds = {"groups": 2}, {"padding_mode": "circular"}, {"padding": "same"}, {"dilation": 2}
    others = nn.Sequential(*(nn.Conv2d(2, 2, 3, **kind) for kind in kinds))
    freeze(others)
    assert all(type(layer) is nn.Conv2d for layer in others) and not any(
        p.requires_grad for p in others.parameters()
    )
    monkeypatch.setattr(frozen, "ONE_DNN", None)
    ours, theirs = both()
    assert torch.equal(ours(x()), theirs(x()))
