"""A reward as an HTTP service: GET /health declares it, POST /score scores images (wire.py). One request is
scored at a time.

Requests are a stranger's. Bounded are the length of a head and of a body, the time in which each must arrive,
the images and their pixels (also after the reward's own resize), the bodies in memory together, the requests
that wait, and the connections. GET /health waits for none of them. Images are decoded by PIL's PNG, JPEG and
WebP decoders only, and nothing in a request names a file or a class. A request that two readers could read in
two ways (two lengths, a length beside chunks, a GET with a body) is refused. A mistake is answered as
{"error": sentence}.
"""

import hmac
import json
import math
import traceback
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import BoundedSemaphore, Lock
from typing import Any

import torch

from alignlab.rewards import Declared, Reward
from alignlab.rewards.compose import NonFinite, RewardError, WeightedSum
from alignlab.rewards.connections import CHUNK, Arriving, BadHead, Connections, Room
from alignlab.rewards.remote import PROTOCOL
from alignlab.rewards.wire import Limits, WireError, unpack

SECONDS = 60.0
"""Within which a head must have arrived, then a body, and then an answer must have been taken."""
AT_ONCE = 8
"""Requests that wait to be scored, with the one that is; their bodies' bytes are those that all bodies may
have together."""
DECODED = 2
"""Requests whose images are in memory: the one that is scored and the next."""
CONNECTIONS = 256
"""Open at once. For a further one the one that has kept the server waiting longest is closed."""
HEAD = 2**15
"""Bytes of a request before its body."""
ONCE = ("Content-Length", "Transfer-Encoding", "Content-Type", "Authorization", "Host")
"""Headers of which a second one would leave open which of them counts."""
PATIENCE = 30.0
"""Seconds that a further request waits for its place, before it is told to come again (503)."""


class Refusal(Exception):
    """An answer other than scores: its status and its sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        self.status, self.sentence = status, sentence


class Crash(Exception):
    """The reward itself failed, with its `__cause__`, whose words are for the log."""


class RewardServer(ThreadingHTTPServer):
    """Serves one reward until `shutdown`.

    Args:
        address: host and port; port 0 takes a free one (`server_port`).
        name: of the reward.
        digest: a short text that names the reward and its arguments: a client notices that another one is
            held now.
        device: where images are put before they are scored.
        token: what clients must send as `Authorization: Bearer`; None lets everyone in.

    Raises:
        OSError: if the address cannot be had.
    """

    daemon_threads = True
    request_queue_size = 256  # connections that the system holds until they are accepted

    def __init__(
        self,
        address: tuple[str, int],
        name: str,
        reward: Reward,
        *,
        digest: str = "",
        device: torch.device | str = "cpu",
        token: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.name, self.digest, self.device, self.token = name, digest, torch.device(device), token
        self.limits, self.reward = limits or Limits(), reward
        self.checked = WeightedSum({name: reward}, {name: 1.0})
        self.side = Declared.by(reward).input_size
        self.scoring, self.places, self.decoded = Lock(), BoundedSemaphore(AT_ONCE), BoundedSemaphore(DECODED)
        self.room, self.admitted = Room(AT_ONCE * self.largest), Connections(CONNECTIONS)
        super().__init__(address, _Handler)

    @property
    def largest(self) -> int:
        """Bytes of the longest body."""
        return int(self.limits.megabytes * 2**20)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers a connection in a thread of its own, if there is a place for it."""
        if self.admitted.admit(request):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        self.admitted.ended(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A thread that failed says so in a line; what a stranger sent is not in it."""
        traceback.print_exc(limit=-1)

    def server_bind(self) -> None:
        """Without the standard library's question to the name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def declaration(self) -> dict[str, Any]:
        """What GET /health answers. An end of the range that is unbounded or unstated is null."""
        said = Declared.by(self.reward)
        bounds = [
            float(bound) if math.isfinite(bound) else None
            for bound in said.typical_range or (-math.inf, math.inf)
        ]
        return {
            "protocol": PROTOCOL,
            "reward": self.name,
            "digest": self.digest,
            "unit": said.unit,
            "typical_range": bounds,
            "differentiable": False,
            "needs_prompt": said.needs_prompt,
            "input_size": said.input_size,
            "licence": said.licence,
            "max_images": self.limits.images,
        }

    def score(self, body: bytes, content_type: str) -> dict[str, Any]:
        """What POST /score answers. A score that is not finite is null.

        Raises:
            Refusal: 400 for what is no request, 422 for what the reward cannot score.
            Crash: if the reward fails.
        """
        with self.decoded:
            try:
                images, prompts = unpack(body, content_type, self.limits, self.side)
            except WireError as error:
                raise Refusal(400, str(error)) from None
            return self._scores(images, prompts)

    def _scores(self, images: torch.Tensor, prompts: list[str]) -> dict[str, Any]:
        with self.scoring, torch.no_grad():
            try:
                scores = self.checked.score(images.to(self.device), prompts)[self.name].tolist()
            except NonFinite as error:
                scores = [score if math.isfinite(score) else None for score in error.values.tolist()]
            except RewardError as error:
                if error.__cause__ is not None:
                    raise Crash from error.__cause__
                raise Refusal(422, str(error)) from None
            except Exception as error:
                raise Crash from error
        return {"reward": self.name, "digest": self.digest, "scores": scores}


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version, server_version, sys_version = "HTTP/1.1", "alignlab", ""
    timeout = SECONDS

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.arriving = Arriving(self.connection)
        self.rfile = self.arriving  # type: ignore[assignment]

    def handle_one_request(self) -> None:
        self.arriving.begin(SECONDS, HEAD)
        self.server.admitted.waits(self.connection)
        self.command = self.requestline = ""  # none is known yet
        try:
            super().handle_one_request()
        except BadHead as error:
            self.send_error(error.status, error.sentence)
        except OSError:  # the client is gone, or takes no answer
            self.close_connection = True

    def do_GET(self) -> None:
        self._answer("/health", self.server.declaration)

    def do_POST(self) -> None:
        self._answer("/score", self._scores)

    def _answer(self, path: str, what: Callable[[], dict[str, Any]]) -> None:
        try:
            self._check_head()
            if self.server.token is not None and not self._knows(self.server.token):
                raise Refusal(401, "this server wants a token")
            if self.path != path:
                raise Refusal(404, "there are GET /health and POST /score")
            status, answer = 200, what()
        except Refusal as refusal:
            status, answer = refusal.status, {"error": refusal.sentence}
        except OSError:  # the client is gone
            self.close_connection = True
            return
        except Exception as error:
            traceback.print_exc()
            status, answer = (
                500,
                {"error": f"{self.server.name} failed: {type(error.__cause__ or error).__name__}"},
            )
        self._send(status, answer)

    def _check_head(self) -> None:
        """Refuses a head that two readers could read in two ways."""
        if self.headers.defects or self.headers.get_payload():
            raise Refusal(400, "the head of the request is no list of headers")
        for name in ONCE:
            if len(self.headers.get_all(name, [])) > 1:
                raise Refusal(400, f"the head of the request has {name} twice")
        length, chunked = self.headers.get("Content-Length"), "Transfer-Encoding" in self.headers
        if length is not None and (chunked or not (length.isascii() and length.isdigit())):
            raise Refusal(400, "Content-Length must be one whole number, without a Transfer-Encoding")
        if self.command == "GET" and (chunked or (length or "0").strip("0")):
            raise Refusal(400, "a GET has no body")

    def _knows(self, token: str) -> bool:
        return hmac.compare_digest(self.headers.get("Authorization", "").encode(), f"Bearer {token}".encode())

    def _scores(self) -> dict[str, Any]:
        """Reads the body and has it scored, as soon as it is this request's turn."""
        body, taken = bytearray(), 0
        try:
            left = self._length()
            while left:
                chunk = self._chunk(min(left, CHUNK))
                if not self.server.room.take(len(chunk), PATIENCE):
                    raise Refusal(503, "too many requests at once; come again")
                taken += len(chunk)
                body += chunk
                left -= len(chunk)
            self.server.admitted.arrived(self.connection)
            if not self.server.places.acquire(timeout=PATIENCE):
                raise Refusal(503, "too many requests at once; come again")
            try:
                return self.server.score(bytes(body), self.headers.get("Content-Type", ""))
            finally:
                self.server.places.release()
        finally:
            self.server.room.give(taken)

    def _length(self) -> int:
        """Bytes of the body."""
        length = self.headers.get("Content-Length")
        if length is None:
            raise Refusal(411, "say how long the body is (Content-Length)")
        if len(length) > 18 or int(length) > self.server.largest:
            raise Refusal(
                413,
                f"the body is longer than {self.server.limits.megabytes:g} MiB; send fewer images at once "
                "(batch_size)",
            )
        self.arriving.begin(SECONDS, 0)
        return int(length)

    def _chunk(self, most: int) -> bytes:
        """Some bytes of the body."""
        late = Refusal(408, f"the body did not arrive within {SECONDS:g} s")
        try:
            chunk = self.arriving.read1(most)
        except TimeoutError:
            raise late from None
        if not chunk:
            raise late
        return chunk

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuses what is no request, in the form of the other refusals."""
        self.command, self.request_version = self.command or "", self.protocol_version
        self._send(int(code), {"error": (message or HTTPStatus(code).phrase)[:200]})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        text = json.dumps(answer, allow_nan=False).encode()
        if status != 200:  # of the request's body some may be unread
            self.close_connection = True
        self.connection.settimeout(SECONDS)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Of what went wrong one line each; never a prompt, never a header."""
        if int(code) >= 400:
            super().log_request(code, size)
