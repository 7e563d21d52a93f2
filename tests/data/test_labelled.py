"""Labelled images: lines, tables and pairs, of one file or a folder, and what is wrong with them."""

import csv
import json

import pytest
from PIL import Image

from alignlab.data.labelled import LabelledImages, labelled
from tests.data.pictures import png
from tests.running import pairs


@pytest.fixture
def shelf(tmp_path):
    """Three pictures, whose red is their number."""
    for k in range(3):
        Image.new("RGB", (8, 8), (80 * k, 0, 0)).save(tmp_path / f"{k}.png")
    return tmp_path


def red(data: LabelledImages) -> list[int]:
    return [round(255 * data.image(k, (4, 4))[0].mean().item()) // 80 for k in range(len(data))]


def test_every_form_in_one_folder(shelf) -> None:
    """Labels as true and false, as 1 and 0, as text; winners and losers of pairs in a line or a table; ties
    are counted."""
    (shelf / "a.jsonl").write_text(
        "\n".join(
            json.dumps(line)
            for line in (
                {"prompt": "a", "image": "0.png", "label": True, "rewards": {}},
                {"prompt": "b", "image": "1.png", "label": 0},
                {"prompt": "c", "winner": "2.png", "loser": "0.png"},
                {"prompt": "c", "winner": "2.png", "loser": "2.png"},
            )
        )
    )
    for name, table in {
        "b.csv": [["caption", "image", "label"], ["d", "1.png", "False"], ["e", "2.png", "1"]],
        "c.csv": [
            ["caption", "jpg_0", "jpg_1", "label_0"],
            ["f", "0.png", "1.png", "0"],
            ["g", "0.png", "1.png", "0.5"],
        ],
    }.items():
        with (shelf / name).open("w", newline="") as file:
            csv.writer(file).writerows(table)
    data = LabelledImages(str(shelf))
    assert data.prompts == ["a", "b", "c", "c", "d", "e", "f", "f"] and data.ties == 2
    assert data.desirable == [True, False, True, False, False, True, True, False]
    assert red(data) == [0, 1, 2, 0, 1, 2, 1, 0]
    assert labelled(str(shelf)) is labelled(str(shelf))  # a configuration is checked more than once
    (shelf / "b.csv").write_text("caption,image,label\nd,1.png,0\n")
    assert len(labelled(str(shelf))) == 7


def test_parquet(tmp_path) -> None:
    """With the files' bytes, and labels as numbers."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    columns = {"caption": ["x", "y"], "image": [png(0), png(200)], "label": [1.0, 0.0]}
    parquet.write_table(arrow.table(columns), tmp_path / "0.parquet")
    data = LabelledImages(str(tmp_path / "0.parquet"))
    assert (
        data.desirable == [True, False]
        and data.image(1, (8, 8))[0].mean() > 0.7 > data.image(0, (8, 8))[0].mean()
    )


def test_pairs(tmp_path) -> None:
    """What DPO trains on will do: two images a pair."""
    data = LabelledImages(pairs(tmp_path, n=3, ties=2))
    assert len(data) == 6 and data.desirable == [True, False] * 3 and data.ties == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "", "there is no .jsonl, .csv or .parquet file of labelled images there"),
        (
            "p.jsonl",
            '{"prompt": "a", "image": "0.png", "label": 1}',
            "holds 1 desirable and 0 undesirable images",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "image": "0.png"}',
            "label=None in row 1 of .*p.jsonl is not true, false, 1 or 0",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "image": "0.png", "label": 0.5}',
            "label=0.5 in row 1 of .*p.jsonl is not true, false, 1 or 0",
        ),
        (
            "p.jsonl",
            '\n{"prompt": "a", "label": 1}',
            "line 2 of .*p.jsonl is no object with the texts prompt and image",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "winner": "0.png"}',
            "line 1 of .*p.jsonl is no object with the texts prompt, winner and loser",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "image": "9.png", "label": 1}',
            "there is no file .*9.png; mend or remove the row",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "image": "../0.png", "label": 1}',
            "'../0.png' is no path below the table's folder",
        ),
        (
            "p.csv",
            "caption,image\na,0.png\n",
            "has no column label; labelled images need caption, image and label, and pairs",
        ),
        (
            "p.csv",
            "caption,image,label\na,0.png,good\n",
            "label='good' in row 1 of .*p.csv is not true, false, 1 or 0",
        ),
    ],
)
def test_refusals(name, text, words, shelf) -> None:
    """One sentence with the file, the line and the mend."""
    (shelf / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        LabelledImages(str(shelf / name))
