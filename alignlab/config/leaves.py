"""Says what no value of a configuration may be, whatever its key."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from alignlab.config.path_keys import LONGEST_NAME, is_path, too_long
from alignlab.config.secrecy import environment_secrets, secret_in

LONGEST = 1000
"""Characters of a text that is no prompt."""
UNBOUNDED = ("max_grad_norm", "algo.clip", "algo.advantage_clip")
"""Numbers that may be inf."""


def leaf_problems(node: Any, where: str = "") -> Iterator[str]:
    """What no value of a configuration may be, whatever its key: no number, unreadable text, a secret (a run
    writes what it was given)."""
    return _problems(node, where, environment_secrets())


def _problems(node: Any, where: str, secrets: Sequence[tuple[str, str]]) -> Iterator[str]:
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inside:
        yield from _text_problems(str(key), f"a key of {where or 'the configuration'}", "", secrets)
        yield from _problems(value, f"{where}.{key}" if where else str(key), secrets)
    if (
        isinstance(node, float)
        and not math.isfinite(node)
        and (math.isnan(node) or node < 0 or where not in UNBOUNDED)
    ):
        yield f"{where}={node} must be a finite number"
    if isinstance(node, int) and not -(2**63) <= node < 2**63:
        yield f"{where} has {len(str(node))} digits; write a number below 2**63"
    if isinstance(node, str):
        yield from _text_problems(node, where, f"{where}=", secrets)
        if len(node) > LONGEST and "prompt" not in where:
            yield f"{where} has {len(node)} characters, and no name or path has as many; shorten it"
        name = too_long(node) if is_path(where) and len(node) <= LONGEST else None
        if name is not None:
            size = f"{len(name.encode(errors='replace'))} bytes long, and names may have {LONGEST_NAME}"
            yield f"{where}: the name {name[:20]}... is {size}; shorten it"


def _text_problems(text: str, where: str, shown: str, secrets: Sequence[tuple[str, str]]) -> Iterator[str]:
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        yield (
            f"{shown or where + ' '}{text!r} holds a character that is no text (NUL, or half of a pair); "
            "remove it"
        )
    secret = secret_in(text, secrets)
    if secret is not None:
        yield (
            f"{where} holds {secret}, and what is in a configuration is written to the disk; leave it to the "
            "environment"
        )
