"""Weighted sums of rewards: scale, order, errors that name the culprit, state."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from alignlab.rewards.compose import RewardError, WeightedSum


class Mean:
    differentiable, unit, typical_range = True, "mean", (0.0, 1.0)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


class Length:
    differentiable, unit, typical_range = False, "letters", (0.0, 100.0)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(p)) for p in prompts])


class Wrong:
    differentiable, unit, typical_range = False, "", (0.0, 1.0)

    def __init__(self, value: object) -> None:
        self.value = value

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> object:
        return self.value


PROMPTS = ("a cat", "a dog!", "a lion")


def test_weights_and_normalisation() -> None:
    """sum_k w_k (r_k - mean_k)/std_k with the base model's mean and standard deviation; raw rewards enter as they are."""
    both = WeightedSum({"mean": Mean(), "length": Length()}, {"mean": 2.0, "length": 0.5}, {"length"})
    base = {"mean": torch.rand(50), "length": 3 + 2 * torch.randn(50)}
    both.calibrate(base)
    images = torch.rand(3, 3, 4, 4)
    total, raw = both(images, PROMPTS)
    mean, std = base["length"].mean(), base["length"].std(correction=0)
    torch.testing.assert_close(total, 2 * images.mean((1, 2, 3)) + 0.5 * (torch.tensor([5.0, 6.0, 6.0]) - mean) / std)
    assert raw["length"].tolist() == [5, 6, 6]  # each in its own unit
    assert not both.differentiable and WeightedSum({"mean": Mean()}, {"mean": 1}).differentiable
    normalised = both.combine(base) - 2 * base["mean"]
    assert normalised.mean().abs() < 1e-5 and normalised.std(correction=0) == pytest.approx(0.5, rel=1e-5)


def test_statistics_are_constants() -> None:
    """They pass no gradient, survive a checkpoint, and mean the same afterwards."""
    one, other = (WeightedSum({"mean": Mean()}, {"mean": 3.0}, {"mean"}) for _ in range(2))
    one.calibrate({"mean": torch.tensor([0.25, 0.75])})
    other.load_state_dict(one.state_dict())
    images = torch.rand(3, 3, 4, 4, requires_grad=True)
    total, _ = other(images, PROMPTS)
    assert torch.equal(total, one(images, PROMPTS)[0])
    (gradient,) = torch.autograd.grad(total.sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, 3 / 0.25 / 48))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.tensor([1.0, float("nan"), 2.0]), r"reward odd is nan for image 1 of prompt 'a dog!' \(1 of 3 images\)"),
        (torch.tensor([1.0, float("nan"), float("inf")]), r"reward odd is nan for image 1 of prompt 'a dog!' \(2 of 3 images\)"),
        (torch.ones(2), r"reward odd returned \(2,\) for 3 images; it must return a tensor of shape \(3,\)"),
        (torch.ones(3, 1), r"reward odd returned \(3, 1\) for 3 images"),
        ([1.0, 2.0, 3.0], r"reward odd returned list for 3 images"),
    ],
)
def test_what_is_no_reward(value: object, said: str) -> None:
    """The sentence names the reward, the image, the prompt and what came instead."""
    with pytest.raises(RewardError, match=said):
        WeightedSum({"odd": Wrong(value)}, {"odd": 1.0})(torch.rand(3, 3, 4, 4), PROMPTS)


def test_refusals() -> None:
    """A constant reward cannot be normalised, an uncalibrated one not be combined, weights must name the rewards."""
    constant = WeightedSum({"mean": Mean()}, {"mean": 1.0}, {"mean"})
    with pytest.raises(
        RewardError, match=r"reward mean is 0.5 for all of the base model's images.*set reward.mean.normalize=false"
    ):
        constant.calibrate({"mean": torch.full((4,), 0.5)})
    with pytest.raises(RewardError, match="reward mean is to be normalised, which needs finite values"):
        constant.calibrate({"mean": torch.tensor([1.0, float("nan")])})
    with pytest.raises(RewardError, match="calibrate"):
        constant(torch.rand(3, 3, 4, 4), PROMPTS)
    with pytest.raises(ValueError, match="name different things: other"):
        WeightedSum({"mean": Mean()}, {"mean": 1.0, "other": 1.0})


def test_units() -> None:
    """A single raw reward keeps its unit; a sum says what it is made of."""
    assert WeightedSum({"mean": Mean()}, {"mean": 1.0}).unit == "mean"
    assert (
        WeightedSum({"mean": Mean(), "length": Length()}, {"mean": 2.0, "length": 1.0}, {"length"}).unit
        == "2 x mean (mean) + 1 x length (base sd)"
    )
