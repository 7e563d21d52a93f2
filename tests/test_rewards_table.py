"""python -m alignlab.rewards: every option of conf/reward, what is said of it, and what is missing."""

from pathlib import Path

import pytest
import torch

from alignlab import rewards_table as table
from alignlab.config.compose import CONF
from alignlab.rewards.clip import Clip
from alignlab.rewards.description import Description
from tests.running import command_line

DOCS = Path(__file__).resolve().parents[1] / "docs" / "rewards.md"


def cells(row: table.Row) -> dict[str, str]:
    return dict(zip(table.HEADINGS, row.cells, strict=True))


def test_the_page_has_this_table(monkeypatch, capsys) -> None:
    """docs/rewards.md quotes what `format=markdown` prints; every file of conf/reward is in it."""
    assert command_line(monkeypatch, "format=markdown", command=table) == 0
    out = capsys.readouterr().out.strip()
    assert out in DOCS.read_text()
    options = {path.stem for path in (CONF / "reward").glob("*.yaml")} - {"none"}
    assert {line.split("`")[1] for line in out.splitlines()[2:]} == options


def test_it_loads_no_weights(monkeypatch) -> None:
    """No tensor file is opened, and the shipped rewards are at hand."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(Clip, "__init__", refuse)
    monkeypatch.setattr("alignlab.rewards.emoji_rules.load_judge", refuse)
    found = {row.cells[0]: cells(row) for row in table.rows([CONF / "reward"])}
    assert (found["clip"]["pixels"], found["clip"]["licence"], found["clip"]["offline"]) == (
        "48",
        "Apache-2.0",
        "yes",
    )
    assert (found["emoji_preference"]["pixels"], found["emoji_preference"]["unit"]) == ("48", "log-odds")
    assert (found["jpeg_compressibility"]["gradient"], found["jpeg_compressibility"]["licence"]) == (
        "no",
        "none needed",
    )
    assert all("?" not in row.values() for row in found.values())


def test_yours_and_what_is_missing(tmp_path: Path, monkeypatch, capsys) -> None:
    """--config-dir: a weight that is on the hub only, a folder that is not there, a module not allowed, a
    class that says too little; a file of the same name comes before the package's."""
    (tmp_path / "reward").mkdir()
    (tmp_path / "own_scorer.py").write_text(
        "class Scorer:\n"
        "    differentiable, unit, licence, typical_range = True, 'points', 'MIT', (0, 5)\n"
        "    @staticmethod\n"
        "    def check(**_): pass\n"
        "    def __init__(self, path: str, revision: str | None = None): raise AssertionError('built')\n"
        "class Silent:\n"
        "    unit = 'points'\n"
    )
    nodes = {
        "hub": "{_target_: own_scorer.Scorer, path: some/where, revision: abc123}",
        "gone": "{_target_: alignlab.rewards.clip.ClipScore, path: /nowhere}",
        "foreign": "{_target_: os.system}",
        "silent": "{_target_: own_scorer.Silent}",
        "colour": "{_target_: alignlab.rewards.colour.Colour, channel: blue}",
    }
    for name, node in nodes.items():
        (tmp_path / "reward" / f"{name}.yaml").write_text(f"# What {name} is. More.\n{name}: {node}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    said = {
        row.cells[0]: (cells(row), row.lacks)
        for row in table.rows([tmp_path / "reward", CONF / "reward"], ["own_scorer"])
    }
    hub, lacks = said["hub"]
    assert (hub["what"], hub["typical range"], hub["licence"]) == ("What hub is", "0 to 5", "MIT")
    assert (hub["weights"], hub["revision"], hub["offline"]) == ("some/where", "abc123", "no")
    assert lacks == "some/where is not in the hub's cache; hf download some/where --revision abc123"
    assert said["gone"][1].startswith("reward.gone.path=/nowhere: there is no such folder")
    assert "reward.foreign._target_=os.system lies outside alignlab" in said["foreign"][1]
    assert "the reward Silent does not say its differentiable" in said["silent"][1]
    assert said["colour"][0]["what"] == "What colour is" and said["brightness"][0]["offline"] == "yes"
    assert said["aesthetic"][1] == "set reward.aesthetic.path=..."
    assert (
        command_line(monkeypatch, "--config-dir", str(tmp_path), "allow_targets=[own_scorer]", command=table)
        == 0
    )
    out = capsys.readouterr().out
    assert "hf download some/where --revision abc123" in out and "larger is better" in out
    assert command_line(monkeypatch, "format=html", command=table) == 2
    assert capsys.readouterr().err == "error: format=html is not one of table, markdown\n"


def test_a_published_one_is_at_hand_when_its_files_are(tmp_path: Path, monkeypatch) -> None:
    """Not when its configuration is, or an index without the parts; a revision is that of `path`, and each
    part has its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def there(repository: str, *files: str, commit: str = "a" * 40) -> None:
        home = tmp_path / f"models--{repository.replace('/', '--')}"
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(commit)
        for file in files:
            path = home / "snapshots" / commit / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"weight_map": {"a": "part.safetensors"}}' if file.endswith(".json") else "")

    def lacks(name: str) -> str:
        return next(table._rows(CONF / "reward" / f"{name}.yaml", [])).lacks

    clip, fetch = "timm/vit_large_patch14_clip_224.openai", "is not in the hub's cache; hf download"
    there(clip)
    assert (
        lacks("clipscore")
        == f"open_clip_model.safetensors of {clip} {fetch} {clip} open_clip_model.safetensors"
    )
    there(clip, "open_clip_pytorch_model.bin")
    assert not lacks("clipscore") and clip not in lacks("laion_aesthetic")

    llava, encoder = "llava-hf/llava-1.5-7b-hf", "microsoft/deberta-xlarge-mnli"
    there(llava, "config.json", "tokenizer.json", "processor_config.json", "model.safetensors.index.json")
    assert lacks("vlm_counting") == f"model.safetensors of {llava} {fetch} {llava}"
    there(llava, "part.safetensors")
    assert not lacks("vlm_counting")
    there(encoder, "config.json", "vocab.json", "pytorch_model.bin", commit="b" * 40)
    assert not lacks("vlm_description")
    node = {"path": llava, "encoder": encoder, "revision": "a" * 40, "encoder_revision": "b" * 40}
    assert not Description.missing(**node)
    (lacking,) = Description.missing(**{**node, "encoder_revision": "c" * 40})
    assert lacking.endswith(f"hf download {encoder} --revision {'c' * 40}")


@pytest.mark.parametrize("name", ["clip", "emoji_preference", "emoji_aesthetic"])
def test_what_is_said_of_a_shipped_one_is_so(name: str) -> None:
    """The pixels that the table reads from files are those that the built reward sees."""
    from alignlab.config.build import build
    from tests.running import configured

    node = configured(f"reward={name}").reward[name]
    built = build({k: v for k, v in node.items() if k not in ("weight", "normalize")})
    row = next(row for row in table.rows([CONF / "reward"]) if row.cells[0] == name)
    assert cells(row)["pixels"] == str(built.input_size) and cells(row)["gradient"] == "yes"
