"""One resumable training loop for every small model of the world (bf16 autocast, AdamW, cosine decay, EMA
weights)."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from alignlab.files.writing import aside_of


def fit(
    name: str,
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    steps: int,
    lr: float,
    folder: Path,
    weight_decay: float = 0.01,
    warmup: int = 100,
    save_every: int = 250,
    bf16: bool,
    rng: np.random.Generator,
) -> None:
    """Trains `model` in place and leaves its EMA weights in it; goes on from `folder/name.pt` if that exists,
    with the draws that were next.

    Args:
        loss: computes the scalar loss of one training step (it draws its own batch).
        steps: optimiser steps in all.
        folder: where the training state is kept.
        bf16: autocast to bfloat16.
        rng: what `loss` draws from, beside torch's own generators.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: (
            min(1.0, (k + 1) / warmup)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, k / max(1, steps)))))
        ),
    )
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    path, start, average = folder / f"{name}.pt", 0, None
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        ema.load_state_dict(state["ema"])
        start = state["step"]
        torch.set_rng_state(state["torch_rng"].cpu())
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([x.cpu() for x in state["cuda_rng"]])
        rng.bit_generator.state = state["rng"]

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "ema": ema.state_dict(),
            "step": step,
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
            "rng": rng.bit_generator.state,
        }
        with aside_of(path) as aside:
            torch.save(state, aside)

    model.train()
    bar = Progress(
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    began = time.time()
    # On a CPU the flash kernel's backward is a quarter of a U-Net's step; plain matrix products take a third
    # of that.
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with bar, plain:
        task = bar.add_task(name, total=steps, completed=start, note="")
        for k in range(start, steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            ema.step(model.parameters())
            v = value.item()
            average = v if average is None else 0.98 * average + 0.02 * v
            bar.update(task, advance=1, note=f"loss {average:.4f}")
            if (k + 1) % 250 == 0:
                print(
                    f"{name} step {k + 1}/{steps} loss {average:.4f} {time.time() - began:.0f} s", flush=True
                )
            if (k + 1) % save_every == 0 or k + 1 == steps:
                save(k + 1)
    ema.copy_to(model.parameters())
    model.eval()
