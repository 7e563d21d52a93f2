"""Shows a run while it trains: TensorBoard in its folder, and wandb or trackio if `tracker=` says so.

Each tracker gets the configuration once, the numbers of every epoch and the grids of samples as images. A
resumed run goes on in the same tracker run.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from alignlab.config.job_names import WORDS
from alignlab.config.schema import TrainConfig
from alignlab.distributed.ranks import rank
from alignlab.files.safe_folder import RunError, refuse_links
from alignlab.runs.folder import Run

COLUMNS = ("eval/reward", "eval/lpips", "reward/mean")
"""The metrics beside the settings in TensorBoard's table of runs (HPARAMS)."""


class Tracker(Protocol):
    """Shows one run."""

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Takes the numbers of one epoch by name."""

    def picture(self, path: Path, step: int) -> None:
        """Takes the grid of samples of one evaluation, a PNG file."""

    def finish(self) -> None:
        """Writes what is left, and parts from the run."""


def trackers_of(c: TrainConfig, run: Run, *, first: int) -> list[Tracker]:
    """Starts the trackers of a run, on process 0 only.

    Args:
        first: the epoch that is logged next. What TensorBoard has of later ones, from before the run was
            killed, is hidden.

    Raises:
        RunError: if the tracker does not start; one sentence says how to go on.
    """
    if rank():
        return []
    started: list[Tracker] = [TensorBoard(run.folder, asdict(c), first)]
    if c.tracker != "none":
        try:
            started.append(Wandb(c, run) if c.tracker == "wandb" else Trackio(c, run, resumed=first > 0))
        except RunError:
            raise
        except Exception as error:  # whatever these libraries raise: no login, no network, a full disk
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunError(
                f"tracker={c.tracker} does not start: {reason}; mend that, or work without a network "
                "(docs/trackers.md), or set tracker=none"
            ) from error
    return started


def shown_as(c: TrainConfig, folder: Path) -> tuple[str, str | None]:
    """The name and the group of a run: those that are given, or else its folder's name, and the sweep's."""
    sweep = folder.absolute().parent.name if (folder / WORDS).is_file() else None
    own = folder.absolute().name
    return c.tracking.name or (f"{sweep}/{own}" if sweep else own), c.tracking.group or sweep


class TensorBoard:
    """Event files in RUN/tensorboard, with the settings for the table of runs."""

    def __init__(self, folder: Path, configuration: dict[str, Any], first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first or None)
        settings = {key: _shown(value) for key, value in _flat(configuration)}
        # SummaryWriter.add_hparams would make a folder of its own for each call
        for summary in hparams(settings, dict.fromkeys(COLUMNS, 0.0)):
            self.writer._get_file_writer().add_summary(summary)

    def numbers(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, path: Path, step: int) -> None:
        with Image.open(path) as image:
            self.writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, whose id is kept in RUN/tracker_id."""

    def __init__(self, c: TrainConfig, run: Run) -> None:
        import wandb

        refuse_links(run.folder, "wandb", inside=False)  # inside wandb makes links of its own
        name, group = shown_as(c, run.folder)
        self.images = wandb.Image
        self.run = wandb.init(
            project=c.tracking.project,
            name=name,
            group=group,
            tags=[*c.tracking.tags] or None,
            config=asdict(c),
            dir=str(run.folder),
            id=run.tracker_id(),
            resume="allow",
            reinit="finish_previous",  # a sweep runs its jobs in one process
        )

    def numbers(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def picture(self, path: Path, step: int) -> None:
        self.run.log({"samples": self.images(str(path), caption=f"epoch {step}")}, step=step)

    def finish(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio, which keeps it on this machine (TRACKIO_DIR says where)."""

    def __init__(self, c: TrainConfig, run: Run, *, resumed: bool) -> None:
        import trackio

        name, group = shown_as(c, run.folder)
        self.images = trackio.Image
        self.run = trackio.init(
            project=c.tracking.project,
            name=name,
            group=group,
            config={key: _shown(value) for key, value in _flat(asdict(c))},
            resume="allow" if resumed else "never",
            embed=False,
        )

    def numbers(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def picture(self, path: Path, step: int) -> None:
        self.run.log({"samples": self.images(str(path), caption=f"epoch {step}")}, step=step)

    def finish(self) -> None:
        self.run.finish()


class Trackers:
    """All trackers of a run. One that fails is left out from then on: no run ends because of it."""

    def __init__(self, started: Sequence[Tracker], folder: Path) -> None:
        self.started, self.folder = [*started], folder

    def __call__(self, line: dict[str, Any]) -> None:
        """Hands on one line of metrics.jsonl, and the samples that were drawn with it."""
        step = line["step"]
        numbers = {name: value for name, value in line.items() if value is not None and name != "step"}
        picture = self.folder / "samples" / f"step_{step:06d}.png"
        for tracker in [*self.started]:
            try:
                tracker.numbers(numbers, step)
                if "eval/reward" in line and picture.is_file():
                    tracker.picture(picture, step)
            except Exception as error:
                self._leave_out(tracker, error)

    def finish(self) -> None:
        """Parts from all of them."""
        for tracker in [*self.started]:
            try:
                tracker.finish()
            except Exception as error:
                self._leave_out(tracker, error)

    def _leave_out(self, tracker: Tracker, error: Exception) -> None:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(
            f"warning: {type(tracker).__name__} shows no more of this run ({reason}); metrics.jsonl has all",
            file=sys.stderr,
        )
        self.started.remove(tracker)


def _flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> bool | int | float | str:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
