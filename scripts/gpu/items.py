"""What is measured of one architecture: a rollout, an epoch of each objective, and the memory of DRaFT-K.

Each item is alignlab's own code on a checked configuration: `rollout`, and `train_epoch` with the objective's
own loss.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch

from alignlab.config.build import build
from alignlab.config.compose import CONF, checked
from alignlab.config.schema import TrainConfig
from alignlab.engine.noise import noise_key
from alignlab.engine.rollout import rollout
from alignlab.train import train_epoch
from alignlab.training.progress import peak_memory_mb
from alignlab.training.setup import Lab
from gpu.architectures import ARCHITECTURES, Architecture, unet_flops, unet_of
from gpu.unet_time import UNetTime

OBJECTIVES = {
    "rwr": ["algo=rwr", "algo.weighting=dense", "algo.inner_epochs=1"],
    "ddpo_sf": ["algo=ddpo", "algo.estimator=sf"],
    "ddpo_is": ["algo=ddpo", "algo.updates_per_epoch=2"],
    "draft": ["algo=draft", "policy.checkpointing=true", "micro_batch={decoded}"],
    "draft_lv": ["algo=draft", "algo.lv_samples=2", "policy.checkpointing=true", "micro_batch={decoded}"],
    "draftp": ["algo=draftp", "policy.checkpointing=true", "micro_batch={decoded}"],
}
"""Words of a training configuration."""
COMPILED = ("rollout", "ddpo_is", "draft")
"""Measured under torch.compile too."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One measurement."""

    size: str
    name: str
    overrides: tuple[str, ...]
    """Of a training configuration."""
    train: bool = True
    """An epoch, or a rollout alone."""
    compiled: bool = False
    """With the U-Net under torch.compile."""

    @property
    def key(self) -> str:
        return f"{self.size}/{self.name}"


def items_of(size: str) -> Iterator[Item]:
    """The cheap ones first, so that a short budget measures something of everything."""
    its = ARCHITECTURES[size]
    rollout = Item(
        size=size, name="rollout", overrides=("algo=draft", f"micro_batch={its.images}"), train=False
    )
    objectives = [
        Item(size=size, name=name, overrides=tuple(word.format(decoded=its.decoded) for word in words))
        for name, words in OBJECTIVES.items()
    ]
    yield from (rollout, *objectives)
    for k in its.kept:
        for kept in ("true", "false"):
            words = (
                "algo=draft",
                f"algo.k={k}",
                f"policy.checkpointing={kept}",
                "samples_per_step=1",
                "micro_batch=1",
            )
            yield Item(size=size, name=f"memory/k={k},checkpointing={kept}", overrides=words)
    for item in (rollout, *objectives):
        if item.name in COMPILED:
            yield replace(item, name=f"{item.name}, compiled", compiled=True)


def configuration(its: Architecture, words: Sequence[str], **common: str) -> TrainConfig:
    """The checked configuration of an item: its own words over the architecture's sizes."""
    sizes = {
        "model": its.model,
        "model.variant": "null",
        "lr": "1e-5",
        "reward": "clip",
        "samples_per_step": str(its.images),
        "micro_batch": str(its.micro_batch),
        "sampler.steps": str(its.steps),
        "eval_sampler.steps": str(its.steps),
    }
    chosen = sizes | common | dict(word.split("=") for word in words)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return checked(hydra.compose("train", [f"{key}={value}" for key, value in chosen.items()]))


class Workbench:
    """One architecture with its policy, loaded once; items borrow it.

    Args:
        size: of ARCHITECTURES.
        folder: its pipeline.
    """

    def __init__(self, size: str, folder: Path, *, device: str, precision: str) -> None:
        self.its: Architecture = ARCHITECTURES[size]
        self.common = {"model.path_or_id": str(folder), "device": device, "precision": precision}
        self.lab = Lab.from_config(configuration(self.its, (), **self.common))
        policy = self.lab.policy
        assert policy.lora_config is not None
        with torch.device("meta"):
            self.flops = unet_flops(
                self.its, unet_of(self.its), policy.family.lora_targets, policy.lora_config.r
            )

    def measure(self, item: Item) -> dict[str, Any]:
        """The item's numbers: seconds, passes of single latents through the U-Net, their operations; memory
        in MiB, None on a CPU.

        Raises:
            torch.OutOfMemoryError: if it does not fit.
        """
        c, policy = configuration(self.its, item.overrides, **self.common), self.lab.policy
        policy.checkpointing = c.policy["checkpointing"]
        unet: Any = policy.family.denoiser
        unet._compiled_call_impl = None  # as before Module.compile(), which has no way back
        if item.compiled:
            unet.compile()
        lab = replace(
            self.lab,
            objective=build(c.algo),
            optimizer=build(c.optimizer, params=policy.parameters()),
            prompts=build(c.prompts),
            sampler=build(c.sampler, scheduler=policy.family.scheduler).to(policy.device),
        )
        steps = max(2, c.algo.get("k") or 0)
        few = replace(
            lab,
            sampler=build(c.sampler | {"steps": steps}, scheduler=policy.family.scheduler).to(policy.device),
        )
        once(few, c, item, epoch=1)  # the first time of each kernel is not the item's
        before, began = dict(policy.passes), time.perf_counter()
        with UNetTime(unet, policy.device, inside=not item.compiled) as clock:
            line = once(lab, c, item, epoch=2)
        passes = {kind: count - before[kind] for kind, count in policy.passes.items()}
        flops = self.flops[lab.sampler.guidance_scale != 1]
        seconds = clock.seconds()
        cuda = policy.device.type == "cuda"
        return {
            "seconds": seconds["total"],
            "host_seconds": time.perf_counter() - began,
            "unet_seconds": {k: seconds[k] for k in passes},
            "unet_fraction": None if item.compiled else sum(seconds[k] for k in passes) / seconds["total"],
            "passes": passes,
            "unet_tflop": sum(flops[k] * count for k, count in passes.items()) / 1e12,
            "images": c.samples_per_step,
            "images_per_second": c.samples_per_step / seconds["total"],
            "updates_per_second": line["updates"] / seconds["total"] if item.train else None,
            "peak_memory_mb": peak_memory_mb(policy.device) if cuda else None,
            "micro_batch": c.micro_batch,
            "steps": len(lab.sampler),
            "guidance_scale": lab.sampler.guidance_scale,
            "checkpointing": policy.checkpointing,
        }

    def tidy(self) -> None:
        """Leaves nothing of an item on the device."""
        for parameter in self.lab.policy.parameters():
            parameter.grad = None
        gc.collect()
        if self.lab.policy.device.type == "cuda":
            torch.cuda.empty_cache()


def once(lab: Lab, c: TrainConfig, item: Item, *, epoch: int) -> dict[str, Any]:
    """An epoch's line of metrics; of a rollout, nothing."""
    if item.train:
        return train_epoch(lab, c, epoch)
    if lab.policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    key = noise_key(
        lab.prompts.draw(c.samples_per_step, seed=0, epoch=epoch), seed=0, stream="gpu", epoch=epoch
    )
    with torch.no_grad():
        rollout(lab.policy, lab.sampler, key, store="image").images.cpu()
    return {}
