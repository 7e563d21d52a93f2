"""Where a run or a job of a sweep has its folder, its device and its time."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from alignlab.config.build import ConfigError
from alignlab.config.compose import asked
from alignlab.config.diagnosis import say, silent
from alignlab.config.job_names import WORDS, folder_of, write_words
from alignlab.config.schema import TrainConfig
from alignlab.config.typed import swept
from alignlab.distributed.ranks import launched, rank, shared
from alignlab.files.safe_folder import RunError, fresh, refuse_links

SWEEPING = ("train", "make_pairs", "train_reward")
"""The commands whose sweeps have a folder for each job."""
HYDRA_WRITES = ("multirun.yaml", "optimization_results.yaml", ".submitit")
"""What Hydra, its sweepers and launchers write in the folder of a sweep."""


def device_of(name: str) -> torch.device:
    """auto is the best there is. The jobs of a sweep take the GPUs of the machine in turn."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and launched() > 1:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if name == "cuda" and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return torch.device("cuda", HydraConfig.get().job.num % torch.cuda.device_count())
    return torch.device(name)


def run_folder(c: TrainConfig) -> Path:
    """resume=, or the job's folder in a sweep, or output_dir=, or a new one: that of process 0.

    Says where the run sends what it makes: a resumed one has that from its folder, which may be somebody
    else's.
    """
    at = HydraConfig.get()
    given = c.resume or (folder_of_job() if at.mode == RunMode.MULTIRUN else c.output_dir)
    if not given and rank() == 0:
        given = fresh(f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}-{at.runtime.choices['algo']}")
    folder = Path(shared(str(given)))
    whose = f" (as {folder / 'config.yaml'} has it)" if c.resume else ""
    sent = {"push_to_hub": "uploads its model at the end to", "tracker": "logs to the tracker"}
    for key, what in sent.items() if not silent() else ():
        where = getattr(c, key)
        if where not in (None, "none"):
            off = "null" if key == "push_to_hub" else "none"
            said_by = "" if key in asked() else whose
            print(f"this run {what} {where}{said_by}; {key}={off} leaves that out", flush=True)
    return folder


def folder_of_job() -> Path:
    """The folder of this job of a sweep, which must lie in the sweep's.

    Raises:
        RunError: if a link leads elsewhere.
    """
    at = HydraConfig.get()
    sweep, job = Path(at.sweep.dir), Path(at.runtime.output_dir)
    if job.is_relative_to(sweep.absolute()):
        refuse_links(sweep, str(job.relative_to(sweep.absolute())), inside=False)
    return job


def notice() -> float:
    """Seconds between a launcher's warning that a job's time is over and its end (submitit's)."""
    launcher: Any = HydraConfig.get().launcher
    return float(launcher.get("signal_delay_s", 30) if launcher is not None else 0)


def subdir_words(overrides: list[str]) -> list[str]:
    """What tells the jobs of a sweep which keys have several values: for `job_folder`, in whatever process it
    is asked."""
    if any(text.lstrip("+").startswith("hydra.sweep.subdir") for text in overrides):
        return []
    several, single = (" ".join(keys) for keys in swept(overrides))
    return [f"hydra.sweep.subdir=\"${{folder:${{hydra.sweep.dir}},'{several}','{single}'}}\""]


@contextmanager
def own_folder(at: Any, name: str) -> Iterator[None]:
    """Around a job of a sweep: its folder says from the beginning whose it is. A mistake leaves none
    behind."""
    if at.mode != RunMode.MULTIRUN or name not in SWEEPING:
        yield
        return
    folder = folder_of_job()
    try:
        write_words(folder, list(at.overrides.task))
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}); choose another output_dir"
        ) from None
    try:
        yield
    except (ConfigError, RunError):
        if [path.name for path in folder.iterdir()] == [WORDS]:
            (folder / WORDS).unlink()
            folder.rmdir()
        raise


def job_folder(sweep: str, several: str = "", single: str = "") -> str:
    """The name of the folder of the job that begins here: the resolver of hydra.sweep.subdir.

    Args:
        sweep: the sweep's folder.
        several: the typed keys that have several values, between blanks; a file (hydra.sweeper.params) may
            name more.
        single: the typed keys that have one.
    """
    at = HydraConfig.get()
    overrides: Any = OmegaConf.to_container(at.overrides.task)
    sweeper: Any = OmegaConf.to_container(at.sweeper)
    of_file = swept([f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()])[0]
    keys = {*several.split(), *(key for key in of_file if key not in single.split())}
    return folder_of(Path(sweep), overrides, keys, list(at.job.config.override_dirname.exclude_keys))


def sweep_folder(given: str | None, name: str) -> str:
    """The folder of a sweep: the one that was given, or a new one. Hydra writes there before the first job
    begins, so what is wrong with it ends the command here."""
    try:
        folder = Path(given).expanduser() if given else fresh(name)
        refuse_links(folder, *HYDRA_WRITES)
    except RunError as error:
        sys.exit(say(error))
    return str(folder)


OmegaConf.register_new_resolver("folder", lambda sweep, *typed: job_folder(sweep, *typed), replace=True)
OmegaConf.register_new_resolver(
    "sweep_folder", lambda given, name: sweep_folder(given, name), use_cache=True, replace=True
)
