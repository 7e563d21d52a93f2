"""peft's LoRA layers as one product with W + s B A, and the gradients of the low-rank form.

In small models the products with A and B, their sum and its scale cost more than their arithmetic. In 16 bits
W + s B A would be rounded to W's grid and lose small adapters, so there peft's own form stays.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from alignlab.fast.frozen_layers import Pair, linear, plain


class OneProduct(Linear):
    """A linear layer whose only adapter has no dropout, no bias and no variant."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] to [..., out]."""
        if not _alone(self):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        base = self.base_layer
        product: Tensor = LowRank.apply(x, base.weight, base.bias, *_adapter(self))
        return product


class OneConvolution(Conv2d):
    """The same of a convolution: A is one of its shape, B a 1 x 1 one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [n, in, h, w] to [n, out, h', w']."""
        if not _alone(self):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        base = self.base_layer
        product: Tensor = LowRankConvolution.apply(
            x, base.weight, base.bias, *_adapter(self), base.stride, base.padding
        )
        return product


def _alone(layer: Any) -> bool:
    """Whether exactly one adapter is to be added."""
    on = not (layer.disable_adapters or layer.merged)
    return on and len(layer.lora_A) == 1 and layer.active_adapters == list(layer.lora_A)


def _adapter(layer: Any) -> tuple[Tensor, Tensor, float]:
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


class LowRank(torch.autograd.Function):
    """x (W + s B A)^T + bias; W and bias are frozen, A is [rank, in], B [out, rank]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float
    ) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return linear(x, _merged(W, A, B, s), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, A, B = ctx.saved_tensors
        for_x, *_ = ctx.needs_input_grad
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        to_x = linear(grad, _merged(W, A, B, ctx.s).T) if for_x else None
        to_A = ctx.s * _weight(inputs, linear(rows, B.T))
        to_B = ctx.s * _weight(rows, linear(inputs, A)).T
        return to_x, None, None, to_A, to_B, None


class LowRankConvolution(torch.autograd.Function):
    """conv(x, W + s B A) + bias; W [out, in, kh, kw] and bias are frozen, A is [rank, in, kh, kw], B [out,
    rank, 1, 1]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        s: float,
        stride: Pair,
        padding: Pair,
    ) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.s, ctx.how = s, (stride, padding)
        return F.conv2d(x, _merged(W, A, B, s), bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, A, B = ctx.saved_tensors
        for_x, *_ = ctx.needs_input_grad
        to_x = conv2d_input(x.shape, _merged(W, A, B, ctx.s), grad, *ctx.how) if for_x else None
        n, _, height, width = grad.shape
        rows, inputs = _rows(grad), _rows(F.conv2d(x, A, None, *ctx.how))
        in_rank = linear(rows, B.flatten(1).T).view(n, height, width, -1).permute(0, 3, 1, 2)
        to_A = conv2d_weight(x, A.shape, ctx.s * in_rank, *ctx.how)
        to_B = ctx.s * _weight(rows, inputs).T.reshape(B.shape)
        return to_x, None, None, to_A, to_B, None, None, None


def _weight(inputs: Tensor, grad: Tensor) -> Tensor:
    """The gradient [r, in] of a weight, from inputs [n, in] and its output's gradient [n, r]. r is small: the
    other order takes up to ten times as long."""
    return linear(grad.T, inputs.T)


def _rows(x: Tensor) -> Tensor:
    """[n, c, h, w] as [n h w, c]; a view in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _merged(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """W + s B A in W's layout."""
    if W.dim() == 4 and W.is_contiguous(memory_format=torch.channels_last):
        W, A = (weight.permute(0, 2, 3, 1) for weight in (W, A))
        return torch.addmm(W.flatten(1), B.flatten(1), A.flatten(1), alpha=s).view_as(W).permute(0, 3, 1, 2)
    return torch.addmm(W.flatten(1), B.flatten(1), A.flatten(1), alpha=s).view_as(W)


def as_one_product(layers: Sequence[Any]) -> None:
    """Turns peft's linear layers and plain convolutions with float32 weights into these; layers in 16 bits
    stay as they are."""
    for layer in layers:
        base = layer.get_base_layer()
        if base.weight.dtype != torch.float32:
            continue
        if type(layer) is Linear and isinstance(base, nn.Linear):
            layer.__class__ = OneProduct
        if type(layer) is Conv2d and isinstance(base, nn.Conv2d) and plain(base):
            layer.__class__ = OneConvolution
