"""A node is a dictionary with a `_target_`: the class that builds an object, and its arguments. Here nodes
become objects, or sentences about what is wrong with them. Nothing is imported that the user did not allow,
nothing heavy is loaded.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, Union, get_args, get_origin, runtime_checkable

from alignlab.rewards.undisturbed import undisturbed
from alignlab.runs.pasted import list_word

ALLOWED = ("alignlab", "torch.optim")
"""Where `_target_` may point without the user's word; of alignlab, only to the classes of these modules, and
to the functions of two:"""
PARTS = (
    "data.pairing",
    "data.prompts",
    "engine.policy",
    "engine.samplers",
    "metrics",
    "models",
    "objectives",
    "rewards",
    "training.adamw8bit",
)
FUNCTIONS = ("alignlab.training.adamw8bit", "alignlab.engine.samplers")


@runtime_checkable
class ChecksArguments(Protocol):
    """A class (of a model, a reward, a distance) that can refuse its arguments without being built, which
    would load its weights. Of another one an object is made, and thrown away."""

    def check(self, **arguments: Any) -> None:
        """Raises a ValueError or an OSError for arguments of the constructor that cannot be."""


class ConfigError(Exception):
    """For each mistake one sentence on a line of its own: the key, the value, and the mend."""


def build(node: dict[str, Any], **extra: Any) -> Any:
    """The object that a checked node describes, with those inside it; `extra` arguments are known at runtime
    only.

    Raises:
        ConfigError: for what a constructor refuses.
    """
    made = resolve(node["_target_"])
    named = _function_names(made, node)
    arguments = {k: resolve(v) if k in named else _built(v) for k, v in node.items() if k != "_target_"}
    try:
        if node["_target_"].startswith("alignlab."):
            return made(**arguments | extra)
        with undisturbed():
            return made(**arguments | extra)
    except (ValueError, OSError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except SystemExit as error:  # with code 0 the run would seem to have gone well
        raise ConfigError(_ended(node["_target_"], error)) from None


def may_build(resolved: Any, allowed: Iterable[str] = ()) -> bool:
    """Whether a configuration may call what a `_target_` led to: a class at home in PARTS, in torch.optim or
    in an allowed module, or a function of FUNCTIONS or of an allowed module. So a way through what a module
    imports (alignlab.runs.provenance.subprocess.run) ends here."""
    home = getattr(resolved, "__module__", None)
    if (
        not (inspect.isclass(resolved) or inspect.isfunction(resolved))
        or not isinstance(home, str)
        or resolved.__name__.startswith("_")
    ):
        return False
    if _within(home, allowed):
        return True
    parts = [f"alignlab.{part}" for part in PARTS]
    return _within(home, ["torch.optim", *parts]) if inspect.isclass(resolved) else home in FUNCTIONS


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules if module)


def resolve(target: str) -> Any:
    """What a dotted name names.

    Raises:
        ImportError: if there is no such module, or no such thing in it.
    """
    module, _, name = target.rpartition(".")
    try:
        with undisturbed():
            imported = importlib.import_module(module)
    except SystemExit as error:
        mend = 'write what is a script under if __name__ == "__main__":'
        raise ImportError(f"{_ended(module, error)}; {mend}") from None
    if not hasattr(imported, name):
        made = (
            n
            for n, value in vars(imported).items()
            if n[0] != "_" and _within(str(getattr(value, "__module__", "")), [module])
        )
        raise ImportError(f"{module} has no {name}; {nearest(name, made)}")
    return getattr(imported, name)


def node_problems(
    where: str,
    node: Any,
    *,
    allowed: Iterable[str] = (),
    runtime: Iterable[str] = (),
    offers: Iterable[str] = (),
) -> Iterator[str]:
    """What is wrong with the node at key `where`: inner nodes first, then its arguments, then what its
    constructor refuses.

    Constructors are run, for they are cheap; one that loads weights offers a static `check` of the same
    arguments instead, and one that needs `runtime` arguments is not run. `offers` are attributes without
    which a class is of another kind.
    """
    inner = [p for key, value in _inside(where, node) for p in node_problems(key, value, allowed=allowed)]
    problems = inner + list(_binding_problems(where, node, list(allowed), runtime, offers))
    yield from problems if problems or runtime else _construction_problems(where, node)


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _built(value: Any) -> Any:
    return (
        build(value) if _is_node(value) else [_built(v) for v in value] if isinstance(value, list) else value
    )


def _inside(where: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The nodes in a node's arguments, however deep in lists and dictionaries, by key."""
    for key, item in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        if _is_node(item):
            yield f"{where}.{key}", item
        else:
            yield from _inside(f"{where}.{key}", item)


def _binding_problems(
    where: str, node: Any, allowed: list[str], runtime: Iterable[str], offers: Iterable[str]
) -> Iterator[str]:
    """The _target_ must be allowed and exist, and take these arguments, of these types."""
    if not _is_node(node) or not isinstance(node["_target_"], str):
        yield (
            f"{where} has no _target_; choose a file of conf/ with {where.split('.')[0]}=NAME (--help lists "
            "them)"
        )
        return
    target = node["_target_"]
    if unusable := list(_name_problems(f"{where}._target_", target, allowed)):
        yield from unusable
        return
    resolved = resolve(target)
    parameters = inspect.signature(resolved).parameters
    for key in _function_names(resolved, node):
        yield from _name_problems(f"{where}.{key}", node[key], allowed)
    named = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    lacks = [key for key in runtime if key not in named and not open_ended]
    if inspect.isclass(resolved):
        lacks += [name for name in offers if not any(name in vars(kind) for kind in resolved.__mro__)]
    if lacks:
        yield (
            f"{where}._target_={target} is of another kind: it has no {lacks[0]}; choose a file of conf/ "
            f"with {where.split('.')[0]}=NAME"
        )
        return
    for key, value in node.items():
        if value == "???":
            yield f"{where}.{key} has no value; set {where}.{key}=..."
        elif key not in named and key != "_target_" and not open_ended:
            yield f"{where}.{key} is not an argument of {target}; {nearest(key, named, f'{where}.')}"
        elif key in named and not fits(value, named[key].annotation):
            remark = _what_it_is(f"{where}.{key}", value, named[key].annotation)
            yield f"{where}.{key}={value} must be {words(named[key].annotation)}{remark}"
    for key, p in named.items():
        if p.default is p.empty and key not in node and key not in runtime:
            yield f"{where}.{key} is missing, and {target} needs it; set +{where}.{key}=..."


def _name_problems(where: str, target: str, allowed: Iterable[str]) -> Iterator[str]:
    """A dotted name must be allowed, exist, and be something that a configuration may call."""
    if not target.startswith(tuple(f"{a}." for a in (*ALLOWED, *allowed) if a)):
        mend = f"if you trust it, add 'allow_targets=[{target.split('.')[0]}]'"
        yield f"{where}={target} lies outside {' and '.join(ALLOWED)}; {mend}"
        return
    try:
        resolved = resolve(target)
    except ImportError as error:
        yield f"{where}={target} cannot be imported: {error}"
        return
    if not may_build(resolved, allowed):
        yield (
            f"{where}={target} is nothing that a configuration may build; name a class of "
            f"{' or '.join(ALLOWED)} made for it"
        )


def _function_names(made: Any, node: dict[str, Any]) -> list[str]:
    """The arguments that a constructor wants as functions, and the node gives as dotted names."""
    wanted = {
        name for name, p in inspect.signature(made).parameters.items() if get_origin(p.annotation) is Callable
    }
    return [key for key, value in node.items() if key in wanted and isinstance(value, str) and value != "???"]


def _construction_problems(where: str, node: dict[str, Any]) -> Iterator[str]:
    made = resolve(node["_target_"])
    try:
        if isinstance(made, ChecksArguments):
            made.check(**{k: v for k, v in node.items() if k != "_target_"})
        else:
            build(node)
    except SystemExit as error:
        yield _ended(f"{where}._target_={node['_target_']}", error)
    except (ConfigError, ValueError, TypeError, OSError) as error:
        named_argument = (
            str(error).partition("=")[0] in node
        )  # the constructor knows its argument, not where it stands
        yield f"{where}.{error}" if named_argument else str(error)


def _ended(what: str, error: SystemExit) -> str:
    return f"{what} ends the program (sys.exit({'' if error.code is None else error.code}))"


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value can be an argument so annotated; nodes, and what this does not understand,
    pass."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return value in inner
    if kind in (Union, UnionType):
        return any(fits(value, h) for h in inner)
    if kind in (list, tuple, Sequence):
        return isinstance(value, list) and all(fits(v, inner[0]) for v in value if inner)
    if kind in (dict, Mapping):
        return isinstance(value, dict) and all(fits(v, inner[1]) for v in value.values() if inner)
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in (bool, str, NoneType) else True


def words(hint: Any) -> str:
    """A type as a user would call it."""
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(words, get_args(hint)))
    if get_origin(hint) in (list, tuple, Sequence):
        inner = [of for of in get_args(hint) if of is not Ellipsis][:1]
        return f"a list of {_MANY[inner[0]]}" if inner and inner[0] in _MANY else "a list"
    if get_origin(hint) in (dict, Mapping):
        return "a table of keys and values"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return names.get(hint) or inspect.formatannotation(hint)


_MANY = {int: "whole numbers", float: "numbers", str: "texts"}


def _what_it_is(where: str, value: Any, hint: Any) -> str:
    """What a list is, where something else is wanted; quotes make texts of numbers."""
    if not isinstance(value, list):
        return ""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    inner = [get_args(kind)[:1] for kind in kinds if (get_origin(kind) or kind) in (list, tuple, Sequence)]
    if not inner:
        return ", and this is a list"
    if inner == [(str,)]:
        return not_texts(where, value)
    return ""


def not_texts(where: str, values: Sequence[Any]) -> str:
    """What in a list is no text, and how to write it as one."""
    other = next((value for value in values if not isinstance(value, str)), None)
    if isinstance(other, (list, dict)):
        return f", and {other} is a {'list' if isinstance(other, list) else 'table'}"
    named = (
        "null" if other is None else str(other).lower() if isinstance(other, bool) else f"the number {other}"
    )
    return f", and holds {named}; as texts: {list_word(where, values)}"


def nearest(key: str, known: Iterable[str], prefix: str = "") -> str:
    """A question about the most similar known name, or all of them."""
    names = {k.lower(): k for k in known}
    close = difflib.get_close_matches(str(key).lower(), names, n=1, cutoff=0.5)
    return (
        f"did you mean {prefix}{names[close[0]]}?"
        if close
        else f"known are {', '.join(sorted(names.values()))}"
    )
