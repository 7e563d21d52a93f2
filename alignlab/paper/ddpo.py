"""The figures of DDPO (arXiv 2305.13301): reward against queries, and prompts that training never drew."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from alignlab.compare.charts import COLOURS, GREY
from alignlab.compare.finished import Variant
from alignlab.metrics.statistics import over_seeds
from alignlab.paper.drawing import (
    Rows,
    Runs,
    answer,
    base_line,
    cost,
    curve,
    every,
    label,
    learns,
    nothing_to_draw,
    table,
)

REWARD_NAMES = {
    "jpeg_compressibility": "compressibility",
    "jpeg_incompressibility": "incompressibility",
    "emoji_aesthetic": "aesthetic",
    "clip_blue": "prompt alignment",
}


def by_reward(runs: Runs) -> dict[str, Runs]:
    """{reward: its runs by experiment}, in the order of REWARD_NAMES and then as met."""
    parts: dict[str, Runs] = {name: {} for name in REWARD_NAMES}
    for name, finished in runs.items():
        for run in finished:
            parts.setdefault(" + ".join(run.settings.rewards), {}).setdefault(name, []).append(run)
    return {name: part for name, part in parts.items() if part}


def ddpo_fig4(runs: Runs) -> tuple[Figure, Rows]:
    """Reward against reward queries: both policy gradients, one with noise in its first steps alone, and both
    regressions, a panel a reward."""
    panels = by_reward(runs)
    figure, axes = plt.subplots(
        1,
        len(panels) or nothing_to_draw(),
        figsize=(3.6 * len(panels), 3.7),
        layout="constrained",
        squeeze=False,
    )
    palette = dict(
        zip(("RWR", "RWR-sparse", "DDPO-SF", "DDPO-IS", "DDPO-IS, noise in 2 steps"), COLOURS, strict=False)
    )
    rows: Rows = []
    for cell, (name, part) in zip(axes[0], panels.items(), strict=False):
        compared = sorted(
            (v for v in every(part) if label(v) in palette), key=lambda v: list(palette).index(label(v))
        )
        for variant in compared:
            curve(cell, variant, "reward_queries", "eval/reward", color=palette[label(variant)])
        base_line(cell, compared, "eval/reward")
        cell.set(
            title=f"{REWARD_NAMES.get(name, name)}\n({name})",
            xlabel="reward queries",
            ylabel=compared[0].runs[0].summary.reward_unit,
        )
        rows += [{"reward": name, **row, **cost(v)} for row, v in zip(table(compared), compared, strict=True)]
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure, rows


SET_NAMES = {
    "animals_45": "trained animals",
    "other_animals": "other animals",
    "objects": "things",
    "animals_activities": "animals, doing",
    "animals_colours": "animals, on a colour",
}


def ddpo_generalisation(runs: Runs) -> tuple[Figure, Rows]:
    """The gain on prompts of other kinds than those that training drew, in the reward that it was trained on,
    a panel each: each seed, and the mean."""
    panels: dict[str, list[tuple[Variant, list[Any]]]] = {}
    for reward, part in by_reward(runs).items():
        asked = [
            (v, [reply for run in v.runs if (reply := answer(run, "generalisation"))]) for v in every(part)
        ]
        panels[reward] = [(v, answers) for v, answers in asked if answers]
    panels = {reward: compared for reward, compared in panels.items() if compared}
    figure, axes = plt.subplots(
        1,
        len(panels) or nothing_to_draw(),
        figsize=(6.2 * len(panels), 3.4),
        layout="constrained",
        squeeze=False,
    )
    rows: Rows = []
    for cell, (reward, compared) in zip(axes[0], panels.items(), strict=True):
        for k, (variant, answers) in enumerate(compared):
            gained = {
                name: np.array([np.mean(a[name]["tuned"]) - np.mean(a[name]["base"]) for a in answers])
                for name in SET_NAMES
            }
            for j, (name, kind) in enumerate(SET_NAMES.items()):
                x, gain = j + 0.8 * ((k + 0.5) / len(compared) - 0.5), over_seeds(gained[name])
                cell.plot(
                    np.full(len(answers), x + 0.08), gained[name], "o", ms=3.5, color=COLOURS[k], alpha=0.5
                )
                ends = [[gain.value - gain.low], [gain.high - gain.value]] if len(answers) > 1 else None
                cell.errorbar(
                    x,
                    gain.value,
                    ends,
                    fmt="D",
                    color=COLOURS[k],
                    capsize=3,
                    label=label(variant) if j == 0 else None,
                )
                rows.append(
                    {
                        "reward": reward,
                        "variant": label(variant),
                        "learns": learns(variant),
                        "seeds": len(answers),
                        "prompts": f"{kind} ({len(answers[0][name]['prompts'])})",
                        "base": float(np.mean(answers[0][name]["base"])),
                        "gain": gain,
                        "gain less that on trained animals": over_seeds(gained[name] - gained["animals_45"])
                        if name != "animals_45"
                        else None,
                    }
                )
        cell.axhline(0, color=GREY, lw=1)
        cell.set_xticks(range(len(SET_NAMES)), [kind.replace(" ", "\n", 1) for kind in SET_NAMES.values()])
        cell.set(ylabel=f"gain in {reward}\n({compared[0][0].runs[0].summary.reward_unit})")
        cell.legend()
    return figure, rows
