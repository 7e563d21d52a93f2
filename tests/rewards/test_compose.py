"""Weighted sums of rewards: scale, order, errors that name the culprit, state."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignlab.rewards import Declared
from alignlab.rewards.compose import RewardError, WeightedSum
from alignlab.rewards.function import Function


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
    """sum_k w_k (r_k - mean_k)/std_k with the base model's mean and standard deviation; raw rewards enter as
    they are."""
    both = WeightedSum({"mean": Mean(), "length": Length()}, {"mean": 2.0, "length": 0.5}, {"length"})
    base = {"mean": torch.rand(50), "length": 3 + 2 * torch.randn(50)}
    both.calibrate(base)
    images = torch.rand(3, 3, 4, 4)
    total, raw = both(images, PROMPTS)
    mean, std = base["length"].mean(), base["length"].std(correction=0)
    torch.testing.assert_close(
        total, 2 * images.mean((1, 2, 3)) + 0.5 * (torch.tensor([5.0, 6.0, 6.0]) - mean) / std
    )
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
        (
            torch.tensor([1.0, float("nan"), 2.0]),
            r"reward odd is nan for image 1 of prompt 'a dog!' \(1 of 3 images\)",
        ),
        (
            torch.tensor([1.0, float("nan"), float("inf")]),
            r"reward odd is nan for image 1 of prompt 'a dog!' \(2 of 3 images\)",
        ),
        (torch.ones(2), r"reward odd returned \(2,\) for 3 images; it must return a tensor of shape \(3,\)"),
        (torch.ones(3, 1), r"reward odd returned \(3, 1\) for 3 images"),
        ({"a": 1.0}, r"reward odd returned dict for 3 images"),
    ],
)
def test_what_is_no_reward(value: object, said: str) -> None:
    """The sentence names the reward, the image, the prompt and what came instead."""
    with pytest.raises(RewardError, match=said):
        WeightedSum({"odd": Wrong(value)}, {"odd": 1.0})(torch.rand(3, 3, 4, 4), PROMPTS)


def test_refusals() -> None:
    """A constant reward cannot be normalised, an uncalibrated one not be combined, weights must name the
    rewards."""
    constant = WeightedSum({"mean": Mean()}, {"mean": 1.0}, {"mean"})
    with pytest.raises(
        RewardError,
        match=r"reward mean is 0.5 for all of the base model's images.*set reward.mean.normalize=false",
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


class Spread:
    """A group-wise reward that keeps what it was shown."""

    differentiable, unit, groupwise = True, "spread", True

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen.append(tuple(prompts))
        means = images.mean((1, 2, 3))
        return (means - means.mean()).abs()


def test_a_groupwise_reward_sees_whole_groups() -> None:
    """One call a group, also where the next group has the same prompt; the values do not depend on how many
    groups come at once."""
    reward, prompts = Spread(), ["a", "a", "a", "a", "b", "b"]
    both = WeightedSum({"spread": reward, "mean": Mean()}, {"spread": 1.0, "mean": 1.0}, group=2)
    images = torch.rand(6, 3, 4, 4)
    _, raw = both(images, prompts)
    assert reward.seen == [("a", "a"), ("a", "a"), ("b", "b")] and list(raw) == ["spread", "mean"]
    parts = [both(images[k : k + 2], prompts[k : k + 2])[1]["spread"] for k in (0, 2, 4)]
    assert torch.equal(raw["spread"], torch.cat(parts)) and both.queries == 12
    assert list(both.pointwise(images, prompts)) == ["mean"]
    wide = both.within_prompts(images, prompts, 3)["spread"]
    assert reward.seen[-2:] == [("a", "a", "a"), ("a", "b", "b")] and not torch.equal(wide, raw["spread"])
    for group, n in ((1, 6), (4, 6)):
        with pytest.raises(
            RewardError,
            match=rf"reward spread compares the images of a prompt.*was given {n} images, {group} a prompt",
        ):
            both.within_prompts(images, prompts, group)


def raises(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return {"known": images}[prompts[0]]


def listed(images: Tensor, prompts: Sequence[str]) -> list[float]:
    return images.detach().mean((1, 2, 3)).tolist()


def stacked(images: Tensor, prompts: Sequence[str]) -> list[Tensor]:
    return [image.mean() for image in images]


@pytest.mark.parametrize(
    "function", [listed, stacked, lambda x, p: np.array(listed(x, p)), lambda x, p: x.mean((1, 2, 3))]
)
def test_a_function_may_return_what_it_likes(function: Callable[..., Any]) -> None:
    """A list, an array, a tensor or a list of tensors of B numbers: the same float32 tensor."""
    images = torch.rand(3, 3, 4, 4)
    mine = WeightedSum({"mine": Function(function, differentiable=False, unit="u")}, {"mine": 1.0})
    found = mine.score(images, PROMPTS)["mine"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, images.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            raises,
            r"reward mine \(tests.rewards.test_compose.raises\) raised KeyError: 'a cat' \(test_compose.py, "
            r"line \d+\)",
        ),
        (lambda x, p: None, "reward mine returned NoneType for 3 images"),
        (lambda x, p: [[1.0], [2.0], [3.0]], r"reward mine returned \(3, 1\) for 3 images"),
        (lambda x, p: [1.0, float("nan"), 2.0], "reward mine is nan for image 1 of prompt 'a dog!'"),
        (lambda x, p: x.mean((1, 2)), r"reward mine returned \(3, 4\) for 3 images"),
    ],
)
def test_errors_of_your_code_name_it(function: Callable[..., Any], said: str) -> None:
    """The function and its line, or what came instead of a reward."""
    with pytest.raises(RewardError, match=said):
        WeightedSum({"mine": Function(function, differentiable=True, unit="u")}, {"mine": 1.0})(
            torch.rand(3, 3, 4, 4), PROMPTS
        )


class Later(Mean):
    """Answers later: fails when it is asked, or when it is waited for."""

    def __init__(self, at: str) -> None:
        self.at = at

    def submit(self, images: Tensor, prompts: Sequence[str]) -> Future[Tensor]:
        if self.at == "submit":
            raise OSError("gone")
        future = Future[Tensor]()
        future.set_exception(OSError("gone"))
        return future


@pytest.mark.parametrize("at", ["submit", "result"])
def test_errors_of_code_that_answers_later_name_it(at: str) -> None:
    with pytest.raises(
        RewardError, match=r"reward mine \(tests.rewards.test_compose.Later\) raised OSError: gone"
    ):
        WeightedSum({"mine": Later(at)}, {"mine": 1.0})(torch.rand(3, 3, 4, 4), PROMPTS)


@pytest.mark.parametrize("function", [listed, lambda x, p: torch.nn.Parameter(torch.ones(len(x)))])
def test_a_gradient_that_does_not_come_is_missed(function: Callable[..., Any]) -> None:
    """Only where it is asked for, and also where the values have a graph that does not begin at the
    images."""
    mine = WeightedSum({"mine": Function(function, differentiable=True, unit="u")}, {"mine": 1.0})
    images = torch.rand(3, 3, 4, 4, requires_grad=True)
    with torch.no_grad():
        mine(images, PROMPTS)
    with pytest.raises(
        RewardError,
        match=r"reward mine \(.*\) says that it is differentiable, but no gradient reaches the images",
    ):
        mine(images, PROMPTS)
    good = WeightedSum({"mine": Function(stacked, differentiable=True, unit="u")}, {"mine": 1.0})
    total, _ = good(images, PROMPTS)
    assert torch.autograd.grad(total.sum(), images)[0].abs().min() > 0


def test_what_a_reward_must_say() -> None:
    """`differentiable` and `unit` have no default, the others do."""
    said = Declared.by(Mean())
    assert (said.needs_prompt, said.input_size, said.licence, said.groupwise) == (
        True,
        None,
        "unstated",
        False,
    )
    silent = type("Silent", (), {"unit": "u"})
    for thing in (silent, silent()):
        with pytest.raises(
            ValueError,
            match="the reward Silent does not say its differentiable; write differentiable = True if",
        ):
            Declared.by(thing)
    silent.differentiable = False
    silent.unit = property(lambda self: "u")
    assert Declared.by(silent()).unit == "u"
    with pytest.raises(ValueError, match="the reward Silent does not say its unit"):
        Declared.by(silent)
