"""Perceptual distances: the quick Gram form is the naive one, and the distance behaves as one."""

import pytest
import torch

from alignlab.metrics.diversity import ALEXNET, AlexDistance, EmojiDistance, PerceptualDistance
from alignlab.models.emoji_judge import WIDTHS, load_judge


@pytest.fixture(scope="module")
def distance() -> PerceptualDistance:
    return EmojiDistance()


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
    slow = torch.tensor(
        [
            [naive(distance, a, b) if i != j else 0.0 for j, b in enumerate(images)]
            for i, a in enumerate(images)
        ]
    )
    torch.testing.assert_close(fast, slow.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        distance.between(images, images.flip(0)), slow.flip(1).diagonal().float(), rtol=0, atol=1e-6
    )
    pairs = [slow[i, j].item() for i in range(5) for j in range(i + 1, 5)]
    assert distance.mean_pairwise(images) == pytest.approx(sum(pairs) / 10, abs=1e-5)


def test_it_is_a_distance(distance: PerceptualDistance) -> None:
    """Symmetric, zero between equal images, within 0..2, larger for a larger change, and indifferent to the
    images' order."""
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
    """Four feature maps of halving resolution, one logit for each class, frozen, with every training animal
    among the names."""
    judge, names, colours = load_judge()
    maps = judge.features(torch.rand(2, 3, 48, 48))
    assert [tuple(m.shape) for m in maps] == [
        (2, w, s, s) for w, s in zip(WIDTHS, (24, 12, 6, 3), strict=True)
    ]
    name, colour = judge(torch.rand(2, 3, 48, 48))
    assert name.shape == (2, len(names)) and colour.shape == (2, len(colours))
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    assert {"lion", "cat", "hedgehog"} <= set(names) and len(names) >= 45


def test_channels_can_be_weighed(distance: PerceptualDistance) -> None:
    """LPIPS's linear layers: sum_l mean_hw sum_c w_lc (x - y)^2. Weights of 1 / depths change nothing."""
    images, weights = torch.rand(3, 3, 48, 48), [torch.rand(w) for w in WIDTHS]
    slow = torch.zeros(3, 3)
    for k, depth in enumerate(distance.features(images)):
        unit = depth / depth.norm(dim=1, keepdim=True)
        for i in range(3):
            for j in range(3):
                slow[i, j] += ((unit[i] - unit[j]).square() * weights[k].view(-1, 1, 1)).sum(0).mean()
    fast = PerceptualDistance(distance.features, weights=weights, name="t").pairwise(images)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
    alike = PerceptualDistance(distance.features, weights=[torch.full((w,), 0.25) for w in WIDTHS], name="t")
    torch.testing.assert_close(alike.pairwise(images), distance.pairwise(images), rtol=0, atol=1e-6)


def test_alexnet_is_the_lpips_packages(tmp_path, monkeypatch) -> None:
    """Given an AlexNet checkpoint of torchvision's form, all pairs agree with lpips.LPIPS on the same weights
    to 1e-5."""
    import lpips
    from torchvision.models import alexnet

    torch.manual_seed(0)
    network = alexnet(weights=None)
    torch.save(network.state_dict(), tmp_path / ALEXNET)
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    for part in (
        theirs.net.slice1,
        theirs.net.slice2,
        theirs.net.slice3,
        theirs.net.slice4,
        theirs.net.slice5,
    ):
        for number, layer in part.named_children():
            layer.load_state_dict(network.features[int(number)].state_dict())
    images = torch.rand(4, 3, 72, 64)
    with torch.no_grad():
        slow = torch.tensor(
            [[theirs(a[None] * 2 - 1, b[None] * 2 - 1).item() for b in images] for a in images]
        )
    ours = AlexDistance(str(tmp_path / ALEXNET))
    torch.testing.assert_close(ours.pairwise(images), slow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.between(images[:1], images[1:2])[0], slow[0, 1], rtol=1e-5, atol=1e-6)
    assert ours.name == "lpips-alex" and slow[0, 1] > 0
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match=r"alexnet-owt-7be5be79.pth there, or set diversity=emoji"):
        AlexDistance.check()


def test_one_image_has_no_diversity(distance: PerceptualDistance) -> None:
    with pytest.raises(ValueError, match="two at least"):
        distance.mean_pairwise(torch.rand(1, 3, 48, 48))
