"""The rules of the house: imports run one way, every configuration builds, one class and one file extend it."""

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
from tests.running import configured, lines, tiny

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CONF = ROOT / "alignlab", ROOT / "conf"
COMMANDS = {
    "train",
    "make_pairs",
    "train_reward",
    "evaluate",
    "report",
    "sample",
    "figure",
    "export",
    "plan",
    "rewards/__main__",
    "serve_reward",
    "stages",
}

# What each module may import of alignlab, beside its own package; a package's row is its modules'.
MAY = {
    "noise": set(),
    "sharding": {"ranks"},
    "frozen": set(),
    "malloc": set(),
    "lora": {"one_product"},
    "one_product": {"frozen"},
    "shared_start": set(),
    "ranks": set(),
    "schedule": set(),
    "adamw8bit": set(),
    "nodes": {"pasted", "undisturbed"},
    "samplers": set(),
    "conditioning": set(),
    "forward": {"samplers"},
    "models": {"ranks"},
    "judge": set(),
    "rewards": {"frozen", "judge", "servers", "undisturbed"},
    "rewards/__main__": {"bounded_yaml", "checks", "config", "nodes", "rewards", "servers"},
    "metrics": {"judge"},
    "data": {"bounded_yaml"},
    "sealed": set(),
    "bounded_yaml": set(),
    "folder": set(),
    "runs": {"bounded_yaml", "folder", "pasted", "sealed"},
    "journal": {"ranks"},
    "policy": {"conditioning", "frozen", "lora", "models", "ranks", "sharding", "shared_start"},
    "stops": {"pasted", "ranks"},
    "peers": {"nodes", "pasted", "ranks"},
    "collected": {"noise", "objectives", "policy", "ranks", "rewards", "rollout", "runs", "samplers", "sealed", "stops"},
    "guards": {"journal", "lab", "ranks", "rewards", "rollout", "runs"},
    "memory": {"checks", "footprint", "ranks"},
    "failures": {"config", "footprint", "guards", "memory", "nodes", "pasted", "ranks", "rewards", "rollout", "runs"},
    "start": {"lora", "models", "policy", "runs", "sharding"},
    "dials": {"conditioning", "lora", "policy", "samplers"},
    "tuned": {"config", "dials", "lora", "malloc", "nodes", "noise", "policy", "rollout", "runs", "samplers", "start"},
    "rollout": {"conditioning", "noise", "policy", "samplers"},
    "drift": {"policy", "rollout", "samplers"},
    "scoring": {"policy", "rewards", "rollout"},
    "objectives": {"conditioning", "data", "drift", "forward", "noise", "policy", "ranks", "rollout", "samplers"},
    "secrecy": set(),
    "foreign": {"bounded_yaml", "servers"},
    "servers": set(),
    "spinning": set(),
    "checks": {"nodes", "path_keys", "ranks", "rewards", "runs", "secrecy", "start"},
    "config": {
        "checks",
        "folder",
        "foreign",
        "job_names",
        "nodes",
        "pasted",
        "path_keys",
        "ranks",
        "runs",
        "secrecy",
        "servers",
        "typed",
    },
    "lab": {
        "checks",
        "collected",
        "config",
        "data",
        "malloc",
        "metrics",
        "nodes",
        "objectives",
        "policy",
        "ranks",
        "rewards",
        "samplers",
        "schedule",
        "sharding",
        "start",
    },
    "measure": {"drift", "lab", "metrics", "noise", "policy", "ranks", "rollout", "runs", "samplers", "stops"},
    "images": set(),
    "compare": {"images", "metrics", "pasted", "runs", "sealed"},
    "outcomes": {"compare", "images", "metrics"},
    "figures": {"compare", "metrics"},
    "train_reward": {"bounded_yaml", "config", "data", "folder", "nodes", "pasted", "rewards", "runs"},
    "serve_reward": {"checks", "config", "nodes", "rewards", "servers"},
    "train": {
        "card",
        "collected",
        "config",
        "failures",
        "guards",
        "journal",
        "lab",
        "measure",
        "noise",
        "peers",
        "ranks",
        "rollout",
        "runs",
        "schedule",
        "scoring",
        "stops",
    },
    "stages": {"bounded_yaml", "config", "folder", "foreign", "nodes", "pasted", "runs", "servers"},
    "dry": set(),
    "footprint": {"dry", "lab", "measure", "models", "nodes", "objectives", "rollout"},
    "plan": {"checks", "config", "footprint", "lab", "memory", "nodes", "pasted", "rewards", "rollout", "train"},
    "card": {"bounded_yaml", "checks", "config", "folder", "lab", "nodes", "pasted", "ranks", "runs"},
    "export": {"card", "checks", "config", "folder", "models", "nodes", "runs", "start"},
    "evaluate": {
        "checks",
        "config",
        "data",
        "folder",
        "images",
        "lab",
        "measure",
        "metrics",
        "nodes",
        "rewards",
        "runs",
        "sealed",
        "tuned",
    },
    "sample": {"checks", "config", "folder", "nodes", "runs", "tuned"},
    "candidates": {"bounded_yaml", "data", "folder", "runs"},
    "make_pairs": {
        "candidates",
        "checks",
        "config",
        "data",
        "folder",
        "lab",
        "nodes",
        "noise",
        "pasted",
        "rewards",
        "rollout",
        "runs",
        "sealed",
        "tuned",
    },
    "probes": {"checks", "config", "data", "dials", "folder", "lab", "measure", "nodes", "runs", "tuned"},
    "tables": {"metrics"},
    "paper": {"compare", "figures", "metrics"},
    "figure": {
        "compare",
        "config",
        "folder",
        "job_names",
        "metrics",
        "nodes",
        "paper",
        "pasted",
        "probes",
        "rewards",
        "runs",
        "tables",
    },
    "report": {"compare", "config", "figures", "folder", "metrics", "nodes", "outcomes", "pasted", "runs", "tables"},
    "path_keys": set(),
    "pasted": set(),
    "typed": {"pasted", "path_keys"},
    "job_names": {"bounded_yaml"},
    "undisturbed": set(),
}
OTHERS = {
    "samplers": {"torch"},
    "conditioning": {"torch"},
    "forward": {"torch"},
    "noise": {"numpy", "torch"},
    "rollout": {"torch"},
    "drift": {"torch"},
}
"""Libraries of the modules that hold formulas: nothing else."""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if path.stem == "__main__":
            name = f"{name}/__main__"
        if name != "__init__":
            yield name, path


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


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: str(v.relative_to(PACKAGE)) if isinstance(v, Path) else "")
def test_imports_run_one_way(name: str, path: Path) -> None:
    """A module imports what its row allows; only config.py, typed.py and the commands touch Hydra; nobody imports a command, but plan the
    train loop that it runs dry."""
    assert name in MAY, f"{path} has no row in MAY: which rooms may it enter?"
    ours = {word.split(".")[1] for word in imports(path) if word.startswith("alignlab.")}
    assert ours <= MAY[name] | ({name} if path.parent != PACKAGE else set())
    libraries = {word.split(".")[0] for word in imports(path)} - {"alignlab", *sys.stdlib_module_names}
    assert libraries <= OTHERS.get(name, libraries)
    assert name in COMMANDS | {"config", "typed"} or not libraries & {"hydra", "omegaconf"}
    assert not ours & COMMANDS - ({"train"} if name == "plan" else set())


def test_the_rows_have_no_cycle() -> None:
    """The rules themselves run one way."""
    done: list[str] = []
    while len(done) < len(MAY):
        ready = [name for name, allowed in MAY.items() if name not in done and allowed <= {*done}]
        assert ready, f"a cycle among {MAY.keys() - {*done}}"
        done += ready


def files() -> list[tuple[str, str]]:
    found = [(p.parent.name, p.stem) for p in sorted(CONF.glob("*/*.yaml"))]
    return [(group, option) for group, option in found if group != "recipe"]  # of alignlab.stages, and proved in its tests


NEEDS = {
    **{word: ["model=sd35", "sampler=flow", "eval_sampler=flow"] for word in ("sampler=flow", "eval_sampler=flow", "model=sd35")},
    "model=flux": ["sampler=flow", "eval_sampler=flow"],  # what an option must be given to make sense
    "prompts=file": [f"prompts.file={ROOT / 'README.md'}"],
    **{f"algo={name}": ["algo.data={captions}/pairs.jsonl"] for name in ("dpo", "kto", "sft")},
    "experiment=recipe_diffusion_dpo": ["algo.data={captions}/pairs.jsonl"],
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


@pytest.mark.parametrize(("group", "option"), [f for f in files() if f != ("reward", "none")])
def test_every_configuration_file_builds(group: str, option: str, tmp_path: Path) -> None:
    """It composes, its _target_ resolves, its keys are the constructor's arguments and its constructor takes the values."""
    (tmp_path / "train.csv").write_text("prompt\na lion\na cat\n")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a lion", "winner": "0.png", "loser": "1.png"}')
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    configured(f"{group}={option}", *(word.format(captions=tmp_path) for word in NEEDS.get(f"{group}={option}", [])))


@pytest.mark.parametrize(("group", "option"), files())
def test_every_configuration_file_says_what_it_is(group: str, option: str) -> None:
    """Its first line that is not a package directive is a comment, and an algorithm's or experiment's holds a command."""
    text = [line for line in (CONF / group / f"{option}.yaml").read_text().splitlines() if not line.startswith("# @")]
    assert text[0].startswith("# ")
    assert group not in ("algo", "experiment") or "python -m alignlab.train" in text[0]


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
            from alignlab.objectives import Update
            from alignlab.engine.rollout import Gradients


            class Nudge:
                """Follows the reward's gradient through the last step, with a decaying weight."""

                needs_noise, needs_gradient, kl_coeff = False, True, 0.0

                def __init__(self, *, strength: float = 1.0):
                    self.strength, self.epochs = strength, 0

                def plan(self, steps, rng):
                    return Gradients.last(1, steps)

                def store(self, steps):
                    return "image"

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
        "conf/prompts/zoo.yaml": "_target_: alignlab.data.prompts.Prompts\nprompts: [gnu, yak]\ntemplate: '{a}'\nper_prompt: 1\n",
    }  # fmt: skip
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
    done = subprocess.run(call, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = lines(tmp_path / "run")
    assert [line["nudge/epochs"] for line in found] == [1.0, 2.0] and found[0]["reward/dark/mean"] < 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final"]["dark"] < 0
    assert (tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors").is_file()


def test_the_wheel_is_complete(tmp_path: Path) -> None:
    """The wheel holds the code, every configuration file (eval_rewards too, a link in the checkout) and the weights, and it runs."""
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
    assert {f"alignlab/conf/eval_rewards/{p.name}" for p in (CONF / "reward").glob("*.yaml")} <= names
    assert {
        f"alignlab/{p.relative_to(PACKAGE)}" for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    } <= names
    code = "import alignlab.train as t; print(t.__file__); t.main()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code, "lr=-1"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().startswith(str(tmp_path / "site"))
    assert (done.returncode, done.stderr) == (2, "error: lr=-1.0 must be positive\n")
