"""Published weights become reward folders that score as the published code does."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel

from alignlab.rewards.aesthetic import Aesthetic
from alignlab.rewards.clip import Clip
from alignlab.rewards.preference import Preference

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import published_reward


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["published_reward.py", *words])
    published_reward.main()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_clip_of_transformers_scores_the_same(activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(logit_scale) * cosine, as PickScore computes it with transformers, for OpenAI's activation and for PickScore's."""
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "hidden_act": activation,
    }
    text = {"eos_token_id": 49407, "bos_token_id": 49406, "vocab_size": 49408, "max_position_embeddings": 77}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.logit_scale.data.fill_(4.6)
    model.save_pretrained(tmp_path / "theirs")
    run(monkeypatch, "preference", str(tmp_path / "theirs"), str(tmp_path / "ours"))
    mine = Preference(str(tmp_path / "ours"))
    images, prompts = torch.rand(3, 3, 32, 32), ["a cat", "two dogs on a bike", "a cat"]
    with torch.no_grad():
        seen = model(input_ids=mine.clip.tokenizer(prompts), pixel_values=mine.clip.preprocess(images))
        theirs = model.logit_scale.exp() * F.cosine_similarity(seen.image_embeds, seen.text_embeds)
        torch.testing.assert_close(mine(images, prompts), theirs, rtol=1e-4, atol=1e-3)
    assert theirs.std() > 0.1


def test_laions_head_scores_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of the published layers, dropouts counted, in a pickle: read without activations between the layers."""
    clip = Clip("emoji_clip")
    layers = nn.Sequential(
        nn.Linear(clip.width, 32), nn.Dropout(0.2), nn.Linear(32, 8), nn.Dropout(0.1), nn.Linear(8, 4), nn.Linear(4, 1)
    )
    torch.save({f"layers.{k}": v for k, v in layers.state_dict().items()}, tmp_path / "head.pth")
    run(monkeypatch, "aesthetic", str(tmp_path / "head.pth"), str(tmp_path / "ours"), "--clip", "emoji_clip")
    images = torch.rand(3, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(Aesthetic(str(tmp_path / "ours"))(images, [""] * 3), layers.eval()(clip.images(images))[:, 0])
