"""Where the trained weights start: init_from= names a run, a LoRA or a pipeline folder. The frozen reference
stays model.path_or_id."""

import copy
import re
from typing import Any

from torch import Tensor, nn

from alignlab.distributed.sharding import unsharded
from alignlab.engine.policy import Policy
from alignlab.files.safe_folder import RunError
from alignlab.models import lora_files
from alignlab.runs.weight_files import a_pipeline, another_rank, source


def begin_from(policy: Policy, init_from: str | None) -> None:
    """Loads the trained weights; a LoRA under full fine-tuning is added to them. None leaves them as they
    are.

    Raises:
        RunError: if what is there does not fit what is trained.
    """
    if init_from is None:
        return
    path, whole = source(init_from)
    if whole and not policy.full:
        raise RunError(a_pipeline(init_from))
    family = policy.family
    try:
        if whole:
            state = family.read_full(path)
        else:
            lora, config = family.read_lora(path)
            whole_model = unsharded(family.denoiser) if policy.sharded else family.denoiser
            state = fused(whole_model, lora, config) if policy.full else lora
    except ValueError as error:
        raise RunError(f"init_from={init_from}: {error}") from None
    if not policy.full:
        asked: Any = policy.lora_config
        if (config["rank"], config["alpha"]) != (asked.r, asked.lora_alpha):
            raise RunError(
                another_rank(init_from, (config["rank"], config["alpha"]), (asked.r, asked.lora_alpha))
            )
        _same_targets(init_from, policy, lora)
    refuse_unlike(f"init_from={init_from}", policy, state)
    policy.load_state_dict(state)


def refuse_unlike(where: str, policy: Policy, state: dict[str, Tensor]) -> None:
    """Raises a RunError if weights are missing or of another shape than the policy's."""
    for key, ours in policy.state_dict().items():
        if key not in state or state[key].shape != ours.shape:
            difference = (
                f"{key} is {list(state[key].shape)} there" if key in state else f"{key} is missing there"
            )
            raise RunError(
                f"{where} is of another model: {difference}, and {list(ours.shape)} in model.path_or_id"
            )


def fused(denoiser: nn.Module, lora: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The network's weights with a LoRA added to them, W + (alpha/rank) B A; the network stays as it is.

    Raises:
        ValueError: if the LoRA is of another network.
    """
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    merged: Any = copy.deepcopy(denoiser)
    targets = sorted(lora_files.modules(lora))
    merged.add_adapter(LoraConfig(r=config["rank"], lora_alpha=config["alpha"], target_modules=targets))
    if {k: v.shape for k, v in get_peft_model_state_dict(merged).items()} != {
        k: v.shape for k, v in lora.items()
    }:
        raise ValueError("the LoRA's shapes are those of another model")
    set_peft_model_state_dict(merged, lora)
    merged.fuse_lora()
    merged.unload_lora()
    return merged.state_dict()


def _same_targets(init_from: str, policy: Policy, lora: dict[str, Tensor]) -> None:
    stored, adapted = lora_files.modules(lora), lora_files.modules(policy.state_dict())
    if stored == adapted:
        return
    network = {name.removesuffix(".base_layer") for name, _ in policy.family.denoiser.named_modules()}
    if not stored <= network:
        raise RunError(
            f"init_from={init_from} adapts {min(stored - network)}, which this model does not have; it is of "
            "another model"
        )
    ends = {re.sub(r"^.*?\.(?=[^.]+(\.\d+)?$)", "", name) for name in stored}  # to_q, to_out.0
    named = {name for name in network if name in ends or name.endswith(tuple(f".{end}" for end in ends))}
    targets = sorted(ends) if named == stored else sorted(stored)
    only = min(stored - adapted) if stored - adapted else min(adapted - stored)
    raise RunError(
        f"init_from={init_from} adapts {len(stored)} modules, but policy.lora.targets names "
        f"{len(adapted)} ({only} is in one alone); set 'policy.lora.targets=[{','.join(targets)}]'"
    )
