"""On how many threads a training computes: one where its steps are small, else as many as a short trial finds fastest.

Threads that share small pieces of work wait for each other longer than they compute, all the more beside other
processes. The number is part of a run, for the last digits depend on it: a run goes on with that it began with.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from MILS.bag_model import BagModel
from utils.bags.chunks import Batch
from utils.core.engine import threads
from utils.core.errors import plural
from utils.core.runtime import progress, threads_are_given

# Features, patches times width, of a step below which one thread is enough: a thousand patches of 1024.
_SMALL_STEP = 2**20
# Patches of a step that are tried; rounds, at least, and the seconds after which no further one begins.
_TRIED_PATCHES, _ROUNDS, _SECONDS = 4096, 5, 10
# What run.json keeps of the choice.
THREADS = ("threads", "threads_because", "threads_tried")
# More threads have to be so much faster than fewer.
_WORTH = 0.9


@dataclass(frozen=True)
class ThreadChoice:
    """The number of threads, why, and, where some were tried, the seconds of a step by number of threads."""

    threads: int
    reason: str
    seconds: Mapping[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"each training computes on {plural(self.threads, 'thread')}: {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """Return what run.json keeps of it."""
        tried = {str(count): round(seconds, 4) for count, seconds in self.seconds.items()}
        return dict(zip(THREADS, (self.threads, self.reason, tried), strict=True))


def choose_threads(
    make_model: Callable[[], BagModel],
    make_batch: Callable[[], Batch],
    most: int,
    device: torch.device,
    *,
    may_try: bool,
) -> ThreadChoice:
    """Choose between one thread and `most` for trainings of such models on such batches.

    What the user has set (OMP_NUM_THREADS) is kept. A trial is made of steps on `device`, a CPU, and only where
    `may_try`: where other machines compute, this one's speed tells nothing.
    """
    if most == 1 or threads_are_given():
        return ThreadChoice(most, "OMP_NUM_THREADS" if threads_are_given() else "it has one processor")
    if device.type != "cpu":
        return ThreadChoice(most, f"the {device.type} device computes")
    bags = make_batch().bags
    if sum(bag.numel() for bag in bags) < _SMALL_STEP:
        return ThreadChoice(1, "its steps are small")
    if not may_try:
        return ThreadChoice(most, "there are so many for each")
    seconds = tried(make_model(), some_of(bags), thread_counts(most))
    best = fastest(seconds)
    others = ", ".join(f"{1e3 * taken:.0f} ms on {count}" for count, taken in seconds.items())
    return ThreadChoice(best, f"fastest in a trial (a step of {others}); OMP_NUM_THREADS decides otherwise", seconds)


def thread_counts(most: int) -> list[int]:
    """Return 1, 2, 4, ... and `most`."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def some_of(bags: Sequence[Tensor]) -> list[Tensor]:
    """Return the first of the bags that have enough patches together, the last one cut."""
    chosen, patches = [], 0
    for bag in bags:
        chosen.append(bag[: _TRIED_PATCHES - patches])
        patches += len(chosen[-1])
        if patches == _TRIED_PATCHES:
            break
    return chosen


def tried(model: BagModel, bags: Sequence[Tensor], counts: Sequence[int]) -> dict[int, float]:
    """Return the median seconds of a step on each number of threads; they take turns, so that what else the machine
    does meanwhile strikes all of them.
    """
    model.train()
    taken: dict[int, list[float]] = {count: [] for count in counts}
    began = time.perf_counter()
    for turn in progress(range(_ROUNDS + 1), "Trying threads", unit="round", leave=False):
        for count in counts:
            with threads(count):
                start = time.perf_counter()
                model.forward_bags(bags)[0].sum().backward()
                taken[count].append(time.perf_counter() - start)
        if turn and time.perf_counter() - began > _SECONDS:
            break
    # The first turn is the slowest: memory is fetched, threads are begun.
    return {count: statistics.median(seconds[1:]) for count, seconds in taken.items()}


def fastest(seconds: Mapping[int, float]) -> int:
    """Return the number of threads whose step is fastest; of more threads only where they are clearly faster."""
    best = min(seconds)
    for count in sorted(seconds):
        if seconds[count] < _WORTH * seconds[best]:
            best = count
    return best
