"""What objectives with data of their own share (DPO, KTO, SFT): shuffled passes, encoded images, and an epoch
cut into updates.

Nothing is sampled for them, so the loop's stream of rollouts is left alone. The loop's rng is a pure function
of (seed, epoch); what is drawn here, once for all processes, is one of (seed, epoch, example), and depends on
neither micro-batch nor process.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignlab.distributed.ranks import own, own_shares, world
from alignlab.engine.noise import NoiseKey, noise_key
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import NothingToLearn
from alignlab.objectives import Update


class Passes:
    """Shuffled passes over n examples: every one comes once before any comes twice, whatever an epoch takes.

    Args:
        examples: each as the values that it is known by: texts, the bytes of an image, a label.
        of: what they are called.
    """

    def __init__(self, examples: Iterable[tuple[Any, ...]], of: str) -> None:
        seen, self.n, self.of = hashlib.blake2b(digest_size=16), 0, of
        for example in examples:
            self.n += 1
            for value in example:
                seen.update(
                    b"\0" + (value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass"))
                )
        self._seen = seen.hexdigest()
        self._left = np.empty(0, dtype=np.int64)
        """What remains of the last pass."""

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """The next `count` of them."""
        while len(self._left) < count:
            self._left = np.concatenate([self._left, rng.permutation(self.n)])
        chosen, self._left = self._left[:count].tolist(), self._left[count:]
        return chosen

    def state_dict(self) -> dict[str, Any]:
        return {"left": torch.from_numpy(self._left.copy()), self.of: self.n, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state[self.of] != self.n:
            raise NothingToLearn(
                f"algo.data holds {self.n} {self.of}, but the run began with {state[self.of]}; give it the "
                "same ones, or start anew"
            )
        if state.get("seen", self._seen) != self._seen:  # earlier versions knew the number only
            raise NothingToLearn(
                f"algo.data holds other {self.of} than the run began with; give it the same ones, or start "
                "anew"
            )
        self._left = state["left"].numpy()


class Latents:
    """Encoded images in host memory: each is encoded once, and apart from the batch, so that it does not
    depend on it.

    Args:
        keep: False encodes an image every time that it is asked for: data without an end fit in no memory.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self._kept: dict[Hashable, Tensor] = {}

    def __call__(
        self, policy: Policy, key: Hashable, read: Callable[[tuple[int, int]], Tensor | tuple[Tensor, ...]]
    ) -> Tensor:
        """[S, C, h, w] of the example `key`, whose one image or S images [3, h, w] in [0, 1] `read` gives at
        the model's (height, width).

        Raises:
            NothingToLearn: in place of the ValueError of an image that cannot be read.
        """
        if key in self._kept:
            return self._kept[key]
        try:
            pictures = read(policy.family.image_size)
        except ValueError as error:
            raise NothingToLearn(f"algo.{error}") from None
        images = pictures[None] if isinstance(pictures, Tensor) else torch.stack(pictures)
        with torch.no_grad():
            latents: Tensor = policy.family.encode_images(images.to(policy.device)).cpu()
        if self.keep:
            self._kept[key] = latents
        return latents


def dealt(
    policy: Policy,
    names: Sequence[str],
    batch: Callable[[list[int], NoiseKey], Any],
    *,
    stream: str,
    updates: int,
    micro_batch: int,
    rng: np.random.Generator,
) -> Iterator[Update]:
    """An epoch's examples, whose order is random already, in at most `updates` optimiser steps.

    Args:
        names: [n] of the examples, for their draws; equal ones are told apart.
        batch: makes a micro-batch of the examples at these places of `names`, with the key that names their
            draws.
    """
    n = -(-len(names) // world()) * world()  # dealt out evenly: what is too much is in no update
    key = noise_key([names[k % len(names)] for k in range(n)], seed=int(rng.integers(2**63)), stream=stream)
    for first in range(min(updates, len(names))):
        places = torch.arange(first, len(names), updates)  # each process has its part of every update
        rows = own_shares(places, n, micro_batch, even=policy.sharded)
        held = ((share, [own(n)[row] for row in part.tolist()]) for share, part in rows)
        yield Update(
            batches=((share, batch([k % len(names) for k in part], key[part])) for share, part in held)
        )


def with_dropout(prompts: Sequence[str], key: NoiseKey, share: float) -> tuple[str, ...]:
    """The prompts [M], of which a share, drawn by their keys, is the empty one: so guidance goes on
    working."""
    dropped = (key.uniform(-3) < share).tolist()
    return tuple("" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True))


def refuse(
    objective: str,
    prompt_dropout: float,
    updates_per_epoch: int,
    kl_coeff: float,
    *,
    why: str,
    **examples: int,
) -> None:
    """Raises a ValueError for what none of these objectives can do.

    Args:
        objective: its name.
        why: it has no KL term.
        examples: how many an epoch has, by their key; nothing where that is not known before.
    """
    if not 0 <= prompt_dropout <= 1:
        raise ValueError(f"algo.prompt_dropout={prompt_dropout} must be in [0, 1]")
    if not 1 <= updates_per_epoch <= min(examples.values(), default=updates_per_epoch):
        most = "".join(f" and at most algo.{key}={count}" for key, count in examples.items())
        raise ValueError(f"algo.updates_per_epoch={updates_per_epoch} must be at least 1{most}")
    if kl_coeff:
        raise ValueError(f"kl_coeff={kl_coeff}: {objective} has no KL term ({why}); leave kl_coeff at 0")
