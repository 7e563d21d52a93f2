"""Data as other programs lay it out: read with the right captions, or refused; what is left out is counted
and said."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignlab.data.captioned import CaptionedImages, captioned
from alignlab.data.labelled import LabelledImages
from alignlab.data.preferences import Choices, Preferences


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch) -> None:
    """What `datasets` writes of its own goes to the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets")
    )


def png(red: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(out, "PNG")
    return out.getvalue()


def lay(folder: Path, files: dict[str, bytes | str]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def tar(path: Path, *members: tuple[str, bytes]) -> str:
    with tarfile.open(path, "w") as out:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            out.addfile(entry, io.BytesIO(content))
    return str(path)


def parquet(path: Path, **columns: list) -> str:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def seen(data: CaptionedImages) -> dict[str, int]:
    """Caption and the red of each picture of one pass."""
    assert data.size is not None
    return {e.caption: round(e.image((8, 8))[0].mean().item() * 255) for e in data.draw(data.size, 0)}


TWO = {"a cat": 60, "a dog": 120}
PICTURES = {"a.png": png(60), "b.png": png(120)}


# -- tables


@pytest.mark.parametrize(
    "name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "METADATA.JSONL", "Metadata.CSV"]
)
@pytest.mark.parametrize("folder", ["", "train/"])
@pytest.mark.parametrize("prefix", ["", "train/", "train\\", ".\\"])
def test_metadata_where_and_how_it_may_lie(name: str, folder: str, prefix: str, tmp_path: Path) -> None:
    """In the folder of the split or above it, with the split in the names or without, with Windows'
    separators."""
    lay(tmp_path / "train", PICTURES)
    names, captions = [prefix + one for one in PICTURES], [*TWO]
    if name.endswith("parquet"):
        parquet(tmp_path / folder / name, file_name=names, text=captions)
    elif name.lower().endswith("csv"):
        rows = [f'{one},"{text}"' for one, text in zip(names, captions, strict=True)]
        lay(tmp_path, {folder + name: "\r\n".join(["file_name,text", *rows])})
    else:
        rows = [{"file_name": one, "text": text} for one, text in zip(names, captions, strict=True)]
        lay(tmp_path, {folder + name: jsonl(*rows)})
    assert seen(captioned(str(tmp_path))) == TWO


def test_one_table_for_several_splits(tmp_path: Path, capsys) -> None:
    """Each split has its rows; those of the others, and pictures that no row names, are counted."""
    pictures = {f"train/{name}": content for name, content in PICTURES.items()}
    rows = [{"file_name": "train/a.png", "text": "a cat"}, {"file_name": "test/c.png", "text": "a fox"}]
    data = lay(tmp_path, {**pictures, "test/c.png": png(180), "metadata.jsonl": jsonl(*rows)})
    assert seen(captioned(data)) == {"a cat": 60}
    said = (
        f"data={data}: 2 of 3 pictures left out: 1 outside of the split train (test/c.png), 1 not named in "
        f"metadata.jsonl ({{}})"
    )
    assert capsys.readouterr().out == said.format(os.path.join("train", "b.png")) + "\n"
    assert seen(captioned(data, split="test")) == {"a fox": 180}


@pytest.mark.parametrize(
    "name", ["../b.png", "..\\b.png", "train\\..\\..\\b.png", "/etc/hostname", "C:\\b.png", "\\\\host\\b.png"]
)
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    lay(
        tmp_path,
        {
            "b.png": png(0),
            "in/train/a.png": png(0),
            "in/metadata.jsonl": jsonl({"file_name": name, "text": "x"}),
        },
    )
    with pytest.raises(ValueError, match=r"is no path below the table's folder|there is no file"):
        captioned(str(tmp_path / "in"))


def test_pairs_with_names_from_windows(tmp_path: Path) -> None:
    files = {
        "img/a.png": png(60),
        "img/b.png": png(120),
        "P.JSONL": jsonl({"prompt": "x", "winner": "img\\a.png", "loser": "img\\b.png"}),
    }
    winner, loser = Preferences(lay(tmp_path, files)).images(0, (8, 8))
    assert (
        torch.equal((winner[0] * 255).round(), torch.full((8, 8), 60.0))
        and loser[0].mean() > winner[0].mean()
    )


def test_texts_below_a_table(tmp_path: Path, capsys) -> None:
    """Texts in the folder of the split come before a table above it, which is named."""
    rows = jsonl({"file_name": "train/a.png", "text": "above"})
    data = lay(tmp_path, {"train/a.png": png(60), "train/a.txt": "a cat", "metadata.jsonl": rows})
    assert seen(captioned(data)) == {"a cat": 60}
    assert (
        "metadata.jsonl is not read, since texts lie beside the pictures of train/" in capsys.readouterr().out
    )


def test_two_tables_of_metadata(tmp_path: Path, capsys) -> None:
    """One is read, and the other named."""
    rows = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "text": "a dog"}]
    data = lay(
        tmp_path,
        {**PICTURES, "metadata.jsonl": jsonl(*rows), "metadata.csv": "file_name,text\na.png,wrong\n"},
    )
    assert seen(captioned(data)) == TWO
    assert "metadata.csv is not read, since metadata.jsonl is there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            {"metadata.csv": "file_name,text\na.png,un café\n".encode("cp1252")},
            "cannot be read as UTF-8 .*save it as UTF-8",
        ),
        (
            {"metadata.csv": "file_name,text\na.png,a cat, sitting\n"},
            "row 1 of .* has another number of columns",
        ),
        ({"metadata.csv": "file_name;text\na.png;a cat\n"}, "has no file_name or .*it has file_name;text"),
        (
            {"metadata.jsonl": jsonl({"file_name": "a.png", "text": ["x", "y"]})},
            "the caption in row 1 .* is a list of 2; write a row",
        ),
        (
            {"metadata.jsonl": jsonl({"file_name": "a.png", "text": None})},
            "caption=None in row 1 of .* is no text",
        ),
    ],
)
def test_tables_that_are_refused(table: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        captioned(lay(tmp_path, {**PICTURES, **table}))


def test_empty_captions_are_said(tmp_path: Path, capsys) -> None:
    assert captioned(lay(tmp_path, {**PICTURES, "a.txt": "", "b.txt": "a dog"})).size == 2
    assert "1 of 2 captions are empty, and train the model without a prompt" in capsys.readouterr().out


# -- texts beside pictures


def test_what_systems_put_beside_files(tmp_path: Path, capsys) -> None:
    """Of macOS, Windows and notebooks; pictures among it are counted."""
    junk = {
        "._a.png": b"\0\5\x16\7",
        "._a.txt": b"\0\5\x16\7",
        ".DS_Store": b"x",
        "Thumbs.db": b"x",
        "desktop.ini": b"x",
        "._metadata.jsonl": b"\0",
        "__MACOSX/c.png": b"x",
        "__MACOSX/c.txt": "x",
        ".ipynb_checkpoints/a.png": png(0),
    }
    data = lay(tmp_path, {**PICTURES, "a.txt": "a cat", "b.txt": "a dog", **junk})
    assert seen(captioned(data)) == TWO
    assert "1 of 3 pictures left out: 1 put there by a system (._a.png)" in capsys.readouterr().out


def test_what_is_left_out_is_counted(tmp_path: Path, capsys) -> None:
    """Pictures without a text, texts without a picture, kinds that are not read, folders within."""
    more = {
        "c.png": png(0),
        "d.jpg": png(0),
        "e.txt": "x",
        "f.avif": b"x",
        "f.txt": "x",
        "sub/g.png": png(0),
        "sub/g.txt": "x",
    }
    data = lay(tmp_path, {**PICTURES, "a.TXT": "a cat", "b.txt": "a dog", **more})
    assert seen(captioned(data)) == TWO
    said = capsys.readouterr().out
    assert (
        "6 of 8 pictures left out: 2 without a caption (c.png), 1 of a kind that is not read (f.avif), "
        in said
    )
    assert "2 without a picture (e.txt), 1 in folders within (sub/g.png)" in said


def test_img2dataset_as_files(tmp_path: Path) -> None:
    """Its tables and statistics lie beside the folders of the pictures; a caption may be in the .json
    alone."""
    pytest.importorskip("pyarrow")
    for shard, (name, caption) in enumerate(zip(PICTURES, TWO, strict=True)):
        folder, key = f"{shard:05d}", f"{shard:05d}0000"
        files = {
            f"{key}.jpg": PICTURES[name],
            f"{key}.json": json.dumps({"caption": caption, "url": "x", "status": "success"}),
        }
        lay(tmp_path / folder, files if shard else {**files, f"{key}.txt": caption})
        lay(tmp_path, {f"{folder}_stats.json": "{}"})
        parquet(tmp_path / f"{folder}.parquet", url=["x"], key=[key], caption=[caption], status=["success"])
    data = captioned(str(tmp_path))
    assert seen(data) == TWO and [e.key for e in data.draw(2, 0)] != ["000000000.jpg"] * 2
    assert sorted(e.key for e in data.draw(2, 0)) == ["00000/000000000.jpg", "00001/000010000.jpg"]


def test_folders_of_kohya(tmp_path: Path, capsys) -> None:
    """N_name: read, and said that N repeats nothing; equal names in two folders are two pictures. A .caption
    is a text too."""
    data = lay(
        tmp_path,
        {
            "10_cat/a.png": png(60),
            "10_cat/a.txt": "a cat",
            "1_dog/a.png": png(120),
            "1_dog/a.caption": "a dog",
        },
    )
    assert seen(captioned(data)) == TWO
    assert (
        "the number in the folder's name 10_cat repeats nothing: every picture comes once a pass"
        in capsys.readouterr().out
    )


def test_folders_that_are_classes_are_no_captions(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds no picture with a caption \(left out: 2 without a caption \(cat/1.png\)\)"
    ):
        captioned(lay(tmp_path, {"cat/1.png": png(0), "dog/1.png": png(0)}))


def test_a_link_that_leads_back_ends(tmp_path: Path) -> None:
    data = lay(tmp_path, {"in/a.png": png(60), "in/a.txt": "a cat"})
    (tmp_path / "in" / "back").symlink_to(tmp_path)
    assert seen(captioned(data)) == {"a cat": 60}


# -- shards


@pytest.mark.parametrize("streaming", [False, True])
def test_any_order_in_a_shard(streaming: bool, tmp_path: Path) -> None:
    """Texts first, all of them or each, pictures first; dots in names; a leading ./; the caption of a .txt
    before that of a .json."""
    a, b, said = PICTURES["a.png"], PICTURES["b.png"], b'{"caption": "a dog"}'
    orders = [
        [("0.json", b'{"text": "a cat"}'), ("0.jpg", a), ("1.json", said), ("1.jpg", b)],
        [("0.txt", b"a cat"), ("1.txt", b"a dog"), ("0.jpg", a), ("1.jpg", b)],
        [("0.jpg", a), ("1.jpg", b), ("1.txt", b"a dog"), ("0.txt", b"a cat")],
        [
            ("v1.0/a.b.c.jpg", a),
            ("v1.0/a.b.c.txt", b"a cat"),
            ("v1.0/a.b.d.jpg", b),
            ("v1.0/a.b.d.txt", b"a dog"),
        ],
        [
            ("./0.JPG", a),
            ("0.TXT", b"a cat"),
            ("1.json", b'{"caption": "wrong"}'),
            ("1.jpg", b),
            ("1.txt", b"a dog"),
        ],
    ]
    for k, members in enumerate(orders):
        data = captioned(tar(tmp_path / f"{k}.tar", *members), streaming=streaming)
        assert {e.caption: round(e.image((8, 8))[0].mean().item() * 255) for e in data.draw(2, 0)} == TWO, (
            members
        )


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_shard_leaves_out_is_counted(streaming: bool, tmp_path: Path, capsys) -> None:
    """A stream says it at the end of its first pass."""
    members = [
        ("._0.jpg", b"\0\5"),
        ("0.jpg", png(60)),
        ("._0.txt", b"x"),
        ("0.txt", b"a cat"),
        ("1.jpg", png(0)),
        ("2.txt", b"x"),
        ("3.heic", b"x"),
        ("3.txt", b"x"),
        ("in.tar", b"x"),
        ("0.seg.png", png(0)),
        ("4.json", b"{}"),
        ("__MACOSX/0.jpg", b"x"),
    ]
    data = captioned(tar(tmp_path / "x.TAR", *members), streaming=streaming)
    assert data.draw(1, 0)[0].caption == "a cat"
    if streaming:
        data.draw(1, 0)
    said = capsys.readouterr().out
    assert (
        "8 of 9 pictures left out: 2 put there by a system (._0.jpg), 2 of a kind that is not read (3.heic), "
        in said
    )
    assert "2 without a caption (1.jpg), 2 without a picture (2)" in said


def test_files_of_splits(tmp_path: Path, capsys) -> None:
    """train-00000.parquet beside test-00000.parquet, in the folder or in data/, as the hub's snapshots are;
    shards likewise."""
    cat, dog = ([{"bytes": content, "path": None}] for content in PICTURES.values())
    for folder in ("one", "two/data"):
        parquet(tmp_path / folder / "train-00000-of-00001.parquet", image=cat, text=["a cat"])
        parquet(tmp_path / folder / "test-00000-of-00001.parquet", image=dog, text=["a dog"])
    lay(tmp_path, {"two/README.md": "x"})
    (tmp_path / "three").mkdir()
    tar(tmp_path / "three" / "train-0.tar", ("0.png", PICTURES["a.png"]), ("0.txt", b"a cat"))
    tar(tmp_path / "three" / "val_0.tar", ("0.png", PICTURES["b.png"]), ("0.txt", b"a dog"))
    for name, other in {"one": "test", "two": "test", "three": "validation"}.items():
        assert seen(captioned(str(tmp_path / name))) == {"a cat": 60}
        assert "belongs to another split than train and is not read" in capsys.readouterr().out
        assert seen(captioned(str(tmp_path / name), split=other)) == {"a dog": 120}
        with pytest.raises(ValueError, match=rf"split=x, but the files in .* are of the splits .*{other}"):
            captioned(str(tmp_path / name), split="x")
    parquet(tmp_path / "four" / "0.parquet", image=cat, text=["a cat"])
    assert seen(captioned(str(tmp_path / "four"))) == {"a cat": 60}
    with pytest.raises(ValueError, match=r"split=test, but the files in .*four name no split"):
        captioned(str(tmp_path / "four"), split="test")
    parquet(tmp_path / "five" / "validation" / "0.parquet", image=dog, text=["a dog"])
    (tmp_path / "five" / "test").mkdir()
    tar(tmp_path / "five" / "test" / "0.tar", ("0.png", PICTURES["a.png"]), ("0.txt", b"a cat"))
    assert seen(captioned(str(tmp_path / "five"), split="validation")) == {"a dog": 120}
    assert seen(captioned(str(tmp_path / "five"), split="test")) == {"a cat": 60}


def test_rows_without_a_picture(tmp_path: Path, capsys) -> None:
    """What img2dataset could not download is a row of its parquet, without a picture."""
    data = parquet(
        tmp_path / "x.parquet",
        jpg=[PICTURES["a.png"], None, PICTURES["b.png"]],
        caption=["a cat", "lost", "a dog"],
    )
    assert seen(captioned(data)) == TWO
    assert "1 of 3 pictures left out: 1 without a picture" in capsys.readouterr().out


# -- pairs


def pick(path: Path, *rows: dict) -> str:
    """A table with Pick-a-Pic's columns."""
    usual = {
        "caption": "x",
        "jpg_0": png(60),
        "jpg_1": png(120),
        "label_0": 1.0,
        "label_1": 0.0,
        "has_label": True,
        "are_different": True,
    }
    every = [{**usual, **row} for row in rows]
    return parquet(path, **{key: [row[key] for row in every] for key in usual})


GOOD = ({}, {"label_0": 0.0, "label_1": 1.0}, {"label_0": 0.5, "label_1": 0.5, "are_different": False})
WRONG = [
    ("without a label", {"label_0": 0.0, "label_1": 0.0, "has_label": False}),
    ("without a label", {"has_label": False}),
    ("without a label", {"label_0": None, "label_1": None}),
    ("without a label", {"label_0": float("nan"), "label_1": float("nan")}),
    ("whose label_0 and label_1 contradict each other", {"label_1": 1.0}),
    ("whose label_0 and label_1 contradict each other", {"label_0": 0.0}),
    ("whose label_0 and label_1 contradict each other", {"label_0": 0.5, "label_1": 1.0}),
    ("whose label_0 and label_1 contradict each other", {"label_1": None}),
    ("with a winner though are_different is false", {"are_different": False}),
]


@pytest.mark.parametrize(("why", "row"), WRONG)
def test_labels_that_do_not_count(why: str, row: dict, tmp_path: Path, capsys) -> None:
    """Pairs, choices, labelled images and captioned winners leave them out, and say it; alone they are
    refused."""
    data = pick(tmp_path / "p.parquet", *GOOD, row)
    pairs = Preferences(data)
    assert [winner for _, winner, _ in pairs.rows] == ["jpg_0", "jpg_1"] and pairs.ties == 1
    assert (
        capsys.readouterr().out
        == f"data={data}: 2 of 4 pairs left out: 1 {why} (row 4 of p.parquet), 1 tied\n"
    )
    assert [label for *_, label in Choices(data, (8, 8)).rows] == [1.0, 0.0, 0.5]
    assert LabelledImages(data).desirable == [True, False] * 2
    assert seen(captioned(data))["x"] in (60, 120) and captioned(data).size == 2
    for read in (Preferences, LabelledImages, captioned, lambda data: Choices(data, (8, 8))):
        with pytest.raises(ValueError, match=f"left out: 1 {why}|0 desirable and 0 undesirable"):
            read(pick(tmp_path / "alone.parquet", row))


def test_labels_in_a_csv(tmp_path: Path) -> None:
    """They are texts there."""
    lines = [
        "caption,jpg_0,jpg_1,label_0,label_1,has_label",
        "x,a.png,b.png,1,0,True",
        "y,a.png,b.png,0,0,False",
        "z,a.png,b.png,,,true",
    ]
    data = Preferences(lay(tmp_path, {**PICTURES, "p.CSV": "\n".join(lines)}))
    assert data.prompts == ["x"]


def test_one_of_several_processes_says_it(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert captioned(lay(tmp_path, {**PICTURES, "a.txt": "a cat"})).size == 1
    assert capsys.readouterr().out == ""
