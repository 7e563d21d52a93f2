"""What ends a run, in one sentence: what happened, what to change, and that the run folder is as its last
checkpoint left it."""

import gc
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from alignlab.config.build import ConfigError
from alignlab.config.jobs import device_of
from alignlab.config.schema import TrainConfig
from alignlab.distributed.ranks import signed
from alignlab.engine.rollout import NothingToLearn
from alignlab.files.safe_folder import RunError
from alignlab.files.writing import FULL
from alignlab.rewards.compose import RewardError
from alignlab.runs.pasted import resume
from alignlab.training.evaluation import in_evaluation
from alignlab.training.guards import Leap, Unscored

OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What torch says of it where it has no exception of its own (CPU, MPS, cuBLAS)."""


@contextmanager
def explained(c: TrainConfig, folder: Path, smaller: Callable[[TrainConfig, str], str]) -> Iterator[None]:
    """Around a run.

    Args:
        c: its configuration.
        smaller: says what to lower after memory ran out, from the configuration (with the type of the device
            in `device`) and the key that was too large: micro_batch or evaluation.batch. It is called once
            everything of the run is let go of.

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
                f"{where} cannot be written ({error.strerror}): what was saved before is intact; make room "
                f"and go on with {resume(folder)}"
            )
        ) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        key, device = (
            "evaluation.batch" if in_evaluation(error) else "micro_batch",
            device_of(c.device).type,
        )
        _let_go(error, device)
        mend = smaller(replace(c, device=device), key)
        raise ConfigError(
            signed(
                f"out of memory: {mend}, in another output_dir, for it is another run ({folder} is as its "
                "last checkpoint left it)"
            )
        ) from None
    finally:
        threading.excepthook = hook


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device, or the host, has no memory left."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in OUT_OF_MEMORY)
    )


def _let_go(error: BaseException, device: str) -> None:
    """Frees what the failed run held."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _quiet(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread tells the main one of a full disk, which says it in a sentence."""
    if not isinstance(args.exc_value, OSError) or args.exc_value.errno not in FULL:
        threading.__excepthook__(args)
