"""Writes the functions that documentation pages show into the pages, from the source files.

    python scripts/snippets.py             # README.md and docs; make snippets
    python scripts/snippets.py --check     # writes nothing, and names the pages that are behind the code

A page marks a block by a comment, and the block below it is the script's:

    <!-- snippet: alignlab/engine/samplers.py Sampler.mean Sampler.draw -->
    <!-- snippet: alignlab/objectives/sft.py SFT.loss until third = -->

The functions and methods are shown one after another, without their docstrings. `until TEXT` ends them before
the first line that begins so.
"""

import argparse
import ast
import re
import sys
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(
    r"^(?P<mark><!-- snippet: (?P<file>\S+) (?P<names>.+?)(?: until (?P<end>.+?))? -->)\n"
    r"(?:```python\n(?s:.*?)^```\n)?",
    re.MULTILINE,
)


def source(file: str, name: str) -> tuple[list[str], list[str]]:
    """The head of a method's class, and the lines of the function (or of the method, as Class.method) without
    its docstring. They are indented as in the file, so that a formatter leaves them alone.

    Raises:
        ValueError: if the file has no such function.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    lines, header = text.splitlines(), list[str]()
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        if isinstance(node, ast.ClassDef):
            header = [line for line in lines[node.lineno - 1 : node.body[0].lineno - 1] if line.strip()]
        inner = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part]
        if not inner:
            raise ValueError(f"{file} has no {name}")
        node = inner[0]
    if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
        raise ValueError(f"{name} of {file} is no function")
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    described = node.body[0]
    if ast.get_docstring(node) is None or described.end_lineno is None:
        return header, lines[first : node.end_lineno]
    return header, lines[first : described.lineno - 1] + lines[described.end_lineno : node.end_lineno]


def code(file: str, names: list[str], end: str | None) -> list[str]:
    """The lines of a block.

    Raises:
        ValueError: if a function is gone, or the line that ends the block.
    """
    out: list[str] = []
    last = None
    for name in names:
        header, lines = source(file, name)
        apart = ["", "", *header] if header != last or not header else [""]
        out += [*(apart if out else header), *lines]
        last = header
    if end is None:
        return out
    kept = [*takewhile(lambda line: not line.strip().startswith(end), out)]
    if kept == out:
        raise ValueError(f"no line of {' '.join(names)} begins with {end}")
    return [*kept, "        ..." if last else "    ..."]


def written(page: str) -> str:
    """The text of a page, with its blocks as the code is now."""

    def block(match: re.Match[str]) -> str:
        lines = code(match["file"], match["names"].split(), match["end"])
        return "\n".join([match["mark"], "```python", *lines, "```", ""])

    return MARK.sub(block, page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, help="README.md and all of docs if none is named")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    behind = False
    for path in args.pages or [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        try:
            after = written(before)
        except ValueError as error:
            sys.exit(f"{path}: {error}")
        if after == before:
            continue
        behind = True
        if not args.check:
            path.write_text(after, encoding="utf-8")
        print(f"{path}: {'is behind the code; run python scripts/snippets.py' if args.check else 'written'}")
    sys.exit(behind and args.check)


if __name__ == "__main__":
    main()
