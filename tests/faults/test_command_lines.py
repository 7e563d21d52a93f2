"""Command lines do what is typed: paths and prompts as they stand, printed commands that can be pasted, and
advice that works."""

import os
import random
import re
import shlex
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from alignlab import evaluate, export, plan, report, sample, train
from alignlab.compare import finished as compare
from alignlab.config.build import ConfigError
from alignlab.config.compose import CONF, checked
from alignlab.config.schema import TrainConfig
from alignlab.config.train_rules import ignored_problems
from alignlab.config.typed import as_meant
from alignlab.objectives.draft import DRaFT
from alignlab.runs.layout import run_folders
from alignlab.runs.pasted import hydra_value, line, list_word, resume, word
from alignlab.training import signals as stops
from alignlab.training.signals import STOPPED, asked, leave, stoppable
from tests.running import command_line, configured, tiny

NAMES = (
    "algo=ddpo,kl_coeff=0",
    "my lr=1e-3",
    "it's",
    'a "b" c',
    "[a,b]",
    "reward=[clip,colour],seed=0",
    "{a:1}",
    "${seed}",
    "一只猫",
    "🦁",
    "a(b)",
    "50% off! #1",
    "1984",
    "1_000",
    "1e3",
    "null.",
    "true",
    "a\\b",
    "a\\",
    "'a'",
    '"a"',
    "a$b",
    "a;b&c|d",
    "~",
    "~x",
    "-m",
    "a: b",
    " a ",
    "a,b",
    'x\\"y',
    "a\\${b}",
    "*",
    "?[x]",
    "`ls`",
    "$(ls)",
    "é",
)
"""Folders that somebody may have."""
PROMPTS = (
    "a cat, sitting on a mat",
    "a lion's den",
    "一只猫",
    "🦁",
    "a cat: 50% off! #1",
    "a cat (cute)",
    "a [sic] cat",
    "[sic] a cat [4k]",
    "x = y",
    "${a}",
    "a ${b} c",
    "${",
    "{a}",
    "1984",
    "true",
    "choice(a,b)",
    'it\'s "so"',
    "'quoted' and 'more'",
    "a\\",
    "-5",
    "a;b",
    "~ a",
    "cat|dog",
)


class Ignoring(DRaFT):
    """An objective of the user's own that knows no kl_coeff."""

    def __init__(self) -> None:
        super().__init__(k=1)


class Weighing(DRaFT):
    """One that takes it by another name."""

    def __init__(self, penalty: float = 0.0) -> None:
        super().__init__(k=1, kl_coeff=penalty)


def read(text: str, *, sweep: bool = False) -> Any:
    """What a word means to Hydra, after it was read as the user means it; references are resolved as
    OmegaConf does."""
    from omegaconf import OmegaConf

    override = OverridesParser.create().parse_override(as_meant(text, sweep=sweep))
    assert not override.is_sweep_override()
    value = override.value()
    value = (
        [getattr(item, "text", item) for item in value]
        if isinstance(value, list)
        else getattr(value, "text", value)
    )
    return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_taken_as_it_stands(prompt: str) -> None:
    """Whatever letters it holds; with quotes of the user's own it is the same."""
    assert read(f"prompt={prompt}") == prompt
    assert read(f"prompt={hydra_value(prompt)}") == prompt
    assert read(f"prompt={hydra_value(prompt)}", sweep=True) == prompt


def test_what_hydra_reads_stays_hydras() -> None:
    """Lists, quotes, letters with a backslash, null, references in paths, and with -m several values mean
    what they meant."""
    assert read("prompt=[a lion,a panda]") == ["a lion", "a panda"]
    assert read("prompt=[a lion's den,一只猫,'b, c']") == ["a lion's den", "一只猫", "b, c"]
    assert read("prompt='a, b'") == "a, b" and read("prompt=a\\, b") == "a, b"
    assert read("output_dir=null") is None
    same = (
        "seed=0,1",
        "algo=ddpo,draft",
        "algo.clip=1e-4",
        "output_dir=runs/${seed}",
        "~prompts.unseen",
        "kl_coeff",
        "reward=[clip,colour]",
        "model.path_or_id=emoji",
        "run=multirun/x/*",
        "clip=hf-hub:owner/name",
        "hydra.launcher.partition=a,b",
    )
    assert [as_meant(text, sweep=False) for text in same] == [*same]
    for text in ("init_from=runs/a,runs/b", "prompt=a cat,a dog", "init_from=choice('a=b','c')"):
        assert (
            as_meant(text, sweep=True) == text
            and OverridesParser.create().parse_override(text).is_sweep_override()
        )
    assert as_meant("prompt=a lion's den,a cat", sweep=True) == 'prompt="a lion\'s den","a cat"'
    assert read("output_dir=my sweep, kl=1", sweep=True) == "my sweep, kl=1"  # one place for all jobs


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_word_is_read_back(name: str, tmp_path: Path, monkeypatch) -> None:
    """Through a shell, our reading and Hydra's: the same folder, with -m and without, whether it is there or
    not."""
    monkeypatch.chdir(tmp_path)
    for folder in (Path(name), Path("runs") / name, tmp_path / name):
        for there in (False, True):
            if there:
                folder.mkdir(parents=True, exist_ok=True)
            (text,) = shlex.split(word("resume", folder))
            for sweep in (False, True):
                assert Path(os.path.expanduser(read(text, sweep=sweep))) == folder
                assert read(shlex.split(list_word("runs", [folder]))[0], sweep=sweep) == [str(folder)]
    assert shlex.split(resume(Path("runs") / name))[:3] == ["python", "-m", "alignlab.train"]


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not re.fullmatch(r"'.*'|\".*\"|~.*|\*|\?.*", name)]
)
def test_a_folder_is_named_as_it_is(name: str, tmp_path: Path, monkeypatch) -> None:
    """run=, resume=, runs=, init_from=, lora=, data=, again=, output_dir=, output=, model.path_or_id and the
    like, quoted for the shell only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    keys = (
        "run resume runs init_from lora data again held_out output_dir output home model.path_or_id "
        "algo.data reward.clip.path prompts.file"
    )
    for key in [*keys.split(), "+given.pairs", "+reward.mine.path"]:
        for sweep in (False, True):
            assert read(f"{key}={name}", sweep=sweep) == name, key
            assert read(f"{key}={tmp_path}/{name}", sweep=sweep) == f"{tmp_path}/{name}", key


def test_quoting_is_hydras_own() -> None:
    """Any text of quotes, backslashes and letters survives Hydra's grammar."""
    draw, parser = random.Random(0), OverridesParser.create()
    for _ in range(300):
        text = "".join(draw.choices("\\\"'ab $,=[]{}()~:%#猫\n\t", k=draw.randint(1, 12)))
        value = parser.parse_override(f"k={hydra_value(text)}").value()
        assert getattr(value, "text", value) == re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def test_a_list_of_folders(tmp_path: Path, monkeypatch) -> None:
    """Names with commas in a list are found by what is on the disk; a pattern below a name with brackets
    works."""
    monkeypatch.chdir(tmp_path)
    folders = [
        "sw/algo=ddpo,kl_coeff=0",
        "sw/algo=ddpo,kl_coeff=1",
        "sw/reward=[clip,colour],seed=0",
        "sw/reward=[clip,colour],seed=1",
    ]
    for folder in folders:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.yaml").touch()
    assert read(f"runs=[{folders[0]},{folders[1]}]") == folders[:2]
    assert [str(run) for run in run_folders("sw/reward=[clip,colour],seed=*")] == folders[2:]
    assert [str(run) for run in run_folders("sw/*[01]")] == folders
    assert [str(run) for run in run_folders(folders[2])] == folders[2:3]


def test_every_command_takes_an_odd_folder(tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """The commands themselves, on one that holds no run: each names the folder as it was typed, and none
    speaks of overrides."""
    monkeypatch.chdir(tmp_path)
    odd = "sw/algo=ddpo,kl_coeff=0 it's"
    Path(odd).mkdir(parents=True)
    for command, words in {
        train: [f"resume={odd}"],
        sample: [f"run={odd}"],
        evaluate: [f"run={odd}"],
        export: [f"run={odd}", "output=x.safetensors"],
        report: [f"runs={odd}"],
    }.items():
        assert command_line(monkeypatch, *words, command=command) == 2
        err = capsys.readouterr().err
        assert odd in err and "run" in err and "cannot be read" not in err, err
        assert len(err.splitlines()) == 1, err


def test_home_and_lengths(tmp_path: Path, monkeypatch, capsys) -> None:
    """~ is the home in every path key, quoted or not; a name that no file system takes is refused in a
    sentence."""
    monkeypatch.setenv("HOME", str(tmp_path))
    c = configured("output_dir='~/zz'", "init_from=null", "algo=draft")
    assert c.output_dir == f"{tmp_path}/zz"
    (tmp_path / "p.txt").write_text("a cat\n")
    assert configured("prompts=file", "prompts.file='~/p.txt'").prompts["file"] == f"{tmp_path}/p.txt"
    long = "x" * 300
    for key in ("output_dir", "resume", "init_from", "model.path_or_id", "reward.clip_blue.path"):
        assert command_line(monkeypatch, f"{key}=runs/{long}") == 2
        err = capsys.readouterr().err
        assert "is 300 bytes long, and names may have 255" in err and len(err.splitlines()) == 1, err
    assert command_line(monkeypatch, f"output_dir={'猫' * 90}") == 2
    assert "is 270 bytes long" in capsys.readouterr().err
    assert command_line(monkeypatch, f"run={long}", command=sample) == 2


def pasted_from(err: str, pattern: str) -> list[str]:
    """The words of a command line that a sentence shows."""
    found = re.search(pattern, err)
    assert found, err
    return shlex.split(found[1])


def test_advice_works(tmp_path: Path, monkeypatch, capsys) -> None:
    """What a sentence says to type is typed, and taken: lists and names, texts that are numbers, values
    without -m, a reward of one's own."""
    monkeypatch.chdir(tmp_path)

    def said(*words: str, command: Any = train) -> str:
        assert command_line(monkeypatch, *words, command=command) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        return sentence

    sentence = said("output_dir=[1984]")
    assert "is a list, and one name is wanted" in sentence
    assert configured(as_meant(*pasted_from(sentence, r"write (\S+),"), sweep=False)).output_dir == "1984"
    assert configured(as_meant(*pasted_from(sentence, r"or (\S+) if"), sweep=False)).output_dir == "[1984]"
    sentence = said("prompts.prompts=[1984]")
    assert "must be a list of texts or null, and holds the number 1984" in sentence
    assert configured(*pasted_from(sentence, r"as texts: (.*)$")).prompts["prompts"] == ["1984"]
    sentence = said("prompt=[1984]", command=sample)
    assert read(*pasted_from(sentence, r"as texts: (.*)$")) == ["1984"]
    sentence = said("prompts.prompts=a lion's den")
    assert configured(*pasted_from(sentence, r"brackets: (.*)$")).prompts["prompts"] == ["a lion's den"]
    assert said("algo=ddpo,draft").endswith(
        "algo=ddpo,draft names several values; add -m to run each of them"
    )
    assert said("kl_coeff=0,1").endswith("add -m to run each of them")
    sentence = said("reward=clip,colour")
    assert {*configured(*pasted_from(sentence, r"a list: (.*)$")).reward} == {"clip", "colour"}

    (tmp_path / "my_module.py").write_text("def score(images, prompts):\n    return images.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sentence = said("reward=my_reward")
    assert "did you mean reward=image_reward?" in sentence
    words = pasted_from(sentence, r"my_module\.score: (.*)\)$")
    assert [*configured("algo=ddpo", *words).reward] == ["my_reward"]
    monkeypatch.delitem(sys.modules, "my_module")


def test_a_plan_that_can_be_pasted(monkeypatch) -> None:
    """The line that alignlab.plan shows is quoted for a shell."""
    typed = ["reward=[clip,colour]", 'prompts.template="a photo of {}"', "micro_batch=8"]
    overrides = SimpleNamespace(task=typed)
    monkeypatch.setattr(plan.HydraConfig, "get", staticmethod(lambda: SimpleNamespace(overrides=overrides)))
    monkeypatch.setattr(plan.OmegaConf, "to_container", lambda node: [*node])
    said = plan.words(TrainConfig(micro_batch=8), {"micro_batch": 4, "evaluation.batch": 64}, 2**34)
    assert shlex.split(said.splitlines()[-1]) == [
        "python",
        "-m",
        "alignlab.train",
        *typed[:2],
        "micro_batch=4",
    ]


def test_a_stopped_run_says_what_can_be_pasted(tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """A run in an odd folder that is asked to end: the printed command, through a shell, finishes it; all
    other sentences are made by the same function."""
    monkeypatch.chdir(tmp_path)
    odd = "runs/my lr=1e-3, [it's] ${seed}"
    real = train.train_epoch

    def asked_in_epoch(lab: Any, c: TrainConfig, epoch: int) -> Any:
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(lab, c, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", asked_in_epoch)
        words = tiny(tiny_sd, "steps=2", "algo=draft")
        assert command_line(patch, *words, shlex.split(word("output_dir", odd))[0]) == STOPPED
    assert (tmp_path / odd / "config.yaml").is_file()
    (command,) = re.findall(
        r"go on with (python -m alignlab\.train .*)$", capsys.readouterr().err, re.MULTILINE
    )
    assert command_line(monkeypatch, *shlex.split(command)[3:]) == 0
    assert (tmp_path / odd / "summary.json").is_file()
    with pytest.raises(compare.CompareError) as refused:
        (tmp_path / odd / "summary.json").unlink()
        compare.read_runs([odd])
    assert shlex.split(str(refused.value).partition("finish with ")[2]) == [
        *shlex.split(line("train")),
        *shlex.split(word("resume", Path(odd))),
    ]


def test_printed_commands_are_made_in_one_place() -> None:
    """No module writes a folder into a command by itself."""
    home = Path(train.__file__).parent
    by_hand = re.compile(
        r"""f["'][^"'\n]*\b(?:resume|run|runs|output_dir|algo\.data|lora|output)="""
        r"""\{(?!hydra_value)[^}]*(?:folder|run|unfinished|alone)[^}]*\}[^"'\n]*(?:go on|python -m)"""
    )
    named = re.compile(r"""python -m alignlab\.\w+ [^"'`\n]*=\{""")
    found = [
        (path.name, text)
        for path in home.rglob("*.py")
        for text in path.read_text().splitlines()
        if by_hand.search(text) or named.search(text)
    ]
    assert [
        (name, text) for name, text in found if "figure name=" not in text and "experiment=" not in text
    ] == []


# -- keys that only an objective can heed


def own(*words: str) -> TrainConfig:
    return configured("algo=draft", "allow_targets=[tests]", *words)


def test_a_key_that_the_objective_ignores_is_refused() -> None:
    """kl_coeff and combine: not taken, or taken in another value. Taken by another name they are taken."""
    bare = ["algo={_target_:tests.faults.test_command_lines.Ignoring}"]
    import hydra
    from omegaconf import open_dict

    def composed(algo: dict[str, Any], *words: str) -> Any:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("train", ["allow_targets=[tests]", *words])
        with open_dict(cfg):
            cfg.algo = algo
        return cfg

    assert bare
    ignoring = {"_target_": "tests.faults.test_command_lines.Ignoring"}
    assert checked(composed(ignoring)).kl_coeff == 0
    with pytest.raises(
        ConfigError,
        match=r"kl_coeff=0.25 has no effect: algo does not hand it on to Ignoring; set kl_coeff=0, or",
    ):
        checked(composed(ignoring, "kl_coeff=0.25"))
    with pytest.raises(ConfigError, match="combine=rank"):
        checked(composed(ignoring, "combine=rank"))
    weighing = {"_target_": "tests.faults.test_command_lines.Weighing", "penalty": "${kl_coeff}"}
    assert checked(composed(weighing, "kl_coeff=0.25")).algo["penalty"] == 0.25
    with pytest.raises(
        ConfigError,
        match=r"algo.kl_coeff=0.5 is not kl_coeff=0.0; set kl_coeff=0.5, and leave algo.kl_coeff alone",
    ):
        configured("algo=draft", "algo.kl_coeff=0.5")
    with pytest.raises(ConfigError, match=r"algo.statistics.combine=rank is not combine=sum"):
        configured("algo=ddpo", "algo.statistics.combine=rank")
    assert configured("algo=draft", "kl_coeff=0.5").algo["kl_coeff"] == 0.5
    assert not [*ignored_problems(configured("algo=ddpo", "combine=rank"), ())]


def test_a_run_that_began_before_goes_on(tiny_sd: str, tmp_path: Path, monkeypatch) -> None:
    """A stored run whose objective ignores kl_coeff still resumes, by resume= and by its own command."""
    stored = replace(configured(*tiny(tiny_sd, "steps=1", "algo=draft")), kl_coeff=0.25)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(asdict(stored)))
    seen: list[TrainConfig] = []
    monkeypatch.setattr(
        "alignlab.train.train",
        lambda c, folder: seen.append(c) or {"final": {"reward": 1.0}, "base": {"reward": 0.0}},
    )
    assert stored.algo["kl_coeff"] == 0
    assert command_line(monkeypatch, f"resume={run}") == 0
    assert seen[0].kl_coeff == 0.25


# -- what a resumed run keeps


def test_resume_keeps_where_the_run_reports(tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """push_to_hub, tracker, device and output_dir are the stored run's unless they are typed, and a line says
    what is sent where."""
    stored = configured(*tiny(tiny_sd, "algo=draft", "push_to_hub=me/mine", f"output_dir={tmp_path}/run"))
    monkeypatch.setattr("alignlab.config.train_rules.importlib.util.find_spec", lambda name: object())
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        yaml.safe_dump({**asdict(stored), "tracker": "trackio", "checkpoint_every": 7})
    )
    seen: list[TrainConfig] = []
    monkeypatch.setattr(
        "alignlab.train.train",
        lambda c, folder: seen.append(c) or {"final": {"reward": 1.0}, "base": {"reward": 0.0}},
    )
    assert command_line(monkeypatch, f"resume={run}") == 0
    out = capsys.readouterr().out
    kept = {
        key: getattr(seen[-1], key)
        for key in ("push_to_hub", "tracker", "device", "output_dir", "checkpoint_every")
    }
    assert kept == {
        "push_to_hub": "me/mine",
        "tracker": "trackio",
        "device": "cpu",
        "output_dir": str(run),
        "checkpoint_every": 7,
    }
    stands = f"(as {run}/config.yaml has it)"
    assert (
        f"this run uploads its model at the end to me/mine {stands}; push_to_hub=null leaves that out" in out
    )
    assert f"this run logs to the tracker trackio {stands}; tracker=none leaves that out" in out
    assert command_line(monkeypatch, f"resume={run}", "push_to_hub=null", "tracker=none", "keep=5") == 0
    assert (seen[-1].push_to_hub, seen[-1].tracker, seen[-1].keep) == (None, "none", 5)
    assert "this run" not in capsys.readouterr().out


# -- Slurm, by stand-ins


def fake(folder: Path, name: str, script: str) -> None:
    """A command of Slurm's on the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def submitted(tiny_sd: str, tmp_path: Path, monkeypatch) -> list[str]:
    """The command line of a small array of jobs, with the fake commands first on the PATH."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return [*tiny(tiny_sd, "algo=draft"), "-m", "seed=0,1", "hydra/launcher=slurm", "output_dir=runs/my kl"]


def test_refused_jobs_are_a_sentence(submitted: list[str], tmp_path: Path, monkeypatch, capfd) -> None:
    """sbatch that says no, and no Slurm at all: one sentence, exit code 2; the jobs carry the sweep's
    name."""
    fake(tmp_path / "bin", "srun", "exit 1")
    fake(
        tmp_path / "bin",
        "sbatch",
        f'cp "$1" {tmp_path}/script; echo "sbatch: error: invalid partition specified: gpux" >&2; exit 1',
    )
    assert command_line(monkeypatch, *submitted, "hydra.launcher.partition=gpux") == 2
    err = capfd.readouterr().err
    said = [text for text in err.splitlines() if text.startswith("error: ")]
    assert (
        len(said) == 1
        and "the jobs were refused (sbatch: error: invalid partition specified: gpux)" in said[0]
    ), err
    assert "Traceback" not in err
    script = (tmp_path / "script").read_text()
    assert re.search(r"--job-name='?alignlab_my kl'?$", script, re.MULTILINE) and "--partition=gpux" in script
    (tmp_path / "bin" / "srun").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert command_line(monkeypatch, *submitted) == 2
    assert "needs Slurm, and there is no srun here" in capfd.readouterr().err


@pytest.mark.parametrize(("by", "code"), [("SIGTERM", STOPPED), ("SIGUSR2", 144)])
def test_a_job_of_submitit_saves_first(by: str, code: int, tmp_path: Path, monkeypatch, capsys) -> None:
    """scancel, which submitit ignores, ends a run where it can go on from; submitit's warning queues the job
    again once that is done."""
    environment = pytest.importorskip("submitit.core.job_environment")
    queued: list[float] = []
    handler = environment.SignalHandler(SimpleNamespace(), SimpleNamespace(), SimpleNamespace())

    def requeue(self: Any, number: int, frame: Any = None) -> None:
        queued.append(number)
        sys.exit(144)

    requeue.__name__, requeue.__module__ = "checkpoint_and_try_requeue", environment.__name__
    monkeypatch.setattr(environment.SignalHandler, "checkpoint_and_try_requeue", requeue)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    signal.signal(signal.SIGTERM, handler.bypass)
    signal.signal(signal.SIGUSR2, handler.checkpoint_and_try_requeue)
    saved = []
    try:
        with pytest.raises(SystemExit) as ended, stoppable(tmp_path, 60):
            os.kill(os.getpid(), signal.Signals[by])
            assert asked() and not queued
            saved.append(True)
            leave()
        assert ended.value.code == code and saved and queued == ([signal.SIGUSR2] if by == "SIGUSR2" else [])
        assert signal.getsignal(signal.SIGTERM) == handler.bypass
        with (
            pytest.raises(SystemExit),
            stoppable(tmp_path, 0.1 / stops.PATIENCE),
        ):  # an epoch that takes longer than there is time
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(10)
            raise AssertionError("it was not queued again in time")
        assert f"stopped by {by}" in capsys.readouterr().err
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def test_the_device_is_still_checked(monkeypatch, tmp_path: Path, tiny_sd: str, capsys) -> None:
    """A run of a GPU that is resumed without one says what to type, and that works."""
    stored = configured(*tiny(tiny_sd, "algo=draft"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({**asdict(stored), "device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        "alignlab.train.train", lambda c, folder: {"final": {"reward": 1.0}, "base": {"reward": 0.0}}
    )
    assert command_line(monkeypatch, f"resume={run}") == 2
    assert "set device=cpu or device=auto" in capsys.readouterr().err
    assert command_line(monkeypatch, f"resume={run}", "device=auto") == 0
