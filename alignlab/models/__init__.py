"""What a model family is. One file each (sd, sdxl, sd3, flux); the yaml wires them, and nothing else knows which one it has."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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
    lora_targets: tuple[str, ...]
    """Default LoRA targets: the attention projections."""

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Conditioning tensors, [B, ...] each."""

    def denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The network's raw output for latents x [M, C, h, w] at timesteps t [M]."""

    def decode(self, x0: Tensor) -> Tensor:
        """Latents to images [M, 3, H, W] in [0, 1], differentiably."""

    def save(self, folder: Path, lora: dict[str, Tensor] | None, config: "LoraConfig | None") -> None:
        """Writes what was learned in the ecosystem's format: a LoRA, or the whole pipeline when lora is None."""

    def read_lora(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A saved LoRA: its weights, and the arguments of `LoRA`."""
