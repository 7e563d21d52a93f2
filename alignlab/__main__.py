"""`alignlab COMMAND ...` and `python -m alignlab COMMAND ...`; without a command, a table of the commands.

`python -m alignlab.COMMAND ...` does the same, and is what printed commands and launchers use.
"""

import difflib
import sys
import textwrap
from importlib import import_module

import alignlab
from alignlab.config import completion, help, outline
from alignlab.fast import spin_shortly

COMPLETE = "__complete"
"""What the shells' completion scripts call."""


def main() -> None:
    """Runs the command that the first word names. An unknown one ends the process with code 2."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in help.FLAGS:
        help.show(table())
    elif name in ("--version", "-V"):
        print(f"alignlab {alignlab.__version__}")
    elif name == COMPLETE:
        help.show("\n".join(completion.candidates(words)))
    elif name not in outline.names():
        sys.exit(unknown(name))
    elif help.wanted(words):
        help.show(help.text(name, words))
    else:
        spin_shortly(is_command=True)  # the console script is no `python -m`, and torch is not loaded yet
        sys.argv[1:] = words
        import_module(f"alignlab.{outline.names()[name]}").main()


def table() -> str:
    """The commands, each with what it is for."""
    lines = ["alignlab COMMAND key=value ..., each with --help:", ""]
    for name, command in outline.commands().items():
        lines += textwrap.wrap(command.about, 80, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16)
    return "\n".join(lines)


def unknown(name: str) -> int:
    """Says that there is no such command, and which is the nearest; the exit code."""
    known = outline.names()
    close = difflib.get_close_matches(name.removeprefix("alignlab."), known, n=1, cutoff=0.5)
    if name.startswith("-"):
        mend = "the command comes first: alignlab COMMAND ..."
    else:
        mend = f"did you mean alignlab {close[0]}?" if close else f"known are {', '.join(known)}"
    print(f"error: {name!r} is no command; {mend}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
