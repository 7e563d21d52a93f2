"""Threads that wait for each other sleep soon in a command; a user's own choice stays, and other programs are
left alone."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignlab.fast import spinning as spinning

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {name: value for name, value in os.environ.items() if name not in spinning.CHOSEN} | {
    "PYTHONPATH": str(ROOT)
}


def process(monkeypatch: pytest.MonkeyPatch, module: str = "alignlab.train", **modules: object) -> None:
    """What Python has while `python -m MODULE` imports the package."""
    its = SimpleNamespace(
        argv=["-m", "algo=ddpo"], orig_argv=["python", "-m", module, "algo=ddpo"], modules=modules
    )
    monkeypatch.setattr(spinning, "sys", its)


def test_a_command_tells_its_threads_to_sleep_soon() -> None:
    """The runtime itself says what it read when torch loaded it: GNU's, or one of the others."""
    environment = CLEAN | {"OMP_DISPLAY_ENV": "verbose"}
    call = [sys.executable, "-m", "alignlab.train", "lr=-1"]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and "lr=-1.0 must be positive" in done.stderr
    said = done.stdout + done.stderr
    if "OPENMP DISPLAY ENVIRONMENT" not in said:
        pytest.skip("this torch has another OpenMP")
    assert "GOMP_SPINCOUNT = '2000'" in said or "KMP_BLOCKTIME='1" in said


def test_another_program_is_left_alone() -> None:
    """Importing the package, without torch or after it, changes no environment."""
    code = "import os, alignlab; print([n for n in alignlab.fast.spinning.CHOSEN if n in os.environ])"
    done = subprocess.run([sys.executable, "-c", code], env=CLEAN, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_only_commands_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where torch is there already, and not where a program of another name imports the package."""
    environment: dict[str, str] = {}
    process(monkeypatch, torch=object())
    assert not spinning.spin_shortly(environment) and not environment
    process(monkeypatch, "theirs.tool")
    assert not spinning.spin_shortly(environment) and not environment
    process(monkeypatch)
    assert spinning.spin_shortly(environment) and environment == spinning.SHORT


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "KMP_LIBRARY"])
def test_the_user_has_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the variables is enough: the others would work against it."""
    process(monkeypatch)
    environment = {name: "7"}
    assert not spinning.spin_shortly(environment) and environment == {name: "7"}
