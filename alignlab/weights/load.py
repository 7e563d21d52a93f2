"""What a run learned, loaded again: as a policy, as pictures, or as a diffusers pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignlab.config.build import build, node_problems
from alignlab.config.schema import asked, device_of
from alignlab.engine.noise import noise_key
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import rollout
from alignlab.engine.samplers import Sampler
from alignlab.fast import keep_freed_memory
from alignlab.models.lora import LoRA
from alignlab.runs.folder import RunError, read_config, weights
from alignlab.weights.dials import Annealed, scale_lora
from alignlab.weights.init_from import refuse_unlike


@dataclass
class TunedConfig:
    """The keys of every command that draws from a tuned model: which one, and how much of what it learned."""

    run: str | None = None
    """The folder of a finished run."""
    lora: str | None = None
    """Without a run: a LoRA for `model`: a folder in diffusers' format, or a file in diffusers' or kohya's;
    null is the base model."""
    lora_scale: float = 1.0
    """How much of the LoRA: 0 is the base model, 1 the tuned one; more overshoots."""
    annealing: float = 0.0
    """Power of annealed importance guidance: from the base model at the first step to the tuned one at the
    last. 0 leaves it out."""
    precision: str = "fp32"
    """Of the denoiser. A run has its own, unless it is named."""
    device: str = "auto"
    allow_targets: list[str] | None = None
    allow_servers: list[str] | None = None
    """Addresses of reward servers that only a file names, and that images and prompts may be sent to."""
    model: Any = None
    eval_sampler: Any = None


def of_run(c: dict[str, Any], run: Path, groups: Sequence[str]) -> dict[str, Any]:
    """`c` with the run's policy, and its precision and `groups` where the command line names none.

    Raises:
        RunError: if its configuration cannot be read.
    """
    its = {"precision": "fp32", **read_config(run)}
    named = {key.partition(".")[0] for key in asked()}
    own = {key: its.get(key) for key in (*groups, "precision") if key not in named}
    return {**c, **own, "policy": its.get("policy", {}), "run": str(run)}


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
    its = read_config(folder)
    learned = weights(folder)
    model: Any = its.get("model")
    wrong = list(node_problems("model", model, allowed=allow_targets, offers=("encode", "denoise")))
    if wrong:
        raise RunError(f"{folder}: {wrong[0]}")
    if its.get("policy", {}).get(
        "full"
    ):  # a folder that `save` wrote, in one variant and with its configuration
        whole = {k: None if k in ("revision", "variant", "config") else v for k, v in model.items()}
        return build({**whole, "path_or_id": str(learned)}).pipe
    family: Any = build(model)
    family.pipe.load_lora_weights(str(learned))
    return family.pipe


def policy_of(c: dict[str, Any]) -> Policy:
    """The tuned policy: that of the run, the LoRA, or the base model with an adapter that does nothing.

    Args:
        c: with the keys model, precision, device, run or lora (a folder or file) or neither, and a run's
            policy.
    """
    keep_freed_memory()
    family: Any = build(c["model"])
    learned, its = (
        weights(Path(c["run"])) if c["run"] else c["lora"] and Path(c["lora"]),
        c.get("policy") or {},
    )
    memory = {key: its[key] for key in ("decode_batch", "text_on_host") if key in its}
    common: dict[str, Any] = {"precision": c["precision"], "device": device_of(c["device"]), **memory}
    if c["run"] and its.get("full"):
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
