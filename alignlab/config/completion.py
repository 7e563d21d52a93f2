"""What a shell may complete a line of `alignlab` to, at once: commands, keys, options of groups, the words
that a key may be, folders.

The scripts for bash, zsh and fish hand the words typed so far to `alignlab __complete`, and take what it
prints: a line for each way to go on, whole words. Names come from the source and conf/ (outline.py). A file
name with letters that a shell would read is left out: what is completed is typed without quotes.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignlab.config.help import FLAGS
from alignlab.config.outline import CONF, Key, command_of, names, options, outline, own_folders
from alignlab.config.path_keys import is_path

SHELLS = ("bash", "zsh", "fish")
OPTIONS = ("-m", "--multirun", "--help", "--cfg", "--config-dir", "--hydra-help")
"""What stands among a command's keys without being one."""
LAUNCHERS = ("submitit_local",)
"""Hydra's own, beside those of conf/hydra/launcher."""
PLAIN = re.compile(r"[\w./,=+@%:~\[\]{}-]+")
"""Letters that no shell reads in another way within a word."""
MOST = 500
"""Candidates that a shell is shown."""


def candidates(words: Sequence[str]) -> list[str]:
    """The words that the last one may become.

    Args:
        words: those after `alignlab`, the last one as far as it is typed.
    """
    *before, word = words or [""]
    if not before:
        return [name for name in (*names(), "--help", "--version") if name.startswith(word)]
    name, *typed = before
    if name not in names():
        return []
    its = command_of(names()[name])
    if not its.schema:
        found = SHELLS if name == "completion" else [*_paths(word, folders_only=True), "--all", *FLAGS]
    elif typed[-1:] in (["--config-dir"], ["-cd"]):
        found = [*_paths(word, folders_only=True)]
    elif typed[-1:] == ["--cfg"]:
        found = ["job", "hydra", "all"]
    elif word.startswith("-"):
        found = [*OPTIONS]
    else:
        found = [*_of_a_command(name, typed, word)]
    fit = [one for one in dict.fromkeys(found) if one.startswith(word) and PLAIN.fullmatch(one)]
    return fit[:MOST]


def _of_a_command(name: str, typed: Sequence[str], word: str) -> Iterator[str]:
    """Keys as far as their next dot, or the values of a key that is typed whole."""
    folders = own_folders(typed)
    its = outline(command_of(names()[name]), typed, folders)
    key, equals, value = word.partition("=")
    if not equals:
        every = [one.name for one in its.all_keys()]
        yield from (f"{one}=" for one in (*its.groups, "hydra/launcher") if "." not in word)
        for one in every:
            rest = one[len(word) :].find(".") if one.startswith(word) else -1
            yield f"{one}=" if rest < 0 else one[: len(word) + rest + 1]
        return
    # after a comma, or in a list, the next value begins
    start = max(value.rfind(","), value.rfind("["), value.rfind("|")) + 1
    head, last = f"{key}={value[:start]}", value[start:]
    if key == "hydra/launcher":
        yield from (head + one for one in (*options("hydra/launcher"), *LAUNCHERS))
    elif key in its.groups:
        yield from (head + one for one in options(key, [CONF, *folders]))
    else:
        known = {one.name: one for one in its.all_keys()}
        yield from (head + one for one in _values(key.lstrip("+"), known.get(key.lstrip("+")), last))


def _values(name: str, key: Key | None, typed: str) -> Iterator[str]:
    if key is not None and key.choices:
        yield from key.choices
    elif key is not None and key.kind.partition(" ")[0] == "bool":
        yield from ("true", "false")
    if is_path(name):
        if name in LAST and "/" not in typed:
            yield "last"
        yield from _paths(typed, folders_only=name in LAST)


LAST = ("run", "runs", "resume", "init_from", "again")
"""Keys that take the word `last` (newest.py)."""


def _paths(typed: str, *, folders_only: bool = False) -> Iterator[str]:
    """The entries of a folder that a path may go on with; folders end in a slash."""
    above = typed[: typed.rfind("/") + 1]
    try:
        with os.scandir(Path(above or ".").expanduser()) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except (OSError, ValueError, RuntimeError):  # not there, NUL, no such user
        return
    hidden = typed[len(above) :].startswith(".")
    for entry in listed:
        if entry.name.startswith(".") and not hidden:
            continue
        if entry.is_dir():
            yield f"{above}{entry.name}/"
        elif not folders_only:
            yield above + entry.name


SCRIPTS = {
    "bash": """\
# alignlab completion bash
_alignlab() {
    local line=${COMP_LINE:0:COMP_POINT} word whole
    local -a words
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    whole=${words[${#words[@]}-1]}
    COMPREPLY=()
    while IFS= read -r word; do
        [[ -z $word ]] && continue
        # bash replaces what stands after the last = only
        [[ $whole == *=* && $COMP_WORDBREAKS == *=* ]] && word=${word#"${whole%=*}="}
        COMPREPLY+=("$word")
    done < <("$1" __complete "${words[@]:1}" 2>/dev/null)
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/.] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -F _alignlab alignlab
""",
    "zsh": """\
#compdef alignlab
# alignlab completion zsh
_alignlab() {
    local -a found open closed
    found=("${(@f)$("$words[1]" __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=(${found:#})
    open=(${(M)found:#*[=/.]})
    closed=(${found:#*[=/.]})
    (( $#open )) && compadd -S '' -- $open
    (( $#closed )) && compadd -- $closed
    (( $#found ))
}
if [[ $funcstack[1] == _alignlab ]]; then
    _alignlab "$@"
else
    compdef _alignlab alignlab
fi
""",
    "fish": """\
# alignlab completion fish
function __alignlab_complete
    set -l words (commandline -opc) (commandline -ct)
    command $words[1] __complete $words[2..-1] 2>/dev/null
end
complete -c alignlab -f -a '(__alignlab_complete)'
""",
}
"""What `alignlab completion SHELL` prints, for the shell to read."""
