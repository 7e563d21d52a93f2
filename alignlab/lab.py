"""Everything a run is made of, built from a checked configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignlab.checks import without_weighing
from alignlab.config import device_of
from alignlab.data.prompts import Prompts
from alignlab.metrics.diversity import PerceptualDistance
from alignlab.nodes import build
from alignlab.objectives import Objective
from alignlab.policy import Policy
from alignlab.rewards.compose import WeightedSum
from alignlab.samplers import Sampler

STATEFUL = ("objective", "optimizer", "scaler", "reward")
"""The parts whose state a checkpoint holds, beside the policy's weights."""


@dataclass(kw_only=True)
class Lab:
    policy: Policy
    sampler: Sampler
    eval_sampler: Sampler
    reward: WeightedSum
    held_out: WeightedSum
    diversity: PerceptualDistance
    prompts: Prompts
    objective: Objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @staticmethod
    def of(c: dict[str, Any]) -> "Lab":
        """The seed decides the LoRA's initial A; all other draws are keyed (noise.py)."""
        torch.manual_seed(c["seed"])
        device = device_of(c["device"])
        family = build(c["model"])
        policy = build(c["policy"], family=family, precision=c["precision"], device=device)
        sampler, eval_sampler = (build(c[group], scheduler=family.scheduler).to(device) for group in ("sampler", "eval_sampler"))
        reward, held_out = (weighted_sum(c[group]) for group in ("reward", "eval_rewards"))
        return Lab(
            policy=policy,
            sampler=sampler,
            eval_sampler=eval_sampler,
            reward=reward,
            held_out=held_out,
            diversity=build(c["diversity"]),
            prompts=build(c["prompts"]),
            objective=build(c["algo"]),
            optimizer=build(c["optimizer"], params=policy.parameters()),
            scaler=torch.amp.GradScaler(device.type, enabled=c["precision"] == "fp16"),
        )

    def score(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Training and held-out rewards by name, [B] each."""
        return {**self.held_out.score(images, prompts), **self.reward.score(images, prompts)}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in STATEFUL}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])


def weighted_sum(nodes: dict[str, Any]) -> WeightedSum:
    """The rewards of one group, with their weights."""
    return WeightedSum(
        {name: build(without_weighing(node)) for name, node in nodes.items()},
        {name: node["weight"] for name, node in nodes.items()},
        {name for name, node in nodes.items() if node["normalize"]},
    )
