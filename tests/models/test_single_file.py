"""A model from one .safetensors file in its original format draws the images of its pipeline folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignlab.config.build import ConfigError, build
from alignlab.engine.policy import Policy
from alignlab.engine.rollout import rollout
from alignlab.train import train
from tests.models.original import single_file
from tests.models.sampling import EVERY, SAMPLERS, key, pipe_of, sampler_of
from tests.running import configured
from tests.running import tiny as tiny_run

MODEL: dict[str, list[str]] = {"sd": [], **SAMPLERS}


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd35"])
@torch.no_grad()
def test_images_are_the_folders(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """To 1e-5, every part of the pipeline from the file; the folder of model.config holds no weights."""
    pipe = pipe_of(name, folders[name])
    file = single_file(pipe, name, tmp_path / "model.safetensors")
    shutil.copytree(
        folders[name], tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors", "*.bin")
    )
    family, options = EVERY[name]
    images = []
    for where in (
        {"path_or_id": str(folders[name])},
        {"path_or_id": str(file), "config": str(tmp_path / "config")},
    ):
        family.check(**where, **options)
        policy = Policy(family(**where, **options))
        images.append(rollout(policy, sampler_of(policy, name), key()).images)
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-5)
    assert images[0].std() > 0.01


def test_a_run_from_a_single_file(tiny_sd: str, tmp_path: Path) -> None:
    """The whole of a run: the base model's numbers are those of the folder."""
    file = single_file(pipe_of("sd", Path(tiny_sd)), "sd", tmp_path / "model.safetensors")
    bases = []
    for name, words in {
        "folder": [],
        "file": [f"model.path_or_id={file}", f"model.config={tiny_sd}"],
    }.items():
        bases.append(
            train(configured(*tiny_run(tiny_sd, "steps=1", *words)), tmp_path / name)["base"]["reward"]
        )
    assert bases[1] == pytest.approx(bases[0], abs=1e-5)


def test_mistakes_are_sentences(folders: dict[str, Path], tmp_path: Path) -> None:
    """Before a model is loaded: what a file is not, and what its configuration is not. In loading: a part
    that it lacks, and no network."""
    sd = folders["sd"]
    file = single_file(pipe_of("sd", sd), "sd", tmp_path / "model.safetensors")
    lora, text, torn = tmp_path / "lora.safetensors", tmp_path / "model.ckpt", tmp_path / "torn.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, lora)
    text.write_text("no")
    torn.write_bytes(file.read_bytes()[:40])
    for words, said in (
        (
            [f"model.path_or_id={text}"],
            f"model.path_or_id={text} is no .safetensors file; convert it, or give a pipeline folder",
        ),
        ([f"model.path_or_id={torn}"], "cannot be read as .safetensors"),
        ([f"model.path_or_id={lora}"], "is a LoRA; give the model that it is for, and the LoRA as init_from"),
        (
            [f"model.path_or_id={sd}", f"model.config={sd}"],
            f"model.config={sd} is of a single file, and path_or_id={sd} is none",
        ),
        (
            [f"model.path_or_id={file}", "model.config=/nowhere"],
            "model.config=/nowhere: there is no such folder",
        ),
        (
            [f"model.path_or_id={file}", f"model.config={folders['sdxl']}"],
            "is a StableDiffusionXLPipeline, and this family loads",
        ),
    ):
        with pytest.raises(ConfigError) as refused:
            configured(*words)
        assert said in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", list(EVERY))
def test_what_loading_shows(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file without this family's network, and one whose configuration the hub would have to give: a
    sentence each, in every family."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "model.safetensors"
    save_file({"first_stage_model.decoder.conv_in.weight": torch.zeros(1)}, file)
    for given, said in (
        (
            [f"model.config={folders[name]}"],
            f"it must hold every part of a {EVERY[name][0].pipeline}, and model.config={folders[name]} be of",
        ),
        ([], "without a network, give the pipeline folder that its configuration is of as model.config"),
    ):
        c = configured(*MODEL[name], f"model.path_or_id={file}", *given)
        with pytest.raises(ConfigError) as refused:
            build(c.model)
        assert str(refused.value).startswith(f"model.path_or_id={file} cannot be loaded (") and said in str(
            refused.value
        )


def test_a_file_that_lacks_a_part(folders: dict[str, Path], tmp_path: Path) -> None:
    """The sentence names it."""
    file = single_file(pipe_of("sd", folders["sd"]), "sd", tmp_path / "model.safetensors")
    some: dict[str, Any] = {k: v for k, v in load_file(file).items() if not k.startswith("cond_stage_model.")}
    save_file(some, file)
    (tmp_path / "config").mkdir()
    shutil.copytree(
        folders["sd"], tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
    )
    c = configured(f"model.path_or_id={file}", f"model.config={tmp_path / 'config'}")
    with pytest.raises(
        ConfigError, match=r"Failed to load CLIPTextModel\. Weights for this component appear to be missing"
    ):
        build(c.model)
