"""What a CUDA card can do at most, and how time and memory are measured on it, for all benchmarks.

Times on a card are those of its own events, after a warm-up; memory is the peak of PyTorch's allocator. Everything runs
on a CPU too, by the clock and without memory, so that it can be tried where there is no card.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from report import processor, versions

from utils.core.device import amp_dtype, set_tf32, uses_tf32

DEVICES = ("cpu", "cuda")
SECONDS = 75.0  # after which a benchmark on a card begins nothing more, by default
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
COPIED = 2**31  # bytes
SIDE = 8192  # of the square matrices whose product is timed
_TURNS, _TURN_SECONDS = 3, 0.02
_LONG_SECONDS = 1.0  # what takes longer is timed once


def seconds(run: Callable[[], object], times: int, device: str) -> float:
    """Return the seconds of one run, the mean of several."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / times
    before = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - before) / times


def median_seconds(run: Callable[[], object], device: str) -> float:
    """Return the median seconds of a run after a warm-up, in turns of as many runs as take a moment."""
    run()
    once = seconds(run, 1, device)
    if once > _LONG_SECONDS:
        return once
    times = math.ceil(_TURN_SECONDS / max(once, 1e-6))
    return statistics.median(seconds(run, times, device) for _ in range(_TURNS))


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most memory that a run takes on the card, beyond what is taken already; 0 without a card."""
    if not torch.cuda.is_available():
        run()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free(device: str) -> None:
    """Give memory that no tensor holds back to the card, for other processes."""
    if device == "cuda":
        torch.cuda.empty_cache()


def wait(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def computing(precision: str, device: str) -> Iterator[None]:
    """Compute in a precision within the context: autocast in bf16 and fp16, products in TF32 or in float32."""
    place = torch.device(device)
    dtype = amp_dtype(precision, place) if device == "cuda" else {"bf16": torch.bfloat16}.get(precision)
    set_tf32(place, uses_tf32(precision, place))
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        yield
    set_tf32(place, on=False)


def dtype_of(precision: str) -> torch.dtype:
    """Return what features are kept in for a precision: float16 but for work in float32."""
    return torch.float32 if precision in ("fp32", "tf32") else torch.float16


@dataclass(frozen=True)
class Ceilings:
    """What the card can do: `copy`, bytes per second that it reads and writes when it copies; `upload`, bytes per
    second from page-locked memory of the machine; `products`, the FLOP/s of a large matrix product in each precision.
    """

    device: str
    copy: float
    upload: float
    products: dict[str, float]

    @classmethod
    def measured(cls, device: str) -> "Ceilings":
        source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = 2 * COPIED / median_seconds(lambda: target.copy_(source), device)
        staged = torch.zeros(COPIED // 4, dtype=torch.uint8, pin_memory=device == "cuda")
        part = target[: COPIED // 4]
        upload = len(part) / median_seconds(lambda: part.copy_(staged, non_blocking=True), device)
        return cls(device, copy, upload, {name: product_rate(name, device) for name in PRECISIONS})

    def reads(self, taken: float, size: int) -> float:
        """Return a time as a multiple of one read of so many bytes."""
        return taken / (size / self.copy)

    def share(self, flops: float, taken: float, precision: str) -> float:
        """Return the share of the product ceiling at which so many operations were done."""
        return flops / taken / self.products[precision]

    def __str__(self) -> str:
        products = ", ".join(f"{name} {rate / 1e12:,.1f}" for name, rate in self.products.items())
        return (
            f"Ceilings of {machine(self.device)}: copies {self.copy / 1e12:.2f} TB/s (read and written), from the "
            f"machine {self.upload / 1e9:.1f} GB/s; products of {SIDE} x {SIDE} in TFLOP/s: {products}"
        )


def product_rate(precision: str, device: str) -> float:
    """Return the FLOP/s of a product of two square matrices."""
    a, b = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))
    with computing(precision, device):
        if device == "cuda" and precision in ("bf16", "fp16"):  # not the time of a cast
            a, b = (factor.to(amp_dtype(precision, torch.device(device))) for factor in (a, b))
        return 2 * SIDE**3 / median_seconds(lambda: a @ b, device)


def machine(device: str) -> str:
    """Return the name of the card, or of the processor, and the versions."""
    name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if device == "cuda" else processor()
    return ", ".join([name, *versions()])


@dataclass
class Budget:
    """So many seconds, from now on."""

    seconds: float
    started: float = field(default_factory=time.perf_counter)

    @property
    def spent(self) -> float:
        """The share that is over."""
        return (time.perf_counter() - self.started) / self.seconds if self.seconds > 0 else math.inf

    @property
    def is_spent(self) -> bool:
        return self.spent >= 1

    def note(self, skipped: list[Any]) -> str:
        """Return what was not measured for lack of time; "" if nothing was."""
        if not skipped:
            return ""
        return (
            f"\nNot measured, as {self.seconds:.0f} s were over: {', '.join(map(str, skipped))} (--seconds gives more)"
        )
