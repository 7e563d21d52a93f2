"""Our LoRA in other programs: alpha is four times the rank, and readers that know nothing of alpha draw the
same images."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import alignlab
from alignlab import export
from alignlab.config.build import ConfigError
from alignlab.engine.noise import FIRST
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import rollout
from alignlab.models import kohya, lora_files
from alignlab.models.lora import LoRA
from alignlab.models.sd import StableDiffusion
from alignlab.train import train
from alignlab.training.setup import Lab
from alignlab.weights.load import policy_of
from tests.models.sampling import images_of_diffusers, key, sampler_of
from tests.running import command_line, configured, lines, same_weights, tiny

WORDS = ("lr=0.02", "policy.lora.rank=4", "policy.lora.alpha=16")
FILE = "pytorch_lora_weights.safetensors"
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def run(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(configured(*tiny(tiny_sd, "algo=rwr", *WORDS)), folder)
    return folder


@pytest.fixture(scope="module")
def before(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as alignlab wrote it before: the weights as trained, alpha in the metadata alone."""
    folder = tmp_path_factory.mktemp("before") / "run"
    shutil.copytree(run, folder)
    about = {
        "unet.r": 4,
        "unet.lora_alpha": 16,
        "unet.target_modules": sorted(configured().model["lora_targets"]),
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(about)}
    save_file({f"unet.{k}": v for k, v in trained(run).items()}, folder / "model" / FILE, metadata=metadata)
    return folder


def trained(run: Path) -> State:
    """The last checkpoint's weights, which keep the form of the training."""
    return load_file(max(run.glob("checkpoints/step_*")) / "policy.safetensors")


def updates(lora: State, scale: float) -> State:
    """By module, what is added to the weight."""
    modules = {name.partition(".lora_")[0] for name in lora}
    return {
        k: scale * lora[f"{k}.lora_B.weight"].flatten(1) @ lora[f"{k}.lora_A.weight"].flatten(1)
        for k in modules
    }


def comfyui(stored: State) -> State:
    """By layer as the file calls it, by ComfyUI's rule: alpha/rank where the layer has an alpha, else 1
    (comfy/weight_adapter/lora.py)."""
    ends = ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight"))
    found = {}
    for name, up in stored.items():
        for above, below in ends:
            if name.endswith(above):
                layer = name.removesuffix(above)
                down, alpha = stored[layer + below], stored.get(f"{layer}.alpha")
                scale = 1.0 if alpha is None else float(alpha) / len(down)
                found[layer] = scale * up.flatten(1) @ down.flatten(1)
    return found


def same(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, value in theirs.items():
        assert value.any()
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))


@torch.no_grad()
def images(tiny_sd: str, lora: State, alpha: float) -> tuple[Policy, Tensor, Tensor]:
    """Of the policy with a LoRA, and of the base model."""
    targets = tuple({name.partition(".lora_")[0] for name in lora})
    policy = Policy(StableDiffusion(tiny_sd), lora=LoRA(rank=4, alpha=alpha, targets=targets))
    policy.load_state_dict(lora)
    mine = rollout(policy, sampler_of(policy, "sd"), key()).images
    with policy.reference():
        return policy, mine, rollout(policy, sampler_of(policy, "sd"), key()).images


@torch.no_grad()
def test_diffusers_draws_the_runs_images(run: Path, tiny_sd: str) -> None:
    """With the metadata, as new versions read it, and without any, as old versions do; the policy as trained
    is the measure."""
    policy, mine, base = images(tiny_sd, trained(run), 16)
    assert (mine - base).abs().max() > 0.01
    first = key().normal(FIRST, policy.latent_shape)
    without = load_file(run / "model" / FILE)
    for source in (str(run / "model"), without):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(source)
        torch.testing.assert_close(mine, images_of_diffusers(pipe, "sd", first), rtol=0, atol=1e-4)


@torch.no_grad()
def test_every_reader_finds_the_trained_update(
    run: Path, tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RUN/model and its exports: by the old rule (alpha = rank), by ComfyUI's, and by our own reader, which
    gives the trained form."""
    expected = updates(trained(run), 4.0)
    for to, output in {"diffusers": tmp_path / "folder", "kohya": tmp_path / "lora.safetensors"}.items():
        assert command_line(monkeypatch, f"run={run}", f"to={to}", f"output={output}", command=export) == 0
    for folder in (run / "model", tmp_path / "folder"):
        stored = load_file(folder / FILE)
        assert not any("alpha" in name for name in stored)
        same({name.removeprefix("unet."): value for name, value in comfyui(stored).items()}, expected)
    flat = {f"lora_unet_{name.replace('.', '_')}": value for name, value in expected.items()}
    same(comfyui(load_file(tmp_path / "lora.safetensors")), flat)
    for source in (run / "model", run / "model" / FILE, tmp_path / "folder", tmp_path / "lora.safetensors"):
        state, config = StableDiffusion(tiny_sd).read_lora(source)
        assert (config["rank"], config["alpha"]) == (4, 16)
        assert state.keys() == trained(run).keys() and all(
            torch.equal(state[k], v) for k, v in trained(run).items()
        )


def test_the_metadata_is_what_any_peft_takes(run: Path) -> None:
    """alpha = rank, the empty patterns that diffusers looks up where peft is old, and no entry that such a
    peft would refuse; the alpha of the training is noted outside."""
    with safe_open(run / "model" / FILE, "pt") as opened:
        metadata = opened.metadata()
    about = json.loads(metadata["lora_adapter_metadata"])
    assert (about.pop("unet.r"), about.pop("unet.lora_alpha")) == (4, 4)
    assert (about.pop("unet.rank_pattern"), about.pop("unet.alpha_pattern")) == ({}, {})
    assert (
        about.keys() == {"unet.target_modules", "unet.peft_type"}
        and metadata["alignlab_trained_alpha"] == "16"
    )


def test_a_run_goes_on_from_it(run: Path, before: Path, tiny_sd: str) -> None:
    """init_from= a run of today and of before: policy.lora.alpha=16 is accepted and gives the trained weights
    bit for bit; another alpha is refused with the words to type."""
    for folder in (run, run / "model", before, before / "model"):
        state = Lab.from_config(configured(*tiny(tiny_sd, *WORDS, f"init_from={folder}"))).policy.state_dict()
        assert all(torch.equal(state[k], v) for k, v in trained(run).items()) and len(state) == len(
            trained(run)
        )
        with pytest.raises(
            ConfigError,
            match=(
                r"has rank 4 and alpha 16, but policy\.lora has rank 4 and alpha 4; set policy\.lora\.rank=4 "
                r"policy"
            ),
        ):
            configured(*tiny(tiny_sd, "policy.lora.rank=4", "policy.lora.alpha=4", f"init_from={folder}"))


def test_a_stopped_run_goes_on(
    run: Path, tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints keep the form of the training: the resumed run ends bit for bit as the one that ran
    through, RUN/model too."""
    stopped = tmp_path / "stopped"
    epochs: list[int] = []

    def until_2(*arguments: Any, **options: Any) -> Any:
        if len(epochs) == 2:
            raise KeyboardInterrupt
        epochs.append(1)
        return train_epoch(*arguments, **options)

    from alignlab.train import train_epoch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("alignlab.train.train_epoch", until_2)
        train(configured(*tiny(tiny_sd, "algo=rwr", *WORDS)), stopped)
    assert command_line(monkeypatch, f"resume={stopped}") == 0
    assert lines(stopped) == lines(run) and same_weights(stopped, run)
    ours, theirs = (load_file(folder / "model" / FILE) for folder in (stopped, run))
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())


@torch.no_grad()
def test_folders_of_before_are_read_and_leave_in_the_new_form(
    before: Path, run: Path, tiny_sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation and alignlab.load draw the same; what is exported or uploaded has the scale in B, and the
    folder itself stays as it was."""
    model = configured(*tiny(tiny_sd)).model
    states = [policy_of(model, run=str(folder), device="cpu").state_dict() for folder in (before, run)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    _, mine, _ = images(tiny_sd, trained(run), 16)
    for folder in (before, run):
        pipe = alignlab.load(str(folder))
        pipe.set_progress_bar_config(disable=True)
        first = key().normal(FIRST, (4, 8, 8))
        torch.testing.assert_close(mine, images_of_diffusers(pipe, "sd", first), rtol=0, atol=1e-4)
    stored = (before / "model" / FILE).read_bytes()
    assert (
        command_line(
            monkeypatch, f"run={before}", "to=diffusers", f"output={tmp_path}/folder", command=export
        )
        == 0
    )
    uploaded: list[State] = []

    def upload_folder(api: HfApi, *, folder_path: Path, **_: Any) -> None:
        uploaded.append(load_file(folder_path / FILE))

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: "address")
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "upload_file", lambda *_, **__: None)
    assert command_line(monkeypatch, f"run={before}", "to=hub", "output=me/mine", command=export) == 0
    today = load_file(run / "model" / FILE)
    for state in (load_file(tmp_path / "folder" / FILE), *uploaded):
        assert state.keys() == today.keys() and all(torch.equal(state[k], v) for k, v in today.items())
    assert len(uploaded) == 1 and (before / "model" / FILE).read_bytes() == stored
    assert StableDiffusion(tiny_sd).read_lora(tmp_path / "folder")[1]["alpha"] == 16


@pytest.mark.parametrize("alpha", [3, 0.1, -7, 4])
def test_any_alpha_comes_back(alpha: float, tiny_sd: str, tmp_path: Path) -> None:
    """Alphas that are no multiple of the rank cost a rounding of float32; alpha = rank costs none."""
    policy = Policy(StableDiffusion(tiny_sd), lora=LoRA(rank=4, alpha=alpha))
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    policy.save(tmp_path / "model")
    state, config = policy.family.read_lora(tmp_path / "model")
    assert config["alpha"] == alpha and config["rank"] == 4
    for name, value in policy.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=2e-7 if alpha != 4 else 0, atol=0)
    stored = {k.removeprefix("unet."): v for k, v in load_file(tmp_path / "model" / FILE).items()}
    same(updates(stored, 1.0), updates(policy.state_dict(), alpha / 4))


def test_a_spoilt_note_of_the_training(run: Path, tiny_sd: str, tmp_path: Path) -> None:
    """The alpha of the training must be a number that can be divided by."""
    state = load_file(run / "model" / FILE)
    with safe_open(run / "model" / FILE, "pt") as opened:
        metadata = opened.metadata()
    for word in ("0", "nan", "x"):
        save_file(state, tmp_path / FILE, metadata={**metadata, "alignlab_trained_alpha": word})
        with pytest.raises(
            ValueError, match=f"says alignlab_trained_alpha={word}, which is no alpha; it is damaged"
        ):
            StableDiffusion(tiny_sd).read_lora(tmp_path)


def test_the_card_says_who_reads_it(run: Path) -> None:
    """From which version on diffusers is right, and what ComfyUI needs."""
    card = " ".join((run / "model" / "README.md").read_text().split())
    assert "diffusers 0.22 and later" in card and "ComfyUI" in card and "to=kohya" in card


def test_transformers_have_their_own_prefix(tmp_path: Path) -> None:
    """`renew` keeps the network's name of a file."""
    lora = {"x.lora_A.weight": torch.randn(4, 8), "x.lora_B.weight": torch.randn(8, 4)}
    about = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": ["x"]}
    stored = {f"transformer.{k}": v for k, v in lora.items()}
    save_file(stored, tmp_path / FILE, metadata={"lora_adapter_metadata": json.dumps(about)})
    assert lora_files.outdated(tmp_path)
    lora_files.renew(tmp_path)
    assert not lora_files.outdated(tmp_path)
    again = load_file(tmp_path / FILE)
    assert torch.equal(again["transformer.x.lora_B.weight"], 2 * lora["x.lora_B.weight"])
    shapes, names = {"x": (8, 8)}, (kohya.same,)
    assert lora_files.read(tmp_path, "transformer", shapes, names)[1]["alpha"] == 8
