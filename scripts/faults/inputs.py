"""Inputs of faults in a folder, tried one by one: images/ and prompts/ are read, makers/ are run and what
they print is judged.

A maker is a script that writes inputs to build/faults, or prints a line for each of them: what plain
diffusers and alignlab make of it. The rules are the same for all: what is taken must be right (as the
reference shows it), and what is not must be refused in a sentence.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from alignlab.data.judgements import image
from alignlab.data.prompts import Prompts

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "build" / "faults"
REFUSED = re.compile(r"\b(ValueError|RunError|ConfigError|CompareError|RewardError|StartError)\b")
"""Errors whose text is a sentence for the user."""
NOT_A_MODEL = ("flow", "edm", "lcm", "nan", "inpaint", "shard_missing")
"""Parts of the names of model folders that no sampler here can draw from: they must be refused."""
REMARK = re.compile(r"note: |warning: |data=")
"""How lines begin that alignlab itself prints of an input."""
OTHER_NUMBERS = ("s_", "bf16", "fp8", "extra", "ema")
"""And of those that may draw other pictures than the model that they were made of."""


@dataclass(frozen=True)
class Verdict:
    """What became of one input."""

    kind: str
    name: str
    holds: bool
    said: str


def inputs_tried(folder: Path, only: str = "") -> list[Verdict]:
    """Tries all inputs of a folder, prints a line for each, and returns what became of them.

    Args:
        folder: with images/, prompts/ and makers/, each of which may be missing.
        only: tries those whose kind or name holds this.
    """
    tried = []
    HOME.mkdir(parents=True, exist_ok=True)
    for part in (
        images_tried(folder / "images"),
        prompts_tried(folder / "prompts"),
        makers_tried(folder, only),
    ):
        for verdict in part:
            if only in f"{verdict.kind} {verdict.name}":
                print(
                    f"{'holds' if verdict.holds else 'WRONG':5}  {verdict.kind:9} {verdict.name:26} "
                    f"{verdict.said[:300]}",
                    flush=True,
                )
                tried.append(verdict)
    return tried


# -- pictures


def images_tried(folder: Path) -> Iterator[Verdict]:
    """Each picture must be read as a viewer shows it, to 8 bits a channel, or be refused."""
    for path in sorted(folder.glob("*")):
        try:
            seen = read(path)
        except (ValueError, OSError) as error:
            yield Verdict(
                "image", path.name, REFUSED.search(type(error).__name__) is not None, f"refused: {error}"
            )
            continue
        try:
            away = float((seen - shown(path)).abs().mean())
        except (OSError, ValueError) as error:
            yield Verdict("image", path.name, False, f"taken, but no viewer can show it ({error})")
        else:
            yield Verdict("image", path.name, away < 0.02, f"read, {away:.3f} from what a viewer shows")


def read(path: Path):  # type: ignore[no-untyped-def]
    """[3, 48, 48] in [0, 1], as a table's picture is read."""
    return image({"image": path.name, "_table": path.parent / "metadata.jsonl"}, "image", (48, 48))


def shown(path: Path):  # type: ignore[no-untyped-def]
    """The same of a copy that leaves no choice: upright, 8 bits, on white. A twin with 8 bits says what one
    with more is."""
    twin = path.with_name(re.sub(r"(16|32)\..*", "8.png", path.name))
    with Image.open(twin if twin.is_file() else path) as picture:
        upright = ImageOps.exif_transpose(picture)
        if upright.mode.startswith(("I", "F")):
            upright = Image.fromarray((np.asarray(upright, dtype=float) / 257).round().astype(np.uint8))
        upright = upright.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    with tempfile.TemporaryDirectory() as home:
        flat.save(Path(home) / "flat.png")
        return read(Path(home) / "flat.png")


# -- prompts


def prompts_tried(folder: Path) -> Iterator[Verdict]:
    """Each file must give plain texts, without the signs of the format that it is in, or be refused; braces
    of a prompt stay."""
    for path in sorted(folder.glob("*")):
        try:
            prompts = Prompts(file=str(path), template="{a}").prompts
        except (ValueError, OSError) as error:
            yield Verdict("prompts", path.name, isinstance(error, ValueError), f"refused: {error}")
            continue
        text = path.suffix.lower() in (".txt", "")
        lines = (
            [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            if text
            else []
        )
        kept = all(
            any(prompt.endswith(line) and len(prompt) <= len(line) + 3 for prompt in prompts)
            for line in lines
        )
        signs = [
            prompt
            for prompt in prompts
            if not text and re.search(r'[{}\[\]"\t]|^\W*(prompt|text|caption)\b', prompt)
        ]
        yield Verdict("prompts", path.name, kept and not signs, f"read: {list(prompts)[:4]}")


# -- makers


def makers_tried(folder: Path, only: str) -> Iterator[Verdict]:
    """Runs the makers in their order, and judges what they print."""
    makers = folder / "makers"
    if not makers.is_dir():
        return
    (HOME / "rwmod").mkdir(exist_ok=True)
    for module in makers.glob("my*.py"):
        shutil.copy(module, HOME / "rwmod")
    more_pictures(folder / "images", HOME / "img")
    if (
        "loras.py" in {path.name for path in makers.iterdir()}
        and not (HOME / "base" / "summary.json").is_file()
    ):
        run(
            [
                "-m",
                "alignlab.train",
                "quick=true",
                "algo=ddpo",
                "reward=jpeg_compressibility",
                f"output_dir={HOME / 'base'}",
            ]
        )
    plan = (
        ("models.py", "", None),
        ("schedulers.py", "", None),
        ("compare_models.py", "", model),
        ("loras.py", "", None),
        ("compare_loras.py", "build/faults/lora", lora),
        ("loras_peft.py", "", None),
        ("compare_loras.py", "build/faults/lora2", lora),
        ("data.py", "", None),
        ("read_data.py", "", data),
        ("xl_edm.py", "", numbers),
        ("inpl.py", "", numbers),
    )
    for name, word, judge in plan:
        if not (makers / name).is_file() or (
            judge is not None and only and only not in f"{judge.__name__} {name}"
        ):
            continue
        code, said = run([str(makers / name), *([word] if word else [])])
        if judge is None and code:
            yield Verdict(
                "maker",
                name,
                False,
                f"exit code {code}: {said.strip().splitlines()[-1] if said.strip() else ''}",
            )
        elif judge is numbers:
            yield numbers(name, code, said)
        elif judge is not None:
            lines = [
                line for line in said.splitlines() if re.match(r"\S+ +(\S+ +)?\w", line) and len(line) > 23
            ]
            yield from (judge(line, said) for line in lines if not REMARK.match(line))
    if (makers / "commands.sh").is_file() and only in "command":
        yield from commands(makers / "commands.sh")


def more_pictures(source: Path, folder: Path) -> None:
    """The pictures that the makers of data take, with those that are made of plain.png here."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.glob("*"):
        shutil.copy(path, folder)
    if not (source / "plain.png").is_file():
        return
    with Image.open(source / "plain.png") as plain:
        plain.convert("CMYK").save(folder / "cmyk.jpg")
        plain.convert("RGB").save(
            folder / "anim.gif", save_all=True, append_images=[Image.new("RGB", plain.size)]
        )
        exif = Image.Exif()
        exif[0x0112] = 8
        plain.convert("RGB").rotate(-90, expand=True).save(folder / "exif8.jpg", exif=exif)


def run(words: list[str], cwd: Path = ROOT, seconds: int = 600) -> tuple[int, str]:
    """Python with these words, in a process of its own; its exit code and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    return done.returncode, done.stdout + (
        done.stderr if done.returncode else ""
    )  # else it has progress bars only


def lora(line: str, said: str) -> Verdict:
    """`NAME diffusers ... | alignlab moves 0.1  differ 0.0000`, or an error of alignlab's. Where diffusers
    reads nothing of a file, and so moves 0, the same tensors in diffusers' own form (`ok`) are
    what it must do."""
    name, _, rest = line.partition(" ")
    ours = rest.rpartition("|")[2]
    differ = re.search(r"differ (\S+)", ours)
    if differ is not None and "diffusers moves 0.000" in rest:
        own = re.search(r"^ok .*alignlab moves (\S+)", said, re.MULTILINE)
        return Verdict("lora", name, own is not None and f"alignlab moves {own[1]} " in ours, rest.strip())
    if differ is not None:
        return Verdict("lora", name, float(differ[1]) < 5e-4, rest.strip())
    return Verdict(
        "lora", name, REFUSED.search(ours) is not None or "diffusers moves" not in rest, rest.strip()
    )


def model(line: str, said: str) -> Verdict:
    """`NAME ok shape=... finite=True diff_to_emoji=0.0000 ...`, or an error."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if not rest.startswith("ok"):
        return Verdict("model", name, REFUSED.search(rest) is not None, rest)
    away = re.search(r"diff_to_emoji=([\d.]+)", rest)
    same = any(part in name for part in OTHER_NUMBERS) or (away is not None and float(away[1]) < 0.01)
    return Verdict(
        "model", name, "finite=True" in rest and same and not any(part in name for part in NOT_A_MODEL), rest
    )


def data(line: str, said: str) -> Verdict:
    """`NAME 4 examples [...]`, `NAME pairs=2 ...`, or an error."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    taken = re.match(r"[1-9]\d* examples|pairs=[1-9]", rest) is not None and "BAD AT READ" not in rest
    return Verdict("data", name, taken or REFUSED.search(rest) is not None, rest)


def numbers(name: str, code: int, said: str) -> Verdict:
    """What a script prints of a difference, or of the images that a reward was given; or a sentence of
    refusal."""
    last = next(iter(reversed([line for line in said.splitlines() if line.strip()])), "")
    if code:
        return Verdict("script", name, REFUSED.search(last) is not None, last)
    differs, after = re.search(r"differs by (\S+)", said), re.search(r"images after: (\S+)", said)
    right = (differs is None or float(differs[1]) < 1e-3) and (after is None or float(after[1]) == 0.5)
    return Verdict("script", name, right, " ".join(said.split())[-200:])


def commands(script: Path) -> Iterator[Verdict]:
    """Each command of a shell script, in a folder and a home of its own: it works, or ends in sentences with
    exit code 2."""
    with tempfile.TemporaryDirectory() as home:
        for number, line in enumerate(script.read_text(encoding="utf-8").splitlines(), 1):
            made = re.search(r"# after: (.*)", line)
            typed = made[1] if made else line.partition("  #")[0].strip()
            if not typed or (typed.startswith("#") and not made):
                continue
            environment = {**os.environ, "HOME": home, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            with subprocess.Popen(
                ["bash", "-c", typed],
                cwd=home,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            ) as shell:
                try:
                    said = shell.communicate(timeout=150)[0]
                except subprocess.TimeoutExpired:  # a run that is to be asked to end
                    os.killpg(shell.pid, signal.SIGTERM)
                    said = shell.communicate(timeout=120)[0]
            errors = [text for text in said.splitlines() if text.startswith("error: ")]
            holds = "Traceback" not in said and shell.returncode in (0, 2, 75, -signal.SIGTERM)
            yield Verdict(
                "command",
                f"line {number}",
                holds,
                f"{shell.returncode}: {(errors or said.splitlines() or [''])[-1]}",
            )
