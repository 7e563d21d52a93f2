"""Published reward folders as transformers 5 saves them anew: the processor in one file, the vocabulary in
tokenizer.json alone."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertTokenizerFast, CLIPTokenizerFast

from alignlab.rewards.clip_choice import PickScore, SciScore
from alignlab.rewards.image_reward import ImageReward
from tests.rewards.published import PROMPTS, image_reward, pictures, transformers_clip

pytestmark = pytest.mark.fault("reward folders")


def anew(home: Path, tokenizer: Any, old: tuple[str, ...]) -> None:
    """Leaves the vocabulary in tokenizer.json alone."""
    tokenizer.from_pretrained(home).save_pretrained(home)
    assert (home / "tokenizer.json").is_file()
    for name in (*old, "special_tokens_map.json", "added_tokens.json"):
        (home / name).unlink(missing_ok=True)


def as_saved_by_5(home: Path) -> None:
    """A CLIP's folder: the image processor inside processor_config.json, `dtype` in place of torch_dtype."""
    anew(home, CLIPTokenizerFast, ("vocab.json", "merges.txt"))
    look = json.loads((home / "preprocessor_config.json").read_text())
    (home / "preprocessor_config.json").unlink()
    whole = {"image_processor": look, "processor_class": "CLIPProcessor"}
    (home / "processor_config.json").write_text(json.dumps(whole))
    config = json.loads((home / "config.json").read_text())
    config.pop("torch_dtype", None)
    (home / "config.json").write_text(
        json.dumps(config | {"dtype": "float32", "transformers_version": "5.23.0"})
    )


@pytest.mark.parametrize("kind", [PickScore, SciScore])
@pytest.mark.parametrize("apart", [False, True], ids=["one folder", "a processor of its own"])
def test_clips_tuned_on_choices(kind: type[PickScore], apart: bool, tmp_path: Path) -> None:
    """The scores are those of the folder as it was published."""
    before = transformers_clip(tmp_path / "model")
    after = Path(shutil.copytree(before, tmp_path / "anew"))
    as_saved_by_5(after)
    where: Mapping[str, Any] = {"path": before, "processor": str(after)} if apart else {"path": str(after)}
    kind.check(**where)
    assert kind.missing(**where) == []
    images = pictures(48)
    torch.testing.assert_close(kind(**where)(images, PROMPTS), kind(before)(images, PROMPTS), rtol=0, atol=0)


def test_image_rewards_words(tmp_path: Path) -> None:
    """A BERT's vocabulary in tokenizer.json."""
    path = image_reward(tmp_path / "model")
    after = Path(shutil.copytree(path, tmp_path / "anew"))
    anew(after, BertTokenizerFast, ("vocab.txt",))
    ImageReward.check(path, tokenizer=str(after))
    assert ImageReward.missing(path, tokenizer=str(after)) == []
    images, old, new = (
        pictures(32),
        ImageReward(path, tokenizer=path),
        ImageReward(path, tokenizer=str(after)),
    )
    torch.testing.assert_close(new(images, PROMPTS), old(images, PROMPTS), rtol=0, atol=0)


def test_weights_in_shards(tmp_path: Path) -> None:
    """An index and its parts in place of model.safetensors."""
    path = Path(transformers_clip(tmp_path / "model"))
    images, file = pictures(32), path / "model.safetensors"
    whole, state = PickScore(str(path))(images, PROMPTS), load_file(path / "model.safetensors")
    names = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
    where = {key: names[k % 2] for k, key in enumerate(state)}
    file.unlink()
    for name in names:
        save_file(
            {key: value for key, value in state.items() if where[key] == name},
            path / name,
            metadata={"format": "pt"},
        )
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(PickScore(str(path))(images, PROMPTS), whole, rtol=0, atol=0)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """No processor in the whole processor's file; no file with a vocabulary; half of the older pair."""
    path = Path(transformers_clip(tmp_path / "model"))
    (path / "merges.txt").rename(path / "kept.txt")
    with pytest.raises(FileNotFoundError, match=rf"^path={path}: {path} has no merges.txt; give"):
        PickScore.check(str(path))
    (path / "kept.txt").rename(path / "merges.txt")
    as_saved_by_5(path)
    (path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    with pytest.raises(
        ValueError,
        match=rf"^path={path}: processor_config.json describes no image processor of CLIP's; fetch",
    ):
        PickScore(str(path))
    (path / "tokenizer.json").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=rf"^path={path}: {path} has no vocab.json; give a file or folder with vocab.json",
    ):
        PickScore.check(str(path))
