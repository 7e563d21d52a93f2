"""The benchmarks' arithmetic on made-up rounds, and a small list of real items that is stopped, goes on and
is written as a page."""

import json
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from benchmarks import __main__ as bench
from benchmarks import beside, ideas, limit
from benchmarks.clock import Timers, seconds
from benchmarks.items import Item, Setting, alternated
from benchmarks.page import LIMIT, PEER, page
from benchmarks.peer import OWN, PeerError, one_by_one
from benchmarks.ratios import exponent, median, ratio
from tests import warm


def rounds(*pairs: tuple[float, float], others: float = 0.0) -> list[dict[str, Any]]:
    """Rounds of two sides by their CPU seconds; the wall took twice as long."""
    return [
        {
            "sides": {
                side: {"cpu": v, "wall": 2 * v} for side, v in zip(("alignlab", "bare"), pair, strict=True)
            },
            "others": others,
        }
        for pair in pairs
    ]


def test_ratios_are_of_each_round_and_the_median_is_over_rounds():
    """A machine that slows down fivefold between rounds changes no ratio; one bad round moves the range, not
    the median."""
    its = rounds((1.0, 2.0), (5.0, 10.0), (2.6, 4.0), (4.0, 8.0), (9.0, 10.0))
    found = ratio(its, "cpu", "alignlab", "bare")
    assert found is not None and (found.median, found.low, found.high, found.rounds) == (0.5, 0.5, 0.9, 5)
    assert median(its, "wall", "alignlab") == 8.0
    assert ratio(its, "cpu", "alignlab", "nobody") is None and ratio(its, "mb", "alignlab", "bare") is None
    its[0]["sides"]["alignlab"]["part"], its[0]["sides"]["bare"]["part"] = 0.25, 0.5
    apart = ratio(its, "cpu - part", "alignlab", "bare")
    assert apart is not None and (apart.median, apart.rounds) == (0.75 / 1.5, 1)


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_exponents(p):
    """Exactly p for c size^p over two decades; a constant cost of a tenth of the smallest hardly moves it;
    one size has none."""
    sizes = [4, 40, 400]
    assert exponent(sizes, [3 * size**p for size in sizes]) == pytest.approx(p, abs=1e-12)
    if p == 1:
        assert exponent(sizes, [size + 0.4 for size in sizes]) == pytest.approx(0.979, abs=1e-3)
    with pytest.raises(ValueError, match="two sizes"):
        exponent([4, 4], [1.0, 1.0])


def test_sides_alternate():
    """Odd rounds run backwards, and the sides keep their names and order."""
    ran: list[str] = []
    sides = {name: (lambda name=name: ran.append(name) or {"cpu": 1.0}) for name in ("a", "b", "c")}
    assert [list(alternated(sides, number)) for number in (0, 1)] == [["a", "b", "c"]] * 2
    assert ran == ["a", "b", "c", "c", "b", "a"]


def test_timers_give_each_part_its_own_time():
    """A part's seconds are without those of the parts that it calls, and together they are the whole."""

    def spin(length: float) -> None:
        until = time.process_time() + length
        while time.process_time() < until:
            pass

    timers = Timers()
    inner = timers.around("inner", lambda: spin(0.06))

    def work() -> None:
        with timers.time("outer"):
            spin(0.02)
            inner()

    whole = seconds(work)
    assert timers.cpu["inner"] == pytest.approx(0.06, abs=0.01) and timers.cpu["outer"] == pytest.approx(
        0.02, abs=0.01
    )
    assert (
        sum(timers.cpu.values()) == pytest.approx(whole["cpu"], abs=0.005)
        and whole["wall"] >= whole["cpu"] - 0.01
    )


def everything() -> dict[str, Any]:
    """Made-up rounds for every item of the list."""
    found: dict[str, Any] = {}
    for item in bench.items():
        if item.name.startswith("limit/"):
            its = rounds((1.04, 1.0), (1.2, 1.0), (1.0, 1.0), others=0.7)
            for one in its:
                one["sides"]["parts"] = {"U-Net forward": 0.7, "backward": 0.31, "noise": 0.1}
                for side in ("alignlab", "bare"):
                    one["sides"][side] |= {"decoder_cpu": 0.5, "decoder_wall": 0.5}
        else:
            sides: dict[str, dict[str, float]] = {}
            for row in PEER:
                sides |= {
                    side: {**sides.get(side, {}), row.cpu: 3.0, str(row.wall): 3.0} for side in (row.side,)
                }
                sides |= {
                    "TRL": {
                        **sides.get("TRL", {}),
                        row.cpu: 5.0,
                        str(row.wall): 6.0,
                        "cpu": 8.0,
                        "wall": 8.0,
                        "first": 0.5,
                        "late": 0.501,
                    }
                }
            sides["alignlab"] |= {"cpu": 2.0, "wall": 2.0, "first": 0.5, "late": 0.502}
            if item.name == "growth/memory":
                sides = {
                    "stacks": {"sampling": 1.0, "parts": 2.0, "training": 1.0},
                    "K=1": {"mb": 100.0},
                    "K=20": {"mb": 108.0},
                }
            elif item.name in ("growth/images", "growth/steps", "growth/prompts"):
                sides = {
                    str(k): {"cpu": 0.002 * k, "wall": 0.003 * k, "read": 0.001 * k, "mb": k}
                    for k in (1, 10, 100)
                }
            elif item.name == "beside/draftp":
                speeds = {"as shipped": {0: 5.0, 2: 2.4, 8: 1.0}, "spinning": {0: 5.0, 2: 1.6, 8: 0.1}}
                sides = {
                    f"{how}, {load}": {"speed": speed, "load": float(load), "cores": 2.0}
                    for how, its in speeds.items()
                    for load, speed in its.items()
                }
            elif item.name == "ideas/ddpo":
                sides = {"without": {"cpu": 2.0, "wall": 2.0}, "an idea": {"cpu": 3.0, "wall": 4.0}}
            elif item.name == "ideas/learning":
                sides = {"all steps": {"gain": 0.125, "epochs": 32}, "some": {"gain": -0.25, "epochs": 64}}
            its = [{"sides": sides, "others": 0.0}]
        found[item.name] = {"about": "a machine", "rounds": its}
    return {"items": found}


def test_the_page_is_written_from_the_numbers():
    """Ratios, ranges, targets and verdicts of every row are those of the rounds; busy rounds are counted;
    what was not measured is said."""
    results = everything()
    text = page(results)
    assert "| rollout, 1 thread | 1.04 (1.00 to 1.20) | 1.04 (1.00 to 1.20) | ≤ 1.05 | yes | 3 (3) |" in text
    assert (
        "| DRaFT-1, decoder and reward apart, 2 threads | 1.08 (1.00 to 1.40) | 1.05 (1.00 to 1.27) | ≤ 1.1 "
        "| yes | 3 (3) |" in text
    )
    assert (
        "| DDPO, rollout, 1 thread | 0.60 (0.60 to 0.60) | 0.50 (0.50 to 0.50) | ≤ 0.75 | yes | 1 (0) |"
        in text
    )
    assert "| memory, DDPO, our micro-batch | 0.60 (0.60 to 0.60) |  | ≤ 0.6 | yes | 1 (0) |" in text
    assert (
        "| draft1 | 1 (0) | +0.0020 (+0.0020) | +0.0010 (+0.0010) | +0.1000 | +0.0125 | 8.00 (8.00) | ≥ 2 | "
        "yes |" in text
    )
    assert "| rollout, 1 thread | 1.01 | noise 10.0 % |" in text
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 120
    assert "| — its bare passes, 1 thread | 0.60 (0.60 to 0.60) | 0.50 (0.50 to 0.50) |  |  | 1 (0) |" in text
    assert "| time over images (4 to 400): exponent | 1.000 | 1.00 ± 0.05 | yes | 1 (0) |" in text
    assert (
        "| the same, while sampling, an epoch in one micro-batch | 1.00 | 1 | yes | 1 (0) |" in text
        and "| the same, while sampling, an epoch in four | 2.00 | 1 | **no** | 1 (0) |" in text
        and "K=20: 108 MiB), over K=1 | 1.08 | ≤ 1.15 | yes | 1 (0) |" in text
    )
    assert (
        "| an idea | 1.50 (1.50 to 1.50) | 2.00 (2.00 to 2.00) | 1 (0) |" in text and "here 18 of 35." in text
    )
    assert "| 0 | 1.00 | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) | 1 |" in text
    assert "| 2 | 0.50 | 0.48 (0.48 to 0.48) | 0.32 (0.32 to 0.32) | 1.50 (1.50 to 1.50) | 1 |" in text
    assert "| 8 | 0.20 | 0.20 (0.20 to 0.20) | 0.02 (0.02 to 0.02) | 10.00 (10.00 to 10.00) | 1 |" in text
    assert "| all steps | 32 | +0.125 (+0.125 to +0.125) | 1 |" in text and "| some | 64 | -0.250 (" in text
    for its in results["items"]["peer/ddpo, 1 thread"]["rounds"]:
        its["sides"]["alignlab"]["rollout"] = 4.0
    assert (
        "| DDPO, rollout, 1 thread | 0.80 (0.80 to 0.80) | 0.50 (0.50 to 0.50) | ≤ 0.75 | **no** |"
        in page(results)
    )
    for its in results["items"]["peer/ddpo, 2 threads"]["rounds"]:  # where the wall judges
        its["sides"]["alignlab"] |= {"rollout": 4.0, "train_wall": 6.0}
    assert "| DDPO, rollout, 2 threads | 0.80 (0.80 to 0.80) | 0.50 (0.50 to 0.50) | ≤ 0.75 | yes |" in page(
        results
    )
    assert (
        "| DDPO, training, our micro-batch (16), 2 threads | 0.60 (0.60 to 0.60) | 1.00 (1.00 to 1.00) | ≤ "
        "0.6 | **no** |" in page(results)
    )
    without = {
        **results,
        "items": {
            k: v
            for k, v in results["items"].items()
            if not k.startswith(("peer", "limit/ddpo", "ideas/ddpo"))
        },
    }
    assert "## Ideas" in page(without) and "An epoch of DDPO with each" not in page(without)
    assert "the peer was not at hand" in page(
        without
    ) and "| DDPO, training, 1 thread | not measured |" in page(without)
    assert {row.item for row in (*PEER, *LIMIT)} <= {item.name for item in bench.items()}
    assert "not measured" not in page(everything())
    assert "| DRaFT-N, our default, 2 threads | 0.60 (0.60 to 0.60) |" in text


TINY = (
    "samples_per_step=2",
    "micro_batch=2",
    "sampler.steps=2",
    "eval_sampler.steps=2",
    "prompts.per_prompt=2",
)


def test_what_is_timed_of_ours():
    """A process of ours reports seconds of sampling, reward and the rest, memory, and the rewards of its
    epochs; the rest is what is left."""
    words = ["algo=ddpo", "reward=brightness", *TINY, "algo.updates_per_epoch=1"]

    def told(*more: str) -> dict[str, Any]:
        done = warm.run([sys.executable, OWN, "--epochs", "2", *words, *more], capture_output=True)
        assert done.returncode == 0, done.stderr[-500:]
        return json.loads(
            next(line for line in done.stdout.splitlines() if line.startswith("RESULT ")).removeprefix(
                "RESULT "
            )
        )

    said, bare = told(), told("--bare")
    assert all(bare[f"{phase}_{clock}"] > 0 for phase in ("rollout", "train") for clock in ("s", "cpu_s"))
    assert (
        said["rollout_cpu_s"] > said["reward_cpu_s"] > 0
        and said["train_cpu_s"] > 0
        and len(said["reward_mean"]) == 2
    )
    assert said["passes"] == {
        "forward": 2 * 16,
        "backward": 2 * 8,
    }  # epochs; 2 samples, 2 steps, 2 branches, sampled and trained on


@pytest.mark.parametrize(
    ("kind", "words", "parts"),
    [
        (limit.RolloutLimit, ["algo=ddpo", "algo.updates_per_epoch=1"], {"noise", "log-probs"}),
        (
            limit.TrainingLimit,
            ["algo=ddpo", "algo.updates_per_epoch=1"],
            {"selection", "backward", "optimiser", "clipping"},
        ),
        (limit.DraftLimit, ["algo=draft"], {"decoder", "reward", "backward", "noise"}),
    ],
)
def test_limits_are_of_as_many_passes(monkeypatch, kind, words, parts):
    """Both sides of a limit take the same passes through the denoiser, and the parts of ours are found."""
    monkeypatch.setattr(limit, "BATCH", 2)
    monkeypatch.setattr(limit, "STEPS", 2)
    its = kind(*words, *TINY)
    count: list[int] = []
    unet = its.made[0].policy.family.denoiser
    unet.register_forward_hook(lambda module, args, out: count.append(len(out[0])))
    taken = {}
    for side, work in its.sides(1).items():
        count.clear()
        work()
        taken[side] = sum(count)
    assert taken["alignlab"] == taken["bare"] > 0
    assert its.parts(2).keys() >= {"U-Net forward", *parts}


def test_ideas_learn_with_as_many_passes(monkeypatch):
    """A run stops at its budget of passes; a step without noise is not trained on."""
    monkeypatch.setattr(ideas, "LEARNING", (*ideas.LEARNING, *TINY, "algo.updates_per_epoch=1"))
    monkeypatch.setattr(ideas, "EPOCHS", 3)
    monkeypatch.setattr(ideas, "brightness", lambda its: float(len(its.sampler.scored.nonzero())))
    monkeypatch.setattr(ideas, "base", lambda: 0.0)
    every, done = ideas.learn(0, (), None, None)
    some, more = ideas.learn(0, (), lambda rng, n: (0,), done)
    assert every["epochs"] == 3 and done == 3 * (2 * 2 * 2 + 3 * 2 * 2 * 2)
    assert some["epochs"] == 5 and done <= more < done + 2 * 2 * (2 + 3)  # one step of two is trained on
    assert (every["gain"], some["gain"]) == (2.0, 1.0)  # here brightness counts the steps with noise


STAND_IN = """
import json, os, sys
took = 0.5 + ("GOMP_SPINCOUNT" not in os.environ)
print("RESULT " + json.dumps({"rollout_s": 1.0, "reward_s": 0.5, "train_s": took}))
print(sys.argv, os.environ.get("OMP_WAIT_POLICY"), file=open(os.environ["SAID"], "a"))
"""


def test_a_run_is_measured_beside_busy_processes(monkeypatch, tmp_path):
    """Each load with the setting and without, in processes of their own; busy ones end with the run; what the
    user chose is left out."""
    (tmp_path / "own.py").write_text(STAND_IN)
    monkeypatch.setattr(beside, "LOADS", (0, 2))
    monkeypatch.setattr(beside, "OWN", tmp_path / "own.py")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    counted: list[int] = []
    real = subprocess.run

    def run(*words: Any, **more: Any) -> Any:
        counted.append(
            len([child for child in psutil.Process().children() if beside.BUSY in child.cmdline()])
        )
        return real(*words, **more)

    monkeypatch.setattr(beside.subprocess, "run", run)
    sides = beside.draftp(Setting(peer=tmp_path, peer_python=tmp_path, work=tmp_path), 0)
    images = beside.EPOCHS * 8
    assert {side: numbers["speed"] for side, numbers in sides.items()} == {
        f"{how}, {load}": images / seconds
        for load in (0, 2)
        for how, seconds in (("as shipped", 2.0), ("spinning", 3.0))
    }
    assert counted == [0, 0, 2, 2]
    assert not [child for child in psutil.Process().children() if beside.BUSY in child.cmdline()]
    said = (tmp_path / "said").read_text().splitlines()
    assert len(said) == 4 and all("algo=draftp" in line and line.endswith("None") for line in said)


def test_a_list_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    """Rounds are kept as they come; a second call measures only what is missing, then the page is there and
    the next call begins anew. Without the peer its items are left out, with a sentence."""
    done: list[tuple[str, int]] = []
    stops = [("two", 1)]

    def item(name: str, needs_peer: bool = False) -> Item:
        def measured(_: Setting, number: int) -> dict[str, dict[str, float]]:
            if (name, number) in stops:
                stops.remove((name, number))
                raise KeyboardInterrupt
            done.append((name, number))
            return {"alignlab": {"cpu": 1.0, "wall": 1.0}}

        return Item(name=name, measure=measured, rounds=3, needs_peer=needs_peer)

    monkeypatch.setattr(
        bench, "items", lambda: [item("one"), item("two"), item("peer/three", needs_peer=True)]
    )
    words = [
        "benchmarks",
        "--results",
        str(tmp_path / "results"),
        "--work",
        str(tmp_path / "work"),
        "--peer",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    assert (
        done == [("one", 0), ("one", 1), ("one", 2), ("two", 0)]
        and not (tmp_path / "results" / "benchmarks.md").exists()
    )
    assert bench.main() == 0 and done[4:] == [("two", 1), ("two", 2)]
    assert (
        f"left out: the comparison with TRL (the peer's scripts are not in {tmp_path}; give their folder"
        in capsys.readouterr().out
    )
    results = json.loads((tmp_path / "results" / "benchmarks.json").read_text())
    assert {name: len(its["rounds"]) for name, its in results["items"].items()} == {"one": 3, "two": 3}
    assert "the peer was not at hand" in (tmp_path / "results" / "benchmarks.md").read_text()
    monkeypatch.setattr(sys, "argv", [*words, "--only", "one", "--rounds", "1"])
    assert bench.main() == 0 and done[6:] == [("one", 0)]
    results = json.loads((tmp_path / "results" / "benchmarks.json").read_text())
    assert {name: len(its["rounds"]) for name, its in results["items"].items()} == {"one": 1, "two": 3}
    monkeypatch.setattr(bench, "about", lambda: "another machine")
    monkeypatch.setattr(bench.peer, "absent", lambda setting: None)
    monkeypatch.setattr(bench.peer, "versions", lambda setting: "alignlab has 1; TRL has 2")
    broken = Item(
        name="one", measure=lambda *_: (_ for _ in ()).throw(PeerError("it broke")), needs_peer=True
    )
    monkeypatch.setattr(bench, "items", lambda: [broken, item("two")])
    monkeypatch.setattr(sys, "argv", [*words, "--rounds", "1"])
    assert bench.main() == 1 and "error: one: it broke" in capsys.readouterr().err
    results = json.loads((tmp_path / "results" / "benchmarks.json").read_text())
    assert {name: len(its["rounds"]) for name, its in results["items"].items()} == {
        "one": 1,
        "two": 1,
    }  # the old round of one
    page = (tmp_path / "results" / "benchmarks.md").read_text()
    assert f"{results['items']['one']['about']}; but two: another machine." in page
    monkeypatch.setattr(bench.peer, "absent", lambda setting: "it is gone")
    monkeypatch.setattr(sys, "argv", [*words, "--only", "two", "--rounds", "1"])
    assert bench.main() == 0
    assert (
        json.loads((tmp_path / "results" / "benchmarks.json").read_text())["versions"]
        == "alignlab has 1; TRL has 2"
    )
    monkeypatch.setattr(sys, "argv", [*words, "--only", "nothing"])
    with pytest.raises(SystemExit, match="no item is called nothing"):
        bench.main()


def test_processes_run_one_by_one(tmp_path):
    """None begins before the last has ended; a process's memory is its own, however large the one that starts
    it; a failure is one sentence with its last line and exit code."""
    code = (
        'import time; a = time.monotonic(); time.sleep(0.1); print(\'RESULT\', \'{"began": %s, "ended": '
        "%s}' % (a, time.monotonic()))"
    )
    held = bytearray(b"x") * (1 << 28)  # this process has 256 MiB more than it needs
    said = one_by_one({"a": [sys.executable, "-c", code], "b": [sys.executable, "-c", code]}, tmp_path)
    assert said["a"]["ended"] < said["b"]["began"]
    assert len(held) == 1 << 28 and all(3 < its["peak_mb"] < 100 for its in said.values())
    with pytest.raises(PeerError, match=r"-c ended with code 1: ValueError: no"):
        one_by_one({"a": [sys.executable, "-c", "raise ValueError('no')"]}, tmp_path)
    with pytest.raises(PeerError, match="it said nothing"):
        one_by_one({"a": [sys.executable, "-c", "print(1)"]}, tmp_path)
