"""Pictures come out as a viewer shows them, and broken ones are named before a run."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms

from alignlab.data import pictures
from alignlab.data.captioned import captioned
from alignlab.data.judgements import Ratings, image
from alignlab.data.labelled import LabelledImages
from alignlab.data.pictures import decoded
from alignlab.data.preferences import Choices, Preferences

COLOURS = [(200, 30, 30), (20, 200, 40), (20, 30, 220), (250, 230, 20)]
"""Of the four corners: upper left, upper right, lower left, lower right."""
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera stores a picture whose EXIF orientation is that number."""


def plain() -> Image.Image:
    """32 wide, 16 high, with another colour in each corner."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    for k, colour in enumerate(COLOURS):
        pixels[8 * (k // 2) : 8 * (k // 2) + 8, 16 * (k % 2) : 16 * (k % 2) + 16] = colour
    return Image.fromarray(pixels)


def file(picture: Image.Image, kind: str, **how) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **how)
    return out.getvalue()


def shown(content: bytes, background: str | None = None) -> np.ndarray:
    with pictures.quiet():
        picture = decoded(content, background)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def png(pixels: np.ndarray, depth: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, of [height, width, channels] numbers of `depth` bits, with further chunks: Pillow writes
    few of these."""
    height, width = pixels.shape[:2]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = pixels.reshape(height, -1)
    if depth == 16:
        lines = [b"\0" + row.astype(">u2").tobytes() for row in rows]
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :].reshape(height, -1)
        lines = [b"\0" + np.packbits(row).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


# -- what does not change


def test_our_own_pictures_are_read_bit_for_bit(tmp_path: Path) -> None:
    """An opaque RGB PNG is its stored pixels: what was trained on make_pairs' images stays as it was."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    found = image({"x": "0.png", "_table": tmp_path / "t"}, "x", (16, 32))
    assert (found.permute(1, 2, 0).numpy() == pixels.astype(np.float32) / 255).all()


# -- orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, *TURNED])
def test_exif_orientation(kind: str, orientation: int) -> None:
    stored = plain().transpose(TURNED[orientation]) if orientation > 1 else plain()
    exif = Image.Exif()
    exif[274] = orientation
    how = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    found = shown(file(stored, kind, exif=exif, **how))
    assert found.shape == (16, 32, 3) and abs(found - np.asarray(plain())).max() <= (
        3 if kind == "JPEG" else 0
    )


@pytest.mark.parametrize("exif", [b"Exif\0\0nothing", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
def test_a_broken_exif_block_changes_nothing(exif: bytes) -> None:
    assert (
        abs(shown(file(plain(), "JPEG", quality=100, subsampling=0, exif=exif)) - np.asarray(plain())).max()
        <= 3
    )


# -- more than 8 bits


def gray() -> np.ndarray:
    return np.asarray(plain().convert("L")).astype(np.int64)


def of_tiff(values: np.ndarray, **how) -> bytes:
    return file(Image.fromarray(values), "TIFF", **how)


SIXTEEN = {
    "png": lambda v: png(v[..., None], 16, 0),
    "tiff": lambda v: of_tiff(v.astype(np.uint16)),
    "compressed tiff": lambda v: of_tiff(v.astype(np.uint16), compression="tiff_lzw"),
    "pgm": lambda v: b"P5 32 16 65535\n" + v.astype(">u2").tobytes(),
    "rgb png": lambda v: png(np.stack([v] * 3, -1), 16, 2),
    "gray and alpha png": lambda v: png(np.stack([v, np.full_like(v, 65535)], -1), 16, 4),
    "rgba png": lambda v: png(np.stack([v, v, v, np.full_like(v, 65535)], -1), 16, 6),
}


@pytest.mark.parametrize("kind", SIXTEEN)
def test_sixteen_bits_are_as_eight(kind: str) -> None:
    assert (shown(SIXTEEN[kind](gray() * 257)) == gray()[..., None]).all()


def test_a_tiff_may_count_from_white_to_black() -> None:
    content = of_tiff((65535 - gray() * 257).astype(np.uint16))
    at = content.index(struct.pack("<HHII", 262, 3, 1, 1))
    content = content[:at] + struct.pack("<HHII", 262, 3, 1, 0) + content[at + 12 :]
    assert (shown(content) == gray()[..., None]).all()


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (of_tiff(gray().astype(np.int32) * 257), "I"),
        (of_tiff(gray().astype(np.float32) / 255), "F"),
        (file(plain().convert("LAB"), "TIFF"), "LAB"),
    ],
)
def test_numbers_without_a_range_are_refused(content: bytes, mode: str) -> None:
    with pytest.raises(
        ValueError, match=f"numbers of the kind {mode}, and nothing says which is white; save it with 8 bits"
    ):
        decoded(content)


# -- transparency


def half() -> tuple[Image.Image, np.ndarray]:
    """A picture whose right half is transparent and hides noise, and what it looks like on white."""
    pixels = np.asarray(plain()).copy()
    pixels[:, 16:] = np.random.default_rng(0).integers(0, 250, (16, 16, 3))
    alpha = np.zeros((16, 32), np.uint8)
    alpha[:, :16] = 255
    seen = np.asarray(plain()).astype(int)
    seen[:, 16:] = 255
    return Image.fromarray(np.dstack([pixels, alpha])), seen


@pytest.mark.parametrize(
    ("kind", "how"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})]
)
def test_what_alpha_hides_is_not_seen(kind: str, how: dict) -> None:
    picture, seen = half()
    assert (shown(file(picture, kind, **how)) == seen).all()
    assert (shown(file(picture, kind, **how), "black")[:, 16:] == 0).all()
    assert (shown(file(picture, kind, **how), "#102030")[:, 16:] == [16, 32, 48]).all()


def test_half_transparent_is_a_mixture() -> None:
    pixel = Image.new("RGBA", (4, 4), (100, 0, 200, 128))
    assert abs(shown(file(pixel, "PNG")) - [177.2, 127, 227.4]).max() < 1


def test_gray_with_alpha() -> None:
    picture, _ = half()
    found = shown(file(picture.convert("LA"), "PNG"))
    assert (found[:, 16:] == 255).all() and (found[:, :16] == gray()[:, :16, None]).all()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "PNG with shares"])
def test_palettes_with_transparency(kind: str) -> None:
    picture = Image.new("P", (32, 16), 1)
    picture.putpalette([9, 9, 9, 200, 30, 30, *[0] * 762])
    picture.paste(0, (16, 0, 32, 16))
    key = bytes([0, 255]) if kind == "PNG with shares" else 0
    found = shown(file(picture, kind[:3], transparency=key))
    assert (found[:, 16:] == 255).all() and (found[:, :16] == [200, 30, 30]).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_one_gray_is_transparent(depth: int) -> None:
    """The key stands in the file's own bits, which Pillow does not turn into those of the pixels."""
    most = 2**depth - 1
    values = np.zeros((16, 32, 1), np.int64)
    values[:, 16:] = most
    found = shown(png(values, depth, 0, (b"tRNS", struct.pack(">H", 0))), "lime")
    assert (found[:, :16] == [0, 255, 0]).all() and (found[:, 16:] == 255).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_one_colour_is_transparent(depth: int) -> None:
    pixels = np.asarray(plain()).astype(np.int64) * (257 if depth == 16 else 1)
    found = shown(png(pixels, depth, 2, (b"tRNS", struct.pack(">HHH", *pixels[0, 0]))))
    assert (found[:8, :16] == 255).all() and (found[8:] == np.asarray(plain())[8:]).all()


# -- colours


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpegs_are_inverted(adobe: bool) -> None:
    """With Adobe's marker and, as browsers take it, without."""
    content = file(plain().convert("CMYK"), "JPEG", quality=100)
    at = content.index(b"\xff\xee\0\x0eAdobe")
    content = content if adobe else content[:at] + content[at + 16 :]
    assert abs(shown(content) - np.asarray(plain())).max() < 8


@pytest.mark.parametrize("mode", ["CMYK", "RGB", "L", "1"])
def test_modes_of_tiff(mode: str) -> None:
    picture = plain().convert(mode)
    assert (shown(file(picture, "TIFF")) == np.asarray(picture.convert("RGB"))).all()


def profile(swapped: bool) -> bytes:
    """sRGB's profile under another name; `swapped` has red and blue changed."""
    its = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    its = its.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    return (
        its.replace(b"rXYZ", b"tmp_", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tmp_", b"bXYZ", 1)
        if swapped
        else its
    )


def test_an_embedded_profile_is_applied() -> None:
    """That of another space; a broken one, one of other bands, and sRGB's own change nothing."""
    seen = np.asarray(plain())
    assert abs(shown(file(plain(), "PNG", icc_profile=profile(True))) - seen[..., ::-1]).max() <= 2
    assert abs(shown(file(plain(), "PNG", icc_profile=profile(False))) - seen).max() <= 2
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for same in (srgb, b"nothing", profile(True)[:200]):
        assert (shown(file(plain(), "PNG", icc_profile=same)) == seen).all()
    assert (shown(file(plain().convert("L"), "PNG", icc_profile=profile(True))) == gray()[..., None]).all()
    picture, on_white = half()
    found = shown(file(picture, "PNG", icc_profile=profile(True)))
    assert abs(found - on_white[..., ::-1]).max() <= 2


# -- several in one


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("PNG", {}),
        ("TIFF", {}),
        ("MPO", {"quality": 100, "subsampling": 0}),
    ],
)
def test_the_first_of_several_is_shown(kind: str, how: dict) -> None:
    if kind == "MPO" and PIL.__version__ < "11":
        pytest.skip("earlier versions of Pillow read such files, and write broken ones")
    content = file(
        plain(), kind, save_all=True, append_images=[Image.new("RGB", (32, 16), "black")] * 2, **how
    )
    assert abs(shown(content) - np.asarray(plain())).max() <= (3 if kind == "MPO" else 0)


# -- broken ones


def photo() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return file(Image.fromarray(pixels), "JPEG", quality=95)


def with_thumbnail() -> bytes:
    """The end of the thumbnail, in the header, is no end of the picture."""
    exif = Image.Exif()
    exif[37500] = photo()[:3000] + b"\xff\xd9"
    return file(Image.open(io.BytesIO(photo())), "JPEG", quality=95, exif=exif)


BROKEN: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a cut JPEG": ("truncated", lambda: photo()[:-3000]),
    "a cut JPEG with a thumbnail": ("truncated", lambda: with_thumbnail()[:-3000]),
    "a cut progressive JPEG": (
        "truncated",
        lambda: file(Image.open(io.BytesIO(photo())), "JPEG", progressive=True)[:-2000],
    ),
    "a JPEG that ends in zeros": ("zeros are in its place", lambda: photo()[:-3000] + bytes(3000)),
    "a cut PNG": ("truncated|broken", lambda: file(Image.open(io.BytesIO(photo())), "PNG")[:-4000]),
    "a cut WEBP": ("", lambda: file(Image.open(io.BytesIO(photo())), "WEBP")[:-600]),
    "a cut GIF": ("", lambda: file(Image.open(io.BytesIO(photo())), "GIF")[:-900]),
    "a cut BMP": ("truncated", lambda: file(plain(), "BMP")[:-200]),
    "a cut TIFF": ("", lambda: file(plain(), "TIFF")[:-900]),
    "an empty file": ("the file is empty", lambda: b""),
    "a page of HTML": ("cannot identify it as one of PNG, JPEG", lambda: b"<!DOCTYPE html><html>404</html>"),
}


@pytest.mark.parametrize("affordable", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_named_at_the_start(
    name: str, affordable: bool, tmp_path: Path, monkeypatch
) -> None:
    """Decoded, or, of a large data set, known by their ends."""
    monkeypatch.setattr(pictures, "DECODED", 2**28 if affordable else 0)
    reason, content = BROKEN[name]
    for k in range(3):
        (tmp_path / f"{k}.jpg").write_bytes(content() if k else photo())
        (tmp_path / f"{k}.txt").write_text("x")
    with pytest.raises(
        ValueError,
        match=(
            rf"image of a row of .*1\.txt is no image \(.*({reason}).*\): 1\.jpg; .*\(1 more broken: "
            r"2\.jpg\)$"
        ),
    ):
        captioned(str(tmp_path))


def test_of_a_large_data_set_the_ends_are_looked_at(tmp_path: Path, monkeypatch) -> None:
    """Nothing whole is decoded; what looks odd is, and is not refused if it is whole."""
    odd = {
        "a.jpg": photo() + b"\xff\xda" + b"more" * 2**15,
        "g.jpg": photo() + bytes(2**17),
        "b.png": file(plain(), "PNG") + bytes(2**17),
    }
    whole = {
        "c.jpg": photo(),
        "d.png": file(plain(), "PNG"),
        "e.webp": file(plain(), "WEBP"),
        "f.gif": file(plain(), "GIF"),
    }
    for name, content in {**odd, **whole, "wrong.png": photo()}.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".txt").write_text("x")
    seen, usual = [], pictures.decoded
    monkeypatch.setattr(pictures, "decoded", lambda source: seen.append(Path(source).name) or usual(source))
    monkeypatch.setattr(pictures, "DECODED", 0)
    assert captioned(str(tmp_path)).size == 8 and sorted(seen) == ["a.jpg", "b.png", "g.jpg"]


def test_the_look_ends_in_time(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(pictures, "SECONDS", -1.0)
    monkeypatch.setattr(pictures, "THREADS", 1)
    for k in range(20):
        (tmp_path / f"{k:02d}.png").write_bytes(file(plain(), "PNG") if k < 19 else b"")
        (tmp_path / f"{k:02d}.txt").write_text("x")
    data = captioned(str(tmp_path))
    assert "16 of 20 pictures were looked at" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"the file is empty"):
        [example.image((8, 8)) for example in data.draw(20, 0)]


def test_every_kind_of_data_looks(tmp_path: Path) -> None:
    """Tables of names and of bytes, pairs, labels, choices, ratings and shards, streams by their first
    picture."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good, bad = file(plain(), "PNG"), photo()[:-3000]
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "bad.jpg").write_bytes(bad)

    def table(name: str, header: str, line: str) -> str:
        (tmp_path / name).write_text(f"{header}\n{line}\n")
        return str(tmp_path / name)

    def lines(name: str, *said: dict) -> str:
        (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in said))
        return str(tmp_path / name)

    def columns(name: str, **of) -> str:
        parquet.write_table(arrow.table({key: [value] for key, value in of.items()}), tmp_path / name)
        return str(tmp_path / name)

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in {"0.jpg": bad, "0.txt": b"x"}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    pair = columns("pair.parquet", caption="x", jpg_0=good, jpg_1=bad, label_0=1.0)
    inside = columns("inside.parquet", image={"bytes": bad, "path": None}, text="x")
    for read in (
        lambda: captioned(lines("m.jsonl", {"file_name": "bad.jpg", "text": "x"})),
        lambda: captioned(str(tmp_path / "x.tar")),
        lambda: captioned(str(tmp_path / "x.tar"), streaming=True),
        lambda: captioned(inside),
        lambda: captioned(inside, streaming=True),
        lambda: captioned(pair),
        lambda: Preferences(pair),
        lambda: Preferences(lines("p.jsonl", {"prompt": "x", "winner": "good.png", "loser": "bad.jpg"})),
        lambda: Choices(pair, (8, 8)),
        lambda: LabelledImages(table("l.csv", "caption,image,label", "x,good.png,1\ny,bad.jpg,0")),
        lambda: Ratings(table("r.csv", "image,rating", "bad.jpg,1"), (8, 8)),
    ):
        with pytest.raises(ValueError, match=r"is no image \(image file is truncated"):
            read()


def test_the_background_is_asked_for(tmp_path: Path) -> None:
    """Every kind of data hands the colour on; what is none is refused."""
    half()[0].save(tmp_path / "0.png")
    plain().save(tmp_path / "1.png")
    (tmp_path / "0.txt").write_text("x")
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "winner": "0.png", "loser": "1.png"}')
    (tmp_path / "r.csv").write_text("image,rating\n0.png,1\n")
    pairs = str(tmp_path / "p.jsonl")
    (tmp_path / "0.txt").rename(tmp_path / "t")
    corner = [
        Preferences(pairs, "black").images(0, (16, 32))[0],
        Choices(pairs, (16, 32), "black")[0][0],
        LabelledImages(pairs, "black").image(0, (16, 32)),
        Ratings(str(tmp_path / "r.csv"), (16, 32), "black")[0][0],
        captioned(pairs, background="black").draw(1, 0)[0].image((16, 32)),
    ]
    assert [picture[:, 0, -1].tolist() for picture in corner] == [[0.0, 0.0, 0.0]] * 5
    for read in (Preferences, LabelledImages, captioned):
        with pytest.raises(ValueError, match="background=blurple is no colour; write a name such as black"):
            read(pairs, background="blurple")
