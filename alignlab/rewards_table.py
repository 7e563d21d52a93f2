"""python -m alignlab.rewards

Lists every reward=NAME with its unit, range and licence, from conf/reward and the classes' own declarations.
No weights are loaded, and no network is asked.
"""

import importlib.resources
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from alignlab.config.build import ConfigError, node_problems, resolve
from alignlab.config.checks import is_hub_id
from alignlab.config.command import command
from alignlab.config.compose import opted_in, plain
from alignlab.config.record import Keys, record
from alignlab.config.reward_nodes import declared, without_weighing
from alignlab.files.bounded_yaml import read_yaml
from alignlab.rewards import Declared, SaysWhatIsMissing
from alignlab.rewards.clip import open_clip_weights
from alignlab.rewards.servers import MEND

FORMATS = ("table", "markdown")
HEADINGS = (
    "name",
    "what",
    "unit",
    "typical range",
    "gradient",
    "prompt",
    "pixels",
    "licence",
    "weights",
    "revision",
    "offline",
)
IN_DOCS = HEADINGS[:-1]
"""The columns that do not depend on the machine."""
LICENCE = "Apache-2.0"
"""Of what alignlab ships."""
OWN_LICENCE = "that of its weights"
"""What a class says that takes any weights."""


@dataclass
class RewardsConfig(Keys):
    """The keys of conf/rewards.yaml."""

    format: str = "table"
    """table or markdown, which leaves out what depends on the machine. [table | markdown]"""
    allow_targets: list[str] = field(default_factory=list)
    """Modules of your own that _target_ and function may name."""


ConfigStore.instance().store(name="rewards_schema", node=RewardsConfig)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One reward, as text."""

    cells: tuple[str, ...]
    """In the order of HEADINGS."""
    lacks: str = ""
    """What is missing, and how to get it."""


def rows(folders: Sequence[Path], allowed: Sequence[str] = ()) -> list[Row]:
    """Of the files of `folders`; the first folder that has a name is asked."""
    files = {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("*.yaml"))}
    return [row for _, path in sorted(files.items()) for row in _rows(path, allowed)]


def _rows(path: Path, allowed: Sequence[str]) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8")
    comment = " ".join(
        line.removeprefix("# ")
        for line in text.splitlines()
        if line.startswith("# ") and "@package" not in line
    )
    what = comment.partition(". ")[0].rstrip(".")
    for name, node in (read_yaml(text) or {}).items():
        own = without_weighing(node)
        problems = [
            s
            for s in node_problems(f"reward.{name}", own, allowed=allowed)
            if "has no value" not in s and MEND not in s
        ]
        try:
            declaration = (
                declared(node) if not any("._target_" in s or ".function" in s for s in problems) else None
            )
        except (ValueError, ConfigError) as error:
            problems, declaration = [*problems, str(error)], None
        if declaration is None:  # not to be imported, or silent
            yield Row(cells=(path.stem, what, *["?"] * (len(HEADINGS) - 3), "no"), lacks="; ".join(problems))
            continue
        weights, revision = _weights(own), own.get("revision")
        shipped = [folder for folder in map(_shipped, weights) if folder is not None]
        side = (
            declaration.input_size
            or next((_side(folder) for folder in shipped), None)
            or next(filter(None, map(_listed_side, weights)), None)
        )
        lacks = "; ".join([*_unset(name, own), *problems, *([] if problems else _missing(own, weights))])
        low, high = (f"{x:g}" for x in declaration.typical_range) if declaration.typical_range else ("", "")
        yield Row(
            cells=(
                path.stem,
                what,
                declaration.unit,
                f"{low} to {high}" if low else "unstated",
                "yes" if declaration.differentiable else "no",
                "yes" if declaration.needs_prompt else "no",
                "any" if side is None else str(side),
                LICENCE if shipped else _licence(declaration, weights),
                " + ".join([*(["yours"] if own.get("path") == "???" else []), *weights]) or "none",
                "" if revision is None else str(revision)[:12],
                "no" if lacks else "yes",
            ),
            lacks=lacks,
        )


def _weights(own: dict[str, Any]) -> list[str]:
    """What `path` names, and every other argument that is an id of the hub's."""
    ids = {
        k: v
        for k, v in own.items()
        if k == "path" or (is_hub_id(v) and k not in ("revision", "function", "_target_"))
    }
    return [str(value) for value in ids.values() if value not in (None, "???")]


def _shipped(weights: str) -> Path | None:
    folder = Path(str(importlib.resources.files("alignlab") / "assets" / weights))
    return folder if folder.is_dir() else None


def _side(folder: Path) -> int | None:
    """Pixels that the CLIP in a shipped folder sees, or the CLIP that its head stands on."""
    if (folder / "open_clip_config.json").is_file():
        return int(
            json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"][
                "image_size"
            ]
        )
    about = folder / "reward.json"
    below = _shipped(json.loads(about.read_text())["clip"]) if about.is_file() else None
    return None if below is None else _side(below)


def _unset(name: str, own: dict[str, Any]) -> Iterator[str]:
    yield from (f"set reward.{name}.{key}=..." for key, value in own.items() if value == "???")


def _listed_side(weights: str) -> int | None:
    """Pixels that one of open_clip's sees."""
    if "/" not in weights or not open_clip_weights(weights):
        return None
    import open_clip

    size = open_clip.get_model_config(weights.partition("/")[0])["vision_cfg"]["image_size"]
    return int(size if isinstance(size, int) else size[0])


def _licence(said: Declared, weights: Sequence[str]) -> str:
    """That of OpenAI's CLIPs is known."""
    return (
        "MIT"
        if said.licence == OWN_LICENCE and [w.partition("/")[2] for w in weights] == ["openai"]
        else said.licence
    )


def _missing(own: dict[str, Any], weights: Sequence[str]) -> Iterator[str]:
    """What a class says that it lacks on this machine; of one that does not say, the hub's repositories that
    are not in its cache."""
    given = {k: v for k, v in own.items() if k != "_target_"}
    if given.get("path") == "???":
        return
    made = resolve(own["_target_"])
    if isinstance(made, SaysWhatIsMissing):
        yield from made.missing(**given)
        return
    for name in (w.removeprefix("hf-hub:") for w in weights):
        revision = own.get("revision") if name == own.get("path") else None
        if is_hub_id(name) and not Path(name).exists():
            from huggingface_hub import snapshot_download  # slow to import
            from huggingface_hub.errors import LocalEntryNotFoundError

            try:
                snapshot_download(name, revision=revision, local_files_only=True)
            except LocalEntryNotFoundError:
                yield f"{name} is not in the hub's cache; hf download {name}" + (
                    f" --revision {revision}" if revision else ""
                )


def markdown(these: Sequence[Row]) -> str:
    """The table of docs/rewards.md."""
    lines = [f"| {' | '.join(IN_DOCS)} |", f"|{'---|' * len(IN_DOCS)}"]
    for row in these:
        name, *rest = row.cells[: len(IN_DOCS)]
        lines.append(f"| {' | '.join([f'`{name}`', *(cell.replace('|', chr(92) + '|') for cell in rest)])} |")
    return "\n".join(lines)


def show(these: Sequence[Row]) -> None:
    """The table on the terminal, and under it what is missing."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(
        *(h for h in HEADINGS if h != "what"),
        box=box.SIMPLE_HEAD,
        title="reward=NAME; larger is better in all of them",
    )
    for row in these:
        table.add_row(*(cell for heading, cell in zip(HEADINGS, row.cells, strict=True) if heading != "what"))
    console.print(table)
    for row in these:
        if row.lacks:
            console.print(f"{row.cells[0]}: {row.lacks}", markup=False, highlight=False, soft_wrap=True)


def checked(cfg: DictConfig) -> RewardsConfig:
    """The configuration as a record.

    Raises:
        ConfigError: for a format that there is not.
    """
    given = plain(cfg)
    c = record(RewardsConfig, {**given, "allow_targets": opted_in(given)})
    if c.format not in FORMATS:
        raise ConfigError(f"format={c.format} is not one of {', '.join(FORMATS)}")
    return c


@command("rewards", schema=RewardsConfig, check=checked)
def main(cfg: DictConfig) -> None:
    """Hydra's task."""
    c = checked(cfg)
    sources = [
        Path(source.path) for source in HydraConfig.get().runtime.config_sources if source.schema == "file"
    ]
    table = rows([folder / "reward" for folder in sources], c.allow_targets)
    if c.format == "markdown":
        print(markdown(table))
    else:
        show(table)


if __name__ == "__main__":
    main()
