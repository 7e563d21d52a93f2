"""Guards of one epoch's numbers: what is not finite never reaches the optimiser, and an update that leaps is
not made.

A non-finite reward, loss or gradient stops the run (on_nonfinite=stop) or is left out and counted (skip): a
reward's whole rollout, a loss's or gradient's whole update, which leaves the weights, the optimiser's state
and the moving average as they were. max_ratio and max_kl stop a run that runs away from the policy that
sampled, or from the reference. Processes decide together: what one of them leaves out, all of them do, so
that they keep making the same calls.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignlab.distributed.ranks import gathered, rank, signed, world
from alignlab.engine.rollout import Rollout
from alignlab.files.safe_folder import RunError
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


class Guard:
    """Of one epoch.

    Args:
        c: the keys on_nonfinite, max_ratio, max_kl, micro_batch and samples_per_step.
        epoch: counted from 1.
    """

    def __init__(self, lab: Lab, c: dict[str, Any], epoch: int) -> None:
        self.lab, self.c, self.epoch, self.trained = lab, c, epoch, lab.policy.parameters()
        self.left = math.ceil(c["samples_per_step"] / c["micro_batch"] / world())
        """Rollouts of this process whose rewards may yet be finite."""
        self.nonfinite = self.skipped = 0
        self.norms: list[float] = []
        self.log = Averages()
        self._update: list[tuple[float, dict[str, Tensor], Any, Tensor | None]] = []

    def score(self, record: Rollout, answer: Callable[[], dict[str, Tensor]]) -> Scored | None:
        """The rewards that `answer` gives of a rollout; None if it is left out, on every process, because one
        of them is not finite.

        Raises:
            Unscored: on every process, if a reward fails on one of them.
        """
        scored, fault, rows = None, None, 0
        try:
            raw = answer()
            total = self.lab.reward.combine(raw)  # a weighted sum of finite rewards may overflow
            wrong = (~total.isfinite()).nonzero()[:, 0].tolist()
            if wrong:
                raise NonFinite("in all", total.detach(), record.prompts, wrong)
            scored = total, raw
        except NonFinite as error:
            fault, rows = (
                signed(f"reward {error.name} is {error.value} for {self._images(record, error.rows)}"),
                len(error.rows),
            )
        except RewardError as error:
            fault = signed(str(error))
        faults = [(told, bad) for told, bad in gathered((fault, rows)) if told is not None]
        if not faults:
            return scored
        told, many = f"epoch {self.epoch}: {faults[0][0]}", sum(bad for _, bad in faults)
        if self.c["on_nonfinite"] == "stop" or not all(bad for _, bad in faults):
            raise Unscored(told)
        self.nonfinite, self.left = self.nonfinite + many, self.left - 1
        if self.left == 0:
            raise Unscored(
                f"{told}; no rollout of this epoch has finite rewards, so there is nothing to learn from"
            )
        self._say(f"{told}; its rollout is left out")
        return None

    def saw(self, share: float, batch: Any, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Takes note of one micro-batch, after its backward pass."""
        grads = [p.grad for p in self.trained if p.grad is not None]
        sizes = (
            None if self.lab.policy.sharded or not grads else torch.stack(torch._foreach_norm(grads)).sum()
        )
        if share:
            self._update.append(
                (
                    share,
                    {"loss": loss.detach(), **{k: v.detach() for k, v in metrics.items()}},
                    self._who(batch),
                    sizes,
                )
            )

    def passes(self, norm: float) -> bool:
        """Whether the update, whose gradient has this norm over all processes, may be made.

        Raises:
            Leap: if it stops the run; nothing has been changed.
        """
        self.lab.collected.untouched = False
        update, self._update = self._update, []
        number = len(self.norms) + self.skipped + 1
        mine = (self._fault(update, norm), *_distances(update))
        told, ratios, kls, shares = zip(*gathered(mine), strict=True)
        at = f"epoch {self.epoch}, update {number}"
        fault = next((text for text in told if text), None)
        scaler = self.lab.scaler
        scaled = (
            bool(fault) and scaler.is_enabled() and scaler.get_scale() >= 1
        )  # in fp16 overflow is usual: the scale falls
        if fault and self.c["on_nonfinite"] == "stop" and not scaled:
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
        self._hold(at, math.exp(min(max(ratios), 700.0)), sum(kls) / sum(shares) if sum(shares) else None)
        self.norms.append(norm)
        for share, metrics, *_ in update:
            self.log.add(share, metrics)
        return True

    def numbers(self) -> dict[str, Any]:
        """Of the whole epoch, for its line of metrics."""
        line: dict[str, Any] = {
            "loss": None,
            "kl": None,
            **self.log.means(),
            **self.lab.objective.epoch_metrics(),
        }
        line |= {"grad_norm": float(np.mean(self.norms)) if self.norms else None, "updates": len(self.norms)}
        return line | {"skipped_updates": self.skipped, "nonfinite_rewards": self.nonfinite}

    def _hold(self, at: str, ratio: float, kl: float | None) -> None:
        most, far = self.c["max_ratio"], self.c["max_kl"]
        mend = "in another output_dir (the last checkpoint is intact)"
        if most is not None and ratio > most:
            raise Leap(
                f"{at}: the importance ratio is {ratio:.3g}-fold away from 1 (max_ratio={most:g}); "
                f"lower lr={self.c['lr']:g} or algo.updates_per_epoch {mend}"
            )
        if far is not None and kl is not None and kl > far:
            raise Leap(
                f"{at}: the KL term is {kl:.3g} (max_kl={far:g}); raise kl_coeff={self.c['kl_coeff']:g} or "
                f"lower lr={self.c['lr']:g} {mend}"
            )

    def _fault(
        self, update: list[tuple[float, dict[str, Tensor], Any, Tensor | None]], norm: float
    ) -> str | None:
        """What is not finite in an update, with the first micro-batch that it came from."""
        if update and _any_bad(torch.stack([metrics["loss"] for _, metrics, *_ in update])):
            metrics, who = next((m, who) for _, m, who, _ in update if _any_bad(m["loss"]))
            return f"the loss is {metrics['loss'].item()} for {_named(who)}"
        if math.isfinite(norm):
            return None
        who = next((who for *_, who, size in update if size is not None and _any_bad(size)), None)
        return f"the gradient's norm is {norm}" + (f", from {_named(who)} on" if who else "")

    def _who(self, batch: Any) -> Any:
        """The images of a micro-batch, in a form that holds no graph: prompts, their images' numbers, rows
        and steps."""
        record = getattr(batch, "rollout", batch)
        noise = getattr(record, "noise", None)
        return (
            getattr(record, "prompts", ()),
            getattr(noise, "replicas", ()),
            getattr(batch, "rows", None),
            getattr(batch, "steps", None),
        )

    def _images(self, record: Rollout, rows: tuple[int, ...]) -> str:
        return (
            _named((record.prompts, record.noise.replicas, torch.tensor(rows), None))
            + f" ({len(rows)} of {len(record)} images)"
        )

    def _say(self, sentence: str) -> None:
        if rank() == 0:
            print(f"warning: {sentence}")


def _any_bad(values: Tensor) -> bool:
    return bool((~values.isfinite()).any())


def _distances(
    update: list[tuple[float, dict[str, Tensor], Any, Tensor | None]],
) -> tuple[float, float, float]:
    """Of this process's micro-batches: the largest |log ratio| of an objective that has one, the share-weighted KL term, its share."""
    ratio = [float(v) for _, m, *_ in update for k, v in m.items() if k.endswith("/log_ratio_max")]
    kls = [(share, float(m["kl"])) for share, m, *_ in update if m.get("kl") is not None]
    return max(ratio, default=0.0), sum(share * kl for share, kl in kls), sum(share for share, _ in kls)


def _named(who: Any) -> str:
    """The first images of a micro-batch, in words."""
    prompts, replicas, rows, steps = who
    chosen = range(len(prompts)) if rows is None else rows.tolist()
    at = [""] * len(chosen) if steps is None else [f" at step {i}" for i in steps.tolist()]
    words = [
        f"image {replicas[row] if row < len(replicas) else row} of prompt {prompts[row]!r}{step}"
        for row, step in zip(chosen, at, strict=True)
    ]
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more if words else "a micro-batch of its own data"
