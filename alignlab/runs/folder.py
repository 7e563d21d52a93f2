"""The run directory: what a run leaves behind, and how it goes on after it was stopped.

    RUN/config.yaml  metrics.jsonl  summary.json  samples/step_*.png  checkpoints/step_*/  model/

A checkpoint is written aside with its checksums, synced and renamed, so a killed run never leaves half a one
that counts, and one that went bad on the disk is known from a good one (checksums.py): the one before is
used. A disk that takes no more ends a run with one sentence, and leaves what was there before as it was.

Each checkpoint keeps the lines of metrics.jsonl so far, under its checksums: a metrics.jsonl that was damaged
or lost is put back from there. They are about a kilobyte an epoch, beside the megabytes of the weights.
"""

import json
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignlab.files.checksums import Damaged, check, digest_of, seal, sync
from alignlab.files.safe_folder import LOCK, RunError, is_stray, refuse_links
from alignlab.files.writing import aside_of, try_to_write, with_usual_permissions
from alignlab.runs.layout import FILES, FOLDERS, METRICS, PARTS, numbered
from alignlab.runs.locked_folder import LockedFolder
from alignlab.runs.metrics_lines import changed_metrics, evaluated, finite, is_line, kept_lines, read_metrics
from alignlab.runs.pasted import resume
from alignlab.runs.stored_config import KEPT_CHECKPOINTS, first_difference, read_config


class Run(LockedFolder):
    """One run folder.

    Args:
        folder: looked at only, until `begin`.
        config: the resolved configuration. A non-empty folder must have been started with the same one.
        ignore: top-level keys in which the two may differ.

    Raises:
        RunError: if the folder holds another run, or files that are none.
    """

    verb = "trained"
    parts = PARTS
    folders = ("samples", "checkpoints")
    grows = METRICS
    unfinished = (
        "checkpoints/.step_*",
        "checkpoints/.new_*",
        "checkpoints/.tmp*",
        "samples/.new_*",
        ".new_*",
        ".model",
    )

    def __init__(self, folder: Path, config: dict[str, Any], *, ignore: tuple[str, ...] = ()) -> None:
        self.config, self.keep = config, config.get("keep", KEPT_CHECKPOINTS)
        self._ignored = ignore
        self._damaged: list[Path] = []
        """Checkpoints found bad: they stay until there is another one."""
        self._known: list[bytes] | None = None
        """The lines of metrics.jsonl, whatever becomes of the file; None before they were read."""
        super().__init__(folder)

    def _look(self) -> tuple[bool, list[Path]]:
        """Whether the run is finished, and the checkpoints that it has.

        Raises:
            RunError: if the folder holds another run, files that are none, or links where an unfinished run
                will write.
        """
        folder = self.folder
        if not (folder / "summary.json").is_file():
            refuse_links(folder, *PARTS)
        stored = folder / "config.yaml"
        if stored.is_file():
            both = (read_config(folder), self.config)
            before, asked = ({k: v for k, v in c.items() if k not in self._ignored} for c in both)
            difference = first_difference(before, asked)
            if difference is not None:
                key, old, requested = difference
                raise RunError(
                    f"{folder} holds a run with {key}={old}, but {key}={requested} was asked for; "
                    "choose another output_dir, or the same configuration to resume"
                )
        elif folder.is_dir() and not all(map(_begun, folder.iterdir())):
            raise RunError(
                f"{folder} is not empty and holds no run (no config.yaml); choose another output_dir"
            )
        for path in (folder / name for name in (*FOLDERS, *FILES)):
            if path.exists() and path.is_dir() != (path.name in FOLDERS):
                is_one, needs = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
                raise RunError(
                    f"{path} is {is_one}, and a run needs {needs} of that name; move it, or choose another "
                    "output_dir"
                )
        return (folder / "summary.json").exists(), self._checkpoints()

    def _refusal(self, path: Path, reason: str, full: bool) -> str:
        if path == self.folder:
            return f"{path} cannot be written ({reason}); choose another output_dir"
        return (
            f"{path} cannot be written ({reason}): what was saved before is intact; "
            f"{'make room' if full else 'mend that'} and go on with {resume(self.folder)}"
        )

    def begin(self) -> None:
        """Creates the folder, keeps other processes out of it until this one ends, and removes what a killed
        one was writing.

        Raises:
            RunError: if it cannot be written, holds links, or another process trains in it, or did so since
                it was looked at.
        """
        self._enter()
        self._try_all()
        self._tidy()
        self._replace("config.yaml", yaml.safe_dump(self.config, sort_keys=False))

    def _try_all(self) -> None:
        """Writes into every folder, and to the end of metrics.jsonl, what is needed hours later too.

        Raises:
            RunError: for the first that cannot be written.
        """
        folders = [
            self.folder,
            *(path for name in FOLDERS if (path := self.folder / name).is_dir()),
            *self._checkpoints(),
        ]
        place = self.folder
        try:
            for place in folders:
                try_to_write(place)
            place = self.folder / METRICS
            if place.is_file():
                place.open("ab").close()
        except OSError as error:
            raise RunError(
                f"{place} cannot be written ({error.strerror}); mend that, or choose another output_dir"
            ) from None

    @property
    def summary(self) -> dict[str, Any] | None:
        """summary.json of a finished run.

        Raises:
            RunError: if it is none.
        """
        path = self.folder / "summary.json"
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not all(isinstance(content[key], dict) for key in ("base", "final")):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise RunError(
                f"{path} is no summary of a run; remove it, and the run is finished again from its last "
                "checkpoint"
            ) from None
        return dict(content)

    def finished(self) -> dict[str, Any] | None:
        """The summary of a finished run, which is told so; its metrics.jsonl is put back if it is not what
        the last checkpoint keeps."""
        summary = self.summary
        if summary is not None:
            changed = changed_metrics(self.folder)
            if changed is not None:
                self._put_back(*changed)
            self._tell(f"{self.folder} is finished; nothing to do")
        return summary

    def finish(self, summary: dict[str, Any]) -> None:
        self._replace("summary.json", json.dumps(finite(summary), indent=2) + "\n")
        (self.folder / LOCK).unlink(missing_ok=True)

    # -- metrics

    def log(self, line: dict[str, Any]) -> None:
        """Appends one JSON object to metrics.jsonl, to the disk; a line that does not fit is taken back."""
        known = self._lines()
        written = json.dumps(finite(line)) + "\n"
        self._append(written)
        known.append(written.encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl.

        Raises:
            RunError: if one of them was damaged.
        """
        return read_metrics(self.folder)

    def evaluated(self, name: str, before: int | None = None) -> dict[int, float]:
        """What the evaluations during training measured, by epoch; only those before an epoch, if one is
        given."""
        seen = evaluated(self.metrics(), name)
        return {step: value for step, value in seen.items() if before is None or step < before}

    def _lines(self) -> list[bytes]:
        """The whole lines of metrics.jsonl as they were when this process first looked, and those that it
        wrote."""
        if self._known is None:
            path = self.folder / METRICS
            lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
            self._known = [line for line in lines if line.endswith(b"\n") and line.strip()]
        return self._known

    # -- checkpoints

    def save_checkpoint(self, step: int, policy: dict[str, Tensor], state: dict[str, Any]) -> None:
        """`policy` goes to policy.safetensors; `state` (plain values and tensors) to state.pt. The newest
        `keep` of them stay."""
        final = self.folder / "checkpoints" / f"step_{step:06d}"
        if final.is_dir() and final not in self._damaged:
            return  # it is that of this run, and to replace it would leave a moment without it
        aside = final.with_name(f".{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        with self.room_for(f"checkpoints/{final.name}"):
            try:
                aside.mkdir(parents=True)
                save_file({k: v.contiguous() for k, v in policy.items()}, aside / "policy.safetensors")
                with (aside / "state.pt").open("wb") as file:
                    torch.save({"step": step, "metrics_lines": len(self._lines()), **state}, file)
                (aside / METRICS).write_bytes(b"".join(self._lines()))
                with_usual_permissions(aside)
                seal(aside)
                shutil.rmtree(final, ignore_errors=True)
                aside.rename(final)
                sync(final.parent)
            finally:
                shutil.rmtree(
                    aside, ignore_errors=True
                )  # there only after a failure, when the room is wanted
        good = [path for path in self._checkpoints() if path == final or path not in self._damaged]
        for old in self._checkpoints():
            if old not in good[-self.keep :]:
                with self.room_for(f"checkpoints/{old.name}"):
                    shutil.rmtree(old)
        self._damaged = []

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest intact one, with metrics.jsonl cut back to it; None if there is none.

        Raises:
            RunError: if there are some, and none is intact; or if the best weights so far, which `select`
                asks for, are not.
        """
        checkpoints = self._checkpoints()
        for path in reversed(checkpoints):
            try:
                policy, state = _opened(path)
                self._cut_back(state["metrics_lines"], path)
            except Damaged as damage:
                self._damaged.append(path)
                self._tell(
                    f"warning: {path} is damaged ({damage}); the one before it is used, if there is one"
                )
                continue
            seen = evaluated(map(json.loads, self._lines()), self.config.get("select", "last"))
            if seen:
                self.load_best(max(seen, key=seen.__getitem__))  # the end of the run may need it
            return policy, state
        if checkpoints:
            raise RunError(
                f"{self.folder / 'checkpoints'} holds no intact checkpoint "
                f"({', '.join(path.name for path in checkpoints)}); "
                "start again in another output_dir, or put one of them back from a copy of the folder"
            )
        self._cut_back(0)
        return None

    def _cut_back(self, count: int, checkpoint: Path | None = None) -> None:
        """Leaves the first `count` lines of metrics.jsonl. What a checkpoint keeps of them decides what they
        are; where it keeps none (one of an earlier version), they must be there and whole.

        Raises:
            Damaged: if they are neither there nor kept.
        """
        path, kept = self.folder / METRICS, None if checkpoint is None else kept_lines(checkpoint, count)
        lines = [
            line
            for line in (path.read_bytes().splitlines(keepends=True) if path.is_file() else [])
            if line.strip()
        ]
        if checkpoint is not None and kept is not None and lines[:count] != kept:
            self._put_back(checkpoint / METRICS, kept)
            lines = kept
        if len(lines) < count or not all(map(is_line, lines[:count])):
            raise Damaged(f"{path.name} lacks some of its {count} lines, or has bad ones")
        self._known = lines[:count]
        if path.is_file() and path.read_bytes() != b"".join(self._known):
            self._replace(METRICS, b"".join(self._known).decode())

    def _put_back(self, kept: Path, lines: list[bytes]) -> None:
        path = self.folder / METRICS
        state = "was damaged" if path.is_file() else "was lost"
        self._replace(METRICS, b"".join(lines).decode())
        self._tell(f"warning: {path} {state}; it is put back from {kept}")

    def _tell(self, sentence: str) -> None:
        print(sentence)

    def _checkpoints(self) -> list[Path]:
        return numbered(self.folder / "checkpoints", "step")

    def save_best(self, step: int, policy: dict[str, Tensor]) -> None:
        """Keeps the weights that did best so far in an evaluation, and those before, which a resumed run may
        come back to."""
        final, tensors = self._best(step), {k: v.contiguous() for k, v in policy.items()}
        with self.room_for(f"checkpoints/{final.name}"), aside_of(final) as aside:
            save_file(tensors, aside, metadata={"blake2b": digest_of(tensors)})
        for old in numbered(final.parent, "best", ".safetensors")[: -self.keep]:
            old.unlink()

    def load_best(self, step: int) -> dict[str, Tensor]:
        """What `save_best` kept.

        Raises:
            RunError: if it is not there, or not what was written.
        """
        path = self._best(step)
        try:
            with safe_open(path, "pt") as file:
                expected = (file.metadata() or {}).get("blake2b")
            tensors = load_file(path)
        except (OSError, SafetensorError):
            tensors, expected = {}, ""
        if expected is not None and digest_of(tensors) != expected:
            raise RunError(
                f"{path} is damaged or not there; export the last weights instead, with select=last in "
                "another output_dir"
            )
        return tensors

    def _best(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"best_{step:06d}.safetensors"

    def save_model(self, save: Callable[[Path], None]) -> None:
        """RUN/model, by a function that writes such a folder: aside, synced and renamed."""
        final, aside = self.folder / "model", self.folder / ".model"
        shutil.rmtree(aside, ignore_errors=True)
        with self.room_for("model"):
            try:
                save(aside)
                with_usual_permissions(aside)
                for path in (*aside.rglob("*"), aside):
                    sync(path)
                shutil.rmtree(final, ignore_errors=True)  # of an earlier attempt: this run is not finished
                aside.rename(final)
                sync(self.folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    @property
    def started(self) -> bool:
        """Whether it has a checkpoint to go on from."""
        return bool(self._checkpoints())

    def tracker_id(self) -> str:
        """Returns the id of this run at a tracker, 16 hexadecimal digits; the first call makes it."""
        path = self.folder / "tracker_id"
        stored = path.read_text(errors="replace").strip() if path.is_file() else ""
        if not re.fullmatch(r"[0-9a-f]{16}", stored):
            stored = secrets.token_hex(8)
            self._replace("tracker_id", f"{stored}\n")
        return stored

    # -- pictures

    def save_samples(self, step: int, images: Tensor, columns: int) -> None:
        final = self.folder / "samples" / f"step_{step:06d}.png"
        with self.room_for(f"samples/{final.name}"), aside_of(final) as aside:
            save_grid(images, aside, columns)


class Onlooker(Run):
    """A run as the other processes see it, that train it too: process 0 writes."""

    def begin(self) -> None: ...
    def finish(self, summary: dict[str, Any]) -> None: ...
    def log(self, line: dict[str, Any]) -> None: ...
    def save_checkpoint(self, step: int, policy: dict[str, Tensor], state: dict[str, Any]) -> None: ...
    def save_best(self, step: int, policy: dict[str, Tensor]) -> None: ...
    def save_samples(self, step: int, images: Tensor, columns: int) -> None: ...
    def _replace(self, part: str, text: str) -> None: ...
    def _tell(self, sentence: str) -> None: ...

    def save_model(self, save: Callable[[Path], None]) -> None:
        save(self.folder / ".model")  # a split model is put together by all

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not (self.folder / "config.yaml").is_file():
            raise RunError(
                f"{self.folder} is not to be seen here; set output_dir to a folder that all machines share"
            )
        return super().load_checkpoint()


def _begun(path: Path) -> bool:
    """Whether a run that was killed before it had a config.yaml may have left this in its folder, or its
    sweep."""
    if path.name in ("samples", "checkpoints"):
        return path.is_dir() and all(map(is_stray, path.iterdir()))
    return is_stray(path) or path.name in (
        "tensorboard",
        "multirun.yaml",
        "overrides.yaml",
        ".lock",
        ".new_config.yaml",
    )


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """A grid of images [n, 3, H, W] in [0, 1], small ones enlarged for the eye."""
    from torchvision.utils import save_image

    factor = max(1, 96 // images.shape[-1])
    save_image(
        images.repeat_interleave(factor, 2).repeat_interleave(factor, 3), path, nrow=columns, padding=2
    )


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's weights and state.

    Raises:
        Damaged: if it is not what was written.
    """
    check(path, spare=METRICS)  # without it the others are still good
    try:
        state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return load_file(path / "policy.safetensors"), {"metrics_lines": state["metrics_lines"], **state}
    # of a checkpoint without checksums: zip, pickle and safetensors each have errors of their own
    except Exception as error:
        raise Damaged(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from None
