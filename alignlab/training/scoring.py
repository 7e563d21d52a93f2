"""Rollouts and what they earned. A reward of another machine scores one rollout while the next is sampled.

    sampled   0 1 2 3 ...
    scored      0 1 2 ...      ahead = 1: as many rollouts may wait for their scores

The order of rollouts, draws and rewards is that of a reward that answers at once, so the numbers are too.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from alignlab.engine.policy import Policy
from alignlab.engine.rollout import Rollout
from alignlab.rewards.compose import RewardError, WeightedSum

Answer = Callable[[], dict[str, Tensor]]
"""Waits for the rewards [B] by name."""


def scored(
    rollouts: Iterator[Rollout],
    reward: WeightedSum,
    policy: Policy,
    judge: Callable[[Rollout, Answer], tuple[Tensor, dict[str, Tensor]] | None],
    *,
    gradient: bool,
    earned: list[dict[str, Tensor]],
) -> Iterator[Rollout]:
    """The same rollouts with their rewards, in order, but for those that `judge` leaves out.

    Args:
        judge: the total reward [B] and each by name, from a rollout and its answer; None leaves the rollout
            out (guards.py).
        gradient: the reward is to be differentiated; then each rollout is scored before the next is sampled.
        earned: takes the rewards [samples] by name of each rollout, the total as "reward".

    Raises:
        RewardError: for what is no reward; if a rollout was sampled ahead of an update, so of an older
            policy.
    """
    ahead = 0 if gradient else reward.ahead
    waiting: deque[tuple[Rollout, int, Answer]] = deque()

    def ask(record: Rollout) -> Answer:
        try:
            return reward.submit(record.images, record.prompts)
        except RewardError as error:
            failed = error

        def fail() -> dict[str, Tensor]:  # where the others of a training look at their answers too
            raise failed

        return fail

    def first() -> Iterator[Rollout]:
        record, passes, answer = waiting.popleft()
        if passes != policy.passes["backward"]:
            raise RewardError(
                "this objective updates between rollouts, so none may be sampled ahead; set "
                "reward.NAME.ahead=0"
            )
        with torch.set_grad_enabled(gradient):
            judged = judge(record, answer)
        if judged is not None:
            total, raw = judged
            earned.append(
                {name: r[: record.samples].detach() for name, r in {"reward": total, **raw}.items()}
            )
            yield replace(record, rewards=raw, weights=reward.weights, reward=total)

    for record in rollouts:
        with torch.set_grad_enabled(gradient):
            waiting.append((record, policy.passes["backward"], ask(record)))
        if len(waiting) > ahead:
            yield from first()
    while waiting:
        yield from first()
