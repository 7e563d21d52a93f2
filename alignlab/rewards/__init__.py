"""What a reward is, and what it says of itself. One file a reward; torch and libraries only."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from concurrent.futures import Future


class Reward(Protocol):
    """A score of images, larger is better; what is published as smaller-better is negated. Attributes of the
    class, which a constructor may refine, say the rest. Of these `differentiable` and `unit` cannot be
    guessed; `Declared` has the others' defaults.
    """

    differentiable: bool
    """Whether gradients reach the images."""
    needs_prompt: bool
    """Whether the prompt matters."""
    unit: str
    """The published raw unit."""
    typical_range: tuple[float, float]
    input_size: int | None
    """Side in pixels of what the scorer sees; None for any."""
    licence: str
    """Of the weights; "none needed" for formulas."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B] float32 from images [B, 3, H, W] float32 in [0, 1] and their prompts."""


# -- what a reward may offer too; its class may also have a `check` (config/build.py)


@runtime_checkable
class AnswersLater(Protocol):
    """A reward that may also be asked without waiting for its answer, because it is computed elsewhere."""

    def submit(self, images: Tensor, prompts: Sequence[str]) -> "Future[Tensor]":
        """The scores [B], when they are there, or the error."""


@runtime_checkable
class OnServer(Protocol):
    """A reward that a server computes: its own arguments do not say what is measured."""

    held: str
    """The name of the reward that the server holds."""
    digest: str
    """Of that reward and its arguments; another one is another reward."""


@runtime_checkable
class SaysWhatIsMissing(Protocol):
    """A class of rewards that knows which of its weights are not on this machine; of another one the hub's
    cache is looked at."""

    def missing(self, **arguments: Any) -> Iterable[str]:
        """What is missing with these arguments of the constructor, and how to fetch it."""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a reward says of itself, with defaults for what it leaves out."""

    differentiable: bool
    unit: str
    needs_prompt: bool = True
    typical_range: tuple[float, float] | None = None
    input_size: int | None = None
    licence: str = "unstated"
    groupwise: bool = False
    """Whether it is called with all images of one prompt at once, one prompt a call, and scores each among
    the others."""
    ahead: int = 0
    """Rollouts that may wait for their scores while the next one is sampled, if it answers later."""

    @classmethod
    def by(cls, reward: Any) -> "Declared":
        """That of a reward, or of its class.

        Raises:
            ValueError: if `differentiable` or `unit` is missing, or is no bool and no text.
        """
        said = {f.name: getattr(reward, f.name) for f in fields(cls) if hasattr(reward, f.name)}
        for key, kind, mend in (
            ("differentiable", bool, "differentiable = True if gradients reach the images, else False"),
            ("unit", str, 'unit = "points", or whatever it counts'),
        ):
            if not isinstance(said.get(key), kind):
                name = reward.__name__ if isinstance(reward, type) else type(reward).__name__
                raise ValueError(f"the reward {name} does not say its {key}; write {mend}, in the class")
        return cls(**said)
