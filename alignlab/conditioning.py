"""Encoded prompts, whatever tensors a model family needs of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Encoded prompts and the encoded empty prompt."""

    text: dict[str, Tensor]
    """[B, ...] each."""
    null: dict[str, Tensor]
    """[1, ...] each."""

    def __getitem__(self, rows: Tensor) -> "Conditioning":
        return Conditioning(text={k: v[rows] for k, v in self.text.items()}, null=self.null)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        return Conditioning(text={k: torch.cat([p.text[k] for p in parts]) for k in parts[0].text}, null=parts[0].null)
