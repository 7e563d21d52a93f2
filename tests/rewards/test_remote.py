"""A reward on another machine: the same numbers, in the same order, while the next rollout is sampled; and
every way to fail."""

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alignlab.config.schema import TrainConfig
from alignlab.engine.rollout import Rollout
from alignlab.rewards.brightness import Brightness
from alignlab.rewards.compose import RewardError, WeightedSum
from alignlab.rewards.jpeg import JpegSize
from alignlab.rewards.remote import Remote
from alignlab.rewards.server import RewardServer
from alignlab.rewards.wire import Limits, pack, unpack
from alignlab.train import train
from alignlab.training.guards import Guard
from alignlab.training.scoring import ScoredRollouts
from tests.running import command_line, configured, lines, same_weights, tiny

pytestmark = pytest.mark.fault("reward client")

PROMPTS = ["a lion", "zwei Löwen 🦁", "", "a cat", "a dog"]
Mood = Callable[[socket.socket], None]
"""What a server does with a connection instead of serving it."""


class Moody(RewardServer):
    """A reward server whose next connections go as `moods` say."""

    moods: list[Mood]
    connections = 0

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        if self.moods:
            self.moods.pop(0)(request)
        else:
            super().finish_request(request, client_address)


@contextmanager
def serving(reward: Any, name: str = "jpeg", port: int = 0, **options: Any) -> Iterator[Moody]:
    with Moody(("127.0.0.1", port), name, reward, **options) as server:
        server.moods = []
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def url(server: RewardServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def client(server: RewardServer, **options: Any) -> Remote:
    """Impatient. Its first request opens a new connection."""
    remote = Remote(url(server), **{"retries": 2, "backoff": 0.01, "timeout": 0.5, **options})
    remote._http.clear()
    return remote


@pytest.fixture
def server() -> Iterator[Moody]:
    with serving(JpegSize(), digest="d1") as server:
        yield server


def pictures(n: int = 5) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


# -- the numbers


@pytest.mark.parametrize("form", ["png", "safetensors"])
def test_scores_are_the_local_ones(form: str) -> None:
    """Batched (5 images in requests of 2), whatever the prompts' letters: exact by safetensors; by PNG those
    of the image in 8 bits."""

    class Both:
        unit, typical_range, differentiable = "pixels and letters", (0.0, 9.0), True

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return images.double().square().mean((1, 2, 3)).float() + torch.tensor(
                [float(len(p)) for p in prompts]
            )

    images = pictures()
    seen = images if form == "safetensors" else (images * 255).round() / 255
    with serving(Both(), "both") as server:
        scores = client(server, form=form, batch_size=2)(images, PROMPTS)
    assert torch.equal(scores, Both()(seen, PROMPTS)) and scores.dtype == torch.float32
    assert form == "safetensors" or not torch.equal(scores, Both()(images, PROMPTS))


@pytest.mark.parametrize("form", ["png", "safetensors"])
def test_the_wire_keeps_images_and_prompts(form: str) -> None:
    """There and back: safetensors exactly, PNG to 8 bits."""
    from alignlab.rewards.wire import TYPES

    images, prompts = unpack(pack(pictures(), PROMPTS, form), TYPES[form], Limits())
    assert prompts == PROMPTS
    torch.testing.assert_close(
        images, pictures(), rtol=0, atol=0 if form == "safetensors" else 0.5 / 255 + 1e-6
    )


def test_the_declaration_is_the_servers(server: Moody) -> None:
    """Unit and range in the run's logs are those of the reward that is served; open ends of a range survive
    JSON."""
    assert (client(server).unit, client(server).typical_range) == ("kB", (-150.0, 150.0))
    assert not client(server).differentiable
    assert WeightedSum({"remote": client(server)}, {"remote": 1.0}).unit == "kB"
    reward: Any = Brightness()
    reward.typical_range, reward.licence, reward.input_size, reward.needs_prompt = (
        (0.0, float("inf")),
        "MIT",
        224,
        False,
    )
    with serving(reward) as other:
        remote = client(other)
        assert remote.typical_range == (0.0, float("inf"))
        assert (remote.licence, remote.input_size, remote.needs_prompt) == ("MIT", 224, False)


# -- ahead of the scores


class Slow:
    """Takes its time."""

    unit, typical_range, differentiable = "mean", (0.0, 1.0), False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        time.sleep(0.15)
        return images.mean((1, 2, 3))


def rollouts(n: int, seconds: float = 0.15) -> Iterator[Rollout]:
    """Each after the time that sampling it takes."""
    for k in range(n):
        time.sleep(seconds)
        images, prompts = torch.full((2, 3, 8, 8), k / n), (f"{k}", f"{k}")
        rest: Any = {
            "cond": None,
            "sampler": None,
            "noise": None,
            "slots": (),
            "latents": images,
            "log_probs": images,
        }
        yield Rollout(images=images, prompts=prompts, **rest)


def scored(
    n: int, sampled: Iterator[Rollout], reward: WeightedSum, *, gradient: bool = False
) -> ScoredRollouts:
    """The stream of an epoch whose n rollouts are `sampled`."""
    lab: Any = SimpleNamespace(
        policy=SimpleNamespace(passes={"backward": 0}, parameters=list),
        sampler=(),
        reward=reward,
        prompts=SimpleNamespace(draw=lambda n, **_: [""] * n),
        objective=SimpleNamespace(needs_gradient=gradient, plan=lambda *_: None, store=lambda *_: "image"),
        collected=SimpleNamespace(rollout=lambda *_, **__: next(sampled), release=lambda: None),
    )
    c = TrainConfig(samples_per_step=2 * n, micro_batch=2)
    return ScoredRollouts(lab, c, 1, rng=np.random.default_rng(0), guard=Guard(lab, c, 1))


def test_scoring_overlaps_sampling() -> None:
    """Six rollouts of 0.15 s whose scores take 0.15 s each: about 7 x 0.15 s ahead, 12 x 0.15 s one after
    another. The same in order.

    Of three tries ahead the fastest counts: other processes of the machine may hold one up."""
    found, seconds = {}, {0: math.inf, 1: math.inf}
    with serving(Slow(), "slow") as server:
        for ahead in (0, 1, 1, 1):
            reward = WeightedSum({"remote": client(server, form="safetensors", ahead=ahead)}, {"remote": 2.0})
            began, stream = time.perf_counter(), scored(6, rollouts(6), reward)
            records = list(stream)
            seconds[ahead] = min(seconds[ahead], time.perf_counter() - began)
            found[ahead] = (
                [(r.prompts, r.reward.tolist(), r.rewards["remote"].tolist()) for r in records],
                [{name: values.tolist() for name, values in line.items()} for line in stream.rewards],
            )
            assert reward.queries == 12
    assert found[0] == found[1]
    assert [prompts[0] for prompts, *_ in found[1][0]] == [*"012345"]
    assert seconds[0] > 1.8 and seconds[1] < 0.8 * seconds[0]


def test_a_gradient_is_not_sampled_ahead_of() -> None:
    """For an objective that differentiates the reward each rollout is scored before the next is sampled."""
    seen: list[str] = []

    class Watched(Brightness):
        ahead = 3

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            seen.append(f"score {prompts[0]}")
            return super().__call__(images, prompts)

    def sampled() -> Iterator[Rollout]:
        for record in rollouts(3, 0):
            seen.append(f"sample {record.prompts[0]}")
            record.images.requires_grad_()
            yield record

    reward = WeightedSum({"b": Watched()}, {"b": 1.0})
    for record in scored(3, sampled(), reward, gradient=True):
        assert record.reward is not None and record.reward.requires_grad
    assert seen == [f"{what} {k}" for k in range(3) for what in ("sample", "score")]
    seen.clear()
    list(scored(3, sampled(), reward))
    assert seen[0::2] == [
        f"sample {k}" for k in range(3)
    ]  # Watched has no submit: it is computed as each rollout comes


def test_no_rollout_of_an_older_policy(server: Moody) -> None:
    """An objective that updates between rollouts is told to leave ahead alone, instead of training on stale
    samples."""
    stream = scored(3, rollouts(3, 0), WeightedSum({"remote": client(server)}, {"remote": 1.0}))
    drawn = iter(stream)
    next(drawn)
    stream.lab.policy.passes["backward"] += 2
    with pytest.raises(
        RewardError, match=r"updates between rollouts, so none may be sampled ahead; set reward.NAME.ahead=0"
    ):
        next(drawn)


SMALL = [
    "steps=2",
    "samples_per_step=6",
    "sampler.steps=2",
    "evaluation.final_images=1",
    "evaluation.prompts=1",
]


@pytest.fixture(scope="module")
def local(tiny_sd: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the local reward."""
    folder = tmp_path_factory.mktemp("local")
    train(
        configured(
            *tiny(tiny_sd, "algo=ddpo", "algo.updates_per_epoch=2", "reward=jpeg_compressibility", *SMALL)
        ),
        folder,
    )
    return folder


def over_http(tiny_sd: str, where: str) -> list[str]:
    """The same, over HTTP."""
    words = tiny(
        tiny_sd,
        "algo=ddpo",
        "algo.updates_per_epoch=2",
        *SMALL,
        "reward=remote",
        "reward.remote.form=safetensors",
    )
    return [*words, f"reward.remote.url={where}", "reward.remote.retries=1", "reward.remote.ahead=2"]


def check_equal(local: Path, remote: Path) -> None:
    """Every number of every epoch and the weights are bit-identical."""
    theirs = [
        {k.replace("jpeg_compressibility", "remote"): v for k, v in line.items()} for line in lines(local)
    ]
    assert lines(remote) == theirs and same_weights(local, remote)


def test_a_dead_server_ends_the_run_and_resume_goes_on(local, tiny_sd, tmp_path, monkeypatch, capsys) -> None:
    """One sentence and code 2, no traceback; with the server back, resume=RUN ends as the run on the local
    reward does: three micro-batches an epoch, sampled up to two ahead of their scores, give the same metrics,
    evaluations and weights."""
    run, asked = tmp_path / "run", 0

    class Dies(JpegSize):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            nonlocal asked
            asked += 1
            if asked > 6:
                raise MemoryError
            return super().__call__(images, prompts)

    with serving(Dies(), "jpeg") as server:
        port = server.server_port
        assert command_line(monkeypatch, *over_http(tiny_sd, url(server)), f"output_dir={run}") == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "in 2 attempts" in said[0] and "HTTP 500 jpeg failed: MemoryError" in said[0]
    assert "start it again" in said[0] and "resume=RUN" in said[0]
    assert len(lines(run)) >= 1 and not (run / "summary.json").exists()
    named = f"allow_servers=[http://127.0.0.1:{port}]"
    assert f"then go on with resume=RUN '{named}'" in said[0]
    assert command_line(monkeypatch, f"resume={run}", named) == 2  # nobody there
    assert "reward server" in capsys.readouterr().err
    with serving(JpegSize(), "jpeg", port):
        assert command_line(monkeypatch, f"resume={run}", named) == 0
    check_equal(local, run)
    assert json.loads((run / "summary.json").read_text())["reward_unit"] == "kB"


# -- trouble that may pass


def heard(connection: socket.socket) -> None:
    """Reads one request to its end."""
    file = connection.makefile("rb")
    length = 0
    while line := file.readline().strip():
        if line.lower().startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    file.read(length)


def answers(
    body: bytes,
    status: str = "200 OK",
    kind: str = "application/json",
    length: int | None = None,
    more: str = "",
) -> Mood:
    """One raw answer, after which the connection is closed."""

    def mood(connection: socket.socket) -> None:
        heard(connection)
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: "
            f"{len(body) if length is None else length}\r\n{more}\r\n"
        )
        connection.sendall(head.encode() + body)

    return mood


def says(scores: Any, reward: str = "jpeg", digest: str = "d1") -> Mood:
    return answers(json.dumps({"reward": reward, "digest": digest, "scores": scores}).encode())


def late(connection: socket.socket) -> None:
    heard(connection)
    time.sleep(0.6)


def drips(connection: socket.socket) -> None:
    """A byte at a time, each in time, but never done."""
    heard(connection)
    try:
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        )
        for _ in range(20):
            connection.sendall(b" ")
            time.sleep(0.05)
    except OSError:  # the client has left
        return


def garbles(connection: socket.socket) -> None:
    heard(connection)
    connection.sendall(b"\x00\xffSSH-2.0\r\n\r\n")


PASSING: dict[str, Mood] = {
    "hangs up": lambda connection: None,
    "hangs up after the request": heard,
    "answers late": late,
    "drips": drips,
    "garbage": garbles,
    "half an answer": answers(b'{"reward": "jpeg", "digest": "d1", "scores": [1.0, 2.', length=300),
    "half an answer, well cut": answers(b'{"reward": "jpeg", "digest": "d1", "sco'),
    "another page": answers(b"<html>welcome</html>", kind="text/html"),
    "nothing": answers(b""),
    "overloaded": answers(b'{"error": "too many"}', "503 Service Unavailable", more="Retry-After: 1\r\n"),
    "broken": answers(b"", "500 Internal Server Error", kind="text/plain"),
    "too often": answers(b"", "429 Too Many Requests"),
}


@pytest.mark.parametrize("mood", PASSING)
def test_what_may_pass_is_asked_again(mood: str, server: Moody) -> None:
    """The second attempt's scores are the right ones; the first one left nothing behind."""
    remote = client(server)
    server.moods = [PASSING[mood]]
    before = server.connections
    assert torch.equal(remote(pictures(), PROMPTS), JpegSize()((pictures() * 255).round() / 255, PROMPTS))
    assert server.connections == before + 2 and not server.moods


# -- an answer that comes byte by byte


def dripping(at_once: bytes, drips: bytes) -> Mood:
    """Sends the first part at once and then the second one again and again, a byte every 20 ms, until the
    client hangs up."""

    def mood(connection: socket.socket) -> None:
        heard(connection)
        end = time.monotonic() + 10
        try:
            connection.sendall(at_once)
            while drips and time.monotonic() < end:
                for byte in drips:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.02)
        except OSError:
            return

    return mood


STATUS, KIND = b"HTTP/1.1 200 OK\r\n", b"Content-Type: application/json\r\n"
CHUNKED = STATUS + KIND + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = b'{"reward": "jpeg", "digest": "d1", "scores": [1, 2, 3, 4, 5]}'
DRIPPED = {
    "a status line": (b"HTTP/1.1 200 ", b"O"),
    "headers": (STATUS + KIND, b"X-More: 1\r\n"),
    "one header": (STATUS + KIND + b"X-More: ", b"x"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a body": (STATUS + KIND + b"Content-Length: 60000\r\n\r\n", b" "),
    "a body without an end": (STATUS + KIND + b"\r\n", b" "),
    "a chunk size": (CHUNKED, b"0"),
    "an extension of a chunk": (CHUNKED + b"1;", b"x"),
    "small chunks": (CHUNKED, b"1\r\n \r\n"),
    "trailers": (CHUNKED + b"%x\r\n%s\r\n0\r\n" % (len(WHOLE), WHOLE), b"X-More: 1\r\n"),
}


@pytest.mark.parametrize("what", DRIPPED)
def test_the_timeout_is_a_deadline_over_the_whole_answer(what: str, server: Moody) -> None:
    """Each byte comes in time, and the answer never does: given up at the deadline, and the connection is
    cut, so no thread stays."""
    remote = client(server, timeout=0.3, retries=0)
    server.moods = [dripping(*DRIPPED[what])]
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"no whole answer within timeout=0.3 s"):
        remote(pictures(), PROMPTS)
    assert 0.25 < time.monotonic() - began < 1.5
    for thread in threading.enumerate():
        if thread.name.startswith("POST http"):
            thread.join(5)
            assert not thread.is_alive()
    assert torch.equal(remote(pictures(), PROMPTS), JpegSize()((pictures() * 255).round() / 255, PROMPTS))


def test_the_deadline_holds_within_tls() -> None:
    """A handshake that drips is within it too, and is cut."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection:
                try:
                    connection.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16 KiB begins
                    while True:
                        connection.sendall(b"\x02")
                        time.sleep(0.02)
                except OSError:
                    return

        thread, began = Thread(target=drip), time.monotonic()
        thread.start()
        with pytest.raises(RewardError, match=r"no whole answer within timeout=0\.3 s"):
            Remote(f"https://127.0.0.1:{listening.getsockname()[1]}", timeout=0.3, retries=0)
        assert time.monotonic() - began < 1.5
        thread.join(5)
        assert not thread.is_alive()


def test_a_long_request_is_within_the_deadline(server: Moody) -> None:
    """A server that reads nothing: the socket's buffers fill up, and sending waits."""
    remote = client(server, timeout=0.3, retries=0, form="safetensors")
    server.moods = [lambda connection: time.sleep(1)]
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"timeout=0.3 s"):
        remote(torch.rand(16, 3, 512, 512), [""] * 16)
    assert time.monotonic() - began < 3  # with the packing


def test_endless_trailers_and_chunks_take_no_memory(server: Moody) -> None:
    """As fast as they come, they are not kept: a size of a chunk without an end, trailers without an end, a
    body without an end."""
    for what, said in (
        (CHUNKED + b"0" * 2**20, "got more than"),
        (CHUNKED + b"100000\r\n" + b" " * 2**20, "answered with more than"),
        (CHUNKED + b"0\r\n" + b"x" * 2**20, "got more than"),
        (STATUS + b"X: " + b"x" * 2**20, "got more than"),
        (STATUS + b"X: 1\r\n" * 2**16, "got more than 100 headers"),
    ):
        remote = client(server, retries=0, timeout=5)
        server.moods = [dripping(what, b"")]
        with pytest.raises(RewardError, match=said):
            remote(pictures(), PROMPTS)


@pytest.mark.parametrize("mood", ["answers late", "garbage", "half an answer", "another page", "overloaded"])
def test_what_does_not_pass_is_one_sentence(mood: str, server: Moody) -> None:
    """After 1 + retries attempts: which server, how often, why, and what to do."""
    remote = client(server, timeout=0.2, retries=1)
    server.moods = [PASSING[mood]] * 2
    why = {
        "answers late": "timeout=0.2 s",
        "garbage": r"BadStatusLine: ÿSSH-2.0",
        "half an answer": "IncompleteRead",
        "another page": r"no JSON \(text/html, 20 bytes\)",
        "overloaded": "HTTP 503 too many",
    }
    said = (
        rf"^the reward server {url(server)} gave no answer in 2 attempts over \d s \(the last: "
        rf".*{why[mood]}.*\); start it again .*resume=RUN"
    )
    with pytest.raises(RewardError, match=said) as error:
        remote(pictures(), PROMPTS)
    assert not server.moods and "\n" not in str(error.value)


def test_nobody_there() -> None:
    """Already when the run is built."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        RewardError, match=r"in 1 attempts .*Connection refused.*; start it \(python -m alignlab.serve_reward"
    ):
        Remote(where, retries=0)


def test_waits_grow_and_differ(server: Moody, monkeypatch) -> None:
    """backoff x 2^k up to the longest, each between a half and the whole of it; the run's own random numbers
    are untouched."""
    import random

    remote = client(server, retries=9, backoff=1.0)
    waits: list[float] = []
    monkeypatch.setattr(
        "alignlab.rewards.remote.time", SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
    )
    server.moods = [PASSING["garbage"]] * 9
    state, tensor_state = random.getstate(), torch.get_rng_state()
    remote(pictures(), PROMPTS)
    assert len(waits) == 9
    for wait, whole in zip(waits, [1, 2, 4, 8, 16, 30, 30, 30, 30], strict=True):
        assert whole / 2 <= wait <= whole
    assert (
        len({wait / whole for wait, whole in zip(waits, [1, 2, 4, 8, 16, 30, 30, 30, 30], strict=True)}) == 9
    )
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), tensor_state)


# -- what would not pass

REFUSED: dict[str, tuple[Mood, str]] = {
    "fewer scores": (says([1.0, 2.0]), "gave 2 scores for 5 images"),
    "more scores": (says([1.0] * 6), "gave 6 scores for 5 images"),
    "a column": (says([[1.0]] * 5), r"gave the score \[1.0\] \(5 of 5 are no finite numbers\)"),
    "nan": (says([1.0, float("nan"), 1.0, 1.0, 1.0]), r"gave the score nan \(1 of 5"),
    "infinite": (says([1.0, 1.0, float("-inf"), 1.0, 1.0]), "gave the score -inf"),
    "overflow": (
        answers(b'{"reward": "jpeg", "digest": "d1", "scores": [1e999, 1, 1, 1, 1]}'),
        "gave the score inf",
    ),
    "immense": (
        answers(b'{"reward": "jpeg", "digest": "d1", "scores": [1' + b"0" * 400 + b", 1, 1, 1, 1]}"),
        "gave the score 1000",
    ),
    "texts": (says(["1.0"] * 5), "gave the score 1.0"),
    "truth values": (says([True] * 5), "gave the score True"),
    "no list": (says(3.0), "answered without a list of scores"),
    "a bare list": (answers(b"[1, 2, 3, 4, 5]"), "answered without a list of scores"),
    "another reward": (says([1.0] * 5, reward="clip"), r"holds clip \(d1\) now, and held jpeg \(d1\)"),
    "other arguments": (says([1.0] * 5, digest="d2"), r"holds jpeg \(d2\) now, and held jpeg \(d1\)"),
    "endless": (answers(b'{"scores": [' + b"1," * 500_000, length=10**9), "answered with more than"),
    "refusal": (
        answers(b'{"error": "prompts must be a list"}', "400 Bad Request"),
        "refused: HTTP 400 prompts must be a list",
    ),
    "elsewhere": (
        answers(b"", "302 Found", more="Location: http://127.0.0.1:1/score\r\n"),
        "refused: HTTP 302",
    ),
    "secret": (
        answers(b"{}", "401 Unauthorized"),
        "wants a secret; set the environment variable ALIGNLAB_REWARD_TOKEN",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_pass_ends_at_once(name: str, server: Moody) -> None:
    """One attempt, one sentence; a wrong number is never a score."""
    mood, said = REFUSED[name]
    remote = client(server)
    server.moods = [mood, mood]
    with pytest.raises(RewardError, match=said) as error:
        remote(pictures(), PROMPTS)
    assert len(server.moods) == 1 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "said",
    [
        b"{}",
        b"[]",
        b'{"protocol": 2, "reward": "x", "digest": "", "unit": "", "typical_range": [0, 1]}',
        b'{"protocol": 1, "reward": "x", "digest": "", "unit": 3, "typical_range": [0, 1]}',
        b'{"protocol": 1, "reward": "x", "digest": "", "unit": "", "typical_range": ["a", 1]}',
    ],
)
def test_another_service_is_no_reward(said: bytes, server: Moody) -> None:
    server.moods = [answers(said)]
    with pytest.raises(
        RewardError,
        match=r"/health is not the declaration of a reward; start python -m alignlab.serve_reward",
    ):
        Remote(url(server))


def test_the_reward_that_is_meant(server: Moody) -> None:
    """name= refuses a server that holds another one."""
    assert client(server, name="jpeg").held == "jpeg"
    with pytest.raises(RewardError, match="holds jpeg, not clip; start it with reward=clip"):
        client(server, name="clip")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"url": "127.0.0.1:8000"}, "url=127.0.0.1:8000 is no server; write http://127.0.0.1:8000"),
        ({"url": "ftp://host"}, "url=ftp://host is no server"),
        ({"url": "http://me:secret@host"}, "a secret goes into the variable ALIGNLAB_REWARD_TOKEN"),
        ({"url": "http://host", "form": "pickle"}, "form=pickle is not one of png, safetensors"),
        ({"url": "http://host", "batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"url": "http://host", "timeout": 0.0}, "timeout=0.0 positive"),
    ],
)
def test_mistakes_are_found_without_a_server(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Remote.check(**arguments)
