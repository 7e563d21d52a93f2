"""What a run is made of, built from a checked configuration: a `Bench` measures, a `Lab` also trains."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from alignlab.config.build import build
from alignlab.config.jobs import device_of
from alignlab.config.reward_nodes import without_weighing
from alignlab.config.schema import TrainConfig
from alignlab.data.prompts import Prompts
from alignlab.distributed.ranks import gathered, rank
from alignlab.distributed.sharding import ShardedOptimizer
from alignlab.engine.policy import Policy
from alignlab.engine.samplers import Sampler
from alignlab.fast import keep_freed_memory
from alignlab.metrics.diversity import PerceptualDistance
from alignlab.models import CutsPrompts
from alignlab.objectives import Objective
from alignlab.rewards.compose import WeightedSum
from alignlab.training.lr_schedule import set_lr
from alignlab.training.unfinished_epoch import Collected
from alignlab.weights.init_from import begin_from

STATEFUL = ("objective", "optimizer", "scaler", "reward", "ema")
"""The parts whose state a checkpoint holds, beside the policy's weights."""


class MeasuredBy(Protocol):
    """Lists the groups of a configuration that say how a policy is measured."""

    eval_sampler: Any
    prompts: Any
    reward: Any
    eval_rewards: Any
    diversity: Any


@dataclass(kw_only=True)
class Bench:
    """Holds a policy and what measures it."""

    policy: Policy
    eval_sampler: Sampler
    reward: WeightedSum
    held_out: WeightedSum
    diversity: PerceptualDistance
    prompts: Prompts

    @classmethod
    def of(cls, c: MeasuredBy, policy: Policy, **more: Any) -> Self:
        """Builds the parts that measure a policy; `more` are the further fields of a subclass."""
        prompts = build(c.prompts)
        warn_of_cut(policy, [*prompts.prompts, *prompts.unseen])
        return cls(
            policy=policy,
            eval_sampler=build(c.eval_sampler, scheduler=policy.family.scheduler).to(policy.device),
            reward=weighted_sum(c.reward, group=c.prompts.get("per_prompt", 1)),
            held_out=weighted_sum({k: node for k, node in c.eval_rewards.items() if k not in c.reward}),
            diversity=build(c.diversity),
            prompts=prompts,
            **more,
        )

    @property
    def units(self) -> dict[str, str]:
        """The unit of every reward, trained on or held out, by name."""
        return {
            name: reward.unit for name, reward in {**self.reward.rewards, **self.held_out.rewards}.items()
        }

    def score(self, images: Tensor, prompts: Sequence[str], group: int) -> dict[str, Tensor]:
        """Scores images by all rewards, trained on or held out, [B] each by name.

        `group` images of a prompt are in a row.
        """
        return {**self.held_out.score(images, prompts, group), **self.reward.score(images, prompts, group)}

    def pointwise(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Scores images by the rewards that look at one image at a time, [B] each by name."""
        return {**self.held_out.pointwise(images, prompts), **self.reward.pointwise(images, prompts)}

    def within_prompts(self, images: Tensor, prompts: Sequence[str], group: int) -> dict[str, Tensor]:
        """Scores images by the rewards that compare all images of a prompt, [B] each by name."""
        return {
            **self.held_out.within_prompts(images, prompts, group),
            **self.reward.within_prompts(images, prompts, group),
        }


@dataclass(kw_only=True)
class Lab(Bench):
    """Holds a policy, what measures it, and what trains it."""

    sampler: Sampler
    objective: Objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Any
    """diffusers' EMAModel of the trained weights, or None."""
    collected: Collected = field(default_factory=Collected)
    """Keeps the samples of an epoch that is cut short."""

    @classmethod
    def from_config(cls, c: TrainConfig, *, resumed: bool = False) -> Self:
        """Builds everything from a checked configuration.

        Args:
            resumed: True if a checkpoint will give the weights, so that init_from is not read.
        """
        from diffusers.training_utils import EMAModel  # slow to import

        # Only the LoRA's initial A is drawn from torch's generator; all other draws have a key (noise.py).
        torch.manual_seed(c.seed)
        keep_freed_memory()
        device = device_of(c.device)
        family = build(c.model)
        policy = build(c.policy, family=family, precision=c.precision, compile=c.compile, device=device)
        begin_from(policy, None if resumed else c.init_from)
        optimizer = build(c.optimizer, params=policy.parameters())
        objective = build(c.algo)
        warn_of_cut(policy, objective.own_prompts())
        # The groups must note their configured lr now: a checkpoint restores the lr of its epoch's schedule.
        set_lr(optimizer, 1.0)
        return cls.of(
            c,
            policy,
            sampler=build(c.sampler, scheduler=family.scheduler).to(device),
            objective=objective,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(device.type, enabled=c.precision == "fp16"),
            ema=EMAModel(policy.parameters(), decay=c.ema) if c.ema else None,
        )

    def spent(self) -> dict[str, int]:
        """Counts the cost of the run so far, over all processes: the budgets at which methods are compared.

        Rewards count images that the training reward scored. Denoiser passes count latents: a guided
        prediction is two, and recomputation under checkpointing counts.
        """
        passes = self.policy.passes
        counts = gathered([self.reward.queries, passes["forward"], passes["backward"]])
        return dict(
            zip(
                ("reward_queries", "denoiser_forwards", "denoiser_backwards"),
                map(sum, zip(*counts, strict=True)),
                strict=True,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the parts in STATEFUL that this run has."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        if self.ema is not None:
            self.ema.to(self.policy.device)

    def _stateful(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in STATEFUL if getattr(self, name) is not None}
        if self.policy.sharded:
            parts["optimizer"] = ShardedOptimizer(self.policy.family.denoiser, self.optimizer)
        return parts

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Gives the policy the moving average of its weights inside of a `with`, if ema > 0."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.policy.parameters())
        self.ema.copy_to(self.policy.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.policy.parameters())


def warn_of_cut(policy: Policy, prompts: Sequence[str]) -> None:
    """Warns of prompts that are too long for the model's tokenizers, which cut them."""
    family = policy.family
    too_long = family.cut(prompts) if isinstance(family, CutsPrompts) else []
    if too_long and rank() == 0:
        which = (
            f"{len(too_long)} of {len(prompts)} prompts are longer than the model's tokenizer reads, and are "
            "cut there"
        )
        print(f"warning: {which}; the first: {too_long[0][:60]!r} ...", file=sys.stderr)


def weighted_sum(nodes: dict[str, Any], *, group: int = 1) -> WeightedSum:
    """Builds the rewards of one group of the configuration, with their weights.

    `group` images of a prompt are in a row in training.
    """
    return WeightedSum(
        {name: build(without_weighing(node)) for name, node in nodes.items()},
        {name: node["weight"] for name, node in nodes.items()},
        {name for name, node in nodes.items() if node["normalize"]},
        group=group,
    )
