"""From a user's mistake to one sentence on the screen, with what to type instead.

A command line that composes no configuration is taken apart: each word by itself, then what the others make
together. So one call names every mistake.
"""

import inspect
import os
import re
import shlex
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, ListConfig, OmegaConf

from alignlab.config.build import ConfigError, nearest, resolve, words
from alignlab.config.compose import CONF, first_line, refuse_deleted
from alignlab.config.foreign import hydra_problems, yaml_problems
from alignlab.config.path_keys import LIST, is_path
from alignlab.config.schema import Evaluation
from alignlab.config.secrecy import masked
from alignlab.config.synonyms import synonym
from alignlab.distributed.ranks import launched
from alignlab.runs.pasted import list_word, word

LAUNCHERS = {
    "joblib": "alignlab[sweeps]",
    "submitit_slurm": "alignlab[sweeps]",
    "submitit_local": "alignlab[sweeps]",
    "ray": "hydra-ray-launcher",
}
"""The packages that Hydra's launchers come from."""


def say(sentences: object, job: str = "") -> int:
    """Prints one error a line, without secrets, and gives the exit code of a user's mistake.

    Args:
        sentences: lines, or an error that consists of them.
        job: what each line begins with, in a sweep.
    """
    for line in masked(str(sentences)).splitlines():
        if not silent() or line.startswith("process "):
            line = line if len(line) <= 1200 else f"{line[:800]} [...] {line[-300:]}"
            print(f"error: {job}{line}", file=sys.stderr)
    return 2


def silent() -> bool:
    """Whether another process says the same (ranks.signed: what only this one has to say)."""
    return launched() > 1 and os.environ.get("RANK", "0") != "0"


def launcher_sentence(error: Exception) -> tuple[int, str] | None:
    """What an error of submitit's means, and the exit code; None if it is none of submitit's."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "submitit" in Path(frame.filename).parts
    ]
    if not frames:
        return None
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if any(frame.name == "results" for frame in frames):  # a job was taken, and has none
        again = (
            "type the same command again: what is finished is skipped, and the others go on from their "
            "checkpoints"
        )
        return (
            1,
            f"a job ended before it was done ({said[0]}; its log is in .submitit in the sweep's folder); "
            f"{again}",
        )
    if "srun" in said[0]:
        return (
            2,
            "hydra/launcher=slurm needs Slurm, and there is no srun here; choose "
            "hydra/launcher=submitit_local or workers",
        )
    mend = "set what it names, hydra.launcher.partition=NAME for example, and type the command again"
    return 2, f"hydra/launcher: the jobs were refused ({said[-1]}); {mend}"


def foreign_problems(name: str, arguments: Namespace) -> list[str]:
    """Says what files found by --config-dir or hydra.searchpath would make of Hydra itself, before Hydra does
    as they say. Without such files there is nothing to say."""
    paths = [word for word in arguments.overrides if word.startswith("hydra.searchpath=")]
    bombs = [problem for folder in _folders(paths, arguments) for problem in yaml_problems(folder)]
    if bombs:
        return bombs
    if arguments.config_dir:
        paths.append(f"hydra.searchpath=[file://{Path(arguments.config_dir).resolve()}]")
    if not paths:
        return []
    others = [
        _singles(word) if arguments.multirun else [word] for word in arguments.overrides if word not in paths
    ]
    problems: list[str] = []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        plain_hydra = _hydra_node(name, [])
        for k in range(max(map(len, others), default=1)):
            typed = [values[min(k, len(values) - 1)] for values in others]
            try:
                with_files = _hydra_node(name, [*paths, *typed])
            except Exception:  # it does not compose, which has its own sentence
                return []
            problems += hydra_problems(
                with_files, plain_hydra, [word.lstrip("+~").partition("=")[0] for word in typed]
            )
    return list(dict.fromkeys(problems))


def _folders(searchpaths: list[str], arguments: Namespace) -> list[Path]:
    """The folders that the command line adds to the configuration."""
    listed = [Path(given) for given in (arguments.config_dir, arguments.config_path) if given]
    for text in searchpaths:
        try:
            value: Any = OverridesParser.create().parse_override(text).value()
        except HydraException:  # which has its own sentence
            continue
        listed += [
            Path(str(place).removeprefix("file://"))
            for place in (value if isinstance(value, list) else [value])
        ]
    return listed


def _hydra_node(name: str, overrides: list[str]) -> dict[str, Any]:
    node: Any = OmegaConf.to_container(
        hydra.compose(name, overrides, return_hydra_config=True).hydra, resolve=False
    )
    return node


def diagnosis(name: str, arguments: Namespace, schema: type, check: Callable[[DictConfig], Any]) -> str:
    """Why a command line composes no configuration: each override that is wrong by itself, and what the
    others get wrong."""
    extra = Path(arguments.config_dir or "").resolve()
    good, problems = (
        [f"hydra.searchpath=[file://{extra}]"] if arguments.config_dir and extra.is_dir() else [],
        [],
    )
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for text in sorted(
            arguments.overrides, key=lambda text: "." in text.partition("=")[0]
        ):  # groups decide which keys exist
            for override in _singles(text) if arguments.multirun else [text]:
                try:
                    hydra.compose(name, [*good, override])
                    good.append(override)
                except Exception as error:
                    problems.append(_sentence(override, error, hydra.compose(name, good), schema))
        try:
            composed = hydra.compose(name, good)
            refuse_deleted(composed, schema)
            check(composed)
        except ConfigError as error:
            problems.append(str(error))
    return "\n".join(dict.fromkeys(problems))


def _singles(text: str) -> list[str]:
    """An override of a sweep as the overrides of its jobs."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        return [text]
    values = override.sweep_string_iterator() if override.is_discrete_sweep() else ()
    return [f"{override.get_key_element()}={value}" for value in values] or [text]


def _sentence(text: str, error: Exception, cfg: DictConfig, schema: type) -> str:
    """What is wrong with one override, given the configuration without it."""
    key, _, value = text.lstrip("+~").partition("=")
    cause = error.__cause__ or error
    if isinstance(error, OverrideParseException) or not key:
        return (
            f"{text} cannot be read; write key=value, with quotes around blanks and "
            f"brackets{_as_text(text, cfg)}"
        )
    if "Ambiguous value" in str(error) or "requires --multirun" in str(error):
        return f"{text} names several values; add -m to run each of them{_as_list(key, value, cfg)}"
    missing = str(getattr(error, "missing_cfg_file", None) or "").rpartition("/")[2]
    if key == "hydra/launcher" and missing in LAUNCHERS:
        return f"{text} needs a plugin of Hydra's; pip install '{LAUNCHERS[missing]}'"
    group = CONF / ("reward" if key == "eval_rewards" else key)
    if group.is_dir():
        missing = getattr(error, "missing_cfg_file", None) or f"{key}/{value}"
        options = set(getattr(error, "options", None) or ())  # without those in folders
        if missing.startswith(f"{key}/"):
            value = missing.removeprefix(f"{key}/")
            files = (path.relative_to(group).with_suffix("") for path in group.rglob("*.yaml"))
            options.update(path.as_posix() for path in files)
        else:  # an option of another group, which the chosen file names
            value = missing.rpartition("/")[2]
        return f"{key}={value} is no option; {nearest(value, options, f'{key}=')}{_own_reward(key, value)}"
    if isinstance(cause, (AttributeError, KeyError)):  # a key that is not there
        parent, _, name = key.rpartition(".")
        target = str(OmegaConf.select(cfg, f"{parent}._target_"))
        if target.startswith("alignlab.") and name in inspect.signature(resolve(target)).parameters:
            return f"{key} is not in the chosen file; write +{text} to add it"
        known = list(_dotted(OmegaConf.to_container(cfg)))
        other = synonym(key, known)
        if other is not None:
            return f"{key} is not a known key; {other}"
        inner = [k for k in known if k.endswith(f".{key}")]
        return f"{key} is not a known key; " + (
            f"did you mean {' or '.join(inner)}?" if inner else nearest(key, known)
        )
    if text.startswith("~"):
        return f"{key} must not be deleted"
    typed = {f.name: f for f in fields(schema)} | {f"evaluation.{f.name}": f for f in fields(Evaluation)}
    if key in typed and value.startswith("[") and is_path(key):
        single = word(key, value.strip("[]"))
        return (
            f"{text} is a list, and one name is wanted; write {single}, or {word(key, value)} if the "
            "brackets are part of the name"
        )
    if key in typed:
        return f"{text} must be {words(typed[key].type)}"
    if isinstance(cause, (AssertionError, IndexError)) or "is not an int" in str(
        cause
    ):  # a name under a list
        parent = key.rpartition(".")[0]
        return f"{text}: {parent} is no table of keys and values; write '{parent}=[...]' whole"
    if "Cannot merge" in str(cause):  # OmegaConf's own words name its classes
        return f"{text} would replace a table of keys and values; set the keys in it, {key}.NAME=..."
    return f"{text}: {first_line(cause)}"


def _own_reward(key: str, value: str) -> str:
    """How to name a reward that is a function of the user's own (docs/rewards.md), if that may be what was
    meant."""
    if (
        key not in ("reward", "eval_rewards")
        or not re.fullmatch(r"[A-Za-z]\w*", value, re.ASCII)
        or value in ("null", "none")
    ):
        return ""
    overrides = (
        f"+{key}.{value}.function=my_module.score +{key}.{value}.differentiable=false "
        f"+{key}.{value}.unit=points"
    )
    return f" (a function of your own, my_module.score: {key}=none {overrides} 'allow_targets=[my_module]')"


def _as_text(text: str, cfg: DictConfig) -> str:
    """How to write one text at a key whose value Hydra cannot read; nothing where a number is wanted."""
    key, _, value = text.partition("=")
    if not value or not re.fullmatch(r"\+{0,2}[A-Za-z_][\w.]*", key, re.ASCII):
        return ""
    name = key.lstrip("+")
    present = OmegaConf.select(cfg, name, throw_on_missing=False)
    if isinstance(present, ListConfig) or LIST.fullmatch(name):
        return "" if value.startswith("[") else f": {list_word(key, [value])}"
    return "" if isinstance(present, (bool, int, float, DictConfig)) else f": {word(key, value)}"


def _as_list(key: str, value: str, cfg: DictConfig) -> str:
    """How to write a list instead of several values, where a key takes one."""
    listed = isinstance(OmegaConf.select(cfg, key, throw_on_missing=False), ListConfig)
    several = key in ("reward", "eval_rewards") or listed or key.startswith("prompts.")
    return f", or write a list: {shlex.quote(f'{key}=[{value}]')}" if several else ""


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of nested dictionaries, but for the private ones."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if not key.startswith("_"):
            yield prefix + key
            yield from _dotted(value, f"{prefix}{key}.")
