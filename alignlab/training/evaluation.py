"""The evaluations of a training run.

The base model and every run are measured on the same prompts and noises, and never on the training noise.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.config.schema import TrainConfig
from alignlab.distributed.ranks import own, shared, whole, world
from alignlab.engine.distance_to_base import drift
from alignlab.engine.noise import noise_key
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import Gradients, rollout
from alignlab.engine.samplers import Sampler
from alignlab.metrics.image_statistics import image_statistics
from alignlab.runs.folder import Run
from alignlab.training.setup import Bench, Lab
from alignlab.training.signals import leave_if_asked


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Holds the images of an evaluation and their scores."""

    images: Tensor
    """[n, 3, H, W], a prompt's images in a row."""
    rewards: dict[str, Tensor]
    """[n] by name, each in its own unit."""
    statistics: dict[str, Tensor]
    """[n] by name, of the images (metrics/image_statistics.py), and latent_norm, the root mean square of
    x_N."""
    lpips: list[float]
    """Mean pairwise perceptual distance within each prompt; empty for one image a prompt."""

    def numbers(self, combine: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, float | None]:
        """Summarises the evaluation: mean and standard deviation over images of each reward and image
        statistic and of the weighted reward (`combine`), and the diversity."""
        images = {f"image/{name}": values for name, values in self.statistics.items()}
        every = {"reward": combine(self.rewards), **self.rewards, **images}
        every = {name: values.double() for name, values in every.items()}  # on the CPU
        means = {name: values.mean().item() for name, values in every.items()}
        spread = {f"{name}_std": values.std(correction=0).item() for name, values in every.items()}
        return means | spread | {"lpips": sum(self.lpips) / len(self.lpips) if self.lpips else None}


def measure_base(lab: Lab, c: TrainConfig) -> dict[str, float | None]:
    """Measures the model that training starts from, and fixes the scale of normalised rewards by it."""
    seen = measure_all(lab, c)
    lab.reward.calibrate(seen.rewards)
    return seen.numbers(lab.reward.combine)


def measure(lab: Lab, c: TrainConfig, run: Run, step: int) -> dict[str, float | None]:
    """Evaluates before (step 0) and during training, with a grid of samples and the distance to the base."""
    chosen, images = lab.prompts.prompts[: c.evaluation.prompts], c.evaluation.images
    with lab.averaged():
        seen = evaluate(lab, chosen, images=images, stream="eval", batch=c.evaluation.batch)
        numbers = seen.numbers(lab.reward.combine) | distance_to_base(lab.policy, lab.sampler, chosen)
        value = numbers.get(c.select)  # None where the last is taken
        if shared(
            value is not None
            and value > max(run.evaluated(c.select, before=step).values(), default=-math.inf)
        ):
            run.save_best(step, lab.policy.state_dict())
    run.save_samples(step, seen.images, columns=images)
    return {f"eval/{name}": value for name, value in numbers.items()}


def settle(lab: Lab, c: TrainConfig, run: Run) -> int:
    """Gives the policy the weights that the run exports, and returns their epoch.

    They are those of the best evaluation (select), or the last ones, or their moving average (ema).
    """
    if c.select != "last":
        values = run.evaluated(c.select)
        best = max(values, key=values.__getitem__)
        lab.policy.load_state_dict(run.load_best(best))
        return best
    if lab.ema is not None:
        lab.ema.copy_to(lab.policy.parameters())
    return c.steps


def measure_all(lab: Lab, c: TrainConfig) -> Measured:
    """Evaluates every training prompt, on noise that nothing else uses, for the summary."""
    images, batch = c.evaluation.final_images, c.evaluation.batch
    return evaluate(
        lab, lab.prompts.prompts, images=images, stream="final", batch=batch, between=leave_if_asked
    )


IN_EVALUATION = "while the run measured itself"
"""The note on an error that was raised in an evaluation."""


@contextmanager
def _noted() -> Iterator[None]:
    """Adds a note to an error inside, so that `in_evaluation` knows it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        error.add_note(IN_EVALUATION)
        raise


def in_evaluation(error: BaseException) -> bool:
    """Tells whether an error was raised in an evaluation."""
    return IN_EVALUATION in getattr(error, "__notes__", ())


@_noted()
@torch.no_grad()
def evaluate(
    bench: Bench,
    prompts: Sequence[str],
    *,
    images: int,
    stream: str,
    batch: int,
    between: Callable[[], None] = lambda: None,
) -> Measured:
    """Samples and scores `images` images of each prompt.

    Args:
        stream: decides the noise, whatever the run's seed is.
        batch: images sampled at once by each process.
        between: called before each batch.
    """
    key = noise_key([p for p in prompts for _ in range(images)], seed=0, stream=stream)
    pictures, scores, statistics, n = [], [], [], len(key.prompts)
    # Every process takes equally many rows, for a split model runs on all at once: the last row is repeated.
    rows = [min(row, n - 1) for row in own(n + -n % world())]
    for k in range(0, len(rows), batch):
        between()
        part = key[rows[k : k + batch]]
        record = rollout(bench.policy, bench.eval_sampler, part, store="image")
        pictures.append(record.images)
        scores.append(bench.pointwise(record.images, record.prompts))
        norm = record.latents[:, -1].square().mean((1, 2, 3)).sqrt()
        statistics.append({**image_statistics(record.images), "latent_norm": norm})
    shown = whole(torch.cat(pictures))[:n]
    on_device = shown.to(bench.policy.device)
    groups = on_device.split(images)
    of_groups = {
        name: values.float().cpu()
        for name, values in bench.within_prompts(on_device, key.prompts, images).items()
    }
    return Measured(
        images=shown,
        rewards=_joined(scores, n) | of_groups,
        statistics=_joined(statistics, n),
        lpips=[bench.diversity.mean_pairwise(group) for group in groups] if images > 1 else [],
    )


def _joined(parts: Sequence[dict[str, Tensor]], n: int) -> dict[str, Tensor]:
    return {name: whole(torch.cat([part[name] for part in parts]).float())[:n] for name in parts[0]}


@_noted()
@torch.no_grad()
def distance_to_base(policy: Policy, sampler: Sampler, prompts: Sequence[str]) -> dict[str, float | None]:
    """Measures the three distances to the frozen model, over all steps of one image of each prompt.

    In a run the sampler is the training one.
    """
    n = len(sampler)
    record = rollout(
        policy, sampler, noise_key(prompts, seed=0, stream="drift"), gradients=Gradients.last(n, n)
    )
    away = drift(policy, record)
    trajectory = None if away.trajectory is None else away.trajectory.item()
    return {
        "kl_eps_guided": away.eps_guided.item(),
        "kl_eps_conditional": away.eps_conditional.item(),
        "kl_trajectory": trajectory,
    }
