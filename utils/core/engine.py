"""Run work in this process, in threads or processes of this machine, or on the machines of a Ray cluster.

An engine calls `work(task, send)` for every task, several at once. Whatever a task passes to `send` reaches
`on_message(task, message)` in the calling thread. Callers depend on `Engine` alone; the choice of engine changes the
speed, never the results. PyTorch is imported where it is needed, as a worker process may do without it.
"""

import importlib.util
import multiprocessing
import pickle
import platform
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from utils.core.errors import ConfigError, EngineError
from utils.core.processes import OUT_OF_MEMORY, OnMessage, Pool, Task, Work, WorkerDied, is_out_of_memory
from utils.core.ray_settings import Cluster
from utils.core.runtime import processors, threads_are_given

_SECONDS_BETWEEN_LOOKS = 0.1


class Engine(Protocol):
    """Runs work on tasks, `jobs` at a time."""

    @property
    def jobs(self) -> int: ...

    @property
    def threads(self) -> int:
        """How many threads each task computes on."""
        ...

    @property
    def sharers(self) -> int:
        """How many tasks share a GPU at a time, where they compute on one."""
        ...

    def run(self, work: Work[Task], tasks: Sequence[Task], on_message: OnMessage[Task]) -> None:
        """Run the work on all tasks. The first error that a task raises ends the run and is raised here."""
        ...


def threads_each(jobs: int) -> int:
    """Return this process's threads per process if `jobs` processes share them: at most its processors, unless the user
    has set their number.
    """
    import torch

    count = torch.get_num_threads()
    return max(1, (count if threads_are_given() else min(count, processors())) // jobs)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on `count` threads within the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refuse_rerun() -> None:
    """Raise EngineError in a process of `Processes` that is importing the script which started it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise EngineError(
            'with several jobs each process imports the script again: let it begin with if __name__ == "__main__"'
        )


def check_engine(cluster: Cluster, jobs: int = 1, device: str = "auto") -> None:
    """Raise ConfigError for settings that do not go with Ray, EngineError if Ray is not installed."""
    if not cluster.is_asked_for:
        return
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(f"--device {device}: names devices of one machine; with --ray give auto, cpu or cuda")
    if jobs > 1:
        raise ConfigError(f"--jobs {jobs}: is for one machine; with --ray give --actors")
    if "ray" not in sys.modules and importlib.util.find_spec("ray") is None:
        raise EngineError(f"--ray {cluster.ray}: Ray is not installed; install it with uv sync --extra ray")


@contextmanager
def open_engine(cluster: Cluster, local: Engine, device: str = "auto") -> Iterator[Engine]:
    """Yield an engine on Ray if it is asked for, otherwise the `local` one. Workers on Ray take a GPU each, or a share
    of one, if the device is "cuda", or "auto" and there are GPUs. Raises ConfigError, EngineError.
    """
    check_engine(cluster, local.jobs, device)
    if not cluster.is_asked_for:
        yield local
        return
    from utils.core.on_ray import OnRay, joined_cluster

    with joined_cluster(str(cluster.ray)) as ray:
        yield OnRay.of_cluster(ray, cluster, device)


@dataclass(frozen=True)
class Processes:
    """One job runs in this process. Several run in spawned processes with this process's current thread count; they end
    when this process does, however it ends. A task whose process dies or runs out of memory is tried again with fewer
    at a time until it runs alone, then once more; each time a `WorkerDied` is sent. Work and tasks must be picklable.
    """

    jobs: int = 1

    @property
    def threads(self) -> int:
        return threads_each(self.jobs)

    @property
    def sharers(self) -> int:
        return self.jobs

    def run(self, work: Work[Task], tasks: Sequence[Task], on_message: OnMessage[Task]) -> None:
        if self.jobs == 1:
            for task in tasks:
                try:
                    work(task, partial(on_message, task))
                except Exception as failure:
                    if not is_out_of_memory(failure):
                        raise
                    on_message(
                        task, WorkerDied(1, for_good=True, node=platform.node(), process=0, how=f"it {OUT_OF_MEMORY}")
                    )
                    return
        elif tasks:
            with tempfile.TemporaryDirectory() as folder:
                # The work goes through a file: if a process ended before it had read the first 64 kB of a pipe, we
                # would wait forever.
                parcel = Path(folder) / "work.pickle"
                parcel.write_bytes(pickle.dumps(work))
                Pool(parcel, tasks, on_message).run(min(self.jobs, len(tasks)))


# The number of this thread among an engine's workers in this process.
_this_thread = threading.local()


def worker_number() -> int:
    """Return this thread's number among the workers in this process, from 0; 0 if it is the only one."""
    return getattr(_this_thread, "number", 0)


@dataclass(frozen=True)
class Threads:
    """Threads of this process, each with a number (`worker_number`). An error in any thread, or Ctrl-C, sets `stop`;
    long-running work must check it.
    """

    jobs: int = 1
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def threads(self) -> int:
        import torch

        return torch.get_num_threads()

    @property
    def sharers(self) -> int:
        return 1

    def run(self, work: Work[Task], tasks: Sequence[Task], on_message: OnMessage[Task]) -> None:
        waiting, messages = deque(tasks), SimpleQueue()

        def do_tasks(number: int) -> None:
            _this_thread.number = number
            while not self.stop.is_set():
                try:
                    task = waiting.popleft()
                except IndexError:
                    return
                work(task, lambda message, task=task: messages.put((task, message)))

        def listen() -> None:
            while not messages.empty():
                on_message(*messages.get())

        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(do_tasks, number) for number in range(self.jobs)}
            try:
                while futures:
                    ended, futures = wait(futures, _SECONDS_BETWEEN_LOOKS, FIRST_EXCEPTION)
                    listen()
                    for future in ended:
                        future.result()
                listen()
            except BaseException:
                self.stop.set()
                raise
