"""From a composed Hydra configuration to objects, and from mistakes to one sentence each, before any model is loaded.

Nothing below this file knows Hydra or OmegaConf: objects get plain values.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

HERE = Path(__file__).resolve().parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"  # in a wheel, or in a checkout
ALLOWED = ("alignlab", "torch.optim")  # where _target_ may point without the user's word


@dataclass
class Evaluation:
    """The evaluation during training and at its end. Its noise is never the training noise."""

    prompts: int = 8
    """Prompts of the evaluations during training."""
    images: int = 8
    """Images of each of them; diversity is measured within a prompt."""
    final_images: int = 4
    """Images of every training prompt, for the base model and at the end (summary.json)."""
    batch: int = 64
    """Images sampled at once; the numbers do not depend on it."""


@dataclass
class TrainConfig:
    """The top-level keys. The groups are typed by the constructors that their _target_ names."""

    kl_coeff: float = 0.0
    """Weight of the distance to the frozen model; each algorithm's page states its unit."""
    seed: int = 0
    steps: int = 100
    """Epochs of the run: each samples, scores and updates once, and writes one line of metrics."""
    lr: float = 1e-3
    samples_per_step: int = 16
    """Images sampled in each epoch."""
    micro_batch: int = 8
    """Images sampled at once, and images or (sample, step) pairs of one backward pass: the memory knob."""
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    """fp32, bf16 or fp16, of the denoiser; trained weights, latents and log-probs stay float32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    offload: bool = False
    """Keep stored trajectories in host memory."""
    eval_every: int = 20
    checkpoint_every: int = 20
    """In epochs; 0 writes none but the last."""
    output_dir: str | None = None
    resume: str | None = None
    """A run folder to go on with."""
    tracker: str = "none"
    """none, wandb or trackio, beside TensorBoard."""
    allow_targets: list[str] = field(default_factory=list)
    """Modules of your own that _target_ may name."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    optimizer: Any = field(
        default_factory=lambda: {
            "_target_": "torch.optim.AdamW", "_partial_": True, "lr": "${lr}", "betas": [0.9, 0.999], "weight_decay": 1e-4, "eps": 1e-8,
        }
    )  # fmt: skip
    algo: Any = None
    model: Any = None
    policy: Any = None
    reward: Any = None
    eval_rewards: Any = None
    prompts: Any = None
    sampler: Any = None
    eval_sampler: Any = None


ConfigStore.instance().store(name="train_schema", node=TrainConfig)
CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "tracker": ("none", "wandb", "trackio"),
}
GROUPS = ("algo", "model", "policy", "prompts", "sampler", "eval_sampler")
NOT_SCIENCE = ("output_dir", "resume", "device", "tracker", "checkpoint_every", "offload")
"""Keys in which a resumed run may differ."""


class ConfigError(Exception):
    """One sentence for each mistake: the key, the value, and the mend."""


# -- checking


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The plain, resolved configuration.

    Raises:
        ConfigError: with every problem that was found, one a line.
    """
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise ConfigError(f"{key} has no usable value: {str(error).splitlines()[0]}; set {key}=...") from None
    problems = list(_problems(plain))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return plain


def _problems(c: dict[str, Any]) -> Iterator[str]:
    known = list(TrainConfig.__dataclass_fields__)
    for key in c:
        if key not in known:
            yield f"{key} is not a key of alignlab.train; {_nearest(key, known)}"
    for key, choices in CHOICES.items():
        if c[key] not in choices:
            yield f"{key}={c[key]} is not one of {', '.join(choices)}"
    for key in ("steps", "samples_per_step", "micro_batch", "eval_every"):
        if c[key] < 1:
            yield f"{key}={c[key]} must be at least 1"
    for key in ("prompts", "images", "final_images", "batch"):
        if c["evaluation"][key] < (2 if key == "images" else 1):
            yield f"evaluation.{key}={c['evaluation'][key]} must be at least {2 if key == 'images' else 1}"
    for key in ("lr", "max_grad_norm"):
        if not c[key] > 0:
            yield f"{key}={c[key]} must be positive"
    for key in ("kl_coeff", "checkpoint_every", "seed"):
        if c[key] < 0:
            yield f"{key}={c[key]} must not be negative"
    if c["device"] == "cuda" and not torch.cuda.is_available():
        yield "device=cuda, but this torch sees no CUDA device; set device=cpu or device=auto"
    if c["device"] == "mps" and not torch.backends.mps.is_available():
        yield "device=mps, but this torch sees no MPS device; set device=cpu or device=auto"
    if c["tracker"] in ("wandb", "trackio") and importlib.util.find_spec(c["tracker"]) is None:
        yield f"tracker={c['tracker']}, but the package {c['tracker']} is not installed; pip install {c['tracker']}, or set tracker=none"
    if c["resume"] is not None and not (Path(c["resume"]) / "config.yaml").is_file():
        yield f"resume={c['resume']} is no run folder (it has no config.yaml); give the folder of an earlier run"

    missing = [g for g in GROUPS if not isinstance(c[g], dict)]
    for group in missing:
        yield f"{group} is empty; choose one with {group}=NAME (python -m alignlab.train --help lists them)"
    bound = {g: list(_node_problems(g, c[g], c["allow_targets"])) for g in (*GROUPS, "optimizer") if g not in missing}
    for group in ("reward", "eval_rewards"):
        for name, node in (c[group] or {}).items():
            inner = {k: v for k, v in node.items() if k not in ("weight", "normalize")}
            bound[f"{group}.{name}"] = list(_node_problems(f"{group}.{name}", inner, c["allow_targets"]))
    if not c["reward"]:
        yield "reward is empty; choose one with reward=NAME, or several with 'reward=[clip,jpeg_compressibility]'"
    for problems in bound.values():
        yield from problems
    if not missing and not any(bound.values()):
        yield from _impossible_pairs(c)


def _node_problems(where: str, node: dict[str, Any], allowed: list[str]) -> Iterator[str]:
    """Every _target_ must be allowed, exist, and take these arguments; cheap constructors are run."""
    for key, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            yield from _node_problems(f"{where}.{key}", value, allowed)
    target = node.get("_target_")
    if not isinstance(target, str):
        yield f"{where}._target_ is missing; name the class that builds {where}"
        return
    if not any(target == a or target.startswith(f"{a}.") for a in (*ALLOWED, *allowed)):
        yield f"{where}._target_={target} lies outside alignlab and torch.optim; add allow_targets=[{target.split('.')[0]}] if you trust it"
        return
    try:
        made = _resolve(target)
    except (ImportError, AttributeError) as error:
        yield f"{where}._target_={target} cannot be imported ({error})"
        return
    arguments = {k: v for k, v in node.items() if not k.startswith("_")}
    names = [p.name for p in inspect.signature(made).parameters.values()]
    for key in arguments:
        if key not in names:
            yield f"{where}.{key} is not an argument of {target}; {_nearest(key, names, f'{where}.')}"
            return
    check = getattr(made, "check", None)
    try:
        if check is not None:
            check(**arguments)
        elif where in ("algo", "prompts", "policy.lora"):
            instantiate(node, _convert_="all")
    except (ValueError, FileNotFoundError) as error:
        yield str(error)
    except InstantiationException as error:
        yield str(error.__cause__ or error).splitlines()[0]
    except TypeError as error:
        yield f"{where}: {error}"


def _impossible_pairs(c: dict[str, Any]) -> Iterator[str]:
    import numpy as np

    objective, samples, micro, n = (
        instantiate(c["algo"], _convert_="all"),
        c["samples_per_step"],
        c["micro_batch"],
        c["sampler"]["steps"],
    )
    for group in ("sampler", "eval_sampler"):
        if c[group]["steps"] < 1:
            yield f"{group}.steps={c[group]['steps']} must be at least 1"
        if c[group]["eta"] < 0 or c[group]["guidance_scale"] < 0:
            yield f"{group}.eta={c[group]['eta']} and {group}.guidance_scale={c[group]['guidance_scale']} must not be negative"
    if objective.needs_noise and c["sampler"]["eta"] == 0:
        yield "sampler.eta=0 makes the sampler deterministic, but this objective needs log-probs; set sampler.eta=1"
    if objective.needs_gradient:
        for name, node in c["reward"].items():
            if not getattr(_resolve(node["_target_"]), "differentiable", False):
                yield f"reward={name} is not differentiable, but algo={_resolve(c['algo']['_target_']).__name__} needs its gradient; use algo=ddpo or algo=rwr"
    if samples % min(micro, samples):
        yield f"samples_per_step={samples} is not a multiple of micro_batch={micro}; try micro_batch={_divisor(samples, micro)}"
    per_prompt = c["prompts"].get("per_prompt", 1)
    if samples % per_prompt:
        yield f"samples_per_step={samples} is not a multiple of prompts.per_prompt={per_prompt}"
    if c["algo"].get("updates_per_epoch", 1) > samples:
        yield f"algo.updates_per_epoch={c['algo']['updates_per_epoch']} exceeds samples_per_step={samples}, so some updates would have no sample"
    if n >= 1:
        try:
            objective.plan(n, np.random.default_rng(0))
        except ValueError as error:
            yield str(error)


def _divisor(n: int, below: int) -> int:
    return next(k for k in range(min(n, below), 0, -1) if n % k == 0)


def _nearest(key: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(sorted(known))}"


def _resolve(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


# -- building


def build(node: dict[str, Any], **extra: Any) -> Any:
    """The object that a checked node describes; `extra` are runtime arguments, passed as they are."""
    return instantiate({**node, "_partial_": True}, _convert_="all")(**extra)


def device_of(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


# -- the command line


def command(name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """`hydra.main` for a function of the composed configuration, with sentences in place of tracebacks for users' mistakes."""

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def task(cfg: DictConfig) -> Any:
            try:
                return function(cfg)
            except ConfigError as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise  # the other jobs of the sweep go on
                sys.exit(_say(str(error)))

        def run() -> None:
            os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing
            try:
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()
            except ConfigError as error:
                sys.exit(_say(str(error)))
            except (ConfigCompositionException, OverrideParseException) as error:
                sys.exit(_say(_sentence(error, name)))
            except HydraException as error:
                sys.exit(_say(str(error).splitlines()[0]))

        return run

    return decorate


def _say(problems: str) -> int:
    for line in problems.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 2


def _sentence(error: Exception, name: str) -> str:
    """Hydra's composition errors, shorter and with the nearest right key."""
    cause = error.__cause__
    key: str = getattr(cause, "full_key", None) or ""
    if (
        key
        and ("not in struct" in str(cause) or "Could not override" in str(error))
        and "could not be converted" not in str(cause)
    ):
        known = _composed_keys(name)
        return f"{key} is not a known key; {_nearest(key, known)}"
    if key:
        return f"{key}: {str(cause).splitlines()[0]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    options = [line for line in lines if line.startswith("'")]
    if "Could not find" in first and options:
        wanted = first.split("'")[1]
        group, _, option = wanted.rpartition("/")
        choices = [o.strip("'\t ") for o in options]
        return (
            f"{group}={option}: there is no such option; {_nearest(option, choices, f'{group}=')} (options: {', '.join(choices)})"
        )
    return first


def _composed_keys(name: str) -> list[str]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(name)

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for key, value in node.items_ex(resolve=False) if isinstance(node, DictConfig) else ():
            path = prefix + str(key)
            yield path
            yield from walk(value, f"{path}.")

    return list(walk(cfg, ""))
