"""Python processes that start in a tenth of the time: forks of one that has imported the libraries.

Importing torch, diffusers and transformers takes longer than most things that a test wants to see of a
command. The first call here starts a process that imports them, and each call is a fork of it. alignlab
itself is never imported there, so each command still imports the package anew, from the folder that the test
names. Tests of how a process starts (threads, the environment that torch reads, launchers) use `subprocess`.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import run as spawned  # the real one, for tests that put `run` in its place
from typing import Any

LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "diffusers.training_utils",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "peft",
    "open_clip",
    "scipy.stats",
    "hydra.main",
    "rich.table",
    "matplotlib.figure",
    "plotly.graph_objects",
    "tensorboard.compat.proto.event_pb2",
)
"""What the commands import of others' code."""


def run(
    call: Sequence[Any],
    *,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    capture_output: bool = False,
    check: bool = False,
    **others: Any,
) -> Any:
    """As `subprocess.run(call, text=True)` of `python -m MODULE …`, `python -c CODE …` or `python FILE …`.

    Any other call goes to `subprocess.run` as it is, and all do where a process with libraries may not be
    forked (macOS)."""
    words = [str(word) for word in call]
    ours = words[0] == sys.executable and (words[1] in ("-m", "-c") or words[1].endswith(".py"))
    if not ours or sys.platform != "linux":
        how = {"cwd": cwd, "env": env, "capture_output": capture_output, "check": check}
        return spawned(call, **how | ({"text": True} if ours else {}) | others)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*LIBRARIES])
    with tempfile.TemporaryDirectory() as home:
        said = [Path(home) / name for name in ("stdout", "stderr")]
        place, environment = str(cwd or Path.cwd()), dict(os.environ if env is None else env)
        process = context.Process(target=_become, args=(words[1:], place, environment, [*map(str, said)]))
        process.start()
        process.join(others.get("timeout"))
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, others["timeout"])
        out, error = (path.read_text() for path in said)
    if not capture_output:
        os.write(1, out.encode())
        os.write(2, error.encode())
    done = subprocess.CompletedProcess(words, process.exitcode, out, error)
    if check:
        done.check_returncode()
    return done


def _become(words: list[str], cwd: str, environment: dict[str, str], said: list[str]) -> None:
    """Turns the fork into the process that was asked for."""
    os.setsid()
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdin = open(os.devnull)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    kind, what, *arguments = words if words[0] in ("-m", "-c") else ("file", *words)
    first = {"-m": cwd, "-c": "", "file": str(Path(what).parent)}[kind]
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *paths, *sys.path]
    sys.argv = ["-c" if kind == "-c" else what, *arguments]
    multiprocessing.current_process().name = "MainProcess"
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif kind == "file":
            runpy.run_path(what, run_name="__main__")
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # a fork ends without them
