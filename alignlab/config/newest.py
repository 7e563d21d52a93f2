"""`run=last`: the newest run folder that fits the key, in place of its name.

A folder that is really called `last` goes first. The command says which folder it took.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from alignlab.config.build import ConfigError
from alignlab.distributed.ranks import launched
from alignlab.files.safe_folder import LOCK
from alignlab.runs.candidates import ABOUT
from alignlab.runs.listing import HOMES, is_held, is_regular, run_folders_below, wrote
from alignlab.runs.pasted import word

LAST = "last"


def _finished(folder: Path) -> bool:
    return is_regular(folder / "summary.json")


def _unfinished(folder: Path) -> bool:
    # processes that train together look one after another, and the first may hold the lock already
    return not _finished(folder) and (launched() > 1 or not is_held(folder / LOCK))


FITS: Mapping[str, tuple[str, Callable[[Path], bool]]] = {
    "run": ("finished run", _finished),
    "runs": ("finished run", _finished),
    "init_from": ("finished run", _finished),
    "resume": ("run that is not finished and not being trained", _unfinished),
    "again": ("folder of candidates", lambda folder: True),
}
"""The keys that take the word, with what each wants."""


def named(text: str) -> tuple[str, str | None]:
    """One word of a command line, with the newest folder in the place of `last`, and what to tell the user;
    None for any other word.

    Raises:
        ConfigError: if no folder fits.
    """
    key, _, value = text.partition("=")
    if value != LAST or key not in FITS or os.path.lexists(LAST):
        return text, None
    kind, fits = FITS[key]
    folders = _candidates() if key == "again" else _runs()
    newest = max(filter(fits, folders), key=lambda folder: (wrote(folder), str(folder)), default=None)
    if newest is None:
        raise ConfigError(f"{text}: there is no {kind} in {' or '.join(HOMES)}; give its folder")
    return f"{key}={newest}", f"{text} is {word(key, newest)}"


def _runs() -> Iterator[Path]:
    for home in HOMES:
        yield from run_folders_below(Path(home))


def _candidates() -> Iterator[Path]:
    for home in HOMES:
        yield from (path.parent for path in Path(home).glob(f"*/{ABOUT}") if is_regular(path))
