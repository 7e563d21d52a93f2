"""The figure of Diffusion-DPO (arXiv 2311.12908): preference optimisation beside the other algorithms."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from alignlab.compare.charts import COLOURS
from alignlab.paper.drawing import (
    SHOWN_KL,
    Rows,
    Runs,
    base_line,
    base_star,
    cost,
    curve,
    every,
    nothing_to_draw,
    plane,
    table,
    unit,
)


def preferences(runs: Runs) -> tuple[Figure, Rows]:
    """Preference optimisation beside reward gradients, policy gradients and regression: for each reward
    query, for each pass, in the plane."""
    compared = [v for v in every(runs) if v.runs[0].settings.kl_coeff in (0, SHOWN_KL)] or nothing_to_draw()
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.7), layout="constrained")
    for k, variant in enumerate(compared):
        curve(axes[0], variant, "reward_queries", "eval/reward", color=COLOURS[k])
        curve(axes[1], variant, "passes", "eval/reward", color=COLOURS[k])
        curve(axes[2], variant, "passes", "eval/true_preference", color=COLOURS[k])
        plane(axes[3], variant, color=COLOURS[k])
    reward, diversity = unit(compared)
    for cell, x, y in zip(
        axes,
        ("reward queries", *["passes through the denoiser (thousands)"] * 2, reward),
        (reward, reward, "true_preference, its hidden rule", diversity),
        strict=True,
    ):
        cell.set(xlabel=x, ylabel=y)
    for cell, key in zip(axes, ("reward", "reward", "true_preference"), strict=False):
        base_line(cell, compared, f"eval/{key}")
    base_star(axes[3], compared)
    axes[3].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, [row | cost(v) for row, v in zip(table(compared), compared, strict=True)]
