"""What became of each variant, with intervals over seeds, prompts and images; and which differences hold."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignlab.compare.finished import Finished, Variant, at_budget, equal_budget, matched_reward
from alignlab.compare.image_table import Images
from alignlab.metrics.statistics import (
    Interval,
    bootstrap,
    holm,
    interquartile_mean,
    over_seeds,
    paired_p,
    win_rate,
)

Values = NDArray[np.float64]
PAIRED = 24
"""Variants of which every pair is compared; of more, each is compared with the best one, for pairs grow with
their square."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one variant. What needs an evaluation is None without one."""

    label: str
    seeds: int
    reward: Interval
    """The training reward, after training."""
    gain: Interval
    """Over the base model."""
    diversity: Interval
    diversity_at_match: Interval | None
    """When the reward that all runs reached was first reached; over seeds."""
    reward_at_budget: Interval
    """At the largest number of images that all runs sampled; over seeds."""
    iqm_gain: Interval | None = None
    win_rate: Interval | None = None
    unseen_gain: Interval | None = None
    vendi: Interval | None = None
    trained: dict[str, Interval] = field(default_factory=dict)
    """Gains of the rewards that were trained on together, each in its own unit; empty if there is one."""
    held_out: dict[str, Interval] = field(default_factory=dict)
    """Gains of the rewards that were not trained on."""
    lpips_to_base: float | None = None
    flags: tuple[str, ...] = ()
    """Signs of reward hacking, with the seed."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Two variants, the first minus the second."""

    first: str
    second: str
    difference: Interval
    """Hierarchical bootstrap of the image-by-image difference; it carries the spread over seeds."""
    p: float
    """Wilcoxon over prompts, adjusted by Holm over all pairs of the table."""


def total(images: Images, base: Images, run: Finished, where: str) -> Values:
    """[prompts, images] of the weighted training reward, normalised as the run did by the base model's
    images."""
    out = np.zeros(())
    for name, reward in run.settings.rewards.items():
        values = images.values(where, name)
        if reward.normalize:
            scale = base.values("train", name)
            values = (values - scale.mean()) / scale.std()
        out = out + reward.weight * values
    return out


def totals(variant: Variant, where: str) -> tuple[Values, Values] | None:
    """The weighted reward of the variant's images and of the base model's, [seeds, prompts, images] each."""
    pairs = [
        (total(r.images, r.base, r, where), total(r.base, r.base, r, where))
        for r in variant.runs
        if r.images and r.base and where in r.images.sets
    ]
    if len(pairs) < len(variant.runs):
        return None
    return np.stack([mine for mine, _ in pairs]), np.stack([base for _, base in pairs])


def evaluated(variants: Sequence[Variant]) -> bool:
    """Whether every run has an evaluation; if one lacks it, all are taken by what training itself
    measured."""
    return all(run.evaluation for variant in variants for run in variant.runs)


def outcomes(variants: Sequence[Variant]) -> list[Outcome]:
    """Of each variant, in their order."""
    _, matched = matched_reward(variants)
    budget, whole = equal_budget(variants, "samples_seen") or 0.0, evaluated(variants)
    return [_outcome(variant, matched[variant.label], budget, whole) for variant in variants]


def base_point(variants: Sequence[Variant]) -> tuple[float, float]:
    """The base model's reward and diversity, measured like the outcomes."""
    run = variants[0].runs[0]
    if evaluated(variants) and run.base:
        return float(total(run.base, run.base, run, "train").mean()), float(
            np.mean([row["lpips"] for row in run.base.prompts])
        )
    return run.summary.base.reward, run.summary.base.diversity


def _outcome(variant: Variant, matched: list[float], budget: float, whole: bool) -> Outcome:
    runs = variant.runs
    common: dict[str, Any] = {
        "label": variant.label,
        "seeds": len(runs),
        "diversity_at_match": over_seeds(matched) if len(matched) == len(runs) else None,
        "reward_at_budget": over_seeds([at_budget(run, "samples_seen", budget) for run in runs]),
        "flags": tuple(f"seed {run.seed}: {flag}" for run in runs for flag in run.flags),
    }
    both = totals(variant, "train")
    spread = variant.spread("lpips")
    if not whole or both is None or spread is None:
        return Outcome(
            reward=over_seeds([run.summary.final.reward for run in runs]),
            gain=over_seeds([run.summary.gain("reward") for run in runs]),
            diversity=over_seeds([run.summary.final.diversity for run in runs]),
            trained=_gains_of_summaries(variant, _trained(variant)),
            held_out=_gains_of_summaries(variant, runs[0].settings.held_out),
            **common,
        )
    mine, base = both
    unseen, vendi, first = totals(variant, "unseen"), variant.spread("vendi"), runs[0]
    assert first.images and first.base and first.evaluation
    return Outcome(
        reward=bootstrap(mine),
        gain=bootstrap(mine - base),
        diversity=bootstrap(spread),
        iqm_gain=bootstrap(mine - base, statistic=interquartile_mean),
        win_rate=bootstrap(win_rate(mine, base)),
        unseen_gain=None if unseen is None else bootstrap(unseen[0] - unseen[1]),
        vendi=None if vendi is None else bootstrap(vendi),
        trained={name: bootstrap(_gain(variant, name)) for name in _trained(variant)},
        held_out={
            name: bootstrap(_gain(variant, name))
            for name in first.evaluation.units
            if name not in first.settings.rewards
        },
        lpips_to_base=float(np.mean([run.evaluation.lpips_to_base for run in runs if run.evaluation])),
        **common,
    )


def _trained(variant: Variant) -> list[str]:
    names = list(variant.runs[0].settings.rewards)
    return names if len(names) > 1 else []


def _gains_of_summaries(variant: Variant, names: Sequence[str]) -> dict[str, Interval]:
    """What training itself measured at its two ends, over seeds."""
    summaries = [run.summary for run in variant.runs]
    ends = [end for summary in summaries for end in (summary.base, summary.final)]
    known = [name for name in names if all(name in end.numbers for end in ends)]
    return {name: over_seeds([summary.gain(name) for summary in summaries]) for name in known}


def _gain(variant: Variant, name: str) -> Values:
    return np.stack(
        [
            r.images.values("train", name) - r.base.values("train", name)
            for r in variant.runs
            if r.images and r.base
        ]
    )


def contrasts(variants: Sequence[Variant]) -> dict[str, list[Contrast]]:
    """Every pair of evaluated variants with equally many seeds, for the training reward and for diversity; of
    more than PAIRED variants, the pairs of the best one."""
    out: dict[str, list[Contrast]] = {}
    if not evaluated(variants):
        return out
    for what in ("reward", "diversity"):
        values = {}
        for variant in variants:
            both = totals(variant, "train")
            outcome = both and both[0] if what == "reward" else variant.spread("lpips")
            if outcome is not None:
                values[variant.label] = outcome
        best = max(values, key=lambda label: float(values[label].mean()), default="")
        wanted = (
            combinations(values, 2)
            if len(values) <= PAIRED
            else ((best, other) for other in values if other != best)
        )
        pairs = [(a, b) for a, b in wanted if values[a].shape == values[b].shape]
        p = holm({f"{a}\0{b}": paired_p(values[a], values[b]) for a, b in pairs})
        out[what] = [
            Contrast(first=a, second=b, difference=bootstrap(values[a] - values[b]), p=p[f"{a}\0{b}"])
            for a, b in pairs
        ]
    return {what: rows for what, rows in out.items() if rows}
