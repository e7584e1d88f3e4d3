"""Ranks that watch each other: where one ends without having said so, all end, and say which it was
and why. Knows processes and connections; knows no tensors.

A thread of rank 0 has a connection to a thread of each other rank. When a process ends, the system
closes its connection, also after `kill -9`; a machine that is lost and a process that stands still
are missed because each side says something now and then. Collectives alone would wait for ever.
"""

import json
import os
import platform
import queue
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, Protocol

EXIT_LOST = 1
PATIENCE_S = 20.0  # without a word from a rank; GPTFAST_PATIENCE says another number
NUM_BEATS = 10  # words of each rank in that time
FAREWELL_S = 2.0  # the most that an end waits for others to hear of it
LONGEST_MESSAGE = 1 << 16  # bytes
LOOPBACK = "127.0.0.1"
NO_WORD = "killed, or ended without a word"
ORPHANED = "torchrun, which had started it, is gone"


class Store(Protocol):
    """What torch.distributed calls so: values that every rank can read, once they are there."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


@dataclass(frozen=True)
class _Rank:
    """`first` is the first rank on its host."""

    number: int
    first: int
    title: str


@dataclass
class _Peer:
    """The other end of a connection; nobody yet where it has not said hello."""

    connection: socket.socket
    who: _Rank | None = None
    received: bytes = b""
    num_silent: int = 0  # beats of ours since its last word
    has_left: bool = False  # in good order, and so its connection may end


class Watch:
    """Of one rank, from now to `stop`. Ends the process when another rank is lost.

    `store` is where the ranks meet. MASTER_ADDR has to be a name or address of rank 0's host, as
    torchrun gives it. OSError where rank 0 cannot be reached.
    """

    def __init__(
        self, store: Store, rank: int, size: int, local_rank: int, local_size: int
    ) -> None:
        title = f"rank {rank} of {size} (host {platform.node()}, process {os.getpid()})"
        self.who = _Rank(rank, rank - local_rank, title)
        self.patience_s = _patience()
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._peers: dict[socket.socket, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wakes, self._wake = socket.socketpair()
        self._selector.register(self._wakes, selectors.EVENT_READ, self._obey)
        self._is_over = False
        if rank == 0:
            self._secret = secrets.token_hex(16)  # a stranger who connects is not one of us
            self._door = _listen(local_size < size)
            self._selector.register(self._door, selectors.EVENT_READ, self._let_in)
            store.set("gptfast watch", f"{self._door.getsockname()[1]} {self._secret}")
        else:
            port, self._secret = store.get("gptfast watch").decode().split()
            host = LOOPBACK if local_size == size else os.environ["MASTER_ADDR"]
            peer = self._add(_connect(host, int(port), self.patience_s))
            peer.who = _Rank(0, 0, f"rank 0 of {size}")  # until it says more
            self._greet(peer)
        self._thread = threading.Thread(target=self._run, name="gptfast watch", daemon=True)
        self._thread.start()

    # -- what the main thread says --

    def stop(self) -> None:
        """This rank ends in good order."""
        self._order(self._leave)

    def failed(self, error: BaseException) -> None:
        """This rank is about to end with an error, which is what the others will say. It is for
        this rank to show it.
        """
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        self._order(partial(self._fail, " ".join(reason.split())))

    def wait(self, timeout_s: float | None = None) -> None:
        """Where a collective has failed: ends the process as soon as it is known which rank was
        lost, and returns where that does not become known in time.
        """
        self._thread.join(self.patience_s * 1.25 if timeout_s is None else timeout_s)

    def _order(self, function: Callable[[], None]) -> None:
        self._orders.put(function)
        with suppress(OSError):  # the thread has ended
            self._wake.send(b".")
        self._thread.join(2 * FAREWELL_S)

    # -- the thread --

    def _run(self) -> None:
        beat_s = self.patience_s / NUM_BEATS
        due = time.monotonic() + beat_s
        while not self._is_over:
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                key.data()
            if not self._is_over and time.monotonic() >= due:
                due = time.monotonic() + beat_s
                self._beat()
                if self._torchrun not in (None, os.getppid()):
                    self._announce(ORPHANED)
                    is_first = self.who.number == self.who.first
                    self._end(_sentence(self.who, ORPHANED) if is_first else "")
        for end in (*self._peers, self._wake, self._wakes):
            end.close()

    def _beat(self) -> None:
        """Says a word to everyone, and misses those who have said none for long. Beats are counted,
        not seconds: this process may have stood still itself.
        """
        for peer in self._known():
            self._send(peer, "beat")
            peer.num_silent += 1
            if peer.num_silent > NUM_BEATS:
                self._lose(peer, f"not heard of for {self.patience_s:g} s")

    def _obey(self) -> None:
        self._wakes.recv(1)
        self._orders.get()()

    def _leave(self) -> None:
        for peer in self._known():
            self._send(peer, "done")
        self._part(self._known())
        self._is_over = True

    def _fail(self, reason: str) -> None:
        self._announce(reason)
        self._part(self._known())
        self._is_over = True

    def _announce(self, reason: str) -> None:
        """Says of this rank why it ends."""
        if self.who.number == 0:
            self._tell(self.who, reason)
        else:
            self._send(self._known()[0], "failed", reason)

    # -- connections --

    def _let_in(self) -> None:
        self._add(self._door.accept()[0])

    def _add(self, connection: socket.socket) -> _Peer:
        connection.settimeout(self.patience_s)
        peer = self._peers[connection] = _Peer(connection)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._hear, peer))
        return peer

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        del self._peers[peer.connection]
        peer.connection.close()

    def _known(self) -> list[_Peer]:
        return [peer for peer in self._peers.values() if peer.who is not None]

    def _greet(self, peer: _Peer) -> None:
        self._send(peer, "hello", self._secret, *astuple(self.who))

    def _send(self, peer: _Peer, *message: object) -> None:
        with suppress(OSError):  # it has gone: its connection's end will be read
            peer.connection.sendall(json.dumps(message).encode() + b"\n")

    def _hear(self, peer: _Peer) -> None:
        try:
            received = peer.connection.recv(LONGEST_MESSAGE)
        except OSError:
            received = b""
        *lines, peer.received = (peer.received + received).split(b"\n")
        for line in lines:
            if peer.connection in self._peers and not self._is_over:
                self._understand(peer, line)
        if peer.connection not in self._peers or self._is_over:
            return
        if peer.who is None and (not received or len(peer.received) > LONGEST_MESSAGE):
            self._drop(peer)
        elif not received:
            self._selector.unregister(peer.connection)
            if not peer.has_left:
                self._lose(peer, NO_WORD)

    def _understand(self, peer: _Peer, line: bytes) -> None:
        peer.num_silent = 0
        match _read(line):
            case ["hello", self._secret, int(rank), int(first), str(title)]:
                peer.who = _Rank(rank, first, title)
                if self.who.number == 0:
                    self._greet(peer)
            case _ if peer.who is None:
                self._drop(peer)
            case ["done"]:
                # If this rank goes on without it, it will be missed like one that stands still.
                peer.has_left = True
                with suppress(OSError):
                    peer.connection.shutdown(socket.SHUT_WR)
            case ["failed", str(reason)]:
                self._lose(peer, reason)
            case ["lost", str(sentence), bool(aloud)]:
                self._end(sentence if aloud else "")
            case _:  # a beat
                pass

    # -- the end --

    def _lose(self, peer: _Peer, reason: str) -> None:
        assert peer.who is not None
        del self._peers[peer.connection]
        if self.who.number == 0:
            self._tell(peer.who, reason)
            aloud = True
        else:  # rank 0 itself: of each host the first rank that is left speaks
            aloud = self.who.number == max(self.who.first, 1)
        self._end(_sentence(peer.who, reason) if aloud else "")

    def _tell(self, lost: _Rank, reason: str) -> None:
        """Rank 0 tells the others, and one on each other host to say it aloud. On its own host it
        does that itself: a rank that fails shows its error.
        """
        left = {peer.who: peer for peer in self._known() if peer.who is not None}
        by_number = sorted([self.who, *left], key=lambda who: -who.number)
        voices = {who.first: who for who in by_number}  # the least number stays
        for who, peer in left.items():
            self._send(peer, "lost", _sentence(lost, reason), who in voices.values())

    def _part(self, peers: Sequence[_Peer]) -> None:
        """Waits until they have closed their side: a process that ends with words unread would take
        back its own last ones.
        """
        deadline = time.monotonic() + FAREWELL_S
        for peer in peers:
            with suppress(OSError):
                peer.connection.shutdown(socket.SHUT_WR)
                while (left := deadline - time.monotonic()) > 0:
                    peer.connection.settimeout(left)
                    if not peer.connection.recv(LONGEST_MESSAGE):
                        break

    def _end(self, sentence: str) -> None:
        """Ends this process: its main thread waits for a rank that will not answer."""
        if sentence:
            with suppress(OSError):  # nobody reads it
                os.write(sys.stderr.fileno(), f"gptfast: error: {sentence}\n".encode())
        # Whoever reads our output may have stopped, and the main thread be in the middle of it.
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(FAREWELL_S)
        if self.who.number == 0:
            self._part(self._known())
        os._exit(EXIT_LOST)


def _patience() -> float:
    found = os.environ.get("GPTFAST_PATIENCE", str(PATIENCE_S))
    try:
        seconds = float(found)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"GPTFAST_PATIENCE is {found!r}; a number of seconds is needed, like 20")
    return seconds


def _sentence(lost: _Rank, reason: str) -> str:
    return f"{lost.title} has ended: {reason}"


def _listen(to_other_hosts: bool) -> socket.socket:
    if not to_other_hosts:
        return socket.create_server((LOOPBACK, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _connect(host: str, port: int, timeout_s: float) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout_s)
    except OSError as error:
        raise OSError(
            f"rank 0 cannot be reached at {host}, port {port} ({error}); the hosts of a group need "
            "all ports between each other"
        ) from None


def _read(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
