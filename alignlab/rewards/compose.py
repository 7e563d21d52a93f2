"""Several rewards as one: a weighted sum of raw or normalised values. (Ranks and GDPO need the whole epoch:
objectives/advantages.py.)"""

import inspect
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignlab.rewards import AnswersLater, Declared, Reward
from alignlab.rewards.answers import NoNumbers, given, is_own, numbers
from alignlab.rewards.function import Function
from alignlab.rewards.undisturbed import undisturbed


class RewardError(ValueError):
    """A reward returned something that is no reward."""


class NonFinite(RewardError):
    """A reward is infinite or no number for some of a batch's images.

    Args:
        name: of the reward.
        values: [B] what it returned.
        rows: of the images, ascending.
    """

    def __init__(self, name: str, values: Tensor, prompts: Sequence[str], rows: Sequence[int]) -> None:
        self.name, self.values, self.value, self.rows = (
            name,
            values.detach(),
            values[rows[0]].item(),
            tuple(rows),
        )
        many = f"({len(rows)} of {len(prompts)} images)"
        super().__init__(
            f"reward {name} is {self.value} for image {rows[0]} of prompt {prompts[rows[0]]!r} {many}"
        )


class WeightedSum:
    """sum_k weight_k r_k, where a normalised r_k is (r_k - mean_k)/std_k over the base model's evaluation
    images.

    The statistics are constants of the run: the sum stays differentiable and means the same in every epoch
    and run.

    Args:
        rewards, weights: by name.
        normalize: names of the rewards to be normalised; `calibrate` must be called before `combine`.
        group: images of a prompt in a row, which a group-wise reward sees at once.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        normalize: Collection[str] = (),
        *,
        group: int = 1,
    ) -> None:
        unknown = sorted((set(weights) | set(normalize)) ^ set(rewards))
        if unknown:
            raise ValueError(f"rewards and weights name different things: {', '.join(unknown)}")
        self.rewards, self.weights, self.normalize = dict(rewards), dict(weights), set(normalize)
        self.group, self.groupwise = (
            group,
            {name for name, reward in rewards.items() if Declared.by(reward).groupwise},
        )
        self.statistics: dict[str, tuple[float, float]] = {}
        self._reached: set[str] = set()
        """Your own rewards whose gradient was seen to reach the images."""
        self.queries = 0
        """Images scored so far."""

    @property
    def differentiable(self) -> bool:
        return all(r.differentiable for r in self.rewards.values())

    @property
    def unit(self) -> str:
        parts = [
            f"{self.weights[n]:g} x {n} ({'base sd' if n in self.normalize else r.unit})"
            for n, r in self.rewards.items()
        ]
        alone = list(self.rewards.values())
        plain = len(alone) == 1 and set(self.weights.values()) == {1} and not self.normalize
        return alone[0].unit if plain else " + ".join(parts)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The total [B] and each reward [B] in its own unit."""
        raw = self.score(images, prompts)
        return self.combine(raw), raw

    def score(self, images: Tensor, prompts: Sequence[str], group: int | None = None) -> dict[str, Tensor]:
        """Each reward [B] in its own unit, checked. `group` images of a prompt are in a row, those of
        training if it is None."""
        return self.submit(images, prompts, group)()

    @property
    def ahead(self) -> int:
        """Rollouts that may wait for their scores while the next one is sampled (remote.py)."""
        return max((Declared.by(reward).ahead for reward in self.rewards.values()), default=0)

    def submit(
        self, images: Tensor, prompts: Sequence[str], group: int | None = None
    ) -> Callable[[], dict[str, Tensor]]:
        """Asks the rewards that answer later (those with a `submit` of their own) and computes the others;
        what comes back waits for all of them."""
        answer, among = (
            self._submitted(images, prompts),
            self.within_prompts(images, prompts, group or self.group),
        )

        def found() -> dict[str, Tensor]:
            every = {**answer(), **among}
            return {name: every[name] for name in self.rewards}

        return found

    def pointwise(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """[B] of each reward that looks at one image at a time."""
        return self._submitted(images, prompts)()

    def _submitted(self, images: Tensor, prompts: Sequence[str]) -> Callable[[], dict[str, Tensor]]:
        self.queries += len(prompts)
        alone: Any = {name: reward for name, reward in self.rewards.items() if name not in self.groupwise}
        later: dict[str, Any] = {}
        for name, reward in alone.items():
            if isinstance(reward, AnswersLater):
                with _named(name, reward):
                    later[name] = reward.submit(*given(reward, images, prompts))
        immediate = {name: self._asked(name, images, prompts) for name in alone if name not in later}

        def answer(name: str) -> Tensor:
            with _named(name, alone[name]):
                return self._checked(name, later[name].result(), images, prompts)

        return lambda: immediate | {name: answer(name) for name in later}

    def within_prompts(self, images: Tensor, prompts: Sequence[str], group: int) -> dict[str, Tensor]:
        """[B] of each group-wise reward, one call for each `group` images in a row."""
        parts = [slice(k, k + group) for k in range(0, len(prompts), group)]
        for name in sorted(self.groupwise):
            if group < 2 or len(prompts) % group:
                raise RewardError(
                    f"reward {name} compares the images of a prompt with each other, but was given "
                    f"{len(prompts)} images, {group} a prompt; "
                    "2 at least are needed (prompts.per_prompt, evaluation.final_images, images)"
                )
        return {
            name: torch.cat([self._of_group(name, images, prompts, p) for p in parts])
            for name in sorted(self.groupwise)
        }

    def _of_group(self, name: str, images: Tensor, prompts: Sequence[str], rows: slice) -> Tensor:
        try:
            return self._asked(name, images[rows], prompts[rows])
        except NonFinite as error:
            error.rows = tuple(row + rows.start for row in error.rows)  # of all images
            raise

    def _asked(self, name: str, images: Tensor, prompts: Sequence[str]) -> Tensor:
        reward = self.rewards[name]
        if is_own(reward):
            return self._checked(name, reward(images, prompts), images, prompts)
        with _named(name, reward):
            values = self._checked(name, reward(*given(reward, images, prompts)), images, prompts)
            asked = (
                reward.differentiable
                and torch.is_grad_enabled()
                and images.requires_grad
                and name not in self._reached
            )
            reaches = _reaches(values, images) if asked else True
        if not reaches:
            raise RewardError(
                f"reward {name} ({_called(reward)}) says that it is differentiable, but no gradient reaches "
                "the images; compute in torch, without detach(), item() or numpy, or declare "
                "differentiable=false and use algo=ddpo or algo=rwr"
            )
        self._reached |= {name} if asked else set()
        return values

    def _checked(self, name: str, values: Any, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] float32 on the images' device: a copy, for a reward may fill the same buffer at every call.

        Raises:
            RewardError: for what is no row of B finite real numbers.
        """
        must = f"for {len(prompts)} images; it must return a tensor of shape ({len(prompts)},)"
        try:
            scores = numbers(values)
        except NoNumbers as error:
            raise RewardError(f"reward {name} returned {error} {must}") from None
        if scores.shape != (len(prompts),):
            raise RewardError(f"reward {name} returned {tuple(scores.shape)} {must}")
        if not (torch.is_grad_enabled() and self.rewards[name].differentiable):
            scores = scores.detach()
        scores = scores.to(device=images.device, dtype=torch.float32, copy=True)
        bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
        if bad:
            raise NonFinite(name, scores, prompts, bad)
        return scores

    def combine(self, raw: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum [B] of raw rewards."""
        total = torch.zeros_like(next(iter(raw.values())))
        for name, weight in self.weights.items():
            value = raw[name]
            if name in self.normalize:
                if name not in self.statistics:
                    raise RewardError(f"reward {name} is to be normalised, but calibrate() was not called")
                mean, std = self.statistics[name]
                exact = value if value.device.type == "mps" else value.double()  # MPS has no float64
                value = ((exact - mean) / std).to(value)
            total = total + weight * value
        return total

    def calibrate(self, raw: Mapping[str, Tensor]) -> None:
        """Fixes the statistics of the normalised rewards from raw values [n] of the base model."""
        for name in sorted(self.normalize):
            values = raw[name].double()
            if not len(values) or not values.isfinite().all():
                raise RewardError(
                    f"reward {name} is to be normalised, which needs finite values; it was given "
                    f"{values.tolist()[:4]} ..."
                )
            mean, std = values.mean().item(), values.std(correction=0).item()
            if std == 0:
                raise RewardError(
                    f"reward {name} is {mean:g} for all of the base model's images, so it cannot be "
                    f"normalised; set reward.{name}.normalize=false"
                )
            self.statistics[name] = (mean, std)

    def state_dict(self) -> dict[str, Any]:
        return {name: list(pair) for name, pair in self.statistics.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics = {name: (pair[0], pair[1]) for name, pair in state.items()}


@contextmanager
def _named(name: str, reward: Any) -> Iterator[None]:
    """Around a reward's code: whatever it raises becomes a RewardError with its name, but for a lack of
    memory and a Ctrl-C.

    SystemExit is one of these: a reward that calls sys.exit(0) must not end a run as if it were finished.
    """
    try:
        with undisturbed():
            yield
    except (RewardError, torch.OutOfMemoryError, MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:
        text = " ".join(str(error).split())
        said = type(error).__name__ + (f": {text}" if text else "")
        mend = "; a reward returns its values and ends nothing" if isinstance(error, SystemExit) else ""
        raise RewardError(
            f"reward {name} ({_called(reward)}) raised {said}{_where(error, reward)}{mend}"
        ) from error


def _called(reward: Any) -> str:
    """The user's name of it."""
    scorer = reward.function if isinstance(reward, Function) else type(reward)
    return f"{scorer.__module__}.{getattr(scorer, '__qualname__', type(scorer).__qualname__)}"


def _where(error: BaseException, reward: Any) -> str:
    """The last line of the user's own file that was running, in brackets."""
    scorer = reward.function if isinstance(reward, Function) else type(reward)
    try:
        file = inspect.getfile(scorer)
    except (TypeError, OSError):
        return ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}, line {lines[-1]})" if lines else ""


def _reaches(values: Tensor, images: Tensor) -> bool:
    """Whether the images have a gradient of the values."""
    if not values.requires_grad:
        return False
    return torch.autograd.grad(values.sum(), images, retain_graph=True, allow_unused=True)[0] is not None
