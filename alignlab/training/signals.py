"""Signals that ask a run to end, and how it does: at a point from which a resumed run goes on bit for bit.

    SIGINT    Ctrl-C; a second one ends at once
    SIGTERM   kill, scancel, the end of a Slurm job's time
    SIGUSR1   Slurm's warning, #SBATCH --signal=USR1@600
    SIGUSR2   the same under submitit (hydra/launcher=slurm), which then queues the job again

A signal sets a flag. The run looks at it before each rollout, where the epoch's samples are kept and the
state before the epoch is saved (unfinished_epoch.py), and after each epoch, whose state is saved. An epoch
whose first update is done is finished, for its own beginning is gone. Processes that train together agree on
it first.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from alignlab.distributed.ranks import gathered, launched, rank, wait
from alignlab.runs.pasted import resume

STOPPED = 75
"""The exit code of a run that was asked to end and can go on: EX_TEMPFAIL of sysexits.h, "try again"."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
ECHO = 2.0
"""Seconds in which a launcher of several processes passes a Ctrl-C on that they have had themselves."""


PATIENCE = 0.7
"""The share of the time between submitit's warning and the end of the job in which the run may save; then it
is queued again as it is."""


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
    timer: threading.Timer | None = None
    """Queues the job again if it does not end in time."""


def asked() -> bool:
    """Whether the run is to end here, because one of its processes was asked to. All of them must ask at the
    same points."""
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
def stoppable(folder: Path, notice: float = 0) -> Iterator[None]:
    """Inside, the signals ask the run in `folder` to end; it then leaves this with exit code 75 and a line
    that says how to go on.

    Outside of the main thread, where Python takes no signals, nothing changes. A signal that is ignored
    (nohup) is left alone. Under submitit, which ignores SIGTERM (scancel) and answers its own warning by
    queueing the job again at once, the run saves first.

    Args:
        notice: seconds from submitit's warning to the end of the job.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before: dict[int, Any] = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) in usual}
    before |= _submitits()
    for number, handler in before.items():
        queues = getattr(handler, "__name__", "") == REQUEUES
        signal.signal(number, _noted_and_queued(handler, PATIENCE * notice) if queues else _note)
    _Request.heeded, _Request.signal, _Request.agreed = True, None, None
    try:
        yield
    except Stopped as stopped:
        wait()  # for process 0, which may be writing
        if rank() == 0:
            saved = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
            what = (
                f"{folder / 'checkpoints' / saved[-1]} is saved"
                if saved
                else "nothing was there to be saved yet"
            )
            print(f"stopped by {stopped}: {what}; go on with {resume(folder)}", file=sys.stderr, flush=True)
        asked_by = before.get(signal.Signals[str(stopped)])
        if asked_by is not None and getattr(asked_by, "__name__", "") == REQUEUES:
            asked_by(signal.Signals[str(stopped)], None)  # ends the process
        sys.exit(STOPPED)
    finally:
        if _Request.timer is not None:
            _Request.timer.cancel()
        _Request.timer = None
        _Request.heeded, _Request.signal, _Request.agreed = False, None, None
        for number, handler in before.items():
            signal.signal(number, handler)


REQUEUES = "checkpoint_and_try_requeue"
"""What submitit's handler of its warning is called."""


def _submitits() -> dict[int, Any]:
    """The signals that submitit waits for in this process, with its handlers."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    return {
        n: handler
        for n, handler in handlers.items()
        if str(getattr(handler, "__module__", "")).startswith("submitit.")
    }


def _noted_and_queued(queue: Callable[[int, Any], None], seconds: float) -> Callable[[int, Any], None]:
    """A handler that asks the run to end, and queues the job again if that takes longer."""

    def noted(number: int, frame: FrameType | None) -> None:
        if _Request.timer is not None:  # the second time: there is no more room
            queue(number, frame)
            return
        _note(number, frame)
        _Request.timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
        _Request.timer.daemon = True
        _Request.timer.start()

    return noted


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _Request.signal is None:
        _Request.signal, _Request.at = signal.Signals(number).name, now
        if os.environ.get("RANK", "0") == "0":  # not print: the signal may have come in the middle of one
            os.write(
                2,
                f"\n{_Request.signal}: ending where the run can go on from "
                "(Ctrl-C again: at once)\n".encode(),
            )
    elif number == signal.SIGINT and (launched() == 1 or now - _Request.at > ECHO):
        raise KeyboardInterrupt
