"""Which runs lie in a folder, and how far each has come, told by its files alone.

Nothing is written and no lock is taken. The folder may be large, damaged or somebody else's: only regular
files are read, of each a bounded part, and what cannot be read is left out of the row.

    running     a process holds the run's lock
    finished    there is a summary.json
    stopped     all that it did is saved: it was asked to end, and can go on
    failed      it ended without saving its last epochs: an error, kill -9, a full disk
"""

import fcntl
import json
import math
import os
import re
import stat
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from alignlab.files.bounded_yaml import read_yaml
from alignlab.files.safe_folder import LOCK
from alignlab.runs.layout import METRICS

HOMES = ("runs", "multirun")
"""Where runs and sweeps go that are given no folder."""
DEEP = 4
"""Folders below the one that is listed in which runs are looked for."""
MOST_FOLDERS = 20_000
"""Folders that are looked at."""
HEAD, TAIL = 2**17, 2**16
"""Bytes that are read of config.yaml's beginning and of metrics.jsonl's end."""
SWEEP_FILE = "multirun.yaml"


@dataclass(frozen=True)
class Listed:
    """One run folder."""

    folder: Path
    state: str
    wrote: float
    """When it last wrote, in seconds since 1970."""
    algorithm: str = ""
    reward: str = ""
    """The names of the rewards that it is trained on."""
    step: int | None = None
    steps: int | None = None
    base: float | None = None
    """The reward of the base model, in the evaluations that `last` is of."""
    last: float | None = None
    """The reward of the last evaluation; of a finished run that of all training prompts."""
    eta: float | None = None
    """Seconds that the epochs left will take at the pace of the last ones, without evaluations."""


@dataclass
class Sweep:
    """A folder that holds runs, and is none."""

    folder: Path
    runs: list[Listed] = field(default_factory=list)
    jobs: int | None = None
    """How many jobs its command line has; None where that cannot be told."""
    left_out: int = 0
    """Runs beyond those that were asked for."""

    @property
    def finished(self) -> int:
        return sum(run.state == "finished" for run in self.runs)


def sweeps(home: Path, most: int | None = None) -> list[Sweep]:
    """The runs in a folder, by the folder that each lies in, the newest last.

    Args:
        home: a folder with runs, or a run.
        most: runs of each folder that are read, the newest; None reads all.
    """
    found: dict[Path, list[Path]] = {}
    for run in run_folders_below(home):
        found.setdefault(run.parent, []).append(run)
    out = []
    for above, folders in found.items():
        folders.sort(key=wrote)
        kept = folders if most is None else folders[-most:]
        runs = sorted((listed(folder) for folder in kept), key=lambda run: run.wrote)
        out.append(Sweep(above, runs, _jobs(above), len(folders) - len(kept)))
    return sorted(out, key=lambda sweep: max(run.wrote for run in sweep.runs))


def run_folders_below(home: Path) -> Iterator[Path]:
    """The run folders in a folder, itself included, down to a bounded depth. A run's own folders are not
    looked into."""
    waiting = [(home, 0)]
    looked = 0
    while waiting and looked < MOST_FOLDERS:
        folder, depth = waiting.pop()
        looked += 1
        if is_regular(folder / "config.yaml"):
            yield folder
        elif depth < DEEP:
            try:
                with os.scandir(folder) as entries:
                    inside = [Path(entry.path) for entry in entries if _is_folder(entry)]
            except (OSError, ValueError):
                continue
            waiting += [(path, depth + 1) for path in sorted(inside, reverse=True)]


def listed(folder: Path) -> Listed:
    """What the files of a run folder say of it."""
    config, lines = _head(folder / "config.yaml"), _last_lines(folder / METRICS)
    step = next((line["step"] for line in reversed(lines) if _is_whole(line.get("step"))), None)
    state = _state(folder, step)
    steps = _number_of(config, "steps")
    evaluated = [line["eval/reward"] for line in lines if _is_number(line.get("eval/reward"))]
    first = _first_line(folder / METRICS).get("eval/reward")
    base, last = (first if _is_number(first) else None), (evaluated or [None])[-1]
    if state == "finished":
        summary = _object(_read(folder / "summary.json", 2**20))
        ends = [summary.get(end, {}) for end in ("base", "final")]
        rewards = [end.get("reward") if isinstance(end, dict) else None for end in ends]
        if all(_is_number(reward) for reward in rewards):
            base, last = rewards
    return Listed(
        folder=folder,
        state=state,
        wrote=wrote(folder),
        algorithm=_algorithm(config),
        reward=", ".join(_rewards(config)),
        step=step,
        steps=steps,
        base=base,
        last=last,
        eta=_eta(lines, step, steps) if state == "running" else None,
    )


def is_regular(path: Path) -> bool:
    """Whether it is a file, and no pipe or device; a link to one counts."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def is_held(lock: Path) -> bool:
    """Whether another process holds a lock (safe_folder.locked). The lock is asked for, not taken."""
    if not is_regular(lock):
        return False
    # struct flock, as fcntl(2) has it: a lock on the whole file, for writing
    whole = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    mac = sys.platform == "darwin"
    layout = "qqihh" if mac else "hhqqi4x"
    asked = struct.pack(layout, 0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET) if mac else struct.pack(layout, *whole)
    try:
        with open(os.open(lock, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            told = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError:
        return False
    kind: int = told[3] if mac else told[0]
    return kind != fcntl.F_UNLCK


def _state(folder: Path, step: int | None) -> str:
    if is_regular(folder / "summary.json"):
        return "finished"
    if is_held(folder / LOCK):
        return "running"
    saved = _newest_checkpoint(folder / "checkpoints")
    return "stopped" if saved is not None and saved == step else "failed"


def _newest_checkpoint(home: Path) -> int | None:
    """The epoch of the newest checkpoint."""
    try:
        names = os.listdir(home)
    except OSError:
        return None
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"step_([0-9]{6,18})", name))]
    return max(steps, default=None)


def _eta(lines: list[dict[str, Any]], step: int | None, steps: int | None) -> float | None:
    seconds = [line["seconds"] for line in lines if _is_number(line.get("seconds"))]
    if not seconds or step is None or steps is None:
        return None
    return max(0, steps - step) * median(seconds[-20:])


def wrote(folder: Path) -> float:
    """When a run, or a folder of candidates, last wrote, by the files that it writes all along."""
    times = [0.0]
    for name in ("config.yaml", METRICS, "summary.json", "make_pairs.yaml"):
        try:
            times.append((folder / name).stat().st_mtime)
        except (OSError, ValueError):
            continue
    return min(max(times), time.time())  # a clock may be wrong


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir() and not entry.name.startswith(".")
    except OSError:
        return False


# -- config.yaml, which a run writes as plain blocks: its lines say what is needed, a hundred times faster
# than a reader of YAML, and whatever else a file holds


def _block(config: str, key: str) -> str:
    """The lines under a key at the top."""
    match = re.search(rf"^{key}:[ \t]*\n((?:[ \t]+.*\n?)*)", config, re.MULTILINE)
    return match[1] if match else ""


def _number_of(config: str, key: str) -> int | None:
    match = re.search(rf"^{key}: ([0-9]{{1,12}})$", config, re.MULTILINE)
    return int(match[1]) if match else None


def _algorithm(config: str) -> str:
    """The algorithm's class; DRaFT with a penalty is DRaFT+."""
    match = re.search(r"^  _target_: *([\w.]+)$", _block(config, "algo"), re.MULTILINE)
    name = match[1].rpartition(".")[2] if match else ""
    penalty = re.search(r"^kl_coeff: (.+)$", config, re.MULTILINE)
    none = penalty is None or re.fullmatch(r"0(\.0*)?", penalty[1].strip())
    return "DRaFT+" if name == "DRaFT" and not none else name


def _rewards(config: str) -> list[str]:
    return re.findall(r"^  ([^\s:#]+):[ \t]*$", _block(config, "reward"), re.MULTILINE)


def _jobs(folder: Path) -> int | None:
    """How many jobs the command line of a sweep has, from Hydra's multirun.yaml: the product of the numbers
    of values. None where there is no such file, and for ranges and other functions of Hydra's."""
    hydra = _block(_head(folder / SWEEP_FILE), "hydra")
    words = _part(hydra, "overrides", "task")
    if not isinstance(words, list) or not words:
        return None
    given = _part(hydra, "sweeper", "params")
    typed = {str(word).partition("=")[0] for word in words}
    of_file = given.items() if isinstance(given, dict) else ()
    words = [*words, *(f"{key}={value}" for key, value in of_file if key not in typed)]
    jobs = 1
    for word in map(str, words):
        value = word.partition("=")[2]
        if re.match(r"(range|choice|glob|interval|sort|shuffle|tag)\(", value):
            return None
        jobs *= _values(value)
    return jobs


def _part(hydra: str, above: str, key: str) -> Any:
    """A key of one of the tables in Hydra's, read as YAML alone."""
    table = re.search(rf"^  {above}:\n((?:   .*\n?)*)", hydra, re.MULTILINE)
    part = (
        re.search(rf"^    {key}:((?:.*\n?)(?:     .*\n?|    - .*\n?)*)", table[1], re.MULTILINE)
        if table
        else None
    )
    try:
        read = read_yaml(part[0]) if part else None
    except (ValueError, RecursionError, yaml.YAMLError):
        return None
    return read.get(key) if isinstance(read, dict) else None


def _values(text: str) -> int:
    """How many values stand between commas, outside of brackets and quotes."""
    plain = re.sub(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", "", text)
    while (less := re.sub(r"\[[^][]*\]|\{[^{}]*\}|\([^()]*\)", "", plain)) != plain:
        plain = less
    return plain.count(",") + 1


# -- files


def _read(path: Path, most: int, *, end: bool = False) -> bytes:
    """The first bytes of a regular file, or the last ones; nothing of any other."""
    if not is_regular(path):
        return b""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if end:
                file.seek(max(0, os.fstat(file.fileno()).st_size - most))
            return file.read(most)
    except (OSError, ValueError):
        return b""


def _head(path: Path) -> str:
    return _read(path, HEAD).decode("utf-8", "replace")


def _first_line(path: Path) -> dict[str, Any]:
    return _object(_read(path, TAIL).partition(b"\n")[0])


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines at the end of metrics.jsonl."""
    text = _read(path, TAIL, end=True)
    return [line for part in text.split(b"\n")[:-1] if (line := _object(part))]


def _object(text: bytes) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
