"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP reads the prompt while looking at the image, and a
head rates what it read."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignlab.fast import freeze
from alignlab.rewards.heads import AFFINE, layer_numbers, mlp_of
from alignlab.rewards.preprocessing import Preprocessing
from alignlab.rewards.weights import (
    BERT_WORDS,
    fetched,
    fetched_any,
    look,
    on_hub,
    tensors,
    to_fetch,
    unreachable,
)

FILE, CONFIG = "ImageReward.pt", "med_config.json"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw score over the authors' data."""
TOKENS = 35
HEAD_WIDTH = 64
"""Channels of an attention head in BLIP's image tower, large or base."""
NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn": "self_attn",
    "proj": "projection",
}
"""Parts of the published names in the image tower -> transformers'."""


class ImageReward:
    """(r - 0.1672) / 1.0333, r the head's number: about standard normal over people's data. Differentiable.

    Args:
        path: a folder with ImageReward.pt and med_config.json, or a repository of the Hugging Face hub.
        tokenizer: a folder or repository with the vocabulary of uncased BERT.
        revision: a commit of the hub's repository `path`; null takes the newest.

    Raises:
        FileNotFoundError, ValueError: if a file is missing, or holds other weights.
    """

    differentiable = True
    needs_prompt = True
    unit = "z-score"
    typical_range = (-2.5, 2.5)
    input_size = 224
    licence = "Apache-2.0"

    @staticmethod
    def check(
        path: str, *, tokenizer: str = "google-bert/bert-base-uncased", revision: str | None = None
    ) -> None:
        look(path, FILE, CONFIG, revision=revision)
        look(tokenizer, BERT_WORDS, key="tokenizer")

    @staticmethod
    def missing(
        path: str, *, tokenizer: str = "google-bert/bert-base-uncased", revision: str | None = None
    ) -> list[str]:
        return [*to_fetch(path, FILE, CONFIG, revision=revision), *to_fetch(tokenizer, BERT_WORDS)]

    def __init__(
        self, path: str, *, tokenizer: str = "google-bert/bert-base-uncased", revision: str | None = None
    ) -> None:
        from transformers import BertTokenizer, BertTokenizerFast  # type: ignore[attr-defined]

        self.check(path, tokenizer=tokenizer, revision=revision)
        state = tensors(fetched(path, FILE, revision))
        med = json.loads(fetched(path, CONFIG, revision).read_text())
        try:
            self.image, self.text, self.head = towers(state, med)
        except (KeyError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())[:200]
            raise ValueError(
                f"path={path}: {FILE} and {CONFIG} are not ImageReward's ({why}); fetch them again"
            ) from None
        vocabulary = fetched_any(tokenizer, BERT_WORDS, key="tokenizer")
        reader = (
            BertTokenizer if vocabulary.name == "vocab.txt" else BertTokenizerFast
        )  # one class since transformers 5
        try:
            self.tokenizer = reader.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            if not on_hub(tokenizer):
                raise
            raise FileNotFoundError(unreachable("tokenizer", tokenizer, "vocab.txt", error)) from None
        self.input_size = self.image.config.image_size
        self.preprocess = Preprocessing(size=(self.input_size, self.input_size))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        for part in (self.image, self.text, self.head):
            part.to(images.device)
        read = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        seen = self.image(pixel_values=self.preprocess(images)).last_hidden_state
        said = self.text(
            input_ids=read.input_ids.to(images.device),
            attention_mask=read.attention_mask.to(images.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:-1], dtype=torch.long),
        ).last_hidden_state
        return (self.head(said[:, 0]) - MEAN) / STD


def towers(state: dict[str, Tensor], med: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The image tower, the text tower and the head of a published state dict; `med` is the text tower's
    configuration.

    Raises:
        KeyError, RuntimeError, ValueError: if a tensor is missing or of another shape.
    """
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): value.float()
            for name, value in state.items()
            if name.startswith(prefix)
        }

    seen, read = part("blip.visual_encoder."), part("blip.text_encoder.")
    _, tokens, width = seen["pos_embed"].shape
    patch = seen["patch_embed.proj.weight"].shape[-1]
    image = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(seen["blocks.0.mlp.fc1.bias"]),
            num_hidden_layers=1 + max(int(name.split(".")[1]) for name in seen if name.startswith("blocks.")),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=patch * round((tokens - 1) ** 0.5),
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )
    shared = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "hidden_act",
        "layer_norm_eps",
    )
    # as a decoder, for only that has the attention to the image; it is called as an encoder, which reads in
    # both directions
    text = BlipTextModel(
        BlipTextConfig(**{key: med[key] for key in shared}, encoder_hidden_size=width, is_decoder=True),
        add_pooling_layer=False,
    )
    image.load_state_dict({renamed(name): value for name, value in seen.items()})
    read.pop("embeddings.position_ids", None)
    text.load_state_dict(read)
    rater = part("mlp.")
    if layer_numbers(rater) != AFFINE:
        raise ValueError(
            f"its head numbers its layers {layer_numbers(rater)}, not {AFFINE}, so ReLU may stand between "
            "them"
        )
    head = mlp_of(rater, relu=False)
    return tuple(freeze(module) for module in (image, text, head))  # type: ignore[return-value]


def renamed(name: str) -> str:
    """A published name in the image tower as transformers calls it."""
    if name.startswith("norm."):
        return name.replace("norm", "post_layernorm", 1)
    if name.startswith("patch_embed.proj."):
        return name.replace("patch_embed.proj", NAMES["patch_embed.proj"])
    return ".".join(NAMES.get(word, word) for word in name.split("."))
