"""What a denoiser is conditioned on: encoded prompts, in the tensors that its model family needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Holds B encoded prompts, and the encoded empty prompt for classifier-free guidance."""

    text: dict[str, Tensor]
    """[B, ...] each, by the family's own names."""
    null: dict[str, Tensor]
    """[1, ...] each: the empty prompt."""

    @cached_property
    def guided(self) -> dict[str, Tensor]:
        """Stacks the prompts and B empty prompts, [2B, ...] each.

        It is computed once, so that all steps of a rollout, and their graphs, share one copy.
        """
        return {k: torch.cat([v, self.null[k].expand_as(v)]) for k, v in self.text.items()}

    def __getitem__(self, rows: Tensor) -> "Conditioning":
        """Takes the prompts at `rows` [M] long."""
        return Conditioning(text={k: v[rows] for k, v in self.text.items()}, null=self.null)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """Joins the prompts of several parts, in their order."""
        return Conditioning(
            text={k: torch.cat([p.text[k] for p in parts]) for k in parts[0].text}, null=parts[0].null
        )
