"""A CLIP score from any CLIP that open_clip loads: what it reads, what it refuses, what it calls its unit."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from open_clip.pretrained import _PRETRAINED
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPTokenizer

from alignlab.planning.meta_device import Kernels, Ledger
from alignlab.rewards.clip import Clip, ClipScore, locate
from tests.rewards.published import PROMPTS, open_clip_architecture, open_clip_weights, pictures, slopes_agree

TEXTS = ["a lion on a blue background", "", "  A Lion ", "word " * 60]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped model, to take files from."""
    return Path(shutil.copytree(locate("emoji_clip").removeprefix("local-dir:"), tmp_path / "clip"))


def test_tokens_are_those_it_was_trained_on(folder: Path) -> None:
    """open_clip's tokenizer gives the ids of CLIPTokenizer at length 32, and the pooled token (argmax) is the
    end of text."""
    ours = ClipScore(str(folder)).clip.tokenizer(TEXTS)
    reference = CLIPTokenizer.from_pretrained(str(folder))
    ids = reference(
        TEXTS, padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(ours, ids)
    assert ours.max(1).values.tolist() == [reference.eos_token_id] * len(TEXTS)


@pytest.mark.parametrize("file", ["open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    """Before anything is loaded. Without its vocabulary the model would load, and score everything
    wrongly."""
    for lost in (file, "vocab.json", "merges.txt") if file == "tokenizer.json" else (file,):
        (folder / lost).unlink()
    said = "tokenizer.json" if file == "tokenizer.json" else "open_clip_config.json or its safetensors"
    with pytest.raises(
        FileNotFoundError, match=rf"path={folder}: .*lacks.*{said}.*give a folder in open_clip's format"
    ):
        ClipScore.check(str(folder))


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(
        FileNotFoundError, match="path=nowhere: there is no such folder and no such shipped model; give"
    ):
        ClipScore("nowhere")


def test_the_unit_tells_the_scale() -> None:
    """And the score is proportional to it."""
    one, hundred = ClipScore("emoji_clip", scale=1.0), ClipScore("emoji_clip")
    assert (one.unit, hundred.unit) == ("1 x cosine", "100 x cosine")
    image = torch.rand(1, 3, 48, 48)
    torch.testing.assert_close(100 * one(image, ["a cat"]), hundred(image, ["a cat"]))


def test_texts_are_encoded_on_the_device_that_asks() -> None:
    """The first ones too, before any image was seen. (Here a device that computes nothing.)"""
    reward = ClipScore("emoji_clip")
    with Ledger(), Kernels("cpu"):
        assert reward(torch.empty(1, 3, 48, 48, device="meta"), ["a cat"]).is_meta
    other = ClipScore("emoji_clip").clip
    with Ledger():
        other.texts(["a cat"], torch.device("meta"))
    assert next(other.model.parameters()).is_meta


def test_a_name_on_the_hub_is_left_to_open_clip() -> None:
    assert locate("hf-hub:owner/name") == "hf-hub:owner/name"


@pytest.fixture
def openai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CLIP that open_clip lists as it lists OpenAI's: the architecture says GELU, the tag says
    QuickGELU."""
    name = open_clip_architecture(tmp_path / "tiny_openai")
    torch.save(open_clip_weights(name), tmp_path / "openai.pt")
    listed = _PRETRAINED["ViT-L-14"]["openai"]
    assert listed["quick_gelu"] and not open_clip.get_model_config("ViT-L-14").get("quick_gelu")
    monkeypatch.setitem(_PRETRAINED, name, {"openai": listed | {"file": str(tmp_path / "openai.pt")}})
    return name


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 71)])
def test_openais_are_built_with_quickgelu(openai: str, height: int, width: int) -> None:
    """The score is that of open_clip's model with QuickGELU and its transform, which cuts to the middle;
    GELU's is another."""
    images = pictures(height, width)
    scores = []
    for quick in (True, False):
        model, _, look = open_clip.create_model_and_transforms(openai, force_quick_gelu=quick)
        model.load_state_dict(torch.load(_PRETRAINED[openai]["openai"]["file"], weights_only=True))
        with torch.no_grad():
            seen = model.eval().encode_image(torch.stack([look(to_pil_image(image)) for image in images]))
            scores.append(
                100 * F.cosine_similarity(seen, model.encode_text(open_clip.get_tokenizer(openai)(PROMPTS)))
            )
    with torch.no_grad():
        ours = ClipScore(f"{openai}/openai")(images, PROMPTS)
    torch.testing.assert_close(ours, scores[0], rtol=0, atol=1e-3 if height == 32 else 0.3)
    assert height != 32 or (ours - scores[1]).abs().max() > 0.02


def test_quickgelu_is_not_put_upon_others(
    openai: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that were trained with GELU are refused under an architecture with the other, where open_clip
    would warn."""
    named = tmp_path / "more" / f"{openai}-quickgelu.json"
    named.parent.mkdir()
    plain = json.loads((tmp_path / openai / f"{openai}.json").read_text())
    named.write_text(json.dumps(plain | {"quick_gelu": True}))
    open_clip.add_model_config(named)
    listed = _PRETRAINED["ViT-L-14"]["openai"] | {"quick_gelu": False}
    monkeypatch.setitem(_PRETRAINED, named.stem, {"gelu": listed, "openai": listed | {"quick_gelu": True}})
    assert locate(f"{named.stem}/openai") == f"{named.stem}/openai"
    with pytest.raises(
        ValueError, match=f"trained with GELU, and {named.stem} has QuickGELU; set path={openai}/gelu"
    ):
        ClipScore.check(f"{named.stem}/gelu")


def test_gradient_through_the_cut(openai: str) -> None:
    reward = ClipScore(f"{openai}/openai")
    slopes_agree(reward, pictures(48, 71), [reward.clip.model])


def test_its_own_configuration_is_obeyed(folder: Path) -> None:
    """The embedded world's says squash: a wide picture is seen whole."""
    clip = Clip(str(folder))
    assert clip.preprocess.resize == "squash" and clip.preprocess(pictures(40, 90)).shape == (3, 3, 48, 48)
    config = folder / "open_clip_config.json"
    config.write_text(config.read_text().replace("squash", "longest"))
    assert Clip(str(folder)).preprocess.resize == "longest"


@pytest.mark.parametrize("path", ["ViT-L-14/opnai", "ViT-Q-14/openai", "/ViT-L-14", "a/b/c"])
def test_what_open_clip_does_not_list(path: str) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=f"path={path}: there is no such folder and no such shipped model; give .*ViT-L-14/openai",
    ):
        ClipScore.check(path)


@pytest.mark.parametrize("path", ["hf-hub:owner/name", "ViT-L-14/openai"])
def test_what_the_hub_does_not_give(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, though the architecture is known."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match=rf"^path={path} cannot be loaded \(.*\); it is damaged, of another version, or out of reach$",
    ):
        ClipScore(path)


def test_a_revision_is_the_hubs() -> None:
    """A folder has none."""
    ClipScore.check("hf-hub:owner/name", revision="0123abc")
    with pytest.raises(
        ValueError,
        match=(
            "revision=0123abc is a commit of the hub, but path=emoji_clip is none of its names; set "
            "revision=null"
        ),
    ):
        ClipScore.check("emoji_clip", revision="0123abc")
