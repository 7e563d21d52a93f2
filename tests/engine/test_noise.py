"""Every draw is a function of its key alone."""

import itertools
from dataclasses import replace

import pytest
import torch
from scipy import stats

from alignlab.engine.noise import FIRST, NoiseKey, noise_key


def one(seed=0, stream="train", epoch=0, prompt="a cat", replica=0) -> NoiseKey:
    return NoiseKey(seed=seed, stream=stream, epoch=epoch, prompts=(prompt,), replicas=(replica,))


def test_rows_do_not_depend_on_the_batch():
    """A row is bit-equal alone, in any order and in any batch, and when drawn again."""
    key = noise_key(["a", "b", "a", "c", "b"], seed=3, stream="train", epoch=7)
    whole = key.normal(2, (4, 3, 3))
    assert whole.shape == (5, 4, 3, 3) and whole.dtype == torch.float32
    for rows in ([4, 0, 2], [1], [3, 2, 1, 0]):
        assert torch.equal(key[rows].normal(2, (4, 3, 3)), whole[rows])


def test_equal_prompts_are_numbered():
    """Equal prompts of one epoch get different noise, numbered in order, so that prompts added behind change
    nothing before."""
    key = noise_key(["a", "b", "a", "a"], seed=0, stream="train")
    assert key.replicas == (0, 0, 1, 2)
    assert torch.equal(
        noise_key(["a", "b"], seed=0, stream="train").normal(0, (9,)), key[[0, 1]].normal(0, (9,))
    )


def test_a_shared_beginning():
    """x_T of a prompt's images is that of replica 0, in any batch; all later draws are each image's own."""
    key = noise_key(["a", "b", "a", "a"], seed=0, stream="train", shared_first=True)
    usual, first = noise_key(["a", "b", "a", "a"], seed=0, stream="train"), key.normal(FIRST, (9,))
    assert torch.equal(first, usual.normal(FIRST, (9,))[[0, 1, 0, 0]]) and torch.equal(
        key[[3]].normal(FIRST, (9,)), first[[0]]
    )
    assert torch.equal(key.normal(0, (9,)), usual.normal(0, (9,)))


def test_no_collisions():
    """Over a grid of seeds, streams, epochs, prompts (numbers and prefixes among them), replicas and steps
    all draws differ."""
    grid = itertools.product(
        (0, 1, 11),
        ("train", "eval", "train/rwr"),
        (0, 1, 11),
        ("a", "a1", "1", ""),
        (0, 1, 11),
        (FIRST, 0, 1, 11),
    )
    draws = torch.cat([one(*fields).normal(step, (2,)) for *fields, step in grid])
    assert len(draws) == 3 * 3 * 3 * 4 * 3 * 4 and len(torch.unique(draws[:, 0])) == len(draws)


@pytest.mark.parametrize(
    "field", [{"seed": 1}, {"stream": "eval"}, {"epoch": 1}, {"prompts": ("a dog",)}, {"replicas": (1,)}]
)
def test_every_field_matters(field):
    """Changing one field gives draws uncorrelated with the old ones (4 standard errors)."""
    n = 10_000
    a, b = one().normal(0, (n,))[0], replace(one(), **field).normal(0, (n,))[0]
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4 / n**0.5


def test_standard_normal():
    """Within a row, and across keys that differ in one number, draws are standard normal (Kolmogorov-Smirnov,
    moments)."""
    within = one().normal(0, (50_000,))[0]
    across = torch.cat([noise_key(["p"] * 500, seed=0, stream="s", epoch=e).normal(0, ()) for e in range(20)])
    for draws in (within, across):
        z = draws.double()
        assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
        for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs(float((z**power).mean()) - moment) < 4 * (variance / len(z)) ** 0.5
