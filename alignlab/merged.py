"""peft's LoRA layer as one product, x (W + s B A)^T, with the gradients of the low-rank form.

On a CPU the layer's four small products cost more than their arithmetic. In 16 bits the sum would be rounded to W's
grid and lose small adapters, so there peft's own form stays.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from torch.nn import functional as F


class Merged(Linear):
    """A peft layer with one adapter, no dropout and float32 weights."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] to [..., out]."""
        if self.disable_adapters:
            out: Tensor = self.base_layer(x)
            return out
        (name,) = self.active_adapters
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        product: Tensor = _Product.apply(x, self.base_layer.weight, self.base_layer.bias, A, B, self.scaling[name])
        return product


class _Product(torch.autograd.Function):
    """x (W + s B A)^T + bias; W and bias are frozen, A is [rank, in], B [out, rank]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return F.linear(x, torch.addmm(W, B, A, alpha=s), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, A, B = ctx.saved_tensors
        rows, seen = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        to_x = grad @ torch.addmm(W, B, A, alpha=ctx.s) if ctx.needs_input_grad[0] else None
        to_A = ctx.s * (rows @ B).T @ seen
        to_B = ctx.s * rows.T @ (seen @ A.T)
        return to_x, None, None, to_A, to_B, None


def merge(layers: list[Any]) -> None:
    """Turns peft's linear layers with float32 weights on a CPU into `Merged` ones; others stay."""
    for layer in layers:
        weight = layer.get_base_layer().weight
        if type(layer) is Linear and weight.dtype == torch.float32 and weight.device.type == "cpu":
            layer.__class__ = Merged
