"""Which keys of the command lines hold a path or a text of the user's own, whatever command they belong to.

Such values are taken as they stand (typed.py), and paths are checked before anything is read or written
(checks.py).
"""

import re

_PLACES = "again cache clip data features held_out home init_from lora output output_dir resume run runs"
"""Keys at the top of a command."""
_NAMES = "path path_or_id file folder data dataset"
"""Last names of nested keys: model.path_or_id, prompts.file, algo.data, reward.NAME.path."""
_SCORERS = "clip encoder file path processor tokenizer"
"""Of a reward: the other models that it reads."""
_TEXTS = "prompt title name host"
_NESTED_TEXTS = "template question reference chat pattern url"


def _one_of(names: str) -> str:
    return f"(?:{'|'.join(names.split())})"


PATH = re.compile(
    rf"{_one_of(_PLACES)}|(?!hydra\b).+\.{_one_of(_NAMES)}|(?:eval_)?rewards?\.[^.]+\.{_one_of(_SCORERS)}"
    r"|given\.[^.]+|model\.config|diversity\.weights"
)
"""Keys whose value is a path, or the name of something that may stand at a path."""
TEXT = re.compile(rf"{_one_of(_TEXTS)}|(?!hydra\b).+\.{_one_of(_NESTED_TEXTS)}|more\.[^.]+")
"""Keys whose value is a text that people write."""
LIST = re.compile(r"runs|prompt|prompts\.(?:prompts|unseen)")
"""Those of them that take a list too, and lists of texts."""
LONGEST_NAME = 255
"""Bytes of one name in a path, on every common file system."""


def is_path(key: str) -> bool:
    """Whether the value at this dotted key is a path; the places of a list count as the list."""
    return PATH.fullmatch(re.sub(r"(\.\d+)+$", "", key)) is not None


def too_long(path: str) -> str | None:
    """The first name in a path that no file system takes; None if all of them are short enough."""
    return next((name for name in path.split("/") if len(name.encode(errors="replace")) > LONGEST_NAME), None)
