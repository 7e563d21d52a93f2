"""Where published weights are: a file, a folder, or a repository of the Hugging Face hub. No pickle is ever executed."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

FILES = (".pt", ".pth", ".bin", ".safetensors")


def at_hand(path: str, file: str, revision: str | None = None) -> Path | None:
    """`path` itself if it is a file, else `file` in the folder `path` or in the hub's cache; None if it is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    here = next((p for p in (Path(path), Path(path) / file) if p.is_file()), None)
    if here is None and on_hub(path):
        cached = try_to_load_from_cache(path, file, revision=revision)
        here = Path(cached) if isinstance(cached, str) else None
    return here


def on_hub(path: str) -> bool:
    """Whether it can only be owner/name, a repository of the hub: there is nothing of that name on the disk."""
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None and not path.endswith(FILES)
    return named and not Path(path).exists()


def look(path: str, *files: str, revision: str | None = None, key: str = "path") -> None:
    """Nothing is fetched: a repository of the hub passes.

    Raises:
        FileNotFoundError: naming `key` and the first of the files that is missing.
    """
    lacks = next((file for file in files if at_hand(path, file, revision) is None), None)
    if lacks is None or on_hub(path):
        return
    what = f"{path} has no {lacks}" if Path(path).is_dir() else "there is no such file or folder"
    raise FileNotFoundError(f"{key}={path}: {what}; give a file or folder with {lacks}, or owner/name of the Hugging Face hub")


def fetched(path: str, file: str, revision: str | None = None, key: str = "path") -> Path:
    """The file, downloaded from the hub if it is not on this machine.

    Raises:
        FileNotFoundError: if it is nowhere to be had.
    """
    look(path, file, revision=revision, key=key)
    found = at_hand(path, file, revision)
    if found is None:
        from huggingface_hub import hf_hub_download

        try:
            found = Path(hf_hub_download(path, file, revision=revision))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(unreachable(key, path, file, error)) from None
    return found


def unreachable(key: str, path: str, file: str, error: Exception) -> str:
    """What to do when the hub did not give a file."""
    why = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{key}={path}: {file} is not on this machine and the hub did not give it ({why}); set {key} to where it is"


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
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        why = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{file} is no file of weights ({why}); fetch it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no state dict; give the file that was published")
    return state
