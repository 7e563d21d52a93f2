"""Processes that train together end together: one that is killed takes the others with it, in seconds and
with a sentence.

Process 0 holds a connection to every other one, over which nothing is sent until a process is done. The
system closes it when a process dies, however it dies, and its peer ends: where its next exchange with the
others fails, or after GRACE seconds. So none waits in a collective for one that never comes (NCCL does not
notice), with a launcher or without.
"""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignlab.config.build import ConfigError
from alignlab.distributed.ranks import TIMEOUT, gathered, rank, shared, world
from alignlab.runs.pasted import resume

LOST = 69
"""The exit code of a process whose peer has ended: EX_UNAVAILABLE of sysexits.h."""
GRACE = 10.0
"""Seconds in which a process may finish what it writes, once a peer has ended."""
KNOWN = 3.0
"""Seconds after an error in which a peer's end, if that was its cause, becomes known."""
GREETING = 30.0
"""Seconds for a connection to come about."""
SILENT = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""When a machine that went off without a word counts as gone: after 20 + 4 * 5 seconds."""
WELL, ENDING, TOLD = b".", b"e", b"t"
"""What a process sends last: it is done; it ends with a sentence of its own, which the others may have too;
or it lost another one, and has said so."""


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Around the run in `folder`, in every process of it: where one of them ends before its time, this one
    leaves with exit code 69.

    For one process nothing changes. Without a connection (ports closed between machines) a warning says so,
    and a process that waits for a dead one ends by `ranks.TIMEOUT`.
    """
    if world() == 1:
        yield
        return
    watch = _Watch(folder, _connections())
    last = ENDING
    try:
        yield
        last = WELL
    except ConfigError:
        raise
    except Exception as error:
        watch.leave_if_lost(error)
        last = b""
        raise
    finally:
        watch.close(last)


class _Watch:
    """One process's connections, a thread each."""

    def __init__(self, folder: Path, connections: dict[int, socket.socket]) -> None:
        self.folder, self.connections = folder, connections
        self.lost = threading.Event()
        self.over = self.said = False
        self.ending = threading.Lock()
        for peer, connection in connections.items():
            threading.Thread(target=self._listen, args=(peer, connection), daemon=True).start()

    def _listen(self, peer: int, connection: socket.socket) -> None:
        try:
            word = connection.recv(1)
        except OSError:
            word = b""
        if word == WELL or self.over:
            return
        if word != ENDING:
            self._say(f"process {peer} has ended", said=word == TOLD)
        self.lost.set()
        time.sleep(GRACE)
        self._say(f"process {peer} has ended")
        self._leave()

    def leave_if_lost(self, error: Exception) -> None:
        """Ends this process if the error comes of a peer's end, or of one that hangs."""
        if "Timed out waiting" in str(error):  # gloo's
            self._say(f"the other processes have not answered for {TIMEOUT.total_seconds() / 60:g} minutes")
        elif not self.lost.wait(KNOWN):
            return
        else:
            self._say("another process has ended")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._leave()

    def close(self, last: bytes) -> None:
        """After the run: `last` to the others, and none of them is waited for."""
        self.over = True
        self._send(last)
        for connection in self.connections.values():
            connection.close()

    def _say(self, what: str, *, said: bool = False) -> None:
        with self.ending:
            if not (said or self.said or self.over):
                sentence = (
                    f"error: {what}, so process {rank()} ends too: {self.folder} is as its last checkpoint "
                    f"left it; go on, on {world()} processes or on one, with {resume(self.folder)}\n"
                )
                os.write(2, sentence.encode())  # not print: the other thread may be in the middle of one
            self.said = True

    def _leave(self) -> None:
        if not self.over:
            self._send(TOLD)
            os._exit(LOST)  # the usual end would wait for what the dead one was to send

    def _send(self, word: bytes) -> None:
        for connection in self.connections.values():
            try:
                if word:
                    connection.sendall(word)
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it is gone already


def _connections() -> dict[int, socket.socket]:
    """Process 0's to each of the others, theirs to it; none if one of them cannot be had."""
    secret, server = shared(secrets.token_bytes(16)), None
    peers: dict[int, socket.socket] = {}
    if rank() == 0:
        six = socket.has_dualstack_ipv6()
        server = socket.create_server(
            ("", 0), family=socket.AF_INET6 if six else socket.AF_INET, dualstack_ipv6=six, backlog=world()
        )
    port: int = shared(0 if server is None else server.getsockname()[1])
    problem = None
    try:
        if rank() > 0:
            peers[0] = socket.create_connection((os.environ.get("MASTER_ADDR", "localhost"), port), GREETING)
            peers[0].sendall(secret + rank().to_bytes(4, "big"))
    except OSError as error:
        problem = f"process {rank()} has no connection to process 0 ({error})"
    problem = next((reported for reported in gathered(problem) if reported), None)
    if server is not None:
        with server:
            server.settimeout(GREETING)
            try:
                while problem is None and len(peers) < world() - 1:
                    connection, _ = server.accept()
                    number = _greeted(connection, secret)
                    if number is not None:
                        peers[number] = connection
            except OSError as error:
                problem = f"process 0 has no connection to all others ({error})"
    problem = shared(problem)
    if problem is not None:
        if rank() == 0:
            print(
                f"warning: {problem}; if one of them dies, the others wait for "
                f"{TIMEOUT.total_seconds() / 60:g} minutes"
            )
        for connection in peers.values():
            connection.close()
        return {}
    for connection in peers.values():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in SILENT.items():
            if hasattr(socket, name):  # not everywhere
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peers


def _greeted(connection: socket.socket, secret: bytes) -> int | None:
    """The number of the process at the other end, if it is one of this run's."""
    connection.settimeout(GREETING)
    try:
        with connection.makefile("rb") as file:
            greeting = file.read(len(secret) + 4)
    except OSError:
        greeting = b""
    if not secrets.compare_digest(greeting[: len(secret)], secret) or len(greeting) < len(secret) + 4:
        connection.close()
        return None
    return int.from_bytes(greeting[len(secret) :], "big")
