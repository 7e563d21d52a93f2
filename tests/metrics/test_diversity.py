"""Perceptual distances: the quick Gram form is the naive one, and the distance behaves as one."""

import pytest
import torch

from alignlab.metrics.diversity import PerceptualDistance
from alignlab.metrics.judge import WIDTHS, load_judge


@pytest.fixture(scope="module")
def distance() -> PerceptualDistance:
    return PerceptualDistance()


def naive(distance: PerceptualDistance, a: torch.Tensor, b: torch.Tensor) -> float:
    """LPIPS as its paper writes it, one pair at a time."""
    total = []
    for x, y in zip(distance.features(a[None]), distance.features(b[None]), strict=True):
        x, y = (z.double() / z.double().norm(dim=1, keepdim=True) for z in (x, y))
        total.append((x - y).square().sum(1).mean().item())
    return sum(total) / len(total)


def test_gram_form_is_the_naive_distance(distance: PerceptualDistance) -> None:
    """All pairs at once, to 1e-5; the mean is over the pairs i < j."""
    images = torch.rand(5, 3, 48, 48)
    fast = distance.pairwise(images)
    slow = torch.tensor([[naive(distance, a, b) if i != j else 0.0 for j, b in enumerate(images)] for i, a in enumerate(images)])
    torch.testing.assert_close(fast, slow.float(), rtol=0, atol=1e-5)
    pairs = [slow[i, j].item() for i in range(5) for j in range(i + 1, 5)]
    assert distance.mean_pairwise(images) == pytest.approx(sum(pairs) / 10, abs=1e-5)


def test_it_is_a_distance(distance: PerceptualDistance) -> None:
    """Symmetric, zero between equal images, within 0..2, larger for a larger change, and indifferent to the images' order."""
    image, other = torch.rand(2, 3, 48, 48)
    images = torch.stack([image, image, image + 0.05 * other, other])
    d = distance.pairwise(images)
    assert torch.equal(d, d.T) and d[0, 1] == pytest.approx(0, abs=1e-7)
    assert 0 < d[0, 2] < d[0, 3] <= 2
    assert distance.mean_pairwise(images.flip(0)) == pytest.approx(distance.mean_pairwise(images), rel=1e-6)


def test_any_resolution(distance: PerceptualDistance) -> None:
    """Larger images are resized to the judge's 48 pixels."""
    small = torch.nn.functional.interpolate(torch.rand(3, 3, 6, 6), (48, 48), mode="bilinear")
    large = torch.nn.functional.interpolate(small, (192, 192), mode="bilinear")
    torch.testing.assert_close(distance.pairwise(large), distance.pairwise(small), rtol=0.2, atol=0.01)


def test_judge_shapes() -> None:
    """Four feature maps of halving resolution, one logit for each class, frozen, with every training animal among the names."""
    judge, names, colours = load_judge()
    maps = judge.features(torch.rand(2, 3, 48, 48))
    assert [tuple(m.shape) for m in maps] == [(2, w, s, s) for w, s in zip(WIDTHS, (24, 12, 6, 3), strict=True)]
    name, colour = judge(torch.rand(2, 3, 48, 48))
    assert name.shape == (2, len(names)) and colour.shape == (2, len(colours))
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    assert {"lion", "cat", "hedgehog"} <= set(names) and len(names) >= 45


def test_channels_can_be_weighed(distance: PerceptualDistance) -> None:
    """LPIPS's linear layers: sum_c w_c (x_c - y_c)^2. Weights of 1 change nothing."""
    images, weights = torch.rand(3, 3, 48, 48), [torch.rand(w) for w in WIDTHS]
    slow = torch.zeros(3, 3)
    for k, depth in enumerate(distance.features(images)):
        unit = depth / depth.norm(dim=1, keepdim=True)
        for i in range(3):
            for j in range(3):
                slow[i, j] += ((unit[i] - unit[j]).square() * weights[k].view(-1, 1, 1)).sum(0).mean() / len(WIDTHS)
    torch.testing.assert_close(PerceptualDistance(weights=weights).pairwise(images), slow, rtol=0, atol=1e-5)
    ones = PerceptualDistance(weights=[torch.ones(w) for w in WIDTHS])
    torch.testing.assert_close(ones.pairwise(images), distance.pairwise(images), rtol=0, atol=1e-6)


def test_one_image_has_no_diversity(distance: PerceptualDistance) -> None:
    with pytest.raises(ValueError, match="two at least"):
        distance.mean_pairwise(torch.rand(1, 3, 48, 48))
