"""Worker processes of this machine; the process that started them sends them one task at a time.

If a worker dies or runs out of memory, only its try of the task is lost, and the other workers go on. It may have died
of too little memory, so it is not replaced while others are left: its task is retried with fewer workers.
"""

import multiprocessing
import os
import pickle
import platform
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from utils.core.errors import EngineError
from utils.core.runtime import log, threads_in_use, use_threads

Task = TypeVar("Task")
Send = Callable[[Any], None]
Work = Callable[[Task, Send], None]
OnMessage = Callable[[Task, Any], None]

# The work is given up after this many deaths, one after the other, of workers without a task.
_MOST_IDLE_DEATHS = 3
OUT_OF_MEMORY = "ran out of memory"
_OUT_OF_MEMORY_WORDS = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class WorkerDied:
    """Message about a task whose worker has died `times` times, last as `process` on `node`. The task is retried, on
    another node if there is one, unless `for_good` is set. For a process of this machine, `how` says in a clause how
    it ended, and `workers_left` how many workers go on.
    """

    times: int
    for_good: bool
    node: str
    process: int
    how: str = ""
    workers_left: int = 0

    def __str__(self) -> str:
        how_often = "" if self.times == 1 else f" ({self.times} times now)"
        if self.how:
            return f"{self.how}{how_often}"
        return f"its worker process on {self.node} was lost{how_often}, as when memory runs out or a node goes down"


class Pool:
    """Worker processes that do `tasks` with the pickled work in the file `parcel`."""

    def __init__(self, parcel: Path, tasks: Sequence[Any], on_message: Callable[[Any, Any], None]) -> None:
        self.parcel, self.tasks, self.on_message = parcel, tasks, on_message
        self.waiting = deque(range(len(tasks)))
        self.deaths: Counter[int] = Counter()
        self.workers: dict[Connection, _Worker] = {}
        self.has_begun = self.has_ended_one = False
        self.idle_deaths = 0

    def run(self, jobs: int) -> None:
        """Do all tasks, `jobs` at a time. Raise what a task raises; EngineError if no worker can start."""
        try:
            for _ in range(jobs):
                self._start()
            while self.workers:
                for connection in wait(list(self.workers)):
                    self._receive(self.workers[connection])  # type: ignore[index]
        finally:
            for worker in self.workers.values():
                worker.process.kill()
                worker.process.join()

    def _start(self) -> None:
        worker = _Worker.start(self.parcel)
        self.workers[worker.connection] = worker

    def _receive(self, worker: "_Worker") -> None:
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            self._on_death(worker)
            return
        if kind == "out of memory":
            worker.ran_out_of_memory = True
            self._on_death(worker)
            return
        if kind == "error":
            raise content
        if kind == "message":
            self.on_message(self.tasks[worker.task], content)
            return
        self.has_begun = True
        self.has_ended_one |= kind == "ended"
        if not self.waiting:
            self._dismiss(worker)
            return
        try:
            worker.connection.send(self.tasks[self.waiting[0]])
        except OSError:  # the worker has died since; it has not begun the task
            worker.task = -1
            self._on_death(worker)
            return
        worker.task = self.waiting.popleft()

    def _dismiss(self, worker: "_Worker") -> None:
        del self.workers[worker.connection]
        worker.connection.close()  # upon which it ends
        worker.process.join()

    def _on_death(self, worker: "_Worker") -> None:
        self._dismiss(worker)
        if worker.task < 0:
            self._on_death_without_a_task(worker)
            return
        self.deaths[worker.task] += 1
        times = self.deaths[worker.task]
        was_alone = all(remaining.task < 0 for remaining in self.workers.values())
        is_for_good = times > 1 and was_alone
        if not is_for_good:  # other tasks come first, unless it ran alone
            (self.waiting.appendleft if was_alone else self.waiting.append)(worker.task)
        elif not self.has_ended_one:  # the other tasks would fail as well
            self.waiting.clear()
        if self.waiting and not self.workers:
            self._start()
        process = worker.process.pid or 0
        how = f"its worker process {worker.how_it_ended}"
        death = WorkerDied(times, is_for_good, platform.node(), process, how, len(self.workers))
        self.on_message(self.tasks[worker.task], death)

    def _on_death_without_a_task(self, worker: "_Worker") -> None:
        if not self.has_begun:
            raise EngineError(
                f"a worker process ended before its first task: it {worker.how_it_ended}; give fewer --jobs, and let "
                'a script of your own begin with: if __name__ == "__main__"'
            )
        self.idle_deaths += 1
        log.warning("a worker process %s without a task; %d go on", worker.how_it_ended, len(self.workers))
        if self.waiting and not self.workers:
            if self.idle_deaths > _MOST_IDLE_DEATHS:
                raise EngineError(f"a worker process {worker.how_it_ended} without a task; give fewer --jobs")
            self._start()


@dataclass
class _Worker:
    """A process, the connection to it, and the number of its task, -1 while it starts."""

    process: Any
    connection: Connection
    task: int = -1
    ran_out_of_memory: bool = False

    @classmethod
    def start(cls, parcel: Path) -> "_Worker":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, parcel, threads_in_use()))
        with _sigint_blocked():
            process.start()
        theirs.close()  # so that the connection breaks when the process ends
        return cls(process, ours)

    @property
    def how_it_ended(self) -> str:
        code = self.process.exitcode
        if self.ran_out_of_memory:
            return OUT_OF_MEMORY
        if code == -signal.SIGKILL:
            return "was killed (signal 9), as when memory runs out"
        return f"ended unexpectedly ({f'signal {-code}' if code < 0 else f'exit code {code}'})"


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block Ctrl-C for processes that are started within the block; this process receives it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, parcel: Path, threads: int | None) -> None:
    """Do the tasks that the parent process sends, until it closes the connection or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # if a mask is not inherited
    tasks: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_fetch, args=(connection, tasks), daemon=True).start()
    try:
        work = pickle.loads(parcel.read_bytes())  # noqa: S301 - written by the process that started us
        connection.send(("ready", None))
        while True:
            task = tasks.get()
            use_threads(threads)
            work(task, lambda content: connection.send(("message", content)))
            connection.send(("ended", None))
    except BaseException as failure:  # noqa: BLE001 - raised again by the process that asked
        connection.send(("out of memory", None) if is_out_of_memory(failure) else ("error", sendable(failure)))


def _fetch(connection: Connection, tasks: SimpleQueue) -> None:
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def is_out_of_memory(failure: BaseException) -> bool:
    """Return whether memory ran out, on the machine or its GPU: PyTorch raises several kinds of error."""
    torch = sys.modules.get("torch")
    if isinstance(failure, MemoryError) or (torch and isinstance(failure, torch.OutOfMemoryError)):
        return True
    return isinstance(failure, RuntimeError) and any(words in str(failure) for words in _OUT_OF_MEMORY_WORDS)


def sendable(failure: BaseException) -> BaseException:
    """Return the error with its node and traceback as a note, as pickle leaves them out; a RuntimeError with its text
    if it cannot be pickled.
    """
    try:
        copy = pickle.loads(pickle.dumps(failure))  # noqa: S301 - made here
    except Exception:  # noqa: BLE001 - its class's own code
        copy = RuntimeError(f"{type(failure).__name__}: {failure}")
    copy.add_note(f"on {platform.node()}:\n{''.join(traceback.format_exception(failure))}")
    return copy
