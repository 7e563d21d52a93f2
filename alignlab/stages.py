"""python -m alignlab.stages recipe=rlhf output_dir=FOLDER

Runs several commands one after another: each stage is a command of alignlab that writes FOLDER/STAGE, and
later ones begin from what earlier ones left there ("{STAGE}" in their words). Stopped and typed again, it
goes on where it was: a finished stage is left as it is, and one that was cut short goes on as its own command
does. The words of every stage are composed before the first one begins, so that a mistyped key or option of
the last one is found at once.
"""

import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from alignlab.config.build import ConfigError, nearest
from alignlab.config.command import command
from alignlab.config.compose import asked, plain
from alignlab.config.foreign import DOORS
from alignlab.config.moved_experiments import present_word
from alignlab.config.record import Keys, record
from alignlab.files.bounded_yaml import read_yaml
from alignlab.files.safe_folder import LOCK, fresh, locked, refuse_links
from alignlab.files.writing import write_aside
from alignlab.rewards.servers import bound, named_by
from alignlab.runs.pasted import line, word
from alignlab.runs.stored_config import first_difference

PASSED_ON = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
COMMANDS = ("train", "train_reward", "make_pairs")
"""What a stage may be: commands that go on where they were stopped, and leave what is finished alone."""


@dataclass
class StagesConfig(Keys):
    """The keys of conf/stages.yaml."""

    recipe: Any = None
    """The stages in their order, by name: a command, and its words."""
    seed: int = 0
    """Of every stage. [any whole number from 0]"""
    quick: bool = False
    """A try in minutes instead of a result: each stage's words, then its quick ones."""
    given: dict[str, str] = field(default_factory=dict)
    """Stages that are done already, and where what they would make is: +given.pairs=FOLDER."""
    more: dict[str, str] = field(default_factory=dict)
    """Further words of a stage: "+more.tuned='steps=100 kl_coeff=0.1'"."""
    output_dir: str | None = None
    """The folder of all stages; a new one under runs/ if it is null."""


ConfigStore.instance().store(name="stages_schema", node=StagesConfig)


def checked(cfg: DictConfig) -> StagesConfig:
    """The configuration as a record.

    Raises:
        ConfigError: with every problem that was found.
    """
    c = record(StagesConfig, plain(cfg))
    stages: Any = c.recipe
    problems: list[str] = []
    if not isinstance(stages, dict) or not stages:
        raise ConfigError(
            "recipe has no stages; choose a file of conf/recipe with recipe=NAME (--help lists them)"
        )
    for name, stage in stages.items():
        problems += _stage_problems(name, stage, _typed_words(c.more.get(name, ""), name))
    for key, named in {"given": c.given, "more": c.more}.items():
        problems += [
            f"{key}.{name} is no stage of the recipe; {nearest(name, stages, f'{key}.')}"
            for name in named
            if name not in stages
        ]
    for name, more in c.more.items():
        try:
            words = shlex.split(more)
        except ValueError as error:
            problems.append(f"more.{name}={more} cannot be split into words ({error}); mend its quotes")
            continue
        if f"more.{name}" not in asked():  # a file's
            problems += _foreign_problems(name, words)
    problems += [
        f"given.{name}={path} does not exist; give a folder"
        for name, path in c.given.items()
        if not Path(path).exists()
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return c


def _typed_words(more: str, name: str) -> list[str]:
    """The words that the command line adds to a stage; those that a file adds are none of them."""
    try:
        return shlex.split(more) if f"more.{name}" in asked() else []
    except ValueError:  # which has a sentence of its own
        return []


def _stage_problems(name: str, stage: Any, typed: Sequence[str]) -> Iterator[str]:
    keys = stage if isinstance(stage, dict) and {*stage} <= {"command", "words", "quick"} else {}
    if not re.fullmatch(r"\w[\w.-]*", str(name)):  # it becomes the name of a folder
        yield f"recipe.{name} is no name of a stage; write letters, digits, _ and -"
    lists = [keys.get("words"), keys.get("quick", [])]
    words = [word for some in lists for word in (some if isinstance(some, list) else [None])]
    if keys.get("command") not in COMMANDS or not all(isinstance(word, str) for word in words):
        yield (
            f"recipe.{name} is no stage; give it command (one of {', '.join(COMMANDS)}), words and, if you "
            "like, quick: lists of texts"
        )
    else:
        yield from _foreign_problems(name, [str(word) for word in words], typed)


def _foreign_problems(name: str, words: Sequence[str], typed: Sequence[str] = ()) -> Iterator[str]:
    """What a file may not say, because for the stage's command it would be typed: a recipe may be somebody
    else's. An address that the user types too may stand there."""
    known = named_by(typed) | bound()
    for text in words:
        if re.match(rf"-|[+~]*({'|'.join(DOORS)}|hydra)\b", text) or named_by([text]) - known:
            trusted = word(f"+more.{name}", shlex.quote(text))
            yield f"recipe.{name}: {text} may not stand in a file; if you trust it, type {trusted}"


def command_lines(c: StagesConfig, folder: Path) -> dict[str, list[str]]:
    """The words of each stage that is to be run, the command's name first.

    Raises:
        ConfigError: if one begins from a stage that does not come before it.
    """
    done: dict[str, str] = {}
    out = {}

    def folder_of(named: re.Match[str], user: str) -> str:
        if named[1] not in done:
            raise ConfigError(
                f"recipe.{user}: {named[0]} is no earlier stage; known are {', '.join(done) or 'none'}"
            )
        return done[named[1]]

    for name, stage in c.recipe.items():
        if name not in c.given:
            words = [
                *stage["words"],
                *(stage.get("quick", []) if c.quick else []),
                *shlex.split(c.more.get(name, "")),
                f"seed={c.seed}",
            ]
            known = partial(folder_of, user=name)
            words = [re.sub(r"\{(\w+)\}", known, word) for word in words]
            out[name] = [stage["command"], *words, f"output_dir={folder / name}"]
        done[name] = c.given.get(name, str(folder / name))
    return out


def run(words: list[str], *flags: str, quiet: bool = False) -> int:
    """`python -m alignlab.COMMAND WORDS`, in a process of its own; its exit code. Signals that ask it to end
    are its: Ctrl-C comes from the terminal, the others are passed on."""
    typed = [sys.executable, "-m", f"alignlab.{words[0]}", *words[1:], *flags]
    with subprocess.Popen(typed, stdout=subprocess.DEVNULL if quiet else None) as stage:
        before = {
            number: signal.signal(number, lambda got, _: stage.send_signal(got)) for number in PASSED_ON
        }
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            code = stage.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code  # as a shell says it


def remember(folder: Path, lines: dict[str, list[str]]) -> None:
    """Writes FOLDER/stages.yaml.

    Raises:
        ConfigError: if the folder's stages had other words: what is finished would not be theirs.
    """
    path = folder / "stages.yaml"
    try:
        before = read_yaml(path.read_text(encoding="utf-8")) if path.is_file() else lines
        difference = (
            first_difference(_present(before), _present(lines))
            if isinstance(before, dict)
            else ("all", before, "stages")
        )
        if difference is None:
            write_aside(path, yaml.safe_dump(lines, sort_keys=False))
            return
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read or written ({error}); choose another output_dir") from None
    name, old, requested = difference
    raise ConfigError(
        f"{path} says {name}: {old}, but {name}: {requested} was asked for; choose another output_dir"
    )


def _present(stages: dict[str, Any]) -> dict[str, Any]:
    """The stages' words with the present names of experiments."""
    return {
        name: [present_word(str(word)) for word in words] if isinstance(words, list) else words
        for name, words in stages.items()
    }


def go_through(lines: dict[str, list[str]], folder: Path) -> None:
    """Runs the stages one after another; ends with the exit code of the first that does not end well."""
    remember(folder, lines)
    for number, (name, words) in enumerate(lines.items(), 1):
        print(f"[{number}/{len(lines)}] {name}: {line(words[0], *map(shlex.quote, words[1:]))}", flush=True)
        code = run(words)
        if code:
            print(
                f"{name} ended with code {code}; the same command, with {word('output_dir', folder)}, goes "
                "on from there",
                file=sys.stderr,
            )
            sys.exit(code)
    print(f"finished: {', '.join(str(folder / name) for name in lines)}")


@command("stages", schema=StagesConfig, check=checked)
def main(cfg: DictConfig) -> None:
    """Hydra's task."""
    c = checked(cfg)
    folder = Path(c.output_dir or fresh(f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-stages"))
    lines = command_lines(c, folder)
    refuse_links(
        folder, "stages.yaml", ".new_stages.yaml", *lines, inside=False
    )  # each stage looks into its own folder
    for name, words in lines.items():
        if run(words, "--cfg", "job", quiet=True):
            raise ConfigError(f"recipe.{name}: what is wrong with its words stands above; nothing was begun")
    with locked(folder, "being filled"):
        go_through(lines, folder)
        (folder / LOCK).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
