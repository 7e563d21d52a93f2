"""python -m alignlab.export run=runs/DIR to=kohya output=my_lora.safetensors

Writes what a run learned in the form that other programs take.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from alignlab.config.build import ConfigError, build, nearest
from alignlab.config.checks import bench_problems, is_hub_id
from alignlab.config.command import command
from alignlab.config.compose import opted_in, plain
from alignlab.config.record import Keys, record
from alignlab.files.safe_folder import RunError, refuse_led_away, refuse_links
from alignlab.files.writing import aside_of, folder_aside_of, refuse_unwritable, room_for
from alignlab.models import lora_files
from alignlab.runs.layout import run_folders, weights
from alignlab.runs.stored_config import read_config
from alignlab.training.model_card import upload
from alignlab.weights.init_from import fused


@dataclass
class ExportConfig(Keys):
    """The keys of conf/export.yaml."""

    run: str | None = None
    """The folder of a finished run."""
    to: str = "kohya"
    """kohya: one LoRA file for ComfyUI and its like; diffusers: the LoRA folder; pipeline: a whole pipeline
    folder, the LoRA fused; hub: a repository of the Hugging Face hub. [kohya | diffusers | pipeline | hub]"""
    output: str | None = None
    """A new .safetensors file, a new folder, or owner/name."""
    allow_targets: list[str] | None = None
    """Modules of your own that _target_ may name."""


ConfigStore.instance().store(name="export_schema", node=ExportConfig)


def to_kohya(stored: dict[str, Any], learned: Path, output: Path) -> None:
    """A LoRA as one file."""
    family: Any = build(stored["model"])
    lora, config = family.read_lora(learned)
    with room_for(output, "output"), aside_of(output) as aside:
        family.save_kohya(aside, lora, config["alpha"])


def to_folder(stored: dict[str, Any], learned: Path, output: Path) -> None:
    """The folder, a LoRA in the form that every reader gets right (lora_files.py). A link in it would copy a
    file of another place, so it may hold none."""
    refuse_links(learned.parent, learned.name)
    with room_for(output, "output"), folder_aside_of(output) as aside:
        shutil.copytree(learned, aside)
        if not stored.get("policy", {}).get("full"):
            lora_files.renew(aside)


def to_pipeline(stored: dict[str, Any], learned: Path, output: Path) -> None:
    """A pipeline folder in float32: the base model with the LoRA in its weights, or the tuned model as it
    is."""
    if stored.get("policy", {}).get("full"):
        return to_folder(stored, learned, output)
    family: Any = build(stored["model"])
    family.denoiser.load_state_dict(fused(family.denoiser, *family.read_lora(learned)))
    with room_for(output, "output"), folder_aside_of(output) as aside:
        family.save(aside, None, None)


def to_hub(stored: dict[str, Any], learned: Path, output: Path) -> None:
    """A private repository, unless it is there."""
    if stored.get("policy", {}).get("full") or not lora_files.outdated(learned):
        upload(learned, str(output))
        return
    with tempfile.TemporaryDirectory() as home:
        copy = Path(home) / learned.name
        to_folder(stored, learned, copy)
        try:
            upload(copy, str(output))
        except RunError as error:
            raise RunError(str(error).replace(str(copy), str(learned))) from None


FORMS: dict[str, Callable[[dict[str, Any], Path, Path], None]] = {
    "kohya": to_kohya,
    "diffusers": to_folder,
    "pipeline": to_pipeline,
    "hub": to_hub,
}


def checked(cfg: DictConfig) -> ExportConfig:
    """The configuration as a record; `run` is one folder.

    Raises:
        ConfigError: with every problem that was found.
    """
    given = plain(cfg)
    c = record(ExportConfig, given)
    problems, to, output = [], c.to, c.output
    folders = run_folders(c.run) if c.run is not None else []
    if to not in FORMS:
        problems.append(f"to={to} is no form; {nearest(to, FORMS, 'to=')}")
    if len(folders) != 1:
        what = f"names {len(folders)} runs" if folders else "is no run folder (it has no config.yaml)"
        problems.append(f"run={c.run} {what}; give the folder of a finished run")
    if output is None:
        problems.append(
            "output has no value; set output=FILE.safetensors (to=kohya), output=FOLDER, or "
            "output=owner/name (to=hub)"
        )
    elif to == "hub":
        if not is_hub_id(output):
            problems.append(f"output={output} is no repository of the hub; write owner/name")
    elif to == "kohya" and not output.endswith(".safetensors"):
        problems.append(f"output={output} must end in .safetensors")
    elif Path(output).exists():
        problems.append(f"output={output} is there already; choose another")
    if len(folders) == 1 and to in FORMS:
        try:
            stored, c = read_config(folders[0]), replace(c, run=str(folders[0]))
        except RunError as error:
            raise ConfigError("\n".join([*problems, str(error)])) from None
        if stored.get("policy", {}).get("full") and to in ("kohya", "diffusers"):
            problems.append(f"to={to} is a LoRA, but run={c.run} trained every weight; use to=pipeline")
        elif to in ("kohya", "pipeline"):
            problems += bench_problems({"model": stored.get("model")}, opted_in(given), ("model",))
    if problems:
        raise ConfigError("\n".join(problems))
    return c


@command("export", schema=ExportConfig, check=checked)
def main(cfg: DictConfig) -> None:
    """Hydra's task."""
    c = checked(cfg)
    run, output = Path(str(c.run)), Path(str(c.output))
    try:
        if c.to != "hub":
            refuse_led_away(output)
        learned = weights(run)
        if c.to != "hub":
            refuse_unwritable(output.parent, "output", *([output.name] if c.to == "kohya" else []))
            with room_for(output.parent, "output"):
                output.parent.mkdir(parents=True, exist_ok=True)
        FORMS[c.to](read_config(run), learned, output)
    except (RunError, ValueError) as error:
        raise ConfigError(str(error)) from None
    print(f"{'uploaded' if c.to == 'hub' else 'written'}: {output}")


if __name__ == "__main__":
    main()
