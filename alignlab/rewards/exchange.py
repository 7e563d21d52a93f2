"""Makes one HTTP request and reads its whole answer within a deadline, however the other side drips it.

A socket's own timeout counts from byte to byte: a status line, headers, 100-Continues, chunk sizes or
trailers that come one byte at a time never exceed it. So the exchange runs in a thread of its own, and
whoever waits for it leaves at the deadline and cuts the connection, on which that thread ends. Looking up the
name and the handshake of TLS are within the same deadline.
"""

import os
import socket
from threading import Thread, current_thread
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


class Late(Exception):
    """The answer was not whole at the deadline."""


class Endless(Exception):
    """The answer is longer than it may be."""


class Answer:
    """What came back.

    Args:
        status: of HTTP.
        kind: its Content-Type.
        body: at most as many bytes as were allowed.
    """

    def __init__(self, status: int, kind: str, body: bytes) -> None:
        self.status, self.kind, self.body = status, kind, body


def exchange(
    pools: urllib3.PoolManager,
    method: str,
    url: str,
    *,
    body: bytes | None,
    headers: dict[str, str],
    timeout: float,
    most: int,
) -> Answer:
    """Sends one request and reads its answer.

    Redirects are not followed, so that headers go to this address alone.

    Args:
        pools: made by `connections`.
        timeout: seconds for all of it.
        most: bytes of the answer's body.

    Raises:
        Late: at the deadline.
        Endless: for a longer answer.
        urllib3.exceptions.HTTPError, OSError: for what went wrong before.
    """
    running = _Exchange(pools, method, url, body, headers, timeout, most)
    running.start()
    running.join(timeout)
    if running.is_alive():
        running.cut()
        raise Late
    if running.error is not None:
        raise running.error
    assert running.answer is not None
    return running.answer


def connections(at_once: int) -> urllib3.PoolManager:
    """Connections that are kept for the next exchange, and that an exchange can cut."""
    pools = urllib3.PoolManager(maxsize=at_once)
    pools.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
    return pools


class _Exchange(Thread):
    """Makes one exchange. `cut` ends it from outside."""

    def __init__(
        self,
        pools: urllib3.PoolManager,
        method: str,
        url: str,
        body: bytes | None,
        headers: dict[str, str],
        timeout: float,
        most: int,
    ) -> None:
        super().__init__(daemon=True, name=f"{method} {url}")
        self.pools, self.method, self.url, self.body, self.headers = pools, method, url, body, headers
        self.timeout, self.most = timeout, most
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self.handle: socket.socket | None = None
        self.is_cut = False

    def run(self) -> None:
        try:
            self.answer = self._answer()
        except BaseException as error:
            self.error = error
        finally:
            if self.handle is not None:
                self.handle.close()

    def _answer(self) -> Answer:
        response: Any = self.pools.request(
            self.method,
            self.url,
            body=self.body,
            headers=self.headers,
            timeout=urllib3.Timeout(total=self.timeout),
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )
        text = bytearray()
        try:
            while chunk := response.read1(2**16):
                text += chunk
                if len(text) > self.most:
                    raise Endless
        except BaseException:
            response.close()
            raise
        return Answer(response.status, str(response.headers.get("Content-Type", "")), bytes(text))

    def uses(self, used: socket.socket) -> None:
        """Keeps a handle of its own for `cut`.

        The other one is taken over by TLS, or closed while the answer is read.
        """
        if self.handle is not None:
            self.handle.close()
        self.handle = socket.socket(used.family, used.type, used.proto, fileno=os.dup(used.fileno()))
        if self.is_cut:
            self.cut()

    def cut(self) -> None:
        self.is_cut = True
        if self.handle is not None:
            try:
                self.handle.shutdown(socket.SHUT_RDWR)
            except OSError:  # it has ended meanwhile
                pass


class _Cuttable:
    """A connection that tells the exchange which socket it uses, before the handshake of TLS."""

    def _new_conn(self) -> socket.socket:
        made: socket.socket = super()._new_conn()  # type: ignore[misc]
        _tell(made)
        return made

    def request(self, *args: Any, **kwargs: Any) -> None:
        kept: socket.socket | None = self.sock  # type: ignore[attr-defined]
        if kept is not None:  # from an earlier exchange
            _tell(kept)
        super().request(*args, **kwargs)  # type: ignore[misc]


def _tell(used: socket.socket) -> None:
    running = current_thread()
    if isinstance(running, _Exchange):
        running.uses(used)


class _Connection(_Cuttable, HTTPConnection):
    pass


class _SecureConnection(_Cuttable, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection
