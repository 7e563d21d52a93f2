"""The make_pairs command: what it writes, how it goes on, and other pairs of the same candidates."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from alignlab import make_pairs as command
from alignlab.config.build import build
from alignlab.data.captioned import captioned
from alignlab.data.judgements import image
from alignlab.data.pairing import NORMALISED, RULES, Pairing
from alignlab.data.preferences import preferences
from alignlab.rewards.compose import RewardError, WeightedSum
from alignlab.runs import candidates
from alignlab.train import train
from tests.running import command_line, configured, tiny

FILES = ("candidates.jsonl", "pairs.jsonl", "labels.jsonl")


def words(model: str, *more: str) -> list[str]:
    """Overrides of a command of about a second: 5 prompts, 2 at a time, 3 images of each."""
    return [
        f"model.path_or_id={model}",
        "eval_sampler.steps=2",
        "reward=[brightness,colour]",
        "prompts.prompts=[cat,dog,fish,owl,bee]",
        "prompts.unseen=[seal]",
        "candidates=3",
        "batch=6",
        "device=cpu",
        *more,
    ]


def typed(monkeypatch: pytest.MonkeyPatch, *said: str) -> int:
    """`python -m alignlab.make_pairs ...`, in this process; the exit code."""
    return command_line(monkeypatch, *said, command=command)


def table(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    """All that is written, but for the lock."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


@pytest.fixture(scope="module")
def made(tiny_sd: str, tmp_path_factory) -> Path:
    """A finished folder, which tests must not change."""
    folder = tmp_path_factory.mktemp("made") / "pairs"
    with pytest.MonkeyPatch.context() as patch:
        assert typed(patch, *words(tiny_sd, f"output_dir={folder}")) == 0
    return folder


def test_what_is_written(made: Path) -> None:
    """K images of each prompt with their seeds, scores of the images as they are on the disk, pairs by the
    rule, and labels."""
    rows = table(made / "candidates.jsonl")
    prompts = [f"a {word}" if word != "owl" else "an owl" for word in ("cat", "dog", "fish", "owl", "bee")]
    assert [(r["prompt"], r["replica"], r["seed"]) for r in rows] == [
        (p, k, 0) for p in prompts for k in range(3)
    ]
    about = yaml.safe_load((made / "make_pairs.yaml").read_text())
    for name in ("brightness", "colour"):
        node = {k: v for k, v in about["config"]["reward"][name].items() if k not in ("weight", "normalize")}
        pictures = torch.stack([image({"x": r["image"], "_table": made / "t"}, "x", (16, 16)) for r in rows])
        assert build(node)(pictures, [r["prompt"] for r in rows]).tolist() == [
            r["rewards"][name] for r in rows
        ]
    expected = Pairing()(
        [r["prompt"] for r in rows], {n: [r["rewards"][n] for r in rows] for n in ("brightness", "colour")}
    )
    pairs = table(made / "pairs.jsonl")
    assert len(pairs) == about["pairs"] == len(expected.pairs) == 5 and about["ties"] == 0
    for pair, its in zip(pairs, expected.pairs, strict=True):
        winner, loser = rows[its.winner], rows[its.loser]
        assert (pair["prompt"], pair["winner"], pair["loser"]) == (
            winner["prompt"],
            winner["image"],
            loser["image"],
        )
        assert pair["margin"] == its.margin > 0 and pair["rule"] == "best_worst" and pair["seed"] == 0
        assert (pair["winner_rewards"], pair["loser_replica"]) == (winner["rewards"], loser["replica"])
    labels = {row["image"]: row["label"] for row in table(made / "labels.jsonl")}
    assert labels == {p["winner"]: True for p in pairs} | {p["loser"]: False for p in pairs}
    assert (
        about["config"]["candidates"] == 3
        and about["units"].keys() == {"brightness", "colour"}
        and about["versions"]
    )


def test_it_is_read_by_training(made: Path, tiny_sd: str, tmp_path: Path) -> None:
    """The folder is data of DPO, and of supervised training; candidates and labels beside the pairs are not
    taken for pairs."""
    data = preferences(str(made))
    assert (len(data), data.ties) == (5, 0) and data.images(0, (16, 16))[0].shape == (3, 16, 16)
    assert captioned(str(made)).prompts == data.prompts
    train(configured(*tiny(tiny_sd, "algo=dpo", f"algo.data={made}", "steps=1")), tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").is_file()


def stop_at(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str, call: int, error: BaseException
) -> list[int]:
    """Lets the call of a function or method fail that has this number, once."""
    usual, calls = getattr(where, name), []

    def failing(*given, **how):
        calls.append(len(calls))
        if len(calls) == call:
            raise error
        return usual(*given, **how)

    monkeypatch.setattr(where, name, failing)
    return calls


@pytest.mark.parametrize(
    ("where", "name", "call", "error", "code"),
    [
        (command, "rollout", 1, KeyboardInterrupt(), 130),
        (command, "rollout", 2, KeyboardInterrupt(), 130),
        (WeightedSum, "score", 1, RewardError("reward brightness died"), 2),
        (WeightedSum, "score", 3, RewardError("reward brightness died"), 2),
        (candidates.Candidates, "log", 2, KeyboardInterrupt(), 130),
        (candidates.Image.Image, "save", 8, OSError(28, "No space left on device"), 2),
        (candidates.os, "fsync", 20, OSError(28, "No space left on device"), 2),
        (command, "write_pairs", 1, KeyboardInterrupt(), 130),
    ],
)
def test_it_goes_on_where_it_was(
    where, name, call, error, code, made: Path, tiny_sd: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Stopped anywhere and typed again: what was drawn is not drawn again, and all files are those of the
    undisturbed command."""
    said = words(tiny_sd, f"output_dir={tmp_path / 'pairs'}")
    with monkeypatch.context() as patch:
        stop_at(patch, where, name, call, error)
        assert typed(patch, *said) == code
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pairs").glob("images/*.png")}
    if isinstance(error, RewardError):
        assert f"reward brightness died; the images are kept in {tmp_path}/pairs" in capsys.readouterr().err
        assert len(before) == (6 if call == 1 else 15)
        with monkeypatch.context() as patch:
            drawn = stop_at(patch, command, "rollout", 99, KeyboardInterrupt())
            assert typed(patch, *said) == 0 and len(drawn) == (2 if call == 1 else 0)
    else:
        assert typed(monkeypatch, *said) == 0
    mine, whole = contents(tmp_path / "pairs"), contents(made)
    assert mine.keys() == whole.keys() and all(mine[name] == whole[name] for name in mine)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "pairs").glob("images/*.png")}
    assert name in ("save", "fsync") or all(
        after[k] == before[k] for k in before
    )  # within a batch it is drawn again, whole


def test_a_torn_line(made: Path, tiny_sd: str, tmp_path: Path, monkeypatch) -> None:
    """Half a line, lines of half a batch, half a picture: cut back, and drawn again in the same batches."""
    said, folder = words(tiny_sd, f"output_dir={tmp_path / 'pairs'}"), tmp_path / "pairs"
    assert typed(monkeypatch, *said) == 0
    lines = (folder / "candidates.jsonl").read_bytes()
    for kept in (lines[: len(lines) // 2], b"\n".join(lines.split(b"\n")[:10]) + b"\n", lines[:-1], b"{"):
        (folder / "candidates.jsonl").write_bytes(kept)
        (folder / "images" / ".new_00004_00.png").write_bytes(b"half")
        assert typed(monkeypatch, *said) == 0 and contents(folder) == contents(made)


def test_a_finished_folder_loads_no_model(made: Path, tiny_sd: str, tmp_path: Path, monkeypatch) -> None:
    """Typed again, and with another rule: the pairs are made anew, and nothing is drawn."""
    said = words(tiny_sd, f"output_dir={tmp_path / 'pairs'}")
    assert typed(monkeypatch, *said) == 0
    monkeypatch.setattr(command, "policy_of", lambda *_, **__: pytest.fail("a model was loaded"))
    assert typed(monkeypatch, *said, "batch=9") == 0 and contents(tmp_path / "pairs") == contents(made)
    assert typed(monkeypatch, *said, "pairing.rule=all_pairs") == 0
    assert len(table(tmp_path / "pairs" / "pairs.jsonl")) == 15


@pytest.mark.parametrize(
    ("rule", "pairs"),
    [
        (["pairing.rule=all_pairs"], 15),
        (["pairing.rule=pareto"], None),
        (["pairing.rule=median", "pairing.normalise=rank"], None),
    ],
)
def test_other_pairs_of_the_same_candidates(
    rule, pairs, made: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """again=: without a model, by the rule on the stored scores; in a new folder with its images, or in
    place."""
    monkeypatch.setattr(command, "policy_of", lambda *_, **__: pytest.fail("a model was loaded"))
    assert typed(monkeypatch, f"again={made}", f"output_dir={tmp_path / 'new'}", *rule) == 0
    rows, found = table(made / "candidates.jsonl"), table(tmp_path / "new" / "pairs.jsonl")
    how = dict(word.removeprefix("pairing.").split("=") for word in rule)
    expected = Pairing(**how)(
        [r["prompt"] for r in rows], {n: [r["rewards"][n] for r in rows] for n in rows[0]["rewards"]}
    )
    assert [(p["winner"], p["loser"]) for p in found] == [
        (rows[p.winner]["image"], rows[p.loser]["image"]) for p in expected.pairs
    ]
    assert pairs in (None, len(found)) and f"{expected.ties} ties left out" in capsys.readouterr().out
    assert len(preferences(str(tmp_path / "new"))) == len(found)
    before = contents(tmp_path / "new")
    assert (
        typed(monkeypatch, f"again={tmp_path / 'new'}", *rule) == 0 and contents(tmp_path / "new") == before
    )
    assert {k: v for k, v in before.items() if "images" in k or k == FILES[0]} == {
        k: v for k, v in contents(made).items() if "images" in k or k == FILES[0]
    }
    assert typed(monkeypatch, f"again={made}", f"output_dir={tmp_path / 'new'}") == 2
    assert "is not empty; choose another output_dir, or leave it out" in capsys.readouterr().err


def test_a_copy_is_whole_or_not_there(made: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """A disk that fills up while candidates are copied: a sentence, and nothing is left; file systems without
    hard links get copies."""
    with monkeypatch.context() as patch:
        patch.setattr(
            candidates.os,
            "link",
            lambda old, new: (_ for _ in ()).throw(OSError(95, "Operation not supported")),
        )
        with patch.context() as full:
            stop_at(full, candidates.shutil, "copyfile", 3, OSError(28, "No space left on device"))
            assert typed(full, f"again={made}", f"output_dir={tmp_path / 'new'}") == 2
        assert "cannot be written (No space left on device); make room" in capsys.readouterr().err and not [
            *tmp_path.iterdir()
        ]
        assert typed(patch, f"again={made}", f"output_dir={tmp_path / 'new'}") == 0
    assert contents(tmp_path / "new") == contents(made) and [p.name for p in tmp_path.iterdir()] == ["new"]


def test_weights_are_those_of_the_rewards(made: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Unless pairing.weights has others; of an expert alone, its own order."""
    for said, best in (
        (["pairing.weights={colour: 0}"], "brightness"),
        (["pairing.weights={brightness: 0}"], "colour"),
    ):
        folder = tmp_path / best
        assert typed(monkeypatch, f"again={made}", f"output_dir={folder}", *said) == 0
        assert all(
            p["margin"] == p["winner_rewards"][best] - p["loser_rewards"][best]
            for p in table(folder / "pairs.jsonl")
        )
    assert (
        typed(monkeypatch, f"again={made}", f"output_dir={tmp_path / 'x'}", "pairing.weights={clip: 1}") == 2
    )
    assert (
        "pairing: weights.clip names no reward of these candidates; they have brightness, colour"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "x").exists()


def test_a_run_draws_its_own_prompts(tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """By its model, sampler, prompts and rewards, unless they are named; without its LoRA, the base model's
    images; weights that changed since are refused."""
    run = tmp_path / "run"
    train(configured(*tiny(tiny_sd, "algo=draft", "lr=0.3", "steps=2", "prompts.unseen=[seal]")), run)
    said = [f"run={run}", "candidates=2", "device=cpu"]
    assert typed(monkeypatch, *said, f"output_dir={tmp_path / 'tuned'}") == 0
    rows = table(tmp_path / "tuned" / "candidates.jsonl")
    assert [r["prompt"] for r in rows[::2]] == ["a cat", "a dog", "a fish"] and {*rows[0]["rewards"]} == {
        "brightness"
    }
    assert typed(monkeypatch, *said, "split=all", "lora_scale=0", f"output_dir={tmp_path / 'all'}") == 0
    base = [
        f"model.path_or_id={tiny_sd}",
        "eval_sampler.steps=2",
        "reward=brightness",
        "prompts.prompts=[cat,dog,fish]",
        "prompts.unseen=[seal]",
    ]
    assert (
        typed(
            monkeypatch, *base, "candidates=2", "split=all", "device=cpu", f"output_dir={tmp_path / 'base'}"
        )
        == 0
    )
    pictures = {name: contents(tmp_path / name) for name in ("tuned", "all", "base")}
    assert all(
        pictures["all"][name] == its for name, its in pictures["base"].items() if name.startswith("images")
    )
    assert pictures["tuned"]["images/00000_00.png"] != pictures["all"]["images/00000_00.png"]
    assert table(tmp_path / "all" / "candidates.jsonl")[-1]["prompt"] == "a seal"
    weights = run / "model" / "pytorch_lora_weights.safetensors"
    (tmp_path / "tuned" / "candidates.jsonl").unlink()
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(bytes(changed))
    assert typed(monkeypatch, *said, f"output_dir={tmp_path / 'tuned'}") == 2
    assert "holds candidates of other weights than those that were given" in capsys.readouterr().err


def test_images_of_one_beginning(tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """shared_latent: x_T of a prompt's images is one, so without noise on the way they would be, too."""
    said = words(
        tiny_sd, f"output_dir={tmp_path / 'pairs'}", "shared_latent=true", "prompts.prompts=[cat,dog]"
    )
    assert typed(monkeypatch, *said) == 2
    assert (
        "shared_latent=true with eval_sampler.eta=0 draws the same image every time; set eval_sampler.eta=1"
        in capsys.readouterr().err
    )
    assert typed(monkeypatch, *said, "eval_sampler.eta=1") == 0
    pictures = contents(tmp_path / "pairs")
    assert len({its for name, its in pictures.items() if name.startswith("images")}) == 6


def test_a_reward_that_compares(tiny_sd: str, tmp_path: Path, monkeypatch) -> None:
    """One that sees all images of a prompt at once is asked prompt by prompt; batch may be smaller than
    that."""
    said = words(
        tiny_sd,
        f"output_dir={tmp_path / 'pairs'}",
        "reward=clip_diversity",
        "prompts.prompts=[cat,dog]",
        "batch=2",
    )
    assert typed(monkeypatch, *said) == 0
    assert len(table(tmp_path / "pairs" / "pairs.jsonl")) == 2


def test_ties_only(tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """No pair is no mistake: it is counted and said."""
    assert typed(monkeypatch, *words(tiny_sd, f"output_dir={tmp_path / 'pairs'}", "pairing.margin=100")) == 0
    assert "0 pairs by best_worst, 5 ties left out, 5 prompts without a pair" in capsys.readouterr().out
    assert (tmp_path / "pairs" / "pairs.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("said", "words_of_it"),
    [
        ("candidates=1", "candidates=1 must be at least 2"),
        ("candidates=1000", "candidates=1000 must be at most 100"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("batch=0", "batch=0 must be at least 1"),
        ("max_prompts=0", "max_prompts=0 must be at least 1"),
        ("split=test", "split=test is not one of seen, unseen, all"),
        ("run=nowhere", "run=nowhere is no run folder"),
        ("lora=nowhere", "lora=nowhere is no folder and no file"),
        ("again=nowhere", "again=nowhere is no folder that alignlab.make_pairs wrote"),
        (
            "pairing.rule=best",
            "pairing.rule=best must be one of best_worst, topk_bottomk, all_pairs, median, pareto",
        ),
        ("pairing.k=0", "pairing.k=0 must be at least 1"),
        ("pairing.margin=-1", "pairing.margin=-1 must be a finite number, 0 or more"),
        ("pairing.rul=best", "pairing.rul is not a known key"),
        ("pairing=null", "pairing has no _target_"),
        ("pairing=5", "pairing has no _target_"),
        ("pairing.weights=5", "pairing.weights=5 must be a table"),
        (
            "pairing.weights={brightness: 0, colour: 0}",
            "every reward has the weight 0 (brightness, colour), so none would choose",
        ),
        ("pairing._target_=os.system", "pairing._target_=os.system lies outside alignlab"),
        ("pairing.weights={clip: 1}", "pairing.weights.clip names no reward; they are brightness, colour"),
        (
            "reward.brightness.normalize=true",
            "reward.brightness.normalize=true counts in standard deviations",
        ),
        ("eval_sampler.steps=0", "eval_sampler.steps=0 must be at least 1"),
        ("eval_sampler=flow", "does not fit this model"),
        ("precision=fp8", "precision=fp8 is not one of"),
        ("prompts.prompts=[]", "holds no prompt"),
        ("reward=none", "reward is empty"),
    ],
)
def test_mistakes(said: str, words_of_it: str, tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """One sentence, before a model is loaded, and nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "policy_of", lambda *_, **__: pytest.fail("a model was loaded"))
    assert typed(monkeypatch, *words(tiny_sd, "output_dir=pairs"), said) == 2
    assert words_of_it in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_two_mistakes(tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Those that need each other to be seen: k of too few, a split that is empty, sampling keys beside
    again."""
    monkeypatch.chdir(tmp_path)
    for said, its in (
        (
            ["pairing.rule=topk_bottomk", "pairing.k=2"],
            "pairing.k=2 best and as many worst are more than candidates=3",
        ),
        (["split=unseen", "prompts.unseen=[]"], "split=unseen, but these prompts have none"),
        (["again=x"], "again=x samples and scores nothing, so candidates has no effect"),
        (["run=a", "lora=b"], "run=a and lora=b exclude each other"),
    ):
        assert typed(monkeypatch, *words(tiny_sd, "output_dir=pairs"), *said) == 2
        assert its in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_another_configuration_is_refused(
    made: Path, tiny_sd: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """By its first differing key, before a model is loaded; so are folders of others, and prompts that
    changed in their file."""
    monkeypatch.setattr(command, "policy_of", lambda *_, **__: pytest.fail("a model was loaded"))
    before = contents(made)
    for said, its in (
        ("seed=1", "holds candidates with seed=0, but seed=1 was asked for; choose another output_dir"),
        (
            "eval_sampler.guidance_scale=2",
            "holds candidates with eval_sampler.guidance_scale=3.0, but eval_sampler.guidance_scale=2",
        ),
        ("prompts.prompts=[cat]", "holds candidates with prompts.prompts="),
    ):
        assert typed(monkeypatch, *words(tiny_sd, f"output_dir={made}"), said) == 2
        assert its in capsys.readouterr().err
    assert contents(made) == before
    (tmp_path / "mine.txt").touch()
    assert typed(monkeypatch, *words(tiny_sd, f"output_dir={tmp_path}")) == 2
    assert "is not empty and holds no candidates" in capsys.readouterr().err


def test_prompts_that_changed_in_their_file(tiny_sd: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """The configuration is the same, the prompts are not."""
    file, said = tmp_path / "prompts.txt", [w for w in words(tiny_sd) if not w.startswith("prompts.")]
    said += [
        "prompts=file",
        f"prompts.file={file}",
        "prompts.unseen_share=0",
        f"output_dir={tmp_path / 'pairs'}",
    ]
    file.write_text("a cat\na dog\na fish\n")
    assert typed(monkeypatch, *said) == 0
    for text, its in (
        ("a cat\na cow\na fish\n", "holds candidates of other prompts"),
        ("a cat\n", "holds candidates of 3 prompts"),
    ):
        file.write_text(text)
        assert typed(monkeypatch, *said) == 2
        assert re.search(its, capsys.readouterr().err)
    file.write_text("a cat\na dog\na fish\na cow\n")
    assert typed(monkeypatch, *said) == 2
    assert "holds candidates of other prompts than those that were given" in capsys.readouterr().err


IMAGE = '{"prompt": "a", "image": "images/0.png", '
HOSTILE = {
    "5": "is no candidate",
    "{": "is no JSON",
    IMAGE + '"seed": 0, "replica": 0}': "is no candidate",
    IMAGE + '"seed": true, "replica": 0, "rewards": {"x": 1}}': "is no candidate",
    IMAGE + '"seed": 0, "replica": 0, "rewards": {"x": NaN}}': "has no finite rewards",
    IMAGE + '"seed": 0, "replica": 0, "rewards": {"x": "1"}}': "has no finite rewards",
    IMAGE + '"seed": 0, "replica": 0, "rewards": {}}': "has no finite rewards",
    IMAGE.replace('"a"', r'"a\u0000"') + '"seed": 0, "replica": 0, "rewards": {"x": 1}}': "is no text",
    **{
        f'{{"prompt": "a", "image": "{image}", "seed": 0, "replica": 0, "rewards": {{"x": 1}}}}': said
        for image, said in {
            "../0.png": "is no path below the table's folder",
            "/etc/hostname": "is no path below the table's folder",
            "images/1.png": "there is no file",
        }.items()
    },
    "": "holds no scored candidates yet",
}


LINE_DAMAGES = {
    "a null": lambda line: b"null\n",
    "a list": lambda line: b"[]\n",
    "half a line": lambda line: line[:20] + b"\n",
    "a line lost": lambda line: b"",
    "a line of no text": lambda line: b"\xff\xfe\n",
    "another prompt": lambda line: line.replace(b"a dog", b"a dot"),
    "a reward that is none": lambda line: line.replace(b'"brightness": ', b'"brightness": N'),
    "another reward": lambda line: line.replace(b'"brightness"', b'"brightnest"'),
}


@pytest.mark.parametrize("harm", LINE_DAMAGES)
def test_damaged_candidates_are_scored_again(
    harm: str, made: Path, tiny_sd: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """One damaged line of candidates.jsonl: again= names it and the way out, the same command mends it from
    its image and keeps the scores of all other images."""
    folder = tmp_path / "pairs"
    shutil.copytree(made, folder)
    path, before = folder / "candidates.jsonl", contents(made)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], LINE_DAMAGES[harm](lines[4]), *lines[5:]]))
    if harm != "a line lost" and harm != "another prompt":
        assert typed(monkeypatch, f"again={folder}", f"output_dir={tmp_path / 'new'}") == 2
        said = capsys.readouterr().err
        assert (
            f"typed again with output_dir={folder}" in said
            and "remove" not in said
            and not (tmp_path / "new").exists()
        )
    seen: list[int] = []
    real = WeightedSum.score
    monkeypatch.setattr(
        WeightedSum,
        "score",
        lambda self, images, *more: seen.append(len(images)) or real(self, images, *more),
    )
    assert typed(monkeypatch, *words(tiny_sd, f"output_dir={folder}")) == 0
    assert path.read_bytes() == (made / "candidates.jsonl").read_bytes() and sum(seen) <= 6
    assert {name: content for name, content in contents(folder).items() if name.endswith(".png")} == {
        name: content for name, content in before.items() if name.endswith(".png")
    }


@pytest.mark.parametrize("line", HOSTILE)
def test_hostile_tables(line: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """A folder of somebody else: taken, or refused in a sentence with the line; nothing is copied, and
    nothing is changed."""
    (tmp_path / "a" / "images").mkdir(parents=True)
    (tmp_path / "a" / "images" / "0.png").write_bytes(b"x")
    (tmp_path / "a" / "make_pairs.yaml").write_text(
        "config: {reward: {x: {weight: [], _target_: os.system}}}\n"
    )
    (tmp_path / "a" / "candidates.jsonl").write_text(line + "\n")
    before = contents(tmp_path)
    assert typed(monkeypatch, f"again={tmp_path / 'a'}", f"output_dir={tmp_path / 'b'}") == 2
    assert HOSTILE[line] in capsys.readouterr().err and contents(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "its"),
    [
        ("[", "cannot be read"),
        ("5", "says nothing of how"),
        ("config: 5", "says nothing"),
        ("!!python/name:os.system", "cannot be read"),
    ],
)
def test_hostile_descriptions(text: str, its: str, tmp_path: Path, monkeypatch, capsys) -> None:
    row = {"prompt": "a", "image": "0.png", "seed": 0, "replica": 0, "rewards": {"x": 1}}
    (tmp_path / "0.png").write_bytes(b"x")
    (tmp_path / "candidates.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "make_pairs.yaml").write_text(text)
    assert typed(monkeypatch, f"again={tmp_path}") == 2
    assert its in capsys.readouterr().err and not (tmp_path / "pairs.jsonl").exists()


def test_a_sweep(tiny_sd: str, tmp_path: Path, monkeypatch) -> None:
    """-m: a folder for each job."""
    said = words(
        tiny_sd, "prompts.prompts=[cat]", "candidates=2", "seed=0,1", f"output_dir={tmp_path / 'many'}"
    )
    assert typed(monkeypatch, "-m", *said) == 0
    folders = sorted(path.parent for path in (tmp_path / "many").rglob("pairs.jsonl"))
    assert len(folders) == 2 and len({(f / "images" / "00000_00.png").read_bytes() for f in folders}) == 2


def test_its_page(made: Path) -> None:
    """docs/pairs.md names every rule and normalisation, every file and its keys, and keys that there are."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "pairs.md").read_text()
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    assert {*RULES, *NORMALISED} <= rows.keys()
    for name in FILES:
        keys = table(made / name)[0].keys()
        assert all(f"`{key}`" in rows[name] for key in keys) and rows[name].count("`") == 2 * (
            len(keys) + 1
        ), name
    said = set(re.findall(r"[ `(](\w+)=", page)) - {"reward", "prompts", "model", "algo"}
    assert said <= {*command.MakePairsConfig.__dataclass_fields__} | {"normalize"}
