"""A disk that takes no more while a command writes its results: a sentence, exit code 2, and what was there
before is whole.

The system itself refuses to write: RLIMIT_FSIZE bounds the size of every file that this process makes, and
the error is that of a write that a disk does not take.
"""

import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from alignlab import evaluate, export, figure, report, sample, train_reward
from alignlab.paper.registry import FIGURES
from alignlab.train import train
from tests.running import command_line, configured, tiny
from tests.runs_on_disk import made_run

PROTOCOL = "images=2 diversity_prompts=2 diversity_images=3 features=null".split()


@contextmanager
def full_disk(at_most: int) -> Iterator[None]:
    """Inside, no file of this process grows beyond so many bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at_most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which tests must not change."""
    folder = tmp_path_factory.mktemp("full") / "run"
    train(configured(*tiny(tiny_sd, "steps=1")), folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    """The command ended with one sentence that holds these words."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and all(part in lines[0] for part in parts), lines
    assert "make room, and type the command again: what was written is intact" in lines[0]


@pytest.mark.parametrize("what", ["the tables of the run", "the base model's measurements"])
def test_evaluate(what: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """An earlier evaluation, and the cache of the base model, are as they were to the byte, and nothing half
    written is beside them."""
    mine, cache = tmp_path / "run", tmp_path / "cache"
    shutil.copytree(run, mine)
    assert command_line(monkeypatch, f"run={mine}", f"cache={cache}", *PROTOCOL, command=evaluate) == 0
    before, more = tree(tmp_path), ["images=3"] if what.startswith("the base") else []
    capsys.readouterr()
    with full_disk(1500):
        code = command_line(monkeypatch, f"run={mine}", f"cache={cache}", *PROTOCOL, *more, command=evaluate)
    refused(capsys, code, str(cache if more else mine / "evaluation"), "cannot be written (File too large)")
    assert tree(tmp_path) == before
    assert command_line(monkeypatch, f"run={mine}", f"cache={cache}", *PROTOCOL, *more, command=evaluate) == 0


@pytest.mark.parametrize("to", ["kohya", "diffusers", "pipeline"])
def test_export(to: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Neither the file or folder is there, nor anything half written beside it; once there is room all files
    have the umask's modes."""
    output = tmp_path / ("lora.safetensors" if to == "kohya" else "folder")
    with full_disk(4000):
        code = command_line(monkeypatch, f"run={run}", f"to={to}", f"output={output}", command=export)
    refused(capsys, code, str(output), "cannot be written (")
    assert not list(tmp_path.iterdir())
    assert command_line(monkeypatch, f"run={run}", f"to={to}", f"output={output}", command=export) == 0
    usual = tmp_path / "usual"
    usual.touch()
    files = [path for path in (output, *output.rglob("*")) if path.is_file()]
    assert files and {path.stat().st_mode for path in files} == {usual.stat().st_mode}


def test_sample(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """An earlier picture of that name is as it was."""
    output = tmp_path / "sample.png"
    Image.new("RGB", (8, 8)).save(output)
    before = tree(tmp_path)
    with full_disk(300):
        code = command_line(monkeypatch, f"run={run}", "n=2", f"output={output}", command=sample)
    refused(capsys, code, str(output), "cannot be written (File too large)")
    assert tree(tmp_path) == before


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """An earlier page and its tables are as they were: the page does not fit, so the new tables, which did,
    do not stay either."""
    for k in range(2):
        made_run(tmp_path / "runs" / f"run-{k}", seed=k)
    words = [f"runs={tmp_path}/runs/*", f"output_dir={tmp_path}/report"]
    assert command_line(monkeypatch, *words, command=report) == 0
    before = tree(tmp_path)
    with full_disk(100_000):
        code = command_line(monkeypatch, *words, "title=Another", command=report)
    refused(capsys, code, str(tmp_path / "report"), "cannot be written (File too large)")
    assert tree(tmp_path) == before


def test_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """An earlier figure, its table and its page are as they were."""
    name = "draftp_fig3"
    home = Path(figure.__file__).resolve().parents[1] / "results"
    for experiment in FIGURES[name].experiments:
        shutil.copytree(home / "runs" / experiment, tmp_path / "runs" / experiment)
    words = [f"name={name}", "draw_only=true", f"home={tmp_path}"]
    assert command_line(monkeypatch, *words, command=figure) == 0
    before = tree(tmp_path)
    capsys.readouterr()
    with full_disk(5000):
        code = command_line(monkeypatch, *words, command=figure)
    refused(capsys, code, str(tmp_path / "paper" / name), "cannot be written (File too large)")
    assert tree(tmp_path) == before


def test_train_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """No half of a reward is left, and the same command makes a whole one once there is room."""
    (tmp_path / "data").mkdir()
    rows = ["image,rating"]
    for k in range(8):
        Image.new("RGB", (48, 48), (30 * k, 90, 40)).save(tmp_path / "data" / f"{k}.png")
        rows.append(f"{k}.png,{k}")
    (tmp_path / "data" / "r.csv").write_text("\n".join(rows) + "\n")
    made = tmp_path / "made"
    words = [
        "kind=aesthetic",
        f"data={tmp_path / 'data'}",
        "epochs=1",
        "hidden=[64]",
        f"output_dir={made}",
        "device=cpu",
    ]
    with full_disk(5000):
        code = command_line(monkeypatch, *words, command=train_reward)
    refused(capsys, code, str(made), "cannot be written (File too large")
    assert {path.name for path in made.rglob("*")} == {"config.yaml", "metrics.jsonl"}
    assert command_line(monkeypatch, *words, command=train_reward) == 0
    usual = tmp_path / "usual"
    usual.touch()
    assert {path.name: path.stat().st_mode for path in made.iterdir()} == {
        path.name: usual.stat().st_mode for path in made.iterdir()
    }
