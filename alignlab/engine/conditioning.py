"""Encoded prompts, whatever tensors a model family needs of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Encoded prompts and the encoded empty prompt."""

    text: dict[str, Tensor]
    """[B, ...] each."""
    null: dict[str, Tensor]
    """[1, ...] each."""

    @cached_property
    def guided(self) -> dict[str, Tensor]:
        """[2B, ...] each: the prompts, then the empty prompt for each of them. One copy for all steps that
        ask, and for their graphs."""
        return {k: torch.cat([v, self.null[k].expand_as(v)]) for k, v in self.text.items()}

    def __getitem__(self, rows: Tensor) -> "Conditioning":
        return Conditioning(text={k: v[rows] for k, v in self.text.items()}, null=self.null)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        return Conditioning(
            text={k: torch.cat([p.text[k] for p in parts]) for k in parts[0].text}, null=parts[0].null
        )
