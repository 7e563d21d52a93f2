"""A run beside other programs: how much of its speed is left, with what alignlab/fast/spinning.py sets and
without."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from alignlab.fast.spinning import CHOSEN, SHORT
from benchmarks.items import Item, Setting, Sides, alternated
from benchmarks.peer import OWN

ROOT = Path(__file__).resolve().parents[1]
LOADS = (0, 2, 8)
"""Busy processes of one thread each."""
WORDS = ("algo=draftp", "kl_coeff=0.25", "samples_per_step=8")
EPOCHS = 2
BUSY = "while True: pass"


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """That of a measured process: nothing is said of how threads wait, but for `more`."""
    kept = {name: value for name, value in os.environ.items() if name not in (*CHOSEN, "PYTHONPATH")}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(cores()), **more}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Inside, so many processes compute without end."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def speed(load: int, more: Mapping[str, str]) -> dict[str, float]:
    """Images a second of a run in a process of its own, beside `load` busy ones.

    Raises:
        RuntimeError: if it fails.
    """
    command = [sys.executable, str(OWN), "--epochs", str(EPOCHS), "--threads", str(cores()), *WORDS]
    with busy(load), tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(more),
            cwd=ROOT,
            check=False,
        )
        errors.seek(0)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if done.returncode or line is None:
            raise RuntimeError(f"{OWN.name} ended with code {done.returncode}: {errors.read()[-500:]}")
    said = json.loads(line.removeprefix("RESULT "))
    images = EPOCHS * int(dict(word.split("=", 1) for word in WORDS)["samples_per_step"])
    seconds = sum(said[f"{phase}_s"] for phase in ("rollout", "reward", "train"))
    return {"speed": images / seconds, "load": float(load), "cores": float(cores())}


def draftp(setting: Setting, number: int) -> Sides:
    """Every load with the setting and without."""
    settings: dict[str, Mapping[str, str]] = {"as shipped": SHORT, "spinning": {}}
    return alternated(
        {
            f"{name}, {load}": lambda load=load, more=more: speed(load, more)
            for load in LOADS
            for name, more in settings.items()
        },
        number,
    )


ITEMS = (Item(name="beside/draftp", measure=draftp, rounds=3),)
