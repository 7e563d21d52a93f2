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
    words = ["runs=results/first_comparison/runs/*", f"output_dir={RESULTS.relative_to(ROOT)}", "title='The first comparison'"]
    subprocess.run([sys.executable, "-m", "alignlab.report", *words], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
