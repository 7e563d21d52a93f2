"""Captioned pictures from folders, tables, shards and datasets; shuffled passes that go on where they
were."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from alignlab.data import captioned as module
from alignlab.data.captioned import CaptionedImages, captioned
from alignlab.data.hub import Table
from tests.data.pictures import png
from tests.running import pairs


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch) -> None:
    """What `datasets` writes of its own goes to the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets")
    )


def pictures(folder: Path, n: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        (folder / f"{k}.png").write_bytes(png(60 * k))


def tar(path: Path, files: dict[str, bytes], **more) -> Path:
    with tarfile.open(path, "w", **more) as out:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            out.addfile(entry, io.BytesIO(content))
    return path


def parquet(path: Path, n: int = 4, start: int = 0) -> Path:
    """As the hub keeps pictures: a struct of bytes and path."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"bytes": png(60 * k), "path": f"{k}.png"} for k in range(start, start + n)]
    table = pyarrow.table({"image": rows, "text": [f"picture {k}" for k in range(start, start + n)]})
    pyarrow.parquet.write_table(table, path)
    return path


def seen(data: CaptionedImages) -> dict[str, int]:
    """Caption and the red of each example of one pass, which is 60 times its number."""
    assert data.size is not None
    return {e.caption: round(e.image((8, 8))[0].mean().item() * 255) for e in data.draw(data.size, 0)}


FOUR = {f"picture {k}": 60 * k for k in range(4)}


def test_a_folder_with_metadata(tmp_path) -> None:
    """metadata.jsonl or .csv, the usual columns or those that are named; a split is a folder; names may lead
    below the table's folder."""
    pictures(tmp_path / "a" / "train" / "sub")
    lines = [{"file_name": f"sub/{k}.png", "text": f"picture {k}", "other": 1} for k in range(4)]
    (tmp_path / "a" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert seen(captioned(str(tmp_path / "a"))) == seen(captioned(str(tmp_path / "a" / "train"))) == FOUR
    pictures(tmp_path / "b")
    with (tmp_path / "b" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["file_name", "words", "caption"], *([f"{k}.png", f"w {k}", f"picture {k}"] for k in range(4))]
        )
    assert seen(captioned(str(tmp_path / "b"))) == FOUR
    named = captioned(str(tmp_path / "b" / "metadata.csv"), caption_column="words", image_column="file_name")
    assert named.prompts == ["w 0", "w 1", "w 2", "w 3"] and named.size == 4
    with pytest.raises(ValueError, match="split=test, but there is no folder of that name"):
        captioned(str(tmp_path / "a"), split="test")


def test_a_folder_with_texts(tmp_path) -> None:
    """NAME.png beside NAME.txt; a picture without a text, and a text without a picture, are passed over."""
    pictures(tmp_path)
    for k in range(3):
        (tmp_path / f"{k}.txt").write_text(f"\ufeffpicture {k}\n", encoding="utf-8")
    (tmp_path / "9.txt").write_text("nothing")
    assert seen(captioned(str(tmp_path))) == {f"picture {k}": 60 * k for k in range(3)}


def test_winners(tmp_path) -> None:
    """A folder of pairs is its winners; ties are counted. What make_pairs writes beside them is not read as
    pairs."""
    pairs(tmp_path, n=3, ties=2)
    (tmp_path / "make_pairs.yaml").touch()
    (tmp_path / "candidates.jsonl").write_text('{"prompt": "x", "image": "winner_0.png"}\n')
    data = captioned(str(tmp_path))
    assert (data.size, data.ties, data.prompts) == (3, 2, ["cat", "dog", "cat"])
    assert all(e.image((8, 8))[0].mean() > 0.6 for e in data.draw(3, 0))


def test_pick_a_pic(tmp_path) -> None:
    """Its parquet shards, by their columns."""
    arrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    columns = {
        "caption": ["x", "y"],
        "jpg_0": [png(0), png(20)],
        "jpg_1": [png(200), png(40)],
        "label_0": [0.0, 0.5],
    }
    arrow.write_table(pyarrow.table(columns), tmp_path / "0.parquet")
    data = captioned(str(tmp_path))
    (example,) = data.draw(1, 0)
    assert (data.size, data.ties, example.caption) == (1, 1, "x") and example.image((8, 8))[0].mean() > 0.7


@pytest.mark.parametrize("streaming", [False, True])
def test_shards(streaming: bool, tmp_path) -> None:
    """Examples of several .tar, captions in .txt or .json; what has no caption, or no picture, is passed
    over; nothing is unpacked."""
    first = {
        "a/0.png": png(0),
        "a/0.txt": b"picture 0\n",
        "a/1.json": b'{"caption": "picture 1"}',
        "a/1.PNG": png(60),
        "a/x.png": png(9),
    }
    second = {
        "2.png": png(120),
        "2.json": b'{"caption": "worse"}',
        "2.txt": b"picture 2",
        "3.jpg": png(180),
        "3.txt": b"picture 3",
        "4.txt": b"x",
    }
    tar(tmp_path / "00.tar", first)
    tar(tmp_path / "01.tar", second)
    data = captioned(str(tmp_path), streaming=streaming)
    assert data.size == (None if streaming else 4) and list(data.prompts) == ([] if streaming else [*FOUR])
    drawn = data.draw(4, 0)
    assert {e.caption: round(e.image((8, 8))[0].mean().item() * 255) for e in drawn} == FOUR
    assert len({e.key for e in drawn}) == 4 and sorted(p.name for p in tmp_path.iterdir()) == [
        "00.tar",
        "01.tar",
    ]


def test_hostile_shards(tmp_path) -> None:
    """Links, devices and folders are passed over, whatever they point to; compressed, cut and lying shards
    are refused."""
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "links.tar", "w") as out:
        for name, kind in (
            ("0.png", tarfile.SYMTYPE),
            ("0.txt", tarfile.LNKTYPE),
            ("1.png", tarfile.CHRTYPE),
            ("2", tarfile.DIRTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, str(tmp_path / "secret.txt")
            out.addfile(entry)
    with pytest.raises(ValueError, match="holds no picture with a caption"):
        captioned(str(tmp_path / "links.tar"))
    two = {"../../0.png": png(0), "../../0.txt": b"picture 0"}
    assert seen(captioned(str(tar(tmp_path / "up.tar", two)))) == {"picture 0": 0}  # names are names
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as out:
        out.add(tmp_path / "secret.txt")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "up.tar").read_bytes()[:700])
    (tmp_path / "noise.tar").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "empty.tar").write_bytes(b"")
    for name, said in (
        ("zipped", "is no uncompressed .tar"),
        ("cut", "is no uncompressed .tar"),
        ("noise", "is no uncompressed .tar"),
        ("empty", ""),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.tar.*{said}"):
            captioned(str(tmp_path / f"{name}.tar"))
    for text, said in ((b"\xff\xfe", "is no caption"), (b"a\0b", "is no text")):
        with pytest.raises(ValueError, match=said):
            captioned(str(tar(tmp_path / "text.tar", {"0.png": png(0), "0.txt": text})))


def test_a_shard_that_shrank(tmp_path) -> None:
    """A picture that is no longer whole is a sentence."""
    path = tar(tmp_path / "a.tar", {"0.txt": b"x", "0.png": png(0)})
    (example,) = captioned(str(path)).draw(1, 0)
    path.write_bytes(path.read_bytes()[: 512 * 3 + 10])
    with pytest.raises(ValueError, match=r"a\.tar ends within 0\.png"):
        example.image((8, 8))


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet(streaming: bool, tmp_path) -> None:
    """Pictures as the hub keeps them; a column of paths instead of pictures leads nowhere."""
    parquet(tmp_path / "0.parquet", 2)
    parquet(tmp_path / "1.parquet", 2, start=2)
    data = captioned(str(tmp_path), streaming=streaming)
    assert {e.caption: round(e.image((8, 8))[0].mean().item() * 255) for e in data.draw(4, 0)} == FOUR
    import pyarrow
    import pyarrow.parquet

    evil = pyarrow.table({"image": [{"bytes": None, "path": "/etc/hostname"}], "text": ["x"]})
    (tmp_path / "evil").mkdir()
    pyarrow.parquet.write_table(evil, tmp_path / "evil" / "0.parquet")
    with pytest.raises(ValueError, match=r"holds no picture .its file's bytes."):
        captioned(str(tmp_path / "evil"), streaming=streaming).draw(1, 0)[0].image((8, 8))
    with pytest.raises(
        ValueError, match=r"has no column nothing; set caption_column=NAME .its columns are image, text"
    ):
        captioned(str(tmp_path), streaming=streaming, caption_column="nothing")


def test_a_stream_that_breaks_off() -> None:
    """The network's error, whatever its kind, is a sentence with the row."""

    class Held:
        features, column_names = None, ("image", "text")

        def skip(self, n: int):
            yield {"image": png(0), "text": "x"}
            raise ConnectionError("the network is down")

    rows = Table(Held(), "owner/name").rows("image", "text", 4)
    assert next(rows)["caption"] == "x"
    with pytest.raises(ValueError, match="data=owner/name cannot be read from row 6 on: the network is down"):
        next(rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset(streaming: bool, tmp_path) -> None:
    """`save_to_disk`, with an Image column of another name; with splits."""
    import datasets

    rows = {"picture": [{"bytes": png(60 * k), "path": None} for k in range(4)], "prompt": [*FOUR]}
    table = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"picture": datasets.Image(), "prompt": datasets.Value("string")})
    )
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "two"))
    for name, split in (("one", "train"), ("two", "test")):
        data = captioned(str(tmp_path / name), split=split, streaming=streaming)
        assert {e.caption: round(e.image((8, 8))[0].mean().item() * 255) for e in data.draw(4, 0)} == FOUR
    with pytest.raises(ValueError, match="split=train, cannot be loaded"):
        captioned(str(tmp_path / "two"), streaming=streaming)


@pytest.mark.parametrize(
    "data", ["no/such/thing", "https://x.org/y", "../x", "x.parquet", "x.tar", "a b", "/nowhere"]
)
def test_nothing_there(data: str, monkeypatch, tmp_path) -> None:
    """What is no file, and cannot be a dataset's name, is refused without asking the hub."""
    monkeypatch.chdir(tmp_path)
    for streaming in (False, True):
        with pytest.raises(ValueError, match="is no file and no folder here, and no name of a dataset"):
            captioned(data, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub(streaming: bool, monkeypatch, tmp_path) -> None:
    """One in parquet is read; one that another reader of the library would read (it unpickles members of
    shards, follows paths) is refused before it is; what the hub says is passed on. (A folder stands for the
    hub.)"""
    import datasets

    builder, load = datasets.load_dataset_builder, datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder(str(tmp_path / name)))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **how: load(str(tmp_path / name), **how))
    for name in ("mine/good", "mine/shards", "mine/pictures", "mine/empty"):
        (tmp_path / name).mkdir(parents=True)
    parquet(tmp_path / "mine" / "good" / "train.parquet")
    tar(tmp_path / "mine" / "shards" / "a.tar", {"0.png": png(0), "0.txt": b"x"})
    pictures(tmp_path / "mine" / "pictures")
    data = captioned("mine/good", streaming=streaming)
    assert {e.caption: round(e.image((8, 8))[0].mean().item() * 255) for e in data.draw(4, 0)} == FOUR
    for name, said in (
        ("shards", "it is read by webdataset, and only parquet and arrow are; download it"),
        ("pictures", "it is read by imagefolder"),
        ("empty", "cannot be loaded"),
    ):
        with pytest.raises(
            ValueError,
            match=f"data=mine/{name}, split=train, cannot be loaded: .*{said if name != 'empty' else ''}",
        ):
            captioned(f"mine/{name}", streaming=streaming)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.jsonl", "", "holds no picture with a caption"),
        ("metadata.jsonl", '{"file_name": "0.png"}', "row 1 of .* has no text or caption or prompt"),
        ("metadata.jsonl", '{"text": "x"}', "row 1 of .* has no file_name or image"),
        ("metadata.jsonl", "5", "row 1 of .* has no file_name"),
        ("metadata.jsonl", "{", "line 1 of .* is no JSON"),
        ("metadata.jsonl", '{"file_name": 5, "text": "x"}', "file_name=5 in row 1 of .* is no path"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": null}', "caption=None in row 1 of .* is no text"),
        ("metadata.jsonl", '{"file_name": "../0.png", "text": "x"}', "is no path below the table's folder"),
        (
            "metadata.jsonl",
            '{"file_name": "/etc/hostname", "text": "x"}',
            "is no path below the table's folder",
        ),
        ("metadata.jsonl", '{"file_name": "9.png", "text": "x"}', "there is no file"),
        ("metadata.csv", "file_name,text\n0.png\n", "has another number of columns"),
        ("table.csv", "picture,words\n0.png,x\n", "has no file_name or image"),
        ("x.parquet", "PAR1", "cannot be loaded"),
    ],
)
def test_hostile_tables(name: str, text: str, words: str, tmp_path) -> None:
    """One sentence with the file, the row and the mend."""
    pictures(tmp_path / "in")
    (tmp_path / "in" / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        captioned(str(tmp_path / "in"))


def test_files_that_are_none(tmp_path) -> None:
    """A file of another kind; a folder without anything; a stream of what is known at once; a broken
    picture."""
    pictures(tmp_path / "a")
    (tmp_path / "x.zip").touch()
    for data, words, streaming in (
        ("x.zip", "is no .jsonl, .csv, .parquet or .tar file", False),
        ("a", "holds no picture with a caption", False),
        ("a", "streaming=true is for shards", True),
    ):
        with pytest.raises(ValueError, match=words):
            captioned(str(tmp_path / data), streaming=streaming)
    (tmp_path / "a" / "0.txt").write_text("x")
    (tmp_path / "a" / "0.png").write_text("x")
    with pytest.raises(ValueError, match=r"image of a row of .*0\.txt is no image"):
        captioned(str(tmp_path / "a")).draw(1, 0)[0].image((8, 8))
    with pytest.raises(ValueError, match="shuffle_buffer=0 must be at least 1"):
        captioned(str(tmp_path / "a"), shuffle_buffer=0)


def ten(tmp_path: Path) -> Path:
    return tar(
        tmp_path / "ten.tar",
        {
            f"{k}.{kind}": png(k) if kind == "png" else str(k).encode()
            for k in range(10)
            for kind in ("png", "txt")
        },
    )


@pytest.mark.parametrize("how", [{}, {"streaming": True, "shuffle_buffer": 4}, {"streaming": True}])
def test_every_pass_has_every_example_once(how: dict, tmp_path) -> None:
    """Whatever the draws' sizes; another order in each pass and with another seed, the same with the same."""
    ten(tmp_path)

    def passes(seed: int, sizes=(3, 4, 9, 1, 13)) -> list[str]:
        data = captioned(str(tmp_path), **how)
        return [e.caption for k, n in enumerate(sizes) for e in data.draw(n, seed + k)]

    drawn = passes(0)
    for k in range(3):
        assert sorted(map(int, drawn[10 * k : 10 * k + 10])) == [*range(10)]
    assert drawn == passes(0) != passes(100) and drawn[:10] != drawn[10:20]


@pytest.mark.parametrize("how", [{}, {"streaming": True, "shuffle_buffer": 4}])
@pytest.mark.parametrize("before", [0, 1, 4, 8, 10, 17])
def test_it_goes_on_where_it_was(how: dict, before: int, tmp_path) -> None:
    """A state taken anywhere, given to a new one, continues as the undisturbed one; it is plain enough for a
    checkpoint."""
    ten(tmp_path)
    one = captioned(str(tmp_path), **how)
    if before:
        one.draw(before, 7)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other = captioned(str(tmp_path), **how)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(3):
        assert [e.key for e in one.draw(6, seed)] == [e.key for e in other.draw(6, seed)]


@pytest.mark.parametrize("how", [{}, {"streaming": True, "shuffle_buffer": 4}])
def test_other_data_is_refused(how: dict, tmp_path) -> None:
    ten(tmp_path)
    one = captioned(str(tmp_path), **how)
    one.draw(5, 0)
    (tmp_path / "ten.tar").unlink()
    tar(
        tmp_path / "ten.tar",
        {f"{k}.{kind}": png(k) if kind == "png" else b"other" for k in range(10) for kind in ("png", "txt")},
    )
    with pytest.raises(ValueError, match="holds other examples than the run began with"):
        captioned(str(tmp_path), **how).load_state_dict(one.state_dict())


def test_it_is_read_once(tmp_path, monkeypatch) -> None:
    """However often it is checked; each has a state of its own; a changed caption is read again."""
    pictures(tmp_path)
    (tmp_path / "0.txt").write_text("one")
    (tmp_path / "1.txt").write_text("two")
    reads = []
    beside = module.texts_beside
    monkeypatch.setattr(module, "texts_beside", lambda *how: reads.append(how) or beside(*how))
    one, other = captioned(str(tmp_path)), captioned(str(tmp_path))
    first = one.draw(1, 0)
    assert len(reads) == 1 and other.draw(1, 0) == first
    (tmp_path / "1.txt").write_text("changed")
    assert "changed" in captioned(str(tmp_path)).prompts


def test_which_of_several_pictures_is_not_guessed(tmp_path) -> None:
    """Columns that are pictures by their type and not by a usual name."""
    datasets = pytest.importorskip("datasets")
    columns = {
        "caption": ["x"],
        "jpg_0": [{"bytes": png(0), "path": None}],
        "jpg_1": [{"bytes": png(200), "path": None}],
    }
    kinds = {"caption": datasets.Value("string"), "jpg_0": datasets.Image(), "jpg_1": datasets.Image()}
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        ValueError,
        match=r"several columns of pictures, jpg_0, jpg_1; set image_column=NAME; pairs of pictures go in",
    ):
        captioned(str(tmp_path / "saved"))
    assert (
        captioned(str(tmp_path / "saved"), image_column="jpg_1").draw(1, 0)[0].image((8, 8))[0].mean() > 0.7
    )
