"""The builder of the embedded world: its training loop goes on exactly where it was stopped."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

import alignlab

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from emoji_world.fit import fit
from emoji_world.portable import PREFIX, name_tensors_as_before, write_vocabulary


class Stopped(Exception):
    pass


def trained(folder: Path, *, stop_at: int | None = None) -> nn.Module:
    """A line through noisy points, drawn from both generators, in 12 steps; a checkpoint every 4."""
    torch.manual_seed(0)
    model, rng, calls = nn.Linear(3, 1), np.random.default_rng(0), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stopped
        x = torch.from_numpy(rng.normal(size=(8, 3))).float()
        return (model(x) - x.sum(1, keepdim=True) + torch.randn(8, 1)).square().mean()

    fit("line", model, loss, steps=12, lr=0.05, folder=folder, warmup=2, save_every=4, bf16=False, rng=rng)
    return model


def test_a_stopped_stage_goes_on_with_the_draws_that_were_next(tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    straight = trained(tmp_path / "once")
    with pytest.raises(Stopped):
        trained(tmp_path / "twice", stop_at=7)
    resumed = trained(tmp_path / "twice")
    assert torch.equal(resumed.weight, straight.weight) and torch.equal(resumed.bias, straight.bias)


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    done = trained(tmp_path)
    assert torch.equal(trained(tmp_path, stop_at=1).weight, done.weight)


def test_what_transformers_5_saved_is_rewritten_for_4(tmp_path: Path) -> None:
    """Names get the prefix once, and values stay; the vocabulary's files read every text as tokenizer.json
    does."""
    home = Path(alignlab.__file__).parent / "assets" / "emoji"
    named = load_file(home / "text_encoder" / "model.safetensors")
    save_file(
        {name.removeprefix(PREFIX): value for name, value in named.items()}, tmp_path / "model.safetensors"
    )
    for _ in range(2):
        name_tensors_as_before(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == named.keys() and all(name.startswith(PREFIX) for name in named)
    assert all(torch.equal(again[name], value) for name, value in named.items())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / "tokenizer" / name, tmp_path / name)
    write_vocabulary(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_text() == (home / "tokenizer" / name).read_text()
        assert (home.parent / "emoji_clip" / name).read_text() == (tmp_path / name).read_text()
    words = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    merges = (tmp_path / "merges.txt").read_text().splitlines()[1:]
    assert json.loads((tmp_path / "vocab.json").read_text()) == words["vocab"]
    assert [line.split(" ") for line in merges] == words["merges"]
    texts = ["a lion on a blue background", "two Birds, 17 of them", "", "don't 🦁"]
    whole = CLIPTokenizer.from_pretrained(tmp_path)(texts).input_ids
    (tmp_path / "tokenizer.json").unlink()
    assert CLIPTokenizer.from_pretrained(tmp_path)(texts).input_ids == whole
