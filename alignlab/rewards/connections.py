"""What a server owes strangers before it knows what they want: bounded heads, deadlines, and a bounded number
of connections and bytes."""

import socket
import time
from threading import Condition, Lock

CHUNK = 2**16
"""Bytes that are read at once."""


class BadHead(Exception):
    """A request whose head is too long, or no list of headers: the status and the sentence of its answer."""

    def __init__(self, status: int, sentence: str) -> None:
        self.status, self.sentence = status, sentence


class Arriving:
    """The bytes of one connection, read within a deadline, as the file that http.server reads a request from.

    A socket's own timeout counts from byte to byte, so that a sender who drips never exceeds it; this one
    counts from `begin`.
    """

    closed = False

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.rest = connection, bytearray()
        self.deadline, self.head = 0.0, 0

    def begin(self, seconds: float, head: int) -> None:
        """A further request is to arrive within so many seconds, with a head of at most so many bytes."""
        self.deadline, self.head = time.monotonic() + seconds, head

    def readline(self, limit: int = -1) -> bytes:
        """A line of the head, or what was sent of it before the other side hung up.

        Raises:
            BadHead: if the head gets too long, or the line has a carriage return or a NUL inside: others read
                two lines there.
            TimeoutError: at the deadline.
        """
        while (end := self.rest.find(b"\n") + 1) == 0:
            if len(self.rest) > self.head:
                raise BadHead(431, "the head of the request is too long")
            if not self._more():
                end = len(self.rest)
                break
        line = self._take(end)
        self.head -= len(line)
        if self.head < 0:
            raise BadHead(431, "the head of the request is too long")
        if b"\r" in line.removesuffix(b"\r\n") or b"\0" in line:
            raise BadHead(400, "a line of the head holds a carriage return or a NUL")
        return line

    def read1(self, most: int) -> bytes:
        """Between 1 and `most` bytes of the body; none if the other side hung up.

        Raises:
            TimeoutError: at the deadline.
        """
        if not self.rest:
            self._more()
        return self._take(min(most, len(self.rest)))

    def close(self) -> None:
        self.closed = True

    def _more(self) -> bool:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        chunk = self.connection.recv(CHUNK)
        self.rest += chunk
        return bool(chunk)

    def _take(self, count: int) -> bytes:
        out = bytes(self.rest[:count])
        del self.rest[:count]
        return out


class Connections:
    """Counts open connections. Where there are too many, the one that has kept the server waiting longest is
    cut.

    Args:
        most: connections at once.
    """

    def __init__(self, most: int) -> None:
        self.most, self.lock = most, Lock()
        self.open: set[socket.socket] = set()
        self.waiting: dict[socket.socket, None] = {}
        """Those of which a request, or a further one, has not arrived; the oldest first."""

    def admit(self, connection: socket.socket) -> bool:
        """Whether there is a place for it, or could be made."""
        with self.lock:
            if len(self.open) >= self.most and self.waiting:
                oldest = next(iter(self.waiting))
                self._forget(oldest)
                try:
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread closes it
                except OSError:
                    pass
            if len(self.open) >= self.most:
                return False
            self.open.add(connection)
            self.waiting[connection] = None
            return True

    def arrived(self, connection: socket.socket) -> None:
        """The request is there as a whole: from now on the other side waits."""
        with self.lock:
            self.waiting.pop(connection, None)

    def waits(self, connection: socket.socket) -> None:
        """The server waits for a further request."""
        with self.lock:
            if connection in self.open:
                self.waiting.pop(connection, None)
                self.waiting[connection] = None  # at the end

    def ended(self, connection: socket.socket) -> None:
        with self.lock:
            self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        self.open.discard(connection)
        self.waiting.pop(connection, None)


class Room:
    """Memory for the bodies of requests together.

    Args:
        most: bytes.
    """

    def __init__(self, most: int) -> None:
        self.free, self.changed = most, Condition()

    def take(self, count: int, patience: float) -> bool:
        """Whether so many bytes are free, or get free within so many seconds. They are taken then."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.free >= count, timeout=patience):
                return False
            self.free -= count
            return True

    def give(self, count: int) -> None:
        with self.changed:
            self.free += count
            self.changed.notify_all()
