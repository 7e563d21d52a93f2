"""Two processes are one: the same parameters, files and numbers as one process on the union of their rows."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import alignlab.runs.folder as runs_module
import alignlab.training.unfinished_epoch as collected_module
from alignlab.config.schema import TrainConfig, stored_record
from alignlab.distributed import ranks
from alignlab.runs.folder import Run
from alignlab.runs.stored_config import read_config
from alignlab.train import train
from alignlab.training import watchdog as peers
from alignlab.training.watchdog import LOST
from tests import warm
from tests.running import command_line, configured, lines, pairs, same_weights, tiny

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
OBJECTIVES = {
    "rwr": ["algo=rwr", "algo.inner_epochs=1", "algo.weighting=dense"],
    "ddpo sf": ["algo=ddpo", "algo.estimator=sf"],
    "ddpo is": ["algo=ddpo", "algo.updates_per_epoch=3", "algo.timestep_fraction=0.7", "kl_coeff=0.1"],
    "dpo": [
        "algo=dpo",
        "algo.data={pairs}",
        "algo.beta=100",
        "algo.updates_per_epoch=2",
        "algo.prompt_dropout=0.3",
    ],
    "dpo online": [
        "algo=dpo_online",
        "prompts.per_prompt=2",
        "algo.beta=100",
        "algo.ref_update_every=1",
        "algo.prompt_dropout=0.3",
        "reward=brightness",
    ],
    "kto": [
        "algo=kto",
        "algo.data={pairs}",
        "algo.beta=100",
        "algo.updates_per_epoch=2",
        "algo.prompt_dropout=0.3",
    ],
    "sft": ["algo=sft", "algo.data={pairs}", "algo.updates_per_epoch=2", "algo.prompt_dropout=0.3"],
    "draft": ["algo=draft", "algo.truncation=per_rollout"],
    "draftp": ["algo=draftp", "kl_coeff=0.5"],
}
SIZES = [
    "samples_per_step=4",
    "micro_batch=1",
    "steps=2",
    "eval_every=2",
    "evaluation.final_images=1",
    "optimizer.eps=1e-6",
]


def launch(script: str, *words: str) -> list[str]:
    """`accelerate launch` of two CPU processes."""
    call = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    call += [
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
        "--main_process_port",
        "0",
        "-m",
        script,
        *words,
    ]
    return call


def accelerated(script: str, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What came of it."""
    return subprocess.run(launch(script, *words), env=ENVIRONMENT, capture_output=True, text=True, cwd=cwd)


def places(port: int) -> list[dict[str, str]]:
    """The environment of two processes without a launcher."""
    return [
        {
            "RANK": str(r),
            "LOCAL_RANK": str(r),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for r in (0, 1)
    ]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def in_two(said: Path, task: Callable[[int], int]) -> list[int]:
    """The task in two processes, forked without a launcher; their exit codes. What they say goes to 0.txt and
    1.txt."""
    children = []
    for r, place in enumerate(places(free_port())):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= place
                handle = os.open(said / f"{r}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
                code = task(r)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def forked(
    said: Path, patch: pytest.MonkeyPatch, *words: str, disturb: Callable[[int], None] = lambda r: None
) -> list[int]:
    """The command line in two processes."""

    def task(r: int) -> int:
        disturb(r)
        return command_line(patch, *words)

    return in_two(said, task)


def train_each(said: Path, asked: dict[Path, TrainConfig]) -> None:
    """Trains each configuration, one after the other, in two processes; process 1 says nothing."""

    def task(r: int) -> int:
        ranks.join(torch.device("cpu"))
        for folder, c in asked.items():
            train(c, folder)
        return 0

    assert in_two(said, task) == [0, 0], (said / "0.txt").read_text() + (said / "1.txt").read_text()
    assert "epoch " in (said / "0.txt").read_text() and "epoch " not in (said / "1.txt").read_text()


SHARDED = "draft sharded"
RUNS = {
    f"{name} {kind}": [*OBJECTIVES[name], f"policy.full={kind == 'full'}"]
    for name in OBJECTIVES
    for kind in ("lora", "full")
}
RUNS[SHARDED] = [
    "algo=draft",
    "algo.k=2",
    "policy.full=true",
    "policy.shard=true",
    "policy.checkpointing=true",
]
SLOW = {"rwr full", "ddpo sf full", "draft full", "dpo full"} | {
    f"{a} {b}" for a in ("dpo online", "kto", "sft") for b in ("lora", "full")
}
"""Their LoRA and the other objectives' full fine-tuning are quick enough. make test-slow runs these too."""


def both(names: Collection[str], model: str, home: Path) -> dict[str, tuple[Path, Path]]:
    """Each run by one process and by two."""
    table, asked, out = pairs(home / "pairs"), {}, {}
    for name in names:
        words = [word.format(pairs=table) for word in RUNS[name]]
        c, one, two = configured(*tiny(model, *SIZES, *words)), home / f"one {name}", home / f"two {name}"
        train(c, one)
        asked[two], out[name] = c, (one, two)
    train_each(home, asked)
    return out


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([name for name in RUNS if name not in SLOW | {SHARDED}], id="quick"),
        pytest.param(sorted(SLOW), id="all others", marks=pytest.mark.slow),
    ],
)
def test_the_parameters_of_one_process(names: list[str], tiny_sd: str, tmp_path: Path) -> None:
    """To 1e-5, or to 1 % of what two epochs move them by if that is more. (AdamW's eps is raised to 1e-6:
    where a gradient is all round-off, it would make a step of its sign.) The numbers of metrics.jsonl are
    those of the whole, and the files are the same. One test, for all runs share two processes."""
    for name, (one, two) in both(names, tiny_sd, tmp_path).items():
        check_the_same(name, one, two)


def check_the_same(name: str, one: Path, two: Path) -> None:
    """Weights, numbers and files of a run by one process and by two."""
    first, a, b = (
        load_file(run / "checkpoints" / f"step_{k:06d}" / "policy.safetensors")
        for run, k in ((one, 1), (one, 2), (two, 2))
    )
    moved = max((a[key] - first[key]).abs().max().item() for key in a)
    apart = max((a[key] - b[key]).abs().max().item() for key in a)
    assert moved > 5e-4 and apart < max(1e-5, 0.01 * moved), (name, moved, apart)
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        assert mine.keys() == theirs.keys()
        for key in (
            "reward/mean",
            "reward/std",
            "loss",
            "grad_norm",
            "reward_queries",
            "denoiser_forwards",
            "denoiser_backwards",
            "eval/reward",
            "eval/lpips",
        ):
            if mine.get(key) is not None:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), (name, key)
    files = [
        {str(p.relative_to(run)) for p in run.rglob("*") if "tensorboard" not in str(p)} for run in (one, two)
    ]
    assert files[0] == files[1], name


def test_a_split_model_is_saved_whole(tiny_sd: str, tmp_path: Path) -> None:
    """What two processes with half the weights each trained and saved is what one did: a pipeline folder that
    diffusers loads, and a state that one goes on from."""
    ((one, two),) = both([SHARDED], tiny_sd, tmp_path).values()
    check_the_same(SHARDED, one, two)
    mine, theirs = (
        UNet2DConditionModel.from_pretrained(run / "model" / "unet").state_dict() for run in (one, two)
    )
    assert max((mine[key] - theirs[key]).abs().max().item() for key in mine) < 1e-5
    moments = [
        torch.load(run / "checkpoints/step_000002/state.pt", weights_only=True)["lab"]["optimizer"]["state"]
        for run in (one, two)
    ]
    assert [len(state) for state in moments] == [len(mine)] * 2


@pytest.mark.slow
def test_a_split_run_goes_on(tiny_sd: str, tmp_path: Path) -> None:
    """Stopped after its first epoch and resumed, two processes with half the weights each end where the
    undisturbed ones did, bit for bit."""
    ((_, two),) = both([SHARDED], tiny_sd, tmp_path).values()
    again = shutil.copytree(two, tmp_path / "again")
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "step_000002")
    train_each(tmp_path, {again: stored_record(again)})
    assert same_weights(two, again) and lines(two) == lines(again)


def test_rows_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process's slices are its own rows, all of them once; the shares add up to 1; all have equally
    many slices."""
    for even in (True, False):
        dealt_out(even, monkeypatch)


def dealt_out(even: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    items = torch.stack([torch.randperm(12), torch.arange(12)], 1)[:7]
    monkeypatch.setattr(ranks, "world", lambda: 3)
    seen, slices, total = [], set(), 0.0
    for r in range(3):
        monkeypatch.setattr(ranks, "rank", lambda r=r: r)
        parts = list(ranks.own_shares(items, 12, 2, even=even))
        slices.add(len(parts))
        total += sum(share for share, _ in parts)
        seen += [
            (row + ranks.own(12).start, step) for share, part in parts if share for row, step in part.tolist()
        ]
        assert all(row in range(4) for _, part in parts for row in part[:, 0].tolist())
    assert (
        sorted(seen) == sorted(map(tuple, items.tolist()))
        and (len(slices) == 1 or not even)
        and total == pytest.approx(1)
    )


def test_a_sweep_of_two_processes(tiny_sd: str, tmp_path: Path) -> None:
    """Under `accelerate launch` both processes agree on the folders of a sweep, and only process 0 writes
    there. A mistake is told once."""
    sizes = [
        "samples_per_step=4",
        "steps=1",
        "eval_every=1",
        "evaluation.final_images=1",
        "policy.lora.rank=1,2",
    ]
    done = accelerated(
        "alignlab.train", "-m", *(w for w in tiny(tiny_sd, *sizes) if w != "policy.lora.rank=2"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (sweep,) = (tmp_path / "multirun").iterdir()
    runs = [path.parent for path in sweep.glob("*/summary.json")]
    assert sorted(read_config(run)["policy"]["lora"]["rank"] for run in runs) == [1, 2] and [
        len(lines(run)) for run in runs
    ] == [
        1,
        1,
    ]
    refused = accelerated("alignlab.train", "samples_per_step=6", "micro_batch=2", cwd=tmp_path)
    wrong = "error: samples_per_step=6 cannot be dealt out in micro-batches of 2 to 2 processes"
    assert refused.stderr.count(wrong) == 1


# -- a process that is killed

KILLED = """algo=ddpo optimizer.eps=1e-6 micro_batch=2 evaluation.prompts=1 evaluation.images=2
    evaluation.final_images=1""".split()
SHORT = "samples_per_step=4 steps=2 eval_every=2 sampler.steps=2".split()
LONG = "samples_per_step=4 steps=4 eval_every=4 sampler.steps=2 algo.updates_per_epoch=2".split()


def check_left(run: Path, said: str, dead: int) -> None:
    """One sentence, no traceback, no file that is half there (but what process 0 was at when it was killed
    itself)."""
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    assert (
        f"error: process {dead} has ended, so process {1 - dead} ends too: {run} is as its last checkpoint "
        "left it; " in said
    )
    assert f"go on, on 2 processes or on one, with python -m alignlab.train resume={run}" in said
    assert dead == 0 or not [path for path in run.rglob(".*") if path.name != ".lock"]
    assert not (run / "summary.json").exists()


def check_goes_on(whole: Path, two: Path, one: Path) -> None:
    """Two processes end where undisturbed ones do, bit for bit; one process to 1e-5, in weights that moved by
    much more."""
    assert same_weights(whole, two) and lines(whole) == lines(two)
    first, a, b = (
        load_file(sorted((run / "checkpoints").glob("step_*"))[k] / "policy.safetensors")
        for run, k in ((one, 0), (whole, -1), (one, -1))
    )
    moved = max((a[key] - first[key]).abs().max().item() for key in a)
    assert moved > 5e-4 and max((a[key] - b[key]).abs().max().item() for key in a) < 1e-5
    assert [line["step"] for line in lines(one)] == [line["step"] for line in lines(whole)]
    assert not [path for run in (one, two) for path in run.rglob(".*")]


def test_one_of_two_is_killed(tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 1 while both sample, process 0 for a minute; process 0 while it writes a checkpoint. The other
    one ends with a sentence and code 69, and the run goes on, on two processes or on one."""
    words, whole, killed = tiny(tiny_sd, *KILLED, *SHORT), tmp_path / "whole", tmp_path / "killed"
    assert forked(tmp_path, monkeypatch, *words, f"output_dir={whole}") == [0, 0], (
        tmp_path / "0.txt"
    ).read_text()

    def die() -> None:
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def in_sampling(r: int) -> None:
        monkeypatch.setattr(peers, "GRACE", 1.0)
        real, seen = collected_module.rollout, []

        def rollout(*its: Any, **how: Any) -> Any:
            seen.append(1)
            if len(seen) == 2:
                die() if r == 1 else time.sleep(60)
            return real(*its, **how)

        monkeypatch.setattr(collected_module, "rollout", rollout)

    def in_writing(r: int) -> None:
        real = Run.save_checkpoint

        def save(self: Run, step: int, *what: Any) -> None:
            if step == 1:
                monkeypatch.setattr(runs_module, "seal", lambda folder: die())
            real(self, step, *what)

        monkeypatch.setattr(Run, "save_checkpoint", save)

    runs = tmp_path / "two", tmp_path / "one"
    for dead, disturb, run in ((1, in_sampling, runs[0]), (0, in_writing, runs[1])):
        codes = forked(tmp_path, monkeypatch, *words, f"output_dir={run}", disturb=disturb)
        assert time.time() - killed.stat().st_mtime < 20
        assert (codes[dead], codes[1 - dead]) == (-signal.SIGKILL, LOST)
        check_left(run, (tmp_path / f"{1 - dead}.txt").read_text(), dead)
    assert forked(tmp_path, monkeypatch, f"resume={runs[0]}") == [0, 0], (tmp_path / "0.txt").read_text()
    assert command_line(monkeypatch, f"resume={runs[1]}") == 0
    check_goes_on(whole, *runs)


def test_one_of_two_hangs(tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that lives and does not answer is given up after TIMEOUT; it ends too when it wakes up."""

    def hang(r: int) -> None:
        monkeypatch.setattr(ranks, "TIMEOUT", timedelta(seconds=3))
        monkeypatch.setattr(peers, "TIMEOUT", timedelta(seconds=3))
        if r == 1:
            monkeypatch.setattr(Run, "load_checkpoint", lambda self: time.sleep(60))
        monkeypatch.setattr(peers, "GRACE", 1.0)

    assert forked(tmp_path, monkeypatch, *tiny(tiny_sd, f"output_dir={tmp_path / 'run'}"), disturb=hang) == [
        LOST,
        LOST,
    ]
    said = [(tmp_path / f"{r}.txt").read_text() for r in (0, 1)]
    assert (
        said[0].count(
            "error: the other processes have not answered for 0.05 minutes, so process 0 ends too: "
        )
        == 1
    )
    assert "Traceback" not in "".join(said) and "error: " not in said[1]


def workers(launcher: int) -> dict[str, int]:
    """The pids of a launcher's processes, by their RANK."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            named = (
                dict(word.partition("=")[::2] for word in (place / "environ").read_text().split("\0"))
                if parent == launcher
                else {}
            )
        except OSError:
            continue  # gone meanwhile
        if "RANK" in named:
            found[named["RANK"]] = int(place.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_one_of_two_is_killed_under_a_launcher(tiny_sd: str, tmp_path: Path) -> None:
    """The same from outside, at any moment: `accelerate launch`, whose own code is 1, and two processes that
    nothing looks after."""
    words, whole = tiny(tiny_sd, *KILLED, *LONG), tmp_path / "whole"
    done = accelerated("alignlab.train", *words, f"output_dir={whole}")
    assert done.returncode == 0, done.stderr[-3000:]

    def killed(
        run: Path, calls: list[list[str]], places: list[dict[str, str]], dead: int
    ) -> tuple[list[int], str]:
        said = run.with_suffix(".txt")
        with said.open("w") as file:
            began = [
                subprocess.Popen(
                    [*call, f"output_dir={run}"], env=ENVIRONMENT | place, stdout=file, stderr=file
                )
                for call, place in zip(calls, places, strict=True)
            ]
        while (
            not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 2
        ):
            assert all(process.poll() is None for process in began), said.read_text()
            time.sleep(0.02)
        its = (
            workers(began[0].pid)
            if len(began) == 1
            else {str(r): process.pid for r, process in enumerate(began)}
        )
        assert its.keys() == {"0", "1"}
        os.kill(its[str(dead)], signal.SIGKILL)
        since = time.monotonic()
        codes = [process.wait(60) for process in began]
        took = time.monotonic() - since
        assert not [pid for pid in its.values() if Path(f"/proc/{pid}").exists()]
        print(
            f"process {dead} of two killed, {'under accelerate' if len(began) == 1 else 'no launcher'}: all "
            f"ended after {took:.1f} s"
        )
        return codes, said.read_text()

    one, two = tmp_path / "one", tmp_path / "two"
    codes, said = killed(two, [launch("alignlab.train", *words)], [{}], 1)
    assert codes == [1] and f"error: process 1 has ended, so process 0 ends too: {two} is as" in said
    codes, said = killed(one, [[sys.executable, "-m", "alignlab.train", *words]] * 2, places(free_port()), 0)
    assert codes == [-signal.SIGKILL, LOST]
    check_left(one, said, 0)
    done = accelerated("alignlab.train", f"resume={two}")
    assert done.returncode == 0, done.stderr[-3000:]
    warm.run(
        [sys.executable, "-m", "alignlab.train", f"resume={one}"],
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
    )
    check_goes_on(whole, two, one)
