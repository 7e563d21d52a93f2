"""Small heads on a CLIP's embeddings, and the folder in which a learned reward is kept.

    REWARD/reward.json        kind, the CLIP it stands on, and what was measured on held-out data
    REWARD/head.safetensors   the head's weights
    REWARD/clip.safetensors   the CLIP's own tensors that were trained too (only if there are any)

`python -m alignlab.train_reward` writes such folders; aesthetic.py and preference.py read them.
"""

import importlib.resources
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignlab.rewards.clip import Clip, locate


class Mlp(nn.Module):
    """LAION's predictor: linear layers on an image embedding, one number out.

    Args:
        widths: from the embedding's length to 1.
        relu: between the layers; the published head has none, so it is an affine map.
    """

    def __init__(self, widths: Sequence[int], *, relu: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.relu = relu

    def forward(self, embedding: Tensor) -> Tensor:
        """[B] from [B, width]."""
        x = embedding
        for k, layer in enumerate(self.layers):
            x = layer(x.relu() if k and self.relu else x)
        return x[:, 0]


class Agreement(nn.Module):
    """PickScore's form: exp(logit_scale) times the cosine of image and text, here after a linear map of each, at first the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.image, self.text):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """[B] from two [B, width]."""
        return self.logit_scale.exp() * nn.functional.cosine_similarity(self.image(image), self.text(text))


def folder_of(path: str, kind: str) -> Path:
    """The folder of a learned reward, by path or by the name of one shipped in alignlab/assets.

    Raises:
        FileNotFoundError, ValueError: if there is none, it lacks a file, is of another kind, or its CLIP is not there.
    """
    shipped = Path(str(importlib.resources.files("alignlab") / "assets" / path))
    folder = next((f for f in (Path(path), shipped) if f.is_dir()), None)
    mend = "make one with python -m alignlab.train_reward"
    if folder is None:
        raise FileNotFoundError(f"path={path}: there is no such folder and no such shipped reward; {mend}")
    lacks = [f for f in ("reward.json", "head.safetensors") if not (folder / f).is_file()]
    if lacks:
        raise FileNotFoundError(f"path={path}: {folder} lacks {' and '.join(lacks)}; {mend}")
    about = json.loads((folder / "reward.json").read_text())
    if about["kind"] != kind:
        raise ValueError(f"path={path} holds a reward of kind {about['kind']}, not {kind}; choose reward={about['kind']}")
    locate(about["clip"])
    return folder


def load(folder: Path, head: nn.Module | None = None) -> tuple[Clip, dict[str, Tensor], dict[str, Any]]:
    """The CLIP with its trained tensors in place, the head's tensors, and reward.json."""
    about = json.loads((folder / "reward.json").read_text())
    clip = Clip(about["clip"])
    if (folder / "clip.safetensors").is_file():
        own = {k: v.float() for k, v in load_file(folder / "clip.safetensors").items()}
        unknown = clip.model.load_state_dict(own, strict=False).unexpected_keys
        if unknown:
            raise ValueError(
                f"{folder}/clip.safetensors does not fit {about['clip']}: it has {unknown[0]}; train the reward again"
            )
    return clip, {k: v.float() for k, v in load_file(folder / "head.safetensors").items()}, about


def save(folder: Path, head: nn.Module, about: dict[str, Any], own: dict[str, Tensor]) -> None:
    """Writes the folder, weights in half precision. `own` are the CLIP's trained tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().half().cpu().contiguous() for k, v in head.state_dict().items()}, folder / "head.safetensors")
    if own:
        save_file({k: v.detach().half().cpu().contiguous() for k, v in own.items()}, folder / "clip.safetensors")
    (folder / "reward.json").write_text(json.dumps(about, indent=2) + "\n")


def mlp_of(state: dict[str, Tensor], *, relu: bool) -> Mlp:
    """The head that a state dict describes: its two-dimensional tensors are the layers' weights, in order. So LAION's files are
    read as well: v2 counts its dropouts too (layers.0, 2, 4, 6, 7), v1 is a bare layer (weight, bias).

    Raises:
        ValueError: if it describes none.
    """
    names = [name.removesuffix("weight") for name in state if name.endswith("weight") and state[name].dim() == 2]
    names.sort(key=lambda name: int("".join(filter(str.isdigit, name)) or 0))
    widths = [state[f"{n}weight"].shape for n in names]
    fits = widths and widths[-1][0] == 1 and all(one[0] == next_[1] for one, next_ in pairwise(widths))
    if not fits or any(f"{n}bias" not in state for n in names):
        raise ValueError(f"this is no head of linear layers that end in one number: it has {', '.join(state) or 'nothing'}")
    head = Mlp([widths[0][1], *(out for out, _ in widths)], relu=relu)
    for layer, name in zip(head.layers, names, strict=True):
        layer.load_state_dict({"weight": state[f"{name}weight"], "bias": state[f"{name}bias"]})
    return head
