"""Intervals cover what they claim to cover; tests and adjustments agree with their definitions."""

import numpy as np
import pytest
from scipy import stats

from alignlab.metrics.statistics import bootstrap, holm, interquartile_mean, over_seeds, paired_p, win_rate


def world(rng, seeds=5, prompts=30, images=4, seed_sd=1.0, prompt_sd=1.0, image_sd=1.0):
    """Seed, prompt and image effects of known size around a mean of 0, [seeds, prompts, images]."""
    effects = seed_sd * rng.normal(size=(seeds, 1, 1)) + prompt_sd * rng.normal(size=(1, prompts, 1))
    return effects + image_sd * rng.normal(size=(seeds, prompts, images))


@pytest.mark.parametrize(
    ("sizes", "at_most"),
    [
        ({"seeds": 20}, 0.99),
        ({"seeds": 20, "prompt_sd": 0.0}, 0.99),
        ({"seeds": 5, "seed_sd": 0.0}, 0.995),
        ({"seeds": 5, "seed_sd": 0.0, "prompt_sd": 0.0}, 1.0),
    ],
)
def test_coverage(sizes, at_most):
    """The 95 % interval holds the true mean in at least 90 % of 300 worlds, whether seeds, prompts or images
    vary; where images alone do it is too wide, for every level draws their noise again. (A percentile
    bootstrap of a handful of seeds is too short: hence 20.)"""
    rng = np.random.default_rng(0)
    inside = [
        i.low <= 0 <= i.high
        for i in (bootstrap(world(rng, **sizes), resamples=300, seed=k) for k in range(300))
    ]
    assert 0.9 <= np.mean(inside) <= at_most


def test_prompts_do_not_average_out_over_seeds():
    """Every seed sees the same prompts: with prompt effects only, twenty seeds give no narrower interval than
    one."""
    rng = np.random.default_rng(1)
    one = world(rng, seeds=1, seed_sd=0, image_sd=1e-6)
    many = np.repeat(one, 20, axis=0)
    width = [i.high - i.low for i in (bootstrap(one), bootstrap(many))]
    assert width[1] == pytest.approx(width[0], rel=0.1)


def test_seeds_count():
    """A spread between seeds widens the interval though the pooled values are the same."""
    rng = np.random.default_rng(2)
    values = world(rng, seed_sd=2.0)
    pooled = rng.permutation(values.reshape(-1)).reshape(values.shape)
    wide, narrow = bootstrap(values), bootstrap(pooled)
    assert wide.value == pytest.approx(narrow.value) and wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_same_seed_same_interval():
    values = world(np.random.default_rng(3))
    assert bootstrap(values) == bootstrap(values) != bootstrap(values, seed=1)


def test_interquartile_mean():
    """By hand: of 1..8 the middle half is 3..6; two outliers change nothing."""
    assert interquartile_mean(np.arange(1.0, 9.0)) == 4.5
    assert interquartile_mean(np.array([-1e9, 2, 3, 4, 5, 6, 7, 1e9])) == 4.5
    values = np.random.default_rng(0).standard_t(2, size=(1, 20, 5))
    found = bootstrap(values, statistic=interquartile_mean)
    assert found.low < found.value < found.high and found.value == pytest.approx(
        stats.trim_mean(values.ravel(), 0.25)
    )


def test_over_seeds():
    """Student's interval by hand, and no false confidence from one seed."""
    found = over_seeds([1.0, 2.0, 3.0])
    assert found.value == 2 and found.high - 2 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-5)
    assert over_seeds([1.0]).high == float("inf")


def test_win_rate():
    mine, theirs = np.array([[[1.0, 2.0, 3.0, 0.0]]]), np.array([[[0.0, 2.0, 4.0, -1.0]]])
    assert win_rate(mine, theirs).tolist() == [[[1.0, 0.5, 0.0, 1.0]]]


def test_paired_p():
    """scipy's test on the prompts' means; 1 when nothing differs; uniform under the null."""
    rng = np.random.default_rng(4)
    a, b = world(rng), world(rng)
    assert paired_p(a, a) == 1
    assert paired_p(a, b) == pytest.approx(stats.wilcoxon((a - b).mean((0, 2))).pvalue)
    null = [
        paired_p(x, x + rng.normal(size=x.shape)) for x in (world(rng, seeds=1, images=2) for _ in range(400))
    ]
    assert stats.kstest(null, "uniform").pvalue > 0.001
    assert paired_p(a, a + 0.5 + 0.1 * rng.normal(size=a.shape)) < 1e-6


def test_holm():
    """By hand (Holm 1979): 0.01·4, 0.02·3, 0.03·2 raised to the one before, 0.5; in the order given; never
    above 1."""
    assert holm({"a": 0.03, "b": 0.01, "c": 0.5, "d": 0.02}) == pytest.approx(
        {"a": 0.06, "b": 0.04, "c": 0.5, "d": 0.06}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert list(holm({"z": 0.9, "y": 0.1})) == ["z", "y"] and holm({}) == {}
