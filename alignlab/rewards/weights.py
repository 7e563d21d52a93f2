"""Where published weights are: a file, a folder, or a repository of the Hugging Face hub. No pickle is ever
executed."""

import json
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

FILES = (".pt", ".pth", ".bin", ".safetensors")


def at_hand(path: str, file: str, revision: str | None = None) -> Path | None:
    """`path` itself if it is a file, else `file` in the folder `path` or in the hub's cache; None if it is
    not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    here = next((p for p in (Path(path), Path(path) / file) if p.is_file()), None)
    if here is None and on_hub(path):
        cached = try_to_load_from_cache(path, file, revision=revision)
        here = Path(cached) if isinstance(cached, str) else None
    return here


Alternatives = str | tuple[str, ...]
"""A file, or several of which one is enough."""
MODEL: Alternatives = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weights in transformers' format."""
SAFE_MODEL: Alternatives = ("model.safetensors", "model.safetensors.index.json")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
"""What an image processor does. Version 5 of transformers writes it into the second, beside the rest of a
processor."""
BPE_WORDS = ("vocab.json", "tokenizer.json")
BERT_WORDS = ("vocab.txt", "tokenizer.json")
"""A vocabulary as older tokenizer classes read it, or as transformers 5 writes it."""
VOCABULARIES: Alternatives = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "spm.model",
)


def to_fetch(path: str, *files: Alternatives, revision: str | None = None, whole: bool = False) -> list[str]:
    """How to get the files of a hub's repository that are not in its cache; nothing for what is no repository
    of the hub.

    Args:
        whole: the command for the repository with all that it holds, instead of for these files.
    """
    if not on_hub(path):
        return []
    lacks = [
        file for file in files if not _cached(path, (file,) if isinstance(file, str) else file, revision)
    ]
    if not lacks:
        return []
    first = [file if isinstance(file, str) else file[0] for file in lacks]
    command = " ".join(
        ["hf download", path, *([] if whole else first), *(["--revision", revision] if revision else [])]
    )
    return [f"{first[0]} of {path} is not in the hub's cache; {command}"]


def _cached(path: str, files: tuple[str, ...], revision: str | None) -> bool:
    """Whether one of these is there, with every part that an index names."""
    for file in files:
        local = at_hand(path, file, revision)
        if local is not None and file.endswith(".index.json"):
            try:
                parts = set(json.loads(local.read_text(encoding="utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
            local = local if all(at_hand(path, part, revision) for part in parts) else None
        if local is not None:
            return True
    return False


def on_hub(path: str) -> bool:
    """Whether it can only be owner/name, a repository of the hub: there is nothing of that name on the
    disk."""
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None and not path.endswith(FILES)
    return named and not Path(path).exists()


def look(path: str, *files: Alternatives, revision: str | None = None, key: str = "path") -> None:
    """Nothing is fetched: a repository of the hub passes.

    Raises:
        FileNotFoundError: naming `key` and the first of the files that is missing.
    """
    sets = [(file,) if isinstance(file, str) else file for file in files]
    lacks = next(
        (names[0] for names in sets if not any(at_hand(path, name, revision) for name in names)), None
    )
    if lacks is None or on_hub(path):
        return
    what = f"{path} has no {lacks}" if Path(path).is_dir() else "there is no such file or folder"
    raise FileNotFoundError(
        f"{key}={path}: {what}; give a file or folder with {lacks}, or owner/name of the Hugging Face hub"
    )


def fetched(path: str, file: str, revision: str | None = None, key: str = "path") -> Path:
    """The file, downloaded from the hub if it is not on this machine.

    Raises:
        FileNotFoundError: if it is nowhere to be had.
    """
    look(path, file, revision=revision, key=key)
    local = at_hand(path, file, revision)
    if local is None:
        from huggingface_hub import hf_hub_download

        try:
            local = Path(hf_hub_download(path, file, revision=revision))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(unreachable(key, path, file, error)) from None
    return local


def fetched_any(path: str, files: tuple[str, ...], revision: str | None = None, key: str = "path") -> Path:
    """The first of these files that is on this machine, else the first that the hub gives.

    Raises:
        FileNotFoundError: if none is to be had; it names the first.
    """
    cached = next((found for file in files if (found := at_hand(path, file, revision))), None)
    if cached is not None:
        return cached
    look(path, files, revision=revision, key=key)
    first: FileNotFoundError | None = None
    for file in files:
        try:
            return fetched(path, file, revision, key)
        except FileNotFoundError as error:
            first = first or error
    raise first or FileNotFoundError(path)


def unreachable(key: str, path: str, file: str, error: Exception) -> str:
    """What to do when the hub did not give a file."""
    why = str(error).strip().partition("\n")[0].rstrip(".")
    return (
        f"{key}={path}: {file} is not on this machine and the hub did not give it ({why}); set {key} to "
        "where it is"
    )


def tensors(file: Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, or of one that torch.save wrote, bare or under "state_dict".

    Raises:
        ValueError: if it holds anything but tensors and plain values.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        why = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{file} is no file of weights ({why}); fetch it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no state dict; give the file that was published")
    return state
