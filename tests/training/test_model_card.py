"""The model card says what was done and how to use it, its example runs, and an upload can fail without
losing a run."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from alignlab.config.build import ConfigError
from alignlab.config.checks import is_hub_id
from alignlab.runs.folder import Run
from alignlab.train import train
from alignlab.training.model_card import licence_of, push, usage, without_paths
from tests.running import command_line, configured, tiny


@pytest.fixture(scope="module")
def base(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny pipeline in a folder with a card of its own."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(tiny_sd, folder)
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n# A base\n")
    return str(folder)


@pytest.fixture(scope="module")
def runs(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    words = ["steps=2", "lr=0.1", "eval_rewards=jpeg_compressibility", "seed=7"]
    train(configured(*tiny(base, *words)), home / "lora")
    train(configured(*tiny(base, *words, "lr=0.01", "policy.full=true")), home / "full")
    return {"lora": home / "lora", "full": home / "full"}


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a login."""
    monkeypatch.setenv("HF_TOKEN", "hf_none")


class Hub:
    """A hub that takes everything, or nothing."""

    def __init__(self, patch: pytest.MonkeyPatch, refuses: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refuses = refuses
        for name in ("create_repo", "upload_folder", "upload_file"):
            patch.setattr(HfApi, name, self.answer(name))

    def answer(self, name: str) -> Any:
        def called(api: HfApi, *arguments: Any, **options: Any) -> str:
            self.calls.append((name, {"repo_id": arguments[0]} | options if arguments else options))
            if self.refuses:
                raise self.refuses
            return f"https://huggingface.co/{self.calls[0][1]['repo_id']}"

        return called


@pytest.mark.parametrize("name", ["lora", "full"])
def test_it_says_what_was_done(name: str, runs: dict[str, Path]) -> None:
    """The hub's own reader finds library, tags and licence; the text has rewards with units and numbers,
    prompts, seed and configuration."""
    card = ModelCard.load(runs[name] / "model" / "README.md")
    assert (
        card.data.library_name == "diffusers"
        and card.data.pipeline_tag == "text-to-image"
        and card.data.license == "openrail++"
    )
    assert {"alignlab", "draft", name} <= set(card.data.tags)
    summary = json.loads((runs[name] / "summary.json").read_text())
    for reward, unit in {"brightness": "mean pixel", "jpeg_compressibility": "kB"}.items():
        row = next(line for line in card.text.splitlines() if line.startswith(f"| {reward} |"))
        assert unit in row and row.endswith(
            f"| {summary['base'][reward]:.4g} | {summary['final'][reward]:.4g} |"
        )
    assert (
        "seed 7" in card.text
        and "DRaFT, 2 epochs of 4 images" in card.text
        and "prompts: a cat; a dog; a fish" in card.text
    )
    (block,) = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    stored = yaml.safe_load((runs[name] / "config.yaml").read_text())
    assert yaml.safe_load(block).items() <= stored.items() and "algo" in block and "output_dir" not in block


@pytest.mark.parametrize("name", ["lora", "full"])
def test_its_example_works(
    name: str, runs: dict[str, Path], base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of the card, run in the folder it lies in, draws the tuned model's picture."""
    folder = runs[name] / "model"
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    try:
        exec(code.replace("image = pipe(", "import torch; torch.manual_seed(0)\nimage = pipe("), {})
        drawn = Image.open("image.png")
        pipe = StableDiffusionPipeline.from_pretrained(
            folder if name == "full" else base, safety_checker=None
        )
        if name == "lora":
            pipe.load_lora_weights(folder)
        guidance = configured().eval_sampler["guidance_scale"]
        torch.manual_seed(0)
        expected = pipe("a cat", num_inference_steps=2, guidance_scale=guidance).images[0]
        assert list(drawn.getdata()) == list(expected.getdata())
    finally:
        (folder / "image.png").unlink(missing_ok=True)


def test_examples_of_other_bases(tiny_sd: str, tmp_path: Path) -> None:
    """A hub id, a single file, the shipped model (whose example is run), and FLUX's arguments."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    c = configured("model=sd15", f"model.path_or_id={tiny_sd}", "model.variant=null", "eval_sampler.steps=2")
    c = replace(c, model=c.model | {"path_or_id": "owner/name"})
    assert "StableDiffusionPipeline.from_pretrained('owner/name')" in usage(c, False, "x")
    single = {"path_or_id": f"{tmp_path}/model.safetensors", "config": "owner/name"}
    c = replace(c, model=c.model | single)
    assert f"from_single_file('{tmp_path}/model.safetensors', config='owner/name')" in usage(c, False, "x")
    flux = configured(
        "model=flux",
        "sampler=flow",
        "eval_sampler=flow",
        "eval_sampler.guidance_scale=1",
        "sampler.guidance_scale=1",
    )
    assert "guidance_scale=3.5, max_sequence_length=512, height=1024, width=1024)" in usage(flux, True, "x")
    shipped = usage(configured(), False, "a lion")
    assert shipped.startswith("from importlib.resources import files\n")
    spoken: dict[str, Any] = {}
    exec(shipped.partition("pipe.load_lora")[0], spoken)
    assert spoken["pipe"].unet.config.sample_size == 12


BROKEN_CARDS = {
    "broken YAML": b"---\nlicense: [mit\n  x: : y\n---\n",
    "no text": b"\xff\xfe---\nlicense: mit\n---\n",
    "a list": b"---\n- mit\n---\n",
    "a tab": b"---\nlicense:\tmit\n\t- x\n---\n",
}


@pytest.mark.parametrize("name", BROKEN_CARDS)
def test_a_broken_readme_of_the_base_model_loses_no_run(
    name: str, tiny_sd: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """It is told in a line before the run begins, and the run ends with a card that names no licence."""
    shutil.copytree(tiny_sd, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_bytes(BROKEN_CARDS[name])
    assert licence_of(str(tmp_path / "base")) == (None, None)
    if name != "broken YAML":
        return
    run, said = tmp_path / "run", f"warning: {tmp_path / 'base' / 'README.md'} cannot be read ("

    def begun(self: Run) -> None:
        assert said in capsys.readouterr().err
        real(self)

    real = Run.begin
    monkeypatch.setattr(Run, "begin", begun)
    assert command_line(monkeypatch, *tiny(str(tmp_path / "base"), "steps=1", f"output_dir={run}")) == 0
    assert (
        "licence: that of the base model, which its folder does not name"
        in (run / "model" / "README.md").read_text()
    )


def test_a_licence_that_is_no_text(tmp_path: Path) -> None:
    """A list or a number in the place of a licence is none."""
    for value in ("[mit, apache-2.0]", "3", "{a: b}", "null"):
        (tmp_path / "README.md").write_text(f"---\nlicense: {value}\n---\n")
        assert licence_of(str(tmp_path)) == (None, None)


def test_push_to_hub_without_a_token(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """It is missed before the run begins, and nothing is written."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    run = tmp_path / "run"
    assert command_line(monkeypatch, *tiny(base, f"output_dir={run}", "push_to_hub=me/brighter")) == 2
    assert capsys.readouterr().err.startswith(
        "error: push_to_hub=me/brighter needs a token of the Hugging Face hub"
    )
    assert not run.exists()


def test_licences(tmp_path: Path) -> None:
    """Of the folder's card, else of a known model, else unknown."""
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n")
    assert licence_of(str(tmp_path)) == ("other", "mine")
    assert licence_of("black-forest-labs/FLUX.1-dev") == ("other", "flux-1-dev-non-commercial-license")
    assert licence_of("somebody/something") == (None, None)


def test_upload_at_the_end(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """push_to_hub: a private repository, the folder, and the card with the repository in its example and no
    path of this machine."""
    hub = Hub(monkeypatch)
    assert (
        command_line(
            monkeypatch, *tiny(base, "steps=1", f"output_dir={tmp_path}/run", "push_to_hub=me/brighter")
        )
        == 0
    )
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder", "upload_file"]
    created, uploaded, card = (options for _, options in hub.calls)
    assert created == {"repo_id": "me/brighter", "private": True, "exist_ok": True}
    assert uploaded["folder_path"] == tmp_path / "run" / "model" and uploaded["repo_id"] == "me/brighter"
    text = card["path_or_fileobj"].decode()
    assert 'learned = "me/brighter"' in text and str(tmp_path) not in text and base not in text
    assert base in (tmp_path / "run" / "model" / "README.md").read_text()
    assert "uploaded: https://huggingface.co/me/brighter" in capsys.readouterr().out


def test_a_failed_upload_loses_nothing(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A warning says how to repeat it, and that command does; where it fails too, it ends with 2."""
    run = tmp_path / "run"
    Hub(monkeypatch, OSError("no route to the hub.\nmore"))
    assert (
        command_line(monkeypatch, *tiny(base, "steps=1", f"output_dir={run}", "push_to_hub=me/brighter")) == 0
    )
    err = capsys.readouterr().err
    again = f"python -m alignlab.export run={run} to=hub output=me/brighter"
    said = (
        f"{run}/model was not uploaded to me/brighter (no route to the hub); the run is whole in {run}; to "
        f"upload it: {again}"
    )
    assert f"warning: {said}" in err.splitlines() and "Traceback" not in err
    assert (run / "summary.json").is_file() and (run / "model" / "README.md").is_file()
    from alignlab import export

    assert command_line(monkeypatch, *again.split()[3:], command=export) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"error: {run}/model was not uploaded to me/brighter (no route to the hub)"
    )
    hub = Hub(monkeypatch)
    assert command_line(monkeypatch, *again.split()[3:], command=export) == 0
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder", "upload_file"]


def test_only_a_typed_name_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A resumed folder may be somebody else's and name a repository of the user's: a new one is made, one
    that is there stays."""
    (tmp_path / "model").mkdir()
    hub = Hub(monkeypatch)
    monkeypatch.setattr("alignlab.training.model_card.typed", lambda key: False)
    monkeypatch.setattr(HfApi, "repo_exists", lambda api, name: name == "me/mine")
    push(tmp_path, "me/mine")
    assert hub.calls == [] and "it is there already, and only a file names it" in capsys.readouterr().err
    push(tmp_path, "me/other")
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"] and not hub.calls[0][1][
        "exist_ok"
    ]


def test_names_and_paths() -> None:
    """push_to_hub is owner/name and nothing of the run's science; paths are shortened, nothing else is."""
    with pytest.raises(ConfigError, match="push_to_hub=mine is no repository of the hub; write owner/name"):
        configured("push_to_hub=mine")
    assert is_hub_id("a/b-c.d_1") and not any(
        is_hub_id(name) for name in ("a", "a/b/c", "/a/b", "a b/c", None, "https://x/y")
    )
    assert (
        without_paths("path: /home/me/models/sd-1.5\nat: '~/x/y.safetensors'")
        == "path: sd-1.5\nat: 'y.safetensors'"
    )
    same = "https://huggingface.co/a/b base: a/b 1/2 and/or <x/> half a / b"
    assert without_paths(same) == same
