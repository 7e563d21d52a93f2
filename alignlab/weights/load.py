"""What a run learned, loaded again: as a policy, as pictures, or as a diffusers pipeline."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from alignlab.config.build import build, node_problems
from alignlab.config.checks import choice_problems
from alignlab.config.compose import asked
from alignlab.config.jobs import device_of
from alignlab.config.record import Keys
from alignlab.engine.noise import noise_key
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import rollout
from alignlab.engine.samplers import Sampler
from alignlab.fast import keep_freed_memory
from alignlab.files.safe_folder import RunError
from alignlab.models.lora import LoRA
from alignlab.runs.layout import run_folders, weights
from alignlab.runs.stored_config import read_config
from alignlab.weights.dials import Annealed, scale_lora
from alignlab.weights.init_from import refuse_unlike


@dataclass
class TunedConfig(Keys):
    """The keys of every command that draws from a tuned model: which one, and how much of what it learned."""

    run: str | None = None
    """The folder of a finished run."""
    lora: str | None = None
    """Without a run: a LoRA for `model`: a folder in diffusers' format, or a file in diffusers' or kohya's;
    null is the base model."""
    lora_scale: float = 1.0
    """How much of the LoRA: 0 is the base model, 1 the tuned one; more overshoots. [share of the LoRA]"""
    annealing: float = 0.0
    """Power of annealed importance guidance: from the base model at the first step to the tuned one at the
    last. 0 leaves it out. [exponent]"""
    precision: str = "fp32"
    """Of the denoiser. A run has its own, unless it is named. [fp32 | bf16 | fp16]"""
    device: str = "auto"
    """Where to compute; auto is the best there is. [auto | cpu | cuda | mps]"""
    allow_targets: list[str] | None = None
    """Modules of your own that _target_ may name."""
    allow_servers: list[str] | None = None
    """Addresses of reward servers that only a file names, and that images and prompts may be sent to."""
    model: Any = None
    """The pretrained model: the run's own, unless it is named."""
    eval_sampler: Any = None
    """How images are sampled: as the run's evaluations, unless it is named."""


def tuned_problems(c: TunedConfig) -> Iterator[str]:
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


T = TypeVar("T", bound=TunedConfig)


def of_run(c: T, run: Path, groups: Sequence[str]) -> T:
    """`c` with the run's precision and `groups`, but for those that the command line names.

    Raises:
        RunError: if its configuration cannot be read.
    """
    stored = {"precision": "fp32", **read_config(run)}
    named = {key.partition(".")[0] for key in asked()}
    own: dict[str, Any] = {key: stored.get(key) for key in (*groups, "precision") if key not in named}
    return replace(c, **own, run=str(run))


def load(run: str | Path, *, allow_targets: Sequence[str] = ()) -> Any:
    """The diffusers pipeline of a finished run: `alignlab.load("runs/demo")("a lion",
    num_inference_steps=20).images[0]`.

    Args:
        run: its folder. What its config.yaml may build is limited as on the command line (config/build.py).
        allow_targets: modules of your own that it may build from.

    Raises:
        RunError: if the folder holds no run, no weights, or a configuration that may not be built.
    """
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise RunError(
            f"{folder} is no run folder (it has no config.yaml); give the folder of a finished run"
        )
    config = read_config(folder)
    learned = weights(folder)
    model: Any = config.get("model")
    wrong = list(node_problems("model", model, allowed=allow_targets, offers=("encode", "denoise")))
    if wrong:
        raise RunError(f"{folder}: {wrong[0]}")
    if config.get("policy", {}).get(
        "full"
    ):  # a folder that `save` wrote, in one variant and with its configuration
        whole = {k: None if k in ("revision", "variant", "config") else v for k, v in model.items()}
        return build({**whole, "path_or_id": str(learned)}).pipe
    family: Any = build(model)
    family.pipe.load_lora_weights(str(learned))
    return family.pipe


def policy_of(
    model: dict[str, Any],
    *,
    run: str | None = None,
    lora: str | None = None,
    precision: str = "fp32",
    device: str = "auto",
) -> Policy:
    """Loads the tuned policy: that of the run, or of the LoRA, or the base model with an adapter that does
    nothing.

    Args:
        model: the node of the model's group; or a whole configuration, whose model, run, lora, precision and
            device are taken.
        run: the folder of a finished run, which says what was trained.
        lora: without a run, a folder or a file.

    Raises:
        RunError: if there are no weights, or those of another model.
    """
    if "model" in model:
        given = {key: model[key] for key in ("run", "lora", "precision", "device") if key in model}
        return policy_of(model["model"], **given)
    keep_freed_memory()
    family: Any = build(model)
    stored: dict[str, Any] = read_config(Path(run)).get("policy") or {} if run else {}
    learned = weights(Path(run)) if run else lora and Path(lora)
    memory: dict[str, Any] = {key: stored[key] for key in ("decode_batch", "text_on_host") if key in stored}
    common: dict[str, Any] = {"precision": precision, "device": device_of(device), **memory}
    if run and stored.get("full"):
        policy = Policy(family, full=True, **common)
        whole = family.read_full(learned)
        refuse_unlike(str(learned), policy, whole)
        policy.load_state_dict(whole)
        return policy
    try:
        state, config = family.read_lora(learned) if learned else ({}, {})
    except ValueError as error:
        raise RunError(str(error)) from None
    try:
        policy = Policy(family, lora=LoRA(**config), checkpointing=False, **common)
    except ValueError as error:  # peft's: modules that this network lacks
        raise RunError(f"{learned} is no LoRA of this model ({' '.join(str(error).split())[:200]})") from None
    if state:
        refuse_unlike(str(learned), policy, state)
        policy.load_state_dict(state)
    return policy


@torch.no_grad()
def pictures(policy: Policy, sampler: Sampler, prompt: str, *, n: int, seed: int = 0) -> Tensor:
    """[n, 3, H, W] in [0, 1]; image i depends on (seed, prompt, i) alone."""
    return rollout(
        policy, sampler, noise_key([prompt] * n, seed=seed, stream="sample"), store="image"
    ).images.cpu()


def dialled(policy: Policy, sampler: Sampler, *, lora_scale: float = 1.0, annealing: float = 0.0) -> Policy:
    """The policy with its dials set (dials.py); annealing = 0 leaves that one out."""
    if lora_scale != 1:
        if policy.full:
            raise RunError(
                f"lora_scale={lora_scale}: every weight of this model was tuned, so there is no LoRA to "
                "scale; leave it at 1"
            )
        scale_lora(policy, lora_scale)
    turned: Any = Annealed(policy, sampler, annealing) if annealing else policy
    return turned
