"""Processes that make the runs of `gem-kernels evidence`, a few at a time.

    with processes(config, Runner, count=2, logs=folder) as pool:
        pool.begin(job)
        for job, record, error in pool.ended(): ...

A process keeps what it has loaded from one run to the next. An error or a death ends one run and its process, whose place the
next run gives to a fresh one. The end of the parent, by whatever signal, is the end of all.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

from gem.evidence.config import Config
from gem.evidence.plan import Job, Record
from gem.explain import explain

VISIBLE = "CUDA_VISIBLE_DEVICES"
Runs = Callable[[Job], Record]
Result = tuple[Job, Record | None, str]
"""A job with its result, or None and what went wrong."""


class Pool(Protocol):
    """Makes runs, a few at a time."""

    @property
    def free(self) -> int:
        """The number of runs that could be begun now."""

    def begin(self, job: Job) -> None:
        """Begin a run."""

    def ended(self) -> list[Result]:
        """Wait for the end of a run; return those that ended."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def processes(
    config: Config, make: Callable[[Config], Runs], count: int, logs: Path, gpus: Sequence[str] = ()
) -> Iterator[Pool]:
    """Yield a pool of processes, which the end of the block kills.

    Args:
        config: of the comparison.
        make: called with the config in each process; returns what makes a run. The processes import it by its name.
        count: the number of processes, each of which gets its share of the cores as threads.
        logs: folder for worker0.log, ...: what a process prints, and the tracebacks of its errors.
        gpus: as in CUDA_VISIBLE_DEVICES. A process sees one of them alone, as a trainer takes all that it sees.
    """
    pool = _Processes(config, make, count, logs, gpus)
    try:
        yield pool
    finally:
        pool.close()


class _Worker:
    """A process that makes one run after the other, with the end of a pipe."""

    def __init__(self, config: Config, make: Callable[[Config], Runs], threads: int, log: Path, gpu: str) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA cannot be used in a fork
        self.connection, theirs = context.Pipe()
        config = replace(config, device="cuda") if gpu else config  # the only one there, whatever its number here
        self.process = context.Process(target=_serve, args=(theirs, make, config, threads, log), daemon=True)
        with _without_interrupts(), _seeing(gpu):
            self.process.start()
        theirs.close()
        self.job: Job | None = None


class _Processes:
    def __init__(
        self, config: Config, make: Callable[[Config], Runs], count: int, logs: Path, gpus: Sequence[str]
    ) -> None:
        self.config, self.make, self.count, self.logs, self.gpus = config, make, count, logs, gpus
        self.workers: dict[int, _Worker] = {}  # begun when they are needed

    @property
    def free(self) -> int:
        return self.count - sum(worker.job is not None for worker in self.workers.values())

    def begin(self, job: Job) -> None:
        idle = [i for i in range(self.count) if i not in self.workers or self.workers[i].job is None]
        index = max(idle, key=lambda i: i in self.workers)  # rather one that has loaded torch
        if index in self.workers and not self.workers[index].process.is_alive():
            _kill(self.workers.pop(index))
        if index not in self.workers:
            threads, log = max(1, cores() // self.count), self.logs / f"worker{index}.log"
            gpu = self.gpus[index % len(self.gpus)] if self.gpus else ""
            self.workers[index] = _Worker(self.config, self.make, threads, log, gpu)
        worker = self.workers[index]
        worker.job = job
        worker.connection.send(job)

    def ended(self) -> list[Result]:
        busy = {worker.connection: index for index, worker in self.workers.items() if worker.job is not None}
        return [self._result(busy[connection]) for connection in wait(list(busy))]  # type: ignore[index]

    def _result(self, index: int) -> Result:
        """Return what a worker sent; one that failed or died is given up, for a fresh one."""
        worker = self.workers[index]
        job, worker.job = worker.job, None
        assert job is not None
        try:
            record, error = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            status = worker.process.exitcode
            why = " (killed, as where memory runs out: lower workers)" if status == -signal.SIGKILL else ""
            record, error = None, f"its process ended with status {status}{why}"
        if record is None:
            self.workers.pop(index)
            _kill(worker)
        return job, record, error

    def close(self) -> None:
        for worker in self.workers.values():
            _kill(worker)


def _kill(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block SIGINT for a process that is begun in the block: Ctrl-C in a terminal reaches all, and is the parent's affair."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it is begun with the first process, and would end the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _seeing(gpu: str) -> Iterator[None]:
    """Let a process that is begun in the block see one GPU; "": those that this one sees."""
    before = os.environ.get(VISIBLE)
    if gpu:
        os.environ[VISIBLE] = gpu
    try:
        yield
    finally:
        if before is not None:
            os.environ[VISIBLE] = before
        elif gpu:
            del os.environ[VISIBLE]


def _serve(connection: Connection, make: Callable[[Config], Runs], config: Config, threads: int, log: Path) -> None:
    """Make the runs that come through the pipe until it closes, or one fails; what is printed goes to the log."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as out:
        for standard in (sys.stdout, sys.stderr):
            os.dup2(out.fileno(), standard.fileno())
    import torch
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, of which a kill would leave a warning
    torch.set_num_threads(threads)
    run = None
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        print(f"\n{datetime.now():%Y-%m-%d %H:%M:%S} {job}", flush=True)
        try:
            run = run or make(config)
            answer = (run(job), "")
        except Exception as error:
            traceback.print_exc()
            connection.send((None, explain(error, "evidence", f"{log.name} has the traceback")))
            return  # memory or the device may be in a bad way: the next run gets a fresh process
        connection.send(answer)


def _end_with_parent() -> None:
    """Wait for the end of the parent, even by SIGKILL, and end this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
