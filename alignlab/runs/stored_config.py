"""RUN/config.yaml: what a run was started with, in today's keys, and where two runs differ."""

from pathlib import Path
from typing import Any

import yaml

from alignlab.files.bounded_yaml import read_yaml
from alignlab.files.safe_folder import RunError, refuse_devices
from alignlab.runs.layout import READ
from alignlab.runs.moved_targets import with_moved_targets

KEPT_CHECKPOINTS = 2
"""How many stay on the disk, unless keep= says otherwise."""
GUARDS = ("on_nonfinite", "max_ratio", "max_kl")
NOT_SCIENCE = (
    "output_dir",
    "resume",
    "device",
    "tracker",
    "tracking",
    "checkpoint_every",
    "keep",
    *GUARDS,
    "offload",
    "push_to_hub",
    "allow_servers",
)
"""Keys in which a resumed run may differ."""
LATER_KEYS = {
    "quick": False,
    "lr_schedule": "constant",
    "lr_warmup": 0,
    "ema": 0.0,
    "select": "last",
    "compile": False,
    "init_from": None,
    "push_to_hub": None,
    "keep": KEPT_CHECKPOINTS,
    "on_nonfinite": "stop",
    "max_ratio": None,
    "max_kl": None,
    "combine": "sum",
    "eval_rewards": {},
    "allow_servers": [],
    "tracking": {"project": "alignlab", "name": None, "group": None, "tags": []},
}
"""Keys that earlier versions did not have, with the values that change nothing."""
LATER_POLICY_KEYS = {"decode_batch": None, "text_on_host": False, "channels_last": False, "shard": False}
"""The same of the policy's group."""


def read_config(run: Path) -> dict[str, Any]:
    """RUN/config.yaml; keys that came later have the value that they had before they were keys.

    Raises:
        RunError: if it cannot be read, or is none.
    """
    refuse_devices(run, *READ)
    path = run / "config.yaml"
    try:
        read = with_moved_targets(read_yaml(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RunError(
            f"{path} cannot be read as YAML ({next(iter(str(error).splitlines()), '')}); give a run folder "
            "that is whole"
        ) from None
    groups = ("model", "algo", "reward", "prompts", "policy", "eval_rewards")
    if not isinstance(read, dict) or not all(isinstance(read.get(key, {}), dict) for key in groups):
        raise RunError(
            f"{path} is not the configuration of a run ({', '.join(groups)} are tables there); give a run "
            "folder that is whole"
        )
    stored: dict[str, Any] = {**LATER_KEYS, **read}
    if stored.get("policy", {}).get("_target_") == "alignlab.engine.policy.Policy":
        stored["policy"] = {**LATER_POLICY_KEYS, **stored["policy"]}
    if stored.get("algo", {}).get("statistics"):
        stored["algo"]["statistics"].setdefault("combine", "sum")
    if stored.get("algo", {}).get("_target_") == "alignlab.objectives.dpo.DPO":
        stored["algo"].setdefault("label_smoothing", 0.0)
    return stored


def first_difference(old: Any, new: Any, prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first key in which two nested dictionaries differ, with both values."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (prefix.rstrip("."), old, new)
    for key in (*new, *(k for k in old if k not in new)):
        difference = first_difference(old.get(key), new.get(key), f"{prefix}{key}.")
        if difference is not None:
            return difference
    return None
