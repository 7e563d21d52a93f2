"""A folder of candidates: several images of each prompt with their scores, the pairs that were made of them,
and how.

    FOLDER/make_pairs.yaml     the resolved configuration, what made the images (versions, commit), and how
                               many pairs came of them
    FOLDER/images/*.png
    FOLDER/candidates.jsonl    a line for each image: prompt, image, seed, replica, rewards by name
    FOLDER/pairs.jsonl         a line for each pair: prompt, winner, loser, margin, rule, scores, replicas
                               (data/preferences.py reads it)
    FOLDER/labels.jsonl        a line for each image on one side only: prompt, image, label (true: it won)

Images are whole and on the disk before they are scored, and lines before they count, so that what is killed
goes on: with the images that have no score, then with the prompts that have no image.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from alignlab.data.judgements import beside, caption_of
from alignlab.data.pairing import Paired
from alignlab.data.pictures import FORMATS, bounded, quiet
from alignlab.data.preferences import objects
from alignlab.files.bounded_yaml import read_yaml
from alignlab.files.safe_folder import LOCK, RunError, is_stray, locked, refuse_devices, refuse_links
from alignlab.files.writing import aside_of, room_for, type_again, write_aside
from alignlab.runs.locked_folder import LockedFolder
from alignlab.runs.moved_targets import with_moved_targets
from alignlab.runs.stored_config import first_difference

ABOUT, CANDIDATES, PAIRS, LABELS = "make_pairs.yaml", "candidates.jsonl", "pairs.jsonl", "labels.jsonl"
TEXTS = (ABOUT, CANDIDATES, PAIRS, LABELS)
PARTS = (*TEXTS, LOCK, ".new_*", "images")
"""What the command writes in its folder."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One image of a prompt; it is a function of the model, the sampler, the prompt, the seed and the replica
    (noise.py)."""

    prompt: str
    image: str
    """Its path, below the folder."""
    seed: int
    replica: int
    """Which of the prompt's images it is."""
    rewards: dict[str, float]
    """By name, each in its own unit, of the image as it is on the disk."""


class Candidates(LockedFolder):
    """The folder, while it is filled.

    Args:
        folder: looked at only, until `begin`.
        config: what the images and scores depend on. A folder that has some must have been begun with the
            same.
        prompts: in order.
        each: images of a prompt.

    Raises:
        RunError: if it holds others, or files that are none.
    """

    verb = "filled"
    parts = PARTS
    folders = ("images",)
    grows = CANDIDATES
    unfinished = ("images/.new_*", ".new_*")

    def __init__(self, folder: Path, config: dict[str, Any], prompts: Sequence[str], each: int) -> None:
        self.config, self.prompts, self.each = config, prompts, each
        self.about: dict[str, Any] = {}
        """What make_pairs.yaml says; nothing in a new folder."""
        self.damaged = 0
        """Lines of candidates.jsonl, once `done` has read them."""
        self._scored: dict[str, Candidate] = {}
        """By image."""
        super().__init__(folder)

    def _look(self) -> dict[str, Any]:
        """Reads make_pairs.yaml. Raises a RunError if the folder holds other candidates, files that are none,
        or links."""
        folder = self.folder
        refuse_links(folder, *PARTS)
        if (folder / ABOUT).is_file():
            self.about = read_about(folder)
            difference = first_difference(self.about["config"], self.config)
            if difference is not None:
                key, old, requested = difference
                raise RunError(
                    f"{folder} holds candidates with {key}={old}, but {key}={requested} was asked for; "
                    f"choose another output_dir, or the same configuration to go on "
                    f"(again={folder} makes other pairs of those candidates)"
                )
        elif folder.exists() and not (folder.is_dir() and all(map(_begun, folder.iterdir()))):
            raise RunError(
                f"{folder} is not empty and holds no candidates (no {ABOUT}); choose another output_dir"
            )
        return self.about

    def _refusal(self, path: Path, reason: str, full: bool) -> str:
        return type_again(path, reason, full)

    def begin(self, about: dict[str, Any]) -> None:
        """Creates the folder, keeps other processes out of it until this one ends, and forgets what a killed
        one was writing.

        Args:
            about: what make_pairs.yaml says beside the configuration; a digest of the weights that draw, and
                one of the prompts.

        Raises:
            RunError: if it cannot be written, holds links, another process fills it or has filled it since it
                was looked at, or its images are of others.
        """
        for key in ("weights", "prompts") if self.about else ():
            if self.about.get(key) != about[key]:
                raise RunError(
                    f"{self.folder} holds candidates of other {key} than those that were given; choose "
                    "another output_dir"
                )
        self._enter()
        self._tidy()
        if self.damaged:
            print(
                f"warning: {self.damaged} lines of {self.folder / CANDIDATES} were damaged; these images are "
                "scored again"
            )
        if not self.about:
            self.about = {"config": self.config, **about}
            self._replace(ABOUT, yaml.safe_dump(self.about, sort_keys=False, allow_unicode=True))

    def done(self, at_once: int) -> int:
        """How many prompts have all their scores, as a multiple of `at_once` (or all): where sampling begins
        again, with the same batches as the first time. Scores that stand after damaged or lost lines are kept
        for `scores`.

        Raises:
            RunError: if there are candidates of more prompts than these.
        """
        rows, self.damaged = self._whole_lines()
        self._scored = {row.image: row for row in rows}
        places = [*self._places()]
        known = {image for _, image, _ in places}
        if any(row.image not in known for row in rows):
            raise RunError(
                f"{self.folder} holds candidates of {len({row.prompt for row in rows})} prompts, but of "
                f"{len(self.prompts)} were asked for; choose another output_dir"
            )
        for prompt, image, replica in places:
            row = self._scored.get(image)
            if row is not None and (row.prompt, row.replica) != (prompt, replica):
                self._scored.pop(image)
                self.damaged += 1
        first = (
            next((k for k, (_, image, _) in enumerate(places) if image not in self._scored), len(places))
            // self.each
        )
        return first if first == len(self.prompts) else first // at_once * at_once

    def _whole_lines(self) -> tuple[list[Candidate], int]:
        """The lines that are whole, and how many are not; a last line that a killed process was writing
        counts as neither."""
        path, rows, damaged = self.folder / CANDIDATES, [], 0
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        for k, line in enumerate(lines):
            try:
                row = _candidate(path, k, json.loads(line)) if line.strip() else None
            except (ValueError, RecursionError):
                damaged += 1
                continue
            if row is not None:
                rows.append(row)
        names = {tuple(row.rewards) for row in rows[:1]}
        return [row for row in rows if tuple(row.rewards) in names], damaged + sum(
            tuple(row.rewards) not in names for row in rows
        )

    def scores(self, first: int, n: int) -> dict[str, list[float]] | None:
        """The scores of n prompts by reward, which stood after damaged lines; None if one of them is not
        known."""
        rows = [self._scored.get(image) for _, image, _ in self._places(first, n)]
        whole = [row for row in rows if row is not None]
        if not whole or len(whole) < len(rows):
            return None
        return {name: [row.rewards[name] for row in whole] for name in whole[0].rewards}

    def cut_back(self, prompts: int) -> None:
        """Leaves the lines of the first prompts."""
        if (self.folder / CANDIDATES).is_file():
            kept = [self._scored[image] for _, image, _ in self._places(0, prompts)]
            self._replace(CANDIDATES, "".join(json.dumps(asdict(row)) + "\n" for row in kept))

    def missing(self, first: int, n: int) -> bool:
        """Whether one of the images of n prompts is not there."""
        return not all((self.folder / image).is_file() for _, image, _ in self._places(first, n))

    def save(self, first: int, images: Tensor) -> None:
        """Writes the images [n each, 3, H, W] in [0, 1] of n prompts from number `first` on."""
        n = len(images) // self.each
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for picture, (_, name, _) in zip(pixels, self._places(first, n), strict=True):
            with self.room_for(name), aside_of(self.folder / name) as aside:
                Image.fromarray(picture).save(aside, format="png")

    def images(self, first: int, n: int, size: tuple[int, int]) -> Tensor:
        """[n each, 3, H, W] in [0, 1], as they are on the disk.

        Args:
            size: H and W of what the model draws. An image of another size was put there by somebody else.

        Raises:
            RunError: if one is none, or of another size.
        """
        pictures = []
        for _, name, _ in self._places(first, n):
            try:
                with _opened(self.folder / name, ["PNG"]) as picture:
                    if picture.size != size[::-1]:
                        raise ValueError(
                            f"{picture.width} x {picture.height} pixels, not {size[1]} x {size[0]}"
                        )
                    pictures.append(torch.from_numpy(np.array(picture.convert("RGB"))))
            except Exception as error:  # Pillow's readers fail in any way on what is broken
                raise RunError(
                    f"{self.folder / name} is no picture of this model ({error}); remove it, and type the "
                    "command again"
                ) from None
        return torch.stack(pictures).permute(0, 3, 1, 2).float().contiguous() / 255

    def log(self, first: int, n: int, seed: int, rewards: dict[str, list[float]]) -> None:
        """Appends the lines of n prompts, to the disk; what does not fit is taken back."""
        rows = [
            Candidate(
                prompt=prompt,
                image=image,
                seed=seed,
                replica=replica,
                rewards={name: v[k] for name, v in rewards.items()},
            )
            for k, (prompt, image, replica) in enumerate(self._places(first, n))
        ]
        self._append("".join(json.dumps(asdict(row)) + "\n" for row in rows))

    def _places(self, first: int = 0, n: int | None = None) -> Iterator[tuple[str, str, int]]:
        """Prompt, image and replica of every candidate of n prompts."""
        for k, prompt in enumerate(self.prompts[first : None if n is None else first + n], first):
            yield from (
                (prompt, f"images/{k:05d}_{replica:02d}.png", replica) for replica in range(self.each)
            )


def read_about(folder: Path) -> dict[str, Any]:
    """make_pairs.yaml of a folder.

    Raises:
        RunError: if there is none, or it is none.
    """
    path = folder / ABOUT
    refuse_devices(folder, *TEXTS)
    try:
        about = with_moved_targets(read_yaml(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise RunError(
            f"{path} cannot be read ({reason}); give a folder that alignlab.make_pairs wrote"
        ) from None
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        raise RunError(
            f"{path} says nothing of how candidates were made; give a folder that alignlab.make_pairs wrote"
        )
    return about


def read_candidates(folder: Path) -> list[Candidate]:
    """The scored candidates of a folder, but for a last line that a killed process was writing.

    Raises:
        RunError: for the first line that is none.
    """
    path = folder / CANDIDATES
    again = f"the command that made it, typed again with output_dir={folder}, scores its image again"
    try:
        rows = [_candidate(path, k, said) for k, said in objects(path, torn=True)]
    except ValueError as error:
        reason = str(error).removeprefix("data: ").removesuffix("; mend or remove it")
        raise RunError(f"{reason}; {again}") from None
    names = [*rows[0].rewards] if rows else []
    for k, row in enumerate(rows):
        if [*row.rewards] != names:
            raise RunError(
                f"line {k + 1} of {path} has other rewards than the first ({', '.join(names)}); {again}"
            )
    return rows


def _candidate(path: Path, k: int, said: Any) -> Candidate:
    kinds = {"prompt": str, "image": str, "seed": int, "replica": int, "rewards": dict}
    if not isinstance(said, dict) or not all(type(said.get(key)) is kind for key, kind in kinds.items()):
        raise ValueError(f"line {k + 1} of {path} is no candidate ({', '.join(kinds)})")
    rewards = said["rewards"]
    if not rewards or not all(type(v) in (int, float) and math.isfinite(v) for v in rewards.values()):
        raise ValueError(f"line {k + 1} of {path} has no finite rewards by name")
    caption_of(k, {"caption": said["prompt"], "_table": path})
    try:
        beside(path, said["image"])
    except ValueError as error:
        raise ValueError(f"line {k + 1} of {path}: {error}") from None
    return Candidate(**{key: said[key] for key in kinds})


def write_pairs(folder: Path, rows: Sequence[Candidate], paired: Paired, pairing: dict[str, Any]) -> None:
    """pairs.jsonl and labels.jsonl of a folder, and in make_pairs.yaml what they came of.

    Args:
        paired: names rows.
        pairing: the node of the rule.

    Raises:
        RunError: if the disk does not take them, or they would go through links.
    """
    refuse_links(folder, *TEXTS, ".new_*")
    pairs, labels, rule = [], [], pairing.get("rule", pairing["_target_"])
    for pair in paired.pairs:
        winner, loser = rows[pair.winner], rows[pair.loser]
        pairs.append(
            {
                "prompt": winner.prompt,
                "winner": winner.image,
                "loser": loser.image,
                "margin": pair.margin,
                "rule": rule,
                "winner_rewards": winner.rewards,
                "loser_rewards": loser.rewards,
                "seed": winner.seed,
                "winner_replica": winner.replica,
                "loser_replica": loser.replica,
            }
        )
    for row, label in paired.labels.items():
        labels.append({"prompt": rows[row].prompt, "image": rows[row].image, "label": label})
    about = {**read_about(folder), "pairing": pairing, "pairs": len(pairs), "ties": paired.ties}
    for name, lines in ((PAIRS, pairs), (LABELS, labels)):
        with room_for(folder / name):
            write_aside(folder / name, "".join(json.dumps(line) + "\n" for line in lines))
    with room_for(folder / ABOUT):
        write_aside(folder / ABOUT, yaml.safe_dump(about, sort_keys=False, allow_unicode=True))


def copy(source: Path, folder: Path, rows: Sequence[Candidate]) -> None:
    """The candidates of one folder in a new one, which is whole or not there: images as hard links, where the
    file system has them.

    Raises:
        RunError: if the new one is not empty, or cannot be written, or the old one has links, or images that
            are none.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunError(
            f"{folder} is not empty; choose another output_dir, or leave it out to make the pairs in {source}"
        )
    refuse_links(source, *TEXTS)
    aside = folder.resolve().with_name(f".new_{folder.resolve().name}")
    refuse_links(aside.parent, aside.name)
    with room_for(folder):
        aside.mkdir(parents=True, exist_ok=True)
        lock = locked(aside, "being filled")
        try:
            for left in aside.iterdir():  # what a killed one was writing
                if left.name != LOCK:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            for row in rows:
                old, new = source / row.image, aside / row.image
                refuse_links(source, row.image)
                _must_be_a_picture(old)
                new.parent.mkdir(parents=True, exist_ok=True)
                if not new.exists():
                    try:
                        os.link(old, new)
                    except OSError:
                        shutil.copyfile(old, new)
            write_aside(aside / CANDIDATES, "".join(json.dumps(asdict(row)) + "\n" for row in rows))
            write_aside(aside / ABOUT, (source / ABOUT).read_text(encoding="utf-8"))
            aside.replace(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            lock.close()


def _opened(path: Path, formats: Sequence[str] = FORMATS) -> Image.Image:
    """A picture of which nothing but the header is read yet.

    Raises:
        Exception: of any kind, if it is none, or has more than PIXELS.
    """
    with quiet():
        picture = Image.open(path, formats=list(formats))
    try:
        bounded(picture.size)
    except ValueError:
        picture.close()
        raise
    return picture


def _must_be_a_picture(path: Path) -> None:
    """Raises a RunError if it is none: a table of somebody else's could name any file, and the copy may be
    given away."""
    try:
        with _opened(path) as picture:
            picture.verify()
    except Exception as error:  # Pillow's readers fail in any way on what is broken
        raise RunError(
            f"{path} is no picture ({error}), and only pictures are copied; remove its line of {CANDIDATES}"
        ) from None


def _begun(path: Path) -> bool:
    """Whether a process that was killed before it had a make_pairs.yaml may have left this in its folder, or
    its sweep."""
    if path.name == "images":
        return path.is_dir() and all(map(is_stray, path.iterdir()))
    return is_stray(path) or path.name in (".lock", f".new_{ABOUT}", "multirun.yaml", "overrides.yaml")
