"""Lets a user's own Python import a module by the name that it had before the rooms, with a warning."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from alignlab.runs.moved_targets import MOVED


class _Moved(MetaPathFinder, Loader):
    """Asked last, for names that nobody else finds."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new_name = MOVED[spec.name]
        warnings.warn(f"{spec.name} is {new_name} now; import that", FutureWarning, stacklevel=2)
        module = importlib.import_module(new_name)
        self.own = module.__spec__  # the import system is about to write the old name there
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own


def allow() -> None:
    """From here on old names can be imported."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
