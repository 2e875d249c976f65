"""Ranks that train one model end together: an error on one of them, or its death, ends the others with its message.

    with together():                    # on every rank, once the process group is there
        ...

Without it the others wait for the lost rank in a collective until that times out, which takes ten minutes with NCCL.

A rank that hears of another's end (gem.hub) raises its error in place of that of the collective that broke. If it is still in
the block GRACE seconds later, its process is ended, as Python cannot interrupt a thread that waits in a collective.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, cast

from gem.explain import reason
from gem.hub import DIED, Wire, connect
from gem.stops import Diverged, RankEnded, Terminated

__all__ = ["join", "joining", "together"]

HEAR = 5.0  # seconds to wait for the message that explains a broken collective, and for the hub to have passed one on
GRACE = 10.0  # seconds from hearing of another's end until the process is ended
LAST = 5.0  # seconds for what is done before the process is ended
TEXT = 1000  # longest text of an end in characters, which JSON writes in up to 12 bytes each (gem.hub.LINE)
NAME = 100  # longest name of an exception or a guard rail
# Words of the errors of gloo and NCCL when another rank is gone.
BROKEN = ("connection closed by peer", "connection reset by peer", "broken pipe", "gloo", "nccl", "processgroup")


@contextmanager
def together(on_stuck: Callable[[Exception], object] | None = None, command: str = "") -> Iterator[None]:
    """End the block on all ranks when one of them leaves it by an exception, or dies in it.

    All ranks must enter it, as rank 0 broadcasts where the hub listens. At its end no rank waits for another. Without a process
    group, or with one process, the block just runs. In another such block it only replaces the error of a broken collective.
    Once rank 0 has left the block and its process has ended, the other ranks no longer hear of one another.

    Args:
        on_stuck: called with the error in another thread, before the process of a rank that cannot leave the block is ended.
        command: of gem-kernels, for the advice in the message of an error.

    Raises:
        Diverged: the numbers failed on another rank.
        RankEnded: another rank ended by any other error, by a signal, or its process died.
    """
    global _watch
    if _ranks() == 1:
        yield
        return
    outermost, watch = _watch is None, _watch or _open(command)
    _watch = watch
    watch.on_stuck.append(on_stuck)
    try:
        yield
    except BaseException as error:
        if outermost:
            watch.left.set()
        instead = watch.instead_of(error)
        if outermost:
            watch.leave(error if instead is None else None)
        if instead is not None:
            raise instead from None
        raise
    else:
        if outermost:
            watch.leave()
    finally:
        watch.on_stuck.pop()
        if outermost:
            _watch = None


@contextmanager
def joining(command: str = "") -> Iterator[None]:
    """Let join() be called in the block, whose rest is then that of a `together` block with this command."""
    with ExitStack() as stack:
        _joining.append((stack, command))
        try:
            yield
        finally:
            _joining.pop()


def join() -> None:
    """Begin a `together` block that lasts to the end of the `joining` block around the caller; without one, do nothing."""
    if _joining:
        stack, command = _joining[-1]
        stack.enter_context(together(command=command))


_joining: list[tuple[ExitStack, str]] = []


# --- how a rank ended -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class End:
    """How a rank ended: the name of the exception, what to tell the user, and of Diverged the guard rail."""

    rank: int
    type: str
    text: str
    rail: str = ""

    @classmethod
    def of(cls, rank: int, error: BaseException, command: str = "") -> End:
        if isinstance(error, Terminated):
            text = f"terminated by {signal.Signals(error.signum).name}"
        elif isinstance(error, KeyboardInterrupt):
            text = "interrupted"
        elif isinstance(error, SystemExit):
            text = f"it ended with exit status {error.code}"
        else:
            text = reason(error, command, "its own output says more")
        kind = next((c.__name__ for c in (Diverged, Terminated, KeyboardInterrupt) if isinstance(error, c)), "")
        return cls(rank, (kind or type(error).__name__)[:NAME], text[:TEXT], str(getattr(error, "rail", ""))[:NAME])

    @classmethod
    def read(cls, message: Mapping[str, Any]) -> End | None:
        """Return the end that a message tells of, or None."""
        rank, texts = message.get("rank"), [message.get(name) for name in ("type", "text", "rail")]
        if type(rank) is not int or not all(isinstance(text, str) for text in texts):
            return None
        return cls(rank, *map(str, texts))

    @property
    def by_signal(self) -> bool:
        return self.type in ("Terminated", "KeyboardInterrupt")

    def error(self) -> Exception:
        """Return what the other ranks raise."""
        text = f"rank {self.rank}: {self.text}"
        return Diverged(text, self.rail) if self.type == "Diverged" else RankEnded(text)


def _is_broken(error: BaseException | None) -> bool:
    """Return True if an error, or one that led to it, is that of a collective."""
    from torch import distributed

    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error).lower()
        if isinstance(error, (RuntimeError, OSError)) and any(sign in text for sign in BROKEN):
            return True
        if isinstance(error, getattr(distributed, "DistError", ())):
            return True
        error = error.__cause__ or error.__context__
    return False


# --- a rank -----------------------------------------------------------------------------------------------------------


class _Watch:
    """What a rank knows of the others.

    Args:
        rank: of this process.
        wire: to the hub; None: it could not be reached, and nothing will be heard.
        command: of gem-kernels, "" if none is known.

    Attributes:
        first: how the first rank ended; `heard` is set with it.
        left: set once the block is being left.
        on_stuck: of the blocks that are open.
    """

    def __init__(self, rank: int, wire: Wire | None, command: str) -> None:
        self.rank, self.wire, self.command = rank, wire, command
        self.first: End | None = None
        self._said = False  # to the hub, how this rank ends
        self.heard, self.left, self._let_go = threading.Event(), threading.Event(), threading.Event()
        self.on_stuck: list[Callable[[Exception], object] | None] = []
        if wire is not None:
            threading.Thread(target=self._listen, args=(wire,), name="gem-together", daemon=True).start()

    def instead_of(self, error: BaseException) -> Exception | None:
        """Return the error of the rank that ended first, if `error` comes of its end; else None."""
        broken = _is_broken(error)
        if broken and self.wire is not None:
            self.heard.wait(HEAR)
        first = self.first
        if first is None or first.rank == self.rank:
            return None
        # torchrun ends the other ranks by a signal. A scheduler sends one to all, and each of them ends by its own.
        passed_on = isinstance(error, (Terminated, KeyboardInterrupt)) and not first.by_signal
        if not (broken or passed_on):
            return None
        instead = first.error()
        if hasattr(error, "kept"):
            instead.kept = error.kept  # type: ignore[attr-defined]
        return instead

    def leave(self, error: BaseException | None = None) -> None:
        """Tell the hub how this rank leaves the block. Rank 0, and one that fails, wait until the others have been told."""
        self.left.set()
        self._said = True
        if self.wire is None:
            return
        clean = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        end = {"bye": True} if clean else asdict(End.of(self.rank, cast(BaseException, error), self.command))
        self.wire.send(end)
        if self.rank == 0 or not clean:
            self._let_go.wait(HEAR)
        self.wire.finish()

    def _listen(self, wire: Wire) -> None:
        """Read what the hub says, until it tells of an end or closes the connection; this is a thread of its own."""
        end = None
        while end is None and (messages := wire.receive()) is not None:
            end = next(filter(None, map(End.read, messages)), None)
            if any("done" in message for message in messages):
                self._let_go.set()
        if end is None and not (self._said or self._let_go.is_set()):
            end = End.read({**DIED, "rank": 0})
        if end is not None:
            self.first = end
            self.heard.set()
        self._let_go.set()
        if end is not None and not self.left.wait(GRACE):
            self._end_process(end.error())
        wire.close()

    def _end_process(self, error: Exception) -> NoReturn:
        """Say why on stderr, do what on_stuck asks for, and end the process."""
        # Open progress bars end without "\n".
        bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
        line = f"gem-kernels: {' '.join(str(error).split())}\n"
        # Not by sys.stderr, whose lock the thread that is stuck may hold.
        os.write(2, (("\n" if len(bars) else "") + line).encode())
        last = threading.Thread(target=self._last, args=(error,), daemon=True)
        last.start()
        last.join(LAST)
        os._exit(3 if isinstance(error, Diverged) else 2)

    def _last(self, error: Exception) -> None:
        for call in reversed(self.on_stuck):
            with suppress(Exception):
                if call is not None:
                    call(error)
        sys.stdout.flush()


_watch: _Watch | None = None  # of the outermost block


def _open(command: str) -> _Watch:
    from torch import distributed

    return _Watch(distributed.get_rank(), connect(), command)


def _ranks() -> int:
    """Return the number of processes of the process group; 1 without one."""
    if "torch" not in sys.modules:
        return 1
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
