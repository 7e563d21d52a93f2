"""The papers' figures: every one is drawn from runs whose numbers are known; a quick one goes the whole way
on the embedded model."""

import csv
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import CompletedProcess
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib import pyplot as plt
from PIL import Image

from alignlab import figure
from alignlab.compare.finished import CompareError, Finished
from alignlab.config.build import ConfigError
from alignlab.config.schema import QUICK, TrainConfig
from alignlab.paper.draftp import draftp_fig3
from alignlab.paper.fronts import beside_the_penalty, regularisers, stop_at
from alignlab.paper.probes import ANNEALING, LORA_SCALES, SETS, probe
from alignlab.paper.registry import FIGURES
from tests import warm
from tests.running import command_line, configured

EVALUATIONS = (0, 10, 20)


def write_run(folder: Path, c: TrainConfig, gain: float) -> None:
    """A finished run of that configuration: every reward rises linearly by `gain`, diversity falls by a tenth
    of it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(c)))
    names, lines = dict.fromkeys(["reward", *c.reward, *c.eval_rewards]), []
    for k, step in enumerate(EVALUATIONS):
        line: dict[str, Any] = {
            "step": step,
            "samples_seen": 16 * step,
            "seconds": 5.0 * k,
            "reward_queries": 160 * (k > 0),
        }
        line |= {
            "denoiser_forwards": 6400 * (k > 0),
            "denoiser_backwards": 320 * (k > 0),
            "eval/lpips": 0.6 - 0.05 * k * gain,
        }
        for name in names:
            line |= {f"eval/{name}": 5 + gain * k / 2, f"eval/{name}_std": 1.0}
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    ends = {
        who: {**dict.fromkeys(names, 5 + g), "lpips": 0.6 - 0.1 * g}
        for who, g in (("base", 0.0), ("final", gain))
    }
    about = {
        "reward_unit": "points",
        "diversity_metric": "lpips-emoji",
        "machine": {"device": "cpu"},
        "wall_seconds": 60.0,
        "samples_seen": 320,
    }
    ends["base"]["reward_std"] = 1.0
    (folder / "summary.json").write_text(json.dumps({**ends, **about}))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of every point of every experiment's grid, and the answers to every probe."""
    home = tmp_path_factory.mktemp("store")
    for experiment in {name for one in FIGURES.values() for name in one.experiments}:
        points = dict.fromkeys(name.rpartition(",seed=")[0] for name in figure.grid(experiment, quick=False))
        for k, point in enumerate(points):
            c = configured(*point.split(","))
            for seed in (0, 2):
                run = home / "runs" / experiment / f"{point},seed={seed}"
                write_run(run, replace(c, seed=seed), gain=1 + k + 0.05 * seed)
                answer(run)
    return home


def answer(run: Path) -> None:
    """What weights would have said: a reward of 5 and the dial's value; gains of 2 to 6 on prompts of one
    kind after the other; grey pictures."""
    dials = [
        {"dial": dial, "value": v, "reward": 5 + v, "true_preference": 5.5, "lpips": 0.5}
        for dial, values in (("lora_scale", LORA_SCALES), ("annealing", ANNEALING))
        for v in values
    ]
    kinds = {
        name: {
            "prompts": ["a", "b"],
            "base": [[1.0, 2.0], [3.0, 4.0]],
            "tuned": [[3.0 + k, 4.0 + k], [5.0 + k, 6.0 + k]],
        }
        for k, name in enumerate(SETS)
    }
    for name, found in (
        ("dials", dials),
        ("generalisation", kinds),
        ("lion", {"prompts": ["a lion"]}),
        ("varied", {"prompts": ["cat", "dog"]}),
    ):
        (run / "probes" / name).mkdir(parents=True)
        (run / "probes" / name / "answer.json").write_text(json.dumps(found))
        for who in ("base", "tuned"):
            Image.new("L", (198, 50), 100).save(run / "probes" / name / f"{who}.png")


def read(store: Path, *experiments: str) -> dict[str, list[Finished]]:
    return {
        name: figure.finished(store / "runs" / name, figure.grid(name, quick=False)) for name in experiments
    }


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn(name: str, store: Path) -> None:
    """PNG, table and page; a page names command, runs and seeds; nothing is trained; no `quick` on it."""
    folder = figure.make(name, FIGURES[name], figure.FigureConfig(home=str(store), draw_only=True))
    picture = np.asarray(Image.open(folder / "figure.png").convert("RGB"))
    assert picture.std() > 5
    page = (folder / "README.md").read_text()
    assert f"name={name}\n" in page and "seeds 0, 2" in page and "figure.png" in page
    assert all(
        f"alignlab.train -m experiment=figure/{experiment}`" in page
        for experiment in FIGURES[name].experiments
    )
    assert ("lpips-emoji" in page) == (
        name not in ("draftp_fig4", "draftp_fig5")
    )  # which show pictures alone
    assert list(csv.DictReader((folder / "table.csv").open()))


def test_a_verdict_is_kept_and_linked(store: Path) -> None:
    """What was concluded from a figure is written by hand: drawing again leaves it alone and links to it."""
    settings = figure.FigureConfig(home=str(store), draw_only=True)
    folder = figure.make("draft_speed", FIGURES["draft_speed"], settings)
    assert "verdict.md" not in (folder / "README.md").read_text()
    (folder / "verdict.md").write_text("It is faster.")
    figure.make("draft_speed", FIGURES["draft_speed"], settings)
    assert (folder / "verdict.md").read_text() == "It is faster."
    assert "[verdict.md](verdict.md)" in (folder / "README.md").read_text()
    (folder / "verdict.md").unlink()


def test_the_numbers_of_a_figure(store: Path) -> None:
    """Figure 3 of DRaFT+: the curves are the means over seeds, the table's gain is that of the summaries, in
    order of kl_coeff."""
    runs = read(store, "draftp_fig3", "ddpo_preference")
    drawn, rows = draftp_fig3(runs)
    assert [row["variant"] for row in rows] == [
        "DRaFT-1",
        *(f"DRaFT+ KL {k}" for k in ("0.01", "0.03", "0.1", "0.3", "1")),
        "DDPO-IS",
    ]
    for k, row in enumerate(rows[:6]):
        assert (
            row["gain"].value == pytest.approx(1 + k + 0.05) and row["seeds"] == 2 and row["learns"] == "yes"
        )
        if k:  # diversity falls by a tenth of what the reward rises; the first variant never gets to 6.9
            assert row["diversity at 6.9"].value == pytest.approx(0.6 - 0.1 * 1.9)
        assert ("diversity at 6.9" in row) == (k > 0)
        np.testing.assert_allclose(drawn.axes[1].lines[k].get_ydata(), 5 + (1.05 + k) * np.array([0, 0.5, 1]))
        np.testing.assert_allclose(
            drawn.axes[0].lines[k].get_ydata(), 0.6 - 0.1 * (1.05 + k) * np.array([0, 0.5, 1])
        )


def test_generalisation_and_dials_come_from_the_answers(store: Path) -> None:
    """Each kind's own gain, a panel for each reward that was asked; the dials' points lie where they were
    measured, their ends are the base model and DRaFT."""
    drawn, rows = FIGURES["ddpo_generalisation"].draw(read(store, "ddpo_preference", "ddpo_fig4"))
    assert len(drawn.axes) == len({row["reward"] for row in rows}) == 5  # here every run has answers
    rows = [row for row in rows if row["reward"] == "emoji_preference"]
    assert [row["gain"].value for row in rows] == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert [row["gain less that on trained animals"].value for row in rows[1:]] == [1.0, 2.0, 3.0, 4.0]
    rows = FIGURES["fronts"].draw(read(store, *FIGURES["fronts"].experiments))[1]
    found = {(row["regulariser"], row["setting"]): row for row in rows}
    for dial, values in (("LoRA scale", LORA_SCALES), ("annealed guidance", ANNEALING)):
        assert all(
            found[dial, f"{v:g}"]["reward"].value == 5 + v and found[dial, f"{v:g}"]["lpips"].value == 0.5
            for v in values
        )
    ends = [found["LoRA scale", setting]["reward"].value for setting in "01"]
    assert ends == [5.0, found["eps-MSE KL", "0"]["reward"].value]  # the base model, and DRaFT
    assert {"eps-MSE KL", "trajectory KL (eta = 1)", "reward cap", "K", "early stopping"} <= {
        name for name, _ in found
    }


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_what_there_is(name: str, store: Path) -> None:
    """With any one of its experiments missing it is drawn without it, or one sentence says that it is too
    little."""
    for absent in FIGURES[name].experiments:
        runs = read(store, *(e for e in FIGURES[name].experiments if e != absent))
        try:
            drawn, rows = FIGURES[name].draw(runs)
            assert rows and drawn.axes
            plt.close(drawn)
        except CompareError as error:
            assert "none of the finished runs belongs" in str(error)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_one_seed(name: str, store: Path) -> None:
    """No interval, no error bar, and nothing said of learning."""
    runs = {
        e: [run for run in there if run.seed == 0]
        for e, there in read(store, *FIGURES[name].experiments).items()
    }
    drawn, rows = FIGURES[name].draw(runs)
    plt.close(drawn)
    for row in rows:
        assert row.get("seeds", 1) == 1 and row.get("learns", "one seed") == "one seed"
        assert all(
            value is None for key, value in figure.spread_out(row).items() if key.endswith((" low", " high"))
        )


def test_a_front_beside_the_penalty(store: Path, tmp_path: Path) -> None:
    """Fronts are interpolated to the reward of KL 0.03, seed by seed, and only where all seeds reach it;
    dials of one seed are of that seed alone."""
    runs = read(store, *FIGURES["fronts"].experiments)
    points = regularisers(runs)
    kl = dict(points["eps-MSE KL"])["0.03"]
    (row,) = (r for r in beside_the_penalty(points) if r["regulariser"] == "trajectory KL (eta = 1)")
    ends = points["trajectory KL (eta = 1)"]
    expected = []
    for seed in (0, 1):
        x, y = zip(*sorted((p["reward"][seed], p["lpips"][seed]) for _, p in ends), strict=True)
        assert x[0] <= kl["reward"][seed] <= x[-1]
        expected.append(np.interp(kl["reward"][seed], x, y) - kl["lpips"][seed])
    assert row["lpips less KL 0.03's"].value == pytest.approx(np.mean(expected)) and row["seeds"] == 2
    assert "LoRA scale" not in {
        r["regulariser"] for r in beside_the_penalty({**points, "LoRA scale": points["LoRA scale"][:1]})
    }
    one = next(run for run in runs["draftp_fig3"] if run.settings.kl_coeff == 0 and run.seed == 2)
    moved = shutil.copytree(one.folder, tmp_path / one.folder.name, ignore=lambda *_: ["dials"])
    fewer = [replace(run, folder=moved) if run is one else run for run in runs["draftp_fig3"]]
    assert {len(p["lpips"]) for _, p in regularisers({**runs, "draftp_fig3": fewer})["LoRA scale"]} == {1}


def test_the_grid_is_the_sweep(store: Path, tmp_path: Path) -> None:
    """Folders are those that Hydra names; other settings of a run do not count, other seeds are drawn but
    fill no gap."""
    names = figure.grid("draft_k", quick=False)
    assert len(names) == 12 and names[0] == "algo.k=2,experiment=draft_k,seed=0"
    assert (
        figure.grid("draftp_fig3", quick=True)[1] == "experiment=draftp_fig3,kl_coeff=0.01,quick=True,seed=0"
    )
    c = configured("experiment=figure/draft_k", "algo.k=2")
    for name in (names[0], names[0].replace("seed=0", "seed=7"), f"{names[1]},steps=9"):
        write_run(tmp_path / name, replace(c, seed=int(name.partition("seed=")[2][0])), gain=1.0)
    assert sorted(run.seed for run in figure.finished(tmp_path, names)) == [0, 7]


def test_where_a_held_out_score_stops_a_run(store: Path) -> None:
    """At the last evaluation before the score falls so many standard deviations below its best so far."""
    (run, *_) = read(store, "draft_k")["draft_k"]
    for scores, epoch in (([5, 6, 5.6], 2), ([5, 6, 5.4], 1), ([5, 4, 6], 0), ([5, 6, 7], 2)):
        lines = [{**line, "eval/clip": score} for line, score in zip(run.lines, scores, strict=True)]
        assert stop_at(replace(run, lines=lines), 0.5) == epoch
        assert stop_at(replace(run, lines=lines), 9.0) == 2


def test_without_weights_there_is_no_answer(store: Path, tmp_path: Path) -> None:
    """A question that was never asked of a run whose weights are gone."""
    write_run(tmp_path / "run", configured("experiment=figure/draftp_fig3"), gain=1.0)
    assert not probe(tmp_path / "run", "dials") and not (tmp_path / "run" / "probes").exists()


def test_bad_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One sentence, and code 2."""
    monkeypatch.chdir(tmp_path)
    for words, sentence in (
        (["name=draft_fig3"], "did you mean name=draftp_fig3?"),
        (["name=fronts", "workers=0"], "workers=0 must be at least 1"),
        (
            ["name=fronts", "draw_only=true"],
            "name=fronts: no run of draftp_fig3, trajectory_kl, reward_cap, draft_k is finished",
        ),
    ):
        assert command_line(monkeypatch, *words, command=figure) == 2
        assert sentence in capsys.readouterr().err


def test_quick_is_small() -> None:
    """Whatever the algorithm; smaller sizes stay."""
    for algo in ("ddpo", "rwr", "draft"):
        c = asdict(configured(f"algo={algo}", "quick=true", "eval_sampler.steps=2"))
        for name, most in QUICK.items():
            group, _, last = name.rpartition(".")
            node = c[group] if group else c
            assert (
                last not in node or node[last] <= most
            )  # algo.pairs and algo.images are of what has data of its own
        assert c["eval_sampler"]["steps"] == 2
    with pytest.raises(
        ConfigError, match="samples_per_step=8 is not a multiple of micro_batch=6"
    ):  # checked as it will be run
        configured("algo=draft", "quick=true", "samples_per_step=12", "micro_batch=6")


def test_quick_sweeps_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process each; results one after another, their jobs side by side. One that fails is named, and the
    others run."""
    monkeypatch.chdir(tmp_path)
    both, begun, running = Barrier(2, timeout=20), [], []

    def process(words: list[str], **about: Any) -> CompletedProcess[str]:
        begun.append(words)
        running.append(words)
        if "quick=true" in words:
            both.wait()
        else:
            assert running == [words]
        running.remove(words)
        return CompletedProcess(words, 3 if "experiment=figure/drtune" in words else 0)

    monkeypatch.setattr(figure.subprocess, "run", process)
    for quick, launcher in ((True, False), (False, True)):
        begun.clear()
        (failed,) = figure.run_sweeps(["drtune", "draft_lv"], figure.FigureConfig(quick=quick))
        assert failed.startswith("experiment=figure/drtune ended with code 3")
        assert len(begun) == 2 and all(("hydra/launcher=workers" in words) == launcher for words in begun)


def test_a_failed_sweep_leaves_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every unfinished sweep is started once, though figures share it; the figure is drawn from the runs
    there are; a sentence and code 2."""
    monkeypatch.chdir(tmp_path)
    begun: list[str] = []

    def process(words: list[str], **about: Any) -> CompletedProcess[str]:
        begun.append(next(word for word in words if word.startswith("experiment=")))
        return CompletedProcess(words, 1)

    monkeypatch.setattr(figure.subprocess, "run", process)
    point = figure.grid("overoptimisation", quick=True)[0]
    write_run(tmp_path / "runs/quick/runs/overoptimisation" / point, configured(*point.split(",")), gain=1.0)
    for words in (["quick=true"], [f"home={tmp_path / 'home'}"]):
        begun.clear()
        assert command_line(monkeypatch, "name=all", *words, command=figure) == 2
        assert len(begun) == len(set(begun)) == len({e for one in FIGURES.values() for e in one.experiments})
    page = (tmp_path / "runs/quick/paper/overoptimisation/README.md").read_text()
    assert "experiment=figure/overoptimisation quick=true seed=0`: 1 of 2 runs finished" in page
    said = capsys.readouterr().err
    assert (
        "experiment=figure/overoptimisation ended with code 1" in said and "name=k_laws: no run of " in said
    )


def test_a_quick_figure_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A sweep and a stamped figure; typed again, nothing is trained again and it is only drawn. Asked of a
    run's weights, a question is answered once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figure.subprocess, "run", warm.run)
    home, words = tmp_path / "runs" / "quick", ("name=overoptimisation", "quick=true")
    assert command_line(monkeypatch, *words, command=figure) == 0
    written = {run: run.stat().st_mtime_ns for run in home.glob("runs/*/*/summary.json")}
    assert len(written) == 2
    drawn = home / "paper" / "overoptimisation" / "figure.png"
    drawn.unlink()
    capfd.readouterr()
    assert command_line(monkeypatch, *words, command=figure) == 0
    assert "alignlab.train" not in capfd.readouterr().out
    assert all(run.stat().st_mtime_ns == at for run, at in written.items())
    red = np.asarray(Image.open(drawn).convert("RGB")).astype(int)
    assert (red[..., 0] - red[..., 2] > 10).sum() > 2000  # the stamp
    run = next(iter(written)).parent
    assert probe(run, "generalisation")
    answer = run / "probes" / "generalisation" / "answer.json"
    at = answer.stat().st_mtime_ns
    assert json.loads(answer.read_text()).keys() >= {*SETS}
    assert probe(run, "generalisation") and answer.stat().st_mtime_ns == at


@pytest.mark.slow
def test_a_quick_figure_asks_the_weights_of_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that needs answers trains its runs, asks each of them, and draws what they said."""
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "runs" / "quick"
    assert command_line(monkeypatch, "name=ddpo_generalisation", "quick=true", command=figure) == 0
    assert len([*home.glob("runs/*/*/probes/generalisation/answer.json")]) == 2
    assert len(list(csv.DictReader((home / "paper" / "ddpo_generalisation" / "table.csv").open()))) == 10
