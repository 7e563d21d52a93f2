"""Says what is wrong with a training run, before anything is loaded: the shape of its values, each value, its
nodes, and pairs that cannot be."""

import importlib.util
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from alignlab.config.build import ConfigError, build, nearest
from alignlab.config.checks import (
    CHOICES,
    GROUPS,
    choice_problems,
    group_problems,
    is_hub_id,
    sampler_problems,
)
from alignlab.config.leaves import leaf_problems
from alignlab.config.record import record
from alignlab.config.reward_nodes import declared, groupwise
from alignlab.config.schema import KEYS, TABLES, TrainConfig
from alignlab.distributed.ranks import launched
from alignlab.runs.weight_files import start_problems

COUNTED = ("pairs", "images")
"""Keys of algorithms with data of their own: what samples_per_step counts then."""
SCIENCE = {"kl_coeff": 0.0, "combine": "sum"}
"""Top-level keys that only the algorithm can heed, with the values that ask nothing of it."""
MOST = {
    "steps": 10**9,
    "samples_per_step": 10**6,
    "micro_batch": 10**6,
    "seed": 2**32 - 1,
    "sampler.steps": 10**4,
    "eval_sampler.steps": 10**4,
}
"""Larger ones are slips of the finger, and some would be computed with before a model says no."""


def problems(values: dict[str, Any]) -> Iterator[str]:
    """Says what is wrong with the plain values of a training run, a sentence each."""
    yield from (f"{key} is not a known key; {nearest(key, KEYS)}" for key in values if key not in KEYS)
    deleted = [key for key in KEYS if key not in values]
    if deleted:
        yield f"{', '.join(deleted)} must not be deleted"
        return
    unfit = [*leaf_problems(values), *_absent(values)]
    if unfit:  # nothing else can be said of it
        yield from unfit
        return
    try:
        c = record(TrainConfig, {key: values[key] for key in KEYS})
    except ConfigError as error:
        yield str(error)
        return
    for rule in RULES:
        yield from rule(c)
    faults = list(group_problems(values, GROUPS, c.allow_targets, lr=c.lr))
    yield from faults
    if all(sentence.startswith(("model", "policy", "optimizer", "eval_rewards")) for sentence in faults):
        watched = {} if any(sentence.startswith("eval_rewards") for sentence in faults) else c.eval_rewards
        yield from _impossible_pairs(replace(c, eval_rewards=watched))


def ignored_problems(c: TrainConfig, referred: Collection[str]) -> Iterator[str]:
    """Values of the SCIENCE keys that the algorithm does not take, or takes in another value: variants that
    would be one and the same.

    Args:
        referred: the top-level keys that the algorithm's part of the configuration refers to, by whatever
            name.
    """
    name = str(c.algo["_target_"]).rpartition(".")[2]
    for key, idle in SCIENCE.items():
        asked, taken = getattr(c, key), dict(_named(c.algo, key, "algo"))
        for where, value in taken.items():
            if value != asked:
                yield f"{where}={value} is not {key}={asked}; set {key}={value}, and leave {where} alone"
        if not taken and key not in referred and asked != idle:
            mend = f"set {key}={idle:g}" if isinstance(idle, float) else f"set {key}={idle}"
            yield (
                f"{key}={asked} has no effect: algo does not hand it on to {name}; {mend}, "
                f"or add '+algo.{key}=${{{key}}}' if {name} takes it"
            )


def _named(node: Any, key: str, where: str) -> Iterator[tuple[str, Any]]:
    """The values at a key, however deep in a table."""
    for name, value in node.items() if isinstance(node, dict) else ():
        if name == key:
            yield f"{where}.{name}", value
        yield from _named(value, key, f"{where}.{name}")


def _absent(values: dict[str, Any]) -> Iterator[str]:
    for group in GROUPS:
        if not isinstance(values[group], dict):
            yield (
                f"{group}={values[group]} is no {group}; "
                f"choose a file of conf/ with {group}=NAME (--help lists them)"
            )
    for group in ("reward", "eval_rewards"):
        if not isinstance(values[group], dict | None):
            yield (
                f"{group}={values[group]} names no reward; choose one with {group}=NAME, or several with "
                f"'{group}=[clip,colour]'"
            )
    for table in TABLES:
        if not isinstance(values[table], dict):
            yield f"{table}={values[table]} must be a table of keys and values"


@dataclass(frozen=True)
class Bound:
    """A rule for the value of one key alone."""

    key: str
    holds: Callable[[Any], bool]
    must: str
    """What the sentence says after `key=value`."""

    def __call__(self, c: TrainConfig) -> Iterator[str]:
        """Yields a sentence if the value will not do."""
        value = getattr(c, self.key)
        if not self.holds(value):
            yield f"{self.key}={value} {self.must}"


def _too_large(c: TrainConfig) -> Iterator[str]:
    for key, most in MOST.items():
        group, _, name = key.rpartition(".")
        value = getattr(c, group).get(name) if group else getattr(c, name)
        if isinstance(value, int) and value > most:
            yield f"{key}={value} must be at most {most}"


def _evaluation_sizes(c: TrainConfig) -> Iterator[str]:
    for key, value in asdict(c.evaluation).items():
        if value > MOST["samples_per_step"]:
            yield f"evaluation.{key}={value} must be at most {MOST['samples_per_step']}"
        least = 2 if key == "images" else 1  # diversity is measured over pairs
        if value < least:
            yield f"evaluation.{key}={value} must be at least {least}"


def _bound_of_no_term(c: TrainConfig) -> Iterator[str]:
    if c.max_kl is not None and c.max_kl > 0 and not c.kl_coeff:
        yield (
            f"max_kl={c.max_kl} bounds the KL term, which kl_coeff=0 leaves out; set kl_coeff above 0, or "
            "max_kl=null"
        )


def _micro_batches(c: TrainConfig) -> Iterator[str]:
    samples, micro = c.samples_per_step, min(c.micro_batch, c.samples_per_step)
    if 0 < micro <= MOST["micro_batch"] and samples % micro:
        divisor = next(k for k in range(micro, 0, -1) if samples % k == 0)
        yield (
            f"samples_per_step={samples} is not a multiple of micro_batch={micro}; set micro_batch={divisor}"
        )


def _long_warm_up(c: TrainConfig) -> Iterator[str]:
    if 0 < c.steps <= c.lr_warmup:
        yield f"lr_warmup={c.lr_warmup} leaves none of steps={c.steps}; lower it"


def _shares_of_processes(c: TrainConfig) -> Iterator[str]:
    samples, micro = c.samples_per_step, min(c.micro_batch, c.samples_per_step)
    if micro > 0 and samples % micro == 0 and samples % (micro * launched()):
        yield (
            f"samples_per_step={samples} cannot be dealt out in micro-batches of {micro} to {launched()} "
            f"processes; set samples_per_step to a multiple of {micro * launched()}"
        )


def _sharding(c: TrainConfig) -> Iterator[str]:
    if not c.policy.get("shard"):
        return
    wrong = {
        "policy.full=false": not c.policy.get("full"),
        f"ema={c.ema}": c.ema > 0,
        "precision=fp16": c.precision == "fp16",
        "policy.channels_last=true": c.policy.get("channels_last"),
        "compile=true": c.compile,
        "optimizer=adamw8bit": _is_8bit(c.optimizer),
    }
    for key in wrong:
        if wrong[key]:
            yield (
                f"policy.shard=true does not go with {key}; it splits full fine-tuning, in fp32 or bf16, "
                "without ema"
            )


def _is_8bit(optimizer: dict[str, Any]) -> bool:
    return str(optimizer.get("_target_")).endswith(".adamw8bit")


def _unmeasured(c: TrainConfig) -> Iterator[str]:
    measured = ("last", "reward", *(c.reward or {}), *(c.eval_rewards or {}))
    if c.select not in measured:
        yield (
            f"select={c.select} is nothing that evaluations measure; {nearest(c.select, measured, 'select=')}"
        )


def _missing_packages(c: TrainConfig) -> Iterator[str]:
    if _is_8bit(c.optimizer) and importlib.util.find_spec("bitsandbytes") is None:
        yield (
            "optimizer=adamw8bit, but the package bitsandbytes is not installed; pip install 'alignlab[bnb]'"
        )
    tracker = c.tracker
    if tracker in ("wandb", "trackio") and importlib.util.find_spec(tracker) is None:
        yield (
            f"tracker={tracker}, but the package {tracker} is not installed; pip install {tracker}, or set "
            "tracker=none"
        )


def _untrackable(c: TrainConfig) -> Iterator[str]:
    project = c.tracking.project
    if not re.fullmatch(r"[^/\\#?%:]{1,128}", project):  # what wandb takes
        yield (
            f"tracking.project={project} must have 1 to 128 characters, none of them / \\ # ? % :, which no "
            "tracker takes"
        )


def _no_reward(c: TrainConfig) -> Iterator[str]:
    if not c.reward:
        yield (
            "reward is empty; choose one with reward=NAME, or several with "
            "'reward=[clip,jpeg_compressibility]'"
        )


def _start(c: TrainConfig) -> Iterator[str]:
    yield from start_problems(c.init_from, Path(c.resume or c.output_dir or "."), c.policy)


RULES: tuple[Callable[[TrainConfig], Iterator[str]], ...] = (
    lambda c: choice_problems(c, list(CHOICES)),
    _too_large,
    *(
        Bound(key, lambda v: v >= 0, "must be at least 0")
        for key in ("checkpoint_every", "seed", "lr_warmup")
    ),
    *(
        Bound(key, lambda v: v >= 1, "must be at least 1")
        for key in ("steps", "samples_per_step", "micro_batch", "eval_every", "keep")
    ),
    _evaluation_sizes,
    *(Bound(key, lambda v: v > 0, "must be positive") for key in ("lr", "max_grad_norm")),
    Bound(
        "max_ratio",
        lambda v: v is None or v > 1,
        "must be above 1, the ratio before the first update; null leaves it out",
    ),
    Bound("max_kl", lambda v: v is None or v > 0, "must be positive; null leaves it out"),
    _bound_of_no_term,
    _micro_batches,
    _long_warm_up,
    Bound("ema", lambda v: 0 <= v < 1, "must be at least 0 and less than 1"),
    _shares_of_processes,
    _sharding,
    _unmeasured,
    _missing_packages,
    _untrackable,
    Bound(
        "resume",
        lambda v: v is None or (Path(v) / "config.yaml").is_file(),
        "is no run folder (it has no config.yaml); give the folder of an earlier run",
    ),
    _start,
    Bound(
        "push_to_hub",
        lambda v: v is None or is_hub_id(v),
        "is no repository of the hub; write owner/name",
    ),
    _no_reward,
)
"""What the values must be, one by one or a few together. Their sentences stand in this order."""


def _impossible_pairs(c: TrainConfig) -> Iterator[str]:
    objective, samples, sampler = build(c.algo), c.samples_per_step, c.sampler
    if max(sampler["steps"], c.eval_sampler["steps"]) > MOST["sampler.steps"]:
        return
    if objective.needs_noise and not np.any(sampler.get("eta", 1)):
        yield (
            f"sampler.eta={sampler['eta']} makes the sampler deterministic, but this objective needs "
            "log-probs; set sampler.eta=1"
        )
    per_prompt, updates = c.prompts.get("per_prompt", 1), c.algo.get("updates_per_epoch", 1)
    for name, node in (c.reward or {}).items():
        if objective.needs_gradient and not declared(node).differentiable:
            needs = f"{type(objective).__name__} needs its gradient"
            yield (
                f"reward={name} is not differentiable, but {needs}; use algo=ddpo or algo=rwr, or another "
                "reward"
            )
    yield from _combination_problems(c, objective)
    yield from _split_groups(c, per_prompt)
    if samples % per_prompt:
        yield f"samples_per_step={samples} is not a multiple of prompts.per_prompt={per_prompt}"
    if updates > samples:
        yield (
            f"algo.updates_per_epoch={updates} exceeds samples_per_step={samples}, so some updates would "
            "have no sample"
        )
    for key in COUNTED:
        if c.algo.get(key, samples) != samples:
            yield (
                f"algo.{key}={c.algo[key]} is not samples_per_step={samples}; set samples_per_step, and "
                f"leave algo.{key} alone"
            )
    if per_prompt < objective.least_per_prompt:
        compares = f"{type(objective).__name__} compares the images of a prompt with each other"
        yield f"{compares}, but prompts.per_prompt={per_prompt}; set prompts.per_prompt=4, say"
    unknown = [name for name in (c.algo.get("pairing") or {}).get("weights") or {} if name not in c.reward]
    if unknown:
        yield f"algo.pairing.weights.{unknown[0]} names no reward; they are {', '.join(c.reward)}"
    if c.policy.get("shard") and objective.swaps_weights:
        yield (
            "policy.shard=true cannot hold a second set of weights for algo.ref_update_every; set it to 0, "
            "or policy.shard=false"
        )
    yield from sampler_problems(c.model, {"sampler": sampler, "eval_sampler": c.eval_sampler})
    try:
        plans = {objective.plan(max(1, sampler["steps"]), np.random.default_rng(seed)) for seed in range(8)}
    except ValueError as error:
        yield str(error)
        return
    if c.policy.get("shard") and len(plans) > 1:
        yield (
            "policy.shard=true runs the same steps on every process, and this objective draws them for each "
            "rollout; set policy.shard=false"
        )


def _combination_problems(c: TrainConfig, objective: Any) -> Iterator[str]:
    if c.combine != "sum" and "combine" not in {**c.algo, **(c.algo.get("statistics") or {})}:
        name = type(objective).__name__
        does = (
            "follows the gradient of the weighted sum itself"
            if objective.needs_gradient
            else "makes no advantages of rewards"
        )
        yield f"combine={c.combine}, but {name} {does}; set combine=sum, or use algo=ddpo or algo=rwr"


def _split_groups(c: TrainConfig, per_prompt: int) -> Iterator[str]:
    """A group-wise reward must be given whole groups."""
    trained, watched = groupwise(c.reward), groupwise(c.eval_rewards)
    for name in trained:
        sees, samples = (
            f"reward={name} compares the images of a prompt with each other",
            c.samples_per_step,
        )
        micro = min(c.micro_batch, samples)
        if per_prompt < 2:
            yield f"{sees}, but prompts.per_prompt={per_prompt}; set prompts.per_prompt=4, say"
        elif micro % per_prompt:
            whole = (k for k in range(micro, 0, -1) if k % per_prompt == 0 and samples % k == 0)
            mend = next(whole, per_prompt)
            yield (
                f"{sees}, so micro_batch={micro} must be a multiple of prompts.per_prompt={per_prompt}; set "
                f"micro_batch={mend}"
            )
    if c.evaluation.final_images < 2 and not c.quick:
        for name in dict.fromkeys(trained + watched):
            yield (
                f"{name} compares the images of a prompt, but evaluation.final_images=1; set "
                "evaluation.final_images=2"
            )
