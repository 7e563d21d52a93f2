"""How much memory a configuration takes, from a dry run of its own code.

A lab is built on the meta device (meta_device.py) from the model's configurations alone, and two epochs of
the train loop and the evaluations run on it. Nothing is modelled: the rollouts, the reward, the objective's
updates and losses, the backward pass and the optimiser are the run's own. It is short because nothing is
computed, calls without a graph are run once for each shape, and an epoch ends after two updates of two
micro-batches: by then everything that lasts is there.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from alignlab.config.build import build
from alignlab.config.schema import TrainConfig
from alignlab.engine.rollout import Rollout
from alignlab.models.pipeline import shapes_only
from alignlab.objectives import Update
from alignlab.planning.meta_device import Kernels, Ledger
from alignlab.rewards import AnswersLater
from alignlab.training.evaluation import distance_to_base, evaluate, measure_all
from alignlab.training.setup import Lab

Epoch = Callable[[Lab, TrainConfig, int], dict[str, Any]]
"""The loop's: lab, configuration and number of the epoch to its line of metrics."""
TRAINING = ("sampling", "reward", "loss", "backward", "optimizer step")
ENOUGH = 2
"""Updates of an epoch, and micro-batches of an update, after which nothing new is allocated."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on the device."""

    denoiser: int
    """Its weights, with the adapters."""
    frozen: int
    """Text encoders, VAE, and the reference copy of full fine-tuning."""
    gradients: int
    optimizer: int
    """Its state."""
    peaks: dict[str, int]
    """The most that was alive in each phase: those of TRAINING, and the evaluation."""

    @property
    def training(self) -> int:
        """The most that an epoch takes."""
        return max(self.peaks[phase] for phase in TRAINING)

    @property
    def evaluation(self) -> int:
        return self.peaks["evaluation"]

    @property
    def total(self) -> int:
        return max(self.training, self.evaluation)


def footprint(c: TrainConfig, epoch: Epoch, *, device: str) -> Footprint:
    """Runs a checked configuration dry.

    Args:
        epoch: `train_epoch`.
        device: the type of the one that is meant ("cpu", "cuda", "mps"). Autocast and the optimiser differ
            between them.
    """
    ledger, kernels, c = Ledger(), Kernels(device), replace(c, device="meta", init_from=None)
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(torch, "autocast", kernels.autocast)
        )  # torch's own refuses the meta device
        for mode in (shapes_only(), ledger, kernels):
            stack.enter_context(mode)
        lab = Lab.from_config(c)
        lab.reward.statistics = dict.fromkeys(lab.reward.normalize, (0.0, 1.0))
        _prepare(lab, c, ledger, kernels, device)
        for number in (
            0,
            1,
            2,
        ):  # as a run does: evaluated first, and the optimiser's state is there from the first step on
            if number:
                with ledger.during("backward"):
                    epoch(lab, c, number)
            if number != 1:
                with ledger.during("evaluation"):
                    _evaluate(lab, c)
        family, trained = lab.policy.family, lab.policy.parameters()
        copies = [lab.policy._copy] if lab.policy._copy is not None else []
        return Footprint(
            denoiser=_bytes(family.denoiser),
            frozen=sum(_bytes(module) for module in (*family.frozen, *copies)),
            gradients=sum(p.numel() * p.element_size() for p in trained),
            optimizer=sum(
                value.untyped_storage().nbytes()
                for state in lab.optimizer.state.values()
                for value in state.values()
                if isinstance(value, Tensor) and value.device.type == "meta"
            ),
            peaks={phase: ledger.peaks[phase] for phase in (*TRAINING, "evaluation")},
        )


def _evaluate(lab: Lab, c: TrainConfig) -> None:
    """What `measure` and `measure_all` do."""
    chosen = lab.prompts.prompts[: c.evaluation.prompts]
    evaluate(lab, chosen, images=c.evaluation.images, stream="eval", batch=c.evaluation.batch)
    distance_to_base(lab.policy, lab.sampler, chosen)
    measure_all(lab, c)


def _bytes(module: nn.Module) -> int:
    return sum(
        {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in module.state_dict().values()
        }.values()
    )


def _once_for_each(function: Callable[[Tensor], float]) -> Callable[[Tensor], float]:
    """A function that is run once for each shape."""
    known: dict[torch.Size, float] = {}

    def run(tensor: Tensor) -> float:
        if tensor.shape not in known:
            known[tensor.shape] = function(tensor)
        return known[tensor.shape]

    return run


def _zeros(images: Tensor, prompts: Sequence[str]) -> "Future[Tensor]":
    """[B] scores on the host, as those of a server are."""
    answer: Future[Tensor] = Future()
    answer.set_result(torch.zeros(len(prompts)))
    return answer


def _prepare(lab: Lab, c: TrainConfig, ledger: Ledger, kernels: Kernels, device: str) -> None:
    """Names the phases, and shortens what repeats itself."""
    patched: Any = lab  # methods are replaced below, which mypy minds
    policy, family, objective = patched.policy, patched.policy.family, patched.objective
    # Samplers are tables of numbers that steer the loop, so they stay on the host.
    lab.sampler = build(c.sampler, scheduler=family.scheduler)
    lab.eval_sampler = build(c.eval_sampler, scheduler=family.scheduler)
    lab.scaler = torch.amp.GradScaler("cpu", enabled=False)  # its numbers steer too, and weigh nothing
    for group in lab.optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = device == "cuda"  # what torch chooses there
    for module in (family.denoiser, *family.frozen, *([policy._copy] if policy._copy is not None else [])):
        for tensor in (*module.parameters(), *module.buffers()):
            ledger.enter(tensor)

    family.denoise = ledger.remembered(kernels.within(family.denoise), lambda: policy._is_reference)
    family.decode = ledger.remembered(kernels.within(family.decode), lambda: None)
    for reward in (*lab.reward.rewards.values(), *patched.held_out.rewards.values()):
        if isinstance(reward, AnswersLater):
            elsewhere: Any = reward  # its scores come from another machine, which a dry run must not ask
            elsewhere.submit = _zeros
    patched.reward.submit = ledger.within("reward", lab.reward.submit)
    objective.loss = ledger.within("loss", objective.loss)
    patched.optimizer.step = ledger.within("optimizer step", lab.optimizer.step)
    patched.diversity.mean_pairwise = _once_for_each(lab.diversity.mean_pairwise)
    updates = objective.updates

    def sampled(rollouts: Iterator[Rollout]) -> Iterator[Rollout]:
        while True:
            with ledger.during("sampling"):
                record = next(rollouts, None)
            if record is None:
                return
            yield record

    def first_ones(policy: Any, rollouts: Iterator[Rollout], micro_batch: int, rng: Any) -> Iterator[Update]:
        for update in islice(updates(policy, sampled(rollouts), micro_batch, rng), ENOUGH):
            yield replace(update, batches=islice(update.batches, ENOUGH))

    objective.updates = first_ones
