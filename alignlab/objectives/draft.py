"""DRaFT (Clark et al. 2023, arXiv 2309.17400) and its relatives: gradients of the reward through the last
sampling steps.

    DRaFT-K     L = -mean r(x_0, c), the last K of N steps keep their graph (K = N: DRaFT)
    DRaFT-LV    K = 1 and n more images, each denoised from sg(x_0) re-noised to the last step's level; mean
                over 1 + n terms
    DRaFT+      L = -mean r + kl_coeff mean (eps_theta - eps_ref)^2 over the kept steps (NeMo-Aligner's
                published "KL")
    AlignProp   K drawn anew: per_rollout (its text) or per_step (its code: step i is kept with probability
                (i+1)/(N+1))
    DRTune      K equally spaced steps (spaced) with detach_input: the network sees sg(x_i), gradients flow
                along a_i x_i
    ReFL        refl: leave the chain at a random late step and take its predicted x0; reward_cap = c gives
                relu(c - r)

All of them are one rollout with another `Gradients` record. Differs from the papers: DRaFT-LV averages its 1
+ n terms where the paper sums (a constant factor; lv_reduction=sum); DRTune's random early stop is left out;
the reference of DRaFT+ passes gradients to its input (ref_grad="none" is the published form, whose gradient
at the optimum is not zero for K > 1).
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from alignlab.engine.distance_to_base import drift
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import Gradients, NothingToLearn, Rollout
from alignlab.objectives import Metrics, Objective, Update, one_of


class DRaFT(Objective):
    """Reward gradients through the sampler.

    Args:
        k: how many last steps keep their graph, 1..N; None is all of them (DRaFT). [sampling steps]
        truncation: "fixed", the last K; "spaced", K equally spaced ones up to the last; "per_rollout" draws K
            ~ U{1..N} once; "per_step" draws for each step (gaps appear). The drawn laws ignore k.
        lv_samples: n of DRaFT-LV (the paper's n is 2); needs k = 1 and fixed truncation. All 1 + n images are
            predicted x0. [images a sample]
        lv_reduction: "mean" over the 1 + n terms, or their "sum" as in the paper.
        detach_input: the stop-gradient of DRTune.
        refl: stop at a random step of the last k and train on its predicted x0; needs fixed truncation.
        reward_on: the image is x_N, or the last step's predicted x0 (the published DRaFT+).
        reward_cap: c of relu(c - r), in the reward's unit; None maximises without bound.
            [that of the reward]
        kl_coeff: 0 is DRaFT, and then the reference is never evaluated. [per unit of the distance]
        kl: which distance to the reference the coefficient weighs.
        ref_grad: whether the reference passes gradients to its input x_i.
    """

    needs_gradient = True

    def __init__(
        self,
        *,
        k: int | None = 1,
        truncation: Literal["fixed", "spaced", "per_rollout", "per_step"] = "fixed",
        lv_samples: int = 0,
        lv_reduction: Literal["mean", "sum"] = "mean",
        detach_input: bool = False,
        refl: bool = False,
        reward_on: Literal["x_N", "pred_x0"] = "x_N",
        reward_cap: float | None = None,
        kl_coeff: float = 0.0,
        kl: Literal["eps_guided", "eps_conditional", "trajectory"] = "eps_guided",
        ref_grad: Literal["input", "none"] = "input",
    ) -> None:
        one_of("truncation", truncation, ("fixed", "spaced", "per_rollout", "per_step"))
        one_of("lv_reduction", lv_reduction, ("mean", "sum"))
        one_of("reward_on", reward_on, ("x_N", "pred_x0"))
        one_of("kl", kl, ("eps_guided", "eps_conditional", "trajectory"))  # attributes of drift.Drift
        one_of("ref_grad", ref_grad, ("input", "none"))
        if k is not None and k < 1:
            raise ValueError(f"algo.k={k} must be at least 1; null keeps the graph of every step")
        if lv_samples < 0 or (lv_samples and (k != 1 or truncation != "fixed" or refl)):
            raise ValueError(
                f"algo.lv_samples={lv_samples} needs algo.k=1 with fixed truncation and no refl (DRaFT-LV is "
                "a form of DRaFT-1)"
            )
        if refl and truncation != "fixed":
            raise ValueError(
                f"algo.refl=true keeps one step, so algo.truncation={truncation} means nothing; set "
                "algo.truncation=fixed"
            )
        if kl_coeff < 0:
            raise ValueError(f"kl_coeff={kl_coeff} must not be negative; 0 leaves the penalty out")
        self.k, self.truncation, self.lv_samples, self.lv_reduction, self.detach_input = (
            k,
            truncation,
            lv_samples,
            lv_reduction,
            detach_input,
        )
        self.refl, self.reward_on, self.reward_cap = refl, reward_on, reward_cap
        self.kl_coeff, self.kl, self.ref_grad = kl_coeff, kl, ref_grad
        self.needs_noise = kl_coeff > 0 and kl == "trajectory"

    def plan(self, steps: int, rng: np.random.Generator) -> Gradients:
        k = steps if self.k is None else self.k
        if k > steps and self.truncation in ("fixed", "spaced"):
            raise ValueError(
                f"algo.k={k} exceeds sampler.steps={steps}; set algo.k<={steps} or raise sampler.steps"
            )
        kept, stop = tuple(range(steps - k, steps)), None
        if self.truncation == "spaced":
            kept = tuple((j + 1) * steps // k - 1 for j in range(k))
        elif self.truncation == "per_rollout":
            kept = tuple(range(steps - int(rng.integers(1, steps + 1)), steps))
        elif self.truncation == "per_step":
            draws = rng.integers(0, steps + 1, size=steps)
            kept = tuple(i for i in range(steps) if i >= draws[i]) or (steps - 1,)
        if self.refl:
            stop = int(rng.integers(steps - k, steps))
            kept = (stop,)
        x0_image = (
            self.reward_on == "pred_x0" or self.lv_samples > 0
        )  # DRaFT-LV's terms all weigh the prediction by q
        return Gradients(
            steps=kept, stop=stop, detach_input=self.detach_input, x0_image=x0_image, renoise=self.lv_samples
        )

    def updates(
        self, policy: Policy, rollouts: Iterator[Rollout], micro_batch: int, rng: np.random.Generator
    ) -> Iterator[Update]:
        # Each rollout is a micro-batch as it comes: its graph is freed before the next one is sampled.
        yield Update(batches=((record.share, record) for record in rollouts))

    def loss(self, policy: Policy, batch: Rollout) -> tuple[Tensor, Metrics]:
        assert batch.reward is not None
        reward = batch.reward
        loss = -reward.mean() if self.reward_cap is None else torch.relu(self.reward_cap - reward).mean()
        metrics: Metrics = {"draft/kept_steps": torch.tensor(float(len(batch.kept)))}
        if self.reward_cap is not None:
            metrics["draft/capped"] = (reward.detach() > self.reward_cap).float().mean()
        if self.kl_coeff > 0:  # a branch, not a product: 0 x inf
            away = drift(policy, batch, through_input=self.ref_grad == "input" and not self.detach_input)
            chosen = getattr(away, self.kl)
            if chosen is None:
                raise NothingToLearn(
                    "algo.kl=trajectory: none of the kept steps has a density; set sampler.eta above 0 or "
                    "raise algo.k"
                )
            loss = loss + self.kl_coeff * chosen
            metrics |= {
                "kl": chosen.detach(),
                "kl/eps_guided": away.eps_guided.detach(),
                "kl/eps_conditional": away.eps_conditional.detach(),
            }
            if away.trajectory is not None:
                metrics["kl/trajectory"] = away.trajectory.detach()
        scale = 1 + batch.renoised if self.lv_reduction == "sum" else 1
        return scale * loss, metrics
