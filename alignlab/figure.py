"""python -m alignlab.figure name=draftp_fig3

Makes a figure of the papers: runs the sweeps that it needs (finished runs are kept in results/runs and skipped, a killed sweep
goes on), asks their weights what it must know, draws it, and writes PNG, SVG (but of pictures), table and page into results/paper/NAME.
`quick=true` does the same with tiny runs of one seed, in runs/quick, and stamps the figure.
"""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from hydra.core.config_store import ConfigStore
from matplotlib import pyplot as plt
from omegaconf import DictConfig, OmegaConf

from alignlab.compare import CompareError, Finished, read_runs
from alignlab.config import CONF, command
from alignlab.metrics.statistics import Interval
from alignlab.nodes import ConfigError, nearest
from alignlab.paper import FIGURES, STYLE, PaperFigure, Rows
from alignlab.probes import probe
from alignlab.tables import interval_text, write_table


@dataclass
class FigureConfig:
    """The keys of conf/figure.yaml."""

    name: str = "all"
    """One of the figures, or all."""
    quick: bool = False
    """Tiny runs of one seed instead of results."""
    workers: int = 2
    """Runs at a time."""
    draw_only: bool = False
    """Draw what is finished; run nothing."""
    home: str = "results"
    """Runs are kept in HOME/runs, figures in HOME/paper; runs/quick when quick."""


ConfigStore.instance().store(name="figure_schema", node=FigureConfig)


def checked(cfg: DictConfig) -> dict[str, Any]:
    """The plain configuration.

    Raises:
        ConfigError: for a name that is no figure's.
    """
    c: Any = OmegaConf.to_container(cfg, resolve=True)
    if c["name"] not in ("all", *FIGURES):
        raise ConfigError(f"name={c['name']} is no figure; {nearest(c['name'], ['all', *FIGURES], 'name=')}")
    if c["workers"] < 1:
        raise ConfigError(f"workers={c['workers']} must be at least 1")
    return c


def swept(experiment: str) -> dict[str, str]:
    """The grid of an experiment: its keys and their values, comma-separated."""
    node = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text())
    return {key: str(values) for key, values in node["hydra"]["sweeper"]["params"].items()}


def run_sweep(experiment: str, folder: Path, c: dict[str, Any]) -> None:
    """`python -m alignlab.train -m experiment=...`, in processes of its own."""
    words = [f"experiment={experiment}", f"output_dir={folder}", *(["quick=true", "seed=0"] if c["quick"] else [])]
    if c["workers"] > 1:
        words += ["hydra/launcher=workers", f"hydra.launcher.n_jobs={c['workers']}"]
    print("python -m alignlab.train -m", *words, flush=True)
    threads = {"OMP_NUM_THREADS": "1"} if c["workers"] > 1 else {}
    done = subprocess.run([sys.executable, "-m", "alignlab.train", "-m", *words], env={**os.environ, **threads}, check=False)
    if done.returncode:
        raise ConfigError(
            f"experiment={experiment} ended with code {done.returncode}; what it says stands above; type the command again to go on"
        )


def finished(folder: Path) -> list[Finished]:
    """Of a sweep's runs those that have a summary."""
    folders = sorted(str(path.parent) for path in folder.glob("*/summary.json"))
    return read_runs(folders) if folders else []


def make(name: str, figure: PaperFigure, c: dict[str, Any]) -> Path:
    """Runs, asks and draws; returns the figure's folder."""
    home = Path("runs/quick" if c["quick"] else c["home"])
    runs = {experiment: finished(home / "runs" / experiment) for experiment in figure.experiments}
    for experiment, there in runs.items():
        jobs = prod(len(v.split(",")) for k, v in swept(experiment).items() if not (c["quick"] and k == "seed"))
        if len(there) < jobs and not c["draw_only"]:
            run_sweep(experiment, home / "runs" / experiment, c)
            runs[experiment] = finished(home / "runs" / experiment)
    for experiment, question in figure.probes.items():
        lost = [str(run.folder) for run in runs[experiment] if not probe(run.folder, question)]
        if lost:
            print(
                f"{name}: the weights of {len(lost)} runs of {experiment} are not at hand ({lost[0]}, …); they are left out of {question}"
            )
    if not any(runs.values()):
        raise ConfigError(f"name={name}: no run of {', '.join(figure.experiments)} is finished; leave out draw_only")
    folder = home / "paper" / name
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        drawn, rows = figure.draw({experiment: there for experiment, there in runs.items() if there})
        if c["quick"]:
            drawn.text(0.5, 0.5, "quick", fontsize=64, color="#d1495b", alpha=0.25, ha="center", va="center", rotation=20)
        drawn.savefig(folder / "figure.png", dpi=130)
        if not any(axes.images for axes in drawn.axes):
            drawn.savefig(folder / "figure.svg", metadata={"Date": None})
    plt.close(drawn)
    write_table(folder / "table.csv", [spread_out(row) for row in rows])
    (folder / "README.md").write_text(page(name, figure, runs, rows, c))
    return folder


def spread_out(row: dict[str, Any]) -> dict[str, Any]:
    """Intervals as three columns."""
    out: dict[str, Any] = {}
    for key, value in row.items():
        out |= (
            {key: value.value, f"{key} low": value.low, f"{key} high": value.high}
            if isinstance(value, Interval)
            else {key: value}
        )
    return out


def page(name: str, figure: PaperFigure, runs: dict[str, list[Finished]], rows: Rows, c: dict[str, Any]) -> str:
    """README.md: the figure, its command, what it cost and its table."""
    lines = [
        f"# {figure.title}",
        "",
        f"After {figure.source}.",
        "",
        f"    python -m alignlab.figure name={name}{' quick=true' if c['quick'] else ''}",
        "",
    ]
    for experiment, there in runs.items():
        jobs = prod(len(values.split(",")) for values in swept(experiment).values())
        minutes = sum(run.summary["wall_seconds"] for run in there) / 60
        seeds = sorted({run.seed for run in there})
        lines.append(
            f"- `{experiment}`: {len(there)} of {jobs} runs finished, seeds {', '.join(map(str, seeds)) or '–'}, {minutes:.0f} minutes in all."
        )
    machine = next(run.summary["machine"] for there in runs.values() for run in there)
    about = ", ".join(str(v) for v in machine.values()) if isinstance(machine, dict) else str(machine)
    lines += [
        "",
        f"Machine: {about or platform.machine()}; {c['workers']} runs at a time. Intervals: 95 %, over seeds.",
        "",
        "![figure](figure.png)",
        "",
    ]
    if rows:
        heads = list(dict.fromkeys(key for row in rows for key in row))
        lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        lines += [f"| {' | '.join(cell(row.get(head)) for head in heads)} |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    if isinstance(value, Interval):
        return interval_text(value)
    return "–" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


@command("figure", schema=FigureConfig, check=checked)
def main(cfg: DictConfig) -> None:
    """Hydra's task."""
    c = checked(cfg)
    matplotlib.use("Agg")
    for name, figure in FIGURES.items():
        if c["name"] in ("all", name):
            try:
                print(f"written: {make(name, figure, c) / 'figure.png'}", flush=True)
            except CompareError as error:
                raise ConfigError(f"name={name}: {error}") from None


if __name__ == "__main__":
    main()
