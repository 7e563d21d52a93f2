"""What may be claimed from a few seeds: intervals that carry the seeds, robust means, paired tests.

Values are arrays [seeds, prompts, images]: every seed's model draws the same prompts from the same noises, so
differences between models are taken image by image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]
Statistic = Callable[[Values], Values]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its percentile interval."""

    value: float
    low: float
    high: float


def mean(values: Values) -> Values:
    """Over the last axis."""
    return values.mean(-1)


def interquartile_mean(values: Values) -> Values:
    """Of the middle half, over the last axis (Agarwal et al. 2021, arXiv 2108.13264)."""
    return np.asarray(stats.trim_mean(values, 0.25, axis=-1))


def bootstrap(
    values: Values, *, statistic: Statistic = mean, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Hierarchical bootstrap: seeds, prompts and images are drawn anew, each within the one above.

    The prompts are drawn once for all seeds of a resample, because all seeds were asked the same ones: their
    difficulty does not average out over seeds. With a single seed the interval says nothing of the spread
    between seeds; with three it is short, as any bootstrap of three; where only images vary it is wide, for
    each level draws their noise again.

    Args:
        values: [seeds, prompts, images]; for the difference of two models, the difference image by image.
    """
    rng, (s, p, i) = np.random.default_rng(seed), values.shape
    drawn = np.empty(resamples)
    chunk = max(1, 2_000_000 // values.size)  # some 16 MB at once
    for k in range(0, resamples, chunk):
        r = min(chunk, resamples - k)
        seeds = rng.integers(s, size=(r, s, 1, 1))
        prompts = rng.integers(p, size=(r, 1, p, 1))
        images = rng.integers(i, size=(r, s, p, i))
        drawn[k : k + r] = statistic(values[seeds, prompts, images].reshape(r, -1))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=float(statistic(values.reshape(-1))), low=float(low), high=float(high))


def over_seeds(values: Sequence[float] | Values, *, level: float = 0.95) -> Interval:
    """The mean of one number a seed, with Student's interval; of infinite width for a single seed."""
    v = np.asarray(values, dtype=float)
    if len(v) < 2:
        return Interval(value=float(v.mean()), low=float("-inf"), high=float("inf"))
    half = float(stats.t.ppf((1 + level) / 2, len(v) - 1) * v.std(ddof=1) / np.sqrt(len(v)))
    return Interval(value=float(v.mean()), low=float(v.mean()) - half, high=float(v.mean()) + half)


def win_rate(mine: Values, theirs: Values) -> Values:
    """1 where mine is larger, 0 where it is smaller, 0.5 where they tie; image by image."""
    return (mine > theirs) + 0.5 * (mine == theirs)


def paired_p(mine: Values, theirs: Values) -> float:
    """Wilcoxon's signed-rank test, two-sided, on the prompts' mean differences over seeds and images.

    It asks whether the difference holds over prompts, given these seeds; whether it holds over seeds, the
    bootstrap tells.
    """
    difference = (mine.mean((0, 2)) - theirs.mean((0, 2))).round(12)
    return float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment of a family of p-values (Holm 1979): reject where the adjusted value is
    below the level."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}
