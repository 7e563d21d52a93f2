"""The model being tuned: encode prompts, predict (guidance inside), decode latents, and the frozen reference.

A model family (alignlab/models says what it offers) knows how to load, encode, predict and decode. `Policy` adds what all
families share: LoRA or full fine-tuning, guidance, mixed precision, checkpointing, cached prompt embeddings.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignlab.conditioning import Conditioning
from alignlab.models import Family

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters: W + (alpha/rank) B A, B = 0 at the start."""

    rank: int = 8
    alpha: int = 8
    targets: tuple[str, ...] | None = None
    """Module name endings; None takes the family's attention projections."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"policy.lora.rank={self.rank} must be at least 1; for no LoRA set policy.full=true")


class Policy:
    """A model family with something to train.

    Args:
        family: the pretrained model.
        lora: adapters to train (ignored when full).
        full: train every weight of the denoiser; a frozen copy is kept as the reference.
        precision: of the denoiser's arithmetic. Trained weights, latents and log-probs stay float32.
        checkpointing: recompute activations of steps and decodes that keep gradients: memory flat in K, one more forward.
    """

    def __init__(
        self,
        family: Family,
        *,
        lora: LoRA | None = None,
        full: bool = False,
        precision: Precision = "fp32",
        checkpointing: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        from peft import LoraConfig  # slow to import: the check of a configuration does without
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.family, self.full, self.checkpointing = family, full, checkpointing
        self.device, self.dtype = torch.device(device), DTYPES[precision]
        for module in (*family.frozen, family.denoiser):
            module.requires_grad_(False).eval().to(self.device)
        self._copy: nn.Module | None = None
        self.lora_config: LoraConfig | None = None
        if full:
            self._copy = copy.deepcopy(family.denoiser)  # float32 like what is trained: rounded weights would start at KL > 0
            family.denoiser.requires_grad_(True)
        else:
            lora = lora or LoRA()
            nn.Module.to(family.denoiser, self.dtype)  # diffusers' own warns even of nothing
            targets = list(lora.targets or family.lora_targets)
            self.lora_config = LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, init_lora_weights="gaussian"
            )
            denoiser: Any = family.denoiser  # diffusers models take adapters
            denoiser.add_adapter(self.lora_config)
            for parameter in self.parameters():
                parameter.data = parameter.data.float()
        self._adapters = [m for m in family.denoiser.modules() if isinstance(m, BaseTunerLayer)]
        self._is_reference = False
        self.passes = {"forward": 0, "backward": 0}
        """Of single latents through the denoiser, so far."""
        self._encode = lru_cache(maxsize=4096)(self._encode_one)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.family.latent_shape

    def parameters(self) -> list[nn.Parameter]:
        """The trained weights, float32."""
        return [p for p in self.family.denoiser.parameters() if p.requires_grad]

    # -- what the engine calls

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Cached prompt embeddings, encoded one by one, so that they do not depend on the batch."""
        parts = [self._encode(p) for p in prompts]
        return Conditioning(text={k: torch.cat([part[k] for part in parts]) for k in parts[0]}, null=self._encode(""))

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> dict[str, Tensor]:
        return self.family.encode([prompt])

    def branches(self, x: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """The model's outputs [R, M, C, h, w] float32: conditional, and unconditional when guidance needs it (R = 2).

        Args:
            x: latents [M, C, h, w]; t: timesteps [M]; guidance_scale: 1 runs one branch only.
        """
        text, m = cond.text, len(x)
        if guidance_scale != 1:
            text = {k: torch.cat([v, cond.null[k].expand_as(v)]) for k, v in text.items()}
            x, t = torch.cat([x, x]), torch.cat([t, t])
        run = self._denoise_frozen if self._is_reference else self._denoise
        self.passes["backward"] += len(x) * torch.is_grad_enabled()
        if self.checkpointing and torch.is_grad_enabled():
            out = checkpoint(run, x, t, text, use_reentrant=False)
        else:
            out = run(x, t, text)
        return out.view(-1, m, *out.shape[1:])

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """The guided output [M, C, h, w]."""
        return guide(self.branches(x, t, cond, guidance_scale), guidance_scale)

    def decode(self, x0: Tensor) -> Tensor:
        """Images [M, 3, H, W] in [0, 1], float32, differentiable in the latents."""
        if self.checkpointing and torch.is_grad_enabled() and x0.requires_grad:
            return checkpoint(self.family.decode, x0, use_reentrant=False)
        return self.family.decode(x0)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy is the frozen pretrained model: adapters off, or the copy kept for full fine-tuning."""
        # The flag is set directly: peft's disable_adapters() would also flip requires_grad of the trained weights.
        outside, trained = self._is_reference, self.family.denoiser
        self._is_reference = True
        try:
            if self._copy is not None:
                self.family.denoiser = self._copy
            for layer in self._adapters:
                layer._disable_adapters = True
            yield
        finally:
            self._is_reference, self.family.denoiser = outside, trained
            for layer in self._adapters:
                layer._disable_adapters = outside

    def _denoise_frozen(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        with self.reference():  # a checkpoint recomputes it during backward, when the adapters are on again
            return self._denoise(x, t, text)

    def _denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        self.passes["forward"] += len(x)  # a checkpoint's second one too
        # No weight cache: one filled under no_grad would cut the gradient of float32 weights in the last K steps.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            return self.family.denoise(x, t, text).float()

    # -- what a run saves

    def state_dict(self) -> dict[str, Tensor]:
        if self.full:
            return self.family.denoiser.state_dict()
        from peft.utils import get_peft_model_state_dict

        return get_peft_model_state_dict(self.family.denoiser)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.full:
            self.family.denoiser.load_state_dict(state)
        else:
            from peft.utils import set_peft_model_state_dict

            set_peft_model_state_dict(self.family.denoiser, state)

    def save(self, folder: Path) -> None:
        """Writes what was learned in diffusers' format."""
        self.family.save(folder, None if self.full else self.state_dict(), self.lora_config)


def guide(branches: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, u + w (c - u), from the branches [R, M, C, h, w] of one prediction."""
    if len(branches) == 1:
        return branches[0]
    conditional, unconditional = branches
    return unconditional + guidance_scale * (conditional - unconditional)
