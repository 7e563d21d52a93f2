"""YAML of somebody else: a kilobyte of aliases that unfolds to a billion values ends in a sentence, in every
file that is read."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from alignlab import evaluate, export, make_pairs, report, sample, stages, train, train_reward
from alignlab.files.bounded_yaml import front_matter, read_yaml
from alignlab.files.safe_folder import RunError
from alignlab.runs.stored_config import read_config
from alignlab.training.model_card import licence_of
from tests.running import command_line, pairs
from tests.runs_on_disk import CONFIG, made_run

LAUGH = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""Nine levels of ten."""
SAID = r"its aliases \(\*name\) unfold to more than 10 times what is written"


@pytest.fixture(autouse=True)
def _in_seconds() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    "text",
    [
        LAUGH,
        LAUGH.replace("[", "{p: [").replace("]", "]}"),
        "m0: &m0 {k: v}\n"
        + "".join(f"m{k + 1}: &m{k + 1} {{<<: [{', '.join([f'*m{k}'] * 10)}]}}\n" for k in range(9)),
        f"a: &a {'x' * 20_000}\nb: [{', '.join(['*a'] * 5000)}]",
    ],
    ids=["lists", "tables", "merge keys", "one long text"],
)
def test_what_unfolds_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match=SAID):
        read_yaml(text)


def test_what_holds_itself_is_refused() -> None:
    for text in ("&a [*a]", "a: &a {b: {c: *a}}", "&a {*a : 1}"):
        with pytest.raises(yaml.YAMLError):
            read_yaml(text)


def test_all_else_is_read_as_before() -> None:
    """What alignlab writes repeats lists by aliases; values, merge keys and empty texts are PyYAML's."""
    prompts = [f"a cat number {k}" for k in range(2000)]
    config = {"prompts": {"prompts": prompts, "unseen": prompts}, "more": prompts, "nothing": None, "x": 1.5}
    assert "*id001" in yaml.safe_dump(config)
    for text in (
        yaml.safe_dump(config),
        yaml.safe_dump(CONFIG),
        "",
        "a: &a {x: 1}\nb: {<<: *a, y: 2}",
        "x",
        "a: 2020-01-01",
    ):
        assert read_yaml(text) == yaml.safe_load(text)
    with pytest.raises(yaml.YAMLError):
        read_yaml("!!python/object/apply:os.system ['true']")


def test_every_file_of_a_folder_is_bounded(tmp_path: Path, monkeypatch, capsys) -> None:
    """config.yaml, make_pairs.yaml and stages.yaml, by each command that reads them."""
    run = made_run(tmp_path / "run")
    (run / "model").mkdir()
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + LAUGH)
    (run / "make_pairs.yaml").write_text(f"config: {{}}\n{LAUGH}")
    Image.new("RGB", (8, 8)).save(run / "x.png")
    row = {"prompt": "cat", "image": "x.png", "seed": 0, "replica": 0, "rewards": {"x": 1.0}}
    (run / "candidates.jsonl").write_text(json.dumps(row) + "\n")
    (run / "stages.yaml").write_text(LAUGH)
    with pytest.raises(RunError, match=SAID):
        read_config(run)
    monkeypatch.setattr(stages, "run", lambda words, *flags, quiet=False: 0)
    for command, words in (
        (train, [f"resume={run}"]),
        (evaluate, [f"run={run}"]),
        (sample, [f"run={run}"]),
        (report, [f"runs={run}"]),
        (export, [f"run={run}", "output=x.safetensors"]),
        (make_pairs, [f"again={run}", "pairing.weights={x: 1}"]),
        (stages, ["recipe=rlhf", f"output_dir={run}"]),
    ):
        assert command_line(monkeypatch, *words, command=command) == 2, command
        assert "unfold to more than 10 times what is written" in capsys.readouterr().err, command
    words = [f"data={pairs(tmp_path / 'data')}", f"output_dir={run}"]
    assert command_line(monkeypatch, *words, command=train_reward) == 2
    assert "holds no reward" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--config-dir={}", "hydra.searchpath=['file://{}']", "--config-path={}"])
def test_hydras_files_are_bounded(flag: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Before Hydra reads them: OmegaConf would unfold every value."""
    folder = tmp_path / "conf, with a blank"
    (folder / "prompts").mkdir(parents=True)
    (folder / "prompts" / "laugh.yaml").write_text(f"_target_: x\n{LAUGH}")
    (folder / "prompts" / "good.yaml").write_text(
        "_target_: alignlab.data.prompts.Prompts\nprompts: &p [cat]\nunseen: *p\n"
    )
    words = flag.format(folder).split("=", 1) if flag.startswith("--") else [flag.format(folder)]
    assert command_line(monkeypatch, *words, "prompts=laugh") == 2
    assert f"{folder}/prompts/laugh.yaml cannot be read as YAML (its aliases" in capsys.readouterr().err


def test_a_model_card_is_bounded(tmp_path: Path) -> None:
    """The front matter of a base model's README.md: as huggingface_hub reads it, and nothing where it is no
    card."""
    card = tmp_path / "README.md"
    for text, expected in (
        ("---\nlicense: mit\n---\n# x\n", ("mit", None)),
        ("---\r\nlicense: other\r\nlicense_name: own\r\n---\r\n", ("other", "own")),
        ("# no card\n", (None, None)),
        (f"---\n{LAUGH}license: *i\n---\n", (None, None)),
        ("---\n- a\n---\n", (None, None)),
        ("---\nlicense: [a, b]\n---\n", (None, None)),
        ("---\n: : :\n---\n", (None, None)),
    ):
        card.write_bytes(text.encode())
        assert licence_of(str(tmp_path)) == expected, text
    card.write_text(f"---\n{LAUGH}---\n")
    with pytest.raises(ValueError, match=SAID):
        front_matter(card)
