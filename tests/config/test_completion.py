"""What Tab completes, in Python and in real shells."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignlab.config.completion import SCRIPTS, candidates
from alignlab.config.compose import CONF

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (["tr"], ["train", "train_reward"]),
        (["train", "alg"], ["algo=", "algo."]),
        (["train", "algo.est"], []),
        (["train", "algo=ddpo", "algo.est"], ["algo.estimator="]),
        (["train", "algo=ddpo", "algo.estimator="], ["algo.estimator=sf", "algo.estimator=is"]),
        (["train", "lr_schedule="], [f"lr_schedule={word}" for word in ("constant", "linear", "cosine")]),
        (["train", "compile="], ["compile=true", "compile=false"]),
        (["train", "tracking.p"], ["tracking.project="]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["xyzzy", ""], []),
    ],
)
def test_what_completes(words: list[str], some: list[str]) -> None:
    """Commands, keys with those of the chosen options, and the words that a key may be."""
    assert {*candidates(words)} == {*some}


def test_options_of_a_group() -> None:
    """Each file of conf/, also after a comma and in a list."""
    files = {path.stem for path in (CONF / "reward").glob("*.yaml")}
    assert {word.removeprefix("reward=") for word in candidates(["train", "reward="])} == files
    assert "reward=[clip,brightness" in candidates(["train", "reward=[clip,br"])
    assert candidates(["train", "seed=0", "algo=rw"]) == ["algo=rwr"]


def test_your_own_configuration_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of --config-dir."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_conf" / "algo").mkdir(parents=True)
    (tmp_path / "my_conf" / "algo" / "cautious.yaml").write_text("# mine\n")
    assert candidates(["train", "--config-dir", "my_conf", "algo=cau"]) == ["algo=cautious"]
    assert candidates(["train", "--config-dir", "my"]) == ["my_conf/"]


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a key is a path; names that a shell would read are left out."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/one", "runs/two", "runs/a $(touch x)"):
        (tmp_path / name).mkdir(parents=True)
    assert candidates(["evaluate", "run="]) == ["run=last", "run=runs/"]
    assert candidates(["evaluate", "run=runs/"]) == ["run=runs/one/", "run=runs/two/"]


def alignlab_on_path(folder: Path) -> dict[str, str]:
    """An environment in which `alignlab` is this checkout's."""
    script = folder / "bin" / "alignlab"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m alignlab "$@"\n')
    script.chmod(0o755)
    return os.environ | {
        "PATH": f"{script.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
    }


ASK = {
    "bash": """source {file}
        COMP_LINE='alignlab train algo=ddpo lr_schedule=co'; COMP_POINT=${{#COMP_LINE}}
        _alignlab alignlab; printf '%s\\n' "${{COMPREPLY[@]}}" """,
    "zsh": """compdef() {{ : }}; compadd() {{ [[ $1 == -S ]] && shift 2; shift; print -l -- "$@" }}
        source {file}
        words=(alignlab train algo=ddpo lr_schedule=co); CURRENT=4; _alignlab""",
    "fish": """source {file}; complete -C 'alignlab train algo=ddpo lr_schedule=co'""",
}


@pytest.mark.parametrize("shell", ASK)
def test_a_real_shell(shell: str, tmp_path: Path) -> None:
    """It reads the script, asks for the words and offers them; bash gets what stands after the =."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    file, environment = tmp_path / "script", alignlab_on_path(tmp_path)
    printed = subprocess.run(
        ["alignlab", "completion", shell], env=environment, capture_output=True, text=True
    )
    assert printed.stdout == SCRIPTS[shell]
    file.write_text(printed.stdout)
    asked = [shell, "-c", ASK[shell].format(file=file)]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, cwd=tmp_path)
    whole = {"lr_schedule=constant", "lr_schedule=cosine"}
    expected = {word.partition("=")[2] for word in whole} if shell == "bash" else whole
    assert {*done.stdout.split()} == expected, done.stderr


@pytest.mark.parametrize("words", [[], ["tcsh"], ["bash", "zsh"]])
def test_a_shell_that_there_is_not(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One sentence, code 2."""
    from alignlab import completion

    monkeypatch.setattr(sys, "argv", ["alignlab completion", *words])
    with pytest.raises(SystemExit) as end:
        completion.main()
    assert end.value.code == 2 and "name one shell, bash, zsh, fish" in capsys.readouterr().err
