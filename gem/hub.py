"""Connections between the ranks of a process group that tell at once when one of them fails or dies.

    wire = connect()                                        # on every rank
    wire.send({"rank": 1, "type": "ValueError", ...})       # the first such message, or death, is passed on to all
    wire.send({"bye": True})                                # a connection may close without harm afterwards
    while (messages := wire.receive()) is not None: ...

A thread of rank 0, the hub, listens on a port. The process group broadcasts it with a secret, by which both ends of a
connection prove that they belong here. A message is a line of JSON. The kernel closes the connections of a process that dies:
nobody asks whether another is alive, and one that is busy or stopped is not taken for dead.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

CONNECT = 30.0  # seconds in which all ranks must have connected
TRY = 5.0  # seconds for one address, and for each step of a handshake
LINE = 16384  # longest line in bytes
STRANGERS = 64  # connections without a handshake at a time
UNREACHABLE = 30  # seconds until a machine that does not answer counts as lost
DIED = {
    "type": "Died",
    "text": "its process died: it was killed, as when memory runs out, or it crashed, or its machine is gone",
    "rail": "",
}


class Wire:
    """A socket that carries lines of JSON."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest, self._waiting = b"", list[dict[str, Any]]()
        _sockets.add(sock)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            _keep_alive(sock)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; if the connection is lost, receive() says so."""
        with suppress(OSError):  # the few lines that are ever sent fit the kernel's buffer: this does not wait
            self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Wait for data; return the messages that it completes, maybe none, or None if the connection is closed or misused."""
        if self._waiting:
            messages, self._waiting = self._waiting, []
            return messages
        try:
            data = self.sock.recv(4096)
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > LINE:
            return None
        return [message for message in map(_read, lines) if message is not None]

    def unread(self, messages: list[dict[str, Any]]) -> None:
        """Let the next receive() return these."""
        self._waiting = messages

    def finish(self) -> None:
        """Send nothing more; the other end may still."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.sock.close()


def _read(line: bytes) -> dict[str, Any] | None:
    """Return the object in a line of JSON; None if it holds none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _keep_alive(sock: socket.socket) -> None:
    """Let the kernel close a connection to a machine that has vanished; it answers for a process that is stopped."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": UNREACHABLE // 3, "TCP_KEEPINTVL": UNREACHABLE // 6, "TCP_KEEPCNT": 4}
    options["TCP_USER_TIMEOUT"] = UNREACHABLE * 1000  # for data that is not acknowledged
    for name, value in options.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# --- the hub ----------------------------------------------------------------------------------------------------------


@dataclass
class _Peer:
    """A connection to the hub: of a rank, or -1 before it has proved to be one."""

    wire: Wire
    nonce: str
    since: float
    rank: int = -1
    bye: bool = False


class Hub:
    """A thread that passes on the first end of a rank to all, until all have closed their connections.

    Args:
        listener: a listening socket, closed once all ranks have connected.
        size: number of ranks.
        token: the secret.

    Attributes:
        complete: set once all ranks have connected.
    """

    def __init__(self, listener: socket.socket, size: int, token: bytes) -> None:
        self.listener, self.size, self.token = listener, size, token
        self.complete = threading.Event()
        self.ranks: dict[int, _Peer] = {}
        self._gone: set[int] = set()
        self._first: dict[str, Any] | None = None
        self._selector = selectors.DefaultSelector()
        _sockets.add(listener)

    def start(self) -> Wire:
        """Start the thread; return the wire of rank 0, which is this process."""
        here, mine = socket.socketpair()
        self.listener.setblocking(False)
        self._selector.register(self.listener, selectors.EVENT_READ)
        peer = _Peer(Wire(here), "", time.monotonic())
        self._selector.register(here, selectors.EVENT_READ, peer)
        self._welcome(peer, 0)
        threading.Thread(target=self._serve, name="gem-hub", daemon=True).start()
        return Wire(mine)

    def _serve(self) -> None:
        while connections := list(self._selector.get_map().values()):
            strangers = [c.data for c in connections if c.data is not None and c.data.rank < 0]
            for key, _ in self._selector.select(1.0 if strangers else None):
                if key.data is None:
                    self._accept(len(strangers))
                else:
                    self._take(key.data)
            for peer in strangers:
                if peer.rank < 0 and time.monotonic() > peer.since + TRY:
                    self._drop(peer)
        self._selector.close()

    def _accept(self, strangers: int) -> None:
        try:
            sock = self.listener.accept()[0]
        except OSError:  # it has gone again
            return
        if strangers >= STRANGERS:
            sock.close()
            return
        sock.settimeout(TRY)
        peer = _Peer(Wire(sock), secrets.token_hex(16), time.monotonic())
        self._selector.register(sock, selectors.EVENT_READ, peer)
        peer.wire.send({"nonce": peer.nonce})

    def _take(self, peer: _Peer) -> None:
        """Handle what a connection has to say, or its end."""
        messages = peer.wire.receive()
        if messages is None:
            self._drop(peer)
            return
        for message in messages:
            if peer.rank < 0:
                self._admit(peer, message)
                if peer.rank < 0:
                    self._drop(peer)
                    return
            elif "type" in message:
                peer.bye = True
                self._pass_on({**message, "rank": peer.rank})
            elif "bye" in message:
                peer.bye = True
                if peer.rank == 0:  # the hub may end with its process from now on
                    self._tell({"done": True})

    def _admit(self, peer: _Peer, message: dict[str, Any]) -> None:
        """Let a connection be that of the rank that it proves to be."""
        rank = message.get("rank")
        if type(rank) is not int or not 0 < rank < self.size or rank in self.ranks or rank in self._gone:
            return
        if not _same(message.get("proof"), _proof(self.token, "rank", peer.nonce, rank)):
            return
        peer.wire.send({"welcome": _proof(self.token, "hub", peer.nonce, rank)})
        self._welcome(peer, rank)

    def _welcome(self, peer: _Peer, rank: int) -> None:
        peer.rank, self.ranks[rank] = rank, peer
        if self._first is not None:
            peer.wire.send(self._first)
        if len(self.ranks) + len(self._gone) == self.size:
            self._selector.unregister(self.listener)
            self.listener.close()
            self.complete.set()

    def _drop(self, peer: _Peer) -> None:
        """Close a connection; the rank has died if it has not said how it ended."""
        self._selector.unregister(peer.wire.sock)
        peer.wire.close()
        if peer.rank >= 0:
            del self.ranks[peer.rank]
            self._gone.add(peer.rank)
            if not peer.bye:
                self._pass_on({**DIED, "rank": peer.rank})

    def _pass_on(self, end: dict[str, Any]) -> None:
        if self._first is None:
            self._first = end
            self._tell(end)

    def _tell(self, message: dict[str, Any]) -> None:
        """Send a message to all ranks, to rank 0 last: when it hears, the others have been told."""
        for rank in sorted(self.ranks, reverse=True):
            self.ranks[rank].wire.send(message)


# --- connecting -------------------------------------------------------------------------------------------------------


def connect() -> Wire | None:
    """Return the wire of this rank to the hub, which rank 0 starts.

    Every rank of the process group must call this. One that does not reach the hub in CONNECT seconds gets None, and a warning.
    """
    from torch import distributed

    rank, size = distributed.get_rank(), distributed.get_world_size()
    told: list[Any] = [None]
    hub, wire = None, None
    if rank == 0:
        try:
            listener, hosts = _listen(size)
            hub = Hub(listener, size, secrets.token_bytes(32))
            told = [{"hosts": hosts, "port": listener.getsockname()[1], "token": hub.token}]
        except OSError as error:
            logger.warning("rank 0 cannot open a port (%s)", error)
    distributed.broadcast_object_list(told)
    if hub is not None:
        wire = hub.start()
        if not hub.complete.wait(CONNECT):
            logger.warning("%d of %d ranks have connected to rank 0 within %g seconds", len(hub.ranks), size, CONNECT)
    elif told[0] is not None:
        wire = _reach(rank, **told[0])
    if wire is None:
        logger.warning("rank %d cannot hear of the others: if one fails, it waits until its collectives time out", rank)
    return wire


def _listen(size: int) -> tuple[socket.socket, list[str]]:
    """Return a listening socket, and the hosts by which other ranks may reach it, the likeliest first.

    Ranks that a launcher has put on one machine use the loopback interface. Else MASTER_ADDR is where the rendezvous is, mostly
    on the machine of rank 0.
    """
    master, name = os.environ.get("MASTER_ADDR", ""), socket.gethostname()
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        with suppress(OSError):
            return socket.create_server(("127.0.0.1", 0), backlog=size), ["127.0.0.1"]
    hosts = [master, name]
    with suppress(OSError, ValueError):  # the interface towards the rendezvous; connecting a UDP socket sends nothing
        port = int(os.environ.get("MASTER_PORT", ""))
        family, kind, _, _, address = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            hosts.insert(1, probe.getsockname()[0])
    with suppress(OSError):
        hosts += [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    hosts = list(dict.fromkeys(filter(None, hosts)))
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=size, dualstack_ipv6=True), hosts
    return socket.create_server(("", 0), backlog=size), hosts


def _reach(rank: int, hosts: Sequence[str], port: int, token: bytes) -> Wire | None:
    """Return a wire to the hub, or None if none of the hosts leads to it within CONNECT seconds."""
    deadline = time.monotonic() + CONNECT
    hosts = [os.environ.get("MASTER_ADDR") or hosts[0], *hosts]  # rank 0 may know itself as localhost
    while True:
        for host in hosts:
            if (left := deadline - time.monotonic()) <= 0:
                return None
            with suppress(OSError):
                wire = Wire(socket.create_connection((host, port), timeout=min(TRY, left)))
                if _greet(wire, rank, token):
                    return wire
                wire.close()
        time.sleep(0.2)


def _greet(wire: Wire, rank: int, token: bytes) -> bool:
    """Prove to the hub that this is the rank; return True if it proves to be the hub."""
    nonce = (wire.receive() or [{}])[0].get("nonce")
    if not isinstance(nonce, str):
        return False
    wire.send({"rank": rank, "proof": _proof(token, "rank", nonce, rank)})
    messages = wire.receive() or [{}]
    if not _same(messages[0].get("welcome"), _proof(token, "hub", nonce, rank)):
        return False
    wire.unread(messages[1:])
    wire.sock.settimeout(None)
    return True


def _proof(token: bytes, who: str, nonce: str, rank: int) -> str:
    return hmac.new(token, f"{who} {nonce} {rank}".encode(), "sha256").hexdigest()


def _same(got: object, expected: str) -> bool:
    return isinstance(got, str) and hmac.compare_digest(got.encode(), expected.encode())


# --- forked workers ---------------------------------------------------------------------------------------------------

# A worker that lives on with a copy of a socket would keep the connection of its dead parent open.

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _in_child() -> None:
    for sock in list(_sockets):
        sock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
