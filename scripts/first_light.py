"""Does every algorithm learn? Runs each on the embedded model with three seeds and writes results/first_light.

    python scripts/first_light.py                     # make first-light; goes on where it was stopped
    python scripts/first_light.py --collect-only      # table and figure from the finished runs

A claim counts if the mean gain over the seeds is at least 3 standard errors and at least half a standard deviation of
the base model's reward, on prompts' noise that training never used.
"""

import argparse
import csv
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "first_light"
SEEDS = (0, 1, 2)
ALGORITHMS = {
    "rwr": ["algo=rwr"],
    "ddpo_sf": ["algo=ddpo", "algo.estimator=sf"],
    "ddpo_is": ["algo=ddpo", "algo.estimator=is"],
    "draft": ["algo=draft"],
    "draftp": ["algo=draftp", "kl_coeff=0.25"],
}
COLOURS = {"rwr": "#8c6bb1", "ddpo_sf": "#4292c6", "ddpo_is": "#08519c", "draft": "#fd8d3c", "draftp": "#d94801"}
UNITS = {"jpeg_compressibility": "-kB (JPEG, quality 95)", "clip_blue": "100 x cosine (image, prompt on a blue background)"}
CLAIMS = [("jpeg_compressibility", name) for name in ("rwr", "ddpo_sf", "ddpo_is")] + [("clip_blue", name) for name in ALGORITHMS]


def overrides(reward: str, name: str) -> list[str]:
    return [*ALGORITHMS[name], f"reward={reward}", "experiment=first_light"]


def label(reward: str, name: str, seed: int) -> str:
    return f"{reward}-{name}-s{seed}"


def kept(reward: str, name: str, seed: int) -> Path:
    """A finished run's configuration, metrics and summary: committed, so that the study goes on elsewhere."""
    return RESULTS / "runs" / label(reward, name, seed)


def run_all(runs: Path, workers: int) -> None:
    """Runs what is missing, `workers` at a time with one thread each; seeds outermost, so that a stopped study is balanced."""

    def one(job: tuple[int, str, str]) -> None:
        seed, reward, name = job
        target = runs / label(reward, name, seed)
        command = [sys.executable, "-m", "alignlab.train", *overrides(reward, name), f"seed={seed}", f"output_dir={target}"]
        print(" ".join(command[1:]), flush=True)
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        keep(runs)

    jobs = [(seed, reward, name) for seed in SEEDS for reward, name in CLAIMS]
    missing = [(s, r, n) for s, r, n in jobs if not (kept(r, n, s) / "summary.json").is_file()]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, missing))


def keep(runs: Path) -> None:
    """Copies what finished runs leave into results/, without any path of the machine."""
    for reward, name in CLAIMS:
        for seed in SEEDS:
            source, target = runs / label(reward, name, seed), kept(reward, name, seed)
            if (source / "summary.json").is_file():
                target.mkdir(parents=True, exist_ok=True)
                for file in ("metrics.jsonl", "summary.json"):
                    shutil.copy(source / file, target / file)
                config = yaml.safe_load((source / "config.yaml").read_text())
                (target / "config.yaml").write_text(yaml.safe_dump({**config, "output_dir": None}, sort_keys=False))


def gather() -> list[dict[str, Any]]:
    """One row a claim, from the kept runs' summaries."""
    rows = []
    for reward, name in CLAIMS:
        found = [kept(reward, name, s) for s in SEEDS if (kept(reward, name, s) / "summary.json").is_file()]
        if not found:
            continue
        summaries = [json.loads((f / "summary.json").read_text()) for f in found]
        gains = [s["final"]["reward"] - s["base"]["reward"] for s in summaries]
        mean, error = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        base_std = statistics.mean(s["base"]["reward_std"] for s in summaries)
        rows.append(
            {
                "reward": reward,
                "algorithm": name,
                "seeds": len(found),
                "base": statistics.mean(s["base"]["reward"] for s in summaries),
                "base_std": base_std,
                "final": statistics.mean(s["final"]["reward"] for s in summaries),
                "gain": mean,
                "standard_error": error,
                "gain_over_se": mean / error,
                "gain_over_base_std": mean / base_std,
                "lpips_base": statistics.mean(s["base"]["lpips"] for s in summaries),
                "lpips_final": statistics.mean(s["final"]["lpips"] for s in summaries),
                "images": summaries[0]["samples_seen"],
                "minutes": statistics.mean(s["wall_seconds"] for s in summaries) / 60,
                "holds": len(found) == len(SEEDS) and mean >= 3 * error and mean >= 0.5 * base_std,
            }
        )
    return rows


def collect(runs: Path) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    keep(runs)
    rows = gather()
    with (RESULTS / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    figure(rows)
    page(rows)


def figure(rows: list[dict[str, Any]]) -> None:
    """Reward at evaluations (8 prompts, fixed noise) against images sampled: mean over seeds, with their range."""
    axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)[1]
    for axis, reward in zip(axes, UNITS, strict=True):
        for claimed, name in CLAIMS:
            if claimed != reward:
                continue
            points: dict[int, list[float]] = {}  # rewards of the seeds by images sampled
            for seed in SEEDS:
                path = kept(reward, name, seed) / "metrics.jsonl"
                for line in map(json.loads, path.read_text().splitlines() if path.is_file() else ()):
                    if "eval/reward" in line:
                        points.setdefault(line["samples_seen"], []).append(line["eval/reward"])
            x = sorted(points)
            low, mean, high = ([f(points[k]) for k in x] for f in (min, statistics.mean, max))
            axis.plot(x, mean, "o-", ms=3, color=COLOURS[name], label=name)
            axis.fill_between(x, low, high, color=COLOURS[name], alpha=0.18, lw=0)
        axis.set(title=reward, xlabel="images sampled in training", ylabel=UNITS[reward])
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    plt.savefig(RESULTS / "curves.png", dpi=130)
    plt.close()


def page(rows: list[dict[str, Any]]) -> None:
    lines = [
        "# First light: does every algorithm learn on the embedded model?", "",
        "    make first-light", "",
        f"Made on {platform.machine()}, 2 CPU cores, no GPU, two runs at a time with one thread each, seeds {', '.join(map(str, SEEDS))}. Every number is measured on the 45 training prompts with",
        "noise that training never used (stream `final`, the same for the base model and every run). `gain` is the mean over",
        "seeds ± its standard error; a claim holds if it is ≥ 3 standard errors and ≥ 0.5 standard deviations of the base",
        "model's reward over images. LPIPS is the world's own perceptual distance (`lpips-emoji`), within prompts.",
        "The runs' configurations, metrics and summaries are in `runs/`.", "", "![curves](curves.png)", "",
        "| reward | algorithm | seeds | base | final | gain | gain / SE | gain / base sd | LPIPS base → final | images | minutes a run | holds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        many = r["seeds"] > 1
        gain = f"{r['gain']:.3f} ± {r['standard_error']:.3f}" if many else f"{r['gain']:.3f}"
        ratio = f"{r['gain_over_se']:.1f}" if many else "-"
        lines.append(
            f"| {r['reward']} | {r['algorithm']} | {r['seeds']} | {r['base']:.3f} | {r['final']:.3f} | {gain} | "
            f"{ratio} | {r['gain_over_base_std']:.2f} | {r['lpips_base']:.3f} → {r['lpips_final']:.3f} | {r['images']} | "
            f"{r['minutes']:.1f} | {'yes' if r['holds'] else '**no**' if r['seeds'] == len(SEEDS) else 'seeds missing'} |"
        )
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "first_light")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--collect-only", action="store_true")
    args = parser.parse_args()
    if not args.collect_only:
        run_all(args.runs, args.workers)
    collect(args.runs)


if __name__ == "__main__":
    main()
