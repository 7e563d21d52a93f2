"""Says what is wrong with the parts of a configuration that several commands share, before anything is
loaded: nodes (build.py), samplers, and values that must be one of a few."""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from alignlab.config.build import fits, node_problems, resolve
from alignlab.config.leaves import leaf_problems
from alignlab.config.reward_nodes import reward_problems
from alignlab.models import OfProcess

CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "tracker": ("none", "wandb", "trackio"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "on_nonfinite": ("stop", "skip"),
}
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
}
"""What makes a class one of its group."""


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
        yield from group_problems(nodes, {group: GROUPS[group] for group in chosen}, allowed)


def group_problems(
    nodes: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
    allowed: Sequence[str],
    *,
    lr: float | None = None,
) -> Iterator[str]:
    """Says what is wrong with the nodes of some groups and with the rewards, a sentence each.

    Args:
        nodes: by group.
        groups: of GROUPS.
        allowed: modules that _target_ may name beside our own.
        lr: the learning rate that the command has at its top, which optimizer.lr refers to.
    """
    for group, runtime in groups.items():
        node: Any = nodes.get(group)
        offers = OFFERS.get(group, ())
        wrong = list(node_problems(group, node, allowed=allowed, runtime=runtime, offers=offers))
        yield from wrong
        if group == "optimizer" and not wrong:
            yield from _optimizer_problems({**node, "lr": 1.0} if node.get("lr") == lr else node)
    for group in ("reward", "eval_rewards"):
        yield from reward_problems(group, nodes.get(group), allowed)


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


def is_hub_id(name: Any) -> bool:
    """owner/name."""
    return (
        isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and name[0] not in ".-"
    )


def sampler_problems(model: dict[str, Any], samplers: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Says which samplers do not fit the model, or have a number out of range, a sentence each.

    Args:
        model: the model's node.
        samplers: checked nodes, by group.
    """
    family = resolve(model["_target_"])
    for group, sampler in samplers.items():
        flow = sampler["_target_"] == "alignlab.engine.samplers.flow"
        shipped = sampler["_target_"].startswith("alignlab.")  # of a user's own nobody knows what it fits
        if shipped and isinstance(family, OfProcess) and family.rectified_flow != flow:
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
