"""python -m alignlab.figure name=draftp_fig3

Makes a figure of the papers: runs the sweeps that it needs (finished runs are kept in results/runs and
skipped, a killed sweep goes on), asks their weights what it must know, draws it, and writes PNG, SVG (but of
pictures), table and page into results/paper/NAME. `quick=true` does the same with tiny runs of one seed, in
runs/quick, and stamps the figure. A file of yours in that folder stays as it is, and the page links to
verdict.md if you wrote one.
"""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from hydra.core.config_store import ConfigStore
from matplotlib import pyplot as plt
from omegaconf import DictConfig

from alignlab.compare.finished import CompareError, Finished, read_runs
from alignlab.compare.tables import interval_text, write_table
from alignlab.config.build import ConfigError, nearest
from alignlab.config.command import command
from alignlab.config.compose import CONF, plain
from alignlab.config.job_names import full_name, named, read_words
from alignlab.config.record import Keys, record
from alignlab.files.safe_folder import RunError, refuse_links
from alignlab.files.writing import all_aside, refuse_unwritable, room_for
from alignlab.metrics.statistics import Interval
from alignlab.paper.drawing import STYLE, Rows
from alignlab.paper.probes import probe
from alignlab.paper.registry import FIGURES, PaperFigure
from alignlab.rewards.compose import RewardError
from alignlab.runs.pasted import hydra_value, line


@dataclass
class FigureConfig(Keys):
    """The keys of conf/figure.yaml."""

    name: str = "all"
    """One of the figures, or all."""
    quick: bool = False
    """Tiny runs of one seed instead of results."""
    workers: int = 2
    """Runs at a time. [runs]"""
    draw_only: bool = False
    """Draw what is finished; run nothing."""
    home: str = "results"
    """Runs are kept in HOME/runs, figures in HOME/paper; runs/quick when quick."""
    allow_servers: list[str] | None = None
    """Addresses of reward servers that only a file names, and that images and prompts may be sent to."""


VERDICT = "verdict.md"
"""What people concluded from a figure; written by hand, beside it."""
UNNAMED = (
    "output_dir",
    "device",
    "tracker",
    *(f"tracking.{key}" for key in ("project", "name", "group", "tags")),
)
"""Words of a job that make it no other one (conf/train.yaml)."""
ConfigStore.instance().store(name="figure_schema", node=FigureConfig)


def checked(cfg: DictConfig) -> FigureConfig:
    """The configuration as a record.

    Raises:
        ConfigError: for a name that is no figure's.
    """
    c = record(FigureConfig, plain(cfg))
    if c.name not in ("all", *FIGURES):
        raise ConfigError(f"name={c.name} is no figure; {nearest(c.name, ['all', *FIGURES], 'name=')}")
    if c.workers < 1:
        raise ConfigError(f"workers={c.workers} must be at least 1")
    return c


def home(c: FigureConfig) -> Path:
    return Path("runs/quick" if c.quick else c.home)


def grid(experiment: str, quick: bool) -> list[str]:
    """The jobs of an experiment by all their words (`job_of`); quick leaves out all seeds but 0."""
    node = yaml.safe_load((CONF / "experiment" / "figure" / f"{experiment}.yaml").read_text())
    axes = {key: str(values).split(",") for key, values in node["hydra"]["sweeper"]["params"].items()}
    fixed = {"experiment": f"figure/{experiment}"}
    if quick:
        axes, fixed = {**axes, "seed": ["0"]}, {**fixed, "quick": "True"}
    points = [{**fixed, **dict(zip(axes, point, strict=True))} for point in product(*axes.values())]
    return [full_name(named([f"{key}={point[key]}" for key in point], UNNAMED)) for point in points]


def run_sweeps(experiments: Sequence[str], c: FigureConfig) -> list[str]:
    """Those that are not finished, `workers` runs at a time; what failed, a sentence each.

    Results: one sweep after another, its jobs side by side. Quick ones, whose jobs are shorter than a
    process's start: sweeps side by side, a process each.
    """
    folders = {experiment: home(c) / "runs" / experiment for experiment in experiments}
    unfinished = [
        e for e in experiments if not {*grid(e, c.quick)} <= {job_of(run) for run in summarised(folders[e])}
    ]
    sweeps, jobs = (c.workers, 1) if c.quick else (1, c.workers)
    with ThreadPoolExecutor(sweeps) as pool:
        codes = pool.map(lambda e: run_sweep(e, folders[e], jobs, c), unfinished)
        return [
            f"experiment=figure/{experiment} ended with code {code}; what it says stands above; type the "
            "command again to go on"
            for experiment, code in zip(unfinished, codes, strict=True)
            if code
        ]


def run_sweep(experiment: str, folder: Path, jobs: int, c: FigureConfig) -> int:
    """`python -m alignlab.train -m experiment=figure/...`, in processes of its own; its exit status."""
    overrides = [
        f"experiment=figure/{experiment}",
        f"output_dir={hydra_value(str(folder))}",
        *(["quick=true", "seed=0"] if c.quick else []),
    ]
    if jobs > 1:
        overrides += ["hydra/launcher=workers", f"hydra.launcher.n_jobs={jobs}"]
    print(line("train", "-m", *map(shlex.quote, overrides)), flush=True)
    threads = {"OMP_NUM_THREADS": "1"} if c.workers > 1 else {}
    return subprocess.run(
        [sys.executable, "-m", "alignlab.train", "-m", *overrides], env={**os.environ, **threads}, check=False
    ).returncode


def finished(folder: Path, names: Sequence[str]) -> list[Finished]:
    """Of a sweep's runs those that have a summary: the grid's, and more seeds of them."""
    points = {seedless(name) for name in names}
    folders = sorted(str(run) for run in summarised(folder) if seedless(job_of(run)) in points)
    return read_runs(folders) if folders else []


def summarised(sweep: Path) -> list[Path]:
    """The run folders of a sweep that have a summary."""
    return [path.parent for path in sweep.glob("*/summary.json")]


def job_of(run: Path) -> str:
    """A job by all its words, which stand in its folder or are the folder's name."""
    overrides = named(read_words(run), UNNAMED)
    return full_name(overrides) if overrides else run.name


def seedless(name: str) -> str:
    return re.sub(r"seed=\d+", "seed", name)


def make(name: str, figure: PaperFigure, c: FigureConfig) -> Path:
    """Asks the finished runs and draws; returns the figure's folder.

    Raises:
        CompareError: if there is too little to draw, or runs that cannot be compared.
    """
    runs = {
        experiment: finished(home(c) / "runs" / experiment, grid(experiment, c.quick))
        for experiment in figure.experiments
    }
    for ask in figure.probes:
        lost = [
            run
            for run in runs[ask.experiment]
            if ask.of(run.settings) and not probe(run.folder, ask.question)
        ]
        if lost:
            print(
                f"{name}: the weights of {lost[0].folder}{' and others' * (len(lost) > 1)} are gone, so "
                f"{ask.question} is without them"
            )
    if not any(runs.values()):
        raise CompareError(
            f"no run of {', '.join(figure.experiments)} is finished{'; leave out draw_only' * c.draw_only}"
        )
    folder = home(c) / "paper" / name
    with plt.rc_context(STYLE):
        drawn, rows = figure.draw({experiment: done for experiment, done in runs.items() if done})
        if c.quick:
            drawn.text(
                0.5,
                0.5,
                "quick",
                fontsize=64,
                color="#d1495b",
                alpha=0.25,
                ha="center",
                va="center",
                rotation=20,
            )
        with room_for(folder, "home"), all_aside(folder, last="README.md") as aside:
            drawn.savefig(aside / "figure.png", dpi=130)
            if not any(axes.images for axes in drawn.axes):
                drawn.savefig(aside / "figure.svg", metadata={"Date": None})
            write_table(aside / "table.csv", [spread_out(row) for row in rows])
            text = page(name, figure, runs, rows, c.quick, (folder / VERDICT).is_file())
            (aside / "README.md").write_text(text)
    plt.close(drawn)
    return folder


def spread_out(row: dict[str, Any]) -> dict[str, Any]:
    """Intervals as three columns."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Interval):
            ends = (
                (value.low, value.high) if np.isfinite(value.low) else (None, None)
            )  # one seed has no interval
            out |= {key: value.value, f"{key} low": ends[0], f"{key} high": ends[1]}
        else:
            out[key] = value
    return out


def page(
    name: str,
    figure: PaperFigure,
    runs: dict[str, list[Finished]],
    rows: Rows,
    quick: bool,
    verdict: bool,
) -> str:
    """README.md: the figure, its command, its sweeps and what they cost, and its table."""
    lines = [
        f"# {figure.title}",
        "",
        f"After {figure.source}." + f" What we conclude: [{VERDICT}]({VERDICT})." * verdict,
        "",
        f"    python -m alignlab.figure name={name}{' quick=true' if quick else ''}",
        "",
    ]
    for experiment, done in runs.items():
        minutes = sum(run.summary.wall_seconds for run in done) / 60
        seeds = ", ".join(map(str, sorted({run.seed for run in done}))) or "–"
        lines.append(
            f"- `python -m alignlab.train -m experiment=figure/{experiment}{' quick=true seed=0' * quick}`: "
            f"{len(done)} of {len(grid(experiment, quick))} runs finished, seeds {seeds}, {minutes:.0f} "
            "minutes of runs."
        )
    summaries = [run.summary for done in runs.values() for run in done]
    machines = {", ".join(f"{k} {v}" for k, v in summary.machine.items()) for summary in summaries}
    distances = ", ".join(sorted({summary.diversity_metric for summary in summaries}))
    measured = any(len(row) > 1 for row in rows)  # pictures have nothing but names
    lines += [
        "",
        wrapped(
            f"Made on: {'; '.join(sorted(machines))}. The cores were shared, so minutes and seconds are "
            "rough."
        ),
        "",
        wrapped(figure.note + f" Diversity and lpips: {distances}, pairwise within a prompt." * measured),
        "",
    ]
    lines += ["![figure](figure.png)", ""]
    if measured:
        heads = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        lines += [f"| {' | '.join(cell(row.get(head)) for head in heads)} |" for row in rows]
    return "\n".join(lines) + "\n"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def cell(value: Any) -> str:
    if isinstance(value, Interval):
        return interval_text(value)
    return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


@command("figure", schema=FigureConfig, check=checked)
def main(cfg: DictConfig) -> None:
    """Hydra's task."""
    c = checked(cfg)
    matplotlib.use("Agg")
    names = list(FIGURES) if c.name == "all" else [c.name]
    refuse_links(home(c), *(f"paper/{name}" for name in names))
    refuse_links(home(c), *(f"runs/{e}" for name in names for e in FIGURES[name].experiments), inside=False)
    try:
        for name in names:
            refuse_unwritable(home(c) / "paper" / name, "home", "figure.png", "table.csv", "README.md")
    except RunError as error:
        raise ConfigError(str(error)) from None
    failed: list[str] = []
    tried: set[str] = set()
    for batch in [names] if c.quick else [[name] for name in names]:
        if not c.draw_only:
            wanted = [
                e
                for e in dict.fromkeys(e for name in batch for e in FIGURES[name].experiments)
                if e not in tried
            ]
            failed += run_sweeps(wanted, c)
            tried |= set(wanted)
        for name in batch:
            try:
                print(f"written: {make(name, FIGURES[name], c) / 'figure.png'}", flush=True)
            except (CompareError, ConfigError, RunError, RewardError) as error:
                failed.append(f"name={name}: {error}")
    if failed:
        raise ConfigError("\n".join(failed))


if __name__ == "__main__":
    main()
