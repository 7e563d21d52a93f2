"""LoRAs on the disk: those of others are read whole or refused by name, ours are written for every reader.

A LoRA is W + scale B A. Programs disagree on where the scale is written: peft has alpha and rank (or
sqrt(rank)) in a configuration, kohya has an alpha for each layer, and older readers take 1. What is read ends
with one rank and one alpha. What is written has the scale in B and alpha = rank, so that a reader that knows
nothing of alpha is right too.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignlab.distributed.ranks import rank as process
from alignlab.models.kohya import Layer, Naming
from alignlab.models.lora_config import PEFT_FILE, TRAINED_ALPHA, Stated, stated
from alignlab.models.lora_keys import MERGE, side, unlike_a_lora

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls it in a folder."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that may hold code, and are not opened."""
_CONVERT = (
    "convert it to .safetensors where you trust it (torch.load with weights_only=True, "
    "safetensors.torch.save_file)"
)
_FLOATS = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}
_LARGEST = 4
"""How many times the network's size a LoRA may take when small ranks are filled up with zeros."""


class Update(NamedTuple):
    """The LoRA of one module, scale B A."""

    a: Tensor
    b: Tensor
    scale: float
    alpha: float | None
    """Such that scale = alpha / rank, if the file says so itself."""


def weights_file(path: Path) -> Path:
    """The file of a LoRA's weights: the path itself, or the one in a folder.

    Raises:
        ValueError: if there is none, or several that none of the usual names tells apart.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} holds no LoRA that can be read: it is no .safetensors file; {_CONVERT}")
        return path
    files = sorted(path.glob("*.safetensors"))
    usual = [file for name in (WEIGHTS_FILE, PEFT_FILE) for file in files if file.name == name]
    if not files:
        pickles = sorted(file for file in path.glob("*") if file.suffix in PICKLES)
        said = f"{pickles[0].name} may hold code; {_CONVERT}" if pickles else "it has no .safetensors file"
        raise ValueError(f"{path} holds no LoRA that can be read: {said}")
    if not usual and len(files) > 1:
        raise ValueError(
            f"{path} holds {len(files)} .safetensors files ({', '.join(f.name for f in files[:3])}); give "
            "one of them"
        )
    return (usual or files)[0]


def read(
    path: Path, network: str, shapes: Mapping[str, Sequence[int]], namings: Sequence[Naming]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a LoRA by diffusers' names (float32), and the arguments of `lora.LoRA`.

    Args:
        path: a folder or a file, in the format of diffusers, peft, kohya or ComfyUI.
        network: what diffusers calls the network ("unet").
        shapes: of the weights of every module of the network that a LoRA can adapt.
        namings: the names of layers by module that files may use.

    Raises:
        ValueError: if it cannot be read, is of another network, or has an effect that is not applied.
    """
    file = weights_file(path)
    try:
        said, trained = stated(file, (network, "unet", "transformer"))
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} holds no LoRA that can be read: {error}") from None
    sides = _sides(stored, file, _layers(shapes, namings))
    updates = _updates(sides, file, shapes, said)
    if said:
        _refuse_other_modules(updates, said, file, shapes)
    return _uniform(updates, file, shapes, trained)


def write(
    file: Path, network: str, lora: Mapping[str, Tensor], rank: int, alpha: float, targets: Iterable[str]
) -> None:
    """Writes diffusers' format with the scale alpha/rank in B and alpha = rank; the alpha of the training is
    noted.

    The metadata holds no more than a reader needs: diffusers refuses entries that its own peft does not know.
    The patterns are empty: diffusers 0.36 with peft 0.17 reads them without asking whether they are there.
    """
    about: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": sorted(targets)}
    about |= {"peft_type": "LORA", "rank_pattern": {}, "alpha_pattern": {}}
    metadata = {"format": "pt", TRAINED_ALPHA: repr(alpha)}
    metadata["lora_adapter_metadata"] = json.dumps(
        {f"{network}.{key}": value for key, value in about.items()}, indent=2, sort_keys=True
    )
    tensors = {f"{network}.{k}": v * (alpha / rank) if ".lora_B." in k else v for k, v in lora.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file, metadata=metadata
    )


def _of_an_earlier_version(file: Path) -> Stated | None:
    """What a file says that an earlier version of alignlab wrote with alpha != rank; None for another
    file."""
    if not file.is_file():  # of a family that saves in a form of its own
        return None
    try:
        said, trained = stated(file, ("unet", "transformer"))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} holds no LoRA that can be read ({str(error)[:200]})") from None
    return said if said and trained is None and said.plain and said.alpha != said.rank else None


def outdated(folder: Path) -> bool:
    """Whether `renew` would write the LoRA of a run again."""
    return _of_an_earlier_version(folder / WEIGHTS_FILE) is not None


def renew(folder: Path) -> None:
    """Writes the LoRA of a run in the form of `write`, if an earlier alignlab wrote it in another."""
    file = folder / WEIGHTS_FILE
    said = _of_an_earlier_version(file)
    if said is None:
        return
    stored = load_file(file)
    network = min(stored).partition(".")[0]
    lora = {key.removeprefix(f"{network}."): value for key, value in stored.items()}
    write(file, network, lora, said.rank, said.alpha, said.modules.target_modules or modules(lora))


def rank_and_alpha(path: Path) -> tuple[int, float] | None:
    """Rank and alpha of a LoRA that one of each describes, from its header.

    None if the network's modules must be known to tell.

    Raises:
        ValueError: if the header is damaged, or says of an effect that is not applied.
    """
    file = weights_file(path)
    try:
        said, trained = stated(file, ("unet", "transformer"))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file} holds no LoRA that can be read ({str(error)[:200]}); fetch it again"
        ) from None
    return (said.rank, _tidy(trained or said.alpha)) if said and said.plain else None


def header(file: Path) -> list[str]:
    """The keys of a .safetensors file."""
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def modules(lora: Iterable[str]) -> set[str]:
    """The modules that the keys of a LoRA name."""
    return {key.partition(".lora_")[0] for key in lora}


def _layers(shapes: Mapping[str, Sequence[int]], namings: Sequence[Naming]) -> dict[tuple[str, bool], Layer]:
    """By name, dotted or flat, the layers of the network."""
    layers: dict[tuple[str, bool], Layer] = {}
    for module in shapes:
        for layer in filter(None, (naming(module) for naming in namings)):
            layers[layer.name, False] = layers[layer.name.replace(".", "_"), True] = layer
    return layers


def _sides(
    stored: Mapping[str, Tensor], file: Path, layers: Mapping[tuple[str, bool], Layer]
) -> dict[Layer, dict[str, Tensor]]:
    """Every tensor at its place in a layer of the network, float32."""
    sides: dict[Layer, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in stored.items():
        place = side(key)
        if place is None:
            count = sum(unlike_a_lora(other) == unlike_a_lora(key) for other in stored if side(other) is None)
            raise ValueError(
                f"{file} holds {unlike_a_lora(key)} ({key}, one of {count}), which is not applied; {MERGE}"
            )
        layer = layers.get((place.layer, place.flat)) or layers.get(
            (place.layer + (".0", "_0")[place.flat], place.flat)
        )
        if layer is None:
            raise ValueError(
                f"{file} is no LoRA of this model's network: it holds {key}, which the network has no place "
                "for"
            )
        if place.side in sides[layer]:
            raise ValueError(
                f"{file} holds two LoRAs of one layer, the second with {key}; give a file with one of them"
            )
        if tensor.dtype not in _FLOATS:
            raise ValueError(
                f"{file} holds {key} in {str(tensor.dtype).removeprefix('torch.')}, not in floating point; "
                "it is quantised or damaged"
            )
        value = tensor.float()
        if not value.isfinite().all():
            raise ValueError(f"the LoRA in {file} holds numbers that are not finite ({key}); it is damaged")
        sides[layer][place.side] = value
    return sides


def _updates(
    sides: Mapping[Layer, Mapping[str, Tensor]],
    file: Path,
    shapes: Mapping[str, Sequence[int]],
    said: Stated | None,
) -> dict[str, Update]:
    """The updates of diffusers' modules."""
    updates: dict[str, Update] = {}
    silent = set()
    for layer, have in sides.items():
        if not {"A", "B"} <= have.keys():
            lacks = ", ".join(
                sorted(
                    {"A": "lora_A (down)", "B": "lora_B (up)"}[letter] for letter in {"A", "B"} - have.keys()
                )
            )
            raise ValueError(f"{file} has {layer.name} without its {lacks}; it is damaged")
        own = have.get("alpha")
        if own is not None and own.numel() != 1:
            raise ValueError(
                f"{file} is damaged: the alpha of {layer.name} is {list(own.shape)} and not one number"
            )
        if own is None and said is None:
            silent.add(len(have["A"]))
        for module, a, b in _parts(layer, have["A"], have["B"], file, shapes):
            alpha = None if own is None else float(own) * len(a) / len(have["A"])
            updates[module] = _scaled(module, a, b, alpha, said, file)
    if silent:
        ranks = ", ".join(str(rank) for rank in sorted(silent))
        _note(
            f"{file} does not say its alpha; it is taken as the rank ({ranks}), as diffusers and ComfyUI do"
        )
    if not any(update.a.any() for update in updates.values()):
        raise ValueError(
            f"{file} is no LoRA of this model's network: it holds nothing but zeros, or no weights at all"
        )
    if all(update.scale == 0 for update in updates.values()):
        raise ValueError(
            f"the LoRA in {file} has alpha 0, so that it does nothing; fetch it again, or leave it out"
        )
    return updates


def _scaled(
    module: str, a: Tensor, b: Tensor, alpha: float | None, said: Stated | None, file: Path
) -> Update:
    """An update with the scale that the file says, or else 1."""
    if said is None:
        alpha = float(len(a)) if alpha is None else alpha
        return Update(a, b, alpha / len(a), alpha)
    rank, stated_alpha, scale = said.of(module)
    if rank != len(a):
        raise ValueError(
            f"the LoRA in {file} says rank={rank} and alpha={stated_alpha}, and its tensors have rank "
            f"{len(a)} ({module}); it is damaged"
        )
    if alpha is not None and not math.isclose(alpha / rank, scale, rel_tol=1e-5):
        raise ValueError(
            f"the LoRA in {file} says alpha={stated_alpha:g} in its configuration and {alpha:g} in its "
            f"weights ({module}); it is damaged"
        )
    return Update(a, b, scale, None if said.rslora else stated_alpha)


def _parts(
    layer: Layer, a: Tensor, b: Tensor, file: Path, shapes: Mapping[str, Sequence[int]]
) -> Iterable[tuple[str, Tensor, Tensor]]:
    """What a layer's LoRA is of each of diffusers' modules in it; nothing of those that it leaves alone."""
    lacks = [part for part in layer.parts if part not in shapes]
    heights = [shapes[part][0] for part in layer.parts if part in shapes]
    first = shapes.get(layer.parts[0], ())
    inner = math.prod(first[1:])
    whole = (
        a.dim() > 1
        and b.dim() > 1
        and b.shape[:2] == (sum(heights), len(a))
        and b.numel() == sum(heights) * len(a)
    )
    if (
        lacks
        or not whole
        or a.numel() != len(a) * inner
        or not len(a)
        or (a.dim() > 2 and a.shape[1:] != first[1:])
    ):
        raise ValueError(
            f"{file} is of another model: its LoRA of {layer.name} is {list(b.shape)} x {list(a.shape)}, "
            f"and the weight here is {[sum(heights), *first[1:]]}"
        )
    a, b = a.reshape(len(a), *first[1:]), b.reshape(*b.shape[:2], *(1 for _ in first[2:]))
    if len(layer.parts) == 1:
        yield layer.parts[0], a, b
        return
    n, ups = len(layer.parts), b.split(heights)
    own = [range(k * len(a) // n, (k + 1) * len(a) // n) for k in range(n)]
    others = [up[:, [c for c in range(len(a)) if c not in mine]] for up, mine in zip(ups, own, strict=True)]
    apart = len(a) % n == 0 and not any(
        up.any() for up in others
    )  # several LoRAs in one (kohya.write), or one of all
    for part, up, mine in zip(layer.parts, ups, own, strict=True):
        down, up = (a[mine], up[:, mine]) if apart else (a, up)
        if down.any():
            yield part, down, up


def _refuse_other_modules(
    updates: Mapping[str, Update], said: Stated, file: Path, shapes: Mapping[str, Sequence[int]]
) -> None:
    """Raises if tensors and configuration name different modules: peft would leave tensors out in silence."""
    adapted = said.adapted(shapes)
    odd = sorted(adapted ^ updates.keys()) if adapted is not None else []
    if odd:
        named_by, unnamed_by = (
            ("its weights", "its target_modules")
            if odd[0] in updates
            else ("its target_modules", "its weights")
        )
        raise ValueError(
            f"the LoRA in {file} is damaged or of another model: {odd[0]} is among {named_by} and not among "
            f"{unnamed_by}"
        )


def _uniform(
    updates: Mapping[str, Update], file: Path, shapes: Mapping[str, Sequence[int]], trained: float | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One rank and one alpha for all modules: other scales go into B, smaller ranks are filled up with
    zeros."""
    ranks, alphas = (
        {len(update.a) for update in updates.values()},
        {update.alpha for update in updates.values()},
    )
    rank, (given,) = max(ranks), (alphas if len(ranks) == len(alphas) == 1 else {None})
    alpha = trained or given or float(rank)
    if trained is None and given is None:
        scales = sorted({update.scale for update in updates.values()})
        filled = f", and ranks below {rank} are filled up with zeros" if len(ranks) > 1 else ""
        _note(
            f"{file} scales its modules by "
            f"{' to '.join(f'{scale:.4g}' for scale in dict.fromkeys((scales[0], scales[-1])))}; the scale "
            f"is multiplied into B{filled}, so that rank={rank} and alpha={rank} have the same effect"
        )
    if len(ranks) > 1 and len(updates) * rank > 0:
        taken = sum(rank * (shapes[name][0] + math.prod(shapes[name][1:])) for name in updates)
        if taken > _LARGEST * sum(math.prod(shape) for shape in shapes.values()):
            raise ValueError(
                f"{file} has ranks from {min(ranks)} to {rank}, too unequal to be read as one rank; {MERGE}"
            )
    lora: dict[str, Tensor] = {}
    for name, update in _with_namesakes(updates, shapes).items():
        factor, fill = update.scale / (alpha / rank), rank - len(update.a)
        a = torch.cat([update.a, update.a.new_zeros(fill, *update.a.shape[1:])])
        b = torch.cat([update.b, update.b.new_zeros(len(update.b), fill, *update.b.shape[2:])], 1)
        lora |= {
            f"{name}.lora_A.weight": a.contiguous(),
            f"{name}.lora_B.weight": (b if factor == 1 else b * factor).contiguous(),
        }
    return lora, {"rank": rank, "alpha": _tidy(alpha), "targets": tuple(modules(lora))}


def _with_namesakes(updates: Mapping[str, Update], shapes: Mapping[str, Sequence[int]]) -> dict[str, Update]:
    """With LoRAs of zeros for the modules that peft adapts too because their names end in an adapted
    one's."""
    zeros = {}
    for name, shape in shapes.items():
        tails = {name.split(".", k)[-1] for k in range(1, name.count(".") + 1)}
        if name not in updates and tails & updates.keys():
            zeros[name] = Update(
                torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *(1 for _ in shape[2:])), 1.0, None
            )
    return {**updates, **zeros}


def _tidy(alpha: float) -> float:
    """A whole number as such."""
    return int(alpha) if alpha == int(alpha) else alpha


def _note(sentence: str) -> None:
    if process() == 0:
        print(f"note: {sentence}", flush=True)
