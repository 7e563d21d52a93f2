"""What can be typed, read from the source and from conf/ without running either: commands, groups, keys,
their defaults and what they mean.

Help and completion must answer at once, and importing a command loads torch, for seconds. So a command's
dataclass is read as text, and so are the classes that `_target_` names. The values are put together as Hydra
would, but for references: tests/config/test_outline.py holds the two against each other.

A docstring under a key, or the entry of an argument under `Args:`, may end in brackets: the unit of a number,
`[images]`, or the words that a text may be, `[constant | linear | cosine]`.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from alignlab.files.bounded_yaml import read_yaml

HERE = Path(__file__).resolve().parents[1]  # alignlab/
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"  # in a wheel, or in a checkout
NAMES = {"rewards_table": "rewards"}
"""What is typed for a file of another name."""
WEIGHING = {
    "weight": "Factor of this reward in the weighted sum. [per unit of the reward]",
    "normalize": "Divide by the deviation on the base model's images, after taking off their mean.",
}
"""Keys of every reward, which are no arguments of its class."""
LISTED = ("reward", "eval_rewards")
"""Groups of which several options can be chosen."""


@dataclass(frozen=True)
class Key:
    """One key of a command, or one argument of a class."""

    name: str
    kind: str
    """Its annotation, as it is written."""
    default: Any = None
    meaning: str = ""
    unit: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A file at the top of the package."""

    name: str
    """As it is typed."""
    file: str
    """The module's name."""
    about: str
    """The first sentence on it."""
    schema: str = ""
    """The dataclass of its keys; empty for a command that takes no keys."""


@dataclass
class Outline:
    """What a command takes, with the options that its words choose."""

    command: Command
    keys: list[Key]
    """Of its dataclass; those that are groups too."""
    groups: dict[str, list[str]]
    """What may be chosen, by group."""
    chosen: dict[str, list[str]]
    """What is chosen, by group."""
    values: dict[str, Any] = field(default_factory=dict)
    """The default of every key, the groups' included."""
    comments: dict[str, dict[str, str]] = field(default_factory=dict)
    """Remarks beside the keys of each group's files."""

    def inner(self, group: str) -> list[Key]:
        """The keys below a group's, with dots."""
        found = [*_inner(group, self.values.get(group), self.comments.get(group, {}))]
        own = next((key for key in self.keys if key.name == group), None)
        if own is not None and _class_of(own, self.command) is not None:
            found = [replace(key, name=f"{group}.{key.name}") for key in _nested(own, self.command)]
            given = self.values.get(group)
            its = given if isinstance(given, dict) else {}
            found = [replace(key, default=its.get(key.name.rpartition(".")[2], key.default)) for key in found]
        return found

    def all_keys(self) -> list[Key]:
        """The keys at the top, then those of the groups."""
        tables = [key.name for key in self.keys if self.is_table(key)]
        top = [replace(key, default=self.values.get(key.name, key.default)) for key in self.keys]
        return [
            *(key for key in top if key.name not in tables),
            *(key for name in tables for key in self.inner(name)),
        ]

    def is_table(self, key: Key) -> bool:
        """Whether a key stands for a table of keys: a group, or a nested dataclass."""
        return (
            key.name in self.groups
            or _class_of(key, self.command) is not None
            or isinstance(self.values.get(key.name), dict)
        )


def names() -> dict[str, str]:
    """The commands by what is typed for them, each with its file at the top of the package."""
    files = [path.stem for path in sorted(HERE.glob("*.py")) if not path.stem.startswith("__")]
    return {NAMES.get(file, file): file for file in files}


def commands() -> dict[str, Command]:
    """The same, read."""
    return {name: command_of(file) for name, file in names().items()}


@cache
def command_of(file: str) -> Command:
    """The command of a file at the top of the package."""
    tree = _tree(f"alignlab.{file}")
    _, _, about = (ast.get_docstring(tree) or "").partition("\n\n")
    sentence = re.split(r"(?<=[a-z)])[.:;] ", " ".join(about.split()), maxsplit=1)[0].rstrip(".")
    calls = [
        decorator
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "command"
    ]
    schema = ""
    for call in calls:
        named = {word.arg: word.value for word in call.keywords}
        schema = getattr(named.get("schema"), "id", "TrainConfig")
    return Command(NAMES.get(file, file), file, sentence, schema)


def outline(command: Command, words: Sequence[str] = (), folders: Sequence[Path] = ()) -> Outline:
    """What a command takes.

    Args:
        command: one that has keys.
        words: those that are typed; a `group=option` among them chooses.
        folders: the user's own, which hold groups as conf/ does (--config-dir).
    """
    places = [CONF, *folders]
    primary = primary_file(command)
    keys = _fields(f"alignlab.{command.file}", command.schema)
    listed = [entry for entry in primary.get("defaults", []) if isinstance(entry, dict)]
    default = {name: _names(option) for entry in listed for name, option in entry.items()}
    groups = {name: options(name, places) for name in default}
    typed = {
        key: _names(value)
        for key, equals, value in (word.partition("=") for word in words)
        if equals and key in groups
    }
    chosen = {**default, **typed}
    for option in chosen.get("experiment", []):
        for name, option_names in _overridden(option, places).items():
            if name in chosen and name not in typed:
                chosen[name] = option_names
    its = Outline(command, keys, groups, chosen)
    its.values = {key.name: key.default for key in keys}
    for name in [key.name for key in keys if _class_of(key, command) is not None]:
        own = next(key for key in keys if key.name == name)
        its.values[name] = {key.name: key.default for key in _nested(own, command)}
    for entry in primary.get("defaults", []):
        for name in entry if isinstance(entry, dict) else [entry]:
            if name == "_self_":
                own_values = {k: v for k, v in primary.items() if k not in ("defaults", "hydra")}
                _merge(its.values, own_values)
            for option in chosen.get(name, []):
                _take(its, name, option, places)
    return its


def module_docstring(command: Command) -> str:
    """What a command's file says of itself."""
    return ast.get_docstring(_tree(f"alignlab.{command.file}")) or ""


def primary_file(command: Command) -> dict[str, Any]:
    """conf/COMMAND.yaml."""
    return _table(CONF / f"{command.name}.yaml")


def options(group: str, places: Sequence[Path] = (CONF,)) -> list[str]:
    """The options of a group, by name; those in a folder of it are named with the folder."""
    found = set()
    for place in places:
        home = place / ("reward" if group == "eval_rewards" and place == CONF else group)
        found |= {str(path.relative_to(home).with_suffix("")) for path in home.glob("**/*.yaml")}
    return sorted(found)


def own_folders(words: Sequence[str]) -> list[Path]:
    """The folders of configuration files that a command line names: --config-dir, and hydra.searchpath."""
    found = []
    for k, word in enumerate(words):
        if word in ("--config-dir", "-cd"):
            found += list(words[k + 1 : k + 2])
        elif word.startswith("--config-dir="):
            found.append(word.partition("=")[2])
        elif word.startswith("hydra.searchpath="):
            listed = word.partition("=")[2].strip("[]").split(",")
            found += [place.strip("\"' ").removeprefix("file://") for place in listed]
    return [path for path in map(Path, found) if path.is_dir()]


def about_option(group: str, option: str, places: Sequence[Path] = (CONF,)) -> str:
    """What the first lines of an option's file say of it: its first sentence."""
    path = _file(group, option, places)
    lines = [] if path is None else _text(path).splitlines()
    said = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith(("# @", "# python -m")):
            said.append(line.lstrip("# "))
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(said))[0]


# -- how Hydra puts a configuration together


def _take(its: Outline, group: str, option: str, places: Sequence[Path]) -> None:
    """Merges an option's file, and those that it stands on."""
    path = _file(group, option, places)
    if path is None:
        return
    table, text = _table(path), _text(path)
    for entry in table.get("defaults", []):
        if isinstance(entry, str) and entry.startswith("/"):
            above, _, name = entry[1:].partition("/")
            _take(its, above, name, places)
        elif isinstance(entry, str) and entry != "_self_":
            _take(its, group, entry, places)
    content = {k: v for k, v in table.items() if k not in ("defaults", "hydra")}
    spread = "@package _global_" in text.partition("\n")[0]
    if spread:
        _merge(its.values, content)
    else:
        node = its.values.get(group)
        its.values[group] = node if isinstance(node, dict) else {}
        _merge(its.values[group], content)
    remarks = its.comments.setdefault(group, {})
    remarks |= dict(re.findall(r"^ *(\w+):[^#\n]* #  ?(.+)$", text, re.MULTILINE))


def _overridden(option: str, places: Sequence[Path]) -> dict[str, list[str]]:
    """The options of other groups that an experiment chooses, by group; its own words win over those of the
    experiments that it stands on."""
    path = _file("experiment", option, places)
    found: dict[str, list[str]] = {}
    own: dict[str, list[str]] = {}
    for entry in _table(path).get("defaults", []) if path else ():
        if isinstance(entry, str) and entry.startswith("/experiment/"):
            found |= _overridden(entry.removeprefix("/experiment/"), places)
        elif isinstance(entry, dict):
            own |= {k.removeprefix("override").strip(" /"): _names(v) for k, v in entry.items()}
    return found | own


def _merge(into: dict[str, Any], table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = _copied(value)


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


def _names(option: Any) -> list[str]:
    """The options that a value names: none, one, or several between brackets."""
    if isinstance(option, list):
        return [str(name) for name in option]
    if option is None or option == "null":
        return []
    text = str(option).strip("\"'")
    return [name.strip() for name in text.strip("[]").split(",") if name.strip()]


def _file(group: str, option: str, places: Sequence[Path]) -> Path | None:
    for place in places:
        home = place / ("reward" if group == "eval_rewards" and place == CONF else group)
        path = home / f"{option}.yaml"
        if path.is_file():
            return path
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _table(path: Path) -> dict[str, Any]:
    """What a file of conf/, or of a user's own, holds; nothing if it is none, which Hydra says better."""
    try:
        read = _read(_text(path))
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(read, dict) or not isinstance(read.get("defaults", []), list):
        return {}
    return {str(key): value for key, value in read.items()}


@cache
def _read(text: str) -> Any:
    return read_yaml(text)


# -- what a source file says of its classes


@cache
def _tree(module: str) -> ast.Module:
    path = HERE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")


def _defined(module: str, name: str) -> tuple[str, ast.stmt] | None:
    """Where a name of a module comes from in this package, followed through imports; None if it does not."""
    if module != "alignlab" and not module.startswith("alignlab."):
        return None
    for node in _tree(module).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == name for t in node.targets):
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _defined(node.module, alias.name)
    return None


def _fields(module: str, name: str) -> list[Key]:
    """The keys of a dataclass, those of the classes above it first."""
    home, node = _defined(module, name) or (module, None)
    if not isinstance(node, ast.ClassDef):
        return []
    keys: dict[str, Key] = {}
    for base in node.bases:
        keys |= {key.name: key for key in _fields(home, getattr(base, "id", ""))}
    for here, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name):
            said = after.value if isinstance(after, ast.Expr) else None
            text = said.value if isinstance(said, ast.Constant) and isinstance(said.value, str) else ""
            key = here.target.id
            keys[key] = _key(key, ast.unparse(here.annotation), _default(home, here.value), text)
    return list(keys.values())


def _class_of(key: Key, command: Command) -> str | None:
    """The dataclass that a key holds; None if it is none."""
    found = _defined(f"alignlab.{command.file}", command.schema)
    home = found[0] if found else ""
    # a key of the class above is annotated where that class is
    for module in (home, "alignlab.config.schema"):
        its = _defined(module, key.kind)
        if its and isinstance(its[1], ast.ClassDef) and _is_keys(*its):
            return f"{its[0]}.{key.kind}"
    return None


def _is_keys(module: str, node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "Keys" for base in node.bases)


def _nested(key: Key, command: Command) -> list[Key]:
    module, _, name = (_class_of(key, command) or "").rpartition(".")
    return _fields(module, name)


def _inner(where: str, node: Any, remarks: Mapping[str, str]) -> Iterator[Key]:
    """The keys of a node and of those in it: what stands in the files, with what its class says of it."""
    if not isinstance(node, dict):
        return
    target = node.get("_target_")
    arguments = {key.name: key for key in _arguments(str(target or ""))}
    for name, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            yield from _inner(f"{where}.{name}", value, remarks)
        elif target and name != "_target_":
            key = arguments.get(name) or _key(name, _kind_of(value), None, WEIGHING.get(name, ""))
            if not key.meaning and name in remarks:
                key = _key(name, key.kind, None, remarks[name])
            yield replace(key, name=f"{where}.{name}", default=value)


def _kind_of(value: Any) -> str:
    """The annotation of a value whose class says none; a reference may be anything."""
    reference = value is None or (isinstance(value, str) and "${" in value)
    return "Any" if reference else type(value).__name__


@cache
def _arguments(target: str) -> list[Key]:
    """The arguments of a class or a function, with what its docstring says of each under `Args:`."""
    module, _, name = target.rpartition(".")
    found = _defined(module, name)
    if found is None:
        return []
    home, node = found
    if isinstance(node, ast.FunctionDef):
        return _parameters(home, node, _entries(ast.get_docstring(node) or ""))
    if not isinstance(node, ast.ClassDef):
        return []
    above = [_arguments(f"{home}.{base.id}") for base in node.bases if isinstance(base, ast.Name)]
    said = {key.name: key for keys in above for key in keys}
    entries = _entries(ast.get_docstring(node) or "")
    made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    if not made:
        own = {key.name: key for key in _fields(home, name)}
        return [
            _key(key.name, key.kind, key.default, entries[key.name]) if key.name in entries else key
            for key in (said | own).values()
        ]
    keys = _parameters(home, made[0], entries)
    return [said[key.name] if not key.meaning and key.name in said else key for key in keys]


def _parameters(module: str, node: ast.FunctionDef, entries: Mapping[str, str]) -> list[Key]:
    found = []
    plain, defaults = node.args.args, node.args.defaults
    ends = dict(zip([a.arg for a in plain[len(plain) - len(defaults) :]], defaults, strict=True))
    ends |= {a.arg: v for a, v in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if v}
    for argument in (*plain, *node.args.kwonlyargs):
        if argument.arg != "self":
            kind = ast.unparse(argument.annotation) if argument.annotation else ""
            text = _followed(module, argument.arg, entries.get(argument.arg, ""))
            found.append(_key(argument.arg, kind, _default(module, ends.get(argument.arg)), text))
    return found


def _followed(module: str, argument: str, text: str) -> str:
    """What another class says of its argument of the same name, where a text only names that class: "of the
    `Vlm`"."""
    match = re.match(r"(?:of|as) (?:those of |the |an? )?`([\w.]+)`", text)
    home, _, name = match[1].rpartition(".") if match else ("", "", "")
    its = _defined(home or module, name) if name else None
    if its is None or not isinstance(its[1], ast.ClassDef):
        return text
    return _entries(ast.get_docstring(its[1]) or "").get(argument, text)


def _entries(docstring: str) -> dict[str, str]:
    """What stands under `Args:`, by argument."""
    _, _, under = docstring.partition("Args:\n")
    block = re.split(r"\n\s*\n", under)[0]
    found = {}
    for names, text in re.findall(r"^    ([\w, ]+): (.*(?:\n     +.*)*)", block, re.MULTILINE):
        for name in names.split(","):
            found[name.strip()] = " ".join(text.split())
    return found


def _key(name: str, kind: str, default: Any, text: str) -> Key:
    """A key whose text may end in brackets."""
    text = " ".join(text.split())
    match = re.fullmatch(r"(.*?)\s*\[([^\[\]]*)\]", text)
    meaning, tail = (match[1], match[2]) if match else (text, "")
    choices = tuple(word.strip() for word in tail.split("|")) if "|" in tail else ()
    literal = re.findall(r"Literal\[(.*?)\]", kind)
    if literal:
        choices = tuple(str(value) for part in literal for value in ast.literal_eval(f"({part},)"))
    unit = "" if "|" in tail else tail
    return Key(name, kind, default, meaning, unit, choices)


def _default(module: str, node: ast.expr | None) -> Any:
    """The value of a default, as far as it is written plainly."""
    if node is None:
        return None
    if isinstance(node, ast.Call):
        made = next((word.value for word in node.keywords if word.arg == "default_factory"), None)
        return {"list": [], "dict": {}}.get(getattr(made, "id", ""))
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = node.id if isinstance(node, ast.Name) else node.attr
        found = _defined(module, name)
        return _default(found[0], found[1].value) if found and isinstance(found[1], ast.Assign) else None
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return list(value) if isinstance(value, tuple) else value
