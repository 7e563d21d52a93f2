"""Around code of the user's own: what it changes of the whole process would change all that runs after it.

A scorer's module, say, often begins with torch.set_grad_enabled(False), and a training that imports it would
have no gradients.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Sets back what the code inside changes: torch's gradient mode, default dtype, default device and number
    of threads, and the working directory."""
    gradient, dtype, threads = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    device, home = torch.get_default_device(), _folder()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradient)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(
                None if device.type == "cpu" else device
            )  # None: there is none, which is the CPU
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if home is not None and _folder() != home:
            os.chdir(home)


def _folder() -> str | None:
    """The working directory; None if it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return None
