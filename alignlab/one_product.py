"""peft's LoRA layer as one product, x (W + s B A)^T, with the gradients of the low-rank form.

In small models the products with A and B, their sum and its scale cost more than their arithmetic. In 16 bits W + s B A
would be rounded to W's grid and lose small adapters, so there peft's own form stays.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional as F


class OneProduct(Linear):
    """A linear layer whose only adapter has no dropout, no bias and no variant."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] to [..., out]."""
        if self.disable_adapters or self.merged or len(self.lora_A) != 1 or self.active_adapters != list(self.lora_A):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        (name,) = self.lora_A
        A, B, base = self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer
        product: Tensor = LowRank.apply(x, base.weight, base.bias, A, B, self.scaling[name])
        return product


class LowRank(torch.autograd.Function):
    """x (W + s B A)^T + bias; W and bias are frozen, A is [rank, in], B [out, rank]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return F.linear(x, torch.addmm(W, B, A, alpha=s), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, W, A, B = ctx.saved_tensors
        for_x, *_ = ctx.needs_input_grad
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        to_x = grad @ torch.addmm(W, B, A, alpha=ctx.s) if for_x else None
        to_A = (ctx.s * (rows @ B)).T @ inputs
        to_B = rows.T @ (ctx.s * (inputs @ A.T))
        return to_x, None, None, to_A, to_B, None


def as_one_product(layers: Sequence[Any]) -> None:
    """Turns peft's linear layers with float32 weights into `OneProduct`; convolutions and layers in 16 bits stay as they are."""
    for layer in layers:
        base = layer.get_base_layer()
        if type(layer) is Linear and type(base) is nn.Linear and base.weight.dtype == torch.float32:
            layer.__class__ = OneProduct
