"""`python -m alignlab` lists the commands, each with what it is for."""

import ast
import re
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent


NAMES = {"rewards_table": "rewards"}
"""What is typed for a file of another name."""


def commands() -> dict[str, str]:
    """What can be typed after `python -m alignlab.`, with the first sentence on it in the file's own
    words."""
    sentences = {}
    for path in sorted(HERE.glob("*.py")):
        if not path.stem.startswith("__"):
            _, _, about = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")
            sentence = re.split(r"(?<=[a-z)])[.:;] ", " ".join(about.split()), maxsplit=1)[0].rstrip(".")
            sentences[NAMES.get(path.stem, path.stem)] = sentence
    return sentences


def main() -> None:
    """Prints the table."""
    print("python -m alignlab.COMMAND, each with --help:\n")
    for name, sentence in commands().items():
        print(textwrap.fill(sentence, 100, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16))


if __name__ == "__main__":
    main()
