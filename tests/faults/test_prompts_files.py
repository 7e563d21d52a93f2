"""A file of prompts is read by its kind or refused by it, and a template is filled once."""

import json
from pathlib import Path

import pytest

from alignlab.data.prompts import Prompts

TWO = ("a lion", "a cat, sitting")
RECORDS = [{"prompt": "a lion", "n": 1}, {"prompt": "a cat, sitting", "n": 2}]
KINDS = {
    "p.txt": "a lion\na cat, sitting\n",
    "p.TXT": "\ufeffa lion\r\n\r\n  a cat, sitting\r\n",
    "old_mac.txt": "a lion\ra cat, sitting\r",
    "p": "a lion\na cat, sitting",
    "p.md": "a lion\na cat, sitting",
    "p.jsonl": "\ufeff" + "\r\n\r\n".join(map(json.dumps, RECORDS)) + "\n",
    "p.JSONL": "\n".join(map(json.dumps, RECORDS)),
    "p.ndjson": "\n".join(map(json.dumps, RECORDS)),
    "texts.json": json.dumps(TWO, indent=1),
    "p.json": "\ufeff" + json.dumps(RECORDS),
    "P.Json": json.dumps(RECORDS),
    "texts.yaml": "# animals\n- a lion\n- a cat, sitting\n",
    "p.yml": "- {prompt: a lion, n: 1}\n- {prompt: 'a cat, sitting', n: 2}\n",
    "p.csv": '\ufeffn,prompt\r\n1,a lion\r\n\r\n2,"a cat, sitting"\r\n',
    "p.CSV": 'n,prompt\n1,a lion\n2,"a cat, sitting"',
    "p.tsv": "prompt\tn\na lion\t1\na cat, sitting\t2\n",
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_prompts(name: str, tmp_path: Path) -> None:
    """Ends in capitals, byte-order marks, CRLF, empty lines; what objects and rows say besides is kept."""
    (tmp_path / name).write_bytes(KINDS[name].encode())
    prompts = Prompts(file=str(tmp_path / name))
    assert prompts.prompts == TWO
    if "n" in KINDS[name].split("lion")[0].replace("animals", ""):
        assert [str(prompts.metadata[prompt]["n"]) for prompt in TWO] == ["1", "2"]


@pytest.mark.parametrize("name", ["p.parquet", "P.PARQUET"])
def test_parquet(name: str, tmp_path: Path) -> None:
    """One column of it, which can be named; what is no parquet file is said."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"prompt": TWO, "text": ["x", "y"]}), tmp_path / name)
    assert Prompts(file=str(tmp_path / name)).prompts == TWO
    assert Prompts(file=str(tmp_path / name), column="text").prompts == ("x", "y")
    with pytest.raises(
        ValueError, match=r"it has no column 'words', but 'prompt', 'text'.*set prompts.column=NAME"
    ):
        Prompts(file=str(tmp_path / name), column="words")
    (tmp_path / name).write_bytes(b"PAR1nothing")
    with pytest.raises(ValueError, match="it is no parquet file"):
        Prompts(file=str(tmp_path / name))


def test_fields_with_separators_quotes_and_lines(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b'id,Prompt\n1,"a cat, ""red"",\nasleep"\n2,it\'s 5\xe2\x80\xb3 tall\n')
    assert Prompts(file=str(tmp_path / "p.csv"), column="Prompt").prompts == (
        'a cat, "red",\nasleep',
        "it's 5″ tall",
    )
    (tmp_path / "p.tsv").write_text('prompt\tn\na "red" cat, a dog\t1\n')
    assert Prompts(file=str(tmp_path / "p.tsv")).prompts == ('a "red" cat, a dog',)


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.jsonl", '{"text": "x"}'), ("p.json", '[{"text": "x"}]'), ("p.yaml", "- text: x")],
)
def test_the_key_can_be_named(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert Prompts(file=str(tmp_path / name), column="text").prompts == ("x",)
    with pytest.raises(
        ValueError, match=r'not an object with a text "prompt" \(its keys are text; prompts.column=NAME'
    ):
        Prompts(file=str(tmp_path / name))


def test_a_prompt_that_stands_there_twice_counts_once(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt\na cat\na dog\na cat\n")
    assert Prompts(file=str(tmp_path / "p.csv")).prompts == ("a cat", "a dog")


BOMB = "a: &a [x]\n" + "".join(
    f"{n}: &{n} [{', '.join([f'*{b}'] * 10)}]\n" for b, n in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "header only": ("p.csv", "prompt,n\n", "holds no prompt"),
    "no header": (
        "p.csv",
        '"a lion, roaring",photo\na cat,draw\n',
        r"no column 'prompt', but 'a lion, roaring', 'photo'",
    ),
    "one column without a header": (
        "p.csv",
        "a lion\na cat\n",
        "no column 'prompt', but 'a lion' .a table begins with a line of names",
    ),
    "semicolons": ("p.csv", "prompt;style\na cat;photo\n", "no column 'prompt', but 'prompt;style'"),
    "ragged": (
        "p.csv",
        "prompt,n\na cat, sitting,1\n",
        "line 2 has 3 fields, but the first line names 2; put a prompt",
    ),
    "short": ("p.csv", "prompt,n\na cat\n", "line 2 has 1 fields"),
    "open quotes": ("p.csv", 'prompt\n"a cat\n', "is no line of a table .unexpected end of data"),
    "quotes within": ("p.tsv", 'prompt\tn\n"a" cat\t1\n', "line 2 is no line of a table"),
    "no prompt in a row": ("p.csv", "prompt,n\na,1\n,2\n", "row 2 has no text in column 'prompt'"),
    "an empty table": ("p.csv", "", "no column 'prompt', but none"),
    "one object": ("p.json", '{"prompt": "x"}', "it holds no list but an object; write a list of texts"),
    "one text": ("p.json", '"x"', "it holds no list but one text"),
    "null": ("p.json", "null", "it holds no list but nothing"),
    "an empty list": ("p.json", "[]", "holds no prompt"),
    "lines of JSON": (
        "p.json",
        '{"prompt": "x"}\n{"prompt": "y"}',
        r"no JSON: Extra data in line 2; one object a line is \.jsonl",
    ),
    "half of it": ("p.json", '["x", ', "it is no JSON: Expecting value in line 1; mend that"),
    "deep": ("p.json", "[" * 100_000, "nested too deeply"),
    "numbers": ("p.json", "[1984]", "entry 1 is 1984, which is no text; put it in quotes"),
    "YAML's yes": ("p.yaml", "- a cat\n- yes\n", "entry 2 is True, which is no text; put it in quotes"),
    "YAML's colon": (
        "p.yaml",
        "- a cat: sitting\n",
        r"entry 1: not an object with a text .prompt. .its keys are a cat",
    ),
    "no YAML": ("p.yaml", "- [x\n", "it is no YAML"),
    "aliases": ("p.yaml", BOMB, "refers to itself with an alias"),
    "code": ("p.yaml", "!!python/object/apply:os.system [ls]", "it is no YAML"),
    "texts in lines": ("p.jsonl", '"a cat"', r"line 1: not an object with a text"),
    "no text": ("p.jsonl", '{"prompt": 5}', r"line 1: not an object with a text"),
    "JSON in .txt": (
        "p.txt",
        '[\n "a lion"\n]',
        r"it holds JSON, not a prompt a line; give it a name that ends in \.json",
    ),
    "lines of JSON in .txt": (
        "p.txt",
        '{"prompt": "x"}\n{"prompt": "y"}\n',
        r"it holds JSON.*ends in \.jsonl",
    ),
    "empty": ("p.txt", "\n \n", "holds no prompt"),
    "Latin-1": (
        "p.txt",
        "a cat\nun café\n".encode("latin-1"),
        r"the byte 0xe9 in line 2 is not UTF-8; save it as UTF-8",
    ),
    "Latin-1 in a table": (
        "p.csv",
        "prompt\nun café\n".encode("latin-1"),
        r"the byte 0xe9 in line 2 is not UTF-8",
    ),
    "UTF-16": ("p.txt", "a cat\n".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
    "UTF-16 without a mark": ("p.txt", "a cat\n".encode("utf-16-le"), "holds a character that is no text"),
    "packed": ("p.jsonl.gz", b"\x1f\x8b", r"a \.gz file is not taken; unpack or save it as \.txt"),
    "packed under another name": ("p.txt", b"\x1f\x8b\x08", "it is no text but parquet or an archive"),
    "a spreadsheet": ("p.XLSX", b"PK", r"a \.xlsx file is not taken"),
    "parquet under another name": ("p.csv", b"PAR1", "it is no text but parquet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    """One sentence with the file, the place and the mend."""
    file, content, words = REFUSED[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{file}.*{words}") as said:
        Prompts(file=str(tmp_path / file))
    assert "\n" not in str(said.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"none.txt cannot be read: No such file or directory; give a file that is \.txt"
    ):
        Prompts(file=str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="it is no regular file"):
        Prompts(file=str(tmp_path))


def test_braces_of_a_prompt_are_left_alone(tmp_path: Path) -> None:
    """The template's places are filled once, whatever stands in the words and values."""
    (tmp_path / "p.txt").write_text("A {} b\n{a} thing\n{colour}\n")
    assert Prompts(file=str(tmp_path / "p.txt"), template="{a}").prompts == (
        "an A {} b",
        "a {a} thing",
        "a {colour}",
    )
    assert Prompts(prompts=["A {} b"]).prompts == ("A {} b",)
    filled = Prompts(
        prompts=["{colour} cat", "dog"],
        template="{} on {colour}, {}",
        fill={"colour": ["{}", "{a} red"]},
        unseen=["{x}"],
    )
    assert filled.prompts == (
        "{colour} cat on {}, {colour} cat",
        "{colour} cat on {a} red, {colour} cat",
        "dog on {}, dog",
        "dog on {a} red, dog",
    )
    assert filled.unseen == ("{x} on {}, {x}", "{x} on {a} red, {x}")
    assert Prompts(prompts=["cat"], template="{a} {b} {}", fill={}).prompts == ("a cat {b} cat",)
