"""The papers' figures, drawn from finished runs: what each needs, and how it is drawn (matplotlib).

A drawing function takes the finished runs by experiment and returns the figure and the rows of its table. It
shows what there is; if that is too little for a drawing it raises a CompareError.
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

from alignlab.compare.charts import COLOURS, GREY
from alignlab.compare.finished import CompareError, Finished, Variant, matched_reward, refuse_unlike, variants
from alignlab.metrics.hacking import z_curves
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
"""Of the runs whose pictures are shown: the last of three."""
SHOWN_KL = 0.03
"""kl_coeff of the run in figure 5."""
MARKERS, LINES = "osD^vP*X", ("-", "--", "-.", ":")
"""Of curves that are told apart without their colours."""
BANDS = (
    "Curves: the evaluations during training (8 prompts, 4 noises each), mean over seeds with its standard "
    "error."
)
TABLE = (
    'Table: gains and "diversity, all prompts" after training on all 45 prompts (2 other noises each); '
    "other diversities from the evaluations; Student's 95 % intervals over seeds. `learns`: a mean gain of "
    "at least 3 standard errors and half a standard deviation of the base model's images."
)


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
        eta = config["sampler"]["eta"]
        few = f", noise in {sum(e > 0 for e in eta)} steps" if isinstance(eta, list) else ""
        return f"DDPO-{algo['estimator'].upper()}{few}"
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


def base_star(axes: Axes, those: Sequence[Variant]) -> None:
    """The base model in the plane of reward and diversity."""
    x, y = (those[0].runs[0].curve(f"eval/{key}")[0] for key in ("reward", "lpips"))
    axes.plot(x, y, "*", color=GREY, ms=12, label="base model")


def unit(those: Sequence[Variant]) -> tuple[str, str]:
    """Axis labels: the reward with its unit, the diversity with the distance that measured it."""
    run = those[0].runs[0]
    name = " + ".join(run.config["reward"])
    return f"{name} ({run.summary['reward_unit']})", f"diversity ({run.summary['diversity_metric']})"


def table(those: Sequence[Variant], *levels: float) -> Rows:
    """What became of each variant: means over seeds with Student's 95 % interval. `matched` is the diversity
    where the curve first reaches `level`, a reward that all of them reached; "diversity at X" where it
    reaches that reward, for variants whose seeds all do."""
    level, matched = matched_reward(those)
    reached = level > those[0].runs[0].curve("eval/reward")[0]
    rows = []
    for v in those:
        finals = [run.summary["final"] for run in v.runs]
        trained = list(v.runs[0].config["reward"])
        held_out = [name for name in v.runs[0].config["eval_rewards"] if name not in trained]
        numbers: dict[str, Interval] = {
            "gain": over_seeds(list(gains(v, "reward").values())),
            **{
                name: over_seeds(list(gains(v, name).values()))
                for name in (trained if len(trained) > 1 else []) + held_out
            },
            "diversity": over_seeds([run.curve("eval/lpips")[-1] for run in v.runs]),
        }
        if all(final["lpips"] is not None for final in finals):
            numbers["diversity, all prompts"] = over_seeds([final["lpips"] for final in finals])
        if reached and len(matched[v.label]) == len(v.runs):
            numbers["matched"] = over_seeds(matched[v.label])
        for x in levels:
            there = [
                at_matched_reward(run.curve("eval/reward"), run.curve("eval/lpips"), x) for run in v.runs
            ]
            if None not in there:
                numbers[f"diversity at {x:g}"] = over_seeds([y for y in there if y is not None])
        rows.append(
            {
                "variant": label(v),
                "seeds": len(v.runs),
                "learns": learns(v),
                **numbers,
                "level": f"{level:.2f}" if reached else None,
                "reward queries": round(v.runs[0].curve("reward_queries")[-1]),
                "minutes": float(np.mean([run.summary["wall_seconds"] for run in v.runs])) / 60,
            }
        )
    return rows


def gains(variant: Variant, reward: str) -> dict[int, float]:
    """Of each seed, over the base model, on all prompts."""
    return {run.seed: run.summary["final"][reward] - run.summary["base"][reward] for run in variant.runs}


def learns(variant: Variant) -> str:
    """Whether it may be said to learn: a mean gain over seeds of at least 3 standard errors, and half a
    standard deviation of the base model's images."""
    values = list(gains(variant, "reward").values())
    if len(values) < 2:
        return "one seed"
    mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))
    return (
        "yes" if mean >= 3 * error and mean >= 0.5 * variant.runs[0].summary["base"]["reward_std"] else "no"
    )


def cost(variant: Variant) -> dict[str, float]:
    return {"passes (thousands)": float(np.mean([passes(run)[-1] for run in variant.runs])) / 1e3}


def base_line(axes: Axes, those: Sequence[Variant], key: str) -> None:
    axes.axhline(those[0].runs[0].curve(key)[0], color=GREY, ls=":", lw=1.4, label="base model")


# -- the figures


def draftp_fig3(runs: Runs) -> tuple[Figure, Rows]:
    """Diversity and reward over training, and against each other, by kl_coeff."""
    kl, ddpo = by_kl(every(runs, "draftp_fig3")) or _nothing(), every(runs, "ddpo_preference")
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


def answer(run: Finished, question: str) -> Any:
    """What its weights said (probes.py); None if they were not asked."""
    path = run.folder / "probes" / question / "answer.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        raise CompareError(
            f"{path} was damaged; remove it, and it is asked again where the weights are"
        ) from None


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
        _nothing()
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
    shown = [(v, run) for v in every(runs) for run in v.runs if strip(run, "varied") is not None]
    variant, run = shown[0] if shown else _nothing()
    prompts = answer(run, "varied")["prompts"]
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 4.7), layout="constrained")
    for cell, who, name in zip(
        axes, ("base", "tuned"), ("base model", f"{label(variant)}, seed {run.seed}"), strict=True
    ):
        picture = strip(run, "varied", who)
        assert picture is not None
        cell.imshow(picture)
        cell.set_title(name)
        cell.set_yticks(
            np.arange(0.5, len(prompts)) * picture.shape[0] / len(prompts),
            prompts if who == "base" else [""] * len(prompts),
        )
        cell.set_xticks([])
        cell.grid(visible=False)
        cell.tick_params(length=0)
        cell.spines[:].set_visible(False)
    return figure, [{"prompt": prompt} for prompt in prompts]


REWARD_NAMES = {
    "jpeg_compressibility": "compressibility",
    "jpeg_incompressibility": "incompressibility",
    "emoji_aesthetic": "aesthetic",
    "clip_blue": "prompt alignment",
}


def by_reward(runs: Runs) -> dict[str, Runs]:
    """{reward: its runs by experiment}, in the order of REWARD_NAMES and then as met."""
    parts: dict[str, Runs] = {name: {} for name in REWARD_NAMES}
    for name, there in runs.items():
        for run in there:
            parts.setdefault(" + ".join(run.config["reward"]), {}).setdefault(name, []).append(run)
    return {name: part for name, part in parts.items() if part}


def ddpo_fig4(runs: Runs) -> tuple[Figure, Rows]:
    """Reward against reward queries: both policy gradients, one with noise in its first steps alone, and both
    regressions, a panel a reward."""
    panels = by_reward(runs)
    figure, axes = plt.subplots(
        1, len(panels) or _nothing(), figsize=(3.6 * len(panels), 3.7), layout="constrained", squeeze=False
    )
    palette = dict(
        zip(("RWR", "RWR-sparse", "DDPO-SF", "DDPO-IS", "DDPO-IS, noise in 2 steps"), COLOURS, strict=False)
    )
    rows: Rows = []
    for cell, (name, part) in zip(axes[0], panels.items(), strict=False):
        those = sorted(
            (v for v in every(part) if label(v) in palette), key=lambda v: list(palette).index(label(v))
        )
        for variant in those:
            curve(cell, variant, "reward_queries", "eval/reward", color=palette[label(variant)])
        base_line(cell, those, "eval/reward")
        cell.set(
            title=f"{REWARD_NAMES.get(name, name)}\n({name})",
            xlabel="reward queries",
            ylabel=those[0].runs[0].summary["reward_unit"],
        )
        rows += [{"reward": name, **row, **cost(v)} for row, v in zip(table(those), those, strict=True)]
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
        asked = [(v, [its for run in v.runs if (its := answer(run, "generalisation"))]) for v in every(part)]
        panels[reward] = [(v, answers) for v, answers in asked if answers]
    panels = {reward: those for reward, those in panels.items() if those}
    figure, axes = plt.subplots(
        1, len(panels) or _nothing(), figsize=(6.2 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    rows: Rows = []
    for cell, (reward, those) in zip(axes[0], panels.items(), strict=True):
        for k, (variant, answers) in enumerate(those):
            gained = {
                name: np.array([np.mean(a[name]["tuned"]) - np.mean(a[name]["base"]) for a in answers])
                for name in SET_NAMES
            }
            for j, (name, words) in enumerate(SET_NAMES.items()):
                x, gain = j + 0.8 * ((k + 0.5) / len(those) - 0.5), over_seeds(gained[name])
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
                        "prompts": f"{words} ({len(answers[0][name]['prompts'])})",
                        "base": float(np.mean(answers[0][name]["base"])),
                        "gain": gain,
                        "gain less that on trained animals": over_seeds(gained[name] - gained["animals_45"])
                        if name != "animals_45"
                        else None,
                    }
                )
        cell.axhline(0, color=GREY, lw=1)
        cell.set_xticks(range(len(SET_NAMES)), [words.replace(" ", "\n", 1) for words in SET_NAMES.values()])
        cell.set(ylabel=f"gain in {reward}\n({those[0][0].runs[0].summary['reward_unit']})")
        cell.legend()
    return figure, rows


def preferences(runs: Runs) -> tuple[Figure, Rows]:
    """Preference optimisation beside reward gradients, policy gradients and regression: for each reward
    query, for each pass, in the plane."""
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
    base_star(axes[3], those)
    axes[3].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, [row | cost(v) for row, v in zip(table(those), those, strict=True)]


def k_laws(runs: Runs) -> tuple[Figure, Rows]:
    """How many and which steps should keep their gradient? At equal images, at equal passes through the
    denoiser, and in the plane."""
    those = [v for v in every(runs) if not v.runs[0].config["kl_coeff"]] or _nothing()
    fixed = sorted(
        (
            v
            for v in those
            if v.runs[0].config["algo"].get("truncation") == "fixed"
            and not v.runs[0].config["algo"]["lv_samples"]
        ),
        key=lambda v: v.runs[0].config["algo"]["k"],
    )
    others = [v for v in those if v not in fixed]
    figure, axes = plt.subplots(1, 3, figsize=(12.4, 3.7), layout="constrained")
    blues = plt.get_cmap("Blues")(np.linspace(1, 0.35, max(2, len(fixed))))  # K = 1 is darkest, and on top
    styled = [
        (v, {"color": c, "zorder": 4 - 0.1 * k}) for k, (v, c) in enumerate(zip(fixed, blues, strict=False))
    ] + [(v, {"color": COLOURS[k + 1], "ls": "--"}) for k, v in enumerate(others)]
    for variant, style in styled:
        curve(axes[0], variant, "samples_seen", "eval/reward", **style)
        curve(axes[1], variant, "passes", "eval/reward", **style)
        plane(axes[2], variant, **style)
    reward, diversity = unit(those)
    axes[0].set(xlabel="images", ylabel=reward)
    axes[1].set(xlabel="passes through the denoiser (thousands)", ylabel=reward)
    base_star(axes[2], those)
    start, top = (
        those[0].runs[0].curve("eval/reward")[0],
        max(v.curves("eval/reward").mean(0).max() for v in those),
    )
    for cell in axes[:2] if top > start else ():  # where the laws can be told apart
        cell.set_ylim(bottom=start + 0.4 * (top - start))
    axes[2].set(xlabel=reward, ylabel=diversity)
    axes[2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    one = next((v for v in fixed if label(v) == "DRaFT-1"), None)
    budget, rows = min(passes(run)[-1] for v in those for run in v.runs), table([*fixed, *others], 7.7)
    for row, v in zip(rows, [*fixed, *others], strict=True):
        for name in ("reward", "lpips"):
            row[f"{name} at equal passes"] = over_seeds(
                [float(np.interp(budget, passes(run), run.curve(f"eval/{name}"))) for run in v.runs]
            )
        if one and v is not one and {run.seed for run in v.runs} & {run.seed for run in one.runs}:
            mine, its = gains(v, "true_preference"), gains(one, "true_preference")
            row["true_preference less DRaFT-1's"] = over_seeds(
                [mine[seed] - its[seed] for seed in mine if seed in its]
            )
    return figure, rows


TOLERANCES = (0.25, 0.5, 1.0, 2.0)


def stop_at(run: Finished, tolerance: float) -> int:
    """The last evaluation before the text-image score, which is not trained on, falls so many standard
    deviations below its best so far."""
    score, sd = run.curve("eval/clip"), run.curve("eval/clip_std")[0]
    held = [j for j in range(len(score)) if score[j] >= max(score[: j + 1]) - tolerance * sd]
    return next((j for j in range(len(score) - 1) if j + 1 not in held), len(score) - 1)


Spot = tuple[str, dict[str, NDArray[np.float64]]]
"""A point of a front: its setting, and reward, hidden rule and diversity of each seed."""
PLANE = ("reward", "true_preference", "lpips")
BASE_END = "base model"


def spot(setting: str, those: Sequence[dict[str, Any]]) -> Spot:
    """From the seeds' lines of metrics, or answers (without "eval/")."""
    return setting, {
        key: np.array([its[key] if key in its else its[f"eval/{key}"] for its in those]) for key in PLANE
    }


def last(variant: Variant) -> list[dict[str, Any]]:
    return [run.evaluations[-1] for run in variant.runs]


def regularisers(runs: Runs) -> dict[str, list[Spot]]:
    """Each with its points in the order of its dial. Those of training are measured at the end; those after
    it on DRaFT's weights."""
    kl = by_kl(every(runs, "draftp_fig3"))
    plain = [v for v in kl if v.runs[0].config["kl_coeff"] == 0]
    caps = sorted(every(runs, "reward_cap"), key=lambda v: v.runs[0].config["algo"]["reward_cap"])
    points = {
        "eps-MSE KL": [spot(f"{v.runs[0].config['kl_coeff']:g}", last(v)) for v in kl],
        "trajectory KL (eta = 1)": [
            spot(f"{v.runs[0].config['kl_coeff']:g}", last(v)) for v in by_kl(every(runs, "trajectory_kl"))
        ],
        "reward cap": [spot(f"{v.runs[0].config['algo']['reward_cap']:g}", last(v)) for v in caps],
        "K": sorted(
            (spot(f"{v.runs[0].config['algo']['k']}", last(v)) for v in [*plain, *every(runs, "draft_k")]),
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
        answered = [(run, its) for run in v.runs if (its := answer(run, "dials"))]
        answers = [its for _, its in answered]
        turned = {
            dial: [
                spot(f"{its[0]['value']:g}", its)
                for its in zip(*answers, strict=False)
                if its[0]["dial"] == dial
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
    its = dict(points.get("eps-MSE KL", ())).get(f"{SHOWN_KL:g}")
    if its is None:
        return []
    rows: Rows = []
    for name, spots in points.items():
        less = []
        for seed, (reward, diversity) in enumerate(zip(its["reward"], its["lpips"], strict=True)):
            front = sorted(
                (p["reward"][seed], p["lpips"][seed])
                for _, p in spots
                if len(p["lpips"]) == len(its["lpips"])
            )
            x, y = [point[0] for point in front], [point[1] for point in front]
            if front and x[0] <= reward <= x[-1]:
                less.append(float(np.interp(reward, x, y)) - diversity)
        if len(less) == len(its["lpips"]) and name != "eps-MSE KL":
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
    """Long training: the learned reward, its hidden rule and another rule in standard deviations of the base
    model's images; diversity."""
    those = by_kl(every(runs))
    figure, axes = plt.subplots(
        1, len(those) + 1, figsize=(4 * (len(those) + 1), 3.5), layout="constrained", squeeze=False
    )
    names = {
        "reward": "learned reward",
        "true_preference": "its hidden rule (true_preference)",
        "true_aesthetic": "another rule (true_aesthetic)",
        "clip": "text-image score",
    }
    for k, variant in enumerate(those):
        cell, x = axes[0][k], variant.curves("step")[0]
        curves = [z_curves(run.evaluations) for run in variant.runs]
        for j, (name, words) in enumerate(names.items()):
            if all(name in c for c in curves):
                band(
                    cell,
                    x,
                    np.array([c[name] for c in curves]),
                    color="black" if j == 0 else COLOURS[j],
                    label=words,
                )
        cell.axhline(0, color=GREY, lw=1)
        cell.set(title=label(variant), xlabel="epoch", ylabel="sd of the base model")
        if k:
            cell.sharey(axes[0][0])
        curve(axes[0][-1], variant, "step", "eval/lpips", color="black", ls=("-", "--")[k % 2])
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
        title="Diversity and reward over training, by the weight of the penalty",
        source="DRaFT+ (NVIDIA's blog), figure 3",
        draw=draftp_fig3,
        experiments=PREFERENCE,
        note=(
            f"{BANDS} {TABLE} An epoch of DRaFT is 16 images and one update, one of DDPO 48 images and four. "
            "Smaller than the blog's: 40 epochs, not 200."
        ),
    ),
    "draftp_fig4": PaperFigure(
        title="One prompt, the same noises down, the models across",
        source="DRaFT+ (NVIDIA's blog), figure 4",
        draw=draftp_fig4,
        experiments=PREFERENCE,
        note='The prompt is "a lion". Not chosen: the first eight noises of the last seed, after 40 epochs (the blog: 200).',
        probes=tuple(Ask(question="lion", experiment=name, of=shown) for name in PREFERENCE),
    ),
    "draftp_fig5": PaperFigure(
        title="Varied prompts, base and tuned, the same noises",
        source="DRaFT+ (NVIDIA's blog), figure 5",
        draw=draftp_fig5,
        experiments=("draftp_fig3",),
        note=(
            'Not chosen: the first four noises of the last seed. Training drew "a cat", and no other of '
            "these prompts. Smaller than the blog's: 40 epochs, not 200."
        ),
        probes=(
            Ask(
                question="varied",
                experiment="draftp_fig3",
                of=lambda c: shown(c) and c["kl_coeff"] == SHOWN_KL,
            ),
        ),
    ),
    "ddpo_fig4": PaperFigure(
        title="Reward against reward queries",
        source="DDPO (arXiv 2305.13301), figure 4",
        draw=ddpo_fig4,
        experiments=("ddpo_fig4", "ddpo_first_steps", "ddpo_sf_fig4", "rwr_fig4"),
        note=f'{BANDS} {TABLE} Every algorithm asks the reward 1,152 times, in its own way of sampling: DDPO in 8 steps with η = 1 ("noise in 2 steps": η = 1 in the first two, which alone are trained on, and 0 in the others) at guidance 3, RWR in 25 steps with η = 0, unguided. Prompt alignment: '
        'the text-image score of each prompt "on a blue background", because the base model already draws '
        "what the bare prompts ask for. Steps: the clipped estimator's is the largest of four that was "
        "stable in tries; the others took their defaults. Smaller than the paper's: it asks up to 50,000 "
        "times, and draws 398 animals for the "
        "JPEG rewards and activities for alignment; here 45 animals for all.",
    ),
    "ddpo_generalisation": PaperFigure(
        title="Does it carry over to prompts that training never drew?",
        source="DDPO (arXiv 2305.13301)",
        draw=ddpo_generalisation,
        experiments=("ddpo_preference", "ddpo_fig4"),
        note="Gain over the base model on the same noises, two images of each prompt (their number in brackets); mean over seeds with Student's 95 % interval, and each seed. `learns`: on the trained "
        "animals, a mean gain of at least 3 standard errors and half a standard deviation of the base "
        "model's images. The preference reward at the default step, 1,920 queries; the aesthetic one at "
        'three times it, 1,152. Animals "doing" something: the base model '
        "knows the animals and not what they do. Smaller than the paper's: it asks up to 50,000 times, and "
        "shows pictures.",
        probes=(
            Ask(question="generalisation", experiment="ddpo_preference", of=lambda c: True),
            Ask(
                question="generalisation",
                experiment="ddpo_fig4",
                of=lambda c: "emoji_aesthetic" in c["reward"],
            ),
        ),
    ),
    "k_laws": PaperFigure(
        title="Which steps should keep their gradient?",
        source="DRaFT (arXiv 2309.17400) against AlignProp (arXiv 2310.03739)",
        draw=k_laws,
        experiments=("draftp_fig3", "draft_k", "draft_random_k", "draft_lv", "drtune"),
        note=(
            f"{BANDS} {TABLE} All laws share learning rate, images and updates; a backward pass counts as "
            "two forward ones. DRaFT-LV asks the reward for two more images a sample. Left and middle are "
            "cut below 40 % of the way up. Smaller than the papers': 20 steps, not 50; 640 images."
        ),
    ),
    "fronts": PaperFigure(
        title="Reward and diversity, a curve for each regulariser",
        source="DRaFT, appendix; Jena et al. (arXiv 2409.06493)",
        draw=fronts,
        experiments=("draftp_fig3", "trajectory_kl", "reward_cap", "draft_k"),
        note="Points: the last evaluation of the training (8 prompts, 4 noises each), mean over seeds with standard errors; of the dials (LoRA scale, annealed guidance), the same evaluation of DRaFT's weights. Beside points on the left their coefficients, "
        "caps, epochs, K. Stopped by the held-out score: at the last evaluation before the text-image score "
        "falls so many standard deviations of the base model's images below its best. Smaller than the "
        "papers': 40 epochs of 16 images, 20 steps. Table: Student's 95 % intervals over seeds.",
        probes=(Ask(question="dials", experiment="draftp_fig3", of=lambda c: c["kl_coeff"] == 0),),
    ),
    "draft_speed": PaperFigure(
        title="Reward for each image and for each second",
        source="DRaFT (arXiv 2309.17400), figure 2",
        draw=draft_speed,
        experiments=(*PREFERENCE, "rwr_preference"),
        note=(
            f"{BANDS} {TABLE} At their defaults: DRaFT samples 20 steps, DDPO 8 with η = 1, both at guidance "
            "3; RWR 25, unguided, sparse weights. Smaller than the paper's: 640 images of DRaFT and 1,920 of "
            "the others, not tens of thousands."
        ),
    ),
    "preferences": PaperFigure(
        title="Preference optimisation beside the others",
        source="Diffusion-DPO (arXiv 2311.12908), whose paper compares with supervised training only",
        draw=preferences,
        experiments=(
            "draftp_fig3",
            "ddpo_preference",
            "rwr_preference",
            "dpo_offline_preference",
            "dpo_online_preference",
        ),
        note=(
            f"{BANDS} {TABLE} A backward pass counts as two forward ones. Offline: all images are the base "
            "model's, before the first update (hence the vertical line at 1,920 queries). Smaller than the "
            "paper's: 1,920 images, not the 851,293 pairs of Pick-a-Pic v2."
        ),
    ),
    "overoptimisation": PaperFigure(
        title="Long training, with and without the penalty",
        source="DRaFT (arXiv 2309.17400)",
        draw=overoptimisation,
        experiments=("overoptimisation",),
        note=(
            f"{BANDS} Rewards in standard deviations of the base model's images; learning rate 6e-3, three "
            f"times the default. Smaller than the paper's: 80 epochs of 16 images. {TABLE}"
        ),
    ),
}
