"""A snapshot of the trained weights, which online DPO may use as a reference that follows the policy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alignlab.engine.policy import Policy


class Snapshot:
    """Keeps a second set of the trained weights: the LoRA, or all weights of full fine-tuning.

    Before the first `take` there is none, and the reference is the pretrained model.
    """

    def __init__(self) -> None:
        self._weights: list[Tensor] = []

    def take(self, policy: Policy) -> None:
        """Copies the present weights of the policy. A model split over processes is refused earlier."""
        assert not policy.sharded  # config/train_rules.py refuses it
        self._weights = [parameter.detach().clone() for parameter in policy.parameters()]

    @contextmanager
    def reference(self, policy: Policy) -> Iterator[None]:
        """Gives the policy the weights of the snapshot inside of a `with`.

        No graph is recorded inside: checkpointing would recompute it later, with the trained weights. The two
        sets change places without a copy, so a graph that was recorded before keeps the weights it was made
        with.
        """
        with torch.no_grad():
            if not self._weights:
                with policy.reference():
                    yield
                return
            trained, current = policy.parameters(), [parameter.data for parameter in policy.parameters()]
            # Weights that come from a checkpoint are still on the CPU.
            self._weights = [
                stored.to(weight.device) for stored, weight in zip(self._weights, current, strict=True)
            ]
            try:
                for parameter, stored in zip(trained, self._weights, strict=True):
                    parameter.data = stored
                yield
            finally:
                for parameter, weight in zip(trained, current, strict=True):
                    parameter.data = weight

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weights = list(state["weights"])
