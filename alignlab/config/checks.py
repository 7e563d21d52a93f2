"""What is wrong with a plain configuration, before anything is loaded: values, nodes (build.py), and pairs
that cannot be."""

import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from alignlab.config.build import ConfigError, build, fits, nearest, node_problems, resolve, words
from alignlab.config.path_keys import LONGEST_NAME, is_path, too_long
from alignlab.config.record import record
from alignlab.config.schema import KEYS, TrainConfig
from alignlab.config.secrecy import secret_in
from alignlab.distributed.ranks import launched
from alignlab.rewards import Declared
from alignlab.runs.layout import run_folders
from alignlab.runs.weight_files import start_problems

CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "tracker": ("none", "wandb", "trackio"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "on_nonfinite": ("stop", "skip"),
}
WEIGHING = {"weight": float, "normalize": bool}
"""Keys of a reward that are the weighted sum's, not its constructor's."""
WEIGHED = {"weight": 1.0, "normalize": False}
FUNCTION = "alignlab.rewards.function.Function"
COUNTED = ("pairs", "images")
"""Keys of algorithms with data of their own: what samples_per_step counts then."""
MEASURED = ("reward", "lpips", "mean", "std", "kl_eps_guided", "kl_eps_conditional", "kl_trajectory")
"""Names that no reward may have."""
GROUPS = {
    "model": (),
    "policy": ("family", "precision", "compile", "device"),
    "sampler": ("scheduler",),
    "eval_sampler": ("scheduler",),
    "prompts": (),
    "diversity": (),
    "algo": (),
    "optimizer": ("params",),
}
"""The groups that are one node each, with the arguments that training/setup.py adds once a model is there."""
OFFERS = {
    "model": ("encode", "denoise", "decode"),
    "policy": ("predict",),
    "prompts": ("draw",),
    "diversity": ("mean_pairwise",),
    "algo": ("plan", "updates", "loss"),
    "optimizer": ("step", "zero_grad"),
    "reward": ("__call__",),
}
"""What makes a class one of its group."""
SCIENCE = {"kl_coeff": 0.0, "combine": "sum"}
"""Top-level keys that only the algorithm can heed, with the values that ask nothing of it."""
LONGEST = 1000
"""Characters of a text that is no prompt."""
UNBOUNDED = ("max_grad_norm", "algo.clip", "algo.advantage_clip")
"""Numbers that may be inf."""
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
    found = list(_node_problems(values, GROUPS, c.allow_targets, lr=c.lr))
    yield from found
    if all(sentence.startswith(("model", "policy", "optimizer", "eval_rewards")) for sentence in found):
        watched = {} if any(sentence.startswith("eval_rewards") for sentence in found) else c.eval_rewards
        yield from _impossible_pairs(replace(c, eval_rewards=watched))


def leaf_problems(node: Any, where: str = "") -> Iterator[str]:
    """What no value of a configuration may be, whatever its key: no number, unreadable text, a secret (a run
    writes what it was given)."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inside:
        yield from _text_problems(str(key), f"a key of {where or 'the configuration'}", "")
        yield from leaf_problems(value, f"{where}.{key}" if where else str(key))
    if (
        isinstance(node, float)
        and not math.isfinite(node)
        and (math.isnan(node) or node < 0 or where not in UNBOUNDED)
    ):
        yield f"{where}={node} must be a finite number"
    if isinstance(node, int) and not -(2**63) <= node < 2**63:
        yield f"{where} has {len(str(node))} digits; write a number below 2**63"
    if isinstance(node, str):
        yield from _text_problems(node, where, f"{where}=")
        if len(node) > LONGEST and "prompt" not in where:
            yield f"{where} has {len(node)} characters, and no name or path has as many; shorten it"
        name = too_long(node) if is_path(where) and len(node) <= LONGEST else None
        if name is not None:
            size = f"{len(name.encode(errors='replace'))} bytes long, and names may have {LONGEST_NAME}"
            yield f"{where}: the name {name[:20]}... is {size}; shorten it"


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


def _text_problems(text: str, where: str, shown: str) -> Iterator[str]:
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        yield (
            f"{shown or where + ' '}{text!r} holds a character that is no text (NUL, or half of a pair); "
            "remove it"
        )
    secret = secret_in(text)
    if secret is not None:
        yield (
            f"{where} holds {secret}, and what is in a configuration is written to the disk; leave it to the "
            "environment"
        )


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
    if not isinstance(values["evaluation"], dict):
        yield f"evaluation={values['evaluation']} must be a table of keys and values"


def bench_problems(
    nodes: Mapping[str, Any],
    allowed: Sequence[str],
    chosen: Sequence[str] = ("model", "eval_sampler", "prompts", "diversity"),
) -> Iterator[str]:
    """Says what is wrong with what an evaluation is made of, a sentence each.

    Args:
        nodes: by group. The groups reward and eval_rewards are looked at if they are there.
        allowed: modules that _target_ may name beside our own.
        chosen: the other groups that are looked at.
    """
    unfit = [
        problem
        for group in (*chosen, "reward", "eval_rewards")
        for problem in leaf_problems(nodes.get(group), group)
    ]
    yield from unfit
    if not unfit:
        yield from _node_problems(nodes, {group: GROUPS[group] for group in chosen}, allowed)


def _node_problems(
    nodes: Mapping[str, Any],
    groups: dict[str, tuple[str, ...]],
    allowed: Sequence[str],
    *,
    lr: float | None = None,
) -> Iterator[str]:
    for group, runtime in groups.items():
        wrong = list(
            node_problems(
                group, nodes.get(group), allowed=allowed, runtime=runtime, offers=OFFERS.get(group, ())
            )
        )
        yield from wrong or (
            _optimizer_problems({**nodes[group], **({"lr": 1.0} if nodes[group].get("lr") == lr else {})})
            if group == "optimizer"
            else ()
        )
    for group in ("reward", "eval_rewards"):
        if not isinstance(nodes.get(group), dict | None):
            yield f"{group}={nodes[group]} names no reward; choose one with {group}=NAME"
            continue
        for name, node in (nodes.get(group) or {}).items():
            if name in MEASURED or name.endswith("_std"):
                yield (
                    f"{group}.{name} is also the name of a number that every evaluation reports; call it "
                    "something else"
                )
            found = list(
                node_problems(
                    f"{group}.{name}", without_weighing(node), allowed=allowed, offers=OFFERS["reward"]
                )
            )
            if any(sentence.startswith(f"{group}.{name}.images is missing") for sentence in found):
                here, f = f"{group}.{name}", node["_target_"]
                found = [
                    f"{here}._target_={f} is a function; write +{here}.function={f} in its place, and its "
                    "differentiable and unit"
                ]
            yield from found or _declaration_problems(f"{group}.{name}", node)
            for key, kind in WEIGHING.items() if isinstance(node, dict) else ():
                if not fits(node.get(key), kind):
                    yield f"{group}.{name}.{key}={node.get(key)} must be {words(kind)}"


def _declaration_problems(where: str, node: dict[str, Any]) -> Iterator[str]:
    if not isinstance(node, dict):
        return
    try:
        declared(node)
    except ValueError as error:
        yield f"{where}: {error}"


def declared(node: dict[str, Any]) -> Declared:
    """What a reward's checked node says of itself, without weights.

    Raises:
        ValueError: if it says too little.
    """
    own = without_weighing(node)
    made = resolve(own["_target_"])
    try:
        return Declared.by(made)
    except ValueError:
        if hasattr(made, "check"):
            raise
        return Declared.by(build(own))  # the instance knows


SHIPPED_OPTIMIZER = {
    "_target_": "torch.optim.AdamW",
    "lr": 1.0,
    "betas": [0.9, 0.999],
    "weight_decay": 1e-4,
    "eps": 1e-8,
}
"""conf/optimizer/adamw.yaml. It needs no trial, which costs a second: torch's first optimiser imports its
compiler."""


def _optimizer_problems(node: dict[str, Any]) -> Iterator[str]:
    """What torch's optimisers say of a parameter before there is a network."""
    target, lr = node["_target_"], node.get("lr", 1)
    if not target.startswith("torch.optim.") or node == SHIPPED_OPTIMIZER:
        return
    if not fits(lr, float):
        yield f"optimizer.lr={lr} must be a number; leave it out and set lr"
        return
    step = inspect.signature(resolve(target).step).parameters
    if "closure" in step and step["closure"].default is inspect.Parameter.empty:
        yield (
            f"optimizer._target_={target} evaluates the loss several times a step, which the loop does not; "
            "choose torch.optim.AdamW"
        )
    elif target.endswith(".SparseAdam"):
        yield (
            f"optimizer._target_={target} takes sparse gradients, and these are dense; choose "
            "torch.optim.AdamW"
        )
    else:
        try:
            resolve(target)(
                [torch.nn.Parameter(torch.zeros(2, 2))], **{k: v for k, v in node.items() if k != "_target_"}
            )
        except Exception as error:  # of any kind: an IndexError for too few betas
            reason = f" ({' '.join(str(error).split())})" if isinstance(error, ValueError) else ""
            values = ", ".join(f"{k}={v}" for k, v in node.items() if k != "_target_")
            yield f"optimizer: {target} does not take {values}{reason}; see torch's page of it"


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
            "processes; "
            f"set samples_per_step to a multiple of {micro * launched()}"
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


def _no_reward(c: TrainConfig) -> Iterator[str]:
    if not c.reward:
        yield (
            "reward is empty; choose one with reward=NAME, or several with "
            "'reward=[clip,jpeg_compressibility]'"
        )


def is_hub_id(name: Any) -> bool:
    """owner/name."""
    return (
        isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and name[0] not in ".-"
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
    yield from _group_problems(c, per_prompt)
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


def sampler_problems(model: dict[str, Any], samplers: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Says which samplers do not fit the model, or have a number out of range, a sentence each.

    Args:
        model: the model's node.
        samplers: checked nodes, by group.
    """
    for group, sampler in samplers.items():
        flow = sampler["_target_"] == "alignlab.engine.samplers.flow"
        if getattr(resolve(model["_target_"]), "rectified_flow", flow) != flow:
            kind, fits_it = ("a diffusion model", "ddim") if flow else ("a rectified flow", "flow")
            yield (
                f"{group}={'flow' if flow else 'ddim'} does not fit this model, which is {kind}; set "
                f"{group}={fits_it}"
            )
        for key, least in {"steps": 1, "eta": 0, "guidance_scale": 0}.items():
            if np.min(sampler.get(key, least), initial=least) < least:  # eta may be a list
                yield f"{group}.{key}={sampler[key]} must be at least {least}"
        eta, steps = sampler.get("eta"), sampler.get("steps")
        if isinstance(eta, list) and len(eta) != steps:
            yield (
                f"{group}.eta has {len(eta)} numbers for {group}.steps={steps}; give one number, or one for "
                "each step"
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


def _group_problems(c: TrainConfig, per_prompt: int) -> Iterator[str]:
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


def groupwise(nodes: dict[str, Any] | None) -> list[str]:
    """Those of checked rewards that see all images of a prompt at once."""
    return [name for name, node in (nodes or {}).items() if declared(node).groupwise]


class Tuned(Protocol):
    """The keys by which a command names what was learned, and turns its dials."""

    run: str | None
    lora: str | None
    annealing: float
    precision: str
    device: str


def tuned_problems(c: Tuned) -> Iterator[str]:
    """Says what is wrong with how a command names what was learned, a sentence each."""
    if c.run is not None and c.lora is not None:
        yield f"run={c.run} and lora={c.lora} exclude each other; give one of them"
    if c.run is not None and not run_folders(c.run):
        yield f"run={c.run} is no run folder (it has no config.yaml); give the folder of a finished run"
    if c.lora is not None and not Path(c.lora).exists():
        yield f"lora={c.lora} is no folder and no file; give a LoRA in diffusers' or kohya's format"
    if c.annealing < 0:
        yield f"annealing={c.annealing} must not be negative; 0 leaves it out"
    yield from choice_problems(c, ("precision", "device"))


def choice_problems(c: Any, keys: Sequence[str]) -> Iterator[str]:
    """Says which keys of a record have a value that is none of their CHOICES, a sentence each."""
    for key in keys:
        value = getattr(c, key)
        if not isinstance(value, str) or value not in CHOICES[key]:
            yield f"{key}={value} is not one of {', '.join(CHOICES[key])}"
    for device, backend in (
        {"cuda": torch.cuda, "mps": torch.backends.mps}.items() if "device" in keys else ()
    ):
        if c.device == device and not backend.is_available():
            yield f"device={device}, but this torch sees no such device; set device=cpu or device=auto"


def without_weighing(node: Any) -> Any:
    """A reward's own node; one that has a `function` in place of a _target_ is that function."""
    if not isinstance(node, dict):
        return node
    target = {"_target_": FUNCTION} if "function" in node else {}
    return {**target, **{k: v for k, v in node.items() if k not in WEIGHING}}


def weighed(values: dict[str, Any]) -> None:
    """Gives rewards without a weight the weight 1, and without a `normalize` none."""
    for group in ("reward", "eval_rewards"):
        for name, node in (values.get(group) or {}).items():
            if isinstance(node, dict):
                values[group][name] = {
                    **node,
                    **{key: value for key, value in WEIGHED.items() if key not in node},
                }
