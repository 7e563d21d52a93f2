"""What files of others, found by --config-dir, may not decide: how Hydra itself works. Their _target_ is held
to the rule of build.py."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from alignlab.files.bounded_yaml import read_yaml
from alignlab.rewards.servers import bound, named_by

KEPT = (
    "callbacks",
    "hydra_logging",
    "job_logging",
    "run",
    "sweep",
    "output_subdir",
    "job.env_set",
    "job.env_copy",
    "job.chdir",
    "launcher",
)
"""Keys of hydra that name code, environment or folders: only the command line may change them."""
DOORS = ("allow_targets", "allow_servers", "push_to_hub")
"""Keys that say whom the user trusts: only the command line may set them."""
SWEEPERS = ("hydra._internal.core_plugins.", "hydra_plugins.")


def hydra_problems(composed: dict[str, Any], plain: dict[str, Any], typed: Collection[str]) -> Iterator[str]:
    """One sentence for each key of Hydra's configuration that a file changed.

    Args:
        composed: Hydra's node as composed with those files, and
        plain: without them.
        typed: the keys that the command line names.
    """
    for key in KEPT:
        own = any(word.replace("/", ".").startswith(f"hydra.{key.partition('.')[0]}") for word in typed)
        if not own and _at(composed, key) != _at(plain, key):
            yield (
                f"hydra.{key} is set by a file of --config-dir, which may not; type it on the command line "
                "if you want it"
            )
    sweeper = composed.get("sweeper") or {}
    if not str(sweeper.get("_target_")).startswith(SWEEPERS):
        yield f"hydra.sweeper._target_={sweeper.get('_target_')} is no sweeper of Hydra's or of its plugins"
    for key, value in _leaves(sweeper):
        door = next((door for door in DOORS if key.startswith(door)), None)
        if door is None and named_by([f"reward={value}"]) - bound():
            door = f"{key}={value}"
        if door is not None:
            yield (
                f"{door} is set by a file of --config-dir (hydra.sweeper), which may not; type it on the "
                "command line if you trust it"
            )


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that a sweeper may hand to a job as if it were typed, with the key that it stands at."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, str(name).lstrip("+~"))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, key)
    else:
        yield key, node


def yaml_problems(folder: Path) -> Iterator[str]:
    """One sentence for each file in a folder of others whose aliases unfold to much more than is written:
    Hydra would unfold them."""
    for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else ():
        try:
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            if "*" in text and "&" in text:
                read_yaml(text)
        except yaml.YAMLError as error:
            if "aliases" in str(error):
                yield f"{path} cannot be read as YAML ({error})"
        except (OSError, ValueError, RecursionError):  # Hydra has its own words, if it reads the file at all
            continue


def _at(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
