"""A reward as an HTTP service: GET /health declares it, POST /score scores images (wire.py). One request is scored at a time.

Requests are a stranger's: their size, their pixels, the time that a body takes to arrive and the number that are read at once are
bounded, images are decoded by PIL's PNG, JPEG and WebP decoders only, and nothing in them names a file or a class. Connections are
not counted: put a server that strangers reach behind one that counts them. A mistake is answered as {"error": sentence}.
"""

import hmac
import json
import math
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import BoundedSemaphore, Lock
from typing import Any

import torch

from alignlab.rewards import Declared, Reward
from alignlab.rewards.compose import NonFinite, RewardError, WeightedSum
from alignlab.rewards.remote import PROTOCOL
from alignlab.rewards.wire import Limits, WireError, unpack

SECONDS = 60.0
"""Within which a body must have arrived, and each line before it."""
AT_ONCE = 8
"""Requests whose bodies are read, wait or are scored."""
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
        digest: a short text that names the reward and its arguments: a client notices that another one is held now.
        device: where images are put before they are scored.
        token: what clients must send as `Authorization: Bearer`; None lets everyone in.

    Raises:
        OSError: if the address cannot be had.
    """

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], name: str, reward: Reward, *, digest: str = "", device: torch.device | str = "cpu",
        token: str | None = None, limits: Limits | None = None,
    ) -> None:  # fmt: skip
        self.name, self.digest, self.device, self.token = name, digest, torch.device(device), token
        self.limits, self.reward = limits or Limits(), reward
        self.checked = WeightedSum({name: reward}, {name: 1.0})
        self.scoring, self.places = Lock(), BoundedSemaphore(AT_ONCE)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without the standard library's question to the name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def declaration(self) -> dict[str, Any]:
        """What GET /health answers. An end of the range that is unbounded or unstated is null."""
        said = Declared.by(self.reward)
        bounds = [float(bound) if math.isfinite(bound) else None for bound in said.typical_range or (-math.inf, math.inf)]
        return {
            "protocol": PROTOCOL, "reward": self.name, "digest": self.digest, "unit": said.unit, "typical_range": bounds,
            "differentiable": False, "needs_prompt": said.needs_prompt, "input_size": said.input_size, "licence": said.licence,
        }  # fmt: skip

    def score(self, body: bytes, content_type: str) -> dict[str, Any]:
        """What POST /score answers. A score that is not finite is null.

        Raises:
            Refusal: 400 for what is no request, 422 for what the reward cannot score.
            Crash: if the reward fails.
        """
        try:
            images, prompts = unpack(body, content_type, self.limits)
        except WireError as error:
            raise Refusal(400, str(error)) from None
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

    def do_GET(self) -> None:
        self._answer("/health", self.server.declaration)

    def do_POST(self) -> None:
        self._answer("/score", lambda: self.server.score(self._body(), self.headers.get("Content-Type", "")))

    def _answer(self, path: str, what: Callable[[], dict[str, Any]]) -> None:
        if not self.server.places.acquire(timeout=PATIENCE):
            return self._send(503, {"error": "too many requests at once; come again"})
        try:
            if self.server.token is not None and not self._knows(self.server.token):
                raise Refusal(401, "this server wants a token")
            if self.path != path:
                raise Refusal(404, "there are GET /health and POST /score")
            return self._send(200, what())
        except Refusal as refusal:
            return self._send(refusal.status, {"error": refusal.sentence})
        except OSError:  # the client is gone, or too slow
            self.close_connection = True
        except Exception as error:
            traceback.print_exc()
            return self._send(500, {"error": f"{self.server.name} failed: {type(error.__cause__ or error).__name__}"})
        finally:
            self.server.places.release()

    def _knows(self, token: str) -> bool:
        return hmac.compare_digest(self.headers.get("Authorization", "").encode(), f"Bearer {token}".encode())

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "say how long the body is (Content-Length)")
        if int(length) > self.server.limits.megabytes * 2**20:
            raise Refusal(
                413, f"the body is longer than {self.server.limits.megabytes:g} MiB; send fewer images at once (batch_size)"
            )
        deadline, body, left = time.monotonic() + SECONDS, bytearray(), int(length)
        while left:
            chunk = self.rfile.read1(min(left, 2**16))  # type: ignore[attr-defined]
            if not chunk or time.monotonic() > deadline:
                raise Refusal(408, f"the body did not arrive within {SECONDS:g} s")
            body += chunk
            left -= len(chunk)
        return bytes(body)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        text = json.dumps(answer, allow_nan=False).encode()
        if status != 200:  # of the request's body some may be unread
            self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(text)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Of what went wrong one line each; never a prompt, never a header."""
        if int(code) >= 400:
            super().log_request(code, size)
