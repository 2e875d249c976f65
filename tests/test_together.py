"""Ranks end together: real processes with gloo, of which one fails, dies, stops or finishes first.

Each case is a function of the rank, run in a process of its own as a command is: an error is its last line on stderr.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from torch import distributed

from gem import hub, together
from gem.explain import explain
from gem.stops import Diverged, RankEnded, Terminated

LIMIT = 60  # seconds in which all ranks must have ended
GRACE = 3.0  # instead of together.GRACE
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "gem.together"])
Case = Callable[[int], None]


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit status, minus the signal that ended it, its stderr, and the seconds of the block."""

    status: int
    err: str
    seconds: float

    @property
    def line(self) -> str:
        return self.err.splitlines()[-1]


def _run(case: Case, rank: int, size: int, port: int, err: str) -> None:
    """Run a case on a rank, and exit as gem.cli.main does."""
    opened = os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(opened, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    together.GRACE = GRACE
    distributed.init_process_group("gloo")
    distributed.barrier()
    began = time.monotonic()
    try:
        case(rank)
        status = 0
    except (Exception, Terminated) as error:
        os.write(2, f"took {time.monotonic() - began:.1f} s\ngem-kernels case: {explain(error, '')}\n".encode())
        status = 3 if isinstance(error, Diverged) else 2
    os._exit(status)


@dataclass
class Ranks:
    """The processes of a case; `end` waits for all."""

    processes: list[multiprocessing.process.BaseProcess]
    folder: Path

    def err(self, rank: int) -> str:
        path = self.folder / f"{rank}.err"
        return path.read_text() if path.exists() else ""

    def says(self, rank: int, word: str) -> None:
        """Wait until a rank has written a word."""
        deadline = time.monotonic() + LIMIT
        while word not in self.err(rank):
            assert time.monotonic() < deadline, self.err(rank)
            time.sleep(0.02)

    def signal(self, rank: int, signum: int) -> float:
        """Send a signal to a rank that is at work in its block; return when."""
        self.says(rank, "at work")
        os.kill(self.processes[rank].pid or 0, signum)
        return time.monotonic()

    def end(self) -> list[Ended]:
        began, ended = time.monotonic(), [0.0] * len(self.processes)
        sentinels = {process.sentinel: rank for rank, process in enumerate(self.processes)}
        while sentinels and time.monotonic() < began + LIMIT:
            for sentinel in wait(list(sentinels), 1):
                ended[sentinels.pop(sentinel)] = time.monotonic() - began  # type: ignore[index, arg-type]
        assert not sentinels, [self.err(rank) for rank in sentinels.values()]
        codes = [process.exitcode for process in self.processes]
        return [Ended(code or 0, self.err(rank), ended[rank]) for rank, code in enumerate(codes)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """Start a case on ranks; at the end of the test none is left."""
    started: list[multiprocessing.process.BaseProcess] = []

    def begin(case: Case, size: int = 2) -> Ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes: list[multiprocessing.process.BaseProcess] = [
            _CONTEXT.Process(target=_run, args=(case, rank, size, port, str(tmp_path / f"{rank}.err")))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
            started.append(process)
        return Ranks(processes, tmp_path)

    yield begin
    for process in started:
        process.kill()
        process.join()


def at_work() -> None:
    os.write(2, b"at work\n")


def collective() -> None:
    """Wait for all ranks, as training does at every step."""
    distributed.all_reduce(torch.zeros(1))


def stuck() -> None:
    """Wait for ever in C, as a rank does in a collective of NCCL."""
    at_work()
    time.sleep(600)


# --- an error ---------------------------------------------------------------------------------------------------------


def raises_while_the_others_reduce(rank: int) -> None:
    with together.together():
        if rank == 1:
            raise ValueError("max_length must be >= 1, got 0")
        collective()


def test_an_error_ends_ranks_in_a_collective(start: Callable[..., Ranks]) -> None:
    zero, one, two = start(raises_while_the_others_reduce, 3).end()
    assert one.line == "gem-kernels case: max_length must be >= 1, got 0"
    assert zero.line == two.line == "gem-kernels case: rank 1: max_length must be >= 1, got 0"
    assert [zero.status, one.status, two.status] == [2, 2, 2]


def raises_while_the_others_are_stuck(rank: int) -> None:
    with together.together():
        if rank == 0:
            raise KeyError("x")
        stuck()


def test_an_error_of_rank_0_ends_a_rank_that_is_stuck(start: Callable[..., Ranks]) -> None:
    zero, one = start(raises_while_the_others_are_stuck).end()
    assert zero.line.startswith("gem-kernels case: KeyError: 'x'")
    assert one.line == "gem-kernels: rank 0: KeyError: 'x' (its own output says more)" and one.status == 2
    assert zero.seconds + GRACE - 1 < one.seconds


def diverges_while_rank_0_is_stuck(rank: int) -> None:
    def leave_verdicts(error: Exception) -> None:
        assert isinstance(error, Diverged)
        os.write(2, f"verdict {error.rail}: {error}\n".encode())

    with together.together(), together.together(on_stuck=leave_verdicts):
        if rank == 1:
            raise Diverged("step 3: the loss is nan", "leap")
        stuck()


def test_diverged_on_a_rank_that_is_stuck(start: Callable[..., Ranks]) -> None:
    """Rank 0 is stuck, and still leaves the verdicts."""
    zero, one = start(diverges_while_rank_0_is_stuck).end()
    assert "gem-kernels: rank 1: step 3: the loss is nan\nverdict leap: rank 1: step 3: the loss is nan\n" in zero.err
    assert zero.status == one.status == 3 and one.line == "gem-kernels case: step 3: the loss is nan"


def diverges_while_rank_0_reduces(rank: int) -> None:
    with together.together():
        try:
            with together.together():
                if rank == 1:
                    raise Diverged("step 3: the loss is nan", "leap")
                collective()
        except Diverged as error:  # as gem.runs.train_to_end
            os.write(2, f"verdict {error.rail}\n".encode())
            raise


def test_diverged_keeps_its_type_in_the_inner_block(start: Callable[..., Ranks]) -> None:
    zero, one = start(diverges_while_rank_0_reduces).end()
    assert "verdict leap\n" in zero.err and zero.line == "gem-kernels case: rank 1: step 3: the loss is nan"
    assert zero.status == one.status == 3


def all_raise(rank: int) -> None:
    with together.together():
        collective()
        raise ValueError(f"output_dir must be empty ({rank})")


def test_an_error_of_all_ranks_is_their_own(start: Callable[..., Ranks]) -> None:
    for rank, ended in enumerate(start(all_raise, 3).end()):
        assert ended.line == f"gem-kernels case: output_dir must be empty ({rank})" and ended.status == 2


def exits(rank: int) -> None:
    with together.together():
        if rank == 1:
            sys.exit(5)
        collective()


def test_an_exit_with_a_status_is_an_error(start: Callable[..., Ranks]) -> None:
    assert start(exits).end()[0].line == "gem-kernels case: rank 1: it ended with exit status 5"


def terminated(rank: int) -> None:
    with together.together():
        if rank == 1:
            raise Terminated(signal.SIGTERM)
        if rank == 2:  # as torchrun makes it end when it sees the end of another
            time.sleep(1)
            raise Terminated(signal.SIGTERM)
        collective()


def test_a_signal_ends_the_others_each_of_which_keeps_its_own(start: Callable[..., Ranks]) -> None:
    zero, one, two = start(terminated, 3).end()
    assert zero.line == "gem-kernels case: rank 1: terminated by SIGTERM"
    assert one.line == two.line == "gem-kernels case: terminated"


def torchrun_terminates(rank: int) -> None:
    with together.together():
        if rank == 1:
            raise ValueError("no")
        time.sleep(1)
        raise Terminated(signal.SIGTERM)


def test_the_signal_of_torchrun_is_replaced_by_the_error_behind_it(start: Callable[..., Ranks]) -> None:
    assert start(torchrun_terminates).end()[0].line == "gem-kernels case: rank 1: no"


# --- a death ----------------------------------------------------------------------------------------------------------


def reduces_for_ever(rank: int) -> None:
    with together.together():
        at_work()
        while True:
            collective()


def all_are_stuck(rank: int) -> None:
    with together.together():
        if os.fork() == 0:  # a worker keeps copies of what its parent has open
            time.sleep(GRACE + 10)
            os._exit(0)
        stuck()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("case", [reduces_for_ever, all_are_stuck])
def test_kill_9(case: Case, victim: int, start: Callable[..., Ranks]) -> None:
    ranks = start(case, 3)
    for rank in range(3):
        ranks.says(rank, "at work")
    ranks.signal(victim, signal.SIGKILL)
    ended = ranks.end()
    assert ended.pop(victim).status == -signal.SIGKILL
    for other in ended:
        assert other.status == 2 and f"rank {victim}: its process died" in other.line, other
        assert other.seconds < GRACE + 5


# --- no end -----------------------------------------------------------------------------------------------------------


def rank_0_finishes_first(rank: int) -> None:
    with together.together():
        time.sleep(0 if rank == 0 else 3)


def rank_1_finishes_first(rank: int) -> None:
    with together.together():
        time.sleep(0 if rank == 1 else 3)


@pytest.mark.parametrize("case", [rank_0_finishes_first, rank_1_finishes_first])
def test_a_rank_that_finishes_first_ends_nobody(case: Case, start: Callable[..., Ranks]) -> None:
    ended = start(case, 3).end()
    assert [rank.status for rank in ended] == [0, 0, 0] and not any(rank.err for rank in ended)


def again_and_again(rank: int) -> None:
    for _ in range(5):
        with together.together():
            with together.together():
                collective()
            with suppress(ValueError), together.together():  # what is caught inside the outer block is no end
                raise ValueError("caught")
            collective()


def test_blocks_inside_and_after_one_another(start: Callable[..., Ranks]) -> None:
    assert [rank.status for rank in start(again_and_again).end()] == [0, 0]


def is_stopped(rank: int) -> None:
    with together.together():
        at_work()
        if rank == 1:
            time.sleep(1)
        collective()


def test_a_rank_that_is_stopped_is_not_dead(start: Callable[..., Ranks]) -> None:
    ranks = start(is_stopped)
    ranks.signal(1, signal.SIGSTOP)
    time.sleep(5)
    ranks.signal(1, signal.SIGCONT)
    assert [rank.status for rank in ranks.end()] == [0, 0]


def test_with_one_process_the_block_just_runs() -> None:
    with pytest.raises(KeyError), together.together():
        raise KeyError
    with together.joining():
        together.join()
    together.join()


def joins(rank: int) -> None:
    with together.joining():
        together.join()
        if rank == 1:
            raise ValueError("no")
        collective()


def test_join_begins_the_block(start: Callable[..., Ranks]) -> None:
    assert start(joins).end()[0].line == "gem-kernels case: rank 1: no"


def test_an_end_without_what_it_needs_is_ignored() -> None:
    assert together.End.read({"rank": "1", "type": "ValueError", "text": "no", "rail": ""}) is None
    assert together.End.read({"rank": 1, "type": "ValueError", "text": None, "rail": ""}) is None
    end = together.End.of(1, RuntimeError("\U0001f600" * 9000))
    assert len(json.dumps(asdict(end))) < hub.LINE
    assert isinstance(end.error(), RankEnded)
