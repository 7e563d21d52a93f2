"""`python -m alignlab.serve_reward`: what it serves, what it refuses, and that strangers' bytes cost
little."""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import hydra
import pytest
import torch
import urllib3
from PIL import Image
from safetensors.torch import save
from torch import Tensor

import alignlab.rewards.server as server_module
from alignlab import serve_reward
from alignlab.config.compose import CONF
from alignlab.rewards.brightness import Brightness
from alignlab.rewards.compose import NonFinite, RewardError, WeightedSum
from alignlab.rewards.function import Function
from alignlab.rewards.preference import Preference
from alignlab.rewards.remote import Remote
from alignlab.rewards.server import RewardServer
from alignlab.rewards.wire import TYPES, Limits, pack
from alignlab.serve_reward import checked, server
from tests.running import command_line

pytestmark = pytest.mark.fault("reward server")


@contextmanager
def running(serving: RewardServer) -> Iterator[str]:
    """Serves in a thread; the url."""
    with serving:
        thread = Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{serving.server_port}"
        finally:
            serving.shutdown()
            thread.join()


def small(reward: Any = None, **options: Any) -> RewardServer:
    """A server of a light reward with low limits."""
    limits = Limits(megabytes=0.25, megapixels=0.05)
    return RewardServer(
        **{
            "address": ("127.0.0.1", 0),
            "name": "brightness",
            "reward": reward or Brightness(),
            "limits": limits,
            **options,
        }
    )


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(small()) as url:
        yield url


def post(
    url: str, body: bytes, kind: str = "application/json", path: str = "/score", **headers: str
) -> tuple[int, dict[str, Any]]:
    answer = urllib3.request(
        "POST", url + path, body=body, headers={"Content-Type": kind, **headers}, retries=False, timeout=20
    )
    return answer.status, answer.json()


def test_any_reward_of_the_group_is_served() -> None:
    """From its configuration, by name, with its unit; safetensors scores are the local ones, to the last
    bit."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        c = checked(hydra.compose("serve_reward", ["reward=emoji_preference", "port=0", "device=cpu"]))
    images, prompts = torch.rand(3, 3, 48, 48), ["a cat", "a dog", "a lion"]
    with running(server(c)) as url:
        remote = Remote(url, name="emoji_preference", form="safetensors")
        local = Preference("emoji_preference")
        with torch.no_grad():
            assert torch.equal(remote(images, prompts), local(images, prompts))
        assert (remote.unit, remote.typical_range) == (local.unit, local.typical_range)


def test_a_reward_that_says_little_is_served() -> None:
    """A function that states neither range nor licence, from a node without weight and normalize."""
    words = [
        "+reward.mine.function=statistics.fmean",
        "+reward.mine.differentiable=false",
        "+reward.mine.unit=u",
        "port=0",
    ]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        c = checked(hydra.compose("serve_reward", [*words, "allow_targets=[statistics]"]))
    with server(c) as serving:
        assert isinstance(serving.reward, Function)
        declared = serving.declaration()
    assert (declared["unit"], declared["typical_range"], declared["needs_prompt"]) == (
        "u",
        [None, None],
        True,
    )


def test_other_arguments_are_another_reward() -> None:
    """The digest changes with the reward's node, but for its weight."""

    def digest(*words: str) -> str:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            c = checked(hydra.compose("serve_reward", ["reward=colour", "port=0", *words]))
        with server(c) as serving:
            return serving.digest

    assert digest() == digest("reward.colour.weight=3") != digest("reward.colour.channel=blue")


def test_it_serves_until_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after a request: code 0, and the port is free again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []

    def ask() -> None:
        found.append(Remote(f"http://127.0.0.1:{port}", backoff=0.1)(torch.ones(1, 3, 8, 8), [""]).item())

    def service_actions(self: RewardServer) -> None:
        if found:
            raise KeyboardInterrupt

    monkeypatch.setattr(RewardServer, "service_actions", service_actions)
    asking = Thread(target=ask)
    asking.start()
    assert (
        command_line(monkeypatch, "reward=brightness", f"port={port}", "device=cpu", command=serve_reward)
        == 0
    )
    asking.join()
    said = f"brightness ({Brightness.unit}) on cpu: http://127.0.0.1:{port}; Ctrl-C ends it\nended\n"
    assert (found, capsys.readouterr().out.endswith(said)) == ([1.0], True)
    small(address=("127.0.0.1", port)).server_close()


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted() -> None:
    """The same as a process of its own. It says where; Ctrl-C ends it with code 0 and without a traceback."""
    call = [sys.executable, "-m", "alignlab.serve_reward", "reward=jpeg_compressibility", "port=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        said = process.stdout.readline()  # type: ignore[union-attr]
        assert said.startswith("jpeg_compressibility (kB) on ") and said.endswith("; Ctrl-C ends it\n")
        where = next(word for word in said.split() if word.startswith("http://")).rstrip(";")
        assert Remote(where, name="jpeg_compressibility")(torch.rand(1, 3, 16, 16), [""]) < 0
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "ended\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "reward is empty; choose one with reward=NAME"),
        (
            "reward=[colour,brightness]",
            "reward names 2 rewards; choose one with reward=NAME, and start a server for each",
        ),
        ("reward=remote", "reward=remote is a server's already"),
        ("reward=clip_diversity", "reward=clip_diversity compares the images of a prompt"),
        ("reward=clip reward.clip.path=/nowhere", "reward.clip.path=/nowhere: there is no such folder"),
        ("reward=brightness port=70000", "port=70000 is outside 0..65535"),
        ("reward=brightness max_megabytes=0", "max_megabytes=0.0 must be positive"),
        (
            "reward=brightness host=0.0.0.0",
            "host=0.0.0.0 is open to other machines; set the environment variable ALIGNLAB_REWARD_TOKEN",
        ),
        ("reward=brightness host=192.0.2.1 port=0", "host=192.0.2.1 port=0 cannot be had"),
        ("reward=brightness prot=1", "prot is not a known key; did you mean port?"),
    ],
)
def test_mistakes(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "192.0.2.1" in words:  # an address that is not this machine's
        monkeypatch.setenv("ALIGNLAB_REWARD_TOKEN", "secret")
    assert command_line(monkeypatch, *words.split(), command=serve_reward) == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_a_secret_that_no_header_can_carry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALIGNLAB_REWARD_TOKEN", "two words\n")
    assert command_line(monkeypatch, "reward=brightness", command=serve_reward) == 2
    said = capsys.readouterr().err
    assert "ALIGNLAB_REWARD_TOKEN holds something else" in said and "two words" not in said


def test_a_secret_keeps_others_out(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the same variable on both sides it works; without, or with another one, nothing is told, and it
    stands in no log."""
    images = torch.rand(1, 3, 8, 8)
    with running(small(token="sesame")) as url:
        for wrong in ("", "Sesame"):
            monkeypatch.setenv("ALIGNLAB_REWARD_TOKEN", wrong)
            with pytest.raises(
                RewardError, match="wants a secret; set the environment variable ALIGNLAB_REWARD_TOKEN"
            ):
                Remote(url)
        assert post(url, pack(images, [""], "png"))[0] == 401
        monkeypatch.setenv("ALIGNLAB_REWARD_TOKEN", "sesame")
        assert Remote(url, form="safetensors")(images, [""]).item() == images.mean().item()
    assert "sesame" not in capfd.readouterr().err.lower()


# -- strangers' bytes


def png(width: int, height: int, mode: str = "RGB", form: str = "PNG") -> str:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def bomb() -> str:
    """A PNG of a kilobyte that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )
    return base64.b64encode(body).decode()


def message(images: Any, prompts: Any = ("a",)) -> bytes:
    return json.dumps({"images": images, "prompts": prompts}).encode()


def tensors(images: Tensor, prompts: bytes = b'["a"]') -> bytes:
    return save({"images": images, "prompts": torch.frombuffer(bytearray(prompts), dtype=torch.uint8)})


GOOD = png(8, 8)
HUGE = b'{"images": {"dtype": "F32", "shape": [1, 3, 100000, 100000], "data_offsets": [0, 120000000000]}}'
HOSTILE: dict[str, tuple[bytes, str, str]] = {
    "no JSON": (b"hello", "json", 'no JSON object with "images" and "prompts"'),
    "a list": (b"[]", "json", "no JSON object"),
    "deeply nested": (b"[" * 100_000, "json", "no JSON object"),
    "a pickle": (
        b"\x80\x04cos\nsystem\n.",
        "application/octet-stream",
        "Content-Type 'application/octet-stream' is not one of",
    ),
    "a form": (
        b"a=b",
        "application/x-www-form-urlencoded",
        "is not one of application/json, application/x-safetensors",
    ),
    "no images": (message([]), "json", "images must be a list of base64 texts"),
    "numbers": (message([1]), "json", "images must be a list of base64 texts"),
    "no base64": (message(["%%%"]), "json", "image 0 is no base64 of a PNG, JPEG, WEBP file"),
    "another format": (
        message([png(8, 8, form="TIFF")]),
        "json",
        "image 0 is no base64 of a PNG, JPEG, WEBP file",
    ),
    "postscript": (
        message([base64.b64encode(b"%!PS-Adobe-3.0 EPSF\n%%BoundingBox: 0 0 9 9\n").decode()]),
        "json",
        "image 0 is no base64",
    ),
    "a bomb": (message([bomb()]), "json", "image 0 is no base64"),  # PIL's own limit
    "large": (message([png(300, 300)]), "json", "more than 0.05 megapixels together"),
    "many": (message([png(150, 150)] * 3, ["a"] * 3), "json", "more than 0.05 megapixels together"),
    "cut": (
        message([base64.b64encode(base64.b64decode(png(64, 64))[:60]).decode()]),
        "json",
        "image 0 is damaged",
    ),
    "16 bits": (message([png(8, 8, "I;16")]), "json", "image 0 is of mode I;16; send 8-bit RGB"),
    "two sizes": (message([GOOD, png(9, 8)], ["a", "b"]), "json", r"image 1 is (9, 8), image 0 (8, 8)"),
    "too few prompts": (message([GOOD, GOOD]), "json", "2 images came with 1 prompts"),
    "a prompt that is none": (message([GOOD], [3]), "json", "prompts must be a list of texts"),
    "one text": (message([GOOD], "a"), "json", "prompts must be a list of texts"),
    "no safetensors": (b"hello", "safetensors", 'no safetensors file with "images" and "prompts"'),
    "an immense header": (struct.pack("<Q", 2**60) + b"{}", "safetensors", "no safetensors file"),
    "an immense tensor": (struct.pack("<Q", len(HUGE)) + HUGE, "safetensors", "no safetensors file"),
    "another tensor": (save({"x": torch.ones(1)}), "safetensors", "no safetensors file with"),
    "prompts of another kind": (
        save({"images": torch.rand(1, 3, 8, 8), "prompts": torch.ones(3)}),
        "safetensors",
        "no safetensors file with",
    ),
    "half precision": (tensors(torch.rand(1, 3, 8, 8).half()), "safetensors", "send float32 [B, 3, H, W]"),
    "one channel": (tensors(torch.rand(1, 1, 8, 8)), "safetensors", "images are torch.float32 (1, 1, 8, 8)"),
    "no pixel": (tensors(torch.rand(1, 3, 0, 8)), "safetensors", "images are torch.float32 (1, 3, 0, 8)"),
    "not a number": (tensors(torch.full((1, 3, 8, 8), float("nan"))), "safetensors", "outside [0, 1]"),
    "a key twice": (
        b'{"images": ["' + GOOD.encode() + b'"], "prompts": ["a"], "prompts": ["b"]}',
        "json",
        "a key stands twice",
    ),
    "NaN": (
        b'{"images": ["' + GOOD.encode() + b'"], "prompts": ["a"], "more": NaN}',
        "json",
        "NaN is no JSON",
    ),
    "infinity": (
        b'{"images": ["' + GOOD.encode() + b'"], "prompts": ["a"], "more": -Infinity}',
        "json",
        "-Infinity is no JSON",
    ),
    "no UTF-8": (b'{"images": ["' + GOOD.encode() + b'"], "prompts": ["\xff"]}', "json", "no JSON object"),
    "UTF-16": (message([GOOD]).decode().encode("utf-16"), "json", "no JSON object"),
    "half of a pair": (
        b'{"images": ["' + GOOD.encode() + b'"], "prompts": ["\\ud800"]}',
        "json",
        "half of a pair",
    ),
    "a number of many digits": (b'{"images": 1' + b"0" * 10_000 + b"}", "json", "no JSON object"),
    "a long prompt": (message([GOOD], ["a" * 10_000]), "json", "prompt 0 has 10000 letters; 8192 are taken"),
    "many tiny images": (
        message([png(1, 1)] * 65, ["a"] * 65),
        "json",
        "65 images are more than the 64 that are taken",
    ),
    "a narrow image": (message([png(1, 33)]), "json", "an image of 1 x 33 pixels is too narrow"),
    "tensors of many tiny images": (
        save(
            {
                "images": torch.rand(65, 3, 1, 1),
                "prompts": torch.frombuffer(bytearray(json.dumps(["a"] * 65).encode()), dtype=torch.uint8),
            }
        ),
        "safetensors",
        "65 images are more than",
    ),
    "a narrow tensor": (
        tensors(torch.rand(1, 3, 33, 1)),
        "safetensors",
        "an image of 1 x 33 pixels is too narrow",
    ),
    "prompts in tensors that are no JSON": (
        tensors(torch.rand(1, 3, 8, 8), b"[NaN]"),
        "safetensors",
        "NaN is no JSON",
    ),
    "255": (tensors(255 * torch.ones(1, 3, 8, 8)), "safetensors", "outside [0, 1]"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_request_is_refused(name: str, url: str) -> None:
    """400 and a sentence; the server lives on."""
    body, kind, said = HOSTILE[name]
    status, answer = post(
        url, body, {"json": TYPES["png"], "safetensors": TYPES["safetensors"]}.get(kind, kind)
    )
    assert status == 400 and said in answer["error"], answer


@pytest.mark.parametrize(
    ("mode", "form"),
    [("RGB", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGB", "JPEG"), ("RGB", "WEBP")],
)
def test_eight_bit_pictures_are_taken(mode: str, form: str, url: str) -> None:
    status, answer = post(url, message([png(8, 8, mode, form)]))
    assert (status, answer["scores"]) == (200, [0.0])


def test_what_lies_beside_the_two_paths(url: str) -> None:
    """Other paths and methods, a body without or with an immense length: an answer, and the next request is
    served."""
    assert post(url, b"", path="/")[0] == 404
    assert urllib3.request("GET", f"{url}/score", retries=False).status == 404
    assert urllib3.request("DELETE", f"{url}/score", retries=False).status == 501
    assert post(url, message([GOOD]) + b" " * 2**18)[0] == 413
    assert post(url, b"", path="/nowhere", **{"Content-Type": "multipart/mixed; boundary=x"})[0] in (400, 404)
    chunked = urllib3.request(
        "POST",
        f"{url}/score",
        body=iter([message([GOOD])]),
        headers={"Transfer-Encoding": "chunked"},
        retries=False,
    )
    assert chunked.status == 411
    answer = urllib3.request("GET", f"{url}/health", retries=False)
    assert answer.json()["reward"] == "brightness" and "Python" not in answer.headers["Server"]


# -- what two readers could read in two ways


def raw(url: str, *parts: bytes, seconds: float = 5) -> tuple[bytes, dict[str, Any]]:
    """Sends bytes as they are; the status line and the JSON of all that comes back until the server hangs
    up."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=seconds) as connection:
        for part in parts:
            connection.sendall(part)
        found = b""
        while chunk := connection.recv(2**16):
            found += chunk
    head, _, body = found.partition(b"\r\n\r\n")
    assert found.count(b"HTTP/1.1") == 1, found  # one request, one answer
    return head.splitlines()[0], json.loads(body)


POST, GET, HOST = b"POST /score HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\n", b"Host: x\r\n"
HIDDEN = b"GET /health HTTP/1.1\r\n\r\n"
"""A second request, for those who take it for one."""
AMBIGUOUS: dict[str, tuple[bytes, int, str]] = {
    "two lengths": (
        POST + b"Content-Length: 5\r\nContent-Length: 32\r\n\r\n" + HIDDEN,
        400,
        "Content-Length twice",
    ),
    "two lengths that agree": (
        POST + b"Content-Length: 2\r\ncontent-length: 2\r\n\r\n{}",
        400,
        "Content-Length twice",
    ),
    "a list of lengths": (POST + b"Content-Length: 2, 2\r\n\r\n{}", 400, "one whole number"),
    "a negative length": (POST + b"Content-Length: -5\r\n\r\n", 400, "one whole number"),
    "a signed length": (POST + b"Content-Length: +2\r\n\r\n{}", 400, "one whole number"),
    "a length in hex": (POST + b"Content-Length: 0x2\r\n\r\n{}", 400, "one whole number"),
    "an empty length": (POST + b"Content-Length:\r\n\r\n", 400, "one whole number"),
    "digits of another script": (
        POST + "Content-Length: ٣\r\n\r\n".encode() + b"{} ",
        400,
        "one whole number",
    ),
    "a length of 5000 digits": (
        POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        413,
        "longer than 0.25 MiB",
    ),
    "a length beyond the limit": (POST + b"Content-Length: 99999999999\r\n\r\n", 413, "longer than 0.25 MiB"),
    "a length and chunks": (
        POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        400,
        "without a Transfer-Encoding",
    ),
    "chunks and a length": (
        POST + b"Transfer-Encoding: identity\r\nContent-Length: 4\r\n\r\n    ",
        400,
        "without a Transfer-Encoding",
    ),
    "chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411, "Content-Length"),
    "two encodings": (
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
        400,
        "Transfer-Encoding twice",
    ),
    "no length": (POST + b"\r\n", 411, "Content-Length"),
    "a GET with a body": (GET + b"Content-Length: 32\r\n\r\n" + HIDDEN, 400, "a GET has no body"),
    "a GET in chunks": (GET + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "a GET has no body"),
    "a blank before the colon": (POST + b"Content-Length : 32\r\n\r\n" + HIDDEN, 400, "no list of headers"),
    "a line that is no header": (
        POST + b"nonsense\r\nContent-Length: 32\r\n\r\n" + HIDDEN,
        400,
        "no list of headers",
    ),
    "a continued first line": (POST + b" Content-Length: 32\r\n\r\n" + HIDDEN, 400, "no list of headers"),
    "a carriage return alone": (
        POST + b"X: a\rContent-Length: 32\r\n\r\n" + HIDDEN,
        400,
        "carriage return or a NUL",
    ),
    "a NUL": (POST + b"Content-Length: 2\0\r\n\r\n{}", 400, "carriage return or a NUL"),
    "two secrets": (
        POST + b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\nContent-Length: 2\r\n\r\n{}",
        400,
        "Authorization twice",
    ),
    "two hosts": (POST + HOST + HOST + b"Content-Length: 2\r\n\r\n{}", 400, "Host twice"),
    "a long line": (GET + b"X: " + b"x" * 2**17 + b"\r\n\r\n", 431, "too long"),
    "a long first line": (b"GET /" + b"x" * 2**17 + b" HTTP/1.1\r\n\r\n", 431, "too long"),
    "a line without an end": (GET + b"X: " + b"x" * 2**17, 431, "too long"),
    "many headers": (GET + b"X: 1\r\n" * 5000 + b"\r\n", 431, ""),
    "many long headers": (GET + (b"X: " + b"x" * 2000 + b"\r\n") * 50 + b"\r\n", 431, "too long"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\xfc\r\n\r\n", 400, ""),
    "another version": (b"GET /health HTTP/9.9\r\n\r\n", 505, ""),
    "another method": (b"BREW /score HTTP/1.1\r\n\r\n", 501, ""),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_head_that_can_be_read_in_two_ways_is_refused(name: str, url: str) -> None:
    """One answer, then the server hangs up: what follows is no second request. It lives on."""
    request, status, said = AMBIGUOUS[name]
    try:
        line, answer = raw(url, request)
    except ConnectionError:  # it hung up while the rest of a long head was being sent
        assert len(request) > 2**16
    else:
        assert line.split()[1] == str(status).encode() and said in answer["error"], (line, answer)
    assert (
        urllib3.request("GET", f"{url}/health", headers={"Content-Length": "0"}, retries=False).status == 200
    )


def test_a_limit_is_told_to_the_run(url: str) -> None:
    """What is too large is not sent again and again."""
    with pytest.raises(
        RewardError,
        match=r"refused: HTTP 413 the body is longer than 0.25 MiB; send fewer images at once \(batch_size\)",
    ):
        Remote(url, form="safetensors", backoff=60)(torch.rand(4, 3, 96, 96), [""] * 4)


def test_a_body_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends a byte now and then is left after a while."""
    monkeypatch.setattr(server_module, "SECONDS", 0.2)
    with (
        running(small()) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) as connection,
    ):
        connection.sendall(b"POST /score HTTP/1.1\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # a server that has answered and left
            for _ in range(6):
                connection.sendall(b" ")
                time.sleep(0.05)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_pixels_count_after_the_rewards_own_resize() -> None:
    """A request of 7 kB whose images the reward makes 224 pixels wide: what it would cost is refused before
    it is decoded. What the reward sees is bounded, however small the images were."""
    seen: list[int] = []

    class Looks(Brightness):
        input_size = 224

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            seen.append(len(images))
            return super().__call__(images, prompts)

    limits = Limits(megapixels=0.5)  # ten images of 224 pixels
    with running(small(Looks(), limits=limits)) as url:
        assert post(url, message([png(1, 1)] * 10, ["a"] * 10))[0] == 200
        status, answer = post(url, message([png(1, 1)] * 11, ["a"] * 11))
        assert (
            status == 400
            and "more than 0.5 megapixels together once the reward has resized them to 224 px"
            in answer["error"]
        )
        status, answer = post(
            url, tensors(torch.rand(11, 3, 1, 1), json.dumps(["a"] * 11).encode()), TYPES["safetensors"]
        )
        assert status == 400 and "resized them to 224 px" in answer["error"]
        status, answer = post(url, message([png(1, 20)]))  # its short side becomes 224, its long one 4480
        assert status == 400 and "resized them to 224 px" in answer["error"]
    assert seen == [10]


def test_runs_ask_for_no_more_than_the_server_takes() -> None:
    """A run with a larger batch_size sends smaller requests, since /health says how many images one may
    have."""
    sizes: list[int] = []

    class Counts(Brightness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            sizes.append(len(images))
            return super().__call__(images, prompts)

    images = torch.rand(7, 3, 8, 8)
    with running(small(Counts(), limits=Limits(images=3))) as url:
        assert torch.equal(
            Remote(url, form="safetensors", batch_size=100)(images, [""] * 7), images.mean((1, 2, 3))
        )
    assert sizes == [3, 3, 1]


# -- senders that are slow, idle, or many


def test_a_head_that_drips_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time counts from the first byte of a request, not from the last one."""
    monkeypatch.setattr(server_module, "SECONDS", 0.2)
    with (
        running(small()) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) as connection,
    ):
        began = time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with pytest.raises(OSError):  # a reset, or a broken pipe
            while time.monotonic() < began + 5:
                connection.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() - began < 2


def test_idle_connections_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of too many connections the one that has kept the server waiting longest is closed: silent ones, ones
    that drip a head or a body. A request that is being scored is not."""
    monkeypatch.setattr(server_module, "CONNECTIONS", 8)
    go, asked = Event(), Event()

    class Waits(Brightness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            asked.set()
            assert go.wait(10)
            return super().__call__(images, prompts)

    with running(small(Waits())) as url:
        scored = Remote(url, form="safetensors", retries=0).submit(torch.ones(1, 3, 8, 8), [""])
        assert asked.wait(5)
        port = int(url.rpartition(":")[2])
        idle = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(40)]
        for number, connection in enumerate(idle):
            try:
                connection.sendall([b"", b"GET /hea", POST + b"Content-Length: 9\r\n\r\n{"][number % 3])
            except OSError:  # closed already
                continue
        assert urllib3.request("GET", f"{url}/health", retries=False, timeout=5).status == 200
        go.set()
        assert scored.result(5).item() == 1
        for connection in idle:
            connection.close()


def test_health_answers_while_a_batch_is_scored() -> None:
    """Also while as many requests wait as may, and while bodies arrive slowly."""
    go, asked = Event(), Event()

    class Waits(Brightness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            asked.set()
            assert go.wait(20)
            return super().__call__(images, prompts)

    with running(small(Waits())) as url:
        remote = Remote(url, form="safetensors")
        waiting = [remote.submit(torch.full((1, 3, 8, 8), k / 16), [""]) for k in range(12)]
        assert asked.wait(5)
        slow = [
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) for _ in range(12)
        ]
        for connection in slow:
            connection.sendall(POST + b"Content-Length: 100\r\n\r\n{")
        time.sleep(0.1)
        began = time.monotonic()
        for _ in range(3):
            assert (
                urllib3.request("GET", f"{url}/health", retries=False, timeout=5).json()["reward"]
                == "brightness"
            )
        assert time.monotonic() - began < 2
        go.set()
        assert [answer.result(10).item() for answer in waiting] == [k / 16 for k in range(12)]
        for connection in slow:
            connection.close()


def test_slow_bodies_hold_up_no_other() -> None:
    """As many slow senders as there are places, and one more request: scored at once."""
    with running(small()) as url:
        slow = [
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) for _ in range(16)
        ]
        for connection in slow:
            connection.sendall(POST + b"Content-Length: 100000\r\n\r\n{")
        began = time.monotonic()
        assert post(url, message([GOOD]))[0] == 200
        assert time.monotonic() - began < 5
        for connection in slow:
            connection.close()


def test_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the bodies that are in memory take all that they may, a further one is told to come again, and
    room is given back."""
    monkeypatch.setattr(server_module, "AT_ONCE", 1)
    monkeypatch.setattr(server_module, "PATIENCE", 0.1)
    serving = small()
    with running(serving) as url:
        port, body = int(url.rpartition(":")[2]), b" " * 200_000
        with socket.create_connection(("127.0.0.1", port), timeout=5) as slow:
            slow.sendall(POST + b"Content-Length: 250000\r\n\r\n" + body)
            deadline = time.monotonic() + 5
            while serving.room.free > 2**18 - 200_000:  # until it has arrived
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert post(url, body)[0] == 503
        deadline = time.monotonic() + 5
        while serving.room.free < 2**18:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert post(url, message([GOOD]))[0] == 200


def test_many_connect_at_once() -> None:
    """128 connections that come before the first one is accepted are all answered."""
    serving = small()
    assert serving.request_queue_size >= 128
    with serving:
        port = serving.server_port
        many = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(128)]
        for connection in many:
            connection.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        thread = Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        assert all(connection.recv(100).startswith(b"HTTP/1.1 200") for connection in many)
        serving.shutdown()
        thread.join()
        for connection in many:
            connection.close()


# -- the reward behind it


def test_a_reward_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    """NaN is null, and the client's reward a NonFinite that names the prompt, as a local one's would be, so
    that `on_nonfinite=skip` holds; a crash is 500 without its words, which the server's log has, also if it
    looks like a broken connection."""

    class Odd(Brightness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            if prompts[0] == "crash":
                raise ValueError("/secret/path")
            if prompts[0] == "lost":
                raise ConnectionResetError("the judge's own database")
            return super().__call__(images, prompts) * torch.tensor([1.0, float("nan")])[: len(images)]

    with running(small(Odd())) as url:
        status, answer = post(url, message([GOOD] * 2, ["a cat", "a dog"]))
        assert (status, answer["scores"]) == (200, [0.0, None])
        with pytest.raises(
            NonFinite, match=r"reward far is nan for image 1 of prompt 'b' \(1 of 3 images\)"
        ) as error:
            WeightedSum({"far": Remote(url, batch_size=2)}, {"far": 1.0}).score(
                torch.rand(3, 3, 8, 8), list("abc")
            )
        assert error.value.rows == (1,)
        for word, kind in (("crash", "ValueError"), ("lost", "ConnectionResetError")):
            assert post(url, message([GOOD], [word])) == (500, {"error": f"brightness failed: {kind}"})
    assert "/secret/path" in capfd.readouterr().err


def test_one_at_a_time_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that come together are scored one after another, each with its own scores; beyond the places
    they wait, and are told to come again, and do, if that takes too long."""
    monkeypatch.setattr(server_module, "AT_ONCE", 2)
    monkeypatch.setattr(server_module, "PATIENCE", 0.05)
    busy, together, go = [0], [0], Event()

    class Counts(Brightness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            busy[0] += 1
            together[0] = max(together[0], busy[0])
            go.wait(5)
            busy[0] -= 1
            return super().__call__(images, prompts)

    with running(small(Counts())) as url:
        remote = Remote(url, form="safetensors", backoff=0.05)
        answers = [remote.submit(torch.full((1, 3, 8, 8), k / 8), [""]) for k in range(2)]
        deadline = time.monotonic() + 5
        while post(url, b"x")[0] != 503:  # until both have their places
            assert time.monotonic() < deadline
        answers += [remote.submit(torch.full((1, 3, 8, 8), k / 8), [""]) for k in range(2, 5)]
        go.set()
        assert [answer.result(10).item() for answer in answers] == [k / 8 for k in range(5)]
        monkeypatch.setattr(server_module, "PATIENCE", 10)
        once = Remote(url, form="safetensors", retries=0)
        answers = [once.submit(torch.full((1, 3, 8, 8), k / 8), [""]) for k in range(5)]
        assert [answer.result(10).item() for answer in answers] == [k / 8 for k in range(5)]
    assert together[0] == 1
