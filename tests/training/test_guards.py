"""What is not finite never reaches the optimiser; an update that leaps is not made; memory that ran out is
told by how much."""

import copy
import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignlab.config.build import ConfigError
from alignlab.config.schema import TrainConfig
from alignlab.engine.noise import noise_key
from alignlab.objectives.ddpo import DDPO
from alignlab.planning import fit as memory
from alignlab.planning.footprint import TRAINING, Footprint
from alignlab.rewards.brightness import Brightness
from alignlab.train import smaller, train_epoch
from alignlab.training import guards
from alignlab.training.evaluation import in_evaluation, measure_all
from alignlab.training.failures import explained, is_out_of_memory
from alignlab.training.guards import Leap, Unscored
from alignlab.training.setup import Lab
from tests.running import command_line, configured, tiny

DDPO_RUN = ["algo=ddpo", "algo.updates_per_epoch=2", "ema=0.9", "lr=0.01"]


def lab_of(tiny_sd: str, *words: str) -> tuple[Lab, TrainConfig]:
    c = configured(*tiny(tiny_sd, *words))
    return Lab.from_config(c), c


def state_of(lab: Lab) -> dict[str, Tensor]:
    """Every number that an optimiser's step changes, by name."""
    out = {f"weights {k}": v.clone() for k, v in lab.policy.state_dict().items()}
    for k, its in copy.deepcopy(lab.optimizer.state_dict()["state"]).items():
        out |= {f"optimizer {k} {name}": torch.as_tensor(value) for name, value in its.items()}
    return out | {f"ema {k}": v.clone() for k, v in enumerate(lab.ema.shadow_params if lab.ema else ())}


def infinite_loss(loss: Tensor, policy: Any) -> Tensor:
    return loss + float("inf")  # whose gradient is finite


def infinite_gradient(loss: Tensor, policy: Any) -> Tensor:
    return loss + (0 * policy.parameters()[0].sum()).sqrt()  # whose value is finite


def spoil(patch: pytest.MonkeyPatch, how: Callable[[Tensor, Any], Tensor], calls: tuple[int, ...]) -> None:
    """Does something to the loss of some micro-batches, counted from 0."""
    real, count = DDPO.loss, iter(range(1000))

    def loss(self: DDPO, policy: Any, batch: Any) -> Any:
        value, metrics = real(self, policy, batch)
        return (how(value, policy) if next(count) in calls else value), metrics

    patch.setattr(DDPO, "loss", loss)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            infinite_loss,
            r"epoch 2, update 1: the loss is inf for image \d of prompt '.*' at step \d, image .* at step \d",
        ),
        (
            infinite_gradient,
            r"epoch 2, update 1: the gradient's norm is nan, from image \d of prompt '.*' at step \d, .* on",
        ),
    ],
)
def test_a_skipped_update_changes_nothing(how, said: str, tiny_sd: str, monkeypatch, capsys) -> None:
    """Weights, both moments, the step counter and the moving average are the same bits; the next update is
    made; both are counted."""
    lab, c = lab_of(tiny_sd, *DDPO_RUN, "on_nonfinite=skip")
    assert train_epoch(lab, c, 1)["skipped_updates"] == 0
    before = state_of(lab)
    with monkeypatch.context() as patch:
        spoil(patch, how, calls=tuple(range(20)))
        line = train_epoch(lab, c, 2)
    after = state_of(lab)
    assert after.keys() == before.keys() and all(after[k].equal(before[k]) for k in before)
    assert (line["updates"], line["skipped_updates"], line["loss"], line["grad_norm"]) == (0, 2, None, None)
    assert capsys.readouterr().out.count("; the update is skipped\n") == 2
    with monkeypatch.context() as patch:
        spoil(patch, how, calls=(1,))
        line = train_epoch(lab, c, 3)
    assert (
        (line["updates"], line["skipped_updates"]) == (1, 1)
        and np.isfinite(line["loss"])
        and line["grad_norm"] > 0
    )
    assert all(v.isfinite().all() for v in state_of(lab).values())
    before = state_of(lab)
    spoil(monkeypatch, how, calls=(0,))
    with pytest.raises(Leap, match=said):
        train_epoch(lab, replace(c, on_nonfinite="stop"), 2)
    assert all(v.equal(before[k]) for k, v in state_of(lab).items())


def test_a_scaler_that_falls_below_1(tiny_sd: str, monkeypatch) -> None:
    """In fp16 an overflow is skipped, counted, and lowers the scale, whatever on_nonfinite says; but not for
    ever."""
    lab, c = lab_of(tiny_sd, "algo=ddpo", "algo.updates_per_epoch=1")
    lab.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    spoil(monkeypatch, infinite_gradient, calls=tuple(range(100)))
    before = state_of(lab)
    assert [train_epoch(lab, c, k)["skipped_updates"] for k in (1, 2)] == [1, 1]
    assert lab.scaler.get_scale() == 0.5
    with pytest.raises(Leap, match="the gradient's norm is nan"):
        train_epoch(lab, c, 3)
    assert all(v.equal(before[k]) for k, v in state_of(lab).items())


def scored(values: list[float]) -> Callable[..., Tensor]:
    """A reward that takes these values, one a batch, for its first image."""
    todo = iter(values)

    def score(self: Any, images: Tensor, prompts: Any) -> Tensor:
        out = images.mean((1, 2, 3))
        out = out.clone()
        out[0] = next(todo)
        return out

    return score


def test_a_rollout_without_a_reward_is_left_out(tiny_sd: str, monkeypatch, capsys) -> None:
    """All of it, whatever its other images earned; the epoch is that of the others. Without any, or with
    on_nonfinite=stop, it ends."""
    for words in (DDPO_RUN, ["algo=draft"]):
        lab, c = lab_of(tiny_sd, *words, "on_nonfinite=skip")
        with monkeypatch.context() as patch:
            patch.setattr(Brightness, "__call__", scored([float("nan"), 0.5]))
            line = train_epoch(lab, c, 1)
        assert line["nonfinite_rewards"] == 1 and line["skipped_updates"] == 0 and line["updates"] > 0
        assert np.isfinite(line["reward/mean"]) and line["reward/std"] > 0 and np.isfinite(line["loss"])
        said = r"epoch 1: reward brightness is nan for image 0 of prompt "
        out = capsys.readouterr().out
        assert out.startswith(f"warning: {said}") and out.endswith(
            "(1 of 2 images); its rollout is left out\n"
        )
        before = state_of(lab)
        for policy, values, more in (
            ("skip", [float("inf")] * 2, "no rollout of this epoch has"),
            ("stop", [0.1, float("nan")], ""),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(Brightness, "__call__", scored(values))
                with pytest.raises(
                    Unscored, match=rf"epoch 2: reward brightness is (nan|inf) for image .*{more}"
                ):
                    train_epoch(lab, replace(c, on_nonfinite=policy), 2)
        capsys.readouterr()
        assert all(v.equal(before[k]) for k, v in state_of(lab).items())


def test_processes_leave_out_the_same(tiny_sd: str, monkeypatch) -> None:
    """What another process' reward spoils, this one leaves out too, and counts with its own; what stops there
    stops here."""
    lab, c = lab_of(tiny_sd, *DDPO_RUN, "on_nonfinite=skip")
    record = lab.collected.rollout(0, lab.policy, lab.sampler, _noise(lab, c))
    guard, answer = (
        guards.Guard(lab, replace(c, samples_per_step=8), 1),
        lab.reward.submit(record.images, record.prompts),
    )
    assert guard.score(record, answer) is not None

    def failed(told: str, images: int) -> guards.Failure:
        return guards.Failure(told=f"process 1: {told}", images=images)

    monkeypatch.setattr(
        guards, "gathered", lambda value: [value, failed("reward brightness is nan for image 3", 2)]
    )
    assert guard.score(record, answer) is None and guard.nonfinite == 2
    monkeypatch.setattr(guards, "gathered", lambda value: [value, failed("the server does not answer", 0)])
    with pytest.raises(Unscored, match="epoch 1: process 1: the server does not answer"):
        guard.score(record, answer)
    monkeypatch.setattr(
        guards, "gathered", lambda value: [value, guards.Report(fault="the loss is nan for image 3")]
    )
    assert not guard.passes(1.0) and guard.skipped == 1


def _noise(lab: Lab, c: TrainConfig) -> Any:
    return noise_key(["cat", "dog"], seed=0, stream="train", epoch=1)


def test_an_update_that_leaps_is_not_made(tiny_sd: str) -> None:
    """The ratio and the KL are looked at before the step: the sentence names epoch, update, value and what to
    lower."""
    lab, c = lab_of(tiny_sd, "algo=ddpo", "algo.updates_per_epoch=4", "lr=0.5", "max_ratio=1.0001")
    with pytest.raises(
        Leap,
        match=(
            r"epoch 1, update [234]: the importance ratio is .*-fold away from 1 \(max_ratio=1.0001\); lower "
            r"lr=0.5"
        ),
    ):
        train_epoch(lab, c, 1)
    for words in ("algo=ddpo", "algo=draftp"):
        lab, c = lab_of(tiny_sd, words, "kl_coeff=0.1", "lr=0.5", "max_kl=1e-6")
        train_epoch(lab, replace(c, max_kl=None), 1)
        before = state_of(lab)
        with pytest.raises(
            Leap,
            match=(
                r"epoch 2, update 1: the KL term is .* \(max_kl=1e-06\); raise kl_coeff=0.1 or lower lr=0.5"
            ),
        ):
            train_epoch(lab, c, 2)
        assert all(v.equal(before[k]) for k, v in state_of(lab).items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("on_nonfinite=hope", "on_nonfinite=hope is not one of stop, skip"),
        ("max_ratio=1", "max_ratio=1.0 must be above 1"),
        ("max_kl=0 kl_coeff=1 algo=draftp", "max_kl=0.0 must be positive"),
        ("max_kl=1", "max_kl=1.0 bounds the KL term, which kl_coeff=0 leaves out"),
        ("keep=0", "keep=0 must be at least 1"),
    ],
)
def test_mistakes(words: str, said: str, monkeypatch, capsys) -> None:
    """One sentence, exit code 2."""
    assert command_line(monkeypatch, *words.split()) == 2
    assert said in capsys.readouterr().err


def too_much() -> None:
    torch.empty(2**56, dtype=torch.uint8)  # what torch says on the CPU


def too_much_numpy() -> None:
    np.empty(2**56, np.uint8)


def too_much_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def test_out_of_memory_says_what_to_lower(tiny_sd: str, tmp_path: Path, monkeypatch) -> None:
    """By how much: the proposal fits the room that there is, and the next larger one does not."""
    c = configured(*tiny(tiny_sd, "algo=ddpo", "samples_per_step=8", "micro_batch=8"))

    def predicted(c: TrainConfig, epoch: Any, *, device: str) -> Footprint:
        peaks = dict.fromkeys((*TRAINING, "evaluation"), 1000 * c.micro_batch)
        return Footprint(denoiser=0, frozen=0, gradients=0, optimizer=0, peaks=peaks)

    monkeypatch.setattr(memory, "footprint", predicted)  # which tests/test_plan.py holds against real runs
    needs = {k: memory.MARGIN * 1000 * k for k in (2, 4, 8)}
    room = (needs[2] + needs[4]) / 2
    monkeypatch.setattr(memory, "free_memory", lambda device: room)
    with pytest.raises(ConfigError) as error, explained(c, tmp_path, smaller):
        too_much()
    said = str(error.value)
    assert said.startswith(
        f"out of memory: micro_batch=8 needs about {memory.size(needs[8])} of {memory.size(room)}; "
    )
    assert (
        f"micro_batch=2 needs {memory.size(needs[2])}: set that" in said
        and f"{tmp_path} is as its last" in said
    )
    pairwise = {"_target_": "alignlab.rewards.diversity.ClipDiversity", "path": "emoji_clip"}
    pairs = replace(c, reward={"mine": pairwise}, prompts={**c.prompts, "per_prompt": 2})
    assert f"and micro_batch=2 still {memory.size(needs[2])}; try " in memory.instead(
        pairs, "micro_batch", 1.0, train_epoch
    )
    with monkeypatch.context() as patch:  # a dry run would gather from processes that train
        patch.setenv("WORLD_SIZE", "2")
        patch.setattr(memory, "footprint", lambda *_, **__: pytest.fail("run dry"))
        assert (
            memory.instead(c, "micro_batch", room, train_epoch)
            == "micro_batch=8 is too much; set micro_batch=4"
        )
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    for fail in (too_much, too_much_numpy, too_much_cuda):
        with (
            pytest.raises(ConfigError, match="micro_batch=8 is too much; set micro_batch=4"),
            explained(c, tmp_path, smaller),
        ):
            fail()


def test_the_evaluation_has_a_batch_of_its_own(tiny_sd: str, monkeypatch) -> None:
    """Memory that ran out in an evaluation is its batch's; a size that cannot be lower has other remedies."""
    c = configured(*tiny(tiny_sd, "evaluation.batch=16"))
    assert (
        memory.instead(c, "evaluation.batch", None, train_epoch)
        == "evaluation.batch=16 is too much; set evaluation.batch=8"
    )
    assert memory.instead(replace(c, micro_batch=1), "micro_batch", None, train_epoch).startswith(
        "micro_batch=1 cannot be lower; try "
    )
    lab = Lab.from_config(c)
    monkeypatch.setattr(Brightness, "__call__", lambda *_: too_much())
    seen = []
    for step in (lambda: train_epoch(lab, c, 1), lambda: measure_all(lab, c)):
        try:
            step()
        except RuntimeError as error:
            seen.append((is_out_of_memory(error), in_evaluation(error)))
    assert seen == [(True, False), (True, True)]


@pytest.mark.slow
def test_a_real_prediction(tiny_sd: str) -> None:
    """Two dry runs of this configuration, where nothing would fit."""
    said = memory.instead(configured(*tiny(tiny_sd)), "micro_batch", 1.0, train_epoch)
    assert " of 0.0 MiB, and micro_batch=1 still " in said and "precision=bf16" in said


def test_errors_without_a_remedy_stay_what_they_are(tmp_path: Path, capfd) -> None:
    """A bug keeps its traceback. A full disk is a sentence wherever it strikes, also in TensorBoard's
    thread."""
    for error in (RuntimeError("shapes"), OSError(errno.ENOENT, "no such file"), KeyError("x")):
        with pytest.raises(type(error)), explained(TrainConfig(), tmp_path, smaller):
            raise error

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "events.out")

    with pytest.raises(
        ConfigError,
        match=(
            r"events.out cannot be written \(No space left on device\): what was saved before is intact; "
            r"make room and go on with python -m alignlab.train resume="
        ),
    ):
        with explained(TrainConfig(), tmp_path, smaller):
            thread = threading.Thread(target=full)
            thread.start()
            thread.join()
            full()
    assert not capfd.readouterr().err
