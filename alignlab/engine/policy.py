"""The model being tuned: encode prompts, predict (guidance inside), decode latents, and the frozen reference.

A model family (alignlab/models says what it offers) knows how to load, encode, predict and decode. `Policy`
adds what all families share: guidance, mixed precision, checkpointing, cached prompt embeddings, and what
placement.py does: LoRA or full fine-tuning on some device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignlab.distributed import sharding
from alignlab.distributed.ranks import rank, world
from alignlab.engine.conditioning import Conditioning
from alignlab.engine.placement import lay_out, make_trainable, place
from alignlab.fast import shared_start
from alignlab.models import Family
from alignlab.models.lora import LoRA, adapters, load_lora_state, lora_state, switch

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Policy:
    """Holds a model family and trains a part of it: LoRA adapters, or all weights of the denoiser.

    Args:
        family: the pretrained model.
        lora: adapters to train (ignored when full).
        full: train every weight of the denoiser; a frozen copy is kept as the reference.
        precision: of the denoiser's arithmetic. Trained weights, latents and log-probs stay float32.
        checkpointing: recompute activations of steps and decodes that keep gradients: memory flat in K, one
            more forward.
        decode_batch: images decoded at once; None for all of them. With checkpointing a decoder's memory is
            that of so many images. [images]
        text_on_host: text encoders leave the device between prompts that are new; cached embeddings stay in
            host memory.
        channels_last: convolution weights in that layout; in fp32 on a CPU, where it is faster, they are so
            in any case.
        shard: split the weights of full fine-tuning over the processes that train together (sharding.py).
        compile: the denoiser by torch.compile.
    """

    def __init__(
        self,
        family: Family,
        *,
        lora: LoRA | None = None,
        full: bool = False,
        precision: Precision = "fp32",
        checkpointing: bool = True,
        decode_batch: int | None = None,
        text_on_host: bool = False,
        channels_last: bool = False,
        shard: bool = False,
        compile: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        if decode_batch is not None and decode_batch < 1:
            raise ValueError(
                f"policy.decode_batch={decode_batch} must be at least 1; null decodes all images at once"
            )
        self.family, self.full, self.checkpointing = family, full, checkpointing
        self.decode_batch, self.text_on_host = decode_batch, text_on_host
        self.sharded = shard and full and world() > 1
        self.device, self.dtype = torch.device(device), DTYPES[precision]
        place(family, self.device, full=full, text_on_host=text_on_host, sharded=self.sharded)
        self._copy, self.lora_config = make_trainable(family, lora=lora, full=full, dtype=self.dtype)
        networks = [family.denoiser] if self._copy is None else [family.denoiser, self._copy]
        faster = self.device.type == "cpu" and precision == "fp32" and not self.sharded
        lay_out(
            family,
            networks,
            self.device,
            channels_last=channels_last or faster,
            compile=compile,
            sharded=self.sharded,
        )
        self._adapters = adapters(family.denoiser)
        self.shared_start = shared_start(*networks)
        self._is_reference = False
        self.passes = {"forward": 0, "backward": 0}
        """Counts the latents that passed the denoiser so far; a guided prediction counts twice."""
        self._encode = lru_cache(maxsize=4096)(self._encode_one)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.family.latent_shape

    def parameters(self) -> list[nn.Parameter]:
        """The trained weights, float32."""
        return [p for p in self.family.denoiser.parameters() if p.requires_grad]

    # -- what the engine calls

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes prompts, with a cache. One by one, so that no embedding depends on a batch."""
        parts = [self._encode(p) for p in (*prompts, "")]
        self._place_text(torch.device("cpu") if self.text_on_host else self.device)
        *text, null = [{k: v.to(self.device) for k, v in part.items()} for part in parts]
        return Conditioning(text={k: torch.cat([part[k] for part in text]) for k in null}, null=null)

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> dict[str, Tensor]:
        self._place_text(self.device)
        text = self.family.encode([prompt])
        return {k: v.cpu() for k, v in text.items()} if self.text_on_host else text

    def _place_text(self, device: torch.device) -> None:
        for encoder in self.family.text_encoders:
            nn.Module.to(encoder, device)

    def branches(self, x: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """Runs the denoiser without mixing its branches.

        Args:
            x: latents [M, C, h, w].
            t: timesteps [M].
            guidance_scale: 1 runs the conditional branch only.

        Returns:
            [R, M, C, h, w] float32: the conditional branch, and the unconditional one if guidance needs it.
        """
        text, m = cond.text, len(x)
        guided = guidance_scale != 1
        if guided:
            x, t, text = torch.cat([x, x]), torch.cat([t, t]), cond.guided
        run = self._denoise_frozen if self._is_reference else self._denoise
        self.passes["backward"] += len(x) * torch.is_grad_enabled()
        again = self.checkpointing and torch.is_grad_enabled()
        out = checkpoint(run, x, t, text, guided, use_reentrant=False) if again else run(x, t, text, guided)
        return out.view(-1, m, *out.shape[1:])

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """Predicts with guidance, [M, C, h, w] float32."""
        return guide(self.branches(x, t, cond, guidance_scale), guidance_scale)

    def decode(self, x0: Tensor) -> Tensor:
        """Decodes latents [M, C, h, w] to images [M, 3, H, W] in [0, 1], float32, differentiably."""
        again = self.checkpointing and torch.is_grad_enabled() and x0.requires_grad
        run = partial(checkpoint, self.family.decode, use_reentrant=False) if again else self.family.decode
        return torch.cat([run(part) for part in x0.split(self.decode_batch or len(x0))])

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Makes the policy the frozen pretrained model inside of a `with`.

        A LoRA's adapters are switched off; after full fine-tuning the copy that was kept takes the denoiser's
        place.
        """
        outside, trained = self._is_reference, self.family.denoiser
        self._is_reference = True
        try:
            if self._copy is not None:
                self.family.denoiser = self._copy
            switch(self._adapters, off=True)
            yield
        finally:
            self._is_reference, self.family.denoiser = outside, trained
            switch(self._adapters, off=outside)

    def _denoise_frozen(self, x: Tensor, t: Tensor, text: dict[str, Tensor], guided: bool) -> Tensor:
        # Checkpointing runs this again during the backward pass, when the adapters are switched on again.
        with self.reference():
            return self._denoise(x, t, text, guided)

    def _denoise(self, x: Tensor, t: Tensor, text: dict[str, Tensor], guided: bool) -> Tensor:
        self.passes["forward"] += len(x)  # counted again where checkpointing recomputes
        # Autocast's weight cache is off: filled under no_grad, it would cut the gradient of float32 weights
        # in the last K steps.
        cast = torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False
        )
        with self.shared_start.shared(rows=len(x) * guided), cast:
            return self.family.denoise(x, t, text).float()

    # -- what a run saves

    def state_dict(self) -> dict[str, Tensor]:
        if self.sharded:
            return sharding.whole_state(self.family.denoiser)
        return self.family.denoiser.state_dict() if self.full else lora_state(self.family.denoiser)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.sharded:
            sharding.load_whole_state(self.family.denoiser, state)
        elif self.full:
            self.family.denoiser.load_state_dict(state)
        else:
            load_lora_state(self.family.denoiser, state)

    def save(self, folder: Path) -> None:
        """Writes what was learned in diffusers' format; process 0 does."""
        trained = self.family.denoiser
        if self.sharded:
            self.family.denoiser = sharding.unsharded(trained)
        if rank() == 0:
            self.family.save(folder, None if self.full else self.state_dict(), self.lora_config)
        self.family.denoiser = trained


def guide(branches: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, u + w (c - u), from the branches [R, M, C, h, w] of one prediction."""
    if len(branches) == 1:
        return branches[0]
    conditional, unconditional = branches
    return unconditional + guidance_scale * (conditional - unconditional)
