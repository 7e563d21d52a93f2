"""A run that is asked to end, or whose reward dies, ends where it can go on from bit for bit; no sample is
drawn twice."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import alignlab.train as train_module
import alignlab.training.signals as stops
import alignlab.training.unfinished_epoch as collected_module
from alignlab.config.schema import TrainConfig
from alignlab.rewards.brightness import Brightness
from alignlab.rewards.compose import RewardError
from alignlab.train import smaller, train
from alignlab.training.failures import explained
from alignlab.training.signals import STOPPED, Stopped, asked, leave, stoppable
from alignlab.training.unfinished_epoch import Collected
from tests.disks import fill, flip
from tests.running import command_line, configured, lines, same_weights, tiny

WORDS = """algo=ddpo algo.updates_per_epoch=2 algo.statistics.min_count=2 steps=3 eval_every=3
    checkpoint_every=3 evaluation.prompts=1 evaluation.final_images=1""".split()


@pytest.fixture(scope="module", autouse=True)
def ctrl_c() -> Iterator[None]:
    """It counts here: a shell has what runs in its background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    run = tmp_path_factory.mktemp("stops") / "whole"
    train(configured(*tiny(tiny_sd, *WORDS)), run)
    return run


def check_equal(one: Path, other: Path) -> None:
    """Metrics with their counts, evaluations and weights are bit-identical, and nothing is left of what was
    kept meanwhile."""
    assert lines(one) == lines(other) and same_weights(one, other)
    a, b = (json.loads((run / "summary.json").read_text()) for run in (one, other))
    assert (a["base"], a["final"]) == (b["base"], b["final"])
    assert {p.name for p in one.iterdir()} - {"collected"} == {p.name for p in other.iterdir()} - {
        "collected"
    }
    assert not list((other / "collected").glob("*"))


def counted(patch: pytest.MonkeyPatch, where: Any, name: str, act: Callable[[int], None]) -> list[int]:
    """Calls `act` with the number of each call, from 1, before a function is run; the numbers so far."""
    real, seen = getattr(where, name), []

    def called(*args: Any, **kwargs: Any) -> Any:
        seen.append(len(seen) + 1)
        act(seen[-1])
        return real(*args, **kwargs)

    patch.setattr(where, name, called)
    return seen


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_signals_at_any_moment(whole: Path, tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """In the sampling of an epoch, in an update, in the last evaluation: exit code 75, a line that says how
    to go on, and in the end the undisturbed run. What was sampled is not sampled again."""
    run = tmp_path / "run"
    words = tiny(tiny_sd, *WORDS, f"output_dir={run}")
    before = {number: signal.getsignal(number) for number in stops.SIGNALS}
    with monkeypatch.context() as patch:  # two rollouts an epoch: in the first of the second one
        counted(patch, collected_module, "rollout", lambda k: send(signal.SIGTERM) if k == 3 else None)
        assert command_line(patch, *words) == STOPPED
    err = capsys.readouterr().err
    assert (
        f"stopped by SIGTERM: {run}/checkpoints/step_000001 is saved; go on with python -m alignlab.train "
        f"resume={run}" in err
    )
    assert "Traceback" not in err and len(lines(run)) == 1
    assert [p.name for p in (run / "collected" / "epoch_000002").iterdir()] == ["rows_000000.safetensors"]
    with monkeypatch.context() as patch:
        drawn = counted(patch, collected_module, "rollout", lambda k: None)
        counted(patch, torch.optim.AdamW, "step", lambda k: send(signal.SIGUSR1) if k == 1 else None)
        assert command_line(patch, f"resume={run}") == STOPPED
    assert len(drawn) == 1 and len(lines(run)) == 2 and not list((run / "collected").iterdir())
    assert f"stopped by SIGUSR1: {run}/checkpoints/step_000002 is saved" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        counted(patch, train_module, "measure_all", lambda k: send(signal.SIGINT))
        assert command_line(patch, f"resume={run}") == STOPPED
    assert f"stopped by SIGINT: {run}/checkpoints/step_000003 is saved" in capsys.readouterr().err
    assert not (run / "summary.json").exists()
    assert command_line(monkeypatch, f"resume={run}") == 0
    check_equal(whole, run)
    assert {number: signal.getsignal(number) for number in stops.SIGNALS} == before


def test_no_collected_sample_is_lost(whole: Path, tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """A reward that dies in the middle of an epoch: one sentence, exit code 2; the rollout that it did not
    score is kept too, and what was sampled is not sampled again: the end is the undisturbed run's."""
    run = tmp_path / "run"

    def die(k: int) -> None:
        if k == 2:
            raise RewardError("the reward server at http://127.0.0.1:9 does not answer")

    with monkeypatch.context() as patch:
        real = train_module.train_epoch

        def train_epoch(lab: Any, c: Any, epoch: int) -> Any:
            if epoch == 2:
                counted(patch, Brightness, "__call__", die)
            return real(lab, c, epoch)

        patch.setattr(train_module, "train_epoch", train_epoch)
        assert command_line(patch, *tiny(tiny_sd, *WORDS, f"output_dir={run}")) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("error: epoch 2: the reward server at http://127.0.0.1:9")
    )
    kept = sorted((run / "collected" / "epoch_000002").iterdir())
    assert [p.name for p in kept] == ["rows_000000.safetensors", "rows_000002.safetensors"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000000", "step_000001"]
    drawn = counted(monkeypatch, collected_module, "rollout", lambda k: None)
    assert command_line(monkeypatch, f"resume={run}") == 0
    assert len(drawn) == 2  # of epoch 3
    check_equal(whole, run)


def test_only_of_these_weights(tiny_sd: str, tmp_path: Path) -> None:
    """Rollouts that other weights drew, of other prompts, or that went bad on the disk, are not taken; nor
    are any kept for an objective that needs a gradient."""
    from alignlab.engine.noise import noise_key
    from alignlab.training.setup import Lab

    c = configured(*tiny(tiny_sd, "algo=ddpo"))
    lab, key = Lab.from_config(c), noise_key(["cat", "dog"], seed=0, stream="train", epoch=1)
    home = Collected(tmp_path / "collected")

    def sampled(kept: Collected, key: Any = key) -> tuple[Any, int]:
        before = lab.policy.passes["forward"]
        with torch.no_grad():
            record = kept.rollout(0, lab.policy, lab.sampler, key, offload=False)
        return record, lab.policy.passes["forward"] - before

    saved: list[int] = []
    with pytest.raises(RewardError), home.epoch(1, lab.policy, lab.objective, saved.append):
        record, passes = sampled(home)
        raise RewardError("no answer")
    assert saved == [0] and len(list((tmp_path / "collected").rglob("*.safetensors"))) == 1
    again = Collected(tmp_path / "collected")
    with contextlib.suppress(RewardError), again.epoch(1, lab.policy, lab.objective, saved.append):
        twin, counted_passes = sampled(again)
        assert counted_passes == passes and twin is not record
        for name in ("latents", "log_probs", "images"):
            kept, drawn = getattr(twin, name), getattr(record, name)
            assert kept.equal(drawn) and kept.stride() == drawn.stride()
        for name, value in record.cond.text.items():
            assert value.equal(twin.cond.text[name])
        assert (twin.slots, twin.prompts, twin.noise) == (record.slots, record.prompts, record.noise)
        other, _ = sampled(again, noise_key(["dog", "cat"], seed=0, stream="train", epoch=1))
        assert other.prompts == ("dog", "cat") and not other.images.equal(record.images)
        raise RewardError("again")
    with torch.no_grad():
        for parameter in lab.policy.parameters():
            parameter.add_(0.5)
    with contextlib.suppress(RewardError), again.epoch(1, lab.policy, lab.objective, saved.append):
        moved, _ = sampled(again)
        assert not moved.images.equal(record.images)
        raise RewardError("again")
    (file,) = (tmp_path / "collected").rglob("*.safetensors")
    flip(file)
    with contextlib.suppress(RewardError), again.epoch(1, lab.policy, lab.objective, saved.append):
        assert sampled(again)[1] == passes
        raise RewardError("again")
    lab.objective.needs_gradient = True
    with again.epoch(2, lab.policy, lab.objective, saved.append):
        sampled(again)
        assert not again._held
    assert not (tmp_path / "collected" / "epoch_000002").exists()


def test_a_sweep_ends_with_its_job(tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Ctrl-C in the first job: the second does not begin, and the exit code is the run's."""
    words = tiny(tiny_sd, *WORDS, "seed=0,1", f"output_dir={tmp_path / 'sweep'}")
    counted(monkeypatch, collected_module, "rollout", lambda k: send(signal.SIGINT))
    assert command_line(monkeypatch, "-m", *words) == STOPPED
    err = capsys.readouterr().err
    assert err.count("stopped by SIGINT: ") == 1 and "step_000000 is saved" in err
    assert len(list((tmp_path / "sweep").rglob("config.yaml"))) == 1
    counted(
        monkeypatch, collected_module, "rollout", lambda k: send(signal.SIGINT)
    )  # the second Ctrl-C: at once
    (run,) = [path.parent for path in (tmp_path / "sweep").rglob("config.yaml")]
    run = run.rename(tmp_path / "run")  # its name has signs that a command line must quote
    assert command_line(monkeypatch, f"resume={run}") == 130
    assert capsys.readouterr().err.endswith("ended at once; what was saved before is intact\n")
    assert (run / "checkpoints" / "step_000000").is_dir() and not lines(run)


def test_signals_outside_of_a_run(monkeypatch, tmp_path: Path, capsys) -> None:
    """Nobody asked, nobody stops; an ignored signal (nohup) stays ignored; a launcher's echo of Ctrl-C is not
    a second one."""
    assert not asked() and leave() is None
    monkeypatch.setattr(stops, "launched", lambda: 2)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as end, stoppable(tmp_path):
            send(signal.SIGUSR1)
            assert not asked()
            send(signal.SIGINT)
            send(signal.SIGINT)
            send(signal.SIGTERM)
            assert asked()
            monkeypatch.setattr(stops, "ECHO", 0.0)
            time.sleep(0.01)
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
            leave()
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert end.value.code == STOPPED and "nothing was there to be saved yet" in capsys.readouterr().err
    with pytest.raises(Stopped):
        raise Stopped("SIGTERM")


def test_a_full_disk_in_the_middle(whole: Path, tiny_sd: str, small_disk: Path, monkeypatch, capsys) -> None:
    """One sentence, exit code 2, no traceback, wherever the writing stops; with room again the run ends as if
    it had never been full."""
    run = small_disk / "run"
    counted(monkeypatch, train_module, "reward_numbers", lambda k: fill(small_disk) if k == 2 else None)
    words = tiny(tiny_sd, *WORDS, "checkpoint_every=1", f"output_dir={run}")
    assert command_line(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and "cannot be written (No space left on device" in err.splitlines()[-1]
    (small_disk / "filler").unlink()
    assert command_line(monkeypatch, *words) == 0
    check_equal(whole, run)


def one_of_two(
    r: int, port: int, c: TrainConfig, folder: Path, said: Path, disturb: Callable[[int], None]
) -> int:
    """Process r of two, forked: trains, and returns its exit code."""
    os.environ |= {
        "RANK": str(r),
        "LOCAL_RANK": str(r),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    handle = os.open(said / f"{r}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    try:
        disturb(r)
        from alignlab.distributed.ranks import join

        join(torch.device("cpu"))
        with stoppable(folder), explained(c, folder, smaller):
            train(c, folder)
        return 0
    except SystemExit as end:
        return int(str(end.code))
    except BaseException as error:
        print(error if type(error).__name__ == "ConfigError" else traceback.format_exc())
        return 2
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def two(
    c: TrainConfig, folder: Path, said: Path, disturb: Callable[[int], None] = lambda r: None
) -> list[int]:
    """Their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for r in (0, 1):
        child = os.fork()
        if child == 0:
            os._exit(one_of_two(r, port, c, folder, said, disturb))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.slow
def test_two_processes_stop_together(tiny_sd: str, tmp_path: Path, monkeypatch) -> None:
    """A signal to one of two ends both, with one checkpoint and what both have sampled; a reward that dies in
    one too; with on_nonfinite=skip a rollout is left out by both. Gone on with, it is the undisturbed run of
    two."""
    c = configured(*tiny(tiny_sd, *WORDS, "samples_per_step=8", "steps=2", "on_nonfinite=skip"))
    assert two(c, tmp_path / "whole", tmp_path) == [0, 0], (tmp_path / "0.txt").read_text()

    def signalled(r: int) -> None:
        counted(
            monkeypatch,
            collected_module,
            "rollout",
            lambda k: send(signal.SIGTERM) if (r, k) == (1, 3) else None,
        )

    def dead(r: int) -> None:
        def die(k: int) -> None:
            if (r, k) == (1, 1):
                raise RewardError("the server does not answer")

        real = train_module.train_epoch

        def begin(*its: Any) -> Any:
            counted(monkeypatch, Brightness, "__call__", die)
            return real(*its)

        monkeypatch.setattr(train_module, "train_epoch", begin)

    run = tmp_path / "run"
    assert two(c, run, tmp_path, signalled) == [STOPPED, STOPPED], (tmp_path / "1.txt").read_text()
    assert sorted(p.name for p in (run / "collected/epoch_000002").iterdir()) == [
        "rows_000000.safetensors",
        "rows_000004.safetensors",
    ]
    assert two(c, run, tmp_path, dead) == [2, 2], (tmp_path / "1.txt").read_text()
    assert two(c, run, tmp_path) == [0, 0]
    check_equal(tmp_path / "whole", run)
    texts = [(tmp_path / f"{r}.txt").read_text() for r in (0, 1)]
    assert texts[0].count("stopped by SIGTERM: ") == 1 and "stopped" not in texts[1]
    assert "epoch 2: process 1: the server does not answer" in texts[0] and "Traceback" not in "".join(texts)
