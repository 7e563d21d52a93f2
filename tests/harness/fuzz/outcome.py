"""One hostile input, what became of it, and the rule: it is taken, or it ends in sentences and exit code 2
with nothing written."""

import contextlib
import io
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType

PYTHONESE = re.compile(
    r"object (has no|is not)|NoneType|unsupported operand|unexpected keyword|positional argument|index out "
    r"of|<class|full_key|"
    r"object at 0x|Traceback|DictConfig|must be str|not supported between|not subscriptable|embedded "
    r"null|Errno|argument of type"
)
"""What no sentence for a user holds."""
LONGEST = 2000
"""Characters of a sentence."""


class Accepted(BaseException):
    """Every check has passed, and the work would begin. Not an Exception: nothing on the way catches it."""


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    kind: str
    case: str
    verdict: str
    """valid, refused or broken."""
    said: str
    """The sentences, or what is broken."""
    seconds: float


def refuse_work(*_: object, **__: object) -> None:
    """In the place of a command's work."""
    raise Accepted


def command_line(command: ModuleType, words: list[str]) -> int:
    """`python -m COMMAND WORDS` in this process; the exit code. Hydra's own state is put back."""
    before, handlers, cached = sys.argv, logging.root.handlers[:], os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [command.__name__, *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        command.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv, logging.root.handlers[:] = before, handlers
        if cached is None:
            del os.environ["HYDRA_FULL_ERROR"]
    return 0


def attempt(
    kind: str, case: str, call: Callable[[], int], watched: Path, *, limit: int = 60, writes: bool = False
) -> Outcome:
    """Runs one input and judges it.

    Args:
        call: returns the exit code; raises Accepted, or an exception of its own, which is a break.
        watched: a folder in which nothing may change,
        writes: unless the input may be taken and the work done.
        limit: seconds after which it counts as hanging.
    """
    out, err, before, began = io.StringIO(), io.StringIO(), tree(watched), time.perf_counter()
    verdict, said = "broken", ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), bounded(limit):
            code = call()
        verdict = {0: "valid", 2: "refused"}.get(code, "broken")
        said = (
            err.getvalue().strip()
            if verdict == "refused"
            else ""
            if code == 0
            else f"exit code {code}: {err.getvalue()[-300:]}"
        )
    except Accepted:
        verdict = "valid"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"
    seconds = time.perf_counter() - began
    if verdict == "refused":
        lines = [
            line
            for line in said.splitlines()
            if not line.startswith(("warning: ", "Error executing job with overrides"))
        ]
        bad = [
            line
            for line in lines
            if not line.startswith("error: ") or PYTHONESE.search(line) or len(line) > LONGEST
        ]
        if bad or not lines:
            verdict, said = "broken", f"no sentence: {(bad or [said])[0][:400]!r}"
    changed = sorted(before.items() ^ tree(watched).items())
    if changed and not (writes and verdict == "valid"):
        verdict, said = "broken", f"changed {changed[0][0]}; {said}"
    return Outcome(kind, case, verdict, said, seconds)


@contextlib.contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """A TimeoutError after so many seconds; only in a process's main thread."""

    def stop(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything below a folder, by path."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_size if path.is_file() else 0,
            path.lstat().st_mtime_ns if path.is_file() else 0,
        )
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] != "multirun"  # where Hydra notes its sweeps
    }
