"""Ideas for speed, each as the CPU time of an epoch with it over one without it, alternating in one process, on the embedded model."""

import torch

from alignlab.train import train_epoch
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
IDEAS = {
    "micro-batches of 4 pairs, not 16": ("micro_batch=4",),
    "micro-batches of 32 pairs, not 16": ("micro_batch=32",),
    "one branch at w = 1": ("sampler.guidance_scale=1",),
    "half of the steps trained on": ("algo.timestep_fraction=0.5",),
    "half of the rollout's steps": ("sampler.steps=2", "eval_sampler.steps=4"),
    "channels_last": ("policy.channels_last=true",),
    "bf16 autocast": ("precision=bf16",),
    "fused AdamW": ("+optimizer.fused=true",),
}
"""Words that change an epoch of DDPO."""


def measure(setting: Setting, number: int) -> Sides:
    torch.set_num_threads(1)
    if not LABS:
        LABS.update({name: lab(*BASE, *words) for name, words in {"without": (), **IDEAS}.items()})
        for made in LABS.values():
            train_epoch(*made, 1)
    return alternated(
        {name: lambda made=made: seconds(lambda: train_epoch(*made, 2 + number)) for name, made in LABS.items()}, number
    )


LABS: dict[str, tuple] = {}
"""Made in the first round."""
ITEMS = (Item(name="ideas/ddpo", measure=measure, rounds=5),)
