"""Lets threads that wait for each other sleep soon, so that a run keeps its fair share of a machine that
others use too.

The threads of a parallel loop meet at barriers, hundreds of times a step. Who comes first spins there, for
milliseconds (GNU's OpenMP) or a fifth of a second (Intel's and LLVM's). Alone that is the fastest way to
wait. Beside other programs the thread that is waited for may not be running, and whoever spins takes the core
that it needs: the run gets far less than its share. With a short spin and then a sleep it keeps about its
share; alone it loses between nothing and an eighth, by the processor (results/benchmarks.md). The numbers of
a run are the same.

An OpenMP runtime reads its environment when it is loaded, so this must come before torch:
alignlab/__init__.py calls it.
"""

import os
import sys
from collections.abc import Mapping, MutableMapping

SHORT = {
    "GOMP_SPINCOUNT": "2000",  # turns of a loop: tens of microseconds
    "KMP_BLOCKTIME": "1",  # milliseconds, the least above none that all versions understand
}
"""For GNU's OpenMP, and for Intel's and LLVM's."""
CHOSEN = (*SHORT, "OMP_WAIT_POLICY", "KMP_LIBRARY")
"""Whoever sets one of these in the environment has chosen."""


def spin_shortly(
    environment: MutableMapping[str, str] = os.environ, *, is_command: bool | None = None
) -> bool:
    """Sets the environment of a command, unless its user has set it. Returns whether it did.

    Args:
        is_command: whether this process is a command; None looks for `python -m alignlab...`.

    Nothing is set where alignlab is imported by another program, whose threads are its own business, or where
    torch is loaded already, for then it would only be inherited by other programs.
    """
    known = _is_command() if is_command is None else is_command
    if "torch" in sys.modules or not known or has_chosen(environment):
        return False
    environment.update(SHORT)
    return True


def has_chosen(environment: Mapping[str, str]) -> bool:
    """Whether the environment says how OpenMP's threads wait."""
    return any(environment.get(name) for name in CHOSEN)


def _is_command() -> bool:
    """Whether this process is `python -m alignlab...`: while Python looks for the module, that is all that
    argv says."""
    named = any(word.removeprefix("-m").partition(".")[0] == "alignlab" for word in sys.orig_argv)
    return sys.argv[:1] == ["-m"] and named
