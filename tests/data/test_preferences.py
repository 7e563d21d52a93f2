"""Pairs of images as JSON Lines, and as the tables of alignlab.train_reward."""

import csv
import json

import pytest
import torch
from PIL import Image

from alignlab.data.judgements import image
from alignlab.data.preferences import Choices, Preferences, tables
from tests.data.pictures import png
from tests.running import pairs


def test_lines(tmp_path) -> None:
    """Winner and loser at the asked size, cut to the middle; a pair of one file is a tie; empty lines and
    other keys do not matter."""
    data = Preferences(pairs(tmp_path, n=3, ties=2))
    assert (len(data), data.ties, data.prompts) == (3, 2, ["cat", "dog", "cat"])
    for k in range(3):
        winner, loser = data.images(k, (8, 8))
        assert winner.shape == loser.shape == (3, 8, 8) and winner[0].mean() > 0.6 > 0.3 > loser[0].mean()
    assert torch.equal(winner, image({"x": "winner_2.png", "_table": tmp_path / "t"}, "x", (8, 8)))


def test_tables(tmp_path) -> None:
    """label_0 says which of jpg_0 and jpg_1 won; a folder may hold tables of every kind, which follow each
    other by name."""
    for k in range(3):
        Image.new("RGB", (8, 8), (80 * k, 0, 0)).save(tmp_path / f"{k}.png")
    rows = [["a", "0.png", "1.png", "1"], ["b", "0.png", "1.png", "0"], ["c", "0.png", "1.png", "0.5"]]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["caption", "jpg_0", "jpg_1", "label_0"], *rows])
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"prompt": "d", "winner": "2.png", "loser": "0.png"}) + "\n\n"
    )
    data = Preferences(str(tmp_path))
    assert data.prompts == ["a", "b", "d"] and data.ties == 1
    red = [[round(255 * picture[0].mean().item()) for picture in data.images(k, (8, 8))] for k in range(3)]
    assert red == [[0, 80], [80, 0], [160, 0]]


def test_parquet(tmp_path) -> None:
    """Pick-a-Pic's shards, with the files' bytes."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    columns = {
        "caption": ["x", "y"],
        "jpg_0": [png(0), png(20)],
        "jpg_1": [png(200), png(40)],
        "label_0": [0.0, 0.5],
    }
    parquet.write_table(arrow.table(columns), tmp_path / "0.parquet")
    data = Preferences(str(tmp_path / "0.parquet"))
    winner, loser = data.images(0, (8, 8))
    assert data.ties == 1 and data.prompts == ["x"] and winner[0].mean() > 0.7 > loser[0].mean()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "", "there is no .jsonl, .csv or .parquet file of pairs there"),
        ("p.jsonl", "", "holds no pair with a winner .0 ties."),
        (
            "p.jsonl",
            '{"prompt": "a", "winner": "0.png", "loser": "0.png"}',
            "holds no pair with a winner .1 ties.",
        ),
        ("p.jsonl", '{"prompt": "a", "winner": "0.png"', "line 1 of .*p.jsonl is no JSON"),
        (
            "p.jsonl",
            '\n{"prompt": "a", "winner": 3, "loser": "0.png"}',
            "line 2 of .*p.jsonl is no object with the texts prompt",
        ),
        ("p.jsonl", "[" * 100_000, "line 1 of .*p.jsonl is no JSON .it is nested too deeply"),
        (
            "p.jsonl",
            '{"prompt": "a", "winner": "../1.png", "loser": "0.png"}',
            "'../1.png' is no path below the table's folder",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "winner": "/0.png", "loser": "1.png"}',
            "'/0.png' is no path below the table's folder",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "winner": "0.png", "loser": "1.png"}',
            "there is no file .*0.png; mend or remove the row",
        ),
        (
            "p.csv",
            "caption,jpg_0,jpg_1,label_0\na,0.png,1.png\n",
            "row 1 of .*p.csv has another number of columns",
        ),
        ("p.csv", "caption,jpg_0,label_0\na,0.png,1\n", "has no column jpg_1"),
        (
            "p.csv",
            "caption,jpg_0,jpg_1,label_0\na,0.png,1.png,2\n",
            "label_0='2' in row 1 of .*p.csv is not 0, 0.5 or 1",
        ),
    ],
)
def test_refusals(name, text, words, tmp_path) -> None:
    """One sentence with the file, the line and the mend."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        Preferences(str(tmp_path / name))


def test_an_image_that_is_not_there(tmp_path) -> None:
    data = Preferences(pairs(tmp_path, n=1, ties=0))
    (tmp_path / "loser_0.png").unlink()
    with pytest.raises(ValueError, match=r"loser of a row of .*pairs\.jsonl is no image"):
        data.images(0, (8, 8))


def test_a_preference_model_is_fitted_on_the_same_files(tmp_path) -> None:
    """A pair of .jsonl is a choice of its first image, a tie is half a choice; prompts are the captions."""
    data = Choices(pairs(tmp_path, 3, ties=1), (8, 8))
    assert [row[3] for row in data.rows] == [1.0, 1.0, 1.0, 0.5]
    winner, loser, caption, label = data[1]
    assert (caption, label) == ("dog", 1.0) and winner.shape == (3, 8, 8)
    assert (
        winner[0].mean() > winner[2].mean() and loser[0].mean() < loser[2].mean()
    )  # reddish ones were preferred


def test_names_that_make_pairs_gives(tmp_path) -> None:
    """Only beside its own make_pairs.yaml: a table that a user calls labels.jsonl is data."""
    for name in ("pairs.jsonl", "labels.jsonl"):
        (tmp_path / name).touch()
    assert [path.name for path in tables(tmp_path)] == ["labels.jsonl", "pairs.jsonl"]
    (tmp_path / "make_pairs.yaml").touch()
    assert [path.name for path in tables(tmp_path)] == ["pairs.jsonl"]
