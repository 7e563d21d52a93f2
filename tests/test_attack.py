"""scripts/attack.py counts the tests of faults by kind, and its rules for inputs tell right from wrong."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.attack import Attack, cases, page, put, table
from scripts.faults import inputs

ROOT = Path(__file__).resolve().parents[1]


def test_it_counts_what_the_tests_say(tmp_path: Path) -> None:
    """Of files in tests/faults all tests count, of others those that are marked; a failed case makes the exit
    code 1."""
    (tmp_path / "tests" / "faults").mkdir(parents=True)
    (tmp_path / "tests" / "faults" / "test_odd_files.py").write_text(
        "import pytest\n\n@pytest.mark.parametrize('k', range(3))\ndef test_x(k):\n    '''An odd file. "
        "More.'''\n    assert k < 2\n"
    )
    (tmp_path / "tests" / "test_room.py").write_text(
        "import pytest\n\n@pytest.mark.fault('links')\ndef test_a_link():\n    pass\n\ndef test_other():\n   "
        " assert False\n"
    )
    script = (
        f"import scripts.attack as a; from pathlib import Path; a.ROOT = Path({str(tmp_path)!r}); raise "
        "SystemExit(a.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "| odd files | 1 | 3 | 2 |" in done.stdout and "| links | 1 | 1 | 1 |" in done.stdout
    assert "| **all** | 2 | 4 | 3 |" in done.stdout


def test_the_pages() -> None:
    """The section takes the place of an earlier one and leaves all others; the list has a line for each
    test."""
    attacks = [
        Attack("links", "A link.", Counter(passed=2)),
        Attack("disks", "A disk.", Counter(passed=1, failed=1, skipped=1)),
    ]
    assert table(attacks)[2:] == ["| disks | 1 | 2 | 1 |", "| links | 1 | 2 | 2 |", "| **all** | 2 | 4 | 3 |"]
    text = "# Page\n\nBefore.\n\n## After\n\nStays.\n"
    once = put(page(attacks), text)
    assert once.startswith("# Page\n\nBefore.\n\n## After\n\nStays.\n\n## Faults that people met\n")
    assert put(page(attacks), once) == once
    middle = put(page(attacks), once + "\n## Last\n\nStays too.\n")
    assert middle.endswith("\n\n## Last\n\nStays too.\n") and middle.count("## Faults") == 1
    assert "| A disk. | 2 | 1 |" in cases(attacks)


@pytest.mark.parametrize(
    ("rule", "line", "holds"),
    [
        (inputs.lora, "ok  diffusers moves 0.1 | alignlab moves 0.1  differ 0.0000", True),
        (inputs.lora, "rslora  diffusers moves 0.1 | alignlab moves 0.2  differ 0.8000", False),
        (inputs.lora, "dora  diffusers moves 0.1 | alignlab ValueError: a DoRA is not applied", True),
        (inputs.lora, "dora  diffusers moves 0.1 | alignlab KeyError: 'x'", False),
        (inputs.lora, "comfy  diffusers moves 0.000 | alignlab moves 0.1  differ inf", True),
        (inputs.lora, "comfy  diffusers moves 0.000 | alignlab moves 0.2  differ inf", False),
        (
            inputs.model,
            "bin_only   ok shape=(2, 3, 48, 48) finite=True diff_to_emoji=0.0000 pred=epsilon",
            True,
        ),
        (
            inputs.model,
            "bin_only   ok shape=(2, 3, 48, 48) finite=True diff_to_emoji=0.1200 pred=epsilon",
            False,
        ),
        (
            inputs.model,
            "r_flow   ok shape=(2, 3, 48, 48) finite=True diff_to_emoji=0.0000 pred=epsilon",
            False,
        ),
        (inputs.model, "nan_unet   ValueError: not finite", True),
        (inputs.model, "inpaint9   RuntimeError: 9 channels", False),
        (inputs.data, "ok   4 examples [('a', 'b')]", True),
        (inputs.data, "ok   4 examples [('a', 'b')] BAD AT READ: ['x']", False),
        (inputs.data, "odd   AttributeError: 'x'", False),
    ],
)
def test_the_rules_of_the_lines(rule, line: str, holds: bool) -> None:
    """What is taken must be as the reference; what is not must be refused in a sentence."""
    assert rule(line, "ok  diffusers moves 0.1 | alignlab moves 0.1  differ 0.0000").holds is holds


def test_the_rule_of_pictures(tmp_path: Path) -> None:
    """A picture that is read as a viewer shows it holds; the reference of one with more than 8 bits is
    scaled, not cut off."""
    pixels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    Image.fromarray((pixels // 257).astype(np.uint8)).save(tmp_path / "flat.png")
    assert (inputs.shown(tmp_path / "deep.png") - inputs.shown(tmp_path / "flat.png")).abs().max() < 0.01
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "images" / "plain.png")
    (verdict,) = inputs.images_tried(tmp_path / "images")
    assert verdict.holds and verdict.name == "plain.png"
