"""The papers' figures, drawn from finished runs: what each needs, and how it is drawn (matplotlib).

A drawing function takes the finished runs by experiment and returns the figure and the rows of its table. It shows what there is; if
that is too little for a drawing it raises a CompareError.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from numpy.typing import NDArray
from PIL import Image

from alignlab.compare import CompareError, Finished, Variant, matched_reward, refuse_unlike, variants
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
class Ask:
    """A question to the weights of some runs (probes.py)."""

    question: str
    experiment: str
    of: Callable[[dict[str, Any]], bool]
    """Which runs, by their configuration."""


@dataclass(frozen=True, kw_only=True)
class PaperFigure:
    """What one figure shows, and what it is made of."""

    title: str
    source: str
    """Whose figure it is."""
    experiments: tuple[str, ...]
    """conf/experiment: the sweeps."""
    draw: Callable[[Runs], tuple[Figure, Rows]]
    note: str
    """How to read it."""
    probes: tuple[Ask, ...] = ()


SHOWN_SEED = 2
"""Of the runs whose pictures are shown."""
SHOWN_KL = 0.03
"""kl_coeff of the run in figure 5."""
BANDS = "Curves: the evaluations during training (8 prompts, 4 noises each), mean over seeds with its standard error."
TABLE = "Table: gains after training on all 45 prompts (2 other noises each); diversity at the last evaluation; Student's 95 % intervals over seeds."


# -- parts of drawings


def label(variant: Variant) -> str:
    """Short, for a legend."""
    config = variant.runs[0].config
    algo, kl = config["algo"], config["kl_coeff"]
    name = algo["_target_"].rpartition(".")[2]
    if name not in ("DDPO", "RWR", "DRaFT", "OnlineDPO"):  # somebody's own
        return variant.label
    if name == "OnlineDPO":
        return "DPO, offline" if algo["resample_every"] >= config["steps"] else "DPO, online"
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
    """The variants of these experiments (all of them if none is named); all runs must be comparable.

    Raises:
        CompareError: if they are not, or there is none at all.
    """
    refuse_unlike([run for there in runs.values() for run in there] or _nothing())
    return variants([run for name in experiments or runs for run in runs.get(name, ())])


def _nothing() -> NoReturn:
    raise CompareError("none of the finished runs belongs into this figure; finish its experiments first")


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


def passes(run: Finished) -> NDArray[np.float64]:
    """Through the denoiser, so far: a backward pass counts as two forward ones."""
    return np.array(run.curve("denoiser_forwards")) + 2 * np.array(run.curve("denoiser_backwards"))


def curve(axes: Axes, variant: Variant, x: str, y: str, **style: Any) -> None:
    """`y` over `x`: keys of the metrics, or "passes" in thousands."""
    along = np.mean([passes(run) for run in variant.runs], 0) / 1e3 if x == "passes" else variant.curves(x).mean(0)
    band(axes, along, variant.curves(y), **{"label": label(variant), **style})


def plane(axes: Axes, variant: Variant, **style: Any) -> None:
    """The way through the plane of reward and diversity, means over seeds."""
    x, y = (variant.curves(f"eval/{key}").mean(0) for key in ("reward", "lpips"))
    axes.plot(x, y, marker="o", markersize=2.5, label=label(variant), **style)


def unit(those: Sequence[Variant]) -> tuple[str, str]:
    """Axis labels: the reward with its unit, the diversity with the distance that measured it."""
    run = those[0].runs[0]
    name = " + ".join(run.config["reward"])
    return f"{name} ({run.summary['reward_unit']})", f"diversity ({run.summary['diversity_metric']})"


def table(those: Sequence[Variant]) -> Rows:
    """What became of each variant: means over seeds with Student's 95 % interval. `matched` is the diversity where the curve first reaches
    `level`, a reward that all of them reached."""
    level, matched = matched_reward(those)
    reached = level > those[0].runs[0].curve("eval/reward")[0]
    rows = []
    for v in those:
        ends = [(run.summary["base"], run.summary["final"]) for run in v.runs]
        trained = list(v.runs[0].config["reward"])
        held_out = [name for name in v.runs[0].config["eval_rewards"] if name not in trained]
        numbers: dict[str, Interval] = {
            "gain": over_seeds([final["reward"] - base["reward"] for base, final in ends]),
            **{
                name: over_seeds([final[name] - base[name] for base, final in ends])
                for name in (trained if len(trained) > 1 else []) + held_out
            },
            "diversity": over_seeds([run.curve("eval/lpips")[-1] for run in v.runs]),
        }
        if reached and len(matched[v.label]) == len(v.runs):
            numbers["matched"] = over_seeds(matched[v.label])
        rows.append({
            "variant": label(v), "seeds": len(v.runs), **numbers, "level": f"{level:.2f}" if reached else None,
            "reward queries": round(v.runs[0].curve("reward_queries")[-1]), "minutes": float(np.mean([run.summary["wall_seconds"] for run in v.runs])) / 60,
        })  # fmt: skip
    return rows


def base_line(axes: Axes, those: Sequence[Variant], key: str) -> None:
    axes.axhline(those[0].runs[0].curve(key)[0], color=GREY, ls=":", lw=1.4, label="base model")


# -- the figures


def draftp_fig3(runs: Runs) -> tuple[Figure, Rows]:
    """Diversity and reward over training, and against each other, by kl_coeff."""
    kl, ddpo = by_kl(every(runs, "draftp_fig3")) or _nothing(), every(runs, "ddpo_preference")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
    reward, diversity = unit(kl)
    styled = [*zip(kl, ({"color": c} for c in shades(kl)), strict=False), *((v, {"color": "black", "ls": "--"}) for v in ddpo)]
    for variant, style in styled:
        curve(axes[0], variant, "step", "eval/lpips", **style)
        curve(axes[1], variant, "step", "eval/reward", **style)
        plane(axes[2], variant, **style)
    base_line(axes[0], kl, "eval/lpips")
    base_line(axes[1], kl, "eval/reward")
    axes[2].plot(*(kl[0].curves(f"eval/{key}").mean(0)[0] for key in ("reward", "lpips")), "*", color=GREY, ms=12)
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
    """One prompt: a row a noise, a column a model: the base, DDPO, DRaFT+ with kl_coeff falling, DRaFT."""
    columns: list[tuple[str, NDArray[np.uint8]]] = []
    for variant in (*every(runs, "ddpo_preference"), *reversed(by_kl(every(runs, "draftp_fig3")))):
        for run in variant.runs:
            mine, base = strip(run, "lion"), strip(run, "lion", "base")
            if mine is not None and base is not None:
                columns = columns or [("base model", base)]
                columns.append((f"{label(variant)}\nseed {run.seed}", mine))
    if not columns:
        _nothing()
    figure, axes = plt.subplots(1, len(columns), figsize=(1.35 * len(columns), 9.6), layout="constrained", squeeze=False)
    for cell, (name, row) in zip(axes[0], columns, strict=True):
        cell.imshow(upright(row))
        cell.set_title(name, fontsize=8)
        cell.axis("off")
    return figure, [{"column": name.replace("\n", ", ")} for name, _ in columns]


def upright(row: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A row of square images, which share their borders, as a column."""
    side, n = row.shape[0], round(row.shape[1] / row.shape[0])
    step = (row.shape[1] - side) // max(1, n - 1)
    return np.concatenate([row[:, k * step : k * step + side] for k in range(n)], axis=0)


def draftp_fig5(runs: Runs) -> tuple[Figure, Rows]:
    """Varied prompts, most of them never trained on: the base model beside a tuned one, the same noises."""
    shown = [(v, run) for v in every(runs) for run in v.runs if strip(run, "varied") is not None]
    variant, run = shown[0] if shown else _nothing()
    prompts = json.loads((run.folder / "probes" / "varied" / "answer.json").read_text())["prompts"]
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 4.7), layout="constrained")
    for cell, who, name in zip(axes, ("base", "tuned"), ("base model", f"{label(variant)}, seed {run.seed}"), strict=True):
        picture = strip(run, "varied", who)
        assert picture is not None
        cell.imshow(picture)
        cell.set_title(name)
        cell.set_yticks(
            np.arange(0.5, len(prompts)) * picture.shape[0] / len(prompts), prompts if who == "base" else [""] * len(prompts)
        )
        cell.set_xticks([])
        cell.grid(visible=False)
        cell.tick_params(length=0)
        cell.spines[:].set_visible(False)
    return figure, [{"prompt": prompt} for prompt in prompts]


def ddpo_fig4(runs: Runs) -> tuple[Figure, Rows]:
    """Reward against reward queries: both policy gradients and both regressions, a panel a reward."""
    panels: dict[str, Runs] = {}
    for name, there in runs.items():
        for run in there:
            panels.setdefault(" + ".join(run.config["reward"]), {}).setdefault(name, []).append(run)
    figure, axes = plt.subplots(
        1, len(panels) or _nothing(), figsize=(3.6 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    palette = dict(zip(("RWR", "RWR-sparse", "DDPO-SF", "DDPO-IS"), COLOURS, strict=False))
    rows: Rows = []
    for cell, (name, part) in zip(axes[0], panels.items(), strict=False):
        those = sorted((v for v in every(part) if label(v) in palette), key=lambda v: list(palette).index(label(v)))
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
    found = [(v, [run.folder / "probes" / "generalisation" / "answer.json" for run in v.runs]) for v in every(runs)]
    answered = [(v, [json.loads(file.read_text()) for file in files if file.is_file()]) for v, files in found]
    answered = [(v, answers) for v, answers in answered if answers] or _nothing()
    for k, (variant, answers) in enumerate(answered):
        for j, (name, words) in enumerate(SET_NAMES.items()):
            gain = bootstrap(np.array([np.array(a[name]["tuned"]) - np.array(a[name]["base"]) for a in answers]))
            x = j + 0.8 * ((k + 0.5) / len(answered) - 0.5)
            cell.errorbar(
                x, gain.value, [[gain.value - gain.low], [gain.high - gain.value]], fmt="o", color=COLOURS[k], capsize=3, label=label(variant) if j == 0 else None
            )  # fmt: skip
            rows.append({"variant": label(variant), "seeds": len(answers), "prompts": words, "gain": gain})
    cell.axhline(0, color=GREY, lw=1)
    cell.set_xticks(range(len(SET_NAMES)), list(SET_NAMES.values()))
    cell.set(ylabel="gain in the training reward")
    cell.legend()
    return figure, rows


def preferences(runs: Runs) -> tuple[Figure, Rows]:
    """Preference optimisation beside reward gradients, policy gradients and regression: for each reward query, for each pass, in the plane."""
    those = [v for v in every(runs) if v.runs[0].config["kl_coeff"] in (0, SHOWN_KL)] or _nothing()
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.7), layout="constrained")
    for k, variant in enumerate(those):
        curve(axes[0], variant, "reward_queries", "eval/reward", color=COLOURS[k])
        curve(axes[1], variant, "passes", "eval/reward", color=COLOURS[k])
        curve(axes[2], variant, "passes", "eval/true_preference", color=COLOURS[k])
        plane(axes[3], variant, color=COLOURS[k])
    reward, diversity = unit(those)
    for cell, x, y in zip(
        axes,
        ("reward queries", *["passes through the denoiser (thousands)"] * 2, reward),
        (reward, reward, "true_preference, its hidden rule", diversity),
        strict=True,
    ):
        cell.set(xlabel=x, ylabel=y)
    for cell, key in zip(axes, ("reward", "reward", "true_preference"), strict=False):
        base_line(cell, those, f"eval/{key}")
    axes[3].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    rows = table(those)
    for row, v in zip(rows, those, strict=True):
        row["passes (thousands)"] = float(np.mean([passes(run)[-1] for run in v.runs])) / 1e3
    return figure, rows


def k_laws(runs: Runs) -> tuple[Figure, Rows]:
    """How many and which steps should keep their gradient? At equal images, at equal passes through the denoiser, and in the plane."""
    those = [v for v in every(runs) if not v.runs[0].config["kl_coeff"]] or _nothing()
    fixed = sorted(
        (v for v in those if v.runs[0].config["algo"]["truncation"] == "fixed" and not v.runs[0].config["algo"]["lv_samples"]),
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
        curve(axes[1], variant, "passes", "eval/reward", **style)
        plane(axes[2], variant, **style)
    reward, diversity = unit(those)
    axes[0].set(xlabel="images", ylabel=reward)
    axes[1].set(xlabel="passes through the denoiser (thousands)", ylabel=reward)
    axes[2].set(xlabel=reward, ylabel=diversity)
    axes[2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    budget, rows = min(passes(run)[-1] for v in those for run in v.runs), table([*fixed, *others])
    for row, v in zip(rows, [*fixed, *others], strict=True):
        for name in ("reward", "lpips"):
            row[f"{name} at equal passes"] = over_seeds(
                [float(np.interp(budget, passes(run), run.curve(f"eval/{name}"))) for run in v.runs]
            )
    return figure, rows


def stop_at(run: Finished) -> int:
    """The last evaluation at which the text-image score, which is not trained on, is within half a standard deviation of its best so far."""
    score, sd = run.curve("eval/clip"), run.curve("eval/clip_std")[0]
    held = [j for j in range(len(score)) if score[j] >= max(score[: j + 1]) - 0.5 * sd]
    return next((j for j in range(len(score) - 1) if j + 1 not in held), len(score) - 1)


def fronts(runs: Runs) -> tuple[Figure, Rows]:
    """A swept curve for each regulariser in the plane of reward and diversity: on the trained reward, and on the hidden rule behind it."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    rows: Rows = []
    kl = by_kl(every(runs, "draftp_fig3"))
    plain = [v for v in kl if v.runs[0].config["kl_coeff"] == 0]
    ends = {
        "eps-MSE KL": kl,
        "trajectory KL (eta = 1)": by_kl(every(runs, "trajectory_kl")),
        "reward cap": sorted(every(runs, "reward_cap"), key=lambda v: v.runs[0].config["algo"]["reward_cap"]),
        "K": sorted([*plain, *every(runs, "draft_k")], key=lambda v: v.runs[0].config["algo"]["k"]),
    }
    points: dict[str, list[tuple[str, dict[str, Interval]]]] = {}
    seeds: dict[str, int] = {}
    keys = ("reward", "true_preference", "lpips")
    for name, those in ends.items():
        seeds[name] = min((len(v.runs) for v in those), default=0)
        points[name] = [(label(v), {k: over_seeds([run.curve(f"eval/{k}")[-1] for run in v.runs]) for k in keys}) for v in those]
    for v in plain:
        early = [
            {k: over_seeds([run.curve(f"eval/{k}")[j] for run in v.runs]) for k in keys}
            for j in range(1, len(v.runs[0].evaluations))
        ]
        points["early stopping"] = [(f"epoch {step:g}", p) for step, p in zip(v.runs[0].curve("step")[1:], early, strict=True)]
        stops = [stop_at(run) for run in v.runs]
        chosen = {k: over_seeds([run.curve(f"eval/{k}")[j] for run, j in zip(v.runs, stops, strict=True)]) for k in keys}
        epochs = ", ".join(f"{run.curve('step')[j]:g}" for run, j in zip(v.runs, stops, strict=True))
        points["stopped by the held-out score"] = [(f"epochs {epochs}", chosen)]
        files = [run.folder / "probes" / "dials" / "answer.json" for run in v.runs]
        answers = [json.loads(file.read_text()) for file in files if file.is_file()]
        for j, line in enumerate(answers[0] if answers else ()):
            name = "LoRA scale" if line["dial"] == "lora_scale" else "annealed guidance"
            found = {k: over_seeds([a[j][k] for a in answers]) for k in keys}
            points.setdefault(name, []).append((f"{line['value']:g}", found))
            seeds[name] = len(answers)
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
        rows += [
            {"regulariser": name, "setting": setting, "seeds": seeds.get(name, max((len(v.runs) for v in plain), default=0)), **p}
            for setting, p in spots
        ]
    base = every(runs)[0].runs[0]
    for cell, key in zip(axes, ("reward", "true_preference"), strict=True):
        cell.plot(base.curve(f"eval/{key}")[0], base.curve("eval/lpips")[0], "X", color=GREY, ms=10, label="base model")
        cell.set(xlabel=f"{'trained: ' if key == 'reward' else 'its hidden rule: '}{key}")
    axes[0].set(ylabel=unit(every(runs))[1])
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, rows


def draft_speed(runs: Runs) -> tuple[Figure, Rows]:
    """Reward gradients against policy gradients and regression: for each image, and for each second."""
    those = [v for v in every(runs) if not v.runs[0].config["kl_coeff"]] or _nothing()
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
        cell.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        cell.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        cell.xaxis.set_minor_locator(NullLocator())
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
        if k:
            cell.sharey(axes[0][0])
        curve(axes[0][-1], variant, "step", "eval/lpips", color=COLOURS[k])
    axes[0][-2].legend(loc="upper left")
    base_line(axes[0][-1], those, "eval/lpips")
    axes[0][-1].set(xlabel="epoch", ylabel=unit(those)[1])
    axes[0][-1].legend()
    return figure, table(those)


PREFERENCE = ("draftp_fig3", "ddpo_preference")


def shown(config: dict[str, Any]) -> bool:
    return config["quick"] or config["seed"] == SHOWN_SEED


FIGURES: dict[str, PaperFigure] = {
    "draftp_fig3": PaperFigure(
        title="Diversity and reward over training, by the weight of the penalty", source="DRaFT+ (NVIDIA's blog), figure 3", draw=draftp_fig3,
        experiments=PREFERENCE, note=f"{BANDS} {TABLE} An epoch of DRaFT is 16 images and one update, one of DDPO 48 images and four.",
    ),
    "draftp_fig4": PaperFigure(
        title="One prompt, the same noises down, the models across", source="DRaFT+ (NVIDIA's blog), figure 4", draw=draftp_fig4, experiments=PREFERENCE,
        note="Not chosen: the first eight noises of one seed.", probes=tuple(Ask(question="lion", experiment=name, of=shown) for name in PREFERENCE),
    ),
    "draftp_fig5": PaperFigure(
        title="Varied prompts, base and tuned, the same noises", source="DRaFT+ (NVIDIA's blog), figure 5", draw=draftp_fig5, experiments=("draftp_fig3",),
        note="Not chosen: the first four noises. Training drew \"a cat\", and no other of these prompts.",
        probes=(Ask(question="varied", experiment="draftp_fig3", of=lambda c: shown(c) and c["kl_coeff"] == SHOWN_KL),),
    ),
    "ddpo_fig4": PaperFigure(
        title="Reward against reward queries", source="DDPO (arXiv 2305.13301), figure 4", draw=ddpo_fig4, experiments=("ddpo_fig4", "rwr_fig4"),
        note=f"{BANDS} {TABLE} Every algorithm asks the reward 1,152 times.",
    ),
    "ddpo_generalisation": PaperFigure(
        title="Does it carry over to prompts that training never drew?", source="DDPO (arXiv 2305.13301)", draw=ddpo_generalisation,
        experiments=("ddpo_preference",), note="Gain over the base model on the same noises, up to 45 prompts of each kind; 95 % hierarchical bootstrap over seeds, prompts and images.",
        probes=(Ask(question="generalisation", experiment="ddpo_preference", of=lambda c: True),),
    ),
    "k_laws": PaperFigure(
        title="Which steps should keep their gradient?", source="DRaFT (arXiv 2309.17400) against AlignProp (arXiv 2310.03739)", draw=k_laws,
        experiments=("draftp_fig3", "draft_k", "draft_random_k", "draft_lv", "drtune"),
        note=f"{BANDS} {TABLE} All laws share learning rate, images and updates; a backward pass counts as two forward ones. DRaFT-LV asks the reward for two more images a sample.",
    ),
    "fronts": PaperFigure(
        title="Reward and diversity, a curve for each regulariser", source="DRaFT, appendix; Jena et al. (arXiv 2409.06493)", draw=fronts,
        experiments=("draftp_fig3", "trajectory_kl", "reward_cap", "draft_k"),
        note="Points: the last evaluation of the training (8 prompts, 4 noises each), mean over seeds; of the dials, the same evaluation of DRaFT's weights.",
        probes=(Ask(question="dials", experiment="draftp_fig3", of=lambda c: c["kl_coeff"] == 0),),
    ),
    "draft_speed": PaperFigure(
        title="Reward for each image and for each second", source="DRaFT (arXiv 2309.17400), figure 2", draw=draft_speed,
        experiments=(*PREFERENCE, "rwr_preference"), note=f"{BANDS} {TABLE}",
    ),
    "preferences": PaperFigure(
        title="Preference optimisation beside the others", source="Diffusion-DPO (arXiv 2311.12908), whose paper compares with supervised training only",
        draw=preferences, experiments=("draftp_fig3", "ddpo_preference", "rwr_preference", "dpo_offline_preference", "dpo_online_preference"),
        note=f"{BANDS} {TABLE} A backward pass counts as two forward ones. Offline: all images are the base model's, before the first update.",
    ),
    "overoptimisation": PaperFigure(
        title="Long training, with and without the penalty", source="DRaFT (arXiv 2309.17400)", draw=overoptimisation, experiments=("overoptimisation",),
        note=f"{BANDS} Rewards in standard deviations of the base model's images. {TABLE}",
    ),
}  # fmt: skip
