"""CLIP, and text-image agreement by any of those that open_clip loads (Radford et al. 2021; as a score, arXiv 2104.08718)."""

import importlib.resources
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


class Clip:
    """Embeddings of images and texts, both of length 1, by a frozen CLIP in float32.

    Args:
        path: a folder in open_clip's format (open_clip_config.json and weights), the name of one shipped in
            alignlab/assets ("emoji_clip"), or "hf-hub:owner/name".

    Raises:
        FileNotFoundError: if there is no such folder, or it lacks a file.
        ValueError: if what is there is broken.
    """

    def __init__(self, path: str) -> None:
        import open_clip

        name = locate(path)
        try:
            about: Any = (
                open_clip.get_model_config(name) if path.startswith("hf-hub:") else _config(Path(name.removeprefix("local-dir:")))
            )
            named = (about or {}).get("text_cfg", {}).get("hf_tokenizer_name") or not about
            # A CLIP's own configuration could else ask for code of its own (text_cfg.tokenizer_kwargs).
            trust = {"trust_remote_code": False} if named else {}
            self.model = open_clip.create_model(name, precision="fp32").eval().requires_grad_(False)
            self.tokenizer = open_clip.get_tokenizer(name, **trust)
            if self.tokenizer(["cat"]).equal(self.tokenizer(["dog"])):
                raise ValueError("its tokenizer reads every text alike")
        except Exception as error:  # open_clip and transformers fail in any way on what is broken
            reason = next(
                (line.strip() for line in str(error).splitlines()[1:2] or str(error).splitlines()), type(error).__name__
            )[:200]
            raise ValueError(
                f"path={path} cannot be loaded ({reason.rstrip('.:')}); it is damaged or of another version"
            ) from error
        visual = self.model.visual
        size = visual.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.mean = torch.tensor(visual.preprocess_cfg["mean"]).view(1, 3, 1, 1)
        self.std = torch.tensor(visual.preprocess_cfg["std"]).view(1, 3, 1, 1)
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
        """[B, width]; each text is encoded once."""
        with torch.no_grad():
            return torch.stack([self._text(text) for text in texts]).to(device)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """[B, width], computed anew."""
        device = next(self.model.parameters()).device
        return F.normalize(self.model.encode_text(self.tokenizer(list(texts)).to(device)), dim=-1)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resized (bicubic, antialiased) and normalised, without leaving tensors."""
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return (images.float() - self.mean.to(images.device)) / self.std.to(images.device)


class ClipScore:
    """scale times the cosine between image and prompt. Differentiable. About 20 to 40 for matching pairs at scale 100.

    Args:
        path: of a `Clip`.
        scale: 100 as usual.
        template: "{}" is replaced by the prompt.
    """

    differentiable = True
    unit = "100 x cosine"
    typical_range = (0.0, 100.0)

    @staticmethod
    def check(path: str, **_: Any) -> None:
        locate(path)

    def __init__(self, path: str, *, scale: float = 100.0, template: str = "{}") -> None:
        self.clip, self.scale, self.template = Clip(path), scale, template
        self.unit, self.typical_range = f"{scale:g} x cosine", (0.0, scale)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = self.clip.texts([self.template.replace("{}", p) for p in prompts], images.device)
        return self.scale * (self.clip.images(images) * texts).sum(-1)


def locate(path: str) -> str:
    """The name by which open_clip finds the model.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it lacks a file.
    """
    if not isinstance(path, str) or not path:
        raise ValueError(f"path={path} must be a folder in open_clip's format, emoji_clip, or hf-hub:owner/name")
    if path.startswith("hf-hub:"):
        return path
    shipped = Path(str(importlib.resources.files("alignlab") / "assets" / path))
    folder = next((f for f in (Path(path), shipped) if f.is_dir()), None)
    mend = "give a folder in open_clip's format, emoji_clip, or hf-hub:owner/name"
    if folder is None:
        raise FileNotFoundError(f"path={path}: there is no such folder and no such shipped model; {mend}")
    if not (folder / "open_clip_config.json").is_file() or not any(folder.glob("open_clip_*.safetensors")):
        raise FileNotFoundError(f"path={path}: {folder} lacks open_clip_config.json or its safetensors weights; {mend}")
    text = _config(folder)["text_cfg"]
    if text.get("hf_tokenizer_name") and not any((folder / file).is_file() for file in VOCABULARIES):
        # transformers would make an empty vocabulary without a word, and every score be meaningless
        raise FileNotFoundError(f"path={path}: {folder} lacks its tokenizer ({' or '.join(VOCABULARIES)}); {mend}")
    return f"local-dir:{folder}"


def _config(folder: Path) -> dict[str, Any]:
    """What open_clip_config.json says of the model."""
    path = folder / "open_clip_config.json"
    try:
        its = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        if not all(isinstance(its[key], dict) for key in ("text_cfg", "vision_cfg")):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"path={folder}: {path} is no configuration of open_clip's; fetch it again") from None
    return dict(its)
