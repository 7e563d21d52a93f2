"""The scored rollouts of an epoch. A reward server scores one rollout while the next one is sampled.

    sampled   0 1 2 3 ...
    scored      0 1 2 ...      with ahead = 1 one rollout may wait for its scores

Rollouts are scored in the order in which they are sampled, so the numbers are those of a local reward.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignlab.config.schema import TrainConfig
from alignlab.distributed.ranks import own
from alignlab.engine.noise import noise_key
from alignlab.engine.rollout import Rollout
from alignlab.rewards.compose import RewardError
from alignlab.training.guards import Guard
from alignlab.training.setup import Lab


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Holds a rollout whose rewards were requested and have not arrived."""

    record: Rollout
    backwards: int
    """The policy's backward passes when it was sampled. If there are more now, the policy has changed."""
    answer: Callable[[], dict[str, Tensor]]
    """Waits for the rewards [B] by name."""


class ScoredRollouts:
    """Samples and scores one epoch's rollouts while it is iterated. It can be iterated once.

    A rollout whose rewards are not finite is left out if the guard says so. An objective that differentiates
    the reward gets each rollout before the next one is sampled, so that one graph at a time is held.

    Args:
        lab: its objective says which steps keep their graph; `lab.collected` samples, or reads the samples
            that an interrupted epoch saved.
        c: the keys seed, samples_per_step, micro_batch and offload.
        epoch: counted from 1.
        rng: of the epoch, shared with the objective's updates.
        guard: judges the rewards.
    """

    def __init__(
        self, lab: Lab, c: TrainConfig, epoch: int, *, rng: np.random.Generator, guard: Guard
    ) -> None:
        self.lab, self.guard, self.rng = lab, guard, rng
        self.samples, self.offload = c.samples_per_step, c.offload
        self.chunk = min(c.micro_batch, self.samples)
        prompts = lab.prompts.draw(self.samples, seed=c.seed, epoch=epoch)
        self.noise = noise_key(prompts, seed=c.seed, stream="train", epoch=epoch)
        self.gradient = lab.objective.needs_gradient
        self.ahead = 0 if self.gradient else lab.reward.ahead
        self.rewards: list[dict[str, Tensor]] = []
        """The rewards of each rollout so far, [samples] by name; their weighted sum is "reward"."""

    def __iter__(self) -> Iterator[Rollout]:
        """Yields the scored rollouts of this process.

        Raises:
            Stopped: if the run is to end here.
            RewardError: if a reward fails; if a rollout was sampled ahead of an update, so by an older
                policy.
        """
        objective, steps, own_rows = self.lab.objective, len(self.lab.sampler), own(self.samples)
        waiting: deque[Waiting] = deque()
        for row in range(0, self.samples, self.chunk):
            # The plan is drawn for rows of other processes too, so that `rng` is at the same place on all.
            how = {"gradients": objective.plan(steps, self.rng), "store": objective.store(steps)}
            if row in own_rows:
                waiting.append(self._sampled(row, how))
            if len(waiting) > self.ahead:
                yield from self._scored(waiting.popleft())
        while waiting:
            yield from self._scored(waiting.popleft())
        self.lab.collected.release()

    def _sampled(self, row: int, how: dict[str, Any]) -> Waiting:
        """Samples the rollout that begins at this row of the epoch, and requests its rewards."""
        policy, reward = self.lab.policy, self.lab.reward
        noise = self.noise[range(row, row + self.chunk)]
        with torch.set_grad_enabled(self.gradient):
            record = self.lab.collected.rollout(
                row, policy, self.lab.sampler, noise, offload=self.offload, **how
            )
            backwards = policy.passes["backward"]
            try:
                answer = reward.submit(record.images, record.prompts)
            except RewardError as error:
                # Raised later, where all processes read their answers, so that all of them stop together.
                answer = _failing(error)
        return Waiting(record=record, backwards=backwards, answer=answer)

    def _scored(self, sampled: Waiting) -> Iterator[Rollout]:
        """Yields the rollout with its rewards, or nothing if it is left out."""
        if sampled.backwards != self.lab.policy.passes["backward"]:
            raise RewardError(
                "this objective updates between rollouts, so none may be sampled ahead; set "
                "reward.NAME.ahead=0"
            )
        with torch.set_grad_enabled(self.gradient):
            judged = self.guard.score(sampled.record, sampled.answer)
        if judged is None:
            return
        record, (total, raw) = sampled.record, judged
        self.rewards.append(
            {name: r[: record.samples].detach() for name, r in {"reward": total, **raw}.items()}
        )
        weights, share = self.lab.reward.weights, self.chunk / self.samples
        yield replace(record, share=share, rewards=raw, weights=weights, reward=total)


def _failing(error: RewardError) -> Callable[[], dict[str, Tensor]]:
    """Makes an answer that raises this error when it is read."""

    def answer() -> dict[str, Tensor]:
        raise error

    return answer
