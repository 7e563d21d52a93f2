"""python -m alignlab.train_reward kind=preference data=FOLDER

Fits a reward on what people said of images (data/judgements.py, data/preferences.py): a head on a frozen
CLIP, or its last blocks too (rewards/train.py). The folder that it writes is a reward: `reward=preference
reward.preference.path=FOLDER`. The same command again leaves a finished one as it is, and begins one that was
killed anew.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import Dataset, Subset

from alignlab.config.build import ConfigError
from alignlab.config.command import command
from alignlab.config.compose import plain
from alignlab.config.jobs import device_of, folder_of_job
from alignlab.config.record import Keys, record
from alignlab.data.judgements import Ratings
from alignlab.data.pictures import colour
from alignlab.data.preferences import Choices
from alignlab.files.bounded_yaml import read_yaml
from alignlab.files.safe_folder import LOCK, RunError, fresh, is_stray, locked, refuse_links
from alignlab.files.writing import all_aside, refuse_unwritable, room_for, write_aside
from alignlab.rewards.clip import Clip, locate
from alignlab.rewards.heads import save
from alignlab.rewards.train import Fit
from alignlab.runs.pasted import word
from alignlab.runs.stored_config import first_difference

PARTS = (
    "config.yaml",
    "metrics.jsonl",
    "reward.json",
    "head.safetensors",
    "clip.safetensors",
    ".new_*",
    LOCK,
)
"""What the command writes in its folder."""


@dataclass
class TrainRewardConfig(Keys):
    """The keys of conf/train_reward.yaml."""

    kind: str = "preference"
    """preference (pairs) or aesthetic (ratings). [preference | aesthetic]"""
    data: str = "???"
    """A table of pairs or ratings, or a folder with some."""
    held_out: str | None = None
    """Another table, for the held-out numbers; null holds out a share of `data`."""
    held_out_share: float = 0.1
    """Share of the rows, or of the captions, that is held out. [share]"""
    background: str | None = None
    """The colour behind pictures that are transparent in places; null is white."""
    clip: str = "emoji_clip"
    """The CLIP to stand on: a folder in open_clip's format, one shipped, or hf-hub:owner/name."""
    blocks: int = 0
    """Last transformer blocks of the image tower that are trained too; 0 trains the head only.
    [transformer blocks]"""
    hidden: list[int] = field(default_factory=list)
    """Hidden layers of the aesthetic head."""
    relu: bool = True
    """Between them; false is LAION's affine head."""
    epochs: int = 10
    """Passes over the data. [passes]"""
    lr: float = 1e-3
    """The learning rate of AdamW. [per optimiser step]"""
    batch_size: int = 64
    """Rows of one optimiser step. [rows]"""
    weight_decay: float = 1e-2
    """Of AdamW. [per unit of the learning rate]"""
    seed: int = 0
    """Fixes the split, the order and the first weights. [any whole number from 0]"""
    device: str = "auto"
    """Where to compute; auto is the best there is. [auto | cpu | cuda | mps]"""
    output_dir: str | None = None
    """The reward's folder; a new one under runs/ if it is null."""


ConfigStore.instance().store(name="train_reward_schema", node=TrainRewardConfig)


def checked(cfg: DictConfig) -> TrainRewardConfig:
    """The configuration as a record.

    Raises:
        ConfigError: with every problem that was found.
    """
    given: dict[str, Any] = plain(cfg)
    problems = [f"{key} has no value; set {key}=..." for key, value in given.items() if value == "???"]
    if problems:
        raise ConfigError("\n".join(problems))
    c = record(TrainRewardConfig, given)
    if c.kind not in ("preference", "aesthetic"):
        problems.append(f"kind={c.kind} is not one of preference, aesthetic")
    if not 0 < c.held_out_share < 1:
        problems.append(f"held_out_share={c.held_out_share} is outside (0, 1)")
    for least, keys in {0: "blocks seed weight_decay", 1: "epochs batch_size"}.items():
        problems += [
            f"{key}={given[key]} must be at least {least}" for key in keys.split() if given[key] < least
        ]
    if c.lr <= 0:
        problems.append(f"lr={c.lr} must be positive")
    if c.device not in ("auto", "cpu", "cuda", "mps"):
        problems.append(f"device={c.device} is not one of auto, cpu, cuda, mps")
    if any(width < 1 for width in c.hidden):
        problems.append(f"hidden={c.hidden} must hold positive widths")
    try:
        locate(c.clip, key="clip")
    except (OSError, ValueError) as error:
        problems.append(str(error))
    try:
        colour(c.background)
    except ValueError as error:
        problems.append(str(error))
    for key, table in {"data": c.data, "held_out": c.held_out}.items():
        if table is not None and not Path(table).exists():
            problems.append(f"{key}={table} does not exist; give a table, or a folder with one")
    if problems:
        raise ConfigError("\n".join(problems))
    return c


def _taken(c: TrainRewardConfig, folder: Path) -> Iterator[str]:
    """What stands in the way of a folder that is not empty: anything but what this very command left
    there."""
    if not folder.is_dir() or all(
        path.name in (LOCK, "multirun.yaml", "overrides.yaml") or is_stray(path) for path in folder.iterdir()
    ):
        return
    try:
        before = read_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict) or "kind" not in before:
        yield f"output_dir={folder} is not empty and holds no reward; choose another"
        return
    free = {"device": None, "output_dir": None}
    difference = first_difference({**before, **free}, {**asdict(c), **free})
    if difference is not None:
        key, old, requested = difference
        yield (
            f"output_dir={folder} holds a reward with {key}={old}, but {key}={requested} was asked for; "
            "choose another"
        )


def train_reward(c: TrainRewardConfig, folder: Path) -> dict[str, float]:
    """Fits the reward that a checked configuration describes, writes it to `folder`, and returns the held-out
    numbers."""
    written = ("config.yaml", "metrics.jsonl", "head.safetensors", "clip.safetensors", "reward.json")
    refuse_unwritable(folder, "output_dir", *written)
    clip = Clip(c.clip, key="clip")
    table = Choices if c.kind == "preference" else Ratings
    data: Dataset[Any] = table(c.data, clip.size, c.background)
    if c.held_out is not None:
        held_out: Dataset[Any] = table(c.held_out, clip.size, c.background)
    else:
        n = len(data)  # type: ignore[arg-type]
        order = torch.randperm(n, generator=torch.Generator().manual_seed(c.seed)).tolist()
        cut = max(1, round(c.held_out_share * n))
        if cut >= n:
            raise ValueError(
                f"data={c.data} holds {n} row(s), too few to hold some out; add rows, or give held_out=TABLE"
            )
        data, held_out = Subset(data, order[cut:]), Subset(data, order[:cut])
    kind: Any = c.kind
    fit = Fit(kind, clip, blocks=c.blocks, hidden=tuple(c.hidden), relu=c.relu, seed=c.seed)
    new = not folder.is_dir() or not any(folder.iterdir())
    with room_for(folder):
        lock = locked(folder, "being written")
    with lock, _without_lock_in_the_end(folder):
        _look_again(c, folder)
        with room_for(folder / "config.yaml"):
            write_aside(folder / "config.yaml", yaml.safe_dump(asdict(c), sort_keys=False))
        try:
            numbers = _fitted(c, fit, data, held_out, folder / "metrics.jsonl")
        except ValueError:  # a picture that cannot be read
            if new:
                shutil.rmtree(folder)
            raise
        sizes = {"trained on": len(data), "held out": len(held_out)}  # type: ignore[arg-type]
        about = {"kind": c.kind, "clip": c.clip, "relu": c.relu, "items": sizes, **numbers}
        with room_for(folder), all_aside(folder, last="reward.json") as aside:
            save(aside, fit.head, about, {name: weight.data for name, weight in fit.tuned.items()})
    return numbers


@contextmanager
def _without_lock_in_the_end(folder: Path) -> Iterator[None]:
    """Removes the lock's file, however what is inside ends."""
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)


def _fitted(
    c: TrainRewardConfig, fit: Fit, data: Dataset[Any], held_out: Dataset[Any], log: Path
) -> dict[str, float]:
    """Trains, with a bar and a line of metrics an epoch, and returns the held-out numbers."""
    bar = Progress(
        TextColumn("epoch"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    log.unlink(missing_ok=True)  # of an attempt that was killed
    with room_for(log):
        log.write_text("", encoding="utf-8")
    with bar:
        task = bar.add_task("epoch", total=c.epochs, note="")

        def tell(line: dict[str, float]) -> None:
            with room_for(log), log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            note = "  ".join(f"{k} {v:.3f}" for k, v in line.items() if k != "epoch")
            bar.update(task, completed=int(line["epoch"]), note=note)

        return fit.run(
            data,
            held_out,
            epochs=c.epochs,
            lr=c.lr,
            batch_size=c.batch_size,
            weight_decay=c.weight_decay,
            device=device_of(c.device),
            tell=tell,
        )


def _look_again(c: TrainRewardConfig, folder: Path) -> None:
    """Raises a RunError if another process began another reward here, or finished this one, before this
    process had the lock."""
    problems = list(_taken(c, folder))
    if not problems and _finished(folder):
        problems = [f"{folder} was finished by another process while this one began; type the command again"]
    if problems:
        raise RunError("\n".join(problems))


def _finished(folder: Path) -> dict[str, float]:
    """The held-out numbers of a reward that is whole; none of another."""
    try:
        about = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
        return {key: float(value) for key, value in about.items() if key.startswith("held_out/")}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


@command("train_reward", schema=TrainRewardConfig, check=checked)
def main(cfg: DictConfig) -> float:
    """Hydra's task. Returns the held-out loss or error, for sweepers that minimise."""
    c = checked(cfg)
    at = HydraConfig.get()
    given = folder_of_job() if at.mode == RunMode.MULTIRUN else c.output_dir
    folder = Path(given) if given else fresh(f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-{c.kind}")
    refuse_links(folder, *PARTS)
    if taken := list(_taken(c, folder)):
        raise ConfigError("\n".join(taken))
    numbers = _finished(folder)
    if numbers:
        print(f"{folder} is finished; nothing to do")
    else:
        try:
            numbers = train_reward(c, folder)
        except (ValueError, RunError) as error:
            raise ConfigError(str(error)) from None
    for name, value in numbers.items():
        print(f"{name:>20}  {value:.4f}")
    print(f"reward={c.kind} {word('reward.' + c.kind + '.path', folder)}")
    return numbers["held_out/loss" if c.kind == "preference" else "held_out/error"]


if __name__ == "__main__":
    main()
