"""init_from=: the trained weights start where another run, a LoRA or a pipeline folder ends; the reference
stays the pretrained model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignlab.config.build import ConfigError
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import rollout
from alignlab.files.safe_folder import RunError
from alignlab.models.lora import LoRA
from alignlab.models.sd import StableDiffusion
from alignlab.train import train
from alignlab.training.setup import Lab
from tests.conftest import key
from tests.running import command_line, configured, lines, same_weights, tiny

MOVING = ("lr=0.1", "policy.lora.rank=4", "policy.lora.alpha=2")


@pytest.fixture(scope="module")
def first(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose LoRA has moved, alpha other than rank."""
    run = tmp_path_factory.mktemp("first") / "run"
    train(configured(*tiny(tiny_sd, "algo=rwr", "algo.inner_epochs=1", *MOVING)), run)
    return run


@pytest.fixture(scope="module")
def tuned(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained every weight."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    train(configured(*tiny(tiny_sd, "policy.full=true", "lr=0.01")), run)
    return run


def kohya_file(tiny_sd: str, run: Path, file: Path) -> Path:
    family = StableDiffusion(tiny_sd)
    state, config = family.read_lora(run / "model")
    family.save_kohya(file, state, config["alpha"])
    return file


def weights(*words: str) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in Lab.from_config(configured(*words)).policy.state_dict().items()}


def evaluations(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k.startswith("eval/")}


def test_two_stages(first: Path, tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RWR, then DDPO from where it ended: at step 0 the evaluation is the first run's last (the distance to
    the pretrained model is measured with another sampler); the second run learns on, and a stopped one goes
    on bit for bit when the first is gone."""
    words = tiny(tiny_sd, "algo=ddpo", *MOVING, f"init_from={first}", "steps=2")
    train(configured(*words), tmp_path / "second")
    start = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[0])
    before = evaluations(lines(first)[-1])
    assert before and all(start[k] == v for k, v in before.items() if not k.startswith("eval/kl_"))
    assert start["eval/kl_eps_guided"] > 1e-4
    assert lines(tmp_path / "second")[-1]["eval/reward"] != start["eval/reward"]
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("alignlab.train.train_epoch", stop)
        train(configured(*[w.replace(str(first), str(moved)) for w in words]), stopped)
    shutil.rmtree(moved)
    assert command_line(monkeypatch, f"resume={stopped}") == 0
    assert lines(stopped) == lines(tmp_path / "second") and same_weights(stopped, tmp_path / "second")


def test_step_0_is_the_first_runs_end(first: Path, tiny_sd: str, tmp_path: Path) -> None:
    """With the same samplers every number of the evaluation, the distance to the pretrained model
    included."""
    words = tiny(tiny_sd, "algo=rwr", "algo.inner_epochs=1", *MOVING, f"init_from={first}", "steps=1")
    base = train(configured(*words), tmp_path / "run")["base"]
    start = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert evaluations(start) == evaluations(lines(first)[-1])
    assert base == json.loads((first / "summary.json").read_text())["final"]


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_every_form_gives_the_same_weights(first: Path, tiny_sd: str, tmp_path: Path) -> None:
    """The run, its LoRA folder, the file in it and a kohya file: the weights of the run's last checkpoint,
    bit for bit."""
    learned = load_file(first / "checkpoints" / "step_000004" / "policy.safetensors")
    file = kohya_file(tiny_sd, first, tmp_path / "kohya.safetensors")
    for form in (first, first / "model", first / "model" / "pytorch_lora_weights.safetensors", file):
        state = weights(*tiny(tiny_sd, *MOVING, f"init_from={form}"))
        assert state.keys() == learned.keys() and all(torch.equal(state[k], learned[k]) for k in state)


def test_full_fine_tuning_starts_at_a_pipeline(tuned: Path, tiny_sd: str) -> None:
    """Of a run, or of any folder; the reference is still the pretrained model."""
    learned = load_file(tuned / "checkpoints" / "step_000004" / "policy.safetensors")
    base = StableDiffusion(tiny_sd).denoiser.state_dict()
    for form in (tuned, tuned / "model"):
        policy = Lab.from_config(configured(*tiny(tiny_sd, "policy.full=true", f"init_from={form}"))).policy
        assert all(torch.equal(v, learned[k]) for k, v in policy.state_dict().items())
        with policy.reference():
            assert all(torch.equal(v, base[k]) for k, v in policy.family.denoiser.state_dict().items())
    assert any(not torch.equal(learned[k], base[k]) for k in base)


@torch.no_grad()
def test_full_fine_tuning_starts_at_a_lora(first: Path, tiny_sd: str, tmp_path: Path) -> None:
    """The LoRA is added to the weights: the images are those of the LoRA policy, all weights train, the
    reference has none of it."""
    family, base = StableDiffusion(tiny_sd), StableDiffusion(tiny_sd).denoiser.state_dict()
    state, config = family.read_lora(first / "model")
    with_lora = Policy(family, lora=LoRA(**config))
    with_lora.load_state_dict(state)
    for form in (first, kohya_file(tiny_sd, first, tmp_path / "kohya.safetensors")):
        lab = Lab.from_config(configured(*tiny(tiny_sd, "policy.full=true", f"init_from={form}")))
        images = [rollout(policy, lab.eval_sampler, key()).images for policy in (lab.policy, with_lora)]
        torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)
        with lab.policy.reference():
            assert (rollout(lab.policy, lab.eval_sampler, key()).images - images[0]).abs().max() > 0.01
            assert all(torch.equal(v, base[k]) for k, v in lab.policy.family.denoiser.state_dict().items())
        assert all(parameter.requires_grad for parameter in lab.policy.family.denoiser.parameters())


def test_mistakes_before_a_model_is_loaded(first: Path, tuned: Path, tiny_sd: str, tmp_path: Path) -> None:
    """One sentence each, from names and headers alone."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    shutil.copy(first / "config.yaml", tmp_path / "unfinished")
    whole = next((Path(tiny_sd) / "unet").glob("*.safetensors"))
    for words, said in (
        ("init_from=/nowhere", "init_from=/nowhere holds no weights; give a run folder, a LoRA folder"),
        (f"init_from={tmp_path}/empty", "holds no weights"),
        (f"init_from={tmp_path}/unfinished", "unfinished/model holds no weights; finish the run first"),
        (f"init_from={whole}", f"init_from={whole} is no LoRA; a whole model is given as model.path_or_id"),
        (
            f"init_from={tuned}",
            f"init_from={tuned} is a whole pipeline, and policy.full=false trains a LoRA; give it as "
            "model.path_or_id",
        ),
        (
            f"init_from={first}",
            "has rank 4 and alpha 2, but policy.lora has rank 8 and alpha 8; set policy.lora.rank=4 "
            "policy.lora.alpha=2",
        ),
    ):
        with pytest.raises(ConfigError) as refused:
            configured(*words.split())
        assert said in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_mistakes_that_the_model_shows(
    first: Path, tiny_sd: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Other targets, another rank in a kohya file, another model: exit code 2, one sentence, and no run
    folder."""
    file = kohya_file(tiny_sd, first, tmp_path / "kohya.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({k.replace("attentions_0", "attentions_9"): v for k, v in load_file(file).items()}, other)
    wide = tmp_path / "wide.safetensors"
    save_file({k: torch.cat([v, v], 1) if "lora_down" in k else v for k, v in load_file(file).items()}, wide)
    for words, said in (
        (
            (*MOVING, f"init_from={first}", "policy.lora.targets=[to_q,to_k]"),
            "set 'policy.lora.targets=[conv1,conv2,to_k,to_out.0,to_q,to_v]'",
        ),
        (
            (f"init_from={file}",),
            "has rank 4 and alpha 2, but policy.lora has rank 2 and alpha 8; set policy.lora.rank=4 "
            "policy.lora.alpha=2",
        ),
        ((*MOVING, f"init_from={other}"), "which the network has no place for"),
        ((*MOVING, f"init_from={wide}"), "is of another model: "),
        (("policy.full=true", f"init_from={wide}"), "is of another model: "),
    ):
        typed = tiny(tiny_sd, *words, f"output_dir={tmp_path}/run")
        assert command_line(monkeypatch, *typed) == 2
        err = capsys.readouterr().err
        assert said in err.splitlines()[-1] and "Traceback" not in err
        assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match=r"set 'policy\.lora\.targets="):
        Lab.from_config(
            configured(*tiny(tiny_sd, *MOVING, f"init_from={file}", "policy.lora.targets=[to_q]"))
        )


def test_where_it_started_is_part_of_the_science(first: Path, tiny_sd: str, tmp_path: Path) -> None:
    """A folder of a run without init_from is refused to one with it."""
    train(configured(*tiny(tiny_sd, *MOVING, "steps=1")), tmp_path / "run")
    with pytest.raises(RunError, match="holds a run with init_from=None, but init_from="):
        train(configured(*tiny(tiny_sd, *MOVING, "steps=1", f"init_from={first}")), tmp_path / "run")
