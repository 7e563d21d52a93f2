"""The same numbers in less time. Each file may be deleted.

The package asks for these functions only, which do without a file that is not there. They import it when they
are called: `spin_shortly` must run before torch is loaded, and most of the files need torch.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")


def _there(*files: str) -> bool:
    return all(find_spec(f"alignlab.fast.{file}") is not None for file in files)


class Sharing(Protocol):
    """What computes the common start of guidance's two branches once."""

    def shared(self, rows: int) -> AbstractContextManager[None]:
        """Inside, the networks' inputs of `rows` rows hold each latent twice."""


class NothingShared:
    """Computes both branches whole."""

    def shared(self, rows: int) -> AbstractContextManager[None]:
        return nullcontext()


def spin_shortly(*, is_command: bool | None = None) -> bool:
    """Lets threads that wait for each other sleep soon. Returns whether it is set (spinning.py)."""
    if not _there("spinning"):
        return False
    from alignlab.fast import spinning

    return spinning.spin_shortly(is_command=is_command)


def keep_freed_memory() -> bool:
    """Keeps memory that a step gives back for the next one. Returns whether it is set (malloc.py)."""
    if not _there("malloc"):
        return False
    from alignlab.fast import malloc

    return malloc.keep_freed_memory()


def freeze(module: M, *, layers: bool = True) -> M:
    """The module itself: no gradients for its weights, no dropout; with `layers` its linear layers and plain
    convolutions are computed faster (frozen_layers.py)."""
    if not _there("frozen_layers"):
        return module.requires_grad_(False).eval()
    from alignlab.fast import frozen_layers

    return frozen_layers.freeze(module, layers=layers)


def as_one_product(layers: Sequence[Any]) -> None:
    """Computes peft's layers with fewer products (lora_product.py, which needs frozen_layers.py)."""
    if not _there("lora_product", "frozen_layers"):
        return
    from alignlab.fast import lora_product

    lora_product.as_one_product(layers)


def shared_start(*networks: "nn.Module") -> Sharing:
    """Computes what guidance's two branches have in common once (shared_prefix.py)."""
    if not _there("shared_prefix"):
        return NothingShared()
    from alignlab.fast import shared_prefix

    return shared_prefix.SharedStart(*networks)
