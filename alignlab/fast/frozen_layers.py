"""Layers whose weights are not trained: their gradient needs the weights alone, and on CPUs their products
are oneDNN's.

torch keeps a convolution's input for its way back, as one formula gives all three gradients. Its float32
products are MKL's, which does not use all that AMD's processors have.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

ONE_DNN: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)
"""torch's own name for oneDNN's linear layer; it has no gradient."""
Pair = tuple[int, int]
"""Of height and width."""
M = TypeVar("M", bound=nn.Module)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, by oneDNN where it can and nothing is to be differentiated."""
    if torch.is_grad_enabled() or not _by_one_dnn(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = ONE_DNN(x, weight, bias, "none", [], "")
    return out


def _by_one_dnn(x: Tensor, weight: Tensor) -> bool:
    """Float32 on a CPU, neither under autocast nor in a compiled graph, which has its own kernels."""
    ours = ONE_DNN is not None and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return ours and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


class FrozenLinear(nn.Linear):
    """x [..., in] to [..., out]; torch's own while its weight is trained."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.requires_grad or not _by_one_dnn(input, self.weight):
            return super().forward(input)
        out: Tensor = LinearInput.apply(input, self.weight, self.bias)
        return out


class FrozenConv2d(nn.Conv2d):
    """[n, in, h, w] to [n, out, h', w']; torch's own while its weight is trained."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return super().forward(input)
        out: Tensor = ConvolutionInput.apply(input, self.weight, self.bias, self.stride, self.padding)
        return out


class LinearInput(torch.autograd.Function):
    """x W^T + bias with a gradient in x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return linear(grad, weight.T), None, None


class ConvolutionInput(torch.autograd.Function):
    """A convolution with a gradient in x only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, (stride, padding)
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight.to(grad.dtype), grad, *ctx.how), None, None, None, None


def freeze(module: M, *, layers: bool = True) -> M:
    """The module itself: no gradients for its weights, no dropout; with `layers` its linear layers and plain
    convolutions become these."""
    module.requires_grad_(False).eval()
    for layer in module.modules() if layers else ():
        if type(layer) is nn.Linear:
            layer.__class__ = FrozenLinear
        if type(layer) is nn.Conv2d and plain(layer):
            layer.__class__ = FrozenConv2d
    return module


def plain(layer: nn.Conv2d) -> bool:
    """Whether stride and padding say all of it."""
    return (
        layer.groups == 1
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )
