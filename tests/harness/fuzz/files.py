"""Files of prompts and of pairs, broken in the ways that files of others are."""

import contextlib
import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from PIL import Image

from alignlab import train, train_reward
from alignlab.data.preferences import Preferences
from tests.harness.fuzz.outcome import Outcome, attempt, command_line, refuse_work

SMALL = """steps=1 samples_per_step=2 micro_batch=2 sampler.steps=2 eval_sampler.steps=2
    evaluation.prompts=2 evaluation.images=2 evaluation.final_images=1 reward=brightness
    device=cpu policy.lora.rank=2 output_dir=written""".split()
ENTRY = '{"prompt": "a cat"}\n'
PAIR = '{"prompt": "a cat", "winner": "0.png", "loser": "1.png"}\n'
HEAD = "caption,jpg_0,jpg_1,label_0\n"


def prompt_files() -> Iterator[tuple[str, str, bytes]]:
    """(what it is, its name, its bytes)"""
    text = "a cat\nein Löwe\n\na dog\n"
    for encoding in (
        "utf-8",
        "utf-8-sig",
        "utf-16",
        "utf-16-le",
        "utf-16-be",
        "utf-32",
        "latin-1",
        "cp037",
        "shift_jis",
    ):
        with contextlib.suppress(UnicodeEncodeError):
            yield encoding, "p.txt", text.encode(encoding)
            yield f"{encoding}, .jsonl", "p.jsonl", '{"prompt": "ein Löwe"}\n'.encode(encoding)
    yield "ASCII in UTF-16 without a mark", "p.txt", "a cat\na dog\n".encode("utf-16-le")
    yield "CRLF", "p.txt", b"a cat\r\na dog\r\n"
    yield "CR alone", "p.txt", b"a cat\ra dog\r"
    yield "NUL bytes", "p.txt", b"a cat\0\na dog\n"
    yield "random bytes", "p.txt", bytes(range(256)) * 20
    yield "an image", "p.txt", png(8, 8)
    yield "empty", "p.txt", b""
    yield "blank lines", "p.txt", b" \n\t\n\r\n"
    yield "one line without end", "p.txt", b"a cat"
    yield "duplicates", "p.txt", b"a cat\n" * 5000
    yield (
        "10 kB a prompt",
        "p.txt",
        b"a very long prompt of a cat " * 400 + b"\na cat\na dog\na lion\na fish\n",
    )
    yield "1 MB in one prompt", "p.txt", b"cat " * 250_000
    yield "no blanks, 10 kB", "p.txt", b"x" * 10_000
    yield (
        "emoji and right to left",
        "p.txt",
        "\U0001f981 \u202eabc\u202c\n\u0645\u0631\u062d\u0628\u0627\n".encode(),
    )
    yield "line separators inside", "p.jsonl", '{"prompt": "a\u2028b\u0085c"}\n'.encode()
    yield "empty .jsonl", "p.jsonl", b""
    for name, line in {
        "broken": "{broken",
        "half": '{"prompt": "a',
        "a text": '"a cat"',
        "a number": "5",
        "null": "null",
        "a list": '["a cat"]',
        "no prompt": '{"text": "a cat"}',
        "a prompt of null": '{"prompt": null}',
        "a prompt of 5": '{"prompt": 5}',
        "a prompt of a list": '{"prompt": ["a"]}',
        "a prompt of an object": '{"prompt": {"a": {"b": 1}}}',
        "an empty prompt": '{"prompt": "  "}',
        "nested metadata": '{"prompt": "a cat", "m": {"a": [1, {"b": null}]}}',
        "deep": "[" * 100_000,
        "half a pair": '{"prompt": "\\ud800"}',
        "a NUL": '{"prompt": "a\\u0000b"}',
        "a number of 10,000 digits": '{"prompt": "a", "n": ' + "9" * 10_000 + "}",
        "NaN": '{"prompt": "a", "n": NaN}',
        "two objects": ENTRY.strip() * 2,
        "a comment": "# a cat",
        "a repeated key": '{"prompt": "a", "prompt": "b"}',
    }.items():
        yield f"a line of .jsonl is {name}", "p.jsonl", f"{ENTRY}{line}\n{ENTRY}".encode()


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 60, 40)).save(out, "PNG")
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred kilobytes that says it has 20000 x 20000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * (20_000 // 8 + 1) * 20_000, 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


PICTURES = {
    "cut": lambda: png(64, 64)[:60],
    "empty": lambda: b"",
    "text": lambda: b"no picture",
    "a bomb": bomb,
    "0 bytes of data": lambda: png(8, 8)[:33],
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
    "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "1 x 5000": lambda: png(1, 5000),
}


def pair_files() -> Iterator[tuple[str, str, str, dict[str, bytes]]]:
    """(what it is, the table's name, its text, further files)"""
    for name, line in {
        "fine": PAIR,
        "missing picture": PAIR.replace("1.png", "9.png"),
        "absolute path": PAIR.replace("1.png", "/etc/passwd"),
        "path upwards": PAIR.replace("1.png", "../1.png"),
        "path through a folder upwards": PAIR.replace("1.png", "a/../../1.png"),
        "a folder": PAIR.replace("1.png", "."),
        "a device": PAIR.replace("1.png", "/dev/zero"),
        "an empty path": PAIR.replace("1.png", ""),
        "an address": PAIR.replace("1.png", "https://example.org/1.png"),
        "a NUL in a path": PAIR.replace("1.png", "1\\u0000.png"),
        "a long path": PAIR.replace("1.png", "x" * 5000),
        "a winner of 5": PAIR.replace('"0.png"', "5"),
        "no loser": '{"prompt": "a", "winner": "0.png"}\n',
        "no prompt": '{"winner": "0.png", "loser": "1.png"}\n',
        "a list": "[]\n",
        "broken": "{x\n",
        "deep": "[" * 100_000 + "\n",
        "ties only": PAIR.replace("1.png", "0.png"),
        "a NUL in a prompt": PAIR.replace("a cat", "a\\u0000"),
        "half a pair in a prompt": PAIR.replace("a cat", "\\ud800"),
        "empty": "",
        "a blank line": "\n" + PAIR,
    }.items():
        yield f".jsonl, {name}", "p.jsonl", line, {}
    for name, rows in {
        "fine": f"{HEAD}a,0.png,1.png,1\n",
        "no column": "caption,jpg_0,label_0\na,0.png,1\n",
        "label 2": f"{HEAD}a,0.png,1.png,2\n",
        "label nan": f"{HEAD}a,0.png,1.png,nan\n",
        "label -1": f"{HEAD}a,0.png,1.png,-1\n",
        "label a": f"{HEAD}a,0.png,1.png,a\n",
        "no label": f"{HEAD}a,0.png,1.png,\n",
        "short row": f"{HEAD}a,0.png\n",
        "long row": f"{HEAD}a,0.png,1.png,1,5,6\n",
        "head only": HEAD,
        "empty": "",
        "no head": "a,0.png,1.png,1\n",
        "missing picture": f"{HEAD}a,0.png,9.png,1\n",
        "absolute path": f"{HEAD}a,0.png,/etc/passwd,1\n",
        "path upwards": f"{HEAD}a,0.png,../1.png,0\n",
        "an open quote": f'{HEAD}"a,0.png,1.png,1\n',
        "a field of 200 kB": f"{HEAD}{'a' * 200_000},0.png,1.png,1\n",
        "columns twice": "caption,jpg_0,jpg_0,label_0\na,0.png,1.png,1\n",
        "semicolons": HEAD.replace(",", ";") + "a;0.png;1.png;1\n",
        "a NUL": f"{HEAD}a\0,0.png,1.png,1\n",
    }.items():
        yield f".csv, {name}", "p.csv", rows, {}
    for name, made in PICTURES.items():
        yield (
            f"a picture that is {name}",
            "p.csv",
            f"{HEAD}a,0.png,1.png,1\n" + f"{HEAD}b,2.png,1.png,0\n".partition("\n")[2] * 3,
            {"0.png": made(), "2.png": made()},
        )
    yield "a parquet file that is text", "p.parquet", "not parquet", {}
    yield "a table of another kind", "p.xlsx", "x", {}


def prompts_tried(pipeline: str, home: Path) -> Iterator[Outcome]:
    """Each file of prompts with training up to its first write: the model is loaded, and the prompts are
    measured by its tokenizer."""
    for name, file, content in prompt_files():
        (home / file).write_bytes(content)
        words = [*SMALL, f"model.path_or_id={pipeline}", "prompts=file", f"prompts.file={file}"]
        with patch("alignlab.train.Run.begin", refuse_work), contextlib.chdir(home):
            yield attempt("prompt file", name, lambda w=words: command_line(train, w), home)
        (home / file).unlink()


def pairs_tried(pipeline: str, home: Path) -> Iterator[Outcome]:
    """Each table of pairs with training on them up to its first write, and with the reward's own trainer,
    which then trains. Broken pictures are named at the start."""
    for k, (name, file, content, more) in enumerate(pair_files()):
        folder = home / f"pairs{k}"
        folder.mkdir()
        for picture, made in {"0.png": png(16, 16), "1.png": png(16, 20), **more}.items():
            (folder / picture).write_bytes(made)
        (folder / file).write_bytes(content.encode("utf-8", "surrogatepass"))
        data = f"data={folder.name}"
        dpo = [
            *SMALL,
            f"model.path_or_id={pipeline}",
            "prompts.prompts=[cat,dog]",
            "prompts.unseen=[]",
            "algo=dpo",
            f"algo.{data}",
            "algo.updates_per_epoch=1",
        ]
        fit = [
            data,
            "epochs=1",
            "batch_size=2",
            "device=cpu",
            "output_dir=written",
            f"held_out={folder.name}",
        ]
        with contextlib.chdir(home):
            if more:
                yield attempt("pair file", f"reading: {name}", lambda at=folder: _pictures(at), home)
            else:
                with patch("alignlab.train.Run.begin", refuse_work):
                    yield attempt("pair file", f"train: {name}", lambda w=dpo: command_line(train, w), home)
            if file != "p.jsonl":
                yield attempt(
                    "pair file",
                    f"train_reward: {name}",
                    lambda w=fit: command_line(train_reward, w),
                    home,
                    writes=True,
                )
        for new in (folder, home / "written"):
            shutil.rmtree(new, ignore_errors=True)


def _pictures(folder: Path) -> int:
    """Reads every picture of the pairs in a folder, as a run does."""
    try:
        data = Preferences(str(folder))
        for k in range(len(data)):
            data.images(k, (8, 8))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def million(home: Path) -> dict[str, float]:
    """Seconds and MiB of a file of a million prompts, and of three draws of 64 from it, in a process of its
    own."""
    many = home / "many.txt"
    many.write_text("".join(f"a picture of animal number {k} on a meadow\n" for k in range(1_000_000)))
    code = """if True:
        import json, psutil, sys, time
        from alignlab.data.prompts import Prompts
        held = lambda: psutil.Process().memory_info().rss / 2**20
        before, began = held(), time.perf_counter()
        prompts = Prompts(file=sys.argv[1])
        read = time.perf_counter()
        for epoch in range(3):
            prompts.draw(64, seed=0, epoch=epoch)
        drawn = time.perf_counter() - read
        took = {"seconds to read": read - began, "seconds for 3 draws of 64": drawn}
        print(json.dumps({"prompts": len(prompts.prompts), **took, "MiB held": held() - before}))
        """
    done = subprocess.run([sys.executable, "-c", code, str(many)], capture_output=True, text=True, check=True)
    many.unlink()
    return dict(json.loads(done.stdout))
