"""Ideas for speed on the embedded model: what an epoch of DDPO costs with each, and what it learns for as
many passes through the denoiser."""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from alignlab.engine.policy import Policy
from alignlab.engine.samplers import ddim
from alignlab.fast.shared_prefix import SharedStart
from alignlab.train import train_epoch
from alignlab.training.evaluation import evaluate
from alignlab.training.setup import Lab
from benchmarks.clock import seconds
from benchmarks.items import Item, Setting, Sides, alternated
from benchmarks.limit import lab

BASE = (
    "algo=ddpo",
    "samples_per_step=16",
    "micro_batch=16",
    "sampler.steps=4",
    "eval_sampler.steps=4",
    "algo.updates_per_epoch=2",
)


def torchs_layout(policy: Policy) -> None:
    for module in (policy.family.denoiser, *policy.family.frozen):
        torch.nn.Module.to(module, memory_format=torch.contiguous_format)


def whole_branches(policy: Policy) -> None:
    policy.shared_start = SharedStart()


IDEAS: dict[str, tuple[str, ...] | Callable[[Policy], None]] = {
    "micro-batches of 4 pairs, not 16": ("micro_batch=4",),
    "micro-batches of 32 pairs, not 16": ("micro_batch=32",),
    "one branch at w = 1": ("sampler.guidance_scale=1",),
    "half of the steps trained on": ("algo.timestep_fraction=0.5",),
    "half of the rollout's steps": ("sampler.steps=2", "eval_sampler.steps=4"),
    "without channels_last": torchs_layout,
    "both branches computed from the start": whole_branches,
    "bf16 autocast": ("precision=bf16",),
    "fused AdamW": ("+optimizer.fused=true",),
}
"""What changes an epoch of DDPO: words, or a function of the policy where no word does on a CPU."""


def measure(setting: Setting, number: int) -> Sides:
    torch.set_num_threads(1)
    if not LABS:
        LABS.update({name: made(idea) for name, idea in {"without": (), **IDEAS}.items()})
        for its in LABS.values():
            train_epoch(*its, 1)
    return alternated(
        {name: lambda its=its: seconds(lambda: train_epoch(*its, 2 + number)) for name, its in LABS.items()},
        number,
    )


def made(idea: tuple[str, ...] | Callable[[Policy], None]) -> tuple:
    its, c = lab(*BASE, *(() if callable(idea) else idea))
    if callable(idea):
        idea(its.policy)
    return its, c


LABS: dict[str, tuple] = {}
"""Made in the first round."""

LEARNING = ("algo=ddpo", "eval_sampler.steps=20", "algo.updates_per_epoch=2", "lr=4e-3")
"""Brightness, 16 images an epoch, 8 steps."""
EPOCHS = 32
"""Of the run that trains on all steps. The others stop at as many passes through the denoiser; a backward
pass counts as two."""
Window = Callable[[np.random.Generator, int], Sequence[int]]
LEARNERS: dict[str, tuple[tuple[str, ...], Window | None]] = {
    "all 8 steps trained on": ((), None),
    "2 steps of each sample, drawn anew": (("algo.timestep_fraction=0.25",), None),
    "noise in the first 2 steps only": (("sampler.eta=[1,1,0,0,0,0,0,0]",), None),
    "noise in 2 steps only, where drawn each epoch": (
        (),
        lambda rng, n: (start := int(rng.integers(n - 1)), start + 1),
    ),
    "4 steps, all trained on": (("sampler.steps=4",), None),
}
"""Words, and which steps take noise: the others are the ODE's, which have no density and are not trained
on."""


def passes(its: Lab) -> int:
    return its.policy.passes["forward"] + 2 * its.policy.passes["backward"]


def brightness(its: Lab) -> float:
    """Of 8 prompts, 4 images each, by the evaluation's sampler."""
    seen = evaluate(its, its.prompts.prompts[:8], images=4, stream="eval", batch=16)
    return float(seen.rewards["brightness"].mean())


@cache
def base() -> float:
    return brightness(lab(*LEARNING)[0])


def learn(
    seed: int, words: Sequence[str], window: Window | None, budget: int | None
) -> tuple[dict[str, float], int]:
    """One run: its numbers and its passes. Without a budget it has EPOCHS epochs."""
    its, c = lab(*LEARNING, f"seed={seed}", *words)
    n, epoch = len(its.sampler), 0
    while passes(its) < budget if budget else epoch < EPOCHS:
        epoch += 1
        if window:
            noisy = window(np.random.default_rng([seed, epoch, 1]), n)
            etas = [float(i in noisy) for i in range(n)]
            its.sampler = ddim(
                its.policy.family.scheduler, steps=n, eta=etas, guidance_scale=its.sampler.guidance_scale
            )
        train_epoch(its, c, epoch)
    return {"gain": brightness(its) - base(), "epochs": epoch}, passes(its)


def learned(setting: Setting, number: int) -> Sides:
    """The round's number is the seed. The first run's passes are the others' budget; nothing is timed, so no
    side alternates."""
    torch.set_num_threads(1)
    sides: Sides = {}
    budget = None
    for name, (words, window) in LEARNERS.items():
        sides[name], done = learn(number, words, window, budget)
        budget = budget or done
    return sides


ITEMS = (
    Item(name="ideas/ddpo", measure=measure, rounds=5),
    Item(name="ideas/learning", measure=learned, rounds=3),
)
