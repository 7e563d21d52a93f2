"""Two processes are one: the same parameters, files and numbers as one process on the union of their rows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from alignlab import ranks
from alignlab.runs import read_config
from alignlab.train import train
from tests.running import configured, lines, pairs, same_weights, tiny

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = {
    "rwr": ["algo=rwr", "algo.inner_epochs=1", "algo.weighting=dense"],
    "ddpo sf": ["algo=ddpo", "algo.estimator=sf"],
    "ddpo is": ["algo=ddpo", "algo.updates_per_epoch=3", "algo.timestep_fraction=0.7", "kl_coeff=0.1"],
    "dpo": ["algo=dpo", "algo.data={pairs}", "algo.beta=100", "algo.updates_per_epoch=2", "algo.prompt_dropout=0.3"],
    "draft": ["algo=draft", "algo.truncation=per_rollout"],
    "draftp": ["algo=draftp", "kl_coeff=0.5"],
}
SIZES = ["samples_per_step=8", "micro_batch=2", "steps=2", "eval_every=2", "evaluation.final_images=1", "optimizer.eps=1e-6"]


def accelerated(script: str, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
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
    call += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "0", "-m", script, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(call, env=environment, capture_output=True, text=True, cwd=cwd)


SHARDED = "draft sharded"
RUNS = {
    f"{name} {kind}": [*OBJECTIVES[name], f"policy.full={kind == 'full'}"] for name in OBJECTIVES for kind in ("lora", "full")
}
RUNS[SHARDED] = ["algo=draft", "algo.k=2", "policy.full=true", "policy.shard=true", "policy.checkpointing=true"]
SLOW = {"rwr full", "ddpo sf full", "draft full", "dpo full"}
"""Their LoRA and the other objectives' full fine-tuning are quick enough: pytest -m 'slow or not slow'."""


@pytest.fixture(scope="session")
def both(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, tuple[Path, Path]]:
    """Every objective's run by one process and by two, LoRA and full; and one whose weights are split. The slow ones when asked for."""
    here, asked, out = tmp_path_factory.mktemp("ranks"), {}, {}
    table = pairs(here / "pairs")
    wanted = {item.callspec.params["name"] for item in request.session.items if "of_one_process" in item.nodeid}
    runs = {name: words for name, words in RUNS.items() if name in wanted or name == SHARDED}
    for name, words in runs.items():
        words = [word.format(pairs=table) for word in words]
        c, one, two = configured(*tiny(tiny_sd, *SIZES, *words)), here / f"one {name}", here / f"two {name}"
        train(c, one)
        asked[str(two)], out[name] = c, (one, two)
    (here / "asked.json").write_text(json.dumps(asked))
    done = accelerated("tests.train_each", str(here / "asked.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch    2") == len(runs)  # process 1 says nothing
    return out


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS])
def test_the_parameters_of_one_process(name: str, both: dict[str, tuple[Path, Path]]) -> None:
    """To 1e-5, after two epochs that move them by much more. (AdamW's eps is raised to 1e-6: where a gradient is all round-off, it would
    make a step of its sign.) The numbers of metrics.jsonl are those of the whole, and the files are the same."""
    one, two = both[name]
    first, a, b = (
        load_file(run / "checkpoints" / f"step_{k:06d}" / "policy.safetensors") for run, k in ((one, 1), (one, 2), (two, 2))
    )
    moved = max((a[key] - first[key]).abs().max().item() for key in a)
    apart = max((a[key] - b[key]).abs().max().item() for key in a)
    assert moved > 5e-4 and apart < 1e-5
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
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
    files = [{str(p.relative_to(run)) for p in run.rglob("*") if "tensorboard" not in str(p)} for run in (one, two)]
    assert files[0] == files[1]


def test_a_split_model_is_saved_whole(both: dict[str, tuple[Path, Path]]) -> None:
    """What two processes with half the weights each saved is a pipeline folder that diffusers loads, and a state that one goes on from."""
    one, two = both[SHARDED]
    mine, theirs = (UNet2DConditionModel.from_pretrained(run / "model" / "unet").state_dict() for run in (one, two))
    assert max((mine[key] - theirs[key]).abs().max().item() for key in mine) < 1e-5
    moments = [
        torch.load(run / "checkpoints/step_000002/state.pt", weights_only=True)["lab"]["optimizer"]["state"] for run in (one, two)
    ]
    assert [len(state) for state in moments] == [len(mine)] * 2


@pytest.mark.slow
def test_a_split_run_goes_on(both: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Stopped after its first epoch and resumed, two processes with half the weights each end where the undisturbed ones did, bit for bit."""
    _, two = both[SHARDED]
    again = shutil.copytree(two, tmp_path / "again")
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "step_000002")
    (tmp_path / "asked.json").write_text(json.dumps({str(again): read_config(again)}))
    done = accelerated("tests.train_each", str(tmp_path / "asked.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert same_weights(two, again) and lines(two) == lines(again)


def test_rows_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process's slices are its own rows, all of them once; the shares add up to 1; all have equally many slices."""
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
        seen += [(row + ranks.own(12).start, step) for share, part in parts if share for row, step in part.tolist()]
        assert all(row in range(4) for _, part in parts for row in part[:, 0].tolist())
    assert sorted(seen) == sorted(map(tuple, items.tolist())) and (len(slices) == 1 or not even) and total == pytest.approx(1)


def test_a_sweep_of_two_processes(tiny_sd: str, tmp_path: Path) -> None:
    """Both processes agree on the folders of a sweep, and only process 0 writes there."""
    sizes = ["samples_per_step=4", "steps=1", "eval_every=1", "evaluation.final_images=1", "policy.lora.rank=1,2"]
    done = accelerated("alignlab.train", "-m", *(w for w in tiny(tiny_sd, *sizes) if w != "policy.lora.rank=2"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (sweep,) = (tmp_path / "multirun").iterdir()
    runs = [path.parent for path in sweep.glob("*/summary.json")]
    assert sorted(read_config(run)["policy"]["lora"]["rank"] for run in runs) == [1, 2] and [len(lines(run)) for run in runs] == [
        1,
        1,
    ]
    refused = accelerated("alignlab.train", "samples_per_step=6", "micro_batch=2", cwd=tmp_path)
    assert refused.stderr.count("error: samples_per_step=6 cannot be dealt out in micro-batches of 2 to 2 processes") == 1
