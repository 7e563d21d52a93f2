"""Will it fit: the memory that a dry run predicts is what a real run allocates, and the command proposes what
fits."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from alignlab import plan
from alignlab.config.compose import CONF
from alignlab.config.schema import TrainConfig
from alignlab.planning import fit as memory
from alignlab.planning.footprint import footprint
from alignlab.rewards.brightness import Brightness
from alignlab.train import train_epoch
from alignlab.training.evaluation import measure_all
from alignlab.training.setup import Lab
from tests.models import tiny as families
from tests.running import command_line, configured, pairs
from tests.running import tiny as tiny_run

CASES = {
    "DRaFT-1": "algo=draft micro_batch=8 samples_per_step=16",
    "DRaFT-1, full": "algo=draft micro_batch=4 policy.full=true",
    "DRaFT-N": "algo=draft algo.k=3 micro_batch=2",
    "DRaFT-N, checkpointing": "algo=draft algo.k=3 micro_batch=4 policy.checkpointing=true",
    "DRaFT-LV": "algo=draft algo.lv_samples=2 micro_batch=2",
    "DRaFT+, K = N": "algo=draftp algo.k=3 micro_batch=4",
    "DRaFT+, bf16": "algo=draftp micro_batch=8 precision=bf16",
    "DDPO": "algo=ddpo micro_batch=4 reward=jpeg_compressibility",
    "DDPO, bf16 and KL": "algo=ddpo micro_batch=4 precision=bf16 kl_coeff=0.1",
    "DDPO, full, checkpointing": "algo=ddpo micro_batch=8 policy.full=true policy.checkpointing=true",
    "RWR": "algo=rwr algo.inner_epochs=1 micro_batch=2",
    "DPO": "algo=dpo algo.data={pairs} micro_batch=4",
    "DPO, full": "algo=dpo algo.data={pairs} micro_batch=2 policy.full=true",
    "DPO, online": "algo=dpo_online micro_batch=4 algo.ref_update_every=1",
    "KTO": "algo=kto algo.data={pairs} micro_batch=4",
    "SFT": "algo=sft algo.data={pairs} micro_batch=4",
    "SDXL, DRaFT-N": "model=sdxl algo=draft algo.k=3 micro_batch=4",
    "SD3, DDPO": "model=sd35 algo=ddpo sampler=flow eval_sampler=flow micro_batch=8 "
    "model.max_sequence_length=8",
}
SMALL = """steps=2 samples_per_step=8 prompts.per_prompt=4 evaluation.final_images=3
    algo.updates_per_epoch=2""".split()


@pytest.fixture(scope="session")
def folders(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pipelines by the name of their model, and a few pairs of images."""
    made = {
        name: str(make(tmp_path_factory.mktemp(name)))
        for name, make in (("sdxl", families.sdxl), ("sd35", families.sd3))
    }
    return {"emoji": tiny_sd, "pairs": pairs(tmp_path_factory.mktemp("pairs")), **made}


def words_of(case: str, folders: dict[str, str]) -> list[str]:
    """The overrides of a case on the tiny pipeline of its family; later ones win."""
    its = dict(word.split("=", 1) for word in CASES[case].format(**folders).split())
    small = {
        k: v
        for k, v in (word.split("=", 1) for word in SMALL)
        if k != "algo.updates_per_epoch" or its["algo"] in ("ddpo", "dpo", "dpo_online", "kto", "rwr", "sft")
    }
    base = dict(word.split("=", 1) for word in tiny_run(folders[its.get("model", "emoji")]))
    if its.get("model") == "sdxl":
        its["model.variant"] = "null"
    return [f"{k}={v}" for k, v in (base | small | its).items()]


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had handed out at once in `run`, of those it handed out in there.

    The profiler's events come from the allocator itself: each malloc and free, scratch memory of kernels
    included. So this shares nothing with a count of tensors, and unlike the process's resident memory it
    knows no heap that is kept for later.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now = most = 0
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def alive() -> dict[int, int]:
    """Bytes of every storage of a tensor that Python knows, by address."""
    gc.collect()
    tensors = [
        thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.device.type == "cpu"
    ]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def measured(c: TrainConfig) -> tuple[int, int]:
    """Bytes that a real lab holds, and the most that two real epochs, and an evaluation after them, had
    beside: their two sums."""
    before = alive()

    def held() -> int:
        return sum(size for place, size in alive().items() if place not in before)

    lab = Lab.from_config(c)
    measure_all(
        lab, c
    )  # a run begins with it: prompts are encoded, and the networks of rewards are on the device
    start = held()
    training = start + allocated(lambda: [train_epoch(lab, c, number) for number in (1, 2)])
    return training, held() + allocated(lambda: measure_all(lab, c))


QUICK = {"DRaFT-N, checkpointing", "DRaFT+, bf16", "DDPO", "SD3, DDPO"}
"""The others are slow together: pytest -m 'slow or not slow'."""


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_the_prediction_is_within_15_percent(case: str, folders: dict[str, str]) -> None:
    """Of the peak of real epochs and of a real evaluation on the CPU, by the allocator's own events."""
    c = configured(*words_of(case, folders))
    predicted, (training, evaluation) = footprint(c, train_epoch, device="cpu"), measured(c)
    print(
        f"| {case} | {predicted.training / 1e6:.2f} | {training / 1e6:.2f} | "
        f"{predicted.training / training - 1:+.1%} | "
        f"{predicted.evaluation / 1e6:.2f} | {evaluation / 1e6:.2f} | "
        f"{predicted.evaluation / evaluation - 1:+.1%} |"
    )
    assert predicted.training == pytest.approx(training, rel=0.15)
    assert predicted.evaluation == pytest.approx(evaluation, rel=0.15)


def test_nobody_is_asked(tiny_sd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that is computed elsewhere is not sent the noise of a dry run."""
    sent: list[str] = []
    monkeypatch.setattr(Brightness, "submit", lambda *_: sent.append("images"), raising=False)
    words = tiny_run(tiny_sd, "algo=ddpo", "algo.updates_per_epoch=1", "eval_rewards=[brightness]")
    assert footprint(configured(*words), train_epoch, device="cpu").training > 0 and not sent


def test_the_command(folders: dict[str, str], monkeypatch, capsys) -> None:
    """The table, the largest micro_batch that fits (it does, and the next one does not), images/s, and the
    command to type."""
    words = [
        w
        for w in words_of("DDPO, full, checkpointing", folders)
        if not w.startswith(("steps=", "device=", "micro_batch="))
    ]
    assert (
        command_line(
            monkeypatch,
            *words,
            "device=cpu",
            "micro_batch=1",
            f"memory={12.5e6 * 1.15 / 2**30}",
            "measure=true",
            command=plan,
        )
        == 0
    )
    out = capsys.readouterr().out
    found = int(out.partition("the largest micro_batch that fits in 13.7 MiB is ")[2].partition(":")[0])
    assert f"micro_batch={found}\n" in out and "memory=" not in out.partition("alignlab.train")[2]
    assert "peak of an epoch" in out and "images/s on" in out
    peaks = [
        footprint(configured(*words, "device=cpu", f"micro_batch={m}"), train_epoch, device="cpu").training
        for m in (found, 2 * found)
    ]
    assert peaks[0] <= 12.5e6 < peaks[1]


def test_a_gpu_that_is_not_here(folders: dict[str, str], tmp_path: Path, monkeypatch, capsys) -> None:
    """Planned from weights that hold nothing: they are not read. Without memory= it says what is missing."""
    words = [w for w in words_of("DRaFT+, bf16", folders) if not w.startswith("device=")]
    copied = tmp_path / "pipeline"
    shutil.copytree(folders["emoji"], copied)
    for file in copied.rglob("*.safetensors"):
        file.write_bytes(b"")
    words = [w.replace(folders["emoji"], str(copied)) for w in words]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command_line(monkeypatch, *words, "device=cuda", command=plan) == 0
    assert "say memory=GiB" in capsys.readouterr().out
    assert command_line(monkeypatch, *words, "device=cuda", "memory=0.001", command=plan) == 0
    assert (
        "not even micro_batch=1 fits in 1.0 MiB; try policy.checkpointing=true, offload=true"
        in capsys.readouterr().out
    )


MISTAKES = {
    "memory": ("memory=-1", "memory=-1.0 must be positive (GiB)"),
    "its own key": ("memry=24", "memry is not a known key; did you mean memory?"),
    "the run's": ("memory=24 lr=-1", "lr=-1.0 must be positive"),
    "measured elsewhere": (
        "device=cuda measure=true",
        "measure=true with device=cuda, but this torch sees no such device",
    ),
}


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(words: str, said: str, monkeypatch, capsys) -> None:
    """One sentence, exit code 2, no traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command_line(monkeypatch, *words.split(), command=plan) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_the_largest() -> None:
    """By bisection, of candidates that fit up to some size."""
    assert [memory.largest([1, 2, 4, 8], lambda k, room=room: k <= room) for room in (0, 1, 5, 9)] == [
        None,
        1,
        4,
        8,
    ]


def test_its_groups_are_those_of_train() -> None:
    """plan.yaml cannot include train.yaml (whose help and folders of sweeps it would take too), so its list
    is compared."""
    train, own = (
        yaml.safe_load((CONF / f"{name}.yaml").read_text())["defaults"][1:] for name in ("train", "plan")
    )
    assert own == train


def test_proposals_hold_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group-wise reward is given micro-batches of whole groups only, the smallest of them too where the
    evaluation is what must shrink."""
    c = configured(
        "algo=ddpo",
        "reward=clip_diversity",
        "prompts.per_prompt=6",
        "samples_per_step=48",
        "micro_batch=48",
        "device=cpu",
    )
    tried: list[int] = []

    def pretend(c: TrainConfig, *_: object, **__: object) -> SimpleNamespace:
        tried.append(c.micro_batch)
        return SimpleNamespace(training=c.micro_batch, evaluation=c.evaluation.batch)

    monkeypatch.setattr(memory, "footprint", pretend)
    now: Any = pretend(c)
    assert memory.proposals(c, now, 20.0, train_epoch) == {"micro_batch": 12, "evaluation.batch": 16}
    assert all(k % 6 == 0 for k in tried)
