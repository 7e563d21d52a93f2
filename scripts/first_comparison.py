"""The first comparison: DRaFT, DRaFT+ at three coefficients, DDPO and RWR on a learned preference reward, three seeds each.
Trains, evaluates and reports; writes results/first_comparison.

    python scripts/first_comparison.py                     # make first-comparison; goes on where it was stopped
    python scripts/first_comparison.py --collect-only      # the page from the finished runs
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from alignlab.compare import read_runs, variants  # noqa: E402
from alignlab.outcomes import base_point, outcomes  # noqa: E402
from alignlab.report import interval_text  # noqa: E402

RESULTS = ROOT / "results" / "first_comparison"
SEEDS = (0, 1, 2)
VARIANTS = {
    "draft": ["algo=draft"],
    "draftp-0.03": ["algo=draftp", "kl_coeff=0.03"],
    "draftp-0.1": ["algo=draftp", "kl_coeff=0.1"],
    "draftp-0.3": ["algo=draftp", "kl_coeff=0.3"],
    "rwr": ["algo=rwr"],
    "ddpo": ["algo=ddpo"],
}


def one(name: str, seed: int, runs: Path) -> None:
    """Trains and evaluates one run with one thread, and keeps what it leaves but its weights."""
    source = runs / f"{name}-s{seed}"
    training = ["alignlab.train", "experiment=first_comparison", *VARIANTS[name], f"seed={seed}", f"output_dir={source}"]
    for words in (training, ["alignlab.evaluate", f"run={source}"]):
        print("python -m", " ".join(words), flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL)
    keep(source, RESULTS / "runs" / source.name)


def keep(source: Path, target: Path) -> None:
    """Configuration, metrics, summary and evaluation without any path of the machine; of the first seed the samples, at their size."""
    (target / "evaluation").mkdir(parents=True, exist_ok=True)
    config = yaml.safe_load((source / "config.yaml").read_text())
    (target / "config.yaml").write_text(yaml.safe_dump({**config, "output_dir": None}, sort_keys=False))
    for file in ("metrics.jsonl", *(f"evaluation/{n}{end}" for n in ("images", "base") for end in (".csv", "_diversity.json"))):
        shutil.copy(source / file, target / file)
    about = json.loads((source / "evaluation" / "evaluation.json").read_text())
    (target / "evaluation" / "evaluation.json").write_text(json.dumps({**about, "run": target.name}, indent=2) + "\n")
    for grid in sorted((source / "samples").glob("*.png")) if config["seed"] == SEEDS[0] else ():
        (target / "samples").mkdir(exist_ok=True)
        with Image.open(grid) as picture:
            picture.convert("RGB").resize((picture.width // 2, picture.height // 2)).save(
                target / "samples" / grid.name, optimize=True
            )
    shutil.copy(source / "summary.json", target / "summary.json")  # last: it says that the run is kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "first_comparison")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--collect-only", action="store_true")
    args = parser.parse_args()
    jobs = [(name, seed) for seed in SEEDS for name in VARIANTS]  # seeds outermost, so that a stopped comparison is balanced
    missing = [job for job in jobs if not (RESULTS / "runs" / "{}-s{}".format(*job) / "summary.json").is_file()]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda job: one(*job, args.runs), () if args.collect_only else missing))
    page()
    words = ["runs=results/first_comparison/runs/*", f"output_dir={RESULTS.relative_to(ROOT)}", "title='The first comparison'"]
    subprocess.run([sys.executable, "-m", "alignlab.report", *words], cwd=ROOT, check=True)
    chromium = shutil.which("chromium")
    if chromium is not None:
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--window-size=1240,3300",
            "--virtual-time-budget=8000",
        ]
        shot = [chromium, *flags, f"--screenshot={RESULTS / 'page.png'}", (RESULTS / "report.html").as_uri()]
        subprocess.run(shot, check=True, capture_output=True)


def page() -> None:
    """results/first_comparison/README.md: every variant with its intervals, and which seeds are still missing."""
    those = variants(read_runs([str(RESULTS / "runs" / "*")]))
    finished = sum(len(v.runs) for v in those)
    base = base_point(those)
    lines = [
        "# The first comparison", "", "    make first-comparison", "",
        f"{finished} of {len(SEEDS) * len(VARIANTS)} runs are finished and evaluated; the command goes on with the others. Each algorithm at its own",
        "defaults on the learned reward `emoji_preference` (log-odds), two runs at a time with one CPU thread each. After training, 45 prompts with",
        f"4 images each; diversity (lpips-emoji) and Vendi score on 8 prompts with 100 images each. Base model: reward {base[0]:.2f}, diversity {base[1]:.3f}.",
        "Intervals: 95 % hierarchical bootstrap over seeds, prompts and images; with one seed they say nothing of the spread between seeds.", "",
        "| variant | seeds | gain | win rate | gain, unseen | true_preference | clip | diversity | Vendi | distance to base | minutes | flags |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for o, variant in zip(outcomes(those), those, strict=True):
        held = o.held_out
        minutes = sum(run.summary["wall_seconds"] for run in variant.runs) / len(variant.runs) / 60
        cells = [
            o.label, str(o.seeds), interval_text(o.gain, ".2f"), interval_text(o.win_rate, ".2f"), interval_text(o.unseen_gain, ".2f"),
            interval_text(held.get("true_preference"), "+.2f"), interval_text(held.get("clip"), "+.2f"), interval_text(o.diversity),
            interval_text(o.vendi, ".2f"), f"{o.lpips_to_base or 0:.3f}", f"{minutes:.0f}", str(len(o.flags)),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "The page (`report.html`, made by the command):", "", "![the page](page.png)"]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
