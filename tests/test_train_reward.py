"""python -m alignlab.train_reward, from tables of judgements to a reward that a run can train on."""

import csv
import json
import re

import pytest
import torch
from PIL import Image

from alignlab import train_reward
from alignlab.config.build import build
from tests.running import command_line, configured


def ratings(folder, n: int = 60):
    """Flat pictures, rated by their redness."""
    (folder / "images").mkdir(parents=True)
    rows = [("image", "rating")]
    for k, colour in enumerate(
        (torch.rand(n, 3, generator=torch.Generator().manual_seed(0)) * 255).int().tolist()
    ):
        Image.new("RGB", (48, 48), tuple(colour)).save(folder / "images" / f"{k}.png")
        rows.append((f"images/{k}.png", f"{1 + 9 * colour[0] / 255:.2f}"))
    with (folder / "r.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def test_the_command_makes_a_reward(tmp_path, monkeypatch, capsys) -> None:
    """It writes config, metrics, card and weights; says how to use them; twice the same command is the same
    reward; a run takes it."""
    data = ratings(tmp_path / "data")
    for name in ("one", "two"):
        words = [
            "kind=aesthetic",
            f"data={data}",
            "hidden=[8]",
            "epochs=4",
            "batch_size=16",
            f"output_dir={tmp_path / name}",
            "device=cpu",
        ]
        assert command_line(monkeypatch, *words, command=train_reward) == 0
    out = capsys.readouterr().out
    assert f"reward=aesthetic reward.aesthetic.path={tmp_path / 'two'}" in out and "held_out/spearman" in out
    made = tmp_path / "one"
    assert {p.name for p in made.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "reward.json",
        "head.safetensors",
    }
    assert (made / "head.safetensors").read_bytes() == (tmp_path / "two" / "head.safetensors").read_bytes()
    about = json.loads((made / "reward.json").read_text())
    assert (
        about["items"] == {"trained on": 54, "held out": 6}
        and about["kind"] == "aesthetic"
        and about["clip"] == "emoji_clip"
    )
    assert [json.loads(line)["epoch"] for line in (made / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]
    c = configured("reward=aesthetic", f"reward.aesthetic.path={made}")
    node = {k: v for k, v in c.reward["aesthetic"].items() if k not in ("weight", "normalize")}
    assert build(node)(torch.rand(2, 3, 64, 64), ["", ""]).shape == (2,)


def test_typed_again(tmp_path, monkeypatch, capsys) -> None:
    """A finished reward is left as it is, one that was killed is fitted anew, to the same bits; another
    configuration or a foreign folder is refused."""
    data, made = ratings(tmp_path / "data", 20), tmp_path / "made"
    words = ["kind=aesthetic", f"data={data}", "epochs=2", f"output_dir={made}", "device=cpu"]
    assert command_line(monkeypatch, *words, command=train_reward) == 0
    first = (made / "head.safetensors").read_bytes()
    assert command_line(monkeypatch, *words, command=train_reward) == 0
    out = capsys.readouterr().out
    assert "is finished; nothing to do" in out and len(re.findall(r"held_out/spearman  1\.0{4}\n", out)) == 2
    (made / "reward.json").unlink()
    (made / "head.safetensors").unlink()
    assert command_line(monkeypatch, *words, command=train_reward) == 0
    assert (made / "head.safetensors").read_bytes() == first
    assert command_line(monkeypatch, *words, "lr=0.5", command=train_reward) == 2
    assert "holds a reward with lr=0.001, but lr=0.5 was asked for; choose another" in capsys.readouterr().err
    assert command_line(monkeypatch, *words[:3], f"output_dir={data}", command=train_reward) == 2
    assert f"output_dir={data} is not empty and holds no reward; choose another" in capsys.readouterr().err


MISTAKES = {
    "no data": ("kind=aesthetic", "data has no value; set data=..."),
    "no such data": ("data=/nowhere", "data=/nowhere does not exist; give a table, or a folder with one"),
    "kind": ("kind=beauty data={tmp}", "kind=beauty is not one of preference, aesthetic"),
    "clip": ("data={tmp} clip=/nowhere", "clip=/nowhere: there is no such folder and no such shipped model"),
    "share": ("data={tmp} held_out_share=1.5", "held_out_share=1.5 is outside (0, 1)"),
    "no epochs": ("data={tmp} epochs=0", "epochs=0 must be at least 1"),
    "text for a number": ("data={tmp} epochs=many", "epochs=many must be a whole number"),
    "unknown key": ("data={tmp} epoch=3", "epoch is not a known key; did you mean epochs?"),
    "no table": ("data={tmp}", "there is no .jsonl, .csv or .parquet file of pairs there"),
    "blocks": (
        "kind=aesthetic data={tmp}/ratings blocks=7",
        "blocks=7: the image tower has 4 transformer blocks; set blocks<=4",
    ),
}


@pytest.mark.parametrize(("words", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(words, said, tmp_path, monkeypatch, capsys) -> None:
    """One sentence, exit code 2, no traceback, and nothing is left behind."""
    if "ratings" in words:
        ratings(tmp_path / "ratings", 4)
    made = tmp_path / "made"
    assert (
        command_line(
            monkeypatch, *words.format(tmp=tmp_path).split(), f"output_dir={made}", command=train_reward
        )
        == 2
    )
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and not (made / "reward.json").exists()
