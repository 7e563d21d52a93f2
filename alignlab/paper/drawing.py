"""What the papers' figures share: colours, curves, tables, and the runs' answers to probes (matplotlib).

A drawing function takes the finished runs by experiment and returns the figure and the rows of its table. It
draws what is finished; if that is too little for a drawing it raises a CompareError.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from alignlab.compare.charts import GREY
from alignlab.compare.finished import CompareError, Finished, Variant, matched_reward, refuse_unlike, variants
from alignlab.compare.run_files import Algorithm
from alignlab.metrics.pareto import at_matched_reward
from alignlab.metrics.statistics import Interval, over_seeds

Rows = list[dict[str, Any]]

Runs = dict[str, list[Finished]]
"""By experiment."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "alignlab",
    "text.parse_math": False,  # a unit or a name with $ in it is no formula
}
"""For matplotlib's rc_context."""

SHOWN_KL = 0.03
"""kl_coeff of the run in figure 5."""

MARKERS, LINES = "osD^vP*X", ("-", "--", "-.", ":")
"""Of curves that are told apart without their colours."""


def label(variant: Variant) -> str:
    """Short, for a legend."""
    settings, algo = variant.runs[0].settings, algorithm(variant)
    if algo.name not in ("DDPO", "RWR", "DRaFT", "OnlineDPO"):  # somebody's own
        return variant.label
    if algo.name == "OnlineDPO":
        return "DPO, offline" if algo.resample_every >= settings.steps else "DPO, online"
    if algo.name == "DDPO":
        few = "" if settings.noisy_steps is None else f", noise in {settings.noisy_steps} steps"
        return f"DDPO-{algo.estimator.upper()}{few}"
    if algo.name == "RWR":
        return "RWR" if algo.weighting == "dense" else "RWR-sparse"
    if algo.reward_cap is not None:
        return f"DRaFT, cap {algo.reward_cap:g}"
    if settings.kl_coeff:
        return f"DRaFT+ {'trajectory KL' if algo.kl == 'trajectory' else 'KL'} {settings.kl_coeff:g}"
    if algo.lv_samples:
        return "DRaFT-LV"
    if algo.detach_input:
        return f"DRTune, {algo.k} steps"
    if algo.truncation != "fixed":
        return "random K a rollout" if algo.truncation == "per_rollout" else "random steps"
    return f"DRaFT-{algo.k}"


def algorithm(variant: Variant) -> Algorithm:
    """With the arguments that its seeds share."""
    return variant.runs[0].settings.algorithm


def every(runs: Runs, *experiments: str) -> list[Variant]:
    """The variants of these experiments (all of them if none is named); all runs must be comparable.

    Raises:
        CompareError: if they are not, or there is none at all.
    """
    refuse_unlike([run for finished in runs.values() for run in finished] or nothing_to_draw())
    return variants([run for name in experiments or runs for run in runs.get(name, ())])


def nothing_to_draw() -> NoReturn:
    raise CompareError("none of the finished runs belongs into this figure; finish its experiments first")


def shades(compared: Sequence[Variant]) -> Iterator[Any]:
    """Colours of variants whose kl_coeff rises: from red (none) over yellow to blue."""
    yield from plt.get_cmap("turbo")(np.linspace(0.88, 0.12, max(2, len(compared))))


def by_kl(compared: Sequence[Variant]) -> list[Variant]:
    return sorted(compared, key=lambda v: v.runs[0].settings.kl_coeff)


def band(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], **style: Any) -> None:
    """The mean over seeds [seeds, points] with its standard error."""
    mean = y.mean(0)
    (line,) = axes.plot(x, mean, marker="o", markersize=2.5, **style)
    if len(y) > 1:
        error = y.std(0, ddof=1) / np.sqrt(len(y))
        axes.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.16, lw=0)


def passes(run: Finished) -> NDArray[np.float64]:
    """Through the denoiser, so far: a backward pass counts as two forward ones."""
    return np.array(run.curve("denoiser_forwards")) + 2 * np.array(run.curve("denoiser_backwards"))


def curve(axes: Axes, variant: Variant, x: str, y: str, **style: Any) -> None:
    """`y` over `x`: keys of the metrics, or "passes" in thousands."""
    along = (
        np.mean([passes(run) for run in variant.runs], 0) / 1e3
        if x == "passes"
        else variant.curves(x).mean(0)
    )
    band(axes, along, variant.curves(y), **{"label": label(variant), **style})


def plane(axes: Axes, variant: Variant, **style: Any) -> None:
    """The way through the plane of reward and diversity, means over seeds."""
    x, y = (variant.curves(f"eval/{key}").mean(0) for key in ("reward", "lpips"))
    axes.plot(x, y, marker="o", markersize=2.5, label=label(variant), **style)


def base_star(axes: Axes, compared: Sequence[Variant]) -> None:
    """The base model in the plane of reward and diversity."""
    x, y = (compared[0].runs[0].curve(f"eval/{key}")[0] for key in ("reward", "lpips"))
    axes.plot(x, y, "*", color=GREY, ms=12, label="base model")


def base_line(axes: Axes, compared: Sequence[Variant], key: str) -> None:
    axes.axhline(compared[0].runs[0].curve(key)[0], color=GREY, ls=":", lw=1.4, label="base model")


def unit(compared: Sequence[Variant]) -> tuple[str, str]:
    """Axis labels: the reward with its unit, the diversity with the distance that measured it."""
    run = compared[0].runs[0]
    name = " + ".join(run.settings.rewards)
    return f"{name} ({run.summary.reward_unit})", f"diversity ({run.summary.diversity_metric})"


def table(compared: Sequence[Variant], *levels: float) -> Rows:
    """What became of each variant: means over seeds with Student's 95 % interval. `matched` is the diversity
    where the curve first reaches `level`, a reward that all of them reached; "diversity at X" where it
    reaches that reward, for variants whose seeds all do."""
    level, matched = matched_reward(compared)
    reached = level > compared[0].runs[0].curve("eval/reward")[0]
    rows = []
    for v in compared:
        spreads = [run.summary.final.lpips for run in v.runs]
        trained, held_out = list(v.runs[0].settings.rewards), v.runs[0].settings.held_out
        numbers: dict[str, Interval] = {
            "gain": over_seeds(list(gains(v, "reward").values())),
            **{
                name: over_seeds(list(gains(v, name).values()))
                for name in (*(trained if len(trained) > 1 else ()), *held_out)
            },
            "diversity": over_seeds([run.curve("eval/lpips")[-1] for run in v.runs]),
        }
        if None not in spreads:
            numbers["diversity, all prompts"] = over_seeds([x for x in spreads if x is not None])
        if reached and len(matched[v.label]) == len(v.runs):
            numbers["matched"] = over_seeds(matched[v.label])
        for x in levels:
            reaching = [
                at_matched_reward(run.curve("eval/reward"), run.curve("eval/lpips"), x) for run in v.runs
            ]
            if None not in reaching:
                numbers[f"diversity at {x:g}"] = over_seeds([y for y in reaching if y is not None])
        rows.append(
            {
                "variant": label(v),
                "seeds": len(v.runs),
                "learns": learns(v),
                **numbers,
                "level": f"{level:.2f}" if reached else None,
                "reward queries": round(v.runs[0].curve("reward_queries")[-1]),
                "minutes": float(np.mean([run.summary.wall_seconds for run in v.runs])) / 60,
            }
        )
    return rows


def gains(variant: Variant, reward: str) -> dict[int, float]:
    """Of each seed, over the base model, on all prompts."""
    return {run.seed: run.summary.gain(reward) for run in variant.runs}


def learns(variant: Variant) -> str:
    """Whether it may be said to learn: a mean gain over seeds of at least 3 standard errors, and half a
    standard deviation of the base model's images."""
    values = list(gains(variant, "reward").values())
    if len(values) < 2:
        return "one seed"
    mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))
    return (
        "yes"
        if mean >= 3 * error and mean >= 0.5 * variant.runs[0].summary.base.numbers["reward_std"]
        else "no"
    )


def cost(variant: Variant) -> dict[str, float]:
    return {"passes (thousands)": float(np.mean([passes(run)[-1] for run in variant.runs])) / 1e3}


def answer(run: Finished, question: str) -> Any:
    """What its weights said (probes.py); None if they were not asked."""
    path = run.folder / "probes" / question / "answer.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        raise CompareError(
            f"{path} was damaged; remove it, and it is asked again where the weights are"
        ) from None
