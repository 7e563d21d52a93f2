"""PickScore and SciScore, from files as they are published, against transformers' own model and processor on
PIL pictures."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPModel, CLIPTokenizer

from alignlab.rewards.clip_choice import PickScore, SciScore, features
from tests.rewards.published import PROMPTS, CLIPImageProcessorPil, pictures, slopes_agree, transformers_clip

LONG = [*PROMPTS[:2], "a red bird that sings " * 9]


@pytest.mark.parametrize("eos", [None, 2], ids=["eos", "the published CLIP-H's eos, 2"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (48, 71)])
def test_transformers_logits(height: int, width: int, eos: int | None, tmp_path: Path) -> None:
    """The diagonal of logits_per_image. At the CLIP's own size, where nothing is resized, to single
    precision."""
    home = tmp_path / "processor"
    reward = PickScore(transformers_clip(tmp_path / "model", eos=eos, processor=home), processor=str(home))
    images = pictures(height, width)
    pixels = CLIPImageProcessorPil.from_pretrained(home)(
        [to_pil_image(i) for i in images], return_tensors="pt"
    )
    words = CLIPTokenizer.from_pretrained(home)(
        LONG, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(tmp_path / "model")(**pixels, **words).logits_per_image.diag()
        ours = reward(images, LONG)
    assert theirs.std() > 1 and reward.unit == "100 x cosine" and reward.input_size == 32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 if height == 32 else 0.3)


def test_sciscore_brings_its_own_processor(tmp_path: Path) -> None:
    """One folder holds all; the numbers are those of the other class on the same files."""
    path = transformers_clip(tmp_path / "model")
    images = pictures(48)
    torch.testing.assert_close(
        SciScore(path)(images, PROMPTS), PickScore(path, processor=path)(images, PROMPTS)
    )


def test_gradient_is_the_finite_difference(tmp_path: Path) -> None:
    reward = PickScore(transformers_clip(tmp_path / "model"))
    slopes_agree(reward, pictures(48, 71), [reward.model])


def test_both_forms_of_features() -> None:
    """transformers before 5 returned the projected embedding, later ones an object that holds it."""
    embedding = torch.rand(2, 4)
    assert (
        features(embedding) is embedding and features(SimpleNamespace(pooler_output=embedding)) is embedding
    )


@pytest.mark.parametrize(
    "lost", ["config.json", "model.safetensors", "preprocessor_config.json", "vocab.json"]
)
def test_a_missing_file_is_named(lost: str, tmp_path: Path) -> None:
    path = transformers_clip(tmp_path / "model")
    (tmp_path / "model" / lost).unlink()
    for attempt in (PickScore.check, PickScore):
        with pytest.raises(
            FileNotFoundError,
            match=rf"^path={path}: {path} has no {lost}; give a file or folder with {lost}, or",
        ):
            attempt(path)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    """Weights that lack a tensor would leave it random, and every score be meaningless; another CLIP's do not
    fit; text is no JSON."""
    path = transformers_clip(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    save_file(
        {k: v for k, v in state.items() if k != "visual_projection.weight"}, file, metadata={"format": "pt"}
    )
    with pytest.raises(
        ValueError,
        match=r"path=\S+: these are no weights of a CLIPModel, for they lack visual_projection.weight; give",
    ):
        PickScore(path)
    file.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"path=\S+: CLIPModel cannot be read from there \("):
        PickScore(path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(ValueError, match=r"path=\S+: config.json is of a siglip, not a clip; give"):
        PickScore.check(path)
