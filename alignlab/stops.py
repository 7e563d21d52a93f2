"""Signals that ask a run to end, and how it does: at a point from which a resumed run goes on bit for bit.

    SIGINT    Ctrl-C; a second one ends at once
    SIGTERM   kill, scancel, the end of a Slurm job's time
    SIGUSR1   Slurm's warning, #SBATCH --signal=USR1@600

A signal sets a flag. The run looks at it before each rollout, where the epoch's samples are kept and the state before the epoch is
saved (collected.py), and after each epoch, whose state is saved. An epoch whose first update is done is finished, for its own
beginning is gone. Processes that train together agree on it first.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from alignlab.ranks import gathered, launched, rank, wait

STOPPED = 75
"""The exit code of a run that was asked to end and can go on: EX_TEMPFAIL of sysexits.h, "try again"."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
ECHO = 2.0
"""Seconds in which a launcher of several processes passes a Ctrl-C on that they have had themselves."""


class Stopped(Exception):
    """The run ends here because it was asked to."""


class _Request:
    """What this process was asked."""

    heeded = False
    """Whether signals are waited for at all."""
    signal: str | None = None
    at = 0.0
    agreed: str | None = None
    """The signal on whose account all processes stop."""


def asked() -> bool:
    """Whether the run is to end here, because one of its processes was asked to. All of them must ask at the same points."""
    if _Request.heeded:
        _Request.agreed = next((name for name in gathered(_Request.signal) if name), None)
    return _Request.agreed is not None


def leave() -> None:
    """Ends the run, if the last `asked` said so.

    Raises:
        Stopped: then.
    """
    if _Request.agreed is not None:
        raise Stopped(_Request.agreed)


def leave_if_asked() -> None:
    """Both: at points where nothing is to be saved first.

    Raises:
        Stopped: if the run is to end.
    """
    if asked():
        leave()


@contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """Inside, the signals ask the run in `folder` to end; it then leaves this with exit code 75 and a line that says how to go on.

    Outside of the main thread, where Python takes no signals, nothing changes. A signal that is ignored (nohup) or that the launcher waits
    for itself (submitit) is left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) in usual}
    for number in before:
        signal.signal(number, _note)
    _Request.heeded, _Request.signal, _Request.agreed = True, None, None
    try:
        yield
    except Stopped as stopped:
        wait()  # for process 0, which may be writing
        if rank() == 0:
            saved = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
            what = f"{folder / 'checkpoints' / saved[-1]} is saved" if saved else "nothing was there to be saved yet"
            print(f"stopped by {stopped}: {what}; go on with python -m alignlab.train resume={folder}", file=sys.stderr)
        sys.exit(STOPPED)
    finally:
        _Request.heeded, _Request.signal, _Request.agreed = False, None, None
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _Request.signal is None:
        _Request.signal, _Request.at = signal.Signals(number).name, now
        if os.environ.get("RANK", "0") == "0":  # not print: the signal may have come in the middle of one
            os.write(2, f"\n{_Request.signal}: ending where the run can go on from (Ctrl-C again: at once)\n".encode())
    elif number == signal.SIGINT and (launched() == 1 or now - _Request.at > ECHO):
        raise KeyboardInterrupt
