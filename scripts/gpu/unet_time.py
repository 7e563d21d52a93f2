"""How long the device is inside the U-Net, forward and backward, by hooks and the device's own events.

A backward pass begins where the gradient reaches the U-Net's output and ends where it reaches the output of
its first adapter: what lies below is not differentiated when the latent is a constant. A checkpoint's
recomputation happens in between, and is part of it.
"""

import time
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class UNetTime:
    """A context manager around what is measured; `seconds` afterwards.

    Args:
        unet: with adapters.
        device: of its weights.
        inside: False takes the whole time alone; hooks would be compiled into a compiled U-Net, clock and
            all.
    """

    def __init__(self, unet: nn.Module, device: torch.device, *, inside: bool = True) -> None:
        self.device, self.spans = device, {"forward": [], "backward": []}  # type: dict[str, list[tuple[Any, Any]]]
        self.within: Any = None
        """Where the present backward pass began; None outside of one."""
        first = next(m for m in unet.modules() if isinstance(m, BaseTunerLayer))
        hooked = [
            (unet.register_forward_pre_hook, self._enter),
            (unet.register_forward_hook, self._leave),
            (first.register_forward_hook, self._reach),
        ]
        self.hooks = [register(hook) for register, hook in hooked] if inside else []

    def now(self) -> Any:
        """A point on the device's own time line."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a: Any, b: Any) -> float:
        """Seconds; of finished work."""
        return b - a if self.device.type != "cuda" else a.elapsed_time(b) / 1000

    def __enter__(self) -> "UNetTime":
        self.began = self.now()
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        ended = self.now()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.total = self.between(self.began, ended)

    def seconds(self) -> dict[str, float]:
        """Of all, and inside the U-Net: forward, and backward with recomputation."""
        return {"total": self.total} | {
            kind: sum(self.between(a, b) for a, b in spans) for kind, spans in self.spans.items()
        }

    def _enter(self, unet: nn.Module, arguments: Any) -> None:
        self.entered = self.now()

    def _leave(self, unet: nn.Module, arguments: Any, out: tuple[Tensor, ...]) -> None:
        if self.within is None:  # else a checkpoint recomputes
            self.spans["forward"].append((self.entered, self.now()))
            if out[0].requires_grad:
                out[0].register_hook(self._begin)

    def _begin(self, gradient: Tensor) -> None:
        self.within = self.now()

    def _reach(self, adapter: nn.Module, arguments: Any, out: Tensor) -> None:
        if self.within is None and out.requires_grad:
            out.register_hook(self._end)

    def _end(self, gradient: Tensor) -> None:
        self.spans["backward"].append((self.within, self.now()))
        self.within = None
