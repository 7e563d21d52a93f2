"""The figures of DRaFT+ (NVIDIA's blog): the weight of the penalty, and pictures."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from alignlab.compare.finished import Finished
from alignlab.paper.drawing import (
    Rows,
    Runs,
    answer,
    base_line,
    base_star,
    by_kl,
    curve,
    every,
    label,
    nothing_to_draw,
    plane,
    shades,
    table,
    unit,
)


def draftp_fig3(runs: Runs) -> tuple[Figure, Rows]:
    """Diversity and reward over training, and against each other, by kl_coeff."""
    kl, ddpo = by_kl(every(runs, "draftp_fig3")) or nothing_to_draw(), every(runs, "ddpo_preference")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
    reward, diversity = unit(kl)
    styled = [
        *zip(kl, ({"color": c} for c in shades(kl)), strict=False),
        *((v, {"color": "black", "ls": "--"}) for v in ddpo),
    ]
    for variant, style in styled:
        curve(axes[0], variant, "step", "eval/lpips", **style)
        curve(axes[1], variant, "step", "eval/reward", **style)
        plane(axes[2], variant, **style)
    base_line(axes[0], kl, "eval/lpips")
    base_line(axes[1], kl, "eval/reward")
    base_star(axes[2], kl)
    axes[0].set(xlabel="epoch", ylabel=diversity)
    axes[1].set(xlabel="epoch", ylabel=reward)
    axes[2].set(xlabel=reward, ylabel=diversity)
    axes[2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, table(every(runs), 6.0, 6.9)


def strip(run: Finished, name: str, who: str = "tuned") -> NDArray[np.uint8] | None:
    path = run.folder / "probes" / name / f"{who}.png"
    if not path.is_file():
        return None
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def draftp_fig4(runs: Runs) -> tuple[Figure, Rows]:
    """One prompt: a row a noise, a column a model: the base, DDPO, DRaFT+ with kl_coeff falling, DRaFT."""
    columns: list[tuple[str, NDArray[np.uint8]]] = []
    for variant in (*every(runs, "ddpo_preference"), *reversed(by_kl(every(runs, "draftp_fig3")))):
        for run in variant.runs:
            mine, base = strip(run, "lion"), strip(run, "lion", "base")
            if mine is not None and base is not None:
                columns = columns or [("base model", base)]
                columns.append((f"{label(variant)}\nseed {run.seed}", mine))
                (prompt,) = answer(run, "lion")["prompts"]
    if not columns:
        nothing_to_draw()
    figure, axes = plt.subplots(
        1, len(columns), figsize=(1.35 * len(columns), 9.6), layout="constrained", squeeze=False
    )
    for cell, (name, row) in zip(axes[0], columns, strict=True):
        cell.imshow(upright(row))
        cell.set_title(name, fontsize=8)
        cell.axis("off")
    figure.suptitle(prompt, fontsize=9)
    return figure, [{"column": name.replace("\n", ", ")} for name, _ in columns]


def upright(row: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A row of square images, which share their borders, as a column."""
    side, n = row.shape[0], round(row.shape[1] / row.shape[0])
    step = (row.shape[1] - side) // max(1, n - 1)
    return np.concatenate([row[:, k * step : k * step + side] for k in range(n)], axis=0)


def draftp_fig5(runs: Runs) -> tuple[Figure, Rows]:
    """Varied prompts, most of them never trained on: the base model beside a tuned one, the same noises."""
    asked = [(v, run) for v in every(runs) for run in v.runs]
    strips = [(v, run, strip(run, "varied", "base"), strip(run, "varied")) for v, run in asked]
    drawable = [
        (v, run, base, tuned) for v, run, base, tuned in strips if base is not None and tuned is not None
    ]
    variant, run, *pictures = drawable[0] if drawable else nothing_to_draw()
    prompts = answer(run, "varied")["prompts"]
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 4.7), layout="constrained")
    names = ("base model", f"{label(variant)}, seed {run.seed}")
    for k, (cell, picture, name) in enumerate(zip(axes, pictures, names, strict=True)):
        cell.imshow(picture)
        cell.set_title(name)
        cell.set_yticks(
            np.arange(0.5, len(prompts)) * picture.shape[0] / len(prompts),
            [""] * len(prompts) if k else prompts,
        )
        cell.set_xticks([])
        cell.grid(visible=False)
        cell.tick_params(length=0)
        cell.spines[:].set_visible(False)
    return figure, [{"prompt": prompt} for prompt in prompts]
