"""A CLIP score from any folder in open_clip's format: what it reads, what it refuses, what it calls its unit."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from alignlab.rewards.clip import ClipScore, locate

TEXTS = ["a lion on a blue background", "", "  A Lion ", "word " * 60]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped model, to take files from."""
    return Path(shutil.copytree(locate("emoji_clip").removeprefix("local-dir:"), tmp_path / "clip"))


def test_tokens_are_those_it_was_trained_on(folder: Path) -> None:
    """open_clip's tokenizer gives the ids of CLIPTokenizer at length 32, and the pooled token (argmax) is the end of text."""
    ours = ClipScore(str(folder)).clip.tokenizer(TEXTS)
    reference = CLIPTokenizer.from_pretrained(str(folder))
    ids = reference(TEXTS, padding="max_length", max_length=32, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours, ids)
    assert ours.max(1).values.tolist() == [reference.eos_token_id] * len(TEXTS)


@pytest.mark.parametrize("file", ["open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    """Before anything is loaded. Without its vocabulary the model would load, and score everything wrongly."""
    (folder / file).unlink()
    said = "tokenizer.json" if file == "tokenizer.json" else "open_clip_config.json or its safetensors"
    with pytest.raises(FileNotFoundError, match=rf"path={folder}: .*lacks.*{said}.*give a folder in open_clip's format"):
        ClipScore.check(str(folder))


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="path=nowhere: there is no such folder and no such shipped model; give"):
        ClipScore("nowhere")


def test_the_unit_tells_the_scale() -> None:
    """And the score is proportional to it."""
    one, hundred = ClipScore("emoji_clip", scale=1.0), ClipScore("emoji_clip")
    assert (one.unit, hundred.unit) == ("1 x cosine", "100 x cosine")
    image = torch.rand(1, 3, 48, 48)
    torch.testing.assert_close(100 * one(image, ["a cat"]), hundred(image, ["a cat"]))


def test_a_name_on_the_hub_is_left_to_open_clip() -> None:
    assert locate("hf-hub:owner/name") == "hf-hub:owner/name"
