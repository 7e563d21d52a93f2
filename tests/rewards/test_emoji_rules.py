"""The hidden rules of the embedded world, on scenes whose answer is known."""

import pytest
import torch

from alignlab.rewards.emoji_rules import SIDE, TrueAesthetic, TruePreference, subject


def scene(
    x: float,
    y: float,
    side: float,
    colour: tuple[float, float, float],
    back: tuple[float, float, float],
    tilt: float = 0.0,
):
    """A square of `side` image sides centred at (x, y) image sides from the middle, on a background with a
    linear gradient."""
    line = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    image = torch.tensor(back).view(3, 1, 1) + tilt * (rows + columns)
    inside = ((rows - y).abs() < side / 2) & ((columns - x).abs() < side / 2)
    return torch.where(inside, torch.tensor(colour).view(3, 1, 1), image).clamp(0, 1)


def test_subject_by_hand() -> None:
    """Size, place and contrast of a square are what they were drawn as; a gradient behind it is not the
    subject."""
    red, grey = (0.9, 0.3, 0.3), (0.6, 0.6, 0.6)
    images = torch.stack(
        [scene(0, 0, 0.5, red, grey), scene(0.25, 0, 0.25, red, grey), scene(0, 0, 0.5, red, grey, tilt=0.14)]
    )
    found = subject(images)
    contrast = (0.3**2 + 0.3**2 + 0.3**2) ** 0.5 / 0.9
    torch.testing.assert_close(found.large, torch.tensor([0.5, 0.25, 0.5]) / 0.7, rtol=0.02, atol=0)
    torch.testing.assert_close(found.centred, torch.tensor([1.0, 0.25, 1.0]), rtol=0, atol=0.03)
    torch.testing.assert_close(found.contrast, torch.full((3,), contrast), rtol=0.05, atol=0)


def test_a_subject_may_touch_the_border() -> None:
    """Pixels of the frame that belong to the subject do not spoil the background."""
    found = subject(scene(0.4, 0, 0.4, (0.3, 0.3, 0.3), (0.7, 0.7, 0.7))[None])
    assert found.contrast.item() == pytest.approx(0.4 * 3**0.5 / 0.9, rel=0.03)


def test_an_empty_picture_earns_nothing() -> None:
    """No subject: size, centring and contrast are 0, without a division by zero."""
    found = subject(scene(0, 0, 0, (0, 0, 0), (0.5, 0.5, 0.5), tilt=0.1)[None])
    assert found.large == found.centred == found.contrast == 0


def test_true_preference_adds_up() -> None:
    """2 P(animal) + large + centred + contrast; the word may stand anywhere in the prompt; an unknown one is
    refused by name."""
    rule, image = TruePreference(), scene(0.1, 0.1, 0.4, (0.9, 0.8, 0.2), (0.2, 0.3, 0.8))[None]
    found = subject(image)
    chance = rule.judge(image)[0].softmax(-1)[0, rule.names["lion"]]
    expected = 2 * chance + found.large + found.centred + found.contrast
    for prompt in ("a lion", "Lion, on a red background"):
        torch.testing.assert_close(rule(image, [prompt]), expected)
    with pytest.raises(ValueError, match="'a unicorn' names nothing"):
        rule(image, ["a unicorn"])


def test_true_aesthetic_by_hand() -> None:
    """1 + 3 (colourful + warm + light) of flat pictures; larger images mean the same; it takes no
    gradient."""
    colours = torch.tensor([[0.9, 0.65, 0.4], [0.1, 0.1, 0.6], [1.0, 1.0, 1.0]])
    images = colours[:, :, None, None].expand(-1, -1, SIDE, SIDE).clone().requires_grad_()
    light = lambda c: max(0.0, 1 - abs(0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] - 0.65) / 0.4)  # noqa: E731
    expected = [
        1 + 3 * (min(1, (max(c) - min(c)) / 0.5) + min(1, max(0, (c[0] - c[2] + 0.4) / 0.8)) + light(c))
        for c in colours.tolist()
    ]
    rule = TrueAesthetic()
    assert rule(images, [""] * 3).tolist() == pytest.approx(expected, abs=1e-4)
    assert rule(images.repeat_interleave(4, 2).repeat_interleave(4, 3), [""] * 3).tolist() == pytest.approx(
        expected, abs=1e-3
    )
    assert not rule(images, [""] * 3).requires_grad and not rule.differentiable
