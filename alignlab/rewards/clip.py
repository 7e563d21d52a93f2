"""CLIP, and text-image agreement by any of those that open_clip loads (Radford et al. 2021).

The score is scale x cosine. CLIPScore as published (arXiv 2104.08718) is 2.5 max(cosine, 0) of "A photo
depicts PROMPT" with ViT-B/32: `scale=2.5 template="A photo depicts {}"` but for the negative cosines, which
keep their gradient here.
"""

import importlib.resources
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignlab.fast import freeze
from alignlab.rewards.preprocessing import Preprocessing
from alignlab.rewards.weights import to_fetch as absent

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


class Clip:
    """Embeddings of images and texts, both of length 1, by a frozen CLIP in float32.

    Args:
        path: a folder in open_clip's format (open_clip_config.json and weights), the name of one shipped in
            alignlab/assets ("emoji_clip"), "hf-hub:owner/name", or ARCHITECTURE/TAG as open_clip lists them
            ("ViT-L-14/openai").
        weights: a state dict in place of the tag's; then `path` is an architecture of open_clip's alone.
        interpolation: bicubic or bilinear, in place of what its own configuration says.
        revision: a commit of the hub's repository; null takes the newest.
        key: what `path` is called in sentences.

    Raises:
        FileNotFoundError: as `locate`.
        ValueError: as `locate`; if what is there is broken.
    """

    def __init__(
        self,
        path: str,
        *,
        weights: Path | None = None,
        interpolation: str | None = None,
        revision: str | None = None,
        key: str = "path",
    ) -> None:
        import open_clip

        options: dict[str, Any] = {"pretrained": str(weights)} if weights else {}
        name = path if weights else locate(path, revision, key=key)
        if revision is not None:
            name = locate(_pinned(path, revision), key=key)
        if ":" not in name and not weights:
            name, _, tag = name.partition("/")
            # OpenAI's were trained with QuickGELU; open_clip would build them with GELU, and only warn
            gelu = bool(open_clip.pretrained.get_pretrained_cfg(name, tag).get("quick_gelu"))
            options = {"pretrained": tag, "force_quick_gelu": gelu}
        try:
            about: Any = (
                _config(Path(name.removeprefix("local-dir:")), key)
                if name.startswith("local-dir:")
                else open_clip.get_model_config(name)
            )
            named = (about or {}).get("text_cfg", {}).get("hf_tokenizer_name") or not about
            # A CLIP's own configuration could else ask for code of its own (text_cfg.tokenizer_kwargs).
            trust = {"trust_remote_code": False} if named else {}
            self.model = freeze(open_clip.create_model(name, precision="fp32", **options))
            self.tokenizer = open_clip.get_tokenizer(name, **trust)
            if self.tokenizer(["cat"]).equal(self.tokenizer(["dog"])):
                raise ValueError("its tokenizer reads every text alike")
        except Exception as error:  # open_clip and transformers fail in any way on what is broken
            if weights:
                raise
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"{key}={path} cannot be loaded ({why.rstrip('.:')}); it is damaged, of another version, or "
                "out of reach"
            ) from error
        visual = self.model.visual
        size, look = visual.image_size, visual.preprocess_cfg
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.preprocess = Preprocessing(
            size=self.size,
            mean=look["mean"],
            std=look["std"],
            resize=look["resize_mode"],
            interpolation="bilinear" if (interpolation or look["interpolation"]) == "bilinear" else "bicubic",
            fill=look["fill_color"] / 255,
        )
        self._text = lru_cache(maxsize=4096)(lambda text: self.encode_texts([text])[0].detach().cpu())

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return int(self.model.visual.output_dim)

    def images(self, images: Tensor) -> Tensor:
        """[B, width] from [B, 3, H, W] in [0, 1]; differentiable."""
        self.model.to(images.device)
        return F.normalize(self.model.encode_image(self.preprocess(images)), dim=-1)

    def texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """[B, width]; each text is encoded once, on the device that it is first asked for on."""
        self.model.to(device)
        with torch.no_grad():
            return torch.stack([self._text(text) for text in texts]).to(device)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """[B, width], computed anew."""
        device = next(self.model.parameters()).device
        return F.normalize(self.model.encode_text(self.tokenizer(list(texts)).to(device)), dim=-1)


class ClipScore:
    """scale times the cosine between image and prompt. Differentiable. About 20 to 40 for matching pairs at
    scale 100.

    Args:
        path, revision: of a `Clip`.
        scale: 100 as usual.
        template: "{}" is replaced by the prompt.
    """

    differentiable = True
    unit = "100 x cosine"
    needs_prompt = True
    typical_range = (0.0, 100.0)
    input_size: int | None = None  # its CLIP's
    licence = "that of its weights"

    @staticmethod
    def check(path: str, *, revision: str | None = None, **_: Any) -> None:
        locate(path, revision)

    @staticmethod
    def missing(path: str, *, revision: str | None = None, **_: Any) -> list[str]:
        return to_fetch(path, revision)

    def __init__(
        self, path: str, *, scale: float = 100.0, template: str = "{}", revision: str | None = None
    ) -> None:
        self.clip, self.scale, self.template = Clip(path, revision=revision), scale, template
        self.unit, self.typical_range = f"{scale:g} x cosine", (0.0, scale)
        self.input_size = self.clip.size[0]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = self.clip.texts([self.template.replace("{}", p) for p in prompts], images.device)
        return self.scale * (self.clip.images(images) * texts).sum(-1)


def locate(path: str, revision: str | None = None, *, key: str = "path") -> str:
    """The name by which open_clip finds the model; ARCHITECTURE/TAG is left as it is. `key` stands before it
    in sentences.

    Raises:
        FileNotFoundError: if there is none, or its folder lacks a file.
        ValueError: if a revision is asked for of what is not on the hub, or the activation is not the
            weights'.
    """
    if not isinstance(path, str) or not path:
        raise ValueError(
            f"{key}={path} must be a folder in open_clip's format, emoji_clip, or hf-hub:owner/name"
        )
    if path.startswith("hf-hub:"):
        return path
    if revision is not None:
        raise ValueError(
            f"revision={revision} is a commit of the hub, but {key}={path} is none of its names; set "
            "revision=null"
        )
    shipped = Path(str(importlib.resources.files("alignlab") / "assets" / path))
    folder = next((f for f in (Path(path), shipped) if f.is_dir()), None)
    mend = (
        "give a folder in open_clip's format, emoji_clip, hf-hub:owner/name, or one of open_clip's like "
        "ViT-L-14/openai"
    )
    if folder is None:
        if _listed(path, key):
            return path
        raise FileNotFoundError(f"{key}={path}: there is no such folder and no such shipped model; {mend}")
    if not (folder / "open_clip_config.json").is_file() or not any(folder.glob("open_clip_*.safetensors")):
        raise FileNotFoundError(
            f"{key}={path}: {folder} lacks open_clip_config.json or its safetensors weights; {mend}"
        )
    text = _config(folder, key)["text_cfg"]
    if text.get("hf_tokenizer_name") and not any((folder / file).is_file() for file in VOCABULARIES):
        # transformers would make an empty vocabulary without a word, and every score be meaningless
        raise FileNotFoundError(
            f"{key}={path}: {folder} lacks its tokenizer ({' or '.join(VOCABULARIES)}); {mend}"
        )
    return f"local-dir:{folder}"


def to_fetch(path: str, revision: str | None = None) -> list[str]:
    """How to get what open_clip would fetch; nothing for a folder and for what is shipped."""
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    weights = (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
    name = locate(path, revision)
    if name.startswith("hf-hub:"):
        return absent(
            name.removeprefix("hf-hub:"), "open_clip_config.json", weights, revision=revision, whole=True
        )
    pretrained = {} if name.startswith("local-dir:") else open_clip_weights(name)
    repository, _, file = pretrained.get("hf_hub", "").rpartition("/")
    if repository:
        return absent(repository, (file,) if file else weights)
    cached = (
        Path("~/.cache/clip").expanduser() / Path(pretrained.get("url", "")).name
    )  # open_clip's place for what is on no hub
    return (
        [f"{path} is not at hand; it is fetched at first use"]
        if pretrained.get("url") and not cached.is_file()
        else []
    )


def open_clip_weights(name: str) -> dict[str, Any]:
    """What open_clip knows of ARCHITECTURE/TAG; empty for others."""
    import open_clip

    architecture, _, tag = name.partition("/")
    return dict(open_clip.pretrained.get_pretrained_cfg(architecture, tag) or {})


def _listed(path: str, key: str) -> bool:
    """Whether open_clip lists weights of that name.

    Raises:
        ValueError: if they would be built with another activation than they were trained with.
    """
    name, _, tag = path.partition("/")
    if not name or not tag or "/" in tag:
        return False
    import open_clip

    weights = open_clip.pretrained.get_pretrained_cfg(name, tag)
    if weights and open_clip.get_model_config(name).get("quick_gelu") and not weights.get("quick_gelu"):
        mend = f"set {key}={name.removesuffix('-quickgelu')}/{tag}"
        raise ValueError(
            f"{key}={path}: these weights were trained with GELU, and {name} has QuickGELU; {mend}"
        )
    return bool(weights)


def _pinned(path: str, revision: str) -> str:
    """The folder that holds one commit of a repository, for open_clip itself takes the newest only."""
    from huggingface_hub import snapshot_download

    files = [
        "open_clip_config.json",
        "open_clip_*.safetensors",
        *VOCABULARIES,
        "merges.txt",
        "tokenizer_config.json",
    ]
    return snapshot_download(
        path.removeprefix("hf-hub:"), revision=revision, allow_patterns=[*files, "special_tokens_map.json"]
    )


def _config(folder: Path, key: str) -> dict[str, Any]:
    """What open_clip_config.json says of the model."""
    path = folder / "open_clip_config.json"
    try:
        model_config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        if not all(isinstance(model_config[key], dict) for key in ("text_cfg", "vision_cfg")):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{key}={folder}: {path} is no configuration of open_clip's; fetch it again"
        ) from None
    return dict(model_config)
