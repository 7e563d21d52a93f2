"""YAML that may be somebody else's: plain values only, and no text of a kilobyte that unfolds to gigabytes.

An alias (*name) repeats a value that was marked before (&name). Nine levels of ten aliases each, "a billion
laughs", are a few hundred letters that unfold to a billion values as soon as they are copied, compared or
printed. What is unfolded is therefore measured before it is built: what alignlab writes itself repeats a list
of prompts at most a few times.
"""

import re
from pathlib import Path
from typing import Any

import yaml

FACTOR, FREE = 10, 100_000
"""A text may unfold to so many times its letters, and to so many letters in any case."""


def read_yaml(text: str) -> Any:
    """What a YAML text holds: dictionaries, lists and plain values.

    Raises:
        yaml.YAMLError: if it is none, or unfolds to much more than what is written.
        RecursionError, ValueError: as PyYAML's own, for deep nesting and for values that Python refuses.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _unfolded(node) > FACTOR * len(text) + FREE:
            raise yaml.YAMLError(
                f"its aliases (*name) unfold to more than {FACTOR} times what is written; write it out"
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


def front_matter(card: Path) -> dict[str, Any]:
    """What a model card says of its model, in YAML between two lines of dashes at its beginning; nothing if
    it has no such lines.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        front = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
        data = read_yaml(front[1]) if front else {}
    except (OSError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{card} cannot be read ({next(iter(str(error).splitlines()), '')})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{card} begins with YAML that is no table of keys and values")
    return data


def _unfolded(root: yaml.Node) -> int:
    """Letters and values of a document whose aliases are written out. A node that several aliases name is
    visited once.

    Raises:
        yaml.YAMLError: if a value holds itself.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting[-1]
        parts = _parts(node)
        if id(node) in sizes:
            waiting.pop()
        elif id(node) in open_nodes:
            sizes[id(node)] = (
                1 + sum(sizes[id(part)] for part in parts) + (len(node.value) if not parts else 0)
            )
            open_nodes.discard(id(node))
            waiting.pop()
        else:
            open_nodes.add(id(node))
            if any(id(part) in open_nodes for part in parts):
                raise yaml.YAMLError("one of its values holds itself; write it out")
            waiting += [part for part in parts if id(part) not in sizes]
    return sizes[id(root)]


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
