"""Reward hacking, measured: trains on the learned preference model while its hidden rule watches. Writes
results/reward_hacking.

python scripts/reward_hacking.py                  # make reward-hacking
python scripts/reward_hacking.py --collect-only   # figure and page from the finished runs
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from alignlab.compare.finished import read_runs  # noqa: E402

RESULTS = ROOT / "results" / "reward_hacking"
RUNS = {"draft": ["algo=draft", "lr=6e-3"]}
COMMON = [
    "reward=emoji_preference",
    "eval_rewards=true_preference",
    "steps=60",
    "eval_every=10",
    "evaluation.images=4",
    "evaluation.final_images=2",
]
LABELS = {"draft": "DRaFT-1, no penalty, lr 6e-3"}
COLOURS = {"draft": "#d94801"}


def run(name: str, runs: Path) -> None:
    command = [sys.executable, "-m", "alignlab.train", *RUNS[name], *COMMON, f"output_dir={runs / name}"]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(
        command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )


def collect(runs: Path) -> None:
    """Copies what the runs left, draws both rewards over the epochs and writes the page."""
    rows, axes = [], plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)[1]
    for name in RUNS:
        kept, source = RESULTS / "runs" / name, runs / name
        if (source / "summary.json").is_file():
            kept.mkdir(parents=True, exist_ok=True)
            for file in ("metrics.jsonl", "summary.json"):
                (kept / file).write_text((source / file).read_text())
            config = yaml.safe_load((source / "config.yaml").read_text())
            (kept / "config.yaml").write_text(yaml.safe_dump({**config, "output_dir": None}, sort_keys=False))
            grids = sorted((source / "samples").glob("*.png"))
            for when, grid in (("before", grids[0]), ("after", grids[-1])):
                Image.open(grid).convert("RGB").save(RESULTS / f"{name}_{when}.png", optimize=True)
        lines = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "eval/reward" in line]
        x = [line["step"] for line in lines]
        for axis, key in zip(axes, ("eval/reward", "eval/true_preference"), strict=True):
            axis.plot(x, [line[key] for line in lines], "o-", ms=3, color=COLOURS[name], label=LABELS[name])
        rows.append((name, json.loads((kept / "summary.json").read_text())))
    for axis, title, unit in zip(
        axes,
        ("learned: emoji_preference", "its hidden rule: true_preference"),
        ("log-odds", "points of 5"),
        strict=True,
    ):
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    plt.savefig(RESULTS / "curves.png", dpi=130)
    page(rows)


def flags() -> list[str]:
    """What the watchdog of `alignlab.report` says of the runs."""
    return [
        f"- {LABELS[run.folder.name]}: {flag}."
        for run in read_runs([str(RESULTS / "runs" / "*")])
        for flag in run.flags
    ]


def page(rows: list[tuple[str, dict[str, Any]]]) -> None:
    lines = [
        "# Reward hacking, measured",
        "",
        "    make reward-hacking",
        "",
        "DRaFT-1 without a penalty and at three times its usual step, 60 epochs of 16 images, seed 0, "
        "follows the learned preference model",
        "`emoji_preference`; its hidden rule `true_preference` (right animal, large, centred, contrasting "
        "background) only watches. The curves",
        "are measured on eight prompts with four images each, the table on all 45 prompts with two others "
        "each; LPIPS is lpips-emoji.",
        "",
        *flags(),
        "",
        "So on those eight prompts the learned reward goes on rising while the rule, having risen at first, "
        "falls below the base model; over",
        "all 45 prompts it has gained nothing in the end (table).",
        "",
        "![curves](curves.png)",
        "",
        "| run | learned reward, base → final | true reward, base → final | LPIPS, base → final |",
        "|---|---|---|---|",
    ]
    for name, summary in rows:
        cells = [
            f"{summary['base'][k]:.2f} → {summary['final'][k]:.2f}"
            for k in ("reward", "true_preference", "lpips")
        ]
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    for name in RUNS:
        lines += [
            "",
            f"{LABELS[name]}, before (left) and after:",
            "",
            f"![before]({name}_before.png) ![after]({name}_after.png)",
        ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "reward_hacking")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--collect-only", action="store_true")
    args = parser.parse_args()
    if not args.collect_only:
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda name: run(name, args.runs), RUNS))
    collect(args.runs)


if __name__ == "__main__":
    main()
