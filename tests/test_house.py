"""The rules of the house: imports run one way, every configuration builds, one class and one file extend
it."""

import ast
import inspect
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from PIL import Image

from alignlab.config.build import resolve
from tests import warm
from tests.running import configured, lines, tiny

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CONF = ROOT / "alignlab", ROOT / "conf"
ROOMS = {
    "distributed": set(),
    "files": set(),
    "fast": set(),
    "data": {"files"},
    "models": {"distributed", "fast"},
    "metrics": {"models"},
    "rewards": {"fast", "models"},
    "engine": {"distributed", "fast", "models"},
    "objectives": {"data", "distributed", "engine"},
    "runs": {"data", "files", "models"},
    "config": {"distributed", "files", "models", "rewards", "runs"},
    "weights": {"config", "distributed", "engine", "fast", "files", "models", "runs"},
    "training": {
        "config",
        "data",
        "distributed",
        "engine",
        "fast",
        "files",
        "metrics",
        "models",
        "objectives",
        "rewards",
        "runs",
        "weights",
    },
    "planning": {"config", "distributed", "engine", "models", "objectives", "rewards", "training"},
    "compare": {"files", "metrics", "runs"},
    "paper": {"compare", "config", "data", "files", "metrics", "runs", "training", "weights"},
}
"""The rooms, from the bottom up, and those that each may import beside itself. A command may import every
room."""
NOT_ROOMS = {"assets"}
"""Folders without code."""
COMMANDS_THAT_IMPORT_ONE = {"plan": {"train"}, "rewards/__main__": {"rewards_table"}}
"""plan runs the train loop on the meta device; what is typed as alignlab.rewards is the command
rewards_table."""
LIBRARIES = {
    "engine/samplers": {"torch"},
    "engine/conditioning": {"torch"},
    "engine/forward_process": {"torch"},
    "engine/noise": {"numpy", "torch"},
    "engine/rollout": {"torch"},
    "engine/distance_to_base": {"torch"},
}
"""What the modules that hold formulas may import beside Python's own library."""


def modules() -> Iterator[tuple[str, Path]]:
    """Every module, by its path below the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE).with_suffix("")), path


def commands() -> list[str]:
    """The files at the top, and the one in a room that `python -m alignlab.rewards` runs."""
    return [
        *(path.stem for path in sorted(PACKAGE.glob("*.py")) if not path.stem.startswith("__")),
        "rewards/__main__",
    ]


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_files_at_the_top_are_commands_and_folders_are_rooms() -> None:
    """`ls alignlab` shows what can be typed, and the rooms of the table, each a package."""
    for name in commands():
        text = (PACKAGE / f"{name}.py").read_text()
        assert 'if __name__ == "__main__":' in text and "main()" in text, (
            f"{name} is no command; give it a room"
        )
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} - {
        "conf"
    }
    assert folders == ROOMS.keys() | NOT_ROOMS
    assert all((PACKAGE / room / "__init__.py").is_file() for room in ROOMS)


def test_imports_run_one_way() -> None:
    """A module imports its own room and those that the room's row allows. Nobody imports a command, but plan
    the train loop. Only config/ and the commands touch Hydra; formulas need torch alone."""
    wrong = []
    for name, path in modules():
        room, every = name.partition("/")[0], imports(path)
        ours = {word.split(".")[1] for word in every if word.startswith("alignlab.")}
        libraries = {word.split(".")[0] for word in every} - {"alignlab", *sys.stdlib_module_names}
        command = name in commands() or name in ("__init__", "__main__")
        allowed = {*ROOMS} if command else ROOMS[room] | {room}
        allowed |= COMMANDS_THAT_IMPORT_ONE.get(name, set())
        wrong += [f"{name} imports alignlab.{other}" for other in sorted(ours - allowed)]
        wrong += [
            f"{name} imports {library}" for library in sorted(libraries - LIBRARIES.get(name, libraries))
        ]
        if libraries & {"hydra", "omegaconf"} and not command and room != "config":
            wrong.append(f"{name} touches Hydra")
    assert not wrong, "\n".join(wrong)


def test_the_rooms_stand_in_order() -> None:
    """Each room imports rooms above it in the table only, so there is no cycle."""
    seen: set[str] = set()
    for room, allowed in ROOMS.items():
        assert allowed <= seen, f"{room} imports {allowed - seen}, which stand below it"
        seen.add(room)


def files() -> list[tuple[str, str]]:
    """The groups and options; an option may stand in a folder of its group."""
    paths = [path.relative_to(CONF).with_suffix("") for path in sorted(CONF.glob("*/**/*.yaml"))]
    found = [(path.parts[0], "/".join(path.parts[1:])) for path in paths]
    return [
        (group, option) for group, option in found if group not in ("recipe", "figure", "hydra")
    ]  # of alignlab.stages and alignlab.figure, and proved in their tests; and what every command takes


NEEDS = {
    **{
        word: ["model=sd35", "sampler=flow", "eval_sampler=flow"]
        for word in ("sampler=flow", "eval_sampler=flow", "model=sd35")
    },
    "model=flux": ["sampler=flow", "eval_sampler=flow"],  # what an option must be given to make sense
    "prompts=file": [f"prompts.file={ROOT / 'README.md'}"],
    **{f"algo={name}": ["algo.data={captions}/pairs.jsonl"] for name in ("dpo", "kto", "sft")},
    "experiment=paper/diffusion_dpo": ["algo.data={captions}/pairs.jsonl"],
    "prompts=dataset": ["prompts.dataset={captions}"],
    "reward=clip_diversity": ["prompts.per_prompt=4"],
    "diversity=alex": [f"diversity.weights={ROOT / 'README.md'}"],
    "reward=preference": ["reward.preference.path=emoji_preference"],
    "reward=aesthetic": ["reward.aesthetic.path=emoji_aesthetic"],
    "reward=laion_aesthetic_v1": ["reward.laion_aesthetic_v1.path=owner/name"],
    "eval_rewards=laion_aesthetic_v1": ["eval_rewards.laion_aesthetic_v1.path=owner/name"],
    "reward=true_preference": ["algo=ddpo"],
    "reward=true_aesthetic": ["algo=ddpo"],
    "eval_rewards=preference": ["eval_rewards.preference.path=emoji_preference"],
    "eval_rewards=aesthetic": ["eval_rewards.aesthetic.path=emoji_aesthetic"],
    "reward=jpeg_compressibility": ["algo=ddpo"],
    "reward=jpeg_incompressibility": ["algo=ddpo"],
    **{f"reward={name}": ["algo=ddpo"] for name in ("remote", "vlm_description", "vlm_counting")},
}


def test_every_configuration_file_builds(tmp_path: Path) -> None:
    """It composes, its _target_ resolves, its keys are the constructor's arguments and its constructor takes
    the values."""
    (tmp_path / "train.csv").write_text("prompt\na lion\na cat\n")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a lion", "winner": "0.png", "loser": "1.png"}')
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    wrong, one_by_one = [], [file for file in files() if file != ("reward", "none")]
    # those may stand together, for their files are built one by one as reward=
    held_out = [option for group, option in files() if group == "reward"]
    together = f"eval_rewards=[{','.join(held_out)}]"
    needs = NEEDS | {together: [need for o in held_out for need in NEEDS.get(f"eval_rewards={o}", [])]}
    for word in [*("=".join(file) for file in one_by_one), together]:
        try:
            configured(word, *(need.format(captions=tmp_path) for need in needs.get(word, [])))
        except Exception as error:  # whatever it is, the next file is tried too
            wrong.append(f"{word}: {error}")
    assert not wrong, "\n".join(wrong)


def test_every_configuration_file_says_what_it_is() -> None:
    """Its first line that is not a package directive is a comment, and an algorithm's or experiment's holds a
    command."""
    wrong = []
    for group, option in files():
        text = (CONF / group / f"{option}.yaml").read_text()
        first = next(line for line in text.splitlines() if not line.startswith("# @"))
        typed = group not in ("algo", "experiment") or "python -m alignlab.train" in first
        if not (first.startswith("# ") and typed):
            wrong.append(f"{group}/{option}.yaml begins with {first!r}")
    assert not wrong, "\n".join(wrong)


def test_no_default_stands_in_two_places() -> None:
    """Every algorithm's file lists all arguments of its constructor, so that each has a key to override."""
    for option in ("ddpo", "draft", "dpo", "dpo_online", "kto", "rwr", "sft"):
        node = yaml.safe_load((CONF / "algo" / f"{option}.yaml").read_text())["algo"]
        assert set(inspect.signature(resolve(node["_target_"])).parameters) == node.keys() - {"_target_"}


def test_one_class_and_one_file_extend_it(tiny_sd: str, tmp_path: Path) -> None:
    """A new objective, a new reward and a new prompt set, outside the package, train by the real command."""
    pieces = {
        "mine.py": '''
            import torch
            from alignlab.objectives import Objective, Update
            from alignlab.engine.rollout import Gradients


            class Nudge(Objective):
                """Follows the reward's gradient through the last step, with a decaying weight."""

                needs_gradient = True

                def __init__(self, *, strength: float = 1.0):
                    self.strength, self.epochs = strength, 0

                def plan(self, steps, rng):
                    return Gradients.last(1, steps)

                def updates(self, policy, rollouts, micro_batch, rng):
                    self.epochs += 1
                    yield Update(batches=((record.share, record) for record in rollouts))

                def loss(self, policy, batch):
                    loss = -self.strength / self.epochs * batch.reward.mean()
                    return loss, {"nudge/reward": batch.reward.detach().mean()}

                def epoch_metrics(self):
                    return {"nudge/epochs": float(self.epochs)}

                def state_dict(self):
                    return {"epochs": self.epochs}

                def load_state_dict(self, state):
                    self.epochs = state["epochs"]


            class Dark:
                differentiable, unit, typical_range = True, "minus mean pixel", (-1.0, 0.0)

                def __call__(self, images, prompts):
                    return -images.mean((1, 2, 3))
            ''',
        "conf/algo/nudge.yaml": "_target_: mine.Nudge\nstrength: 2.0\n",
        "conf/reward/dark.yaml": "dark:\n  _target_: mine.Dark\n  weight: 1.0\n  normalize: false\n",
        "conf/prompts/zoo.yaml": "_target_: alignlab.data.prompts.Prompts\nprompts: [gnu, yak]\n"
        "template: '{a}'\nper_prompt: 1\n",
    }
    for name, text in pieces.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(dedent(text).lstrip())
    words = [w for w in tiny(tiny_sd) if not w.startswith(("reward=", "prompts.", "steps="))]
    words += [
        "algo=nudge",
        "reward=dark",
        "prompts=zoo",
        "allow_targets=[mine]",
        "steps=2",
        "lr=0.01",
        "output_dir=run",
        "algo.strength=3",
    ]
    call = [sys.executable, "-m", "alignlab.train", "--config-dir", "conf", *words]
    done = warm.run(call, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = lines(tmp_path / "run")
    assert [line["nudge/epochs"] for line in found] == [1.0, 2.0] and found[0]["reward/dark/mean"] < 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final"]["dark"] < 0
    assert (tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors").is_file()


def test_the_wheel_is_complete(tmp_path: Path) -> None:
    """The wheel holds the code, every configuration file and the weights, and it runs."""
    pytest.importorskip("hatchling")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    assert {f"alignlab/conf/{p.relative_to(CONF)}" for p in CONF.glob("**/*.yaml")} <= names
    assert {
        f"alignlab/{p.relative_to(PACKAGE)}"
        for p in PACKAGE.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    } <= names
    code = "import alignlab.train as t; print(t.__file__); t.main()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = warm.run([sys.executable, "-c", code, "lr=-1"], env=environment, capture_output=True, cwd=tmp_path)
    assert done.stdout.strip().startswith(str(tmp_path / "site"))
    assert (done.returncode, done.stderr) == (2, "error: lr=-1.0 must be positive\n")


def test_the_readme_names_every_room() -> None:
    """The table in README lists the rooms that there are, and each room says in its own words what it is
    for."""
    text = (ROOT / "README.md").read_text()
    table = text.partition("| room | what is in it |")[2].partition("\n\n")[0]
    named = {
        name
        for row in table.splitlines()[2:]
        for name in row.split("|")[1].replace("`", "").replace(",", " ").split()
    }
    assert named == ROOMS.keys()
    silent = [
        room
        for room in ROOMS
        if not ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    ]
    assert not silent
