"""What a model family is. One file each (sd, sdxl, sd3, flux); the yaml wires them, and nothing else knows
which one it has."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import LoraConfig  # slow to import


class Family(Protocol):
    """What a model family offers. All tensors are float32 at this border."""

    scheduler: Any
    """The diffusers scheduler it was trained with."""
    denoiser: nn.Module
    """The network that is tuned."""
    frozen: tuple[nn.Module, ...]
    """The rest (text encoders, VAE)."""
    text_encoders: tuple[nn.Module, ...]
    """Those of them that `encode` needs."""
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    """Height and width in pixels of what `decode` makes of such latents."""
    lora_targets: tuple[str, ...]
    """Default LoRA targets: the attention projections."""

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning tensors, [B, ...] each."""

    def denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The network's raw output for latents x [M, C, h, w] at timesteps t [M]."""

    def decode(self, x0: Tensor) -> Tensor:
        """Latents to images [M, 3, H, W] in [0, 1], differentiably."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Images [M, 3, H, W] in [0, 1] to latents [M, C, h, w], the mode of the VAE's posterior."""

    def save(self, folder: Path, lora: dict[str, Tensor] | None, config: "LoraConfig | None") -> None:
        """Writes what was learned in the ecosystem's format: a LoRA, or the whole pipeline when lora is
        None."""

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A saved LoRA, a folder or a file: its weights, and the arguments of `LoRA`. A ValueError if there
        is none."""

    def save_kohya(self, file: Path, lora: dict[str, Tensor], alpha: float) -> None:
        """Writes a LoRA as one file in kohya's format. A ValueError if that has no place for it."""

    def read_full(self, folder: Path) -> dict[str, Tensor]:
        """The tuned network's weights in a saved pipeline, float32. A ValueError if there are none."""


# -- what a family may offer too


@runtime_checkable
class CutsPrompts(Protocol):
    """A family that knows which prompts are too long for it; of another one no warning is given."""

    def cut(self, prompts: Sequence[str]) -> list[str]:
        """The prompts whose ends its tokenizers do not read."""


@runtime_checkable
class OfProcess(Protocol):
    """A family (its class says so) that knows which process it was trained on; another one may be drawn from
    by any sampler."""

    rectified_flow: bool
    """True for a rectified flow, false for a diffusion."""


@runtime_checkable
class OfPipeline(Protocol):
    """A family (its class says so) whose base model is a pipeline of diffusers; of another one the model card
    says `DiffusionPipeline`."""

    pipeline: str
    """The name of diffusers' class."""
