"""From a checked, plain configuration to a record: a value for every key, by its type, which does not change
any more.

A command's keys are a dataclass that Hydra fills (schema). Hydra hands them on as tables without types. A
record is an instance of that dataclass: mypy knows its keys, and a key that there is not is a mistake that no
run meets.
"""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from typing import Any, TypeVar, get_type_hints

from alignlab.config.build import ConfigError, fits, nearest, words


class Keys:
    """Above the dataclass of a command's keys: what is made of it does not change.

    It is not `frozen=True`, for OmegaConf would then refuse every key of the command line.
    """

    def __post_init__(self) -> None:
        """From here on the record is whole."""
        self.__dict__["_whole"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a key while the record is made.

        Raises:
            FrozenInstanceError: afterwards.
        """
        if "_whole" in self.__dict__:
            raise FrozenInstanceError(f"{name} is set already; dataclasses.replace makes another record")
        super().__setattr__(name, value)


K = TypeVar("K", bound=Keys)


def record(keys: type[K], values: Mapping[str, Any], where: str = "") -> K:
    """Makes the record of a plain configuration. Groups whose type is a dataclass of keys become records too.

    Args:
        keys: the command's dataclass.
        values: a value for each of its fields; one that is missing takes its default.
        where: in front of a key in a sentence: the group that the values are of, and a dot.

    Raises:
        ConfigError: for a value that is no key of the command, or is of another type than its key.
    """
    hints = get_type_hints(keys)
    unknown = [name for name in values if name not in hints]
    if unknown:
        known = nearest(unknown[0], hints, where)
        raise ConfigError(f"{where}{unknown[0]} is no key of this command; {known}")
    return keys(**{name: _typed(hints[name], value, f"{where}{name}") for name, value in values.items()})


def _typed(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, Keys) and isinstance(value, Mapping):
        return record(kind, value, f"{where}.")
    if not fits(value, kind):  # Hydra sees to the types of what is typed, but not to those of a stored run
        raise ConfigError(f"{where}={value} must be {words(kind)}")
    return value
