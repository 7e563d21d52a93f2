"""From what Hydra composed to a checked record, and what the user typed for it.

Nothing below this room knows Hydra or OmegaConf: checks.py says what is wrong with plain values, build.py
makes objects of them.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignlab.config.build import ConfigError
from alignlab.config.leaves import leaf_problems
from alignlab.config.outline import CONF as CONF
from alignlab.config.path_keys import is_path
from alignlab.config.record import record
from alignlab.config.reward_nodes import groupwise, weighed
from alignlab.config.schema import QUICK, TABLES, TrainConfig
from alignlab.config.train_rules import ignored_problems, problems
from alignlab.files.safe_folder import RunError
from alignlab.runs.moved_targets import with_moved_targets
from alignlab.runs.stored_config import NOT_SCIENCE, read_config

# eval_rewards=NAME chooses among the same files as reward=NAME.
for _file in (CONF / "reward").glob("*.yaml"):
    ConfigStore.instance().store(group="eval_rewards", name=_file.stem, node=OmegaConf.load(_file))

OmegaConf.register_new_resolver("or", lambda *values: next(v for v in values if v is not None), replace=True)
OmegaConf.register_new_resolver("last", lambda path: Path(str(path)).name, replace=True)


def checked(cfg: DictConfig) -> TrainConfig:
    """Makes the record of a training run; that of the earlier run, if resume= is all that was asked for.

    Raises:
        ConfigError: with every problem that was found.
    """
    values = plain(cfg)
    weighed(values)
    allowed = opted_in(values)  # of this command, not of the earlier one
    values = _as_begun(values)
    if values.get("quick"):
        _make_quick(values)
    mistakes = list(
        dict.fromkeys(problems({**values, "allow_targets": allowed} if "allow_targets" in values else values))
    )
    upload = values.get("push_to_hub")
    if upload is not None and values.get("resume") is None and not typed("push_to_hub"):
        mistakes.append(
            f"push_to_hub={upload} stands in a file, and the model would be uploaded there; if you want "
            f"that, type push_to_hub={upload}, and push_to_hub=null if not"
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    c = record(TrainConfig, values)
    if not (given_folder(c) / "config.yaml").is_file():  # a run that began goes on as it is
        mistakes = list(ignored_problems(c, _references(cfg.algo)))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    if c.quick and groupwise(c.reward) + groupwise(c.eval_rewards):
        c = replace(c, evaluation=replace(c.evaluation, final_images=max(2, c.evaluation.final_images)))
    return c


def _as_begun(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run that resume= names, if nothing else was asked for that its numbers depend
    on; otherwise the one that was given."""
    keys, earlier = asked(), Path(values.get("resume") or "")
    if not ("resume" in keys <= {*NOT_SCIENCE, "allow_targets"}) or not (earlier / "config.yaml").is_file():
        return values
    try:
        stored = read_config(earlier)
    except RunError as error:
        raise ConfigError(str(error)) from None
    given = {key: values[key] for key in NOT_SCIENCE}
    return given | stored | {key: value for key, value in given.items() if key in keys}


def _make_quick(values: dict[str, Any]) -> None:
    """Lowers the sizes of a configuration to those of QUICK."""
    for key, most in QUICK.items():
        group, _, name = key.rpartition(".")
        node = values.get(group) if group else values
        if isinstance(node, dict) and isinstance(node.get(name), int):
            node[name] = min(node[name], most)


def _references(node: Any) -> set[str]:
    """The top-level keys that a part of the configuration refers to."""
    return set(re.findall(r"\$\{\.*(\w+)\}", str(OmegaConf.to_container(node, resolve=False))))


def plain(cfg: DictConfig) -> Any:
    """The resolved dictionary.

    Raises:
        ConfigError: if a reference leads nowhere, or a value is one that no key may have.
    """
    try:
        values: Any = with_moved_targets(OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        reason = re.sub(
            r"^TypeError raised .*", "a resolver in it is given the wrong arguments", first_line(error)
        )
        reason = re.sub(
            r"Cannot convert '(Dict|List)Config' to string.*",
            "it leads to a table or a list, not to a value",
            reason,
        )
        raise ConfigError(f"{error.full_key} cannot be resolved: {reason}") from None
    except (RecursionError, ValueError, TypeError) as error:  # a resolver's own, or a reference to itself
        raise ConfigError(
            f"a reference (${{...}}) of the configuration cannot be resolved: {first_line(error)}"
        ) from None
    values = _at_home(values)
    unfit = list(leaf_problems(values))
    if unfit:
        raise ConfigError("\n".join(unfit))
    return values


def _at_home(node: Any, where: str = "") -> Any:
    """The configuration with `~` in front of a path as the user's home, which a shell replaces in some places
    only."""
    if isinstance(node, dict):
        return {key: _at_home(value, f"{where}.{key}" if where else str(key)) for key, value in node.items()}
    if isinstance(node, list):
        return [_at_home(value, f"{where}.{k}") for k, value in enumerate(node)]
    return os.path.expanduser(node) if isinstance(node, str) and is_path(where) else node


def refuse_deleted(cfg: DictConfig, schema: type) -> None:
    """Raises a ConfigError if a key of the schema was deleted (~key)."""
    # in cfg itself a key without a value ("???") is not
    deleted = [f.name for f in fields(schema) if f.name not in cfg.keys()]
    for name, keys in TABLES.items() if not deleted else ():
        table = cfg[name] if name in cfg else None
        if isinstance(table, DictConfig):
            deleted += [f"{name}.{f.name}" for f in fields(keys) if f.name not in table.keys()]
    if deleted:
        raise ConfigError(f"{', '.join(deleted)} must not be deleted")


_words: list[str] | None = None
"""The overrides of the command that runs in this process."""


@contextmanager
def typing_of(overrides: Sequence[str]) -> Iterator[None]:
    """Inside, a command runs whose user typed these overrides."""
    global _words
    before, _words = _words, [*overrides]
    try:
        yield
    finally:
        _words = before


def asked() -> set[str]:
    """The keys that the command line names; none outside of a command."""
    overrides: Any = (
        OmegaConf.to_container(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    )
    return {override.lstrip("+~").partition("=")[0] for override in overrides}


def opted_in(values: Mapping[str, Any]) -> list[str]:
    """allow_targets, if the user typed it: a file, of --config-dir or of a run folder, cannot open the door
    to itself. Outside of a command the configuration is the calling program's own."""
    given = values.get("allow_targets")
    return list(given) if typed("allow_targets") and isinstance(given, list) else []


def typed(key: str) -> bool:
    """Whether the user typed the key for the command that runs. Outside of a command everything is the
    calling program's own."""
    overrides = _words
    if overrides is None and HydraConfig.initialized():  # a launcher's process
        overrides = list(HydraConfig.get().overrides.task)
    return overrides is None or any(override.lstrip("+").startswith(key) for override in overrides)


def given_folder(c: TrainConfig) -> Path:
    """The run's folder if the command line says which: resume=, the job's in a sweep, or output_dir=; else
    `Path()`."""
    at = HydraConfig.get() if HydraConfig.initialized() else None
    sweep = at is not None and at.mode == RunMode.MULTIRUN
    return Path(c.resume or (at.runtime.output_dir if at is not None and sweep else c.output_dir) or "")


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
