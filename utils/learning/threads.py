"""Choose the number of threads of a training: one if its steps are small, else the fastest number in a short trial.

Threads that share small steps spend more time waiting for each other than computing, even more so beside other
processes. The last digits of the results depend on the number, so a resumed run keeps the number it began with.
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

# One thread is enough for a step with fewer features (patches times width): a thousand patches of 1024.
SMALL_STEP = 2**20
# Patches of a trial step; rounds, and the seconds after which no further round begins.
_TRIAL_PATCHES, _ROUNDS, _SECONDS = 4096, 5, 10
# The entries of run.json about the choice.
THREADS = ("threads", "threads_because", "threads_tried")
# More threads are chosen only if their step takes less than this share of the time.
_CLEARLY_FASTER = 0.9


@dataclass(frozen=True)
class ThreadChoice:
    """The number of threads, the reason, and the seconds of a step by number of threads, if there was a trial."""

    threads: int
    reason: str
    seconds: Mapping[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"each training computes on {plural(self.threads, 'thread')}: {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """Return the entries of run.json."""
        rounded = {str(count): round(seconds, 4) for count, seconds in self.seconds.items()}
        return dict(zip(THREADS, (self.threads, self.reason, rounded), strict=True))


def choose_threads(
    make_model: Callable[[], BagModel],
    make_batch: Callable[[], Batch],
    most: int,
    device: torch.device,
    *,
    may_try: bool,
) -> ThreadChoice:
    """Choose between one thread and `most` for trainings of such models on such batches.

    The user's own setting (OMP_NUM_THREADS) is kept. A trial runs only on a CPU `device`, and only if `may_try`: this
    machine's speed says nothing about other machines.
    """
    if most == 1 or threads_are_given():
        return ThreadChoice(most, "OMP_NUM_THREADS" if threads_are_given() else "it has one processor")
    if device.type != "cpu":
        return ThreadChoice(most, f"the {device.type} device computes")
    bags = make_batch().bags
    if sum(bag.numel() for bag in bags) < SMALL_STEP:
        return ThreadChoice(1, "its steps are small")
    if not may_try:
        return ThreadChoice(most, "there are so many for each")
    seconds = step_seconds(make_model(), trial_bags(bags), thread_counts(most))
    best = fastest(seconds)
    steps = ", ".join(f"{1e3 * duration:.0f} ms on {count}" for count, duration in seconds.items())
    return ThreadChoice(best, f"fastest in a trial (a step of {steps}); OMP_NUM_THREADS decides otherwise", seconds)


def thread_counts(most: int) -> list[int]:
    """Return 1, 2, 4, ... and `most`."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def trial_bags(bags: Sequence[Tensor]) -> list[Tensor]:
    """Return the first bags, up to the patches of a trial; the last one is cut."""
    chosen, patches = [], 0
    for bag in bags:
        chosen.append(bag[: _TRIAL_PATCHES - patches])
        patches += len(chosen[-1])
        if patches == _TRIAL_PATCHES:
            break
    return chosen


def step_seconds(model: BagModel, bags: Sequence[Tensor], counts: Sequence[int]) -> dict[int, float]:
    """Return the median seconds of a step on each number of threads. The numbers take turns, so that other load on the
    machine affects all of them.
    """
    model.train()
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    first_start = time.perf_counter()
    for number in progress(range(_ROUNDS + 1), "Trying threads", unit="round", leave=False):
        for count in counts:
            with threads(count):
                start = time.perf_counter()
                model.forward_bags(bags)[0].sum().backward()
                seconds[count].append(time.perf_counter() - start)
        if number and time.perf_counter() - first_start > _SECONDS:
            break
    # The first round is a warm-up.
    return {count: statistics.median(durations[1:]) for count, durations in seconds.items()}


def fastest(seconds: Mapping[int, float]) -> int:
    """Return the number of threads with the fastest step, but more threads only if they are clearly faster."""
    best = min(seconds)
    for count in sorted(seconds):
        if seconds[count] < _CLEARLY_FASTER * seconds[best]:
            best = count
    return best
