"""The fronts of reward and diversity, a curve for each regulariser (DRaFT's appendix; Jena et al.)."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from alignlab.compare.charts import COLOURS, GREY
from alignlab.compare.finished import Finished, Variant
from alignlab.metrics.statistics import over_seeds
from alignlab.paper.drawing import LINES, MARKERS, SHOWN_KL, Rows, Runs, algorithm, answer, by_kl, every, unit

TOLERANCES = (0.25, 0.5, 1.0, 2.0)

Spot = tuple[str, dict[str, NDArray[np.float64]]]
"""A point of a front: its setting, and reward, hidden rule and diversity of each seed."""

PLANE = ("reward", "true_preference", "lpips")

BASE_END = "base model"


def stop_at(run: Finished, tolerance: float) -> int:
    """The last evaluation before the text-image score, which is not trained on, falls so many standard
    deviations below its best so far."""
    score, sd = run.curve("eval/clip"), run.curve("eval/clip_std")[0]
    held = [j for j in range(len(score)) if score[j] >= max(score[: j + 1]) - tolerance * sd]
    return next((j for j in range(len(score) - 1) if j + 1 not in held), len(score) - 1)


def spot(setting: str, lines: Sequence[dict[str, Any]]) -> Spot:
    """From the seeds' lines of metrics, or answers (without "eval/")."""
    return setting, {
        key: np.array([line[key] if key in line else line[f"eval/{key}"] for line in lines]) for key in PLANE
    }


def last(variant: Variant) -> list[dict[str, Any]]:
    return [run.evaluations[-1] for run in variant.runs]


def regularisers(runs: Runs) -> dict[str, list[Spot]]:
    """Each with its points in the order of its dial. Those of training are measured at the end; those after
    it on DRaFT's weights."""
    kl = by_kl(every(runs, "draftp_fig3"))
    plain = [v for v in kl if v.runs[0].settings.kl_coeff == 0]
    capped = [(cap, v) for v in every(runs, "reward_cap") if (cap := algorithm(v).reward_cap) is not None]
    points = {
        "eps-MSE KL": [spot(f"{v.runs[0].settings.kl_coeff:g}", last(v)) for v in kl],
        "trajectory KL (eta = 1)": [
            spot(f"{v.runs[0].settings.kl_coeff:g}", last(v)) for v in by_kl(every(runs, "trajectory_kl"))
        ],
        "reward cap": [spot(f"{cap:g}", last(v)) for cap, v in sorted(capped, key=lambda pair: pair[0])],
        "K": sorted(
            (spot(f"{algorithm(v).k}", last(v)) for v in [*plain, *every(runs, "draft_k")]),
            key=lambda p: int(p[0]),
        ),
    }
    for v in plain:
        steps = v.runs[0].curve("step")
        points["early stopping"] = [
            spot(f"epoch {step:g}", [run.evaluations[j] for run in v.runs]) for j, step in enumerate(steps)
        ]
        stops = {tolerance: [stop_at(run, tolerance) for run in v.runs] for tolerance in TOLERANCES}
        points["stopped by the held-out score"] = [
            spot(
                f"{tolerance:g} sd (epochs {', '.join(f'{steps[j]:g}' for j in at)})",
                [run.evaluations[j] for run, j in zip(v.runs, at, strict=True)],
            )
            for tolerance, at in stops.items()
        ]
        answered = [(run, reply) for run in v.runs if (reply := answer(run, "dials"))]
        answers = [reply for _, reply in answered]
        turned = {
            dial: [
                spot(f"{reply[0]['value']:g}", reply)
                for reply in zip(*answers, strict=False)
                if reply[0]["dial"] == dial
            ]
            for dial in ("lora_scale", "annealing")
        }
        if answered:
            start, end = ([run.evaluations[j] for run, _ in answered] for j in (0, -1))
            points["LoRA scale"] = [spot("0", start), *turned["lora_scale"], spot("1", end)]
            points["annealed guidance"] = [*turned["annealing"], spot(BASE_END, start)]
    return {name: spots for name, spots in points.items() if spots}


def beside_the_penalty(points: dict[str, list[Spot]]) -> Rows:
    """The diversity of each front, interpolated to the reward of the eps-MSE KL's SHOWN_KL, less that KL's
    own; seed by seed, where all reach it."""
    penalty = dict(points.get("eps-MSE KL", ())).get(f"{SHOWN_KL:g}")
    if penalty is None:
        return []
    rows: Rows = []
    for name, spots in points.items():
        less = []
        for seed, (reward, diversity) in enumerate(zip(penalty["reward"], penalty["lpips"], strict=True)):
            front = sorted(
                (p["reward"][seed], p["lpips"][seed])
                for _, p in spots
                if len(p["lpips"]) == len(penalty["lpips"])
            )
            x, y = [point[0] for point in front], [point[1] for point in front]
            if front and x[0] <= reward <= x[-1]:
                less.append(float(np.interp(reward, x, y)) - diversity)
        if len(less) == len(penalty["lpips"]) and name != "eps-MSE KL":
            rows.append(
                {
                    "regulariser": name,
                    "setting": f"at the reward of KL {SHOWN_KL:g}",
                    "seeds": len(less),
                    f"lpips less KL {SHOWN_KL:g}'s": over_seeds(less),
                }
            )
    return rows


SETTINGS_SHOWN = {
    "eps-MSE KL": ("1", "0.3", "0.1", f"{SHOWN_KL:g}", "0.01"),
    "trajectory KL (eta = 1)": ("1", "0.1", "0.01"),
    "reward cap": ("5", "6.5", "7.5"),
    "K": ("2", "5", "10", "20"),
    "early stopping": ("epoch 10", "epoch 20", "epoch 30"),
    "LoRA scale": ("0.25", "0.5", "0.75"),
    "annealed guidance": ("0.5", "1", "2", "4"),
}


def fronts(runs: Runs) -> tuple[Figure, Rows]:
    """A swept curve for each regulariser in the plane of reward and diversity: on the trained reward, and on
    the hidden rule behind it. Crosses are standard errors over seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(15, 6), layout="constrained", sharey=True)
    rows: Rows = []
    points, palette = regularisers(runs), (*COLOURS[:7], COLOURS[9])  # K is green already
    for k, (name, spots) in enumerate(points.items()):
        for cell, key in zip(axes, PLANE, strict=False):
            at = [np.array([p[c].mean() for _, p in spots]) for c in (key, "lpips")]
            errors = [
                np.array([p[c].std(ddof=1) / np.sqrt(len(p[c])) if len(p[c]) > 1 else 0 for _, p in spots])
                for c in (key, "lpips")
            ]
            style = {"color": palette[k], "marker": MARKERS[k % len(MARKERS)], "ls": LINES[k % len(LINES)]}
            cell.errorbar(*at, errors[1], errors[0], ms=5, elinewidth=0.6, alpha=0.9, label=name, **style)
        for setting, p in spots:
            if setting in SETTINGS_SHOWN.get(name, ()):
                away = {
                    "xytext": (5, -10) if k % 2 else (-5, 5),
                    "textcoords": "offset points",
                    "ha": "left" if k % 2 else "right",
                }
                point = p["reward"].mean(), p["lpips"].mean()
                axes[0].annotate(
                    setting.removeprefix("epoch "), point, fontsize=7, color=style["color"], **away
                )
        rows += [
            {
                "regulariser": name,
                "setting": setting,
                "seeds": len(p["lpips"]),
                **{c: over_seeds(v) for c, v in p.items()},
            }
            for setting, p in spots
        ]
    rows += beside_the_penalty(points)
    base = every(runs)[0].runs[0]
    for cell, key in zip(axes, PLANE, strict=False):
        cell.plot(
            base.curve(f"eval/{key}")[0],
            base.curve("eval/lpips")[0],
            "X",
            color=GREY,
            ms=10,
            zorder=5,
            label="base model",
        )
    reward, diversity = unit(every(runs))
    axes[0].set(xlabel=f"trained: {reward}", ylabel=diversity)
    axes[1].set(xlabel="its hidden rule: true_preference (points of 5)")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, rows
