"""A few of the hostile inputs of fuzz_inputs.py, of every kind: each is taken, or ends in sentences
with nothing written. Mutated configurations, as many as that script tries, are the script's; its figures are
in results/reliability.md."""

from pathlib import Path

import pytest

from alignlab import sample, train
from alignlab.data.preferences import Preferences
from alignlab.data.prompts import Prompts
from alignlab.models.pipeline import DiffusersPipeline
from alignlab.models.sd import StableDiffusion
from alignlab.rewards.aesthetic import Aesthetic
from alignlab.rewards.clip import Clip
from alignlab.rewards.preference import Preference
from tests.harness.fuzz import folders
from tests.harness.fuzz.configs import command_lines, tried
from tests.harness.fuzz.files import pair_files, png, prompt_files
from tests.harness.fuzz.outcome import PYTHONESE, Accepted, attempt

ASSETS = Path(train.__file__).parent / "assets"
PLACES = {"run": "/nowhere", "table": "t.csv", "file": "t.csv", "new": "new", "huge": "x" * 5000}


def said_of(call) -> str:
    """What a constructor says; "" if it takes the input."""
    try:
        call()
    except (ValueError, OSError) as error:
        assert str(error) and not PYTHONESE.search(str(error)), error
        return str(error)
    return ""


def test_configurations(tmp_path: Path) -> None:
    """Every hundredth of the script's command lines."""
    (tmp_path / "t.csv").write_text("x\n")
    found = [tried(name, words, tmp_path) for name, words in [*command_lines(0, 500, PLACES)][11::100]]
    assert len(found) == 5 and not [outcome for outcome in found if outcome.verdict == "broken"]
    assert sum(outcome.verdict == "refused" for outcome in found) > 1


def test_the_harness_sees_what_is_broken(tmp_path: Path) -> None:
    """A traceback, a file that appears, an exit code without a sentence, and a sentence in Python's words are
    no outcome."""

    def boom() -> int:
        raise KeyError("x")

    def write() -> int:
        (tmp_path / "new").touch()
        raise Accepted

    def mumble() -> int:
        print("error: 'NoneType' object is not iterable", file=__import__("sys").stderr)
        return 2

    for call in (boom, write, lambda: 2, lambda: 1, mumble):
        assert attempt("x", "x", call, tmp_path).verdict == "broken"
    assert attempt("x", "x", lambda: 0, tmp_path).verdict == "valid"


@pytest.mark.parametrize(
    ("name", "file", "content"), prompt_files(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_prompt_files(name: str, file: str, content: bytes, tmp_path: Path) -> None:
    """All of them; what is taken is text, without a NUL, each prompt once."""
    (tmp_path / file).write_bytes(content)
    said = said_of(lambda: Prompts(file=str(tmp_path / file)))
    if said:
        assert f"prompts.file={tmp_path}" in said or "holds no prompt" in said
    else:
        prompts = Prompts(file=str(tmp_path / file)).prompts
        assert len({*prompts}) == len(prompts) and all(
            p.strip() == p and "\0" not in p and p.encode() for p in prompts
        )


REFUSED_PROMPTS = {
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "latin-1",
    "NUL bytes",
    "random bytes",
    "an image",
    "empty",
    "blank lines",
    "ASCII in UTF-16 without a mark",
}


def test_which_prompt_files_are_refused(tmp_path: Path) -> None:
    """Other encodings than UTF-8, NUL bytes, and nothing; of .jsonl, lines that are no object with a text.
    The others are taken."""
    for name, file, content in prompt_files():
        (tmp_path / file).write_bytes(content)
        refused = bool(said_of(lambda f=file: Prompts(file=str(tmp_path / f))))
        taken_lines = ("nested metadata", "NaN", "a repeated key")
        if name in REFUSED_PROMPTS or name.startswith("a line of .jsonl is"):
            assert refused != name.endswith(taken_lines), name
        elif file == "p.txt" and name not in ("cp037", "shift_jis"):
            assert not refused, name


@pytest.mark.parametrize(
    ("name", "file", "text", "more"),
    pair_files(),
    ids=lambda value: value if isinstance(value, str) and len(value) < 50 else "",
)
def test_pair_files(name: str, file: str, text: str, more: dict[str, bytes], tmp_path: Path) -> None:
    """All of them, down to the pictures."""
    for picture, made in {"0.png": png(16, 16), "1.png": png(16, 20), **more}.items():
        (tmp_path / picture).write_bytes(made)
    (tmp_path / file).write_bytes(text.encode("utf-8", "surrogatepass"))

    def read() -> None:
        data = Preferences(str(tmp_path))
        for k in range(len(data)):
            data.images(k, (8, 8))

    taken = (", fine", "a blank line", "1 x 5000")
    assert bool(said_of(read)) != name.endswith(taken)


DAMAGES = (
    "model_index.json is broken",
    "index names another library",
    "another family",
    "unet lacks a tensor",
    "unet cut to 50.0%",
    "vae has a wrong shape",
    "vae without scale",
    "text_encoder lacks a tensor",
    "text_encoder is empty",
    "unet is a pickle",
    "unet: unet/config.json is a number",
    "tokenizer gone",
    "tokenizer without tokenizer_config.json",
)


def test_pipelines(tiny_sd: str, tmp_path: Path) -> None:
    """Some of the script's damages, most of which libraries would load without a word; each is refused."""
    chosen = [pair for pair in folders.pipeline_damages(Path(tiny_sd)) if pair[0] in DAMAGES]
    assert len(chosen) == len(DAMAGES)
    for name, damage in chosen:
        copy = _copied(Path(tiny_sd), tmp_path, damage)
        assert said_of(lambda at=copy: (StableDiffusion.check(at), StableDiffusion(at))), name


def test_rewards_and_clips(tmp_path: Path) -> None:
    """All damages of the learned rewards and the CLIP that the library ships; each is refused but a tensor
    more or less... none."""
    for kind, build in (
        ("emoji_aesthetic", Aesthetic),
        ("emoji_preference", Preference),
        ("emoji_clip", Clip),
    ):
        damages = folders.clip_damages if build is Clip else folders.reward_damages
        for name, damage in list(damages(ASSETS / kind))[::3]:
            copy = _copied(ASSETS / kind, tmp_path, damage)
            assert said_of(lambda at=copy, b=build: b(at)), f"{kind}: {name}"


def test_loras(tiny_sd: str, tmp_path: Path) -> None:
    """Metadata that lies and tensors that are missing, as sample's lora=."""
    from alignlab.engine.policy import Policy
    from alignlab.models.lora import LoRA

    family = StableDiffusion(tiny_sd)
    policy = Policy(family, lora=LoRA(rank=2, alpha=2))
    policy.save(tmp_path / "lora")
    for name, damage in folders.lora_damages("pytorch_lora_weights.safetensors"):
        copy = _copied(tmp_path / "lora", tmp_path, damage)
        said = said_of(lambda at=copy: DiffusersPipeline.read_lora(family, Path(at)))
        assert said or name in ("lacks one side", "lacks the other side", "wrong shape", "wrong name"), (
            name
        )  # the policy refuses these
    whole = {"lacks one side", "metadata of another rank", "wrong shape"}
    for name, damage in folders.lora_damages("pytorch_lora_weights.safetensors"):
        if name in whole:
            words = [f"model.path_or_id={tiny_sd}", "n=1", "eval_sampler.steps=1", "device=cpu", "lora=copy"]
            (outcome,) = folders.damaged(
                "LoRA", tmp_path / "lora", name, damage, tmp_path, [(sample, "sample.save_grid", words)]
            )
            assert outcome.verdict == "refused", outcome


def _copied(source: Path, home: Path, damage: folders.Damage) -> str:
    import shutil

    copy = home / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    damage(copy)
    return str(copy)
