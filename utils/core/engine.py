"""Where work is done: in this process, or side by side in several that end when this one does."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from utils.core.errors import EngineError

Task = TypeVar("Task")
Tell = Callable[[Any], None]
Work = Callable[[Task, Tell], None]

_SECONDS_BETWEEN_LOOKS = 0.1


def threads_each(jobs: int) -> int:
    """The threads of this process, shared out among `jobs` processes."""
    return max(1, torch.get_num_threads() // jobs)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on `count` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refuse_rerun() -> None:
    """Raise EngineError in a process of `run_tasks` that is only importing the script that began it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise EngineError(
            'with several jobs each process imports the script again: let it begin with if __name__ == "__main__"'
        )


def run_tasks(work: Work[Task], tasks: Sequence[Task], jobs: int, hear: Callable[[Task, Any], None]) -> None:
    """Do `work(task, tell)` for every task, `jobs` of them at a time; what a task tells, `hear(task, told)` hears here.

    With one job everything happens in this process. Otherwise `work` is sent to new processes, which compute on as
    many threads as this one does. The first error ends everything and is raised here; when this process ends, in
    whatever way, so do they. Raises EngineError when a process dies; `work` and tasks must be what pickle takes.
    """
    if jobs == 1:
        for task in tasks:
            work(task, partial(hear, task))
    elif tasks:
        _side_by_side(work, tasks, min(jobs, len(tasks)), hear)


def _side_by_side(work: Work[Task], tasks: Sequence[Task], jobs: int, hear: Callable[[Task, Any], None]) -> None:
    context = multiprocessing.get_context("spawn")
    messages = context.SimpleQueue()
    # Held by this process alone: when it is closed, by us or by our end, whoever listens at the other end stops.
    lifeline, held = context.Pipe(duplex=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            # Through a file: a process that ends before it has read the first 64 kB of what it is sent is waited for
            # for ever.
            parcel = Path(folder) / "work.pickle"
            parcel.write_bytes(pickle.dumps(work))
            begin = (parcel, lifeline, messages, torch.get_num_threads())
            with ProcessPoolExecutor(jobs, context, _begin, begin) as pool:
                try:
                    with _deaf_to_ctrl_c():
                        waiting = {pool.submit(_do, number, task) for number, task in enumerate(tasks)}
                    while waiting:
                        done, waiting = wait(waiting, _SECONDS_BETWEEN_LOOKS, FIRST_EXCEPTION)
                        while not messages.empty():
                            number, told = messages.get()
                            hear(tasks[number], told)
                        for one in done:
                            one.result()
                except BaseException:
                    held.close()  # else the pool would wait for what is being done
                    raise
    except BrokenProcessPool as failure:
        raise EngineError(
            "a worker process ended unexpectedly, as when memory runs out; give fewer --jobs (what is finished is "
            'kept), and let a script of your own begin with: if __name__ == "__main__"'
        ) from failure


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started meanwhile leave Ctrl-C to this one, from their very beginning; this one hears it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# The work of this process and where it tells, when it is one of the several.
_work: Callable[[Any, Tell], None] | None = None
_messages: Any = None


def _begin(parcel: Path, lifeline: Any, messages: Any, count: int) -> None:
    global _work, _messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where a mask is not inherited
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(count)
    _work, _messages = pickle.loads(parcel.read_bytes()), messages  # noqa: S301 - written by the process that began us


def _end_with(lifeline: Any) -> None:
    try:
        lifeline.recv()
    except EOFError:
        os._exit(1)


def _do(number: int, task: Any) -> None:
    assert _work is not None  # noqa: S101 - for the type checker: a process begins before it works
    _work(task, lambda told: _messages.put((number, told)))
