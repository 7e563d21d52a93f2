"""The algorithms compared on a learned preference reward, three seeds each: DRaFT, DRaFT+, DDPO, RWR,
Diffusion-DPO offline and online. Trains, evaluates and reports; writes results/comparison. The runs are those
of the figure `preferences`, in results/runs.

    python scripts/comparison.py                     # make comparison; goes on where it was stopped
    python scripts/comparison.py --report-only       # the page from the evaluated runs
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from alignlab.compare.finished import Finished, read_runs, variants  # noqa: E402
from alignlab.compare.outcomes import base_point, outcomes  # noqa: E402
from alignlab.compare.tables import interval_text  # noqa: E402
from alignlab.paper.drawing import label  # noqa: E402

RESULTS = Path("results/comparison")
KL = (0.0, 0.03)
SWEEPS = {
    "draftp_fig3": [f"kl_coeff={','.join(f'{kl:g}' for kl in KL)}"],
    **{
        name: []
        for name in ("ddpo_preference", "rwr_preference", "dpo_offline_preference", "dpo_online_preference")
    },
}
SEEDS = 3


def python(*words: str) -> None:
    print("python -m", *words, flush=True)
    subprocess.run(
        [sys.executable, "-m", *words],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )


def finished() -> list[Finished]:
    """The runs of the comparison that are trained, DRaFT first."""
    folders = [
        str(path.parent)
        for sweep in SWEEPS
        for path in sorted(Path("results/runs", sweep).glob("*/summary.json"))
    ]
    return [run for run in (read_runs(folders) if folders else []) if run.settings.kl_coeff in KL]


def page(runs: Sequence[Finished]) -> None:
    """results/comparison/README.md: every variant with its intervals, and how many seeds are there."""
    those = variants(runs)
    base = base_point(those)
    lines = [
        "# The algorithms compared",
        "",
        "    make comparison",
        "",
        f"{len(runs)} of {(len(KL) + len(SWEEPS) - 1) * SEEDS} runs are trained and evaluated. On the "
        "learned reward `emoji_preference`",
        "(log-odds), two runs at a time with one CPU thread each. After training, 45 prompts with 4 images "
        "each; diversity (lpips-emoji) and Vendi",
        f"score on 8 prompts with 100 images each. Base model: reward {base[0]:.2f}, diversity "
        f"{base[1]:.3f}. Intervals: 95 % hierarchical bootstrap over",
        "seeds, prompts and images. The minutes are of shared machines: compare them with care.",
        "",
        "| variant | seeds | gain | win rate | gain, unseen | true_preference | clip | diversity | Vendi | "
        "distance to base | minutes | flags |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for o, variant in zip(outcomes(those), those, strict=True):
        held = o.held_out
        minutes = sum(run.summary.wall_seconds for run in variant.runs) / len(variant.runs) / 60
        cells = [
            label(variant),
            str(o.seeds),
            interval_text(o.gain, ".2f"),
            interval_text(o.win_rate, ".2f"),
            interval_text(o.unseen_gain, ".2f"),
            interval_text(held.get("true_preference"), "+.2f"),
            interval_text(held.get("clip"), "+.2f"),
            interval_text(o.diversity),
            interval_text(o.vendi, ".2f"),
            f"{o.lpips_to_base or 0:.3f}",
            f"{minutes:.0f}",
            str(len(o.flags)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "The page (`report.html`, made by the command):", "", "![the page](page.png)"]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    os.chdir(ROOT)
    if not args.report_only:
        for sweep, more in SWEEPS.items():
            launcher = (
                ["hydra/launcher=workers", f"hydra.launcher.n_jobs={args.workers}"]
                if args.workers > 1
                else []
            )
            python("alignlab.train", "-m", f"experiment=figure/{sweep}", *more, *launcher)
        waiting = [run.folder for run in finished() if not run.evaluation]
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda folder: python("alignlab.evaluate", f"run={str(folder)!r}"), waiting))
    runs = [run for run in finished() if run.evaluation]
    RESULTS.mkdir(exist_ok=True)
    page(runs)
    folders = ",".join(f"'{run.folder}'" for run in runs)
    python("alignlab.report", f"runs=[{folders}]", f"output_dir={RESULTS}", "title='The algorithms compared'")
    chromium = shutil.which("chromium")
    if chromium is not None:
        flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1240,3300".split()
        flags += ["--virtual-time-budget=8000"]
        shot = [
            chromium,
            *flags,
            f"--screenshot={RESULTS / 'page.png'}",
            (ROOT / RESULTS / "report.html").as_uri(),
        ]
        subprocess.run(shot, check=True, capture_output=True)


if __name__ == "__main__":
    main()
