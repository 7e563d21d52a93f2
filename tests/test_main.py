"""The one word `alignlab`: its table, its commands and what is told of a word that is none."""

import subprocess
import sys
from pathlib import Path

import pytest

import alignlab
from alignlab import __main__ as one_word
from alignlab import train
from alignlab.config import outline

ROOT = Path(__file__).resolve().parents[1]


def said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """Exit code and what `alignlab WORDS` prints, in this process."""
    monkeypatch.setattr(sys, "argv", ["alignlab", *words])
    try:
        one_word.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    out, error = capsys.readouterr()
    return code, out, error


def test_alone_it_lists_every_command(monkeypatch, capsys) -> None:
    """Each file at the top of the package, with a line on it, in 80 columns."""
    code, out, _ = said(monkeypatch, capsys)
    listed = [line.split()[0] for line in out.splitlines()[2:] if not line.startswith(" " * 16)]
    files = {path.stem for path in (ROOT / "alignlab").glob("*.py") if not path.stem.startswith("__")}
    assert code == 0 and {*listed} == files - {"rewards_table"} | {"rewards"}
    assert all(len(line) <= 80 for line in out.splitlines())


def test_the_version(monkeypatch, capsys) -> None:
    """That of the package."""
    assert said(monkeypatch, capsys, "--version") == (0, f"alignlab {alignlab.__version__}\n", "")


@pytest.mark.parametrize(
    ("word", "mend"),
    [
        ("trian", "did you mean alignlab train?"),
        ("alignlab.train", "did you mean alignlab train?"),
        ("xyzzy", "known are completion, evaluate"),
        ("-m", "the command comes first: alignlab COMMAND ..."),
    ],
)
def test_a_word_that_is_no_command(word: str, mend: str, monkeypatch, capsys) -> None:
    """One sentence with the nearest, and code 2."""
    code, out, error = said(monkeypatch, capsys, word)
    assert (code, out) == (2, "") and error.startswith(f"error: {word!r} is no command; {mend}")


def test_a_command_gets_its_words(monkeypatch, capsys) -> None:
    """`alignlab train WORDS` is `python -m alignlab.train WORDS`."""
    seen: list[list[str]] = []
    monkeypatch.setattr(train, "main", lambda: seen.append(sys.argv[1:]))
    assert said(monkeypatch, capsys, "train", "algo=ddpo", "-m", "seed=0,1")[0] == 0
    assert seen == [["algo=ddpo", "-m", "seed=0,1"]]


@pytest.mark.parametrize(
    "words", [[], ["--version"], ["ls", "."], ["train", "--help"], ["__complete", "train", "a"]]
)
def test_what_needs_no_model_loads_no_torch(words: list[str]) -> None:
    """The table, the version, the list, help and completion answer without torch, which takes seconds."""
    code = (
        f"import sys; sys.argv = {['alignlab', *words]!r}\nfrom alignlab.__main__ import main\nmain()\n"
        "print('torch' in sys.modules, 'hydra' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr.split() == ["False", "False"], done.stderr
    assert done.stdout


def test_python_m_alignlab_train_help_loads_no_torch() -> None:
    """Nor does the long form, for the same answer."""
    code = "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('alignlab', run_name='__main__')"
    short = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    long = [
        subprocess.run([sys.executable, "-X", "importtime", *call], capture_output=True, text=True, cwd=ROOT)
        for call in (["-m", "alignlab.train", "--help"], ["-m", "alignlab", "train", "--help"])
    ]
    assert short.returncode == 0 and long[0].stdout == long[1].stdout
    assert all(" torch\n" not in done.stderr and done.returncode == 0 for done in long)


def test_the_console_script_is_declared() -> None:
    """pip makes `alignlab` of it."""
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"alignlab": "alignlab.__main__:main"}
    assert [*outline.commands()] == sorted(outline.names())
