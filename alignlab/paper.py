"""The papers' figures, drawn from finished runs: what each needs, and how it is drawn (matplotlib).

A drawing function takes the runs by experiment and returns the figure and the rows of its table. It shows what there is: an
experiment without a finished run is left out of the drawing.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from alignlab.compare import Finished, Variant, matched_reward, refuse_unlike, variants
from alignlab.figures import COLOURS, GREY
from alignlab.metrics.hacking import z_curves
from alignlab.metrics.statistics import Interval, bootstrap, over_seeds

Rows = list[dict[str, Any]]
Runs = dict[str, list[Finished]]
"""By experiment."""
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 10, "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.8, "svg.hashsalt": "alignlab",
}  # fmt: skip
"""For matplotlib's rc_context."""


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """What one figure shows, and what it is made of."""

    title: str
    source: str
    """Whose figure it is."""
    experiments: tuple[str, ...]
    """conf/experiment: the sweeps."""
    draw: Callable[[Runs], tuple[Figure, Rows]]
    probes: dict[str, str] = field(default_factory=dict)
    """Experiment -> what its runs' weights are asked (probes.py)."""


# -- parts of drawings


def label(variant: Variant) -> str:
    """Short, for a legend."""
    config = variant.runs[0].config
    algo, kl = config["algo"], config["kl_coeff"]
    name = algo["_target_"].rpartition(".")[2]
    if name not in ("DDPO", "RWR", "DRaFT"):  # somebody's own
        return variant.label
    if name == "DDPO":
        return f"DDPO-{algo['estimator'].upper()}"
    if name == "RWR":
        return "RWR" if algo["weighting"] == "dense" else "RWR-sparse"
    if algo["reward_cap"] is not None:
        return f"DRaFT, cap {algo['reward_cap']:g}"
    if kl:
        return f"DRaFT+ {'trajectory KL' if algo['kl'] == 'trajectory' else 'KL'} {kl:g}"
    if algo["lv_samples"]:
        return "DRaFT-LV"
    if algo["detach_input"]:
        return f"DRTune, {algo['k']} steps"
    if algo["truncation"] != "fixed":
        return "random K a rollout" if algo["truncation"] == "per_rollout" else "random steps"
    return f"DRaFT-{algo['k']}"


def every(runs: Runs, *experiments: str) -> list[Variant]:
    """The variants of these experiments (all of them if none is named), which must be comparable."""
    chosen = [run for name in experiments or runs for run in runs.get(name, ())]
    if chosen:
        refuse_unlike(chosen)
    return variants(chosen)


def shades(those: Sequence[Variant]) -> Iterator[Any]:
    """Colours of variants whose kl_coeff rises: from red (none) over yellow to blue."""
    yield from plt.get_cmap("turbo")(np.linspace(0.88, 0.12, max(2, len(those))))


def by_kl(those: Sequence[Variant]) -> list[Variant]:
    return sorted(those, key=lambda v: v.runs[0].config["kl_coeff"])


def band(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], **style: Any) -> None:
    """The mean over seeds [seeds, points] with its standard error."""
    mean = y.mean(0)
    (line,) = axes.plot(x, mean, marker="o", markersize=2.5, **style)
    if len(y) > 1:
        error = y.std(0, ddof=1) / np.sqrt(len(y))
        axes.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.16, lw=0)


def curve(axes: Axes, variant: Variant, x: str, y: str, **style: Any) -> None:
    band(axes, variant.curves(x).mean(0), variant.curves(y), **{"label": label(variant), **style})


def unit(those: Sequence[Variant]) -> tuple[str, str]:
    """Axis labels: the reward with its unit, the diversity with the distance that measured it."""
    run = those[0].runs[0]
    name = " + ".join(run.config["reward"])
    return f"{name} ({run.summary['reward_unit']})", f"diversity ({run.summary['diversity_metric']})"


def table(those: Sequence[Variant]) -> Rows:
    """What became of each variant on all training prompts: means over seeds with Student's 95 % interval."""
    level, matched = matched_reward(those)
    rows = []
    for v in those:
        ends = [(run.summary["base"], run.summary["final"]) for run in v.runs]
        held_out = [name for name in v.runs[0].config["eval_rewards"] if name not in v.runs[0].config["reward"]]
        numbers: dict[str, Interval] = {
            "gain": over_seeds([final["reward"] - base["reward"] for base, final in ends]),
            "diversity": over_seeds([run.curve("eval/lpips")[-1] for run in v.runs]),
            **{name: over_seeds([final[name] - base[name] for base, final in ends]) for name in held_out},
        }
        if len(matched[v.label]) == len(v.runs):
            numbers[f"diversity at reward {level:.2f}"] = over_seeds(matched[v.label])
        rows.append({
            "variant": label(v), "seeds": len(v.runs), **numbers, "images": v.runs[0].summary["samples_seen"],
            "minutes": float(np.mean([run.summary["wall_seconds"] for run in v.runs])) / 60,
        })  # fmt: skip
    return rows


def base_line(axes: Axes, those: Sequence[Variant], key: str) -> None:
    axes.axhline(those[0].runs[0].curve(key)[0], color=GREY, ls=":", lw=1.4, label="base model")


# -- the figures


def draftp_fig3(runs: Runs) -> tuple[Figure, Rows]:
    """Diversity and reward over training, and against each other, by kl_coeff."""
    kl, ddpo = by_kl(every(runs, "draftp_fig3")), every(runs, "ddpo_preference")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
    reward, diversity = unit(kl)
    styled = [*zip(kl, ({"color": c} for c in shades(kl)), strict=False), *((v, {"color": "black", "ls": "--"}) for v in ddpo)]
    for variant, style in styled:
        curve(axes[0], variant, "step", "eval/lpips", **style)
        curve(axes[1], variant, "step", "eval/reward", **style)
        x, y = variant.curves("eval/reward").mean(0), variant.curves("eval/lpips").mean(0)
        axes[2].plot(x, y, marker="o", markersize=2.5, label=label(variant), **style)
    base_line(axes[0], kl, "eval/lpips")
    base_line(axes[1], kl, "eval/reward")
    axes[2].plot(x[0], y[0], "*", color=GREY, ms=12)
    axes[0].set(xlabel="epoch", ylabel=diversity)
    axes[1].set(xlabel="epoch", ylabel=reward)
    axes[2].set(xlabel=reward, ylabel=diversity)
    axes[2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, table(every(runs))


def strip(run: Finished, name: str, who: str = "tuned") -> NDArray[np.uint8] | None:
    path = run.folder / "probes" / name / f"{who}.png"
    if not path.is_file():
        return None
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def draftp_fig4(runs: Runs) -> tuple[Figure, Rows]:
    """One prompt: a column a model (the base first, then kl_coeff falling), a row a noise."""
    columns: list[tuple[str, NDArray[np.uint8]]] = []
    for variant in (*every(runs, "ddpo_preference"), *reversed(by_kl(every(runs, "draftp_fig3")))):
        for run in variant.runs:
            mine, base = strip(run, "lion"), strip(run, "lion", "base")
            if mine is not None and base is not None:
                columns = columns or [("base model", base)]
                columns.append((f"{label(variant)}\nseed {run.seed}", mine))
                break
    figure, axes = plt.subplots(
        1, max(1, len(columns)), figsize=(1.35 * max(1, len(columns)), 9.6), layout="constrained", squeeze=False
    )
    for cell, (name, row) in zip(axes[0], columns, strict=False):
        cell.imshow(upright(row))
        cell.set_title(name, fontsize=8)
    for cell in axes[0]:
        cell.axis("off")
    return figure, [{"column": name.replace("\n", ", ")} for name, _ in columns]


def upright(row: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A row of square images, which share their borders, as a column."""
    side, n = row.shape[0], round(row.shape[1] / row.shape[0])
    step = (row.shape[1] - side) // max(1, n - 1)
    return np.concatenate([row[:, k * step : k * step + side] for k in range(n)], axis=0)


def draftp_fig5(runs: Runs) -> tuple[Figure, Rows]:
    """Varied prompts, most of them never trained on: the base model beside a tuned one, the same noises."""
    shown = [run for v in every(runs) for run in v.runs if strip(run, "varied") is not None]
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 6.4), layout="constrained")
    rows: Rows = []
    if shown:
        run = shown[-1]
        prompts = json.loads((run.folder / "probes" / "varied" / "answer.json").read_text())["prompts"]
        for cell, who in zip(axes, ("base", "tuned"), strict=True):
            picture = strip(run, "varied", who)
            assert picture is not None
            cell.imshow(picture)
            name = "base model" if who == "base" else f"DRaFT+ KL {run.config['kl_coeff']:g}, seed {run.seed}"
            cell.set_title(name)
            cell.set_yticks(
                np.arange(0.5, len(prompts)) * picture.shape[0] / len(prompts), prompts if who == "base" else [""] * len(prompts)
            )
            cell.set_xticks([])
        rows = [{"prompt": prompt} for prompt in prompts]
    for cell in axes:
        cell.grid(visible=False)
        cell.tick_params(length=0)
        for side in cell.spines.values():
            side.set_visible(False)
    return figure, rows


def ddpo_fig4(runs: Runs) -> tuple[Figure, Rows]:
    """Reward against reward queries: both policy gradients and both regressions, a panel a reward."""
    panels: dict[str, Runs] = {}
    for name, there in runs.items():
        for run in there:
            panels.setdefault(" + ".join(run.config["reward"]), {}).setdefault(name, []).append(run)
    figure, axes = plt.subplots(
        1, max(1, len(panels)), figsize=(3.6 * max(1, len(panels)), 3.4), layout="constrained", squeeze=False
    )
    palette = dict(zip(("RWR", "RWR-sparse", "DDPO-SF", "DDPO-IS"), COLOURS, strict=False))
    rows: Rows = []
    for cell, (name, part) in zip(axes[0], panels.items(), strict=False):
        those = sorted(every(part), key=lambda v: list(palette).index(label(v)))
        for variant in those:
            curve(cell, variant, "reward_queries", "eval/reward", color=palette[label(variant)])
        base_line(cell, those, "eval/reward")
        cell.set(title=name, xlabel="reward queries", ylabel=those[0].runs[0].summary["reward_unit"])
        rows += [{"reward": name, **row} for row in table(those)]
    axes[0][0].legend()
    return figure, rows


SET_NAMES = {
    "animals_45": "trained animals", "other_animals": "other animals", "objects": "things", "animals_activities": "animals, doing",
    "animals_colours": "animals, on a colour",
}  # fmt: skip


def ddpo_generalisation(runs: Runs) -> tuple[Figure, Rows]:
    """The gain on prompts of other kinds than those that training drew, in the reward that it was trained on."""
    figure, cell = plt.subplots(figsize=(7.4, 3.4), layout="constrained")
    rows: Rows = []
    shown = [v for v in every(runs) if any((run.folder / "probes" / "generalisation").is_dir() for run in v.runs)]
    for k, variant in enumerate(shown):
        files = [run.folder / "probes" / "generalisation" / "answer.json" for run in variant.runs]
        answers = [json.loads(file.read_text()) for file in files if file.is_file()]
        for j, (name, words) in enumerate(SET_NAMES.items()):
            gain = bootstrap(np.array([np.array(a[name]["tuned"]) - np.array(a[name]["base"]) for a in answers]))
            x = j + 0.8 * ((k + 0.5) / len(shown) - 0.5)
            cell.errorbar(
                x, gain.value, [[gain.value - gain.low], [gain.high - gain.value]], fmt="o", color=COLOURS[k], capsize=3, label=label(variant) if j == 0 else None
            )  # fmt: skip
            rows.append({"variant": label(variant), "seeds": len(answers), "prompts": words, "gain": gain})
    cell.axhline(0, color=GREY, lw=1)
    cell.set_xticks(range(len(SET_NAMES)), list(SET_NAMES.values()))
    cell.set(ylabel="gain in the training reward")
    if shown:
        cell.legend()
    return figure, rows


def k_laws(runs: Runs) -> tuple[Figure, Rows]:
    """How many and which steps should keep their gradient? At equal images, at equal passes through the denoiser, and in the plane."""
    those = [v for v in every(runs) if not v.runs[0].config["kl_coeff"]]
    fixed = sorted(
        (v for v in those if label(v).startswith("DRaFT-") and v.runs[0].config["algo"]["lv_samples"] == 0),
        key=lambda v: v.runs[0].config["algo"]["k"],
    )
    others = [v for v in those if v not in fixed]
    figure, axes = plt.subplots(1, 3, figsize=(12.4, 3.7), layout="constrained")
    blues = plt.get_cmap("Blues")(np.linspace(0.35, 1, max(2, len(fixed))))
    styled = [(v, {"color": c}) for v, c in zip(fixed, blues, strict=False)] + [
        (v, {"color": COLOURS[k + 1], "ls": "--"}) for k, v in enumerate(others)
    ]
    for variant, style in styled:
        curve(axes[0], variant, "samples_seen", "eval/reward", **style)
        passes = (variant.curves("denoiser_forwards") + 2 * variant.curves("denoiser_backwards")).mean(0)
        band(axes[1], passes / 1e3, variant.curves("eval/reward"), **style)
        axes[2].plot(
            variant.curves("eval/reward").mean(0),
            variant.curves("eval/lpips").mean(0),
            marker="o",
            markersize=2.5,
            label=label(variant),
            **style,
        )
    reward, diversity = unit(those)
    axes[0].set(xlabel="images", ylabel=reward)
    axes[1].set(xlabel="passes through the denoiser, backward counted twice (thousands)", ylabel=reward)
    axes[2].set(xlabel=reward, ylabel=diversity)
    axes[2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, table([*fixed, *others])


def fronts(runs: Runs) -> tuple[Figure, Rows]:
    """A swept curve for each regulariser in the plane of reward and diversity: on the trained reward, and on the hidden rule behind it."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    rows: Rows = []
    plain = [v for v in every(runs, "draftp_fig3") if v.runs[0].config["kl_coeff"] == 0]
    ends = {
        "eps-MSE KL": by_kl([v for v in every(runs, "draftp_fig3") if v.runs[0].config["kl_coeff"] > 0]),
        "trajectory KL": by_kl(every(runs, "trajectory_kl")),
        "reward cap": sorted(every(runs, "reward_cap"), key=lambda v: v.runs[0].config["algo"]["reward_cap"]),
        "K": sorted([*plain, *every(runs, "draft_k")], key=lambda v: v.runs[0].config["algo"]["k"]),
    }
    points: dict[str, list[tuple[str, dict[str, Interval]]]] = {}
    keys = ("reward", "true_preference", "lpips")
    for name, those in ends.items():
        points[name] = [(label(v), {k: over_seeds([run.curve(f"eval/{k}")[-1] for run in v.runs]) for k in keys}) for v in those]
    for v in plain:
        early = [
            {k: over_seeds([run.curve(f"eval/{k}")[j] for run in v.runs]) for k in keys}
            for j in range(1, len(v.runs[0].evaluations))
        ]
        points["early stopping"] = [(f"epoch {step:g}", p) for step, p in zip(v.runs[0].curve("step")[1:], early, strict=True)]
        stops = [int(np.argmax(run.curve("eval/clip"))) for run in v.runs]  # where the held-out text-image score was best
        chosen = {k: over_seeds([run.curve(f"eval/{k}")[j] for run, j in zip(v.runs, stops, strict=True)]) for k in keys}
        points["stopped at the best held-out score"] = [("best clip", chosen)]
        files = [run.folder / "probes" / "dials" / "answer.json" for run in v.runs]
        answers = [json.loads(file.read_text()) for file in files if file.is_file()]
        for j, line in enumerate(answers[0] if answers else ()):
            name = "LoRA scale" if line["dial"] == "lora_scale" else "annealed guidance"
            found = {k: over_seeds([a[j][k] for a in answers]) for k in keys}
            points.setdefault(name, []).append((f"{line['value']:g}", found))
    for k, (name, spots) in enumerate((n, s) for n, s in points.items() if s):
        for cell, key in zip(axes, ("reward", "true_preference"), strict=True):
            x, y = [p[key].value for _, p in spots], [p["lpips"].value for _, p in spots]
            cell.plot(
                x,
                y,
                "*" if len(spots) == 1 else "o-",
                ms=11 if len(spots) == 1 else 4,
                color=COLOURS[k % len(COLOURS)],
                label=name,
            )
        rows += [{"regulariser": name, "setting": setting, **p} for setting, p in spots]
    any_of = next(v for those in (plain, *ends.values()) for v in those)
    base = any_of.runs[0]
    for cell, key in zip(axes, ("reward", "true_preference"), strict=True):
        cell.plot(base.curve(f"eval/{key}")[0], base.curve("eval/lpips")[0], "X", color=GREY, ms=10, label="base model")
        cell.set(xlabel=f"{'trained: ' if key == 'reward' else 'its hidden rule: '}{key}")
    axes[0].set(ylabel=unit([any_of])[1])
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, rows


def draft_speed(runs: Runs) -> tuple[Figure, Rows]:
    """Reward gradients against policy gradients and regression: for each image, and for each second."""
    those = [v for v in every(runs) if not v.runs[0].config["kl_coeff"]]
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.5), layout="constrained", sharey=True)
    for k, variant in enumerate(those):
        for cell, key in zip(axes, ("samples_seen", "seconds"), strict=True):
            band(
                cell,
                variant.curves(key).mean(0)[1:],
                variant.curves("eval/reward")[:, 1:],
                color=COLOURS[k],
                label=label(variant),
            )
    for cell, name in zip(axes, ("images (log)", "seconds of training (log)"), strict=True):
        base_line(cell, those, "eval/reward")
        cell.set(xscale="log", xlabel=name)
    axes[0].set(ylabel=unit(those)[0])
    axes[0].legend()
    return figure, table(those)


def overoptimisation(runs: Runs) -> tuple[Figure, Rows]:
    """Long training: the learned reward, its hidden rule and another rule in standard deviations of the base model's images; diversity."""
    those = by_kl(every(runs))
    figure, axes = plt.subplots(1, len(those) + 1, figsize=(4 * (len(those) + 1), 3.5), layout="constrained", squeeze=False)
    names = {
        "reward": "learned reward",
        "true_preference": "its hidden rule",
        "true_aesthetic": "another rule",
        "clip": "text-image score",
    }
    for k, variant in enumerate(those):
        cell, x = axes[0][k], variant.curves("step")[0]
        curves = [z_curves(run.evaluations) for run in variant.runs]
        for j, (name, words) in enumerate(names.items()):
            if all(name in c for c in curves):
                band(cell, x, np.array([c[name] for c in curves]), color="black" if j == 0 else COLOURS[j], label=words)
        cell.axhline(0, color=GREY, lw=1)
        cell.set(title=label(variant), xlabel="epoch", ylabel="sd of the base model")
        curve(axes[0][-1], variant, "step", "eval/lpips", color=COLOURS[k])
    axes[0][0].legend()
    base_line(axes[0][-1], those, "eval/lpips")
    axes[0][-1].set(xlabel="epoch", ylabel=unit(those)[1])
    axes[0][-1].legend()
    return figure, table(those)


FIGURES: dict[str, PaperFigure] = {
    "draftp_fig3": PaperFigure(
        title="Diversity and reward over training, by the weight of the penalty", source="DRaFT+ (NVIDIA blog), figure 3", draw=draftp_fig3,
        experiments=("draftp_fig3", "ddpo_preference"),
    ),
    "draftp_fig4": PaperFigure(
        title="One prompt, the same noises down, the models across", source="DRaFT+ (NVIDIA blog), figure 4", draw=draftp_fig4,
        experiments=("draftp_fig3", "ddpo_preference"), probes={"draftp_fig3": "lion", "ddpo_preference": "lion"},
    ),
    "draftp_fig5": PaperFigure(
        title="Varied prompts, base and tuned, the same noises", source="DRaFT+ (NVIDIA blog), figure 5", draw=draftp_fig5,
        experiments=("draftp_fig3",), probes={"draftp_fig3": "varied"},
    ),
    "ddpo_fig4": PaperFigure(
        title="Reward against reward queries", source="DDPO (arXiv 2305.13301), figure 4", draw=ddpo_fig4, experiments=("ddpo_fig4", "rwr_fig4"),
    ),
    "ddpo_generalisation": PaperFigure(
        title="Does it carry over to prompts that training never drew?", source="DDPO (arXiv 2305.13301)", draw=ddpo_generalisation,
        experiments=("ddpo_preference",), probes={"ddpo_preference": "generalisation"},
    ),
    "k_laws": PaperFigure(
        title="Which steps should keep their gradient?", source="DRaFT (arXiv 2309.17400) against AlignProp (arXiv 2310.03739)", draw=k_laws,
        experiments=("draftp_fig3", "draft_k", "draft_random_k", "draft_lv", "drtune"),
    ),
    "fronts": PaperFigure(
        title="Reward and diversity, a curve for each regulariser", source="DRaFT, appendix; Jena et al. (arXiv 2409.06493)", draw=fronts,
        experiments=("draftp_fig3", "trajectory_kl", "reward_cap", "draft_k"), probes={"draftp_fig3": "dials"},
    ),
    "draft_speed": PaperFigure(
        title="Reward for each image and for each second", source="DRaFT (arXiv 2309.17400), figure 2", draw=draft_speed,
        experiments=("draftp_fig3", "ddpo_preference", "rwr_preference"),
    ),
    "overoptimisation": PaperFigure(
        title="Long training, with and without the penalty", source="DRaFT (arXiv 2309.17400)",
        draw=overoptimisation, experiments=("overoptimisation",),
    ),
}  # fmt: skip
