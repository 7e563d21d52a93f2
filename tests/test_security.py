"""What SECURITY.md promises, one test or more for each promise: files of others are data, and never code."""

import ast
import io
import json
import os
import pickle
import re
import shlex
import shutil
import socket
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import alignlab
from alignlab import evaluate, export, make_pairs, plan, stages, train
from alignlab import report as report_command
from alignlab import sample as sample_command
from alignlab.compare.finished import read_runs
from alignlab.config import secrecy
from alignlab.config.build import node_problems
from alignlab.config.leaves import leaf_problems
from alignlab.data.captioned import captioned
from alignlab.data.judgements import PIXELS, image
from alignlab.files.safe_folder import RunError
from alignlab.metrics.diversity import AlexDistance
from alignlab.models.sd import StableDiffusion
from alignlab.report import report
from alignlab.rewards import servers as servers
from alignlab.rewards.clip import Clip
from alignlab.rewards.compose import RewardError
from alignlab.rewards.remote import Remote
from tests.browser import NASTY, browser, in_browser
from tests.harness.fuzz.files import bomb
from tests.harness.fuzz.folders import Bomb
from tests.running import command_line, configured, tiny
from tests.runs_on_disk import made_run

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("alignlab", "benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")]


def calls(code: str) -> list[tuple[str, dict[str, object]]]:
    """Every call of a module's code, by its dotted name, with its constant keyword arguments."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            its = {word.arg: getattr(word.value, "value", None) for word in node.keywords if word.arg}
            found.append((ast.unparse(node.func), its))
    return found


# -- no pickle, no code of others


UNPICKLERS = {"pickle", "joblib", "dill", "marshal", "shelve", "cloudpickle"}
UNPACKERS = {"tarfile", "zipfile"}
REFUSED = {
    "np.load",
    "numpy.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
    "os.system",
}
IN_PLACE = {"alignlab/data/shards.py"}
"""Reads the shards of captioned pictures where they lie: it may open a .tar, and writes nothing of it."""
OUR_OWN = {"alignlab/figure.py", "alignlab/paper/probes.py"}
"""Read YAML of conf/ alone."""


def dangers(name: str, code: str) -> Iterator[str]:
    """What a file imports or calls that could run what others wrote."""
    nodes = list(ast.walk(ast.parse(code)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and not (
            # the error of a file that is no pickle
            node.module == "pickle" and [alias.name for alias in node.names] == ["UnpicklingError"]
        ):
            imported.add(node.module or "")
    yield from imported & (UNPICKLERS | UNPACKERS - ({"tarfile"} if name in IN_PLACE else set()))
    for call, words in calls(code):
        if (
            call in REFUSED
            or call.rpartition(".")[2] in ("extract", "extractall", "unpack_archive")
            or (call == "yaml.safe_load" and name.startswith("alignlab/") and name not in OUR_OWN)
            or (call == "torch.load" and words.get("weights_only") is not True)
        ):
            yield call
        yield from (word for word in ("trust_remote_code", "allow_pickle", "shell") if words.get(word))


def test_no_file_is_unpickled() -> None:
    """torch.load only with weights_only=True, YAML of others only by bounded_yaml and our own by safe_load,
    nothing by pickle, numpy or joblib, no archive unpacked, no code of a hub."""
    code = {str(path.relative_to(ROOT)): path.read_text() for path in SOURCES}
    wrong = [f"{name}: {danger}" for name in code for danger in dangers(name, code[name])]
    assert len(code) > 100 and not wrong, "\n".join(wrong)


def test_what_could_run_code_is_seen() -> None:
    """The rule itself: each of these lines is an offence, and what stands beside them is none."""
    for line in (
        "import pickle",
        "from joblib import load",
        "import tarfile",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.safe_load(f)",
        "yaml.load(f)",
        "x.extractall(f)",
        "eval(f)",
        "subprocess.run(f, shell=True)",
        "f(trust_remote_code=True)",
    ):
        assert len(list(dangers("alignlab/it.py", line))) == 1, line
    for line in (
        "from pickle import UnpicklingError",
        "torch.load(f, weights_only=True)",
        "f(shell=False)",
    ):
        assert not list(dangers("alignlab/it.py", line)), line
    assert not list(dangers("alignlab/data/shards.py", "import tarfile"))


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    """The one file of torch's own format that is read, AlexNet's."""
    torch.save({"features.0.weight": Bomb()}, tmp_path / "alexnet.pth")
    with pytest.raises(ValueError, match=r"alexnet\.pth is not torchvision's"):
        AlexDistance(str(tmp_path / "alexnet.pth"))


def test_a_pipeline_folder_brings_no_code(tiny_sd: str, tmp_path: Path) -> None:
    """Parts come from diffusers and transformers alone, whatever model_index.json says and whatever lies
    beside it."""
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_sd, folder)
    index = json.loads((folder / "model_index.json").read_text())
    for part in (["evil", "Evil"], ["subprocess", "Popen"], [5, "x"]):
        (folder / "model_index.json").write_text(json.dumps(index | {"unet": part}))
        (folder / "unet" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        for load in (StableDiffusion.check, StableDiffusion):
            with pytest.raises(
                ValueError, match="and only diffusers, transformers, stable_diffusion are loaded"
            ):
                load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_clip_brings_no_code(tmp_path: Path) -> None:
    """open_clip hands text_cfg.tokenizer_kwargs on, and trust_remote_code could be one of them."""
    folder = tmp_path / "clip"
    shutil.copytree(ROOT / "alignlab" / "assets" / "emoji_clip", folder)
    about = json.loads((folder / "open_clip_config.json").read_text())
    about["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    its = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(its | {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Clip(str(folder))
    assert not (tmp_path / "ran").exists()


# -- what a configuration may build

ROUNDABOUT = [
    "os.system",
    "builtins.eval",
    "torch.load",
    "alignlab.files.writing.os.system",
    "alignlab.runs.provenance.subprocess.run",
    "alignlab.config.build.importlib",
    "alignlab.config.build.importlib.import_module",
    "alignlab.runs.provenance.subprocess",
    "alignlab.config.build.resolve",
    "alignlab.config.build.build",
    "alignlab.files.writing.write_aside",
    "alignlab.plan.largest",
    "alignlab.export.to_folder",
    "alignlab.runs.folder.Path",
    "alignlab.models.pipeline.importlib",
    "alignlab.rewards.heads.save",
    "alignlab.models.kohya.write",
    "alignlab.rewards.heads.load_file",
    "torch.optim.optimizer.functools",
    "torch.optim.lr_scheduler.partial",
    "alignlab.objectives.ddpo.np",
    "alignlab.training.setup.Lab",
    "alignlabx.y",
    "torch.optimx.y",
    "alignlab.metrics.diversity.torch.load",
    "alignlab.engine.samplers._table",
]


@pytest.mark.parametrize("target", ROUNDABOUT)
def test_no_way_round_the_targets(target: str) -> None:
    """What is named, what a named module imports, and what does more than make a part of a run: refused, and
    not called."""
    found = list(node_problems("algo", {"_target_": target}))
    assert len(found) == 1 and re.search(
        "lies outside|cannot be imported|nothing that a configuration may build", found[0]
    ), found


def test_checks_call_nothing_of_others(tmp_path: Path) -> None:
    """Constructors are run by the check itself, so a function of ours that calls its argument would be a way
    to any command."""
    fits = {"_target_": "alignlab.config.build.resolve", "target": "os.system"}
    node = {"_target_": "alignlab.plan.largest", "candidates": [f"touch {tmp_path}/ran"], "fits": fits}
    assert len(list(node_problems("prompts", node))) == 2
    assert not (tmp_path / "ran").exists()


def test_own_modules_need_a_word_on_the_command_line(tmp_path: Path, monkeypatch, capsys) -> None:
    """allow_targets in a file of --config-dir lets nothing in, nor do keys of Hydra's that would run code;
    typed, it does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil:\n    def draw(self): ...\n"
    )
    (tmp_path / "conf" / "prompts").mkdir(parents=True)
    (tmp_path / "conf" / "algo").mkdir()
    (tmp_path / "conf" / "prompts" / "evil.yaml").write_text(
        "# @package _global_\nallow_targets: [evil]\nprompts:\n  _target_: evil.Evil\n"
    )
    callback = (
        "# @package _global_\ndefaults: [draft]\nhydra:\n  callbacks:\n    x: {_target_: evil.Evil}\n  "
        "job:\n    env_set: {HF_ENDPOINT: x}\n"
    )
    (tmp_path / "conf" / "algo" / "evil.yaml").write_text(callback)
    assert command_line(monkeypatch, "--config-dir", "conf", "prompts=evil") == 2
    assert (
        "prompts._target_=evil.Evil lies outside alignlab and torch.optim; if you trust it"
        in capsys.readouterr().err
    )
    assert command_line(monkeypatch, "--config-dir", "conf", "algo=evil") == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" is set")[0] for line in said] == [
        "error: hydra.callbacks",
        "error: hydra.job.env_set",
    ]
    assert not (tmp_path / "ran").exists()
    assert (
        command_line(monkeypatch, "--config-dir", "conf", "prompts=evil", "allow_targets=[evil]", "lr=-1")
        == 2
    )
    assert capsys.readouterr().err == "error: lr=-1.0 must be positive\n" and (tmp_path / "ran").exists()


def test_a_run_of_somebody_else_builds_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    """config.yaml of a run folder is held to the same rule by every command that reads it, and cannot let
    itself in."""
    monkeypatch.chdir(tmp_path)
    c = asdict(configured("reward=brightness"))
    evil = {"_target_": "os.system", "command": f"touch {tmp_path}/ran"}
    run = made_run(tmp_path / "run")
    (run / "model").mkdir()
    (run / "model" / "x.safetensors").touch()
    (run / "config.yaml").write_text(
        yaml.safe_dump({**c, "allow_targets": ["os"], "model": evil, "eval_sampler": evil, "prompts": evil})
    )
    jobs = [
        (train, ["resume=run"]),
        (sample_command, ["run=run"]),
        (evaluate, ["run=run"]),
        (export, ["run=run", "output=x.safetensors"]),
    ]
    for command, words in jobs:
        assert command_line(monkeypatch, *words, command=command) == 2, command
        assert "model._target_=os.system lies outside alignlab and torch.optim" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"model\._target_=os\.system lies outside"):
        alignlab.load(run)
    (run / "config.yaml").write_text("!!python/object/apply:os.system ['touch ran']")
    with pytest.raises(RunError, match="cannot be read as YAML"):
        alignlab.load(run)
    assert not (tmp_path / "ran").exists()


# -- whom a command speaks to


class Spy:
    """A server that remembers the requests that it gets, and answers each with the same bytes."""

    def __init__(
        self, answer: bytes = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    ) -> None:
        self.requests: list[str] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.answer = answer
        self.thread = Thread(target=self.serve)

    def serve(self) -> None:
        while True:
            connection, _ = self.listening.accept()
            with connection:
                head = connection.recv(2**16).decode("latin-1")
                if head.startswith("END"):
                    return
                self.requests.append(head)
                connection.sendall(self.answer)

    def __enter__(self) -> "Spy":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.create_connection(self.listening.getsockname()) as last:
            last.sendall(b"END")
        self.thread.join()
        self.listening.close()


def far(url: str) -> dict[str, Any]:
    """The node of a reward on a server."""
    return {
        "_target_": "alignlab.rewards.remote.Remote",
        "url": url,
        "retries": 0,
        "weight": 1.0,
        "normalize": False,
    }


class Within:
    """A reward of the user's own that holds another one."""

    differentiable, unit = False, "points"

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        scores: torch.Tensor = self.inner(images, prompts)
        return scores


def test_nothing_goes_to_an_address_that_only_a_file_names(
    tmp_path: Path, tiny_sd: str, monkeypatch, capsys
) -> None:
    """Somebody else's run names a server: neither the secret nor an image nor a prompt goes there, whatever
    the command and wherever in the configuration, until the address is typed as the sentence shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGNLAB_REWARD_TOKEN", "sesame-sesame")
    within = {"_target_": "tests.test_security.Within", "weight": 1.0, "normalize": False}
    with Spy() as spy:
        node = far(spy.url)
        c = asdict(configured(*tiny(tiny_sd, "algo=ddpo")))
        stored = {
            "trained": {**c, "reward": {"far": node}},
            "beside": {**c, "reward": {**c["reward"], "far": node}},
            "watched": {**c, "eval_rewards": {"far": node}},
            "nested": {
                **c,
                "reward": {"mine": {**within, "inner": {k: node[k] for k in ("_target_", "url", "retries")}}},
            },
        }
        for name, config in stored.items():
            made_run(tmp_path / name)
            (tmp_path / name / "config.yaml").write_text(
                yaml.safe_dump({**config, "allow_servers": [spy.url]})
            )
            (tmp_path / name / "summary.json").unlink()
            commands: list[tuple[Any, list[str]]] = [
                (train, [f"resume={name}"]),
                (plan, [f"resume={name}"]),
                (evaluate, [f"run={name}"]),
                (make_pairs, [f"run={name}"]),
            ]
            for command, words in commands[: 3 if name == "watched" else 4]:
                assert command_line(monkeypatch, *words, "allow_targets=[tests]", command=command) == 2, (
                    name,
                    command,
                )
                said = [line for line in capsys.readouterr().err.splitlines() if "stands in a file" in line]
                assert (
                    len(said) == 1
                    and f"url={spy.url} stands in a file, and images, prompts and the secret in" in said[0]
                )
                assert said[0].endswith(f"if you trust it, type 'allow_servers=[{spy.url}]'")
        (tmp_path / "conf" / "experiment").mkdir(parents=True)
        experiment = {"reward": {"far": node}, "allow_servers": [spy.url]}
        (tmp_path / "conf" / "experiment" / "theirs.yaml").write_text(
            "# @package _global_\n" + yaml.safe_dump(experiment)
        )
        assert command_line(monkeypatch, "--config-dir", "conf", "experiment=theirs", "algo=ddpo") == 2
        assert f"reward.far.url={spy.url} stands in a file" in capsys.readouterr().err
        assert (
            command_line(monkeypatch, "--config-dir", "conf", "experiment=theirs", "algo=ddpo", "lr=x") == 2
        )  # its diagnosis
        assert not spy.requests
        assert command_line(monkeypatch, "resume=trained", f"allow_servers=[{spy.url}]") == 2
        assert f"the reward server {spy.url} refused: HTTP 404" in capsys.readouterr().err
        assert len(spy.requests) == 1 and "Authorization: Bearer sesame-sesame" in spy.requests[0]


def test_the_secret_is_bound_to_an_address(monkeypatch) -> None:
    """With ALIGNLAB_REWARD_URL the secret goes to those addresses alone, and they need not be typed; another
    one that is typed gets images, but no secret. Outside of a command a program's address is its own."""
    monkeypatch.setenv("ALIGNLAB_REWARD_TOKEN", "sesame")
    assert servers.token_for("http://a:1") == "sesame"
    with servers.naming(["reward.remote.url=http://a:1"]):
        assert servers.token_for("http://A:1/") == "sesame"
        with pytest.raises(
            ValueError,
            match=(
                r"url=http://b:1 stands in a file, and images, prompts and the secret in "
                r"ALIGNLAB_REWARD_TOKEN"
            ),
        ):
            servers.token_for("http://b:1")
        monkeypatch.setenv("ALIGNLAB_REWARD_URL", "https://gate/team, http://b:1")
        assert servers.token_for("http://a:1") is None
        assert servers.token_for("http://b:1") == servers.token_for("https://gate:443/team/") == "sesame"
        for other in (
            "https://gate/other",
            "https://gate",
            "http://gate/team",
            "http://b:2",
            "http://b",
            "http://b.:1",
        ):
            with pytest.raises(ValueError, match="stands in a file, and images and prompts would go there"):
                servers.token_for(other)
        monkeypatch.setenv("ALIGNLAB_REWARD_URL", "gate")
        with pytest.raises(
            ValueError,
            match="the environment variable ALIGNLAB_REWARD_URL names servers, and gate is no server",
        ):
            servers.token_for("http://a:1")


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("reward.remote.url=http://h:8000", {"http://h:8000"}),
        ("reward.remote.url='HTTPS://H/a/'", {"https://h:443/a"}),
        ("reward.remote.url=http://a:1,http://b:2", {"http://a:1", "http://b:2"}),
        ('reward.remote.url=choice("http://a:1","http://b:2")', {"http://a:1", "http://b:2"}),
        ('+reward.second={_target_: x, url: "http://h:8001", weight: 1.0}', {"http://h:8001"}),
        ("allow_servers=[http://h:8000,http://[::1]:9]", {"http://h:8000", "http://[::1]:9"}),
        ("+eval_rewards.far.url=http://10.0.0.1:80", {"http://10.0.0.1:80"}),
        ("+algo.judge.url=http://h", {"http://h:80"}),
        ("reward.remote.url=http://${oc.env:NODE}:8000", {"http://n17:8000"}),
        (r"reward.remote.url=http\://h\:8000", {"http://h:8000"}),
        ("reward=remote", {"http://127.0.0.1:8000"}),
        ("eval_rewards=[clip,remote]", {"http://127.0.0.1:8000"}),
        ("reward@eval_rewards=remote", {"http://127.0.0.1:8000"}),
        ("reward=clip", set()),
        ("reward.remote.weight=2", set()),
        ("prompt=see http://h:8000", set()),
        ("resume=http://h:8000/run", set()),
        ("reward.remote.url=http://good@evil:1", set()),
        ("reward.remote.url=http://good\\\\@evil", set()),
        ("reward.remote.url=http://good:800001", set()),
        ("reward.remote.url=http://good:70000", set()),
        ("reward.remote.url=http://good?x", set()),
        ("reward.remote.url=${algo.url}", set()),
        ("reward.remote.url=ftp://h", set()),
    ],
)
def test_what_counts_as_typed(word: str, named: set[str], monkeypatch) -> None:
    monkeypatch.setenv("NODE", "n17")
    assert servers.named_by([word]) == named


@pytest.mark.parametrize(
    "url",
    [
        "http://u@h",
        "http://h#x",
        "http://h?x",
        "http://h:99999",
        "http://h\\@e",
        "http://h x",
        "http://h/ä",
        "http:h",
        "//h",
        5,
    ],
)
def test_an_address_is_read_in_one_way(url: Any) -> None:
    """What one reader of urls takes for another server than the next one does is none."""
    with pytest.raises(ValueError, match=r"is no server; write http://127\.0\.0\.1:8000"):
        servers.address(url)


def test_the_shipped_address_is_the_files() -> None:
    """Who types reward=remote has named the address in conf/reward/remote.yaml."""
    node = yaml.safe_load((ROOT / "conf" / "reward" / "remote.yaml").read_text())["remote"]
    assert node["url"] == servers.SHIPPED


@pytest.mark.parametrize(
    "status", ["301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"]
)
def test_a_redirect_takes_the_secret_nowhere(status: str, monkeypatch) -> None:
    monkeypatch.setenv("ALIGNLAB_REWARD_TOKEN", "sesame")
    with Spy() as other:
        answer = (
            f"HTTP/1.1 {status}\r\nLocation: {other.url}/health\r\nContent-Length: 0\r\nConnection: "
            "close\r\n\r\n"
        )
        with Spy(answer.encode()) as first:
            with pytest.raises(RewardError, match=f"refused: HTTP {status[:3]}"):
                Remote(first.url, retries=0)
            assert len(first.requests) == 1
        assert not other.requests


def test_a_file_does_not_name_servers_for_a_stage_or_a_sweep(tmp_path: Path, monkeypatch, capsys) -> None:
    """Words of a recipe and of a sweeper's parameters would count as typed, so an address may not stand there
    either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "run", lambda *_, **__: 0)
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "experiment").mkdir()
    for word in (
        "reward.remote.url=http://evil:1",
        "allow_servers=[http://evil:1]",
        "reward=remote",
        "push_to_hub=evil/x",
    ):
        recipe = {"recipe": {"a": {"command": "train", "words": ["algo=ddpo", word]}}}
        (tmp_path / "conf" / "recipe" / "theirs.yaml").write_text(
            "# @package _global_\n" + yaml.safe_dump(recipe)
        )
        assert command_line(monkeypatch, "--config-dir", "conf", "recipe=theirs", command=stages) == 2
        sentence = f"recipe.a: {word} may not stand in a file; if you trust it, type "
        said, _, mend = capsys.readouterr().err.partition(sentence)
        (typed,) = shlex.split(mend)
        assert (
            said == "error: "
            and typed.startswith("+more.a=")
            and shlex.split(typed.partition("=")[2].strip('"')) == [word]
        )
        key, _, value = word.partition("=")
        sweep = {"hydra": {"sweeper": {"params": {key: value}}}}
        (tmp_path / "conf" / "experiment" / "theirs.yaml").write_text(
            "# @package _global_\n" + yaml.safe_dump(sweep)
        )
        assert command_line(monkeypatch, "-m", "--config-dir", "conf", "experiment=theirs", "algo=ddpo") == 2
        assert "is set by a file of --config-dir (hydra.sweeper), which may not" in capsys.readouterr().err
    recipe = {"recipe": {"a": {"command": "train", "words": ["reward.remote.url=http://mine:1"]}}}
    (tmp_path / "conf" / "recipe" / "theirs.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump(recipe)
    )
    typed = ["recipe=theirs", "+more.a='reward.remote.url=http://mine:1'", "output_dir=out"]
    assert command_line(monkeypatch, "--config-dir", "conf", *typed, command=stages) == 0


def test_nothing_is_uploaded_because_a_file_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    """push_to_hub in a file of somebody else would put a model into a repository of the user's: it must be
    typed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "theirs.yaml").write_text(
        "# @package _global_\npush_to_hub: me/good-model\n"
    )
    said = (
        "push_to_hub=me/good-model stands in a file, and the model would be uploaded there; if you want "
        "that, type push_to_hub=me/good-model"
    )
    assert command_line(monkeypatch, "--config-dir", "conf", "experiment=theirs") == 2
    assert said in capsys.readouterr().err
    for typed in ("push_to_hub=me/good-model", "push_to_hub=null"):
        assert command_line(monkeypatch, "--config-dir", "conf", "experiment=theirs", typed, "lr=-1") == 2
        assert capsys.readouterr().err == "error: lr=-1.0 must be positive\n"


# -- secrets

TOKEN = "hf_" + "aB3" * 11


def test_no_token_in_a_configuration(tmp_path: Path, monkeypatch, capsys) -> None:
    """A value of the environment's secrets, or a text in the form of a token: refused, and not repeated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_SERVICE_API_KEY", "s3cret-s3cret")
    for word in (
        "output_dir=${oc.env:MY_SERVICE_API_KEY}",
        f"push_to_hub={TOKEN}",
        "prompts.prompts=[a s3cret-s3cret cat]",
    ):
        assert command_line(monkeypatch, word) == 2
        out, err = capsys.readouterr()
        assert (
            "what is in a configuration is written to the disk" in err
            and "s3cret" not in out + err
            and TOKEN not in out + err
        )
    assert not list(tmp_path.iterdir())
    assert list(leaf_problems({"a": {"b": ["x", TOKEN]}})) == [
        "a.b.1 holds an access token, and what is in a configuration is written to the disk; leave it to the "
        "environment"
    ]


def test_no_token_in_a_sentence(monkeypatch) -> None:
    """What errors say goes through one place, which masks secrets; paths, numbers and words are none."""
    monkeypatch.setattr(
        os,
        "environ",
        {
            "HF_TOKEN": "abcdefgh1",
            "TOKENS_MAX": "1000000000",
            "TOKEN_FILE": "/home/x/token",
            "TOKEN_KIND": "short",
        },
    )
    assert (
        secrecy.masked(f"401 for abcdefgh1 and {TOKEN} of /home/x/token, short of 1000000000")
        == "401 for *** and *** of /home/x/token, short of 1000000000"
    )
    assert secrecy.secret_in("short /home/x/token 1000000000") is None


# -- pictures and tables of others


def test_tables_lead_nowhere_else(tmp_path: Path) -> None:
    """Absolute paths, paths upwards, devices and addresses are refused; a link that the user made is
    followed."""
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    for name in (
        "../outside.png",
        str(tmp_path / "outside.png"),
        "a/../../outside.png",
        "/dev/zero",
        "",
        ".",
        "https://example.org/x.png",
        "x\0",
    ):
        with pytest.raises(ValueError, match="is no image"):
            image({"x": name, "_table": tmp_path / "data" / "t.csv"}, "x", (8, 8))
    (tmp_path / "data" / "pictures").symlink_to(tmp_path)
    assert image({"x": "pictures/outside.png", "_table": tmp_path / "data" / "t.csv"}, "x", (8, 8)).shape == (
        3,
        8,
        8,
    )


def test_a_dataset_starts_no_other_reader(tmp_path: Path, monkeypatch) -> None:
    """`datasets` would unpickle a .pyd of a shard on the hub. (A folder stands for the hub.) Our own reader
    knows pictures and texts."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    builder = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder(str(tmp_path / "hub" / name)))
    (tmp_path / "hub" / "mine" / "evil").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"x")
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    shard = tmp_path / "hub" / "mine" / "evil" / "0.tar"
    with tarfile.open(shard, "w") as out:
        for name, content in (
            ("0.png", picture.getvalue()),
            ("0.txt", b"x"),
            ("0.pyd", pickle.dumps(Bomb())),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            out.addfile(entry, io.BytesIO(content))
        entry = tarfile.TarInfo("1.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        out.addfile(entry)
    for streaming in (False, True):
        with pytest.raises(ValueError, match="it is read by webdataset, and only parquet and arrow are"):
            captioned("mine/evil", streaming=streaming)
        (example,) = captioned(str(shard), streaming=streaming).draw(1, 0)
        assert example.image((8, 8)).shape == (3, 8, 8)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_decodes_no_other_column(streaming: bool, tmp_path: Path, monkeypatch) -> None:
    """`datasets` would follow the paths of pictures that nobody asked for, in parquet and in what was saved;
    a caption is a text, and a picture no struct that hides one."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    content, opened = io.BytesIO(), list[str]()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    real, path = Image.open, {"bytes": None, "path": str(tmp_path / "secret.png")}
    (tmp_path / "secret.png").write_bytes(content.getvalue())
    picture = {"bytes": content.getvalue(), "path": None}
    monkeypatch.setattr(
        Image, "open", lambda file, *a, **k: (opened.append(str(file)), real(file, *a, **k))[1]
    )
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "mask": datasets.Image()}
    for name, columns, said in (
        ("good", {"image": kinds["image"], "text": kinds["text"], "mask": kinds["mask"]}, ""),
        (
            "caption",
            {"image": kinds["image"], "text": kinds["mask"]},
            "column text holds no texts; set caption_column=",
        ),
        (
            "hidden",
            {"image": {"bytes": kinds["mask"]}, "text": kinds["text"]},
            "column image holds no pictures; set image_column=",
        ),
    ):
        values = {
            "image": {"bytes": path} if name == "hidden" else picture,
            "text": "x" if name != "caption" else path,
            "mask": path,
        }
        rows = {column: [values[column]] * 2 for column in columns}
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
        table.save_to_disk(str(tmp_path / name / "saved"))
        (tmp_path / name / "files").mkdir()
        arrow = pytest.importorskip("pyarrow.parquet")
        arrow.write_table(table.with_format("arrow")[:], tmp_path / name / "files" / "0.parquet")
        for form in ("saved", "files"):
            if said:
                with pytest.raises(ValueError, match=said):
                    captioned(str(tmp_path / name / form), streaming=streaming)
            else:
                (example,) = captioned(str(tmp_path / name / form), streaming=streaming).draw(1, 0)
                assert example.caption == "x" and example.image((8, 8)).shape == (3, 8, 8)
    assert not [name for name in opened if "secret" in name]


def test_pictures_are_bounded(tmp_path: Path) -> None:
    """A picture of 20,000 x 20,000 in 50 kB is refused before it is unpacked, and PostScript is not given to
    another program."""
    began = time.perf_counter()
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000 and 20_000**2 > PIXELS
    for name, said in (("bomb.png", "pixels"), ("x.png", "cannot identify")):
        with pytest.raises(ValueError, match=f"is no image .*{said}"):
            image({"x": name, "_table": tmp_path / "t.csv"}, "x", (8, 8))
    assert time.perf_counter() - began < 10


def test_the_report_bounds_its_pictures(tmp_path: Path, monkeypatch, capsys) -> None:
    run = made_run(tmp_path / "run")
    (run / "samples" / "step_000010.png").write_bytes(bomb())
    assert command_line(monkeypatch, f"runs={run}", f"output_dir={tmp_path}/out", command=report_command) == 2
    assert (
        re.search(r"error: .*step_000010\.png is no picture \(.*pixels", capsys.readouterr().err)
        and not (tmp_path / "out").exists()
    )


# -- the report


@browser
def test_the_report_runs_no_script_but_its_own(tmp_path: Path) -> None:
    """Hostile prompts, options, reward names, run folders and titles are text; a script that got in all the
    same has no nonce."""
    reward = {"_target_": "x", "weight": 2.0, "normalize": False}
    words = {"prompts.prompts": ["cat", NASTY], "algo.truncation": NASTY, "reward": {NASTY: reward}}
    for seed in (0, 1):
        made_run(
            tmp_path / "runs" / f"{seed}<img src=x onerror=window.broken=1>",
            words,
            seed=seed,
            evaluated=False,
        )
    page = report(read_runs([str(tmp_path / "runs" / "*")]), tmp_path / "out", f"A title with {NASTY}")
    text = page.read_text()
    assert NASTY not in text and "<img src=x" not in text
    page.write_text(
        text.replace(
            "<main>",
            f"<main>{NASTY}<img src=x onerror='window.broken = 2'><a id=a "
            "href='javascript:window.broken=3'>x</a>",
        )
    )
    seen = in_browser(
        page,
        """
        document.getElementById("a").click();
        await new Promise(r => setTimeout(r, 300));
        const plots = document.querySelectorAll(".main-svg").length;
        document.title = JSON.stringify({ broken: window.broken ?? 0, plots });
        """,
        tmp_path,
    )
    assert seen["broken"] == 0 and seen["plots"] >= 4


def test_hydra_is_one_without_known_holes() -> None:
    """Earlier ones instantiate what configurations of others name (pyproject.toml asks for this one)."""
    import hydra

    assert tuple(map(int, hydra.__version__.split(".")[:3])) >= (1, 3, 8)
    assert '"hydra-core>=1.3.8' in (ROOT / "pyproject.toml").read_text()


def test_every_promise_has_its_test() -> None:
    """SECURITY.md names tests that are there."""
    named = re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text())
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) >= 10 and {*named} <= there
