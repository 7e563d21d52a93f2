"""python -m alignlab.plan model=sd15 algo=ddpo precision=bf16 device=cuda memory=24

Predicts how much memory a run takes. The command line is that of alignlab.train. A dry run of the same code
(footprint.py) says how much memory each phase takes and which micro_batch fits; it reads no weights and needs
no GPU. `measure=true` runs a small real epoch on the device at hand and says how long a run would take.
"""

import math
import platform
import shlex
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from alignlab.config import compose
from alignlab.config.build import ConfigError
from alignlab.config.command import command
from alignlab.config.jobs import device_of
from alignlab.config.schema import TrainConfig
from alignlab.config.train_rules import COUNTED
from alignlab.engine.rollout import NothingToLearn
from alignlab.planning.fit import GIB, MARGIN, free_memory, other_ways, proposals, size
from alignlab.planning.footprint import TRAINING, Footprint, footprint
from alignlab.rewards.compose import RewardError
from alignlab.runs.pasted import line
from alignlab.train import train_epoch
from alignlab.training.setup import Lab


@dataclass
class PlanConfig(TrainConfig):
    """The keys of conf/plan.yaml: train.yaml's, and two more."""

    memory: float | None = None
    """GiB that the device has for the run; null takes what is free on the device at hand. [GiB]"""
    measure: bool = False
    """Run a real epoch of a few micro-batches, for images/s."""


OWN = tuple(field.name for field in fields(PlanConfig) if field.name not in TrainConfig.__dataclass_fields__)
ConfigStore.instance().store(name="plan_schema", node=PlanConfig)


def checked(cfg: DictConfig) -> PlanConfig:
    """The checked configuration of the run, with the keys of OWN; `device` is the one that is meant, which
    need not be here.

    Raises:
        ConfigError: with every problem that was found.
    """
    meant, problems = str(cfg.device), []
    run = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in OWN])
    elsewhere = meant in ("cuda", "mps") and meant != device_of("auto").type
    if elsewhere:
        run.device = "cpu"
    trained = None
    try:
        trained = compose.checked(run)
    except ConfigError as error:
        problems.append(str(error))
    if cfg.memory is not None and not cfg.memory > 0:
        problems.append(f"memory={cfg.memory} must be positive (GiB)")
    if elsewhere and cfg.measure:
        problems.append(
            f"measure=true with device={meant}, but this torch sees no such device; leave one of them out"
        )
    if problems or trained is None:
        raise ConfigError("\n".join(problems))
    device = meant if elsewhere else device_of(trained.device).type
    keys = {field.name: getattr(trained, field.name) for field in fields(trained)} | {"device": device}
    return PlanConfig(**keys, memory=cfg.memory, measure=cfg.measure)


def images_per_second(c: TrainConfig) -> float:
    """Of a real epoch of at least two micro-batches, after one that warms up.

    Raises:
        RewardError, NothingToLearn: as the run would.
    """
    whole, chunk = c.samples_per_step, min(c.micro_batch, c.samples_per_step)
    unit = math.lcm(chunk, c.prompts.get("per_prompt", 1))
    least = max(2 * chunk, c.algo.get("updates_per_epoch", 1))
    few = min(whole, unit * math.ceil(least / unit))
    images = few if whole % unit == 0 else whole
    counted = {key: images for key in COUNTED if key in c.algo}
    small = replace(c, samples_per_step=images, algo={**c.algo, **counted})
    lab = Lab.from_config(small)
    lab.reward.statistics = dict.fromkeys(lab.reward.normalize, (0.0, 1.0))
    return [float(train_epoch(lab, small, number)["images_per_second"]) for number in (1, 2)][-1]


def shown(c: TrainConfig, predicted: Footprint) -> Table:
    """The table of one configuration."""
    title = f"micro_batch={c.micro_batch}, evaluation.batch={c.evaluation.batch}, on {c.device}"
    table = Table("", "memory", title=title)
    table.add_row("denoiser, with its adapters", size(predicted.denoiser))
    table.add_row("text encoders, VAE, reference copy", size(predicted.frozen))
    table.add_row("gradients", size(predicted.gradients))
    table.add_row("optimizer state", size(predicted.optimizer))
    table.add_section()
    for phase in TRAINING:
        table.add_row(f"peak of the {phase}", size(predicted.peaks[phase]))
    table.add_section()
    table.add_row("peak of an epoch", size(predicted.training), style="bold")
    table.add_row("peak of an evaluation", size(predicted.evaluation), style="bold")
    return table


def words(c: TrainConfig, proposed: dict[str, int | None], room: float) -> str:
    """What to type, or what else to try."""
    said = size(room * MARGIN)
    if proposed["micro_batch"] is None:
        return f"not even micro_batch=1 fits in {said}; try {other_ways(c)}"
    if proposed["evaluation.batch"] is None:
        return f"not even evaluation.batch=1 fits in {said}; try precision=bf16, or a larger device"
    changes = {"micro_batch": proposed["micro_batch"]}
    if proposed["evaluation.batch"] != c.evaluation.batch:
        changes["evaluation.batch"] = proposed["evaluation.batch"]
    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)
    kept = [word for word in typed if word.partition("=")[0] not in (*OWN, *changes)]
    changed = [f"{key}={value}" for key, value in changes.items()]
    typed_now = line("train", *map(shlex.quote, [*kept, *changed]))
    return f"the largest micro_batch that fits in {said} is {proposed['micro_batch']}:\n  {typed_now}"


@command("plan", schema=PlanConfig, check=checked)
def main(cfg: DictConfig) -> None:
    """Hydra's task."""
    c = checked(cfg)
    free = c.memory * GIB if c.memory is not None else free_memory(c.device)
    console = Console(soft_wrap=True)
    try:
        predicted = footprint(c, train_epoch, device=c.device)
        console.print(shown(c, predicted))
        if c.device != "cpu":
            print(f"this prediction was never compared with a {c.device} device; leave room")
        if c.policy.get("shard"):
            print(
                "policy.shard=true is not taken into account: this is the need of one process that shares "
                "nothing"
            )
        if free is None:
            print(
                f"there is no {c.device} here to ask how much is free; say memory=GiB to be told which "
                "micro_batch fits"
            )
        else:
            print(words(c, proposals(c, predicted, free / MARGIN, train_epoch), free / MARGIN))
        if c.measure:
            if free is not None and predicted.training > free:
                raise ConfigError(
                    f"micro_batch={c.micro_batch} does not fit, so it cannot be measured; set the one above"
                )
            speed = images_per_second(c)
            seconds = c.samples_per_step / speed
            where = (
                torch.cuda.get_device_name()
                if c.device == "cuda"
                else platform.processor() or platform.machine()
            )
            print(
                f"{speed:.3g} images/s on {where}: {seconds:.3g} s an epoch, {c.steps * seconds / 3600:.3g} "
                f"h for {c.steps} epochs and the evaluations beside"
            )
    except (RewardError, NothingToLearn) as error:
        raise ConfigError(str(error)) from None


if __name__ == "__main__":
    main()
