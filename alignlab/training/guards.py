"""Guards against numbers that are not finite, and against updates that go too far.

on_nonfinite=stop ends the run at a reward, loss or gradient that is not finite. on_nonfinite=skip leaves out
and counts the whole rollout of such a reward, or the whole update of such a loss or gradient; weights,
optimiser state and moving average then stay as they were. max_ratio stops a run whose policy is far from the
one that sampled, max_kl one whose policy is far from the reference. Processes decide together: what one
leaves out, all leave out, so that they keep making the same collective calls.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignlab.config.schema import TrainConfig
from alignlab.distributed.ranks import gathered, rank, signed, world
from alignlab.engine.rollout import Rollout
from alignlab.files.safe_folder import RunError
from alignlab.objectives import ImagesOf, images_of
from alignlab.rewards.compose import NonFinite, RewardError
from alignlab.training.progress import Averages
from alignlab.training.setup import Lab

SHOWN = 3
"""Images that a sentence names."""


class Leap(RunError):
    """An update that must not be made; all processes raise it."""


class Unscored(RewardError):
    """A rollout without rewards; all processes raise it."""


Scored = tuple[Tensor, dict[str, Tensor]]
"""The total reward [B], and each reward [B] by name."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Reports to all processes what went wrong with the rewards of this process's rollout."""

    told: str | None = None
    """What went wrong; None if nothing did."""
    images: int = 0
    """How many images have a reward that is not finite; 0 if the reward gave no numbers at all."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Records a micro-batch after its backward pass, without its graph."""

    share: float
    """The share of the update's loss."""
    metrics: dict[str, Tensor]
    """The loss, and the metrics of the objective."""
    images: ImagesOf
    sizes: Tensor | None
    """The sum of the gradients' norms so far in this update; None where none is at hand."""

    @property
    def loss(self) -> Tensor:
        return self.metrics["loss"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Reports to all processes what this process's part of an update looks like."""

    fault: str | None = None
    """What is not finite."""
    log_ratio: float = 0.0
    """The largest |log ratio| of an objective that has one."""
    kl: float = 0.0
    """The share-weighted sum of the KL terms."""
    kl_share: float = 0.0
    """The shares of the micro-batches with such a term."""


class Guard:
    """Watches the rewards, losses and gradients of one epoch.

    Args:
        c: the keys on_nonfinite, max_ratio, max_kl, micro_batch and samples_per_step.
        epoch: counted from 1.
    """

    def __init__(self, lab: Lab, c: TrainConfig, epoch: int) -> None:
        self.lab, self.c, self.epoch, self.trained = lab, c, epoch, lab.policy.parameters()
        self.left = math.ceil(c.samples_per_step / c.micro_batch / world())
        """Counts the rollouts of this process that have not been left out."""
        self.nonfinite = self.skipped = 0
        self.norms: list[float] = []
        self.log = Averages()
        self._update: list[MicroBatch] = []

    def score(self, record: Rollout, answer: Callable[[], dict[str, Tensor]]) -> Scored | None:
        """Reads the rewards of a rollout; None if every process leaves its rollout out.

        Raises:
            Unscored: on every process, if a reward fails on one of them.
        """
        scored, failure = None, Failure()
        try:
            raw = answer()
            total = self.lab.reward.combine(raw)  # a weighted sum of finite rewards may overflow
            wrong = (~total.isfinite()).nonzero()[:, 0].tolist()
            if wrong:
                raise NonFinite("in all", total.detach(), record.prompts, wrong)
            scored = total, raw
        except NonFinite as error:
            message = f"reward {error.name} is {error.value} for {_rows_of(record, error.rows)}"
            failure = Failure(told=signed(message), images=len(error.rows))
        except RewardError as error:
            failure = Failure(told=signed(str(error)))
        failures = [failed for failed in gathered(failure) if failed.told is not None]
        if not failures:
            return scored
        message, images = f"epoch {self.epoch}: {failures[0].told}", [failed.images for failed in failures]
        if self.c.on_nonfinite == "stop" or not all(images):
            raise Unscored(message)
        self.nonfinite, self.left = self.nonfinite + sum(images), self.left - 1
        if self.left == 0:
            raise Unscored(
                f"{message}; no rollout of this epoch has finite rewards, so there is nothing to learn from"
            )
        self._say(f"{message}; its rollout is left out")
        return None

    def saw(self, share: float, batch: Any, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Records one micro-batch after its backward pass."""
        grads = [p.grad for p in self.trained if p.grad is not None]
        complete = grads and not self.lab.policy.sharded
        sizes = torch.stack(torch._foreach_norm(grads)).sum() if complete else None
        if share:
            logged = {"loss": loss.detach(), **{k: v.detach() for k, v in metrics.items()}}
            images = images_of(batch)
            self._update.append(MicroBatch(share=share, metrics=logged, images=images, sizes=sizes))

    def passes(self, norm: float) -> bool:
        """Decides whether the update may be made, given its gradient's norm over all processes.

        Raises:
            Leap: if the run must stop. Weights and optimiser are unchanged.
        """
        self.lab.collected.untouched = False
        update, self._update = self._update, []
        number = len(self.norms) + self.skipped + 1
        reports = gathered(_report(update, norm))
        at = f"epoch {self.epoch}, update {number}"
        fault = next((report.fault for report in reports if report.fault), None)
        scaler = self.lab.scaler
        # In fp16 an overflow is usual: the update is skipped and the scale falls.
        scaled = bool(fault) and scaler.is_enabled() and scaler.get_scale() >= 1
        if fault and self.c.on_nonfinite == "stop" and not scaled:
            mend = (
                "lower lr or kl_coeff in another output_dir, or resume with on_nonfinite=skip; the last "
                "checkpoint is intact"
            )
            raise Leap(f"{at}: {fault}; {mend}")
        if fault:
            self.skipped += 1
            if not scaled:
                self._say(f"{at}: {fault}; the update is skipped")
            return False
        self._hold(at, reports)
        self.norms.append(norm)
        for part in update:
            self.log.add(part.share, part.metrics)
        return True

    def numbers(self) -> dict[str, Any]:
        """Returns what the epoch logs of its losses, gradients and skipped updates."""
        line: dict[str, Any] = {
            "loss": None,
            "kl": None,
            **self.log.means(),
            **self.lab.objective.epoch_metrics(),
        }
        line |= {"grad_norm": float(np.mean(self.norms)) if self.norms else None, "updates": len(self.norms)}
        return line | {"skipped_updates": self.skipped, "nonfinite_rewards": self.nonfinite}

    def _hold(self, at: str, reports: list[Report]) -> None:
        """Stops a run whose update goes farther than max_ratio or max_kl."""
        most, far = self.c.max_ratio, self.c.max_kl
        ratio = math.exp(min(max(report.log_ratio for report in reports), 700.0))
        shares = sum(report.kl_share for report in reports)
        kl = sum(report.kl for report in reports) / shares if shares else None
        mend = "in another output_dir (the last checkpoint is intact)"
        if most is not None and ratio > most:
            raise Leap(
                f"{at}: the importance ratio is {ratio:.3g}-fold away from 1 (max_ratio={most:g}); "
                f"lower lr={self.c.lr:g} or algo.updates_per_epoch {mend}"
            )
        if far is not None and kl is not None and kl > far:
            raise Leap(
                f"{at}: the KL term is {kl:.3g} (max_kl={far:g}); raise kl_coeff={self.c.kl_coeff:g} or "
                f"lower lr={self.c.lr:g} {mend}"
            )

    def _say(self, sentence: str) -> None:
        if rank() == 0:
            print(f"warning: {sentence}")


def _any_bad(values: Tensor) -> bool:
    return bool((~values.isfinite()).any())


def _report(update: list[MicroBatch], norm: float) -> Report:
    """What this process's micro-batches say of the update."""
    ratios = [
        float(value)
        for part in update
        for name, value in part.metrics.items()
        if name.endswith("/log_ratio_max")
    ]
    penalised = [(part.share, float(part.metrics["kl"])) for part in update if "kl" in part.metrics]
    return Report(
        fault=_fault(update, norm),
        log_ratio=max(ratios, default=0.0),
        kl=sum(share * kl for share, kl in penalised),
        kl_share=sum(share for share, _ in penalised),
    )


def _fault(update: list[MicroBatch], norm: float) -> str | None:
    """What is not finite in an update, with the first micro-batch that it came from."""
    if update and _any_bad(torch.stack([part.loss for part in update])):
        part = next(part for part in update if _any_bad(part.loss))
        return f"the loss is {part.loss.item()} for {_named(part.images)}"
    if math.isfinite(norm):
        return None
    images = next((part.images for part in update if part.sizes is not None and _any_bad(part.sizes)), None)
    return f"the gradient's norm is {norm}" + (f", from {_named(images)} on" if images else "")


def _rows_of(record: Rollout, rows: tuple[int, ...]) -> str:
    """Rows of a rollout, in words."""
    images = ImagesOf(prompts=record.prompts, replicas=record.noise.replicas, rows=torch.tensor(rows))
    return f"{_named(images)} ({len(rows)} of {len(record)} images)"


def _named(images: ImagesOf) -> str:
    """The first images of a micro-batch, in words."""
    prompts, replicas = images.prompts, images.replicas
    chosen = range(len(prompts)) if images.rows is None else images.rows.tolist()
    at = [""] * len(chosen) if images.steps is None else [f" at step {i}" for i in images.steps.tolist()]
    named = [
        f"image {replicas[row] if row < len(replicas) else row} of prompt {prompts[row]!r}{step}"
        for row, step in zip(chosen, at, strict=True)
    ]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return ", ".join(named[:SHOWN]) + more if named else "a micro-batch of its own data"
