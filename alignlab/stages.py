"""python -m alignlab.stages recipe=rlhf output_dir=FOLDER

Commands that follow each other, in one: each stage is a command of alignlab that writes FOLDER/STAGE, and later ones begin from what
earlier ones left there ("{STAGE}" in their words). Stopped and typed again, it goes on where it was: a finished stage is left as it is,
and one that was cut short goes on as its own command does. The words of every stage are read before the first one begins.
"""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from alignlab.config import command, plain
from alignlab.nodes import ConfigError, nearest

COMMANDS = ("train", "train_reward", "make_pairs")
"""What a stage may be: commands that go on where they were stopped, and leave what is finished alone."""


@dataclass
class StagesConfig:
    """The keys of conf/stages.yaml."""

    recipe: Any = None
    """The stages in their order, by name: a command, and its words."""
    seed: int = 0
    """Of every stage."""
    quick: bool = False
    """A try in minutes instead of a result: each stage's words, then its quick ones."""
    given: dict[str, str] = field(default_factory=dict)
    """Stages that are done already, and where what they would make is: +given.pairs=FOLDER."""
    more: dict[str, str] = field(default_factory=dict)
    """Further words of a stage: "+more.tuned='steps=100 kl_coeff=0.1'"."""
    output_dir: str | None = None


ConfigStore.instance().store(name="stages_schema", node=StagesConfig)


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The plain configuration.

    Raises:
        ConfigError: with every problem that was found.
    """
    c: dict[str, Any] = plain(cfg)
    stages, found = c["recipe"], []
    if not isinstance(stages, dict) or not stages:
        raise ConfigError("recipe has no stages; choose a file of conf/recipe with recipe=NAME (--help lists them)")
    for name, stage in stages.items():
        words = stage.get("words") if isinstance(stage, dict) else None
        if not isinstance(words, list) or not {*stage} <= {"command", "words", "quick"} or stage.get("command") not in COMMANDS:
            found.append(
                f"recipe.{name} is no stage; give it command (one of {', '.join(COMMANDS)}), words and, if you like, quick"
            )
    for key in ("given", "more"):
        found += [
            f"{key}.{name} is no stage of the recipe; {nearest(name, stages, f'{key}.')}" for name in c[key] if name not in stages
        ]
    for name, words in c["more"].items():
        try:
            shlex.split(words)
        except ValueError as error:
            found.append(f"more.{name}={words} cannot be split into words ({error}); mend its quotes")
    found += [
        f"given.{name}={path} does not exist; give a folder" for name, path in c["given"].items() if not Path(path).exists()
    ]
    if found:
        raise ConfigError("\n".join(found))
    return c


def command_lines(c: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    """The words of each stage that is to be run, the command's name first.

    Raises:
        ConfigError: if one begins from a stage that does not come before it.
    """
    there: dict[str, str] = {}
    out = {}
    for name, stage in c["recipe"].items():
        if name not in c["given"]:
            words = [
                *stage["words"],
                *(stage.get("quick", []) if c["quick"] else []),
                *shlex.split(c["more"].get(name, "")),
                f"seed={c['seed']}",
            ]
            try:
                words = [word.format_map(there) for word in words]
            except (KeyError, ValueError, IndexError):
                raise ConfigError(
                    f"recipe.{name}: a word names what is no earlier stage; known are {', '.join(there) or 'none'}"
                ) from None
            out[name] = [stage["command"], *words, f"output_dir={folder / name}"]
        there[name] = c["given"].get(name, str(folder / name))
    return out


def run(words: list[str], *flags: str, quiet: bool = False) -> int:
    """`python -m alignlab.COMMAND WORDS`, in a process of its own; its exit code."""
    typed = [sys.executable, "-m", f"alignlab.{words[0]}", *words[1:], *flags]
    return subprocess.run(typed, stdout=subprocess.DEVNULL if quiet else None, check=False, env={**os.environ}).returncode


@command("stages", schema=StagesConfig, check=checked)
def main(cfg: DictConfig) -> None:
    """Hydra's task."""
    c = checked(cfg)
    folder = Path(c["output_dir"] or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-stages")
    lines = command_lines(c, folder)
    for name, words in lines.items():
        if run(words, "--cfg", "job", quiet=True):
            raise ConfigError(f"recipe.{name}: what is wrong with its words stands above; nothing was begun")
    for number, (name, words) in enumerate(lines.items(), 1):
        print(f"[{number}/{len(lines)}] {name}: python -m alignlab.{words[0]} {shlex.join(words[1:])}", flush=True)
        code = run(words)
        if code:
            print(
                f"{name} ended with code {code}; the same command, with output_dir={folder}, goes on from there", file=sys.stderr
            )
            sys.exit(code)
    print(f"finished: {', '.join(str(folder / name) for name in lines)}")


if __name__ == "__main__":
    main()
