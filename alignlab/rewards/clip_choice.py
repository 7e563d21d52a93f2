"""CLIPs that were tuned on choices between images, in transformers' format: PickScore and SciScore."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.fast import freeze
from alignlab.rewards.preprocessing import Preprocessing
from alignlab.rewards.weights import (
    BPE_WORDS,
    PROCESSOR,
    SAFE_MODEL,
    at_hand,
    fetched_any,
    look,
    on_hub,
    to_fetch,
    unreachable,
)

INTERPOLATION = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers."""


class PickScore:
    """exp(logit_scale) times the cosine of image and prompt (Kirstain et al. 2023, arXiv 2305.01569). The
    difference of two images' scores is the log-odds that the first is preferred. Stable Diffusion 1.5 scores
    about 20. Differentiable.

    Args:
        path: a folder with a CLIPModel of transformers' (config.json, model.safetensors), or a repository of
            the hub.
        processor: where its tokenizer and image processor are; null: at `path`.
        revision: a commit of the hub's repository `path`; null takes the newest.

    Raises:
        FileNotFoundError, ValueError: if a part is missing, or it is another model.
    """

    differentiable = True
    needs_prompt = True
    unit = "100 x cosine"
    typical_range = (15.0, 26.0)
    input_size = 224
    licence = "unstated"

    @staticmethod
    def check(path: str, *, processor: str | None = None, revision: str | None = None) -> None:
        look(path, "config.json", SAFE_MODEL, revision=revision)
        config = at_hand(path, "config.json", revision)
        kind = json.loads(config.read_text()).get("model_type") if config else "clip"
        if kind != "clip":
            raise ValueError(f"path={path}: config.json is of a {kind}, not a clip; give the published model")
        key, home = ("processor", processor) if processor else ("path", path)
        pinned = None if processor else revision
        look(home, PROCESSOR, BPE_WORDS, revision=pinned, key=key)
        if at_hand(home, "tokenizer.json", pinned) is None:
            look(home, "merges.txt", revision=pinned, key=key)

    @staticmethod
    def missing(path: str, *, processor: str | None = None, revision: str | None = None) -> list[str]:
        model, reader = ("config.json", SAFE_MODEL), (PROCESSOR, BPE_WORDS, ("merges.txt", "tokenizer.json"))
        if processor is None:
            return to_fetch(path, *model, *reader, revision=revision)
        return [*to_fetch(path, *model, revision=revision), *to_fetch(processor, *reader)]

    def __init__(self, path: str, *, processor: str | None = None, revision: str | None = None) -> None:
        self.check(path, processor=processor, revision=revision)
        from transformers import CLIPModel, CLIPTokenizer, CLIPTokenizerFast  # type: ignore[attr-defined]

        self.model = _loaded(
            CLIPModel,
            "path",
            path,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
        key, home = ("processor", processor) if processor else ("path", path)
        pinned = None if processor else revision
        vocabulary = fetched_any(home, BPE_WORDS, pinned, key)
        reader = (
            CLIPTokenizer if vocabulary.name == "vocab.json" else CLIPTokenizerFast
        )  # one class since transformers 5
        self.tokenizer = _loaded(reader, key, home, revision=pinned)
        self.preprocess = preprocessing_of(image_processor(home, pinned, key))
        self.input_size = self.preprocess.size[0]
        self.scale = float(self.model.logit_scale.exp())
        self.unit = f"{self.scale:.4g} x cosine"
        self._text = lru_cache(maxsize=4096)(lambda text: self.encode_text(text).detach().cpu())

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.model.to(images.device)
        seen = features(self.model.get_image_features(pixel_values=self.preprocess(images)))
        with torch.no_grad():
            said = torch.stack([self._text(prompt) for prompt in prompts]).to(seen)
        return self.scale * F.cosine_similarity(seen, said)

    def encode_text(self, text: str) -> Tensor:
        """[width], not of length 1."""
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer([text], truncation=True, max_length=length, return_tensors="pt").input_ids
        return features(self.model.get_text_features(input_ids=ids.to(self.model.device)))[0]


class SciScore(PickScore):
    """The same form, tuned on whether images show what science says of the prompt (Li et al. 2025, arXiv
    2504.13129). The range is that of the CLIP it comes from. Differentiable."""

    typical_range = (10.0, 45.0)
    licence = "Apache-2.0"


def features(output: Any) -> Tensor:
    """The projected embedding: until its version 4 transformers returned it, since then in an object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def image_processor(home: str, revision: str | None, key: str) -> Any:
    """CLIP's image processor from a file of its own or, as transformers 5 writes it, from the whole
    processor's.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it holds no image processor.
    """
    from transformers import CLIPImageProcessor

    file = fetched_any(home, PROCESSOR, revision, key)
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        about = about["image_processor"] if file.name == PROCESSOR[1] else about
        return CLIPImageProcessor.from_dict(about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{key}={home}: {file.name} describes no image processor of CLIP's; fetch it again"
        ) from None


def preprocessing_of(processor: Any) -> Preprocessing:
    """What an image processor of transformers' does.

    Raises:
        ValueError: if it is not CLIP's resize of the shorter side and cut to the middle.
    """
    size, crop = dict(processor.size), dict(processor.crop_size)
    if (
        set(size) != {"shortest_edge"}
        or size["shortest_edge"] != crop["height"]
        or processor.resample not in INTERPOLATION
    ):
        raise ValueError(
            f"an image processor of size {size}, cut to {crop}, is not CLIP's; give the processor that was "
            "published with the model"
        )
    return Preprocessing(
        size=(crop["height"], crop["width"]),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        interpolation=INTERPOLATION[processor.resample],
        floor=True,
    )


def _loaded(kind: Any, key: str, path: str, **options: Any) -> Any:
    """from_pretrained with errors in one sentence; a model frozen, and refused if weights of it are
    missing."""
    from safetensors import SafetensorError

    try:
        loaded = kind.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if on_hub(path):
            raise FileNotFoundError(unreachable(key, path, kind.__name__, error)) from None
        raise ValueError(
            f"{key}={path}: {kind.__name__} cannot be read from there "
            f"({str(error).strip().partition(chr(10))[0]})"
        ) from None
    if not isinstance(loaded, tuple):
        return loaded
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(
            f"{key}={path}: these are no weights of a {kind.__name__}, for they lack "
            f"{min(info['missing_keys'])}; give the published model"
        )
    return freeze(model)
