"""The engine on a Ray cluster: a pool of actors, each in a process of its own. Imported only where Ray is asked for."""

import importlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from utils.core.errors import EngineError, plural
from utils.core.processes import OnMessage, Task, Work, WorkerDied
from utils.core.ray_actor import Actor, Parcel, cannot_begin
from utils.core.ray_settings import Cluster
from utils.core.runtime import log, processors

# Keep Ray from running each worker by `uv run` in a copy of the folder, from reporting on its users, and from printing
# a page about each lost worker or node into the progress.
_RAY_ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was|has been marked dead because|raylet has lagging heartbeats",
}
# Workers may have been started without these variables of the driver's environment; given are beginnings of names.
_OF_DOWNLOADS = ("HF_", "TORCH_HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_RETRIES = 2
_MOST_IDLE_DEATHS = 3
_SECONDS_BETWEEN_CHECKS = 1
_SECONDS_TO_BEGIN = 60
_SECONDS_BETWEEN_WARNINGS = 300
_SECONDS_TO_ANSWER = 10


@contextmanager
def joined_cluster(address: str) -> Iterator[Any]:
    """Yield the ray module while this process belongs to a cluster: the one it has joined already, else a new one on
    this machine ("local"), the one this machine belongs to ("auto"), or the one at an address.
    """
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        ray = importlib.import_module("ray")
    except ImportError as failure:
        raise EngineError(
            f"--ray {address}: Ray cannot be imported ({failure}); install it with uv sync --extra ray"
        ) from failure
    if ray.is_initialized():  # by the notebook or script that calls us
        yield ray
        return
    arguments = {"address": address}
    if address == "local":
        arguments |= {"num_cpus": processors(), "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address not in ("local", "auto"):
            _check_reachable(address)
        ray.init(**arguments, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as failure:  # Ray raises a bare one if its node takes too long to start
        remedy = "start one with ray start --head; one that asks for a token is joined with RAY_AUTH_MODE=token"
        failed = "no Ray cluster can be joined there"
        if address == "local":
            failed, remedy = "Ray cannot be started on this machine", "without --ray this process does the same alone"
        raise EngineError(f"--ray {address}: {failed} ({' '.join(str(failure).split())}); {remedy}") from failure
    _handle_sigterm(handler)  # Ray has set its own
    try:
        if address == "auto":
            log.info("Ray auto: the cluster is that of %s", ray.get_runtime_context().gcs_address)
        yield ray
    finally:
        ray.shutdown()


def _handle_sigterm(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)


@contextmanager
def _sigterm_deferred() -> Iterator[Callable[[], None]]:
    """Hold back SIGTERM, whose exception Ray's calls would lose; yield a function that acts on one received so far."""
    before, received = signal.getsignal(signal.SIGTERM), threading.Event()

    def check_sigterm() -> None:
        if received.is_set():
            _handle_sigterm(before)
            signal.raise_signal(signal.SIGTERM)

    _handle_sigterm(lambda *_: received.set())
    try:
        yield check_sigterm
    finally:
        _handle_sigterm(before)
    check_sigterm()


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing answers at the address; Ray itself would try for minutes."""
    head = urlsplit(f"//{address}")
    socket.create_connection((head.hostname, head.port), _SECONDS_TO_ANSWER).close()


@dataclass(frozen=True)
class OnRay:
    """Actors, each doing one task at a time. If an actor dies, another retries its task, at most `retries` times,
    or once more if it may not have started; each time a `WorkerDied` is sent. An actor takes a processor for each of
    its threads, and `gpus` GPUs, a number or a fraction.
    """

    ray: Any
    jobs: int
    threads: int
    gpus: float
    retries: int

    @property
    def sharers(self) -> int:
        return round(1 / self.gpus) if self.gpus else 1

    @classmethod
    def of_cluster(cls, ray: Any, cluster: Cluster, device: str) -> "OnRay":
        """Return an engine of as many actors as asked for, by default one per GPU or per as many processors as this
        process has threads. Each has the most threads, up to this process's, with which all of them fit the nodes.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = (int(sum(node.get(name, 0) for node in nodes)) for name in ("CPU", "GPU"))
        on_gpu, most = device == "cuda" or (device == "auto" and gpus > 0), torch.get_num_threads()
        if on_gpu and not gpus:
            raise EngineError(f"--ray {cluster.ray}: the cluster has no GPU; give --device cpu")
        by_default = gpus if on_gpu else sum(int(node.get("CPU", 0)) // most for node in nodes)
        jobs = cluster.actors or max(1, by_default)
        sharers = math.ceil(jobs / gpus) if on_gpu else 0  # of a GPU
        if not _room(nodes, 1, sharers):
            raise EngineError(f"--ray {cluster.ray}: no node has what a worker needs; give its processors to ray start")
        workers = min(jobs, _room(nodes, 1, sharers))
        count = max(count for count in range(1, most + 1) if _room(nodes, count, sharers) >= workers)
        if workers < jobs:
            log.warning("the cluster has processors for %d of %s", workers, plural(jobs, "worker"))
            jobs = cluster.actors or workers  # there may be room later for all that were asked for
        if on_gpu and sharers > 1 and math.ceil(workers / sharers) < gpus:  # Ray fills one before it takes the next
            log.warning(
                "%s share the GPUs by %d, which leaves some of the %d idle; give --actors %d",
                plural(jobs, "worker"), sharers, gpus, sharers * gpus,
            )  # fmt: skip
        share = f" and {'a' if sharers == 1 else f'1/{sharers} of a'} GPU" if on_gpu else ""
        log.info(
            "Ray %s: %s of %s%s each, on %s with %s and %s",
            cluster.ray, plural(jobs, "actor"), plural(count, "thread"), share, plural(len(nodes), "node"),
            plural(cpus, "processor"), plural(gpus, "GPU"),
        )  # fmt: skip
        retries = _RETRIES if cluster.retries is None else cluster.retries
        return cls(ray, jobs, count, 1 / sharers if on_gpu else 0.0, retries)

    def run(self, work: Work[Task], tasks: Sequence[Task], on_message: OnMessage[Task]) -> None:
        if tasks:
            _ActorPool(self, work, tasks, on_message).run()


def _room(nodes: Sequence[Mapping[str, float]], count: int, sharers: int) -> int:
    """Return how many workers of `count` threads fit the nodes; with `sharers`, that many share each GPU of a node."""
    fit = [(int(node.get("CPU", 0)) // count, int(node.get("GPU", 0)) * sharers) for node in nodes]
    return sum(min(pair) if sharers else pair[0] for pair in fit)


@dataclass
class _Worker:
    """An actor: its node and process once they are known, the number of its task (None while the actor starts), and
    whether it has begun that task.
    """

    actor: Any
    node: str = ""
    process: int = 0
    task: int | None = None
    has_begun: bool = False


class _ActorPool:
    """The workers of one run, and what each is doing."""

    def __init__(self, engine: OnRay, work: Work[Task], tasks: Sequence[Task], on_message: OnMessage[Task]) -> None:
        self.engine, self.ray, self.tasks, self.on_message = engine, engine.ray, tasks, on_message
        self.waiting = deque(range(len(tasks)))
        self.deaths: Counter[int] = Counter()
        self.unstarted: set[int] = set()  # tasks whose worker died and may not have begun them
        self.died_on: dict[int, str] = {}  # by task: the node where its worker died
        self.busy: dict[Any, _Worker] = {}  # by the stream of their messages
        count = torch.get_num_threads()
        packed = self.ray.cloudpickle.dumps(work)  # including what the script itself defines
        environment = {name: value for name, value in os.environ.items() if name.upper().startswith(_OF_DOWNLOADS)}
        if not engine.gpus:  # Ray would let them see all GPUs of their node
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.parcel = self.ray.put(Parcel(packed, str(Path.cwd()), sys.path, environment, count, log.level))
        # A run that was started with more threads than fit now keeps them all the same.
        self.resources = {"num_cpus": min(count, engine.threads), "num_gpus": engine.gpus}
        self.actor_class = self.ray.remote(**self.resources, max_restarts=0)(Actor)
        self.idle_deaths = 0  # in a row
        self.warn_at = math.inf
        self.logged: set[str] = set()

    def run(self) -> None:
        for _ in range(min(self.engine.jobs, len(self.tasks))):
            self._start_worker()
        try:
            with _sigterm_deferred() as check_sigterm:
                while self.waiting or any(worker.task is not None for worker in self.busy.values()):
                    ready, _ = self.ray.wait(list(self.busy), timeout=_SECONDS_BETWEEN_CHECKS)
                    check_sigterm()
                    for stream in ready:
                        self._receive(stream)
                    if time.monotonic() > self.warn_at:
                        self._warn_of_waiting()
        finally:
            for worker in self.busy.values():
                self.ray.kill(worker.actor)

    def _warn_of_waiting(self) -> None:
        """Warn of workers that have not started; repeat it as long as none has."""
        self.warn_at = math.inf
        begun = sum(bool(worker.node) for worker in self.busy.values())
        if begun == 0:
            self.warn_at = time.monotonic() + _SECONDS_BETWEEN_WARNINGS
            log.warning(
                "no worker has begun yet: the cluster is busy, or none of its nodes has the %s%s that one needs",
                plural(self.resources["num_cpus"], "processor"), " and GPU" if self.engine.gpus else "",
            )  # fmt: skip
        elif begun < len(self.busy):
            log.warning("%d of %d workers have begun: for the others there is no room yet", begun, len(self.busy))

    def _start_worker(self) -> None:
        actor = self.actor_class.remote()
        self.busy[self._streaming(actor.begin, self.parcel)] = _Worker(actor)
        self.warn_at = time.monotonic() + _SECONDS_TO_BEGIN

    def _assign(self, worker: _Worker) -> None:
        """Give the worker the next task, if possible one that has killed no worker on its node; without one, end it."""
        if self.waiting:
            elsewhere = (index for index, task in enumerate(self.waiting) if self.died_on.get(task) != worker.node)
            index = next(elsewhere, 0)
            worker.task, worker.has_begun = self.waiting[index], False
            del self.waiting[index]
            self.busy[self._streaming(worker.actor.do, self.tasks[worker.task])] = worker
        else:
            self.ray.kill(worker.actor)

    def _streaming(self, method: Any, argument: Any) -> Any:
        return method.options(num_returns="streaming").remote(argument)

    def _receive(self, stream: Any) -> None:
        worker = self.busy[stream]
        try:
            kind, content = self.ray.get(next(stream))
        except (self.ray.exceptions.RayTaskError, self.ray.exceptions.RaySystemError):
            raise  # no worker died: it is a bug, or something that cannot be sent
        except self.ray.exceptions.RayError as failure:
            del self.busy[stream]
            self.ray.kill(worker.actor)  # it may only be out of reach
            self._on_death(worker, failure)
            return
        if kind == "process":
            worker.node, worker.process = content
        elif kind == "begun":
            worker.has_begun = True
        elif kind == "log":
            self._log(content)
        elif kind == "error":
            raise content
        elif worker.task is not None:
            for message in content:
                self.on_message(self.tasks[worker.task], message)
        if kind == "ended":
            if worker.task is None:
                self.idle_deaths = 0
            del self.busy[stream]
            self._assign(worker)

    def _log(self, record: logging.LogRecord) -> None:
        """Log once what every worker logs, such as which model it has loaded."""
        if record.levelno <= logging.INFO:
            if record.msg in self.logged:
                return
            self.logged.add(record.msg)
        log.handle(record)

    def _on_death(self, worker: _Worker, failure: Exception) -> None:
        """Handle a dead worker. If it may have died before it started the task, the task gets one extra try."""
        task = worker.task
        if task is None:
            self._on_death_without_a_task(worker, failure)
            return
        if not worker.has_begun:
            self.unstarted.add(task)
        self.deaths[task] += 1
        times = self.deaths[task]
        death = WorkerDied(times, times - (task in self.unstarted) > self.engine.retries, worker.node, worker.process)
        self.on_message(self.tasks[task], death)
        if not death.for_good:
            self.waiting.appendleft(task)
            self.died_on[task] = worker.node
        if self.waiting:
            self._start_worker()

    def _on_death_without_a_task(self, worker: _Worker, failure: Exception) -> None:
        """Start a replacement; after three deaths in a row, go on with the workers that are left."""
        reason = (str(failure).strip() or repr(failure)).splitlines()[-1].strip()
        if getattr(failure, "actor_init_failed", False):
            raise cannot_begin(reason, str(Path.cwd())) from failure
        self.idle_deaths += 1
        if not self.waiting:
            return
        how_often = f"{self.idle_deaths} in a row"
        if self.idle_deaths < _MOST_IDLE_DEATHS:
            self._start_worker()
        elif not self.busy:
            raise EngineError(
                f"--ray: workers ended before their first task, {how_often}, as when memory runs out; give fewer "
                f"--actors (Ray says: {reason})"
            ) from failure
        else:
            how_often += ", so it is not replaced"
        where = worker.node and f" on {worker.node}"
        log.warning("a worker process%s ended before it had begun with a task (%s)", where, how_often)
