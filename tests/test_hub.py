"""The hub hears ranks that know the secret, and nobody else."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from gem import hub


@pytest.fixture
def running() -> Iterator[tuple[hub.Hub, hub.Wire, int]]:
    """A hub of three ranks, the wire of rank 0, and its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    of = hub.Hub(listener, 3, b"secret")
    yield of, (wire := of.start()), port
    for rank in range(1, 3):
        with suppress(OSError):  # then the hub has all ranks and does not listen any more
            hub._greet(hub.Wire(socket.create_connection(("127.0.0.1", port), timeout=5)), rank, b"secret")
    wire.close()


def _greeted(port: int, rank: int, token: bytes = b"secret") -> hub.Wire:
    wire = hub.Wire(socket.create_connection(("127.0.0.1", port), timeout=5))
    assert hub._greet(wire, rank, token) == (token == b"secret")
    return wire


@pytest.mark.parametrize(
    "said",
    [
        b'{"rank": 1, "proof": "0"}\n',
        b'{"rank": 1, "type": "ValueError", "text": "no", "rail": ""}\n',
        b'{"bye": true}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 9000 + b"\n",
        b"\xff\x00" * 20000,
        b"",
    ],
)
def test_a_stranger_is_not_heard(said: bytes, running: tuple[hub.Hub, hub.Wire, int]) -> None:
    _, zero, port = running
    with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
        with suppress(OSError):
            stranger.sendall(said)
        one, two = _greeted(port, 1), _greeted(port, 2)
        one.send({"rank": 1, "type": "ValueError", "text": "real", "rail": ""})
        for wire in (zero, one, two):
            assert [message["text"] for message in wire.receive() or []] == ["real"]


def test_a_wrong_secret_and_a_rank_that_is_there(running: tuple[hub.Hub, hub.Wire, int]) -> None:
    of, _, port = running
    _greeted(port, 1, b"other").close()
    assert set(of.ranks) == {0}
    first = _greeted(port, 1)
    second = hub.Wire(socket.create_connection(("127.0.0.1", port), timeout=5))
    assert not hub._greet(second, 1, b"secret")
    assert set(of.ranks) == {0, 1} and not of.complete.is_set()
    _greeted(port, 2)
    assert of.complete.wait(5)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    first.close()


def test_ends_and_goodbyes(running: tuple[hub.Hub, hub.Wire, int]) -> None:
    """A rank that says goodbye may go; that of rank 0 lets the others go; one that says nothing has died."""
    _, zero, port = running
    one, two = _greeted(port, 1), _greeted(port, 2)
    one.send({"bye": True})
    one.close()
    zero.send({"bye": True})
    assert zero.receive() == two.receive() == [{"done": True}]
    two.close()
    assert zero.receive() == [{**hub.DIED, "rank": 2}]


def test_a_wire_joins_parts_of_lines_and_refuses_a_line_without_end() -> None:
    here, there = socket.socketpair()
    wire = hub.Wire(here)
    there.sendall(b'{"a": 1}\nnonsense\n[1]\n{"b"')
    assert wire.receive() == [{"a": 1}]
    there.sendall(b": 2}\n")
    assert wire.receive() == [{"b": 2}]
    wire.unread([{"c": 3}])
    assert wire.receive() == [{"c": 3}]
    there.sendall(b"x" * (hub.LINE + 1))
    while wire.receive() == []:
        pass
    there.close()
    assert wire.receive() is None
    here.close()
