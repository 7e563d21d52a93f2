"""Ratings and pairs as tables beside images, or with images inside."""

import csv
import io

import numpy as np
import pytest
import torch
from PIL import Image

from alignlab.data.judgements import Ratings, image
from alignlab.data.preferences import Choices
from tests.data.pictures import png


def table(folder, name, header, rows):
    folder.mkdir(exist_ok=True)
    for k in range(4):
        (folder / f"{k}.png").write_bytes(png(60 * k))
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(folder)


def test_ratings(tmp_path) -> None:
    """A column of numbers, or AVA's votes 1..10, whose mean counts; images resized and cut to the middle."""
    data = Ratings(
        table(tmp_path / "a", "r.csv", ["image", "rating"], [["0.png", "2.5"], ["3.png", "7"]]), (4, 4)
    )
    assert data.ratings == [2.5, 7.0] and len(data) == 2
    image, rating = data[1]
    assert image.shape == (3, 4, 4) and rating == 7.0
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([180, 0, 75]) / 255)
    votes = [["1.png", *(0 for _ in range(8)), 1, 3]]  # one 9, three 10
    assert Ratings(table(tmp_path / "b", "ava.csv", ["image", *range(1, 11)], votes), (4, 4)).ratings == [
        9.75
    ]


def test_pairs_in_csv_and_parquet(tmp_path) -> None:
    """Pick-a-Pic's columns: paths in a .csv, the files' bytes in .parquet; a folder may hold several
    tables."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    header = ["caption", "jpg_0", "jpg_1", "label_0"]
    data = Choices(
        table(
            tmp_path / "a",
            "p.csv",
            header,
            [["a cat", "0.png", "1.png", "1"], ["a dog", "2.png", "3.png", "0.5"]],
        ),
        (8, 8),
    )
    first, second, caption, label = data[0]
    assert (caption, label, data[1][3]) == ("a cat", 1.0, 0.5) and first[0].mean() < second[0].mean()
    folder = tmp_path / "b"
    folder.mkdir()
    for k in range(2):
        columns = {
            "caption": ["x", "y"],
            "jpg_0": [png(10 * k), png(20)],
            "jpg_1": [png(30), png(40)],
            "label_0": [0.0, 1.0],
        }
        parquet.write_table(arrow.table(columns), folder / f"{k}.parquet")
    shards = Choices(str(folder), (8, 8))
    assert len(shards) == 4 and [row[3] for row in shards.rows] == [0.0, 1.0, 0.0, 1.0]
    assert torch.equal(
        shards[2][0],
        torch.from_numpy(np.array(Image.open(io.BytesIO(png(10)))).copy()).permute(2, 0, 1) / 255,
    )


@pytest.mark.parametrize("size", [(6, 12), (12, 6), (3, 3), (24, 24)])
def test_images_are_cut_to_the_middle(size, tmp_path) -> None:
    """Whatever the proportions, the picture fills the square and keeps its middle."""
    folder = tmp_path / "a"
    data = Ratings(table(folder, "r.csv", ["image", "rating"], [["0.png", "1"]]), (8, 8))
    (folder / "0.png").write_bytes(png(90, size))
    assert data[0][0].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("kind", "header", "row", "said"),
    [
        (
            Ratings,
            ["image", "rating"],
            ["0.png", ""],
            "row 1 of .* has neither a number in column rating nor votes",
        ),
        (Ratings, ["file", "rating"], ["0.png", "1"], "has no column image; ratings need image"),
        (
            Choices,
            ["caption", "jpg_0", "jpg_1", "label_0"],
            ["a", "0.png", "1.png", "2"],
            "label_0='2' in row 1 of .* is not 0, 0.5 or 1",
        ),
        (
            Choices,
            ["caption", "jpg_0", "jpg_1"],
            ["a", "0.png", "1.png"],
            "has no column label_0; pairs need caption, jpg_0",
        ),
        (Choices, ["caption", "jpg_0", "jpg_1", "label_0"], None, "holds no rows"),
    ],
)
def test_bad_tables(kind, header, row, said, tmp_path) -> None:
    """One sentence that names the table, the row and the mend."""
    with pytest.raises(ValueError, match=said):
        kind(table(tmp_path / "a", "t.csv", header, [row] if row else []), (8, 8))


def test_missing_tables_and_images(tmp_path) -> None:
    """No table, no parquet file, no image: each is said."""
    with pytest.raises(ValueError, match=r"there is no .jsonl, .csv or .parquet file of pairs"):
        Choices(str(tmp_path), (8, 8))
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"is no parquet file|needs the package pyarrow"):
        Choices(str(tmp_path), (8, 8))
    with pytest.raises(
        ValueError, match=r"image of a row of .*r.csv: there is no file .*none.png; mend or remove the row"
    ):
        Ratings(table(tmp_path / "a", "r.csv", ["image", "rating"], [["none.png", "1"]]), (8, 8))
    data = Ratings(table(tmp_path / "b", "r.csv", ["image", "rating"], [["0.png", "1"]]), (8, 8))
    (tmp_path / "b" / "0.png").write_bytes(png(0)[:40])
    with pytest.raises(ValueError, match=r"image of a row of .* is no image"):
        data[0]


def test_a_strip_that_grows_is_refused(tmp_path) -> None:
    """A picture of kilobytes whose shorter side, brought to the size, would make gigabytes of it."""
    Image.new("1", (700_000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match=r"is no image \(\d+ x 96 pixels are more than \d+\)"):
        image({"image": "strip.png", "_table": tmp_path / "t.csv"}, "image", (96, 96))
