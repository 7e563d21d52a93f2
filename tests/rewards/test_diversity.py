"""The group-wise reward against plain loops, finite differences and its two extremes."""

import pytest
import torch
import torch.nn.functional as F

from alignlab.rewards.diversity import ClipDiversity


@pytest.fixture(scope="module")
def diversity() -> ClipDiversity:
    return ClipDiversity("emoji_clip")


def pictures(n: int) -> torch.Tensor:
    return F.interpolate(torch.rand(n, 3, 4, 4), (48, 48), mode="bicubic").clamp(0, 1)


def test_it_is_the_mean_distance_to_the_others(diversity: ClipDiversity) -> None:
    """A loop over pairs; the same for every order of the group."""
    images, n = pictures(4), 4
    e = diversity.clip.images(images)
    expected = [
        sum(1 - F.cosine_similarity(e[i], e[j], dim=0) for j in range(n) if j != i) / (n - 1)
        for i in range(n)
    ]
    found = diversity(images, ["a"] * n)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(diversity(images[order], ["a"] * n), found[order], atol=1e-5, rtol=0)


def test_copies_have_none(diversity: ClipDiversity) -> None:
    """0 where all are one picture, and the one that differs has the most."""
    images = pictures(1).repeat(4, 1, 1, 1)
    torch.testing.assert_close(diversity(images, ["a"] * 4), torch.zeros(4), atol=1e-5, rtol=0)
    images[3] = 1 - images[3]
    assert diversity(images, ["a"] * 4).argmax() == 3


def test_gradient(diversity: ClipDiversity) -> None:
    """Of one image's value in the others too, by central differences along a direction, in float64."""
    diversity.clip.model.double()
    images = pictures(3).double().requires_grad_()

    def value(x: torch.Tensor) -> torch.Tensor:
        return diversity(x, ["a"] * 3)[0]

    (gradient,) = torch.autograd.grad(value(images), images)
    for row in (0, 2):
        way, h = torch.zeros_like(images), 1e-4
        way[row] = torch.randn(3, 48, 48)
        with torch.no_grad():
            slope = (value(images + h * way) - value(images - h * way)) / (2 * h)
        assert slope.abs() > 1e-4
        torch.testing.assert_close((gradient * way).sum(), slope, rtol=1e-5, atol=1e-9)
