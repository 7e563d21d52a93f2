"""Measures how the house reads: what `ls alignlab` shows, how much must be read, and how dense the lines are.

    make house                                 this checkout
    python scripts/house.py COMMIT             beside another commit
    python scripts/house.py --suite            collects the tests too (some seconds)

The numbers are signs and not goals: code that is folded to lower one of them reads worse.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONG, DEEP, WIDE = 60, 20, 110
"""Lines of a function, its cyclomatic complexity, and characters of a line: what is above is counted."""
CORE = ("samplers", "policy", "rollout", "train")
"""The files that are read with an objective, wherever they lie."""
BRANCHES = (
    ast.If,
    ast.For,
    ast.While,
    ast.IfExp,
    ast.ExceptHandler,
    ast.Assert,
    ast.comprehension,
    ast.match_case,
)


def modules(package: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path], *, lazily: bool) -> set[str]:
    """The modules of the package that a file imports; `lazily` also those inside of functions."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazily else iter(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in known}


def reached(start: set[str], known: dict[str, Path], *, lazily: bool = False) -> set[str]:
    """The modules that are read if every import of the package is followed."""
    seen, coming = set[str](), set(start)
    while coming:
        name = coming.pop()
        seen.add(name)
        coming |= imported(known[name], known, lazily=lazily) - seen
    return seen


def lines(names: set[str], known: dict[str, Path]) -> int:
    """Lines of these modules, comments and all."""
    return sum(len(known[name].read_text().splitlines()) for name in names)


def complexity(function: ast.AST) -> int:
    """Cyclomatic complexity: one, and one more for each branch and each further operand of `and` and `or`."""
    branches = sum(isinstance(node, BRANCHES) for node in ast.walk(function))
    return (
        1
        + branches
        + sum(len(node.values) - 1 for node in ast.walk(function) if isinstance(node, ast.BoolOp))
    )


def functions(known: dict[str, Path]) -> Iterator[tuple[str, int, int]]:
    """Name, lines and complexity of every function."""
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield (
                    f"{name}.{node.name}",
                    (node.end_lineno or node.lineno) - node.lineno + 1,
                    complexity(node),
                )


def comments(text: str) -> int:
    """Lines that are a comment and nothing else."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and token.line.lstrip().startswith("#") for token in tokens)


def measured(root: Path) -> dict[str, str]:
    """Every sign of one checkout, in words."""
    package = root / "alignlab"
    known = modules(package)
    text = {name: path.read_text() for name, path in known.items()}
    filled = [line for one in text.values() for line in one.splitlines() if line.strip()]
    every = list(functions(known))
    signs = {
        "entries of `ls alignlab`": str(
            sum(1 for path in package.iterdir() if not path.name.startswith("__"))
        )
    }
    for algorithm in ("ddpo", "draft"):
        objective = f"alignlab.objectives.{algorithm}"
        core = {name for name in known if re.sub(r"^alignlab\.(engine\.)?", "", name) in CORE} | {objective}
        inner = {name for name in core if name != "alignlab.train"}
        whole = reached({"alignlab.train", objective, "alignlab.models.sd", "alignlab.rewards.clip"}, known)
        counts = [lines(core, known), lines(reached(inner, known), known), lines(whole, known)]
        signs[f"lines to read for {algorithm}: core, with all imports, a whole run"] = ", ".join(
            f"{n:,}" for n in counts
        )
    signs[f"functions over {LONG} lines"] = str(sum(length > LONG for _, length, _ in every))
    signs[f"functions over complexity {DEEP}"] = str(sum(branches > DEEP for *_, branches in every))
    signs["characters a line that is not blank"] = f"{sum(map(len, filled)) / len(filled):.1f}"
    signs[f"lines over {WIDE} characters"] = f"{sum(len(line) > WIDE for line in filled)} of {len(filled):,}"
    signs["lines that are comments"] = f"{sum(map(comments, text.values())) / len(filled):.1%}"
    reads = sum(len(re.findall(r"\bc\[\"|\bc\.get\(\"", one)) for one in text.values())
    signs["places that read an untyped configuration"] = str(reads)
    return signs


def collected(root: Path) -> str:
    """How many tests pytest collects."""
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q"], cwd=root, capture_output=True, text=True
    )
    return next((line for line in reversed(said.stdout.splitlines()) if "tests" in line), "not collected")


def main() -> None:
    """Prints a table of the signs, of one checkout or of two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("commit", nargs="?", help="another commit to measure beside this checkout")
    parser.add_argument("--suite", action="store_true", help="collect the tests too")
    asked = parser.parse_args()
    columns = [("now", measured(ROOT))]
    if asked.suite:
        columns[0][1]["tests"] = collected(ROOT)
    if asked.commit:
        with tempfile.TemporaryDirectory() as home:
            tree = Path(home) / "tree"
            subprocess.run(
                ["git", "worktree", "add", "-q", "--detach", tree, asked.commit], cwd=ROOT, check=True
            )
            try:
                columns.insert(0, (asked.commit, measured(tree)))
            finally:
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    print(f"| | {' | '.join(name for name, _ in columns)} |\n|---|{'---|' * len(columns)}")
    for sign in columns[-1][1]:
        print(f"| {sign} | {' | '.join(signs.get(sign, '') for _, signs in columns)} |")


if __name__ == "__main__":
    main()
