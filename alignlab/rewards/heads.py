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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignlab.rewards.clip import Clip, locate
from alignlab.rewards.clip import to_fetch as clip_to_fetch

AFFINE = (0, 2, 4, 6, 7)
"""How LAION's v2 and ImageReward's head, which have no ReLU, number their layers: dropouts are counted
too."""


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
    """PickScore's form: exp(logit_scale) times the cosine of image and text, here after a linear map of each,
    at first the identity."""

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
        FileNotFoundError, ValueError: if there is none, it lacks a file, is of another kind, or its CLIP is
            not there.
    """
    shipped = Path(str(importlib.resources.files("alignlab") / "assets" / path))
    folder = next((f for f in (Path(path), shipped) if f.is_dir()), None)
    mend = "make one with python -m alignlab.train_reward"
    if folder is None:
        raise FileNotFoundError(f"path={path}: there is no such folder and no such shipped reward; {mend}")
    lacks = [f for f in ("reward.json", "head.safetensors") if not (folder / f).is_file()]
    if lacks:
        raise FileNotFoundError(f"path={path}: {folder} lacks {' and '.join(lacks)}; {mend}")
    about = _about(folder, path)
    if about["kind"] != kind:
        raise ValueError(
            f"path={path} holds a reward of kind {about['kind']}, not {kind}; choose reward={about['kind']}"
        )
    locate(about["clip"])
    return folder


def to_fetch(folder: Path) -> list[str]:
    """How to get the CLIP of a learned reward, if it is not at hand."""
    return clip_to_fetch(_about(folder, str(folder))["clip"])


def load(folder: Path) -> tuple[Clip, dict[str, Tensor], dict[str, Any]]:
    """The CLIP with its trained tensors in place, the head's tensors, and reward.json."""
    about = _about(folder, str(folder))
    clip, own = Clip(about["clip"]), {}
    if (folder / "clip.safetensors").is_file():
        own = _tensors(folder / "clip.safetensors")
        weights = clip.model.state_dict()
        unknown = [
            name for name, tensor in own.items() if name not in weights or weights[name].shape != tensor.shape
        ]
        if unknown:
            raise ValueError(
                f"{folder}/clip.safetensors does not fit {about['clip']}: it has {unknown[0]} "
                f"{list(own[unknown[0]].shape)}; train the reward again"
            )
        clip.model.load_state_dict(own, strict=False)
    if about.get("clip_tensors", len(own)) != len(own):
        raise ValueError(
            f"{folder}/clip.safetensors holds {len(own)} of {about['clip_tensors']} tensors; train the "
            "reward again"
        )
    return clip, _tensors(folder / "head.safetensors"), about


def fill(head: nn.Module, state: dict[str, Tensor], folder: Path) -> nn.Module:
    """The head with these weights, frozen.

    Raises:
        ValueError: if one is missing, of another shape, or too many.
    """
    needed = head.state_dict()
    wrong = sorted(
        name
        for name in needed.keys() | state.keys()
        if name not in needed or name not in state or needed[name].shape != state[name].shape
    )
    if wrong:
        stored_shape = list(state[wrong[0]].shape) if wrong[0] in state else "missing"
        needed_shape = list(needed[wrong[0]].shape) if wrong[0] in needed else "none"
        raise ValueError(
            f"{folder}/head.safetensors is no head of this kind: {wrong[0]} is {stored_shape} there, "
            f"and {needed_shape} is needed; train the reward again"
        )
    head.load_state_dict(state)
    return head.eval().requires_grad_(False)


def _about(folder: Path, path: str) -> dict[str, Any]:
    """reward.json, with its kind and its CLIP."""
    try:
        about = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
        if not (isinstance(about["kind"], str) and isinstance(about["clip"], str)):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"path={path}: {folder / 'reward.json'} names no kind and no clip; train the reward again"
        ) from None
    return dict(about)


def _tensors(file: Path) -> dict[str, Tensor]:
    """A file's tensors, float32 and finite."""
    try:
        state = {k: v.float() for k, v in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}); train the reward again") from None
    spoilt = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if spoilt:
        raise ValueError(f"{file} holds numbers that are not finite ({spoilt[0]}); train the reward again")
    return state


def save(folder: Path, head: nn.Module, about: dict[str, Any], own: dict[str, Tensor]) -> None:
    """Writes the folder, weights in half precision. `own` are the CLIP's trained tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {**about, "clip_tensors": len(own)}
    save_file(
        {k: v.detach().half().cpu().contiguous() for k, v in head.state_dict().items()},
        folder / "head.safetensors",
    )
    if own:
        save_file(
            {k: v.detach().half().cpu().contiguous() for k, v in own.items()}, folder / "clip.safetensors"
        )
    aside = folder / ".new_reward.json"
    aside.write_text(json.dumps(about, indent=2) + "\n")
    aside.replace(folder / "reward.json")  # in one step: where it is, the reward is whole


def mlp_of(state: dict[str, Tensor], *, relu: bool) -> Mlp:
    """The head that a state dict describes: its two-dimensional tensors are the layers' weights, in order. So
    LAION's files are read as well: v2 counts its dropouts too (layers.0, 2, 4, 6, 7), v1 is a bare layer
    (weight, bias). What stands between the layers it does not describe.

    Raises:
        ValueError: if it describes none.
    """
    names = [
        name.removesuffix("weight") for name in state if name.endswith("weight") and state[name].dim() == 2
    ]
    names.sort(key=_number)
    shapes = [tuple(state[f"{n}weight"].shape) for n in names]
    chained = (
        shapes and shapes[-1][0] == 1 and all(before[0] == after[1] for before, after in pairwise(shapes))
    )
    biased = all(
        state.get(f"{n}bias", torch.zeros(0)).shape == (shape[0],)
        for n, shape in zip(names, shapes, strict=True)
    )
    if not chained or not biased or len(state) != 2 * len(names):
        raise ValueError(
            "this is no head of linear layers that end in one number: it has "
            f"{', '.join(sorted(state)[:4]) or 'nothing'}"
        )
    head = Mlp([shapes[0][1], *(shape[0] for shape in shapes)], relu=relu)
    for layer, name in zip(head.layers, names, strict=True):
        layer.load_state_dict({"weight": state[f"{name}weight"], "bias": state[f"{name}bias"]})
    return head


def layer_numbers(state: dict[str, Tensor]) -> tuple[int, ...]:
    """The numbers that a state dict gives the layers of a head, ascending: LAION's v2 has (0, 2, 4, 6, 7)."""
    return tuple(sorted(_number(name) for name in state if name.endswith("weight")))


def _number(name: str) -> int:
    return int("".join(filter(str.isdigit, name)) or 0)
