"""What init_from= names, told by names and the headers of files, before a model is loaded: a run, a LoRA or a
pipeline folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from alignlab.files.safe_folder import RunError
from alignlab.models import lora_files, lora_keys
from alignlab.models.lora import LoRA
from alignlab.runs.layout import weights


def start_problems(init_from: str | None, here: Path, policy: dict[str, Any]) -> Iterator[str]:
    """Says what is wrong with init_from=, as names and the headers of files tell before a model is loaded.
    Nothing is wrong where a checkpoint takes over.

    Args:
        here: the folder of the run, or of a sweep's runs.
        policy: the policy's node.
    """
    if init_from is None or any(here.glob("checkpoints/step_*")) or any(here.glob("*/checkpoints/step_*")):
        return
    try:
        path, whole = source(init_from)
        stored = None if whole else _rank_and_alpha(path)
    except (RunError, OSError) as error:
        yield (
            str(error)
            if isinstance(error, RunError)
            else f"init_from={init_from} cannot be read ({error.strerror})"
        )
        return
    if not policy.get("full"):
        asked = {"rank": LoRA.rank, "alpha": LoRA.alpha} | (policy.get("lora") or {})
        if whole:
            yield a_pipeline(init_from)
        elif stored and stored != (asked["rank"], asked["alpha"]):
            yield another_rank(init_from, stored, (asked["rank"], asked["alpha"]))


def source(init_from: str) -> tuple[Path, bool]:
    """The folder or file of the weights, and whether they are a whole pipeline's.

    Raises:
        RunError: if there are none.
    """
    path = Path(init_from)
    if (path / "config.yaml").is_file():
        path = weights(path)
    if (path / "model_index.json").is_file():
        return path, True
    if path.suffix in lora_files.PICKLES or (
        path.is_dir() and any(f.suffix in (".safetensors", *lora_files.PICKLES) for f in path.iterdir())
    ):
        return path, False  # a pickle is refused where a LoRA is read
    if path.is_file() and path.suffix == ".safetensors":
        try:
            if lora_keys.resembles(lora_files.header(path)):
                return path, False
        except SafetensorError as error:
            raise RunError(f"init_from={init_from} cannot be read as .safetensors ({error})") from None
        raise RunError(f"init_from={init_from} is no LoRA; a whole model is given as model.path_or_id")
    raise RunError(
        f"init_from={init_from} holds no weights; give a run folder, a LoRA folder, a LoRA's .safetensors "
        "file or a pipeline folder"
    )


def _rank_and_alpha(path: Path) -> tuple[int, float] | None:
    """Of a LoRA that says one rank and one alpha for all of it, from its header."""
    try:
        return lora_files.rank_and_alpha(path)
    except ValueError as error:
        raise RunError(str(error)) from None


def a_pipeline(init_from: str) -> str:
    return (
        f"init_from={init_from} is a whole pipeline, and policy.full=false trains a LoRA; "
        "give it as model.path_or_id (it is then the reference too), or set policy.full=true"
    )


def another_rank(init_from: str, stored: tuple[int, float], requested: tuple[int, float]) -> str:
    return (
        f"init_from={init_from} has rank {stored[0]} and alpha {stored[1]}, but policy.lora has "
        f"rank {requested[0]} and alpha {requested[1]}; "
        f"set policy.lora.rank={stored[0]} policy.lora.alpha={stored[1]}"
    )
