"""An epoch that is cut short before its first update loses nothing: the state before it is saved, and so are
its samples.

Where the reward fails (a server that died, a value that is none) or a signal comes, the rollouts of the epoch
so far go to RUN/collected/epoch_*/, the one whose reward failed too, and a resumed run takes them from there
instead of sampling again: its result is that of an undisturbed one, bit for bit. Only where the objective
needs no gradient, so that rollouts are plain numbers.
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
    """The rollouts of the epoch at hand.

    Args:
        folder: RUN/collected; None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.untouched = True
        """Whether the epoch has not yet changed the weights or the optimiser."""
        self._home: Path | None = None
        self._found = False
        self._digest = ""
        self._held: dict[int, tuple[Rollout, int]] = {}
        """By their first row in the epoch, with the forward passes that they took."""

    @contextmanager
    def epoch(
        self, number: int, policy: Policy, objective: Objective, save: Callable[[int], None]
    ) -> Iterator[None]:
        """Around one epoch.

        Args:
            number: counted from 1.
            save: writes the checkpoint of an epoch; called with that of the one before.
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
                except RunError as error:  # what cut the epoch short is the news
                    print(f"warning: {error}")
                wait()  # before one of the processes ends, and its launcher the others
            raise
        finally:
            self._held = {}
        if self._found and self._home is not None and rank() == 0:
            shutil.rmtree(self._home, ignore_errors=True)

    def rollout(self, row: int, policy: Policy, sampler: Sampler, noise: NoiseKey, **how: Any) -> Rollout:
        """The engine's `rollout` of the epoch's rows from `row` on, or the one that was kept of it.

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
        if self._found and not all(gathered(kept is not None)):  # a split model runs on all processes at once
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
        """Holds no rollout any more: all of them have their rewards."""
        self._held = {}

    # -- the files

    def _keep(self, policy: Policy) -> None:
        """Writes what is held."""
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
        """What `_keep` wrote, if it is whole and of these weights and this noise."""
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
        """Which weights draw the samples of this epoch: this process's part of the trained ones."""
        if not self._digest:
            parts: list[Any] = [parameter.detach() for parameter in policy.parameters()]
            self._digest = digest_of(
                {f"{k:06d}": p.to_local() if hasattr(p, "to_local") else p for k, p in enumerate(parts)}
            )
        return self._digest


def _as_it_is(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state, which shares its tensors: they do not change in place, and may be many."""
    return copy.deepcopy(state, {id(leaf): leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)})


def _laid_out(tensor: Tensor, stride: list[int]) -> Tensor:
    """The same numbers in the order that they had in memory: a reward's sums round by it."""
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)


def _name(noise: NoiseKey) -> str:
    return json.dumps([noise.seed, noise.stream, noise.epoch, noise.prompts, noise.replicas])
