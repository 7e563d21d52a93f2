"""Does a long run stay as large as it was? Memory and open files of a training process over its optimiser
steps.

    python scripts/endurance.py --work FOLDER --steps 2000

DRaFT-1 on the embedded model, two images an epoch, so an epoch is one optimiser step; evaluated and saved on
the way. Resident memory and open files are read from /proc (Linux) after every epoch. The growth is that of
the mean over the last tenth above the mean over the steps from 100 on, as long. Writes
results/reliability/endurance.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIZES = """algo=draft reward=brightness samples_per_step=2 micro_batch=2 sampler.steps=2 eval_sampler.steps=2
    eval_every=100 checkpoint_every=100 evaluation.prompts=2 evaluation.images=2 evaluation.final_images=1
    lr=1e-5 prompts.per_prompt=1""".split()
SETTLED = 100
"""Optimiser steps after which nothing may grow."""


def resident_mb(pid: int) -> float:
    """VmRSS of a process."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def watched(command: list[str], metrics: Path) -> list[tuple[int, float, int]]:
    """Runs a training to its end: (optimiser steps, resident MiB, open files) as lines of metrics appear.

    Raises:
        SystemExit: if it fails.
    """
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    seen: list[tuple[int, float, int]] = []
    while run.poll() is None:
        time.sleep(0.05)
        steps = metrics.read_bytes().count(b"\n") - 1 if metrics.is_file() else -1
        if steps > (seen[-1][0] if seen else 0):
            try:
                seen.append((steps, resident_mb(run.pid), len(os.listdir(f"/proc/{run.pid}/fd"))))
            except (OSError, StopIteration):
                break  # it has just ended
    if run.wait():
        raise SystemExit(f"the run failed with code {run.returncode}")
    return seen


def growth(seen: list[tuple[int, float, int]]) -> dict[str, float]:
    """Of what was seen after the first steps."""
    steps, memory, files = (
        np.array(column) for column in zip(*(s for s in seen if s[0] >= SETTLED), strict=True)
    )
    window = (steps[-1] - SETTLED) / 10
    early, late = steps <= SETTLED + window, steps >= steps[-1] - window
    return {
        "optimiser_steps": int(steps[-1]),
        "resident_mb_early": float(memory[early].mean()),
        "resident_mb_late": float(memory[late].mean()),
        "growth": float(memory[late].mean() / memory[early].mean() - 1),
        "open_files_early": int(np.median(files[early])),
        "open_files_late": int(np.median(files[late])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--work", type=Path, required=True, help="a folder that is not there yet, for the run"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "reliability")
    args = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "alignlab.train",
        *SIZES,
        f"steps={args.steps}",
        f"output_dir={args.work.resolve()}",
    ]
    seen = watched(command, args.work / "metrics.jsonl")
    args.results.mkdir(parents=True, exist_ok=True)
    about = growth(seen)
    (args.results / "endurance.json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about, indent=2))


if __name__ == "__main__":
    main()
