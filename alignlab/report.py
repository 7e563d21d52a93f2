"""python -m alignlab.report 'runs=multirun/DIR/*'

Puts finished runs side by side on one page that needs no network: curves, the Pareto plot, reward hacking in
units of the base model, the same pictures over training, tables of outcomes, contrasts and configurations.
The tables lie beside it as CSV.
"""

import base64
import io
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup
from omegaconf import DictConfig
from PIL import Image
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs

from alignlab.compare import charts as figures
from alignlab.compare.finished import (
    BUDGETS,
    CompareError,
    Finished,
    Variant,
    equal_budget,
    matched_reward,
    read_runs,
    refuse_unlike,
    variants,
)
from alignlab.compare.outcomes import PAIRED, base_point, contrasts, evaluated, outcomes
from alignlab.compare.tables import interval_text, write_table
from alignlab.config.build import ConfigError, not_texts
from alignlab.config.command import command
from alignlab.config.compose import plain
from alignlab.config.record import Keys, record
from alignlab.files.safe_folder import RunError, refuse_led_away, refuse_links
from alignlab.files.writing import all_aside, refuse_unwritable, room_for
from alignlab.metrics.pareto import hypervolume
from alignlab.runs.layout import numbered
from alignlab.runs.pasted import line, word

PAGE = "report.html"
TEMPLATES = Path(__file__).parent / "assets"
FILES = ("report.html", "variants.csv", "runs.csv")
PICTURE = 420
"""Largest side of a grid of samples in the page, in pixels."""
PICTURES = 600
"""Grids of samples in the page, at most: with many variants, fewer epochs of each."""
PIXELS = 2**27
"""Of a grid on the disk, at most."""


@dataclass
class ReportConfig(Keys):
    """The keys of conf/report.yaml."""

    runs: Any = None
    """Run folders, or patterns of them: one, or a list."""
    output_dir: str = "report"
    """Where report.html and the tables go."""
    title: str = "Comparison"
    """The page's heading."""


ConfigStore.instance().store(name="report_schema", node=ReportConfig)


def checked(cfg: DictConfig) -> ReportConfig:
    """The configuration as a record, `runs` a list.

    Raises:
        ConfigError: if no runs are named.
    """
    c = record(ReportConfig, plain(cfg))
    runs = [c.runs] if isinstance(c.runs, str) else c.runs
    if not runs:
        raise ConfigError("runs has no value; give run folders or a pattern: 'runs=multirun/DIR/*'")
    if not isinstance(runs, list) or not all(isinstance(run, str) for run in runs):
        of_others = not_texts("runs", runs) if isinstance(runs, list) else ""
        raise ConfigError(f"runs={runs} must be a folder or a pattern, or a list of them{of_others}")
    return replace(c, runs=runs)


def report(runs: Sequence[Finished], folder: Path, title: str) -> Path:
    """Writes report.html and its tables into `folder`, and returns the page's path.

    Raises:
        CompareError: if the runs cannot be compared.
    """
    refuse_unlike(runs)
    compared = variants(runs)
    alone = [run.folder for run in runs if run.summary.final.lpips is None or run.summary.base.lpips is None]
    if alone and not evaluated(compared):
        raise CompareError(
            f"{alone[0]} measured no diversity (evaluation.final_images=1); evaluate it first: "
            f"{line('evaluate', word('run', alone[0]))}"
        )
    results, first = outcomes(compared), runs[0]
    rows, palette = [run_row(v, run) for v in compared for run in v.runs], figures.colours(compared)
    unit, diversity = first.summary.reward_unit, first.summary.diversity_metric
    base = base_point(compared)
    points = {o.label: (o.reward, o.diversity) for o in results}
    level, _ = matched_reward(compared)
    drawn: dict[str, Figure] = {
        "learning": figures.learning(compared, unit, diversity),
        "trade_off": figures.trade_off(compared, unit, diversity),
        "pareto": figures.pareto(compared, points, base, (f"reward ({unit})", diversity)),
        "z_scores": figures.z_scores(compared),
    }
    nonce = secrets.token_urlsafe(
        16
    )  # without it no script of the page runs: not one that came in with a prompt, even unescaped
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(default=True, default_for_string=True),
    )
    env.filters["interval"] = interval_text
    page = env.get_template("report.html").render(
        title=title,
        nonce=nonce,
        plotly=Markup(get_plotlyjs()),
        first=first,
        compared=compared,
        outcomes=results,
        evaluated=evaluated(compared),
        unit=unit,
        diversity=diversity,
        figures={
            name: Markup(
                f.to_html(
                    full_html=False,
                    include_plotlyjs=False,
                    div_id=name,
                    config={"displayModeBar": False, "responsive": True},
                ).replace("<script", f'<script nonce="{nonce}"')
            )
            for name, f in drawn.items()
        },
        base=base,
        area=hypervolume([(r.value, d.value) for r, d in points.values()], (base[0], 0.0)),
        level=level,
        budget=equal_budget(compared, "samples_seen"),
        contrasts=contrasts(compared),
        strips=strips(compared),
        rows=rows,
        palette=palette,
        trained=list(results[0].trained),
        held_out=list(results[0].held_out),
        units=(first.evaluation or first.summary).units,
        listed=len(compared) <= figures.LEGEND,
        legend=figures.LEGEND,
        panels=min(len(compared), figures.PANELS),
        paired=PAIRED,
    )
    with room_for(folder), all_aside(folder, last=PAGE) as aside:
        metric = {"diversity metric": first.summary.diversity_metric}
        write_table(aside / "variants.csv", [flat(asdict(o)) | metric for o in results])
        write_table(aside / "runs.csv", rows)
        (aside / PAGE).write_text(page, encoding="utf-8")
    return folder / PAGE


def run_row(variant: Variant, run: Finished) -> dict[str, Any]:
    """One line of the table of runs: budgets, outcome, flags."""
    last = run.evaluations[-1]
    return {
        "variant": variant.label,
        "seed": run.seed,
        "folder": str(run.folder),
        **{name: last.get(key) for name, key in BUDGETS.items()},
        "reward, base": run.summary.base.reward,
        "reward, final": run.summary.final.reward,
        "diversity, base": run.summary.base.lpips,
        "diversity, final": run.summary.final.lpips,
        "diversity metric": run.summary.diversity_metric,
        "flags": len(run.flags),
    }


def strips(compared: Sequence[Variant]) -> list[dict[str, Any]]:
    """For each variant the grids of its first seed over training, as data URIs, the base model's first."""
    out, most = [], max(2, PICTURES // len(compared))
    for variant in compared:
        pictures = numbered(variant.runs[0].folder / "samples", "step", ".png")
        if len(pictures) > most:
            pictures = [pictures[round(k)] for k in np.linspace(0, len(pictures) - 1, most)]
        if pictures:
            out.append(
                {
                    "label": variant.label,
                    "seed": variant.runs[0].seed,
                    "steps": [int(p.stem.removeprefix("step_")) for p in pictures],
                    "images": [data_uri(p) for p in pictures],
                }
            )
    return out


def data_uri(path: Path) -> str:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if picture.width * picture.height > PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are more than {PIXELS}")
            small = picture.convert("RGB")
    except Exception as error:  # Pillow's readers fail in any way on what is broken
        raise CompareError(
            f"{path} is no picture ({' '.join(str(error).split())[:200]}); remove it"
        ) from None
    small.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    packed = io.BytesIO()
    small.save(packed, "WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}"


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of keys, for a table."""
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": "; ".join(value) if isinstance(value, tuple) else value}
        )
    return out


@command("report", schema=ReportConfig, check=checked)
def main(cfg: DictConfig) -> None:
    """Hydra's task."""
    c = checked(cfg)
    folder = Path(c.output_dir)
    refuse_led_away(folder)
    refuse_links(folder, ".new_*", *FILES)
    try:
        refuse_unwritable(folder, "output_dir", "variants.csv", "runs.csv", PAGE)
        page = report(read_runs(c.runs), folder, c.title)
    except (CompareError, RunError) as error:
        raise ConfigError(str(error)) from None
    print(f"written: {page}")


if __name__ == "__main__":
    main()
