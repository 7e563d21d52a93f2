"""alignlab against the limit: the bare passes through the U-Net that the work needs, called in a loop on
tensors that are ready.

The embedded model, a batch of 16, guided, the same LoRA on both sides, in one process. What alignlab adds
(noise, the sampler's kernel, log-probs, embeddings, selection of pairs, losses, clipping, the optimiser) is
the overhead.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import hydra
import torch
from torch import Tensor

from alignlab import train
from alignlab.config.compose import CONF, checked
from alignlab.config.schema import TrainConfig
from alignlab.engine import rollout as engine
from alignlab.engine.noise import NoiseKey, noise_key
from alignlab.engine.samplers import Sampler
from alignlab.training.setup import Lab
from benchmarks.clock import Timers, seconds
from benchmarks.items import Item, Setting, Sides, alternated

BATCH, STEPS = 16, 8
COMMON = (
    "device=cpu",
    "reward=brightness",
    f"samples_per_step={BATCH}",
    f"micro_batch={BATCH}",
    f"sampler.steps={STEPS}",
    f"eval_sampler.steps={STEPS}",
    "prompts.per_prompt=4",
)


def lab(*words: str) -> tuple[Lab, TrainConfig]:
    """Everything a run is made of, and its configuration."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        c = checked(hydra.compose("train", [*COMMON, *words]))
    return Lab.from_config(c), c


class Bare:
    """The U-Net alone, on ready tensors of a guided batch of `batch` images."""

    def __init__(self, its: Lab, batch: int) -> None:
        self.family: Any = its.policy.family
        self.shared_start = its.policy.shared_start
        self.batch = batch
        prompts = its.prompts.draw(batch, seed=0, epoch=0)
        cond = its.policy.encode(prompts)
        self.text = {k: torch.cat([v, cond.null[k].expand_as(v)]) for k, v in cond.text.items()}
        self.x = (
            noise_key(prompts, seed=0, stream="bench").normal(0, its.policy.latent_shape).repeat(2, 1, 1, 1)
        )
        self.t = its.sampler.timesteps[len(its.sampler) // 2].expand(2 * batch)
        self.parameters = its.policy.parameters()

    def forward(self) -> Tensor:
        with self.shared_start.shared(rows=len(self.x)):
            out: Tensor = self.family.denoiser(self.x, self.t, self.text["prompt_embeds"], return_dict=False)[
                0
            ]
        return out

    def forwards(self, count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                self.forward()

    def updates(self, count: int) -> None:
        """Forward and backward passes of that many micro-batches."""
        for _ in range(count):
            self.forward().square().mean().backward()
        self.tidy()

    def draft(self) -> None:
        """All steps forward, the last with its graph, the decoder, a mean as the reward, and back."""
        self.forwards(STEPS - 1)
        self.decoded(self.x[: self.batch] + self.forward()[: self.batch] + self.x[self.batch :])
        self.tidy()

    def decoder(self) -> None:
        """The part of it that is decoder and reward, both ways."""
        self.decoded(self.x[: self.batch].clone().requires_grad_())

    def decoded(self, x0: Tensor) -> None:
        self.family.decode(x0).mean().backward()

    def tidy(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Limit:
    """One objective's lab, loaded when it is first measured.

    Args:
        words: of its configuration.
        work: what alignlab does in a round, and the bare passes for it, by side.
        parts: the overhead is looked for in these too: (owner, method, what it is called on the page).
    """

    def __init__(self, *words: str) -> None:
        self.words = words
        self._made: tuple[Lab, TrainConfig, Bare] | None = None

    @property
    def made(self) -> tuple[Lab, TrainConfig, Bare]:
        if self._made is None:
            its, c = lab(*self.words)
            self._made = its, c, Bare(its, BATCH)
        return self._made

    def ours(self, epoch: int) -> None:
        raise NotImplementedError

    def sides(self, epoch: int) -> dict[str, Callable[[], Any]]:
        raise NotImplementedError

    def measure(self, count: int) -> Callable[[Setting, int], Sides]:
        def round_of(_: Setting, number: int) -> Sides:
            with threads(count):
                if number == 0 or self._made is None:
                    for work in self.sides(number + 1).values():  # the first time of each kernel is nobody's
                        work()
                works = {
                    side: (lambda work=work: seconds(work)) for side, work in self.sides(number + 1).items()
                }
                done = alternated(works, number)
                return {**done, "parts": self.parts(number + 1)}

        return round_of

    def parts(self, epoch: int) -> dict[str, float]:
        """CPU seconds of our side by what they are spent on, timed from inside in a pass of its own."""
        its, _, _ = self.made
        timers, family, policy = Timers(), its.policy.family, its.policy
        named: list[tuple[Any, str, str]] = [
            (family, "denoise", "U-Net forward"),
            (family, "decode", "decoder"),
            (torch.Tensor, "backward", "backward"),
            (policy, "encode", "embeddings"),
            (NoiseKey, "normal", "noise"),
            (Sampler, "mean", "sampler"),
            (Sampler, "draw", "sampler"),
            (Sampler, "log_prob", "log-probs"),
            (engine.Rollout, "latent", "selection"),
            (engine.Rollout, "cat", "selection"),
            (its.optimizer, "step", "optimiser"),
            (train, "clip_gradients", "clipping"),
            (policy, "branches", "branches"),
            (its.reward, "submit", "reward"),
            (its.prompts, "draw", "prompts"),
        ]
        with ExitStack() as stack:
            for owner, method, name in named:
                function = owner.__dict__[method] if isinstance(owner, type) else getattr(owner, method)
                if isinstance(function, staticmethod):
                    timed: Any = staticmethod(timers.around(name, function.__func__))
                else:
                    timed = timers.around(name, function)
                stack.enter_context(mock.patch.object(owner, method, timed))
            with timers.time("the rest"):
                self.ours(epoch)
        return timers.cpu


class RolloutLimit(Limit):
    """Sampling with all latents and log-probs kept. The decoder is left out."""

    def ours(self, epoch: int) -> None:
        its, _, _ = self.made
        key = noise_key(its.prompts.draw(BATCH, seed=0, epoch=epoch), seed=0, stream="bench", epoch=epoch)
        with torch.no_grad(), mock.patch.object(its.policy, "decode", lambda x0: x0[:, :3]):
            engine.rollout(its.policy, its.sampler, key)

    def sides(self, epoch: int) -> dict[str, Callable[[], Any]]:
        bare = self.made[2]
        return {"alignlab": lambda: self.ours(epoch), "bare": lambda: bare.forwards(STEPS)}


class TrainingLimit(Limit):
    """DDPO's updates on a rollout that is there: an epoch of the train loop whose sampling is given."""

    def ours(self, epoch: int) -> None:
        its, c, _ = self.made
        given = self._given(epoch)
        with (
            mock.patch.object(its.collected, "rollout", lambda *_, **__: given),
            mock.patch.object(its.reward, "submit", lambda *_: lambda: given.rewards),
        ):
            train.train_epoch(its, c, epoch)

    def _given(self, epoch: int) -> engine.Rollout:
        if getattr(self, "_kept", (None,))[0] != epoch:
            its, _, _ = self.made
            key = noise_key(its.prompts.draw(BATCH, seed=0, epoch=epoch), seed=0, stream="bench", epoch=epoch)
            with torch.no_grad(), mock.patch.object(its.policy, "decode", lambda x0: x0[:, :3]):
                record = engine.rollout(its.policy, its.sampler, key)
            self._kept = epoch, replace(record, rewards={"brightness": torch.randn(BATCH)})
        return self._kept[1]

    def sides(self, epoch: int) -> dict[str, Callable[[], Any]]:
        bare = self.made[2]
        self._given(epoch)  # not ours to pay
        return {"alignlab": lambda: self.ours(epoch), "bare": lambda: bare.updates(STEPS)}


class DraftLimit(Limit):
    """An epoch of DRaFT-1: sampling, decoding, reward, backward, step. `decoder` is what both sides spend on
    decoder and reward."""

    def ours(self, epoch: int) -> None:
        its, c, _ = self.made
        train.train_epoch(its, c, epoch)

    def sides(self, epoch: int) -> dict[str, Callable[[], Any]]:
        bare = self.made[2]
        return {"alignlab": lambda: self.ours(epoch), "bare": bare.draft, "decoder": bare.decoder}

    def measure(self, count: int) -> Callable[[Setting, int], Sides]:
        inner = super().measure(count)

        def round_of(setting: Setting, number: int) -> Sides:
            sides = inner(setting, number)
            for side in ("alignlab", "bare"):
                sides[side] |= {f"decoder_{clock}": sides["decoder"][clock] for clock in ("cpu", "wall")}
            return sides

        return round_of


def items() -> Iterator[Item]:
    """One thread and two."""
    for name, words, kind in (
        ("rollout", ("algo=ddpo",), RolloutLimit),
        ("ddpo", ("algo=ddpo", "algo.updates_per_epoch=4"), TrainingLimit),
        ("draft1", ("algo=draft",), DraftLimit),
    ):
        limit = kind(*words)
        for count in (1, 2):
            yield Item(name=f"limit/{name}, {count} thread{'s' * (count > 1)}", measure=limit.measure(count))
