"""The loop, on a real (tiny) pipeline: equal seeds give equal runs, a stopped run goes on bit for bit, a bad
number stops it."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

import alignlab.train as train_module
from alignlab.config.schema import TrainConfig
from alignlab.engine.noise import FIRST, noise_key
from alignlab.engine.rollout import rollout
from alignlab.objectives.draft import DRaFT
from alignlab.rewards.brightness import Brightness
from alignlab.train import train
from alignlab.training.setup import Lab
from tests import warm
from tests.running import command_line, configured, lines, same_weights, tiny

# each with the state a resume must carry: advantage buffers, a running quantile, random truncation, a
# normalised reward
ALGORITHMS = {
    "ddpo": [
        "algo=ddpo",
        "reward=jpeg_compressibility",
        "algo.statistics.min_count=2",
        "algo.updates_per_epoch=2",
    ],
    "rwr": [
        "algo=rwr",
        "reward=jpeg_compressibility",
        "algo.weighting=sparse",
        "algo.streaming=6",
        "algo.scope=batch",
        "algo.standardise=false",
        "algo.updates_per_epoch=2",
        "algo.inner_epochs=2",
    ],
    "draftp": [
        "algo=draftp",
        "algo.truncation=per_rollout",
        "reward=[brightness,colour]",
        "reward.brightness.normalize=true",
    ],
}


@pytest.fixture(scope="module")
def finished(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An uninterrupted run of each algorithm."""
    home = tmp_path_factory.mktemp("finished")
    for name, words in ALGORITHMS.items():
        train(configured(*tiny(tiny_sd, *words)), home / name)
    return {name: home / name for name in ALGORITHMS}


def check_equal(one: Path, other: Path) -> None:
    """Metrics, evaluations, pictures and weights are bit-identical."""
    assert lines(one) == lines(other)
    a, b = (json.loads((run / "summary.json").read_text()) for run in (one, other))
    assert (a["base"], a["final"]) == (b["base"], b["final"])
    pictures = [{p.name: p.read_bytes() for p in (run / "samples").iterdir()} for run in (one, other)]
    assert pictures[0] == pictures[1]
    assert same_weights(one, other)


def at_epoch(k: int, action: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Lets `action` happen when epoch k begins."""
    real = train_module.train_epoch

    def train_epoch(lab: Lab, c: TrainConfig, epoch: int) -> dict[str, Any]:
        if epoch == k:
            action()
        return real(lab, c, epoch)

    patch.setattr(train_module, "train_epoch", train_epoch)


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ALGORITHMS)
def test_same_seed_same_run(name: str, finished, tiny_sd, tmp_path) -> None:
    """Twice the same command is the same run, bit for bit; another seed is another run."""
    train(configured(*tiny(tiny_sd, *ALGORITHMS[name])), tmp_path / "again")
    check_equal(finished[name], tmp_path / "again")
    train(configured(*tiny(tiny_sd, *ALGORITHMS[name], "seed=1", "steps=1")), tmp_path / "other")
    assert lines(tmp_path / "other")[0]["reward/mean"] != lines(finished[name])[0]["reward/mean"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_interrupted_and_resumed(name: str, finished, tiny_sd, tmp_path, monkeypatch) -> None:
    """A run stopped after its checkpoint, with later lines and half a checkpoint on the disk, ends as if
    never stopped."""
    c, run = configured(*tiny(tiny_sd, *ALGORITHMS[name], "checkpoint_every=2")), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_epoch(4, stop, patch)
        train(c, run)
    assert len(lines(run)) == 3
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000000", "step_000002"]
    half = run / "checkpoints" / ".step_000003"
    half.mkdir()
    (half / "policy.safetensors").write_bytes(b"half a file")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "re')
    train(c, run)
    check_equal(finished[name], run)


def test_killed_and_resumed(finished, tiny_sd, tmp_path, monkeypatch, capsys) -> None:
    """SIGKILL in the middle of a real command; `resume=RUN` alone finishes it, bit for bit."""
    code = """import os, signal, alignlab.train as t
real = t.train_epoch
def dying(lab, c, epoch):
    return os.kill(os.getpid(), signal.SIGKILL) if epoch == 3 else real(lab, c, epoch)
t.train_epoch = dying
t.main()"""
    run = tmp_path / "run"
    words = tiny(tiny_sd, *ALGORITHMS["ddpo"], f"output_dir={run}")
    done = warm.run([sys.executable, "-c", code, *words], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (run / "summary.json").exists() and len(lines(run)) == 2
    assert command_line(monkeypatch, f"resume={run}") == 0
    check_equal(finished["ddpo"], run)
    assert f"pictures: {run}/samples" in capsys.readouterr().out


def broken_reward(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(Brightness, "__call__", lambda self, images, prompts: images.mean((1, 2, 3)) * float("nan"))
    return (
        r"error: epoch 3: reward brightness is nan for image \d of prompt '.*', image \d of prompt '.*' \(2 "
        r"of 2 images\)"
    )


def broken_gradient(patch: pytest.MonkeyPatch) -> str:
    loss = DRaFT.loss
    patch.setattr(DRaFT, "loss", lambda *a: (loss(*a)[0] * float("inf"), {}))
    return (
        r"error: epoch 3, update 1: the loss is -?inf for image \d of prompt '.*', image \d of prompt '.*'; "
        r"lower lr or kl_coeff "
        "in another output_dir, or resume with on_nonfinite=skip; the last checkpoint is intact"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "algo=ddpo samples_per_step=4 sampler.steps=1 algo.updates_per_epoch=1",
            "no step of this sampler has a density",
        ),
        (
            "algo=draftp kl_coeff=1 algo.kl=trajectory sampler.eta=1",
            "algo.kl=trajectory: none of the kept steps has a density",
        ),
    ],
)
def test_a_sampler_that_teaches_nothing(words, said, tiny_sd, tmp_path, monkeypatch, capsys) -> None:
    """What only the model's scheduler can tell is one sentence too, with exit code 2."""
    shutil.copytree(tiny_sd, tmp_path / "model")
    config = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"set_alpha_to_one": True}))
    code = command_line(
        monkeypatch, *tiny(str(tmp_path / "model"), *words.split(), f"output_dir={tmp_path}/run")
    )
    assert code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("broken", [broken_reward, broken_gradient])
def test_a_bad_number_stops_the_run(broken, tiny_sd, tmp_path, monkeypatch, capsys) -> None:
    """One sentence, exit code 2, no step is taken; the checkpoint before is whole: mended, the run ends as if
    nothing had been."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    said = []
    with monkeypatch.context() as patch:
        at_epoch(3, lambda: said.append(broken(patch)), patch)
        assert command_line(patch, *tiny(tiny_sd, f"output_dir={run}")) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and re.fullmatch(said[0], err.splitlines()[-1])
    assert len(lines(run)) == 2
    assert command_line(monkeypatch, *tiny(tiny_sd, f"output_dir={run}")) == 0
    train(configured(*tiny(tiny_sd)), whole)
    check_equal(whole, run)


@pytest.mark.parametrize("name", ["ddpo", "rwr"])
def test_offload(name: str, finished, tiny_sd, tmp_path) -> None:
    """Trajectories in host memory change nothing."""
    train(configured(*tiny(tiny_sd, *ALGORITHMS[name], "offload=true")), tmp_path / "run")
    check_equal(finished[name], tmp_path / "run")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_half_precision(name: str, tiny_sd, tmp_path) -> None:
    """bf16 trains: float32 adapters, finite numbers, weights that move."""
    run = tmp_path / "run"
    train(configured(*tiny(tiny_sd, *ALGORITHMS[name], "precision=bf16", "steps=2")), run)
    first, last = (load_file(run / "checkpoints" / f"step_00000{k}" / "policy.safetensors") for k in (1, 2))
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in last.values())
    assert any(not torch.equal(first[k], last[k]) for k in last)
    assert all(line["loss"] is not None and line["grad_norm"] > 0 for line in lines(run))


def test_full_fine_tuning_saves_a_pipeline(tiny_sd, tmp_path) -> None:
    """policy.full=true: RUN/model is a pipeline folder that plain diffusers loads, with the weights of the
    last checkpoint."""
    run = tmp_path / "run"
    train(configured(*tiny(tiny_sd, "policy.full=true", "steps=2")), run)
    learned = load_file(run / "checkpoints" / "step_000002" / "policy.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(run / "model", safety_checker=None)
    base = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    assert all(torch.equal(v, learned[k]) for k, v in pipe.unet.state_dict().items())
    assert any(not torch.equal(v, learned[k]) for k, v in base.unet.state_dict().items())
    again = configured(*tiny(str(run / "model"), "steps=1"))
    summary = train(again, tmp_path / "more")  # and alignlab goes on from it
    assert summary["base"]["reward"] == pytest.approx(
        json.loads((run / "summary.json").read_text())["final"]["reward"], abs=1e-6
    )


def test_the_saved_lora_is_what_the_run_learned(tiny_sd, tmp_path) -> None:
    """Plain diffusers, `load_lora_weights(RUN/model)` and its own DDIM draw the images of the run's last
    checkpoint (alpha != rank)."""
    c, run = (
        configured(*tiny(tiny_sd, "policy.lora.alpha=8", "steps=3", "lr=0.03", "eval_sampler.steps=4")),
        tmp_path / "run",
    )
    train(c, run)
    lab = Lab.from_config(c)
    key = noise_key(["a cat", "a dog", "a fish"], seed=5, stream="look")
    base = rollout(lab.policy, lab.eval_sampler, key, store="image").images
    lab.policy.load_state_dict(load_file(run / "checkpoints" / "step_000003" / "policy.safetensors"))
    with torch.no_grad():
        ours = rollout(lab.policy, lab.eval_sampler, key, store="image").images
    assert (ours - base).abs().mean() > 0.05

    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(str(run / "model"))
    settings = {
        "num_inference_steps": 4,
        "guidance_scale": lab.eval_sampler.guidance_scale,
        "eta": 0.0,
        "output_type": "pt",
    }
    theirs = pipe(list(key.prompts), latents=key.normal(FIRST, lab.policy.latent_shape), **settings).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_a_sweep_by_the_real_command(tiny_sd, tmp_path) -> None:
    """Two jobs, two finished run folders named after what differs, and different."""
    words = [w for w in tiny(tiny_sd, "steps=1", "algo=draftp") if not w.startswith("output_dir")]
    call = [
        sys.executable,
        "-m",
        "alignlab.train",
        "-m",
        *words,
        "kl_coeff=0,2",
        "lr=0.1",
        f"output_dir={tmp_path}/sweep",
    ]
    done = warm.run(call, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = sorted(p.parent for p in tmp_path.glob("sweep/**/summary.json"))
    assert len(runs) == 2
    assert [lines(r)[0]["kl"] is None for r in runs] == [True, False]
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "runs").exists()


def test_micro_batches_do_not_change_the_run(tiny_sd, tmp_path) -> None:
    """One micro-batch of 4 or four of 1: the same losses and weights to round-off."""
    for name, size in {"one": 4, "four": 1}.items():
        train(
            configured(
                *tiny(tiny_sd, "algo=ddpo", "reward=jpeg_compressibility", f"micro_batch={size}", "steps=2")
            ),
            tmp_path / name,
        )
    a, b = lines(tmp_path / "one"), lines(tmp_path / "four")
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4, abs=1e-5)
        assert x["reward/mean"] == pytest.approx(y["reward/mean"], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "branches", "forwards", "backwards"),
    [
        (["algo=draft", "algo.k=2"], 2, 3, 2),
        (
            ["algo=draft", "algo.k=2", "policy.checkpointing=true"],
            2,
            3 + 2,
            2,
        ),  # recomputed in the backward pass
        (["algo=draft", "algo.k=1", "sampler.guidance_scale=1"], 1, 3, 1),
        (
            ["algo=draftp", "kl_coeff=1", "algo.k=1"],
            2,
            3 + 1,
            1,
        ),  # the reference's pass; at K = 1 its input is a constant
        (["algo=draft", "algo.k=1", "algo.lv_samples=2"], 2, 3 + 2, 1 + 2),
        (["algo=ddpo", "reward=jpeg_compressibility", "algo.updates_per_epoch=1"], 2, 3 + 3, 3),
    ],
)
def test_budgets_are_counted(words, branches, forwards, backwards, tiny_sd, tmp_path) -> None:
    """Passes of single latents in each epoch, by hand: 4 samples, 3 steps, two branches with guidance;
    evaluations do not count."""
    train(configured(*tiny(tiny_sd, "sampler.guidance_scale=3", "steps=2", *words)), tmp_path)
    lv = 3 if "algo.lv_samples=2" in words else 1
    for line in lines(tmp_path):
        assert line["denoiser_forwards"] == 4 * branches * forwards
        assert line["denoiser_backwards"] == 4 * branches * backwards
        assert line["reward_queries"] == 4 * lv
