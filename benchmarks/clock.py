"""Seconds of a piece of work, by the wall and by the processor; and how busy the machine was beside it."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil


def seconds(work: Callable[[], Any]) -> dict[str, float]:
    """{"cpu": seconds of this process, all threads; "wall": seconds}."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


class Timers:
    """Seconds inside named functions, each without those of other named ones that it calls."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}
        self._inside: list[list[float]] = []

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.time(name):
                return function(*args, **kwargs)

        return timed

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        self._inside.append([0.0, 0.0])
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            spent = time.perf_counter() - wall, time.process_time() - cpu
            others = self._inside.pop()
            for book, all_of_it, other in zip((self.wall, self.cpu), spent, others, strict=True):
                book[name] = book.get(name, 0.0) + all_of_it - other
            if self._inside:
                self._inside[-1] = [a + b for a, b in zip(self._inside[-1], spent, strict=True)]


class Onlooker:
    """How many cores other processes used while it was on: `others` afterwards."""

    def __enter__(self) -> "Onlooker":
        self._busy, self._own, self._began = _busy(), _own(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        passed = time.perf_counter() - self._began
        self.others = max(0.0, (_busy() - self._busy) - (_own() - self._own)) / max(passed, 1e-9)


def _busy() -> float:
    """Seconds that all cores worked since the machine started."""
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq"))


def _own() -> float:
    """Seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
