"""alignlab ls runs

Lists runs and sweeps: state, algorithm, reward, age, and when a running one will end. Nothing is written.

    alignlab ls                       runs/ and multirun/
    alignlab ls FOLDER FOLDER         runs in other folders, or a run
    alignlab ls --all                 more than the newest 100 of each folder

    running     a process is training it
    finished    there is a summary.json
    stopped     all that it did is saved; resume= goes on with it
    failed      it ended without saving its last epochs; resume= goes on from the last checkpoint

`base > last` is the reward of the base model and of the last evaluation. `age` is the time since the run last
wrote. `ETA` counts the epochs that are left at the pace of the last ones, without evaluations.
"""

import os
import shlex
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignlab.config import help
from alignlab.runs.listing import HOMES, SWEEP_FILE, Listed, Sweep, is_regular, sweeps

MOST = 100
"""Runs of each folder that are listed, unless all are asked for."""
WIDE = 100_000
"""Columns of the table, so that no line is cut or folded: the folder stands last, and a terminal wraps it."""
COLOURS = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "red"}
HEADINGS = ("state", "epoch", "algorithm", "reward", "base > last", "age", "ETA", "folder")


def main() -> None:
    """Prints the table. A word that is no folder ends the process with code 2."""
    words = sys.argv[1:]
    if help.wanted(words):
        help.show(help.text("ls"))
        return
    wrong = [word for word in words if word != "--all" and (word.startswith("-") or not os.path.isdir(word))]
    if wrong:
        what = (
            "is no option; there is --all"
            if wrong[0].startswith("-")
            else "is no folder; give one that holds runs"
        )
        print(f"error: {visible(wrong[0])} {what}", file=sys.stderr)
        sys.exit(2)
    homes = [Path(word) for word in words if word != "--all"]
    found = [
        sweep
        for home in homes or [Path(home) for home in HOMES if os.path.isdir(home)]
        for sweep in sweeps(home, None if "--all" in words else MOST)
    ]
    if not found:
        where = " or ".join(visible(str(home)) for home in homes or HOMES)
        print(f"no runs in {where}; alignlab train makes one")
        return
    try:
        show(found)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(found: Sequence[Sweep]) -> None:
    """Prints the runs of each folder under its heading, the newest last."""
    console = Console(width=WIDE, highlight=False)
    rows = [[cells(run) for run in sweep.runs] for sweep in found]
    wide = [
        max(map(len, column))
        for column in zip(HEADINGS, *(row for part in rows for row in part), strict=True)
    ]
    console.print(_table([HEADINGS], wide, "bold"))
    for sweep, part in zip(found, rows, strict=True):
        console.print(Text(heading_of(sweep), style="bold"))
        console.print(_table(part, wide))


def _table(rows: Sequence[Sequence[str]], wide: Sequence[int], style: str = "") -> Table:
    """Rows whose columns stand where those of the other tables do."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for width in wide[:-1]:
        table.add_column(min_width=width, no_wrap=True)
    table.add_column(no_wrap=True)
    for state, *others in rows:
        table.add_row(
            Text(state, style=style or COLOURS.get(state, "")),
            *(Text(other, style=style) for other in others),
        )
    return table


def heading_of(sweep: Sweep) -> str:
    """A folder of runs, and how many of its jobs are finished."""
    total = max(len(sweep.runs) + sweep.left_out, sweep.jobs or 0)
    left = f"; {sweep.left_out} older ones are left out, --all lists them" if sweep.left_out else ""
    kind = "sweep " if is_regular(sweep.folder / SWEEP_FILE) else ""
    return f"{kind}{pasted(sweep.folder)}: {sweep.finished} of {total} finished{left}"


def cells(run: Listed) -> list[str]:
    """One run, a text for each heading."""
    ends = [f"{value:.4g}" for value in (run.base, run.last) if value is not None]
    done = "" if run.step is None else f"{run.step}/{'?' if run.steps is None else run.steps}"
    return [
        run.state,
        done,
        visible(run.algorithm),
        visible(run.reward),
        " > ".join(ends),
        span(time.time() - run.wrote),
        "" if run.eta is None else span(run.eta),
        pasted(run.folder),
    ]


def span(seconds: float) -> str:
    """A time in its largest unit: 40s, 12m, 5h, 3d."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def pasted(folder: Path) -> str:
    """A path as a shell takes it."""
    return visible(shlex.quote(str(folder)))


def visible(text: str) -> str:
    """A text without letters that a terminal obeys: each is shown by its number."""
    return "".join(
        f"\\x{ord(letter):02x}" if unicodedata.category(letter).startswith("C") else letter for letter in text
    )


if __name__ == "__main__":
    main()
