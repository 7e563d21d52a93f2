"""The trained weights as they once were: a reference that moves with the policy, as online DPO may have
it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alignlab.engine.policy import Policy


class Snapshot:
    """A second set of the trained weights (the LoRA, or all weights of full fine-tuning), on their device.
    Before `take` there is none, and the reference is the pretrained model."""

    def __init__(self) -> None:
        self._weights: list[Tensor] = []

    def take(self, policy: Policy) -> None:
        """Remembers the policy's weights of this moment. Those of a model that is split over processes cannot
        be (sharding.py)."""
        assert not policy.sharded  # refused with the configuration
        self._weights = [parameter.detach().clone() for parameter in policy.parameters()]

    @contextmanager
    def reference(self, policy: Policy) -> Iterator[None]:
        """Inside, the policy has these weights, and no graph is recorded: a checkpoint would recompute it
        with the others. They change places without a copy, so a graph that was recorded before keeps its
        own."""
        with torch.no_grad():
            if not self._weights:
                with policy.reference():
                    yield
                return
            trained, current = policy.parameters(), [parameter.data for parameter in policy.parameters()]
            self._weights = [
                stored.to(weight.device) for stored, weight in zip(self._weights, current, strict=True)
            ]  # from a checkpoint
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
