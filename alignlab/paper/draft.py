"""The figures of DRaFT (arXiv 2309.17400): which steps keep their gradient, speed, and over-optimisation."""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from alignlab.compare.charts import COLOURS, GREY
from alignlab.metrics.hacking import z_curves
from alignlab.metrics.statistics import over_seeds
from alignlab.paper.drawing import (
    Rows,
    Runs,
    algorithm,
    band,
    base_line,
    base_star,
    by_kl,
    curve,
    every,
    gains,
    label,
    nothing_to_draw,
    passes,
    plane,
    table,
    unit,
)


def k_laws(runs: Runs) -> tuple[Figure, Rows]:
    """How many and which steps should keep their gradient? At equal images, at equal passes through the
    denoiser, and in the plane."""
    compared = [v for v in every(runs) if not v.runs[0].settings.kl_coeff] or nothing_to_draw()
    fixed = sorted(
        (v for v in compared if algorithm(v).truncation == "fixed" and not algorithm(v).lv_samples),
        key=lambda v: algorithm(v).k or math.inf,  # null is every step
    )
    others = [v for v in compared if v not in fixed]
    figure, axes = plt.subplots(1, 3, figsize=(12.4, 3.7), layout="constrained")
    blues = plt.get_cmap("Blues")(np.linspace(1, 0.35, max(2, len(fixed))))  # K = 1 is darkest, and on top
    styled = [
        (v, {"color": c, "zorder": 4 - 0.1 * k}) for k, (v, c) in enumerate(zip(fixed, blues, strict=False))
    ] + [(v, {"color": COLOURS[k + 1], "ls": "--"}) for k, v in enumerate(others)]
    for variant, style in styled:
        curve(axes[0], variant, "samples_seen", "eval/reward", **style)
        curve(axes[1], variant, "passes", "eval/reward", **style)
        plane(axes[2], variant, **style)
    reward, diversity = unit(compared)
    axes[0].set(xlabel="images", ylabel=reward)
    axes[1].set(xlabel="passes through the denoiser (thousands)", ylabel=reward)
    base_star(axes[2], compared)
    start, top = (
        compared[0].runs[0].curve("eval/reward")[0],
        max(v.curves("eval/reward").mean(0).max() for v in compared),
    )
    for cell in axes[:2] if top > start else ():  # where the laws can be told apart
        cell.set_ylim(bottom=start + 0.4 * (top - start))
    axes[2].set(xlabel=reward, ylabel=diversity)
    axes[2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    draft_1 = next((v for v in fixed if label(v) == "DRaFT-1"), None)
    budget, rows = min(passes(run)[-1] for v in compared for run in v.runs), table([*fixed, *others], 7.7)
    for row, v in zip(rows, [*fixed, *others], strict=True):
        for name in ("reward", "lpips"):
            row[f"{name} at equal passes"] = over_seeds(
                [float(np.interp(budget, passes(run), run.curve(f"eval/{name}"))) for run in v.runs]
            )
        if draft_1 and v is not draft_1 and {run.seed for run in v.runs} & {run.seed for run in draft_1.runs}:
            mine, reference = gains(v, "true_preference"), gains(draft_1, "true_preference")
            row["true_preference less DRaFT-1's"] = over_seeds(
                [mine[seed] - reference[seed] for seed in mine if seed in reference]
            )
    return figure, rows


def draft_speed(runs: Runs) -> tuple[Figure, Rows]:
    """Reward gradients against policy gradients and regression: for each image, and for each second."""
    compared = [v for v in every(runs) if not v.runs[0].settings.kl_coeff] or nothing_to_draw()
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.5), layout="constrained", sharey=True)
    for k, variant in enumerate(compared):
        for cell, key in zip(axes, ("samples_seen", "seconds"), strict=True):
            band(
                cell,
                variant.curves(key).mean(0)[1:],
                variant.curves("eval/reward")[:, 1:],
                color=COLOURS[k],
                label=label(variant),
            )
    for cell, name in zip(axes, ("images (log)", "seconds of training (log)"), strict=True):
        base_line(cell, compared, "eval/reward")
        cell.set(xscale="log", xlabel=name)
        cell.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        cell.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        cell.xaxis.set_minor_locator(NullLocator())
    axes[0].set(ylabel=unit(compared)[0])
    axes[0].legend()
    return figure, table(compared)


def overoptimisation(runs: Runs) -> tuple[Figure, Rows]:
    """Long training: the learned reward, its hidden rule and another rule in standard deviations of the base
    model's images; diversity."""
    compared = by_kl(every(runs))
    figure, axes = plt.subplots(
        1, len(compared) + 1, figsize=(4 * (len(compared) + 1), 3.5), layout="constrained", squeeze=False
    )
    names = {
        "reward": "learned reward",
        "true_preference": "its hidden rule (true_preference)",
        "true_aesthetic": "another rule (true_aesthetic)",
        "clip": "text-image score",
    }
    for k, variant in enumerate(compared):
        cell, x = axes[0][k], variant.curves("step")[0]
        curves = [z_curves(run.evaluations) for run in variant.runs]
        for j, (name, title) in enumerate(names.items()):
            if all(name in c for c in curves):
                band(
                    cell,
                    x,
                    np.array([c[name] for c in curves]),
                    color="black" if j == 0 else COLOURS[j],
                    label=title,
                )
        cell.axhline(0, color=GREY, lw=1)
        cell.set(title=label(variant), xlabel="epoch", ylabel="sd of the base model")
        if k:
            cell.sharey(axes[0][0])
        curve(axes[0][-1], variant, "step", "eval/lpips", color="black", ls=("-", "--")[k % 2])
    axes[0][-2].legend(loc="upper left")
    base_line(axes[0][-1], compared, "eval/lpips")
    axes[0][-1].set(xlabel="epoch", ylabel=unit(compared)[1])
    axes[0][-1].legend()
    return figure, table(compared)
