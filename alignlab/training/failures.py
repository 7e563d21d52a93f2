"""What ends a run, in one sentence: what happened, what to change, and that the run folder is as its last checkpoint left it."""

import gc
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from alignlab.config.build import ConfigError
from alignlab.config.schema import device_of
from alignlab.distributed.ranks import signed
from alignlab.engine.rollout import NothingToLearn
from alignlab.planning.fit import free_memory, instead
from alignlab.planning.footprint import Epoch
from alignlab.rewards.compose import RewardError
from alignlab.runs.folder import FULL, RunError
from alignlab.runs.pasted import resume
from alignlab.training.guards import Leap, Unscored

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What torch says of it where it has no exception of its own (CPU, MPS, cuBLAS)."""


@contextmanager
def explained(c: dict[str, Any], folder: Path, epoch: Epoch) -> Iterator[None]:
    """Around a run.

    Args:
        c: its configuration.
        epoch: `train_epoch`, for the prediction of what would fit.

    Raises:
        ConfigError: in place of every error that has a remedy.
    """
    hook, threading.excepthook = threading.excepthook, _quiet
    try:
        yield
    except (Unscored, Leap) as error:  # that all processes raise
        raise ConfigError(str(error)) from None
    except (RunError, RewardError, NothingToLearn) as error:
        raise ConfigError(signed(str(error))) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = error.filename or folder
        raise ConfigError(
            signed(
                f"{where} cannot be written ({error.strerror}): what was saved before is intact; make room and go on with {resume(folder)}"
            )
        ) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        key = "evaluation.batch" if _in_evaluation(error) else "micro_batch"
        room = _room(error, device_of(c["device"]).type)
        mend = instead({**c, "device": device_of(c["device"]).type}, key, room, epoch)
        raise ConfigError(
            signed(
                f"out of memory: {mend}, in another output_dir, for it is another run ({folder} is as its last checkpoint left it)"
            )
        ) from None
    finally:
        threading.excepthook = hook


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device, or the host, has no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def _in_evaluation(error: BaseException) -> bool:
    """Whether it happened while the run measured itself (measure.py)."""
    return any(frame.filename.endswith("measure.py") for frame in traceback.extract_tb(error.__traceback__))


def _room(error: BaseException, device: str) -> float | None:
    """Bytes that the device has once everything of the run is let go of."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return free_memory(device)


def _quiet(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread tells the main one of a full disk, which says it in a sentence."""
    if not isinstance(args.exc_value, OSError) or args.exc_value.errno not in FULL:
        threading.__excepthook__(args)
