"""Saves the samples of an interrupted epoch, so that a resumed run does not draw them again.

If the reward fails or a signal comes before the first update of an epoch, the checkpoint of the epoch before
is written, and the rollouts sampled so far go to RUN/collected/epoch_*/. On resume they are reused if weights
and noise match, which makes the result bit-identical to that of an uninterrupted run. Rollouts that carry a
graph (DRaFT) cannot be saved; the resumed run samples them again.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from alignlab.distributed.ranks import gathered, rank, wait
from alignlab.engine.noise import NoiseKey
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import Rollout, rollout
from alignlab.engine.samplers import Sampler
from alignlab.files.checksums import digest_of
from alignlab.files.safe_folder import RunError
from alignlab.files.writing import aside_of
from alignlab.objectives import Objective
from alignlab.rewards.compose import RewardError
from alignlab.training.signals import Stopped, leave_if_asked

TENSORS = ("latents", "log_probs", "images")


class Collected:
    """Samples the rollouts of an epoch, and saves them if the epoch is interrupted.

    Args:
        folder: RUN/collected; None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.untouched = True
        """True until the epoch changes the weights or the optimiser."""
        self._home: Path | None = None
        self._found = False
        self._digest = ""
        self._held: dict[int, tuple[Rollout, int]] = {}
        """The rollouts of this epoch by their first row, each with the forward passes it took."""

    @contextmanager
    def epoch(
        self, number: int, policy: Policy, objective: Objective, save: Callable[[int], None]
    ) -> Iterator[None]:
        """Surrounds one epoch: saves its samples, and the state before it, if it is interrupted.

        Args:
            number: the epoch, counted from 1.
            save: writes a checkpoint; it is called with the number of the epoch before.
        """
        plain = self.folder is not None and not objective.needs_gradient
        self._home = self.folder / f"epoch_{number:06d}" if self.folder is not None and plain else None
        self._found = self._home is not None and all(gathered(self._home.is_dir()))
        self._held, self._digest, self.untouched, before = {}, "", True, _as_it_is(objective.state_dict())
        try:
            yield
        except (Stopped, RewardError):
            if self.untouched:
                self._keep(policy)
                objective.load_state_dict(before)
                try:
                    save(number - 1)
                except RunError as error:  # a warning only: the user must see what interrupted the epoch
                    print(f"warning: {error}")
                wait()  # when one process ends, its launcher ends the others, so all must have saved
            raise
        finally:
            self._held = {}
        if self._found and self._home is not None and rank() == 0:
            shutil.rmtree(self._home, ignore_errors=True)

    def rollout(self, row: int, policy: Policy, sampler: Sampler, noise: NoiseKey, **how: Any) -> Rollout:
        """Samples the rollout that begins at this row of the epoch, or reads the one that was saved.

        Raises:
            Stopped: if the run is to end here.
        """
        leave_if_asked()
        if self._home is None:
            return rollout(policy, sampler, noise, **how)
        kept = (
            self._read(self._home / f"rows_{row:06d}.safetensors", policy, sampler, noise)
            if self._found
            else None
        )
        # A split model runs on all processes at once, so if one must sample, all do.
        if self._found and not all(gathered(kept is not None)):
            kept = None
        if kept is None:
            before = policy.passes["forward"]
            record = rollout(policy, sampler, noise, **how)
            kept = record, policy.passes["forward"] - before
        else:
            policy.passes["forward"] += kept[1]
        self._held[row] = kept
        return kept[0]

    def release(self) -> None:
        """Drops the rollouts, once all of them have their rewards."""
        self._held = {}

    # -- the files

    def _keep(self, policy: Policy) -> None:
        """Writes the rollouts that are held, with a digest of weights, noise and tensors."""
        if self._home is None or not self._held:
            return
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            weights = self._weights(policy)
            for row, (record, forwards) in self._held.items():
                if record.outputs is not None or record.renoised:
                    continue  # more than plain samples
                tensors = {name: getattr(record, name).detach().cpu().contiguous() for name in TENSORS}
                strides = {name: getattr(record, name).stride() for name in TENSORS}
                about = {
                    "slots": record.slots,
                    "forwards": forwards,
                    "on_host": record.latents.device.type == "cpu",
                    "strides": strides,
                }
                metadata = {"weights": weights, "noise": _name(record.noise), "about": json.dumps(about)}
                metadata["blake2b"] = digest_of(tensors, metadata)
                with aside_of(self._home / f"rows_{row:06d}.safetensors") as aside:
                    save_file(tensors, aside, metadata=metadata)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self._home, ignore_errors=True)
            print(
                f"warning: the samples of this epoch could not be kept in {self._home} ({error}); they will "
                "be drawn again"
            )

    def _read(
        self, path: Path, policy: Policy, sampler: Sampler, noise: NoiseKey
    ) -> tuple[Rollout, int] | None:
        """Reads what `_keep` wrote; None if it is damaged, or of other weights or noise."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            tensors = load_file(path)
        except (OSError, SafetensorError, ValueError, KeyError):  # of a header with a flipped bit
            return None
        sealed = metadata.pop("blake2b", None)
        if sealed != digest_of(tensors, metadata) or (metadata["weights"], metadata["noise"]) != (
            self._weights(policy),
            _name(noise),
        ):
            return None
        about = json.loads(metadata["about"])
        latents, log_probs, images = (_laid_out(tensors[name], about["strides"][name]) for name in TENSORS)
        return Rollout(
            prompts=noise.prompts,
            cond=policy.encode(noise.prompts),
            sampler=sampler,
            noise=noise,
            slots=tuple(about["slots"]),
            latents=latents if about["on_host"] else latents.to(policy.device),
            log_probs=log_probs.to(policy.device),
            images=images.to(policy.device),
        ), int(about["forwards"])

    def _weights(self, policy: Policy) -> str:
        """Computes the digest of the trained weights that this process holds."""
        if not self._digest:
            parts: list[Any] = [parameter.detach() for parameter in policy.parameters()]
            self._digest = digest_of(
                {f"{k:06d}": p.to_local() if hasattr(p, "to_local") else p for k, p in enumerate(parts)}
            )
        return self._digest


def _as_it_is(state: dict[str, Any]) -> dict[str, Any]:
    """Copies a state but shares its tensors, which are large and are not changed in place."""
    return copy.deepcopy(state, {id(leaf): leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)})


def _laid_out(tensor: Tensor, stride: list[int]) -> Tensor:
    """Restores a tensor's layout in memory, because the rounding of a reward's sums depends on it."""
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def _name(noise: NoiseKey) -> str:
    return json.dumps([noise.seed, noise.stream, noise.epoch, noise.prompts, noise.replicas])
