"""The evaluation command: paired, cached by what the base model is, the same for a run's folder and for its
LoRA alone."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignlab import evaluate as command
from alignlab.compare.finished import read_runs
from alignlab.compare.image_table import Images, read_images, write_images
from alignlab.config.build import build
from alignlab.engine.policy import Policy
from alignlab.train import train
from tests.running import command_line, configured, tiny

PROTOCOL = "images=2 diversity_prompts=2 diversity_images=3 features=null eval_rewards=colour".split()


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """`python -m alignlab.evaluate WORDS`, in this process; the exit code."""
    return command_line(monkeypatch, *words, command=command)


@pytest.fixture
def run(tiny_sd, tmp_path) -> Path:
    """A finished run that learned something, and has prompts that it never saw."""
    overrides = tiny(tiny_sd, "algo=draft", "lr=0.05", "prompts.unseen=[owl,seal]", "eval_rewards=[colour]")
    train(configured(*overrides, f"output_dir={tmp_path}/run"), tmp_path / "run")
    return tmp_path / "run"


def result(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_what_is_measured(run, tmp_path, monkeypatch, capsys):
    """Three sets of the sizes asked for, each image paired with the base model's; means and win rates follow
    from the tables; the base of the same protocol agrees whatever the run; a LoRA that does nothing is the
    base exactly."""
    assert typed(monkeypatch, f"run={run}", f"cache={tmp_path}/cache", *PROTOCOL) == 0
    home, out = run / "evaluation", result(run / "evaluation")
    mine, base = table(home / "images.csv"), table(home / "base.csv")
    place = [(row["set"], row["prompt"], row["image"]) for row in mine]
    assert place == [(row["set"], row["prompt"], row["image"]) for row in base]
    sizes = {name: sum(p[0] == name for p in place) for name in ("train", "unseen", "diversity")}
    assert sizes == {"train": 3 * 2, "unseen": 2 * 2, "diversity": 2 * 3}
    pairs = [
        (float(m["brightness"]), float(b["brightness"]))
        for m, b in zip(mine, base, strict=True)
        if m["set"] == "train"
    ]
    row = out["rewards"]["train"]["brightness"]
    assert (
        row["gain"]["value"] == pytest.approx(sum(m - b for m, b in pairs) / len(pairs), abs=1e-5)
        and row["gain"]["low"] > 0
    )
    assert row["win_rate"]["value"] == sum((m > b) + 0.5 * (m == b) for m, b in pairs) / len(pairs)
    assert row["gain"]["low"] <= row["gain"]["value"] <= row["gain"]["high"]
    assert out["drift"]["lpips_to_base"] > 0 and out["drift"]["kl_eps_guided"] > 0
    assert out["diversity"]["lpips"]["base"]["value"] > 0 and "vendi" not in out["diversity"]
    assert set(out["units"]) == {"brightness", "colour"} and out["training_rewards"] == ["brightness"]
    assert out["image_statistics"]["latent_norm"]["base"] > 0 and "written" in capsys.readouterr().out
    (read,) = read_runs([str(run)])
    assert read.images is not None and read.images.values("train", "brightness").shape == (3, 2)


def test_the_base_is_measured_once(run, tmp_path, monkeypatch):
    """A second evaluation reads the cache, and finds another one as soon as a weight, the sampler or a prompt
    set differs."""
    cache, drawn = tmp_path / "cache", []
    images = command.Evaluation.images
    monkeypatch.setattr(
        command.Evaluation, "images", lambda self, bar, who: drawn.append(who) or images(self, bar, who)
    )
    for more in ([], [], ["eval_sampler.steps=1"], ["images=1"]):
        assert typed(monkeypatch, f"run={run}", f"cache={cache}", *PROTOCOL, *more) == 0
    assert [who == "base model" for who in drawn] == [True, False, False, True, False, True, False]
    assert len(list(cache.iterdir())) == 3
    c = command.as_the_run(_checked(*PROTOCOL, f"run={run}", f"cache={cache}"), run)
    before = command.Evaluation(c).key
    monkeypatch.setattr(command, "policy_of", lambda model, **_: Policy(build(model), full=True))
    assert command.Evaluation(c).key == before  # without adapters: the same base
    other = command.Evaluation(c)
    with torch.no_grad():
        other.policy.family.frozen[1].decoder.conv_out.weight.mul_(1.01)
    assert other.key != before


def test_other_judges_are_another_base(tiny_sd, monkeypatch):
    """Even if they judge noise alike, as one that counts does. It is a prompt of the run that they are asked,
    not their weight."""
    words = tiny(tiny_sd, "eval_rewards=colour", "prompts.prompts=[dog]")
    run = configured(*words)
    groups = {key: getattr(run, key) for key in (*command.GROUPS, "eval_rewards")}
    c, prompts = replace(_checked(*PROTOCOL), **groups), []
    monkeypatch.setattr(command.Bench, "score", lambda self, images, said, group: prompts.extend(said) or {})
    colour = c.eval_rewards["colour"]
    changes = ({}, {"weight": 2.0}, {"channel": "blue"})
    keys = [
        command.Evaluation(replace(c, eval_rewards={"colour": {**colour, **change}})).key
        for change in changes
    ]
    assert keys[0] == keys[1] != keys[2] and set(prompts) == {"a dog"}


def _checked(*words: str) -> command.EvaluateConfig:
    import hydra

    from alignlab.config.compose import CONF

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return command.checked(hydra.compose("evaluate", list(words)))


def test_a_lora_alone_is_the_run(run, tiny_sd, tmp_path, monkeypatch):
    """model= and lora= without a run give the run's own images: rank, alpha and targets come with the LoRA;
    without lora= the base."""
    same = [f"cache={tmp_path}/cache", *PROTOCOL]
    groups = [
        "prompts.prompts=[cat,dog,fish]",
        "prompts.unseen=[owl,seal]",
        "eval_sampler.steps=2",
        "reward=brightness",
    ]
    assert typed(monkeypatch, f"run={run}", *same) == 0
    assert typed(monkeypatch, f"model.path_or_id={tiny_sd}", f"lora={run}/model", *groups, *same) == 0
    assert (run / "model" / "evaluation" / "images.csv").read_text() == (
        run / "evaluation" / "images.csv"
    ).read_text()
    monkeypatch.chdir(tmp_path)
    assert typed(monkeypatch, f"model.path_or_id={tiny_sd}", *groups, *same) == 0
    base = result(tmp_path / "runs" / "evaluation")["rewards"]["train"]["brightness"]
    assert base["gain"]["value"] == 0 and base["win_rate"]["value"] == 0.5


def test_other_prompts(run, tmp_path, monkeypatch):
    """A group named on the command line takes the place of the run's; name= keeps the results apart."""
    words = [
        f"run={run}",
        f"cache={tmp_path}/cache",
        "prompts=glyphs",
        "prompts.prompts=[bus,car]",
        "prompts.unseen_share=0",
        "name=things",
    ]
    assert typed(monkeypatch, *words, *PROTOCOL) == 0
    prompts = {row["prompt"] for row in table(run / "things" / "images.csv")}
    assert prompts == {"a bus", "a car"} and not (run / "evaluation").exists()


def test_full_fine_tuning(tiny_sd, tmp_path, monkeypatch):
    """The tuned pipeline in RUN/model against the base it came from."""
    train(configured(*tiny(tiny_sd, "algo=draft", "policy.full=true", "lr=0.01")), tmp_path / "run")
    assert typed(monkeypatch, f"run={tmp_path}/run", f"cache={tmp_path}/cache", *PROTOCOL) == 0
    assert result(tmp_path / "run" / "evaluation")["drift"]["lpips_to_base"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run=/nowhere"], "run=/nowhere is no run folder"),
        (["lora=/nowhere"], "lora=/nowhere is no folder"),
        (["images=0", "batch=0"], "images=0 must be at least 1"),
        (["features=/nowhere"], "features=/nowhere: there is no such folder"),
        (["image=3"], "image is not a known key; did you mean images?"),
        (["eval_sampler.step=3"], "did you mean eval_sampler.steps?"),
        (["prompts=animals"], "prompts=animals is no option"),
        (["images=many"], "images=many must be a whole number"),
    ],
)
def test_mistakes(words, sentence, monkeypatch, capsys):
    assert typed(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err


def test_an_unfinished_run(run, monkeypatch, capsys):
    """Without weights there is nothing to measure, and the sentence says how to go on."""
    for file in (run / "model").glob("*"):
        file.unlink()
    assert typed(monkeypatch, f"run={run}") == 2
    assert "finish the run first" in capsys.readouterr().err


def test_tables_survive_the_disk(tmp_path):
    """Prompts with commas, quotes and line breaks; six digits of every value; the pictures to the bit."""
    rows = [
        {"set": "train", "prompt": 'a "big",\ncat', "image": k, "r": 1 / 3 + k, "image/x": 1e-7}
        for k in range(2)
    ]
    pictures = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    write_images(
        tmp_path, Images(rows, [{"prompt": "a", "lpips": 0.5, "vendi": None}], pictures), pictures=True
    )
    back = read_images(tmp_path)
    assert back.prompts == [{"prompt": "a", "lpips": 0.5, "vendi": None}] and torch.equal(
        back.pictures, pictures
    )
    assert back.rows[0]["prompt"] == 'a "big",\ncat' and back.values("train", "r")[0] == pytest.approx(
        [1 / 3, 4 / 3], rel=1e-5
    )
    assert back.columns == ["r", "image/x"] and back.sets == ["train"]
