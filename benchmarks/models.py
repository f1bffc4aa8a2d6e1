"""Parameters, arithmetic, time and memory of the models beside plain forms of two of them, as Markdown tables.

    uv run benchmarks/models.py
    uv run benchmarks/models.py --sizes 1000 50000 200000 --threads 1
    uv run benchmarks/models.py --device cuda --dtype float16

A step is forward, loss and backward. Times are medians of runs that take turns, in one process. Memory is the peak
beyond input and weights, in a process of its own, after a warm-up on a small bag. Every model casts half-precision
features to float32. On a CPU times are given as multiples of LiteMIL's: the ratio of two models carries over to another
machine, a number of milliseconds does not.
"""

import argparse
import math
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from references import PlainLiteMIL, PublishedTransMIL
from report import processor, table, versions
from scipy.special import ndtri
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from MILS import build_mil, list_mils
from MILS.bag_model import padded
from MILS.layers import ONEDNN_LINEAR

INPUT_DIM, NUM_CLASSES = 1024, 2
SIZES = (1_000, 10_000, 50_000, 100_000)
BASE = "LiteMIL"
PASSES = ("forward", "step")
WARM_UP = 3_000  # instances: small, and long enough to be streamed
TURN_SECONDS = 0.1  # a turn is as many runs as take this long, at least one
LIMIT_SECONDS = 20  # a contender that has run this long takes no further turn

Group = dict[str, "Contender"]


@dataclass(frozen=True)
class Contender:
    """`build` makes it, `prepare` turns bags (n_i, D), the longest first, into its arguments, `call` gives logits."""

    build: Callable[[], nn.Module]
    call: Callable[..., Tensor]
    prepare: Callable[[list[Tensor]], tuple[Any, ...]] = padded


def mil(name: str) -> nn.Module:
    return build_mil(name, input_dim=INPUT_DIM, num_classes=NUM_CLASSES)


def plain() -> nn.Module:
    return PlainLiteMIL(INPUT_DIM, NUM_CLASSES)


MODELS = {name: Contender(lambda name=name: mil(name), lambda m, x, mask: m(x, mask)[0]) for name in list_mils()} | {
    "LiteMIL by nn.MultiheadAttention": Contender(plain, lambda m, x, mask: m(x.float(), mask)),
    "TransMIL as published": Contender(lambda: PublishedTransMIL(INPUT_DIM, NUM_CLASSES), lambda m, x, _: m(x.float())),
    "input projection alone": Contender(lambda: nn.Linear(INPUT_DIM, 256), lambda m, x, _: m(x.float())),
    "LiteMIL.forward_blocks": Contender(
        lambda: mil(BASE), lambda m, bag: m.forward_blocks(bag.split(4096))[0], lambda bags: (bags[0],)
    ),
}
BATCHES = {
    "LiteMIL.forward_bags": Contender(lambda: mil(BASE), lambda m, bags: m.forward_bags(bags)[0], lambda bags: (bags,)),
    "LiteMIL, padded": Contender(lambda: mil(BASE), lambda m, x, mask: m(x, mask)[0]),
    "LiteMIL by nn.MultiheadAttention, padded": Contender(plain, lambda m, x, mask: m(x.float(), mask)),
}
INFERENCE_ONLY = {"LiteMIL.forward_blocks"}
# Sixteen bags whose lengths spread as those of a cohort's slides do: log-normal, the longest three times the mean.
RAGGED = [round(10_000 * float(torch.exp(torch.tensor(0.75 * ndtri((i + 0.5) / 16) - 0.25)))) for i in range(16)]
SCENES = {"sixteen ragged bags": RAGGED, "32 chunks of 1000": [1_000] * 32}


@dataclass(frozen=True)
class Setting:
    """Where it runs, on what, how often."""

    device: str
    dtype: torch.dtype
    threads: int
    repeats: int

    def bags(self, lengths: Sequence[int]) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        return [
            torch.randn(n, INPUT_DIM, generator=generator, device=self.device, dtype=self.dtype)
            for n in sorted(lengths, reverse=True)
        ]


class Subject:
    """A contender with its weights and arguments, ready to run."""

    def __init__(self, contender: Contender, setting: Setting, bags: list[Tensor]) -> None:
        torch.manual_seed(0)
        self.model, self.call = contender.build().to(setting.device), contender.call
        self.arguments = contender.prepare(bags)

    def forward(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.call(self.model, *self.arguments)

    def step(self) -> None:
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        answer = self.call(self.model, *self.arguments)
        answer = answer.flatten(0, -2)
        labels = torch.arange(len(answer), device=answer.device) % answer.shape[1]
        functional.cross_entropy(answer, labels).backward()

    def flops(self) -> float:
        self.model.requires_grad_(False)  # the counter trips over attention that could have gradients and has none
        with FlopCounterMode(display=False, custom_mapping={ONEDNN_LINEAR: linear_flops}) as counter:
            self.forward()
        return counter.get_total_flops()


def linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the operations of a product that torch's counter misses, from the shapes (..., D) and (d, D)."""
    return 2 * math.prod(x) * weight[0]


def measure_times(setting: Setting, group: Group, which: str, lengths: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Return each contender's median seconds of pass `which`, in alternating turns; for forward also its operations."""
    bags = setting.bags(lengths)
    subjects = {name: Subject(contender, setting, bags) for name, contender in group.items()}
    runs = {}
    for name, subject in subjects.items():
        taken = [seconds(getattr(subject, which), 1, setting.device)]
        if taken[0] < 10 * TURN_SECONDS:  # the first run is the slowest, all the more on a GPU
            taken.append(seconds(getattr(subject, which), 1, setting.device))
        runs[name] = math.ceil(TURN_SECONDS / min(taken))
    times: dict[str, list[float]] = {name: [] for name in group}
    for _ in range(setting.repeats):
        for name, subject in subjects.items():
            if sum(times[name]) < LIMIT_SECONDS:
                times[name].append(seconds(getattr(subject, which), runs[name], setting.device))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {name: (median, subjects[name].flops() if which == "forward" else 0.0) for name, median in medians.items()}


def seconds(run: Callable[[], None], times: int, device: str) -> float:
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


def measure_memory(setting: Setting, contender: Contender, which: str, lengths: Sequence[int]) -> float:
    """Return the peak bytes of pass `which` beyond input and weights; NaN if the system does not tell."""
    getattr(Subject(contender, setting, setting.bags([min(WARM_UP, max(1, max(lengths) // 4))])), which)()
    return peak_of(getattr(Subject(contender, setting, setting.bags(lengths)), which), setting.device)


def peak_of(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        run()
        return float("nan")
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = resident("VmHWM")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """Return the bytes under `field` in Linux's account of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * float(found[1]) if found else float("nan")


def in_own_process(function: Callable[[], Any]) -> Any:
    """Return the function's result from a process of its own; None if that ran out of memory."""
    if sys.platform != "linux":
        return or_none(function)
    # Forked before anything ran here: the child has all imports and no thread, nor a context on the device.
    processes = multiprocessing.get_context("fork")
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=lambda: sender.send(or_none(function)))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        child.join()
        if child.exitcode != -9:
            raise
        return None
    child.join()
    return result


def or_none(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except torch.OutOfMemoryError:
        return None


def measure(setting: Setting, group: Group, lengths: Sequence[int]) -> list[list[str]]:
    """Return a row per contender: name, parameters, GFLOPs, then time and memory of each pass."""
    parameters = {name: sum(p.numel() for p in contender.build().parameters()) for name, contender in group.items()}
    cells = {name: [name, f"{count:,}", ""] for name, count in parameters.items()}
    for which in PASSES:
        able = {}
        for name, contender in group.items():
            if which == "step" and name in INFERENCE_ONLY:
                cells[name] += ["", ""]
                continue
            found = in_own_process(
                lambda which=which, contender=contender: measure_memory(setting, contender, which, lengths)
            )
            cells[name] += ["", "out of memory" if found is None else f"{found / 1e6:,.0f}"]
            if found is not None:
                able[name] = contender
            progress(".")
        times = in_own_process(lambda which=which, able=able: measure_times(setting, able, which, lengths))
        base, _ = times[next(iter(group))]
        for name, (taken, flops) in times.items():
            ratio = f"{taken / base:.2f}"
            cells[name][2] = f"{flops / 1e9:.2f}" if which == "forward" else cells[name][2]
            cells[name][-2] = f"{1e3 * taken:.2f} ms ({ratio})" if setting.device == "cuda" else ratio
    progress("\n")
    return list(cells.values())


def progress(sign: str) -> None:
    print(sign, end="", file=sys.stderr, flush=True)


def machine(setting: Setting) -> str:
    """Return what ran the benchmark: processor or GPU, threads, versions."""
    name = in_own_process(torch.cuda.get_device_name) if setting.device == "cuda" else processor()
    dtype = str(setting.dtype).removeprefix("torch.")
    return ", ".join([name, f"{setting.threads} threads", dtype, f"{setting.repeats} turns", *versions()])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="instances per bag")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on the CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="type of the features")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each model")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    setting = Setting(asked.device, getattr(torch, asked.dtype), asked.threads, asked.repeats)
    unit = "ms (multiple of LiteMIL's)" if asked.device == "cuda" else "multiple of LiteMIL's"
    heading = f"parameters | GFLOPs | forward, {unit} | forward, MB | step, {unit} | step, MB"
    print(f"{machine(setting)}\n")
    for size in asked.sizes:
        print(f"### One bag of {size:,} instances\n")
        print(table(f"model | {heading}", measure(setting, MODELS, [size])), flush=True)
        print()
    for scene, lengths in SCENES.items():
        print(f"### {scene}: {sum(lengths):,} instances, the longest bag has {max(lengths):,}\n")
        print(table(f"batch | {heading}", measure(setting, BATCHES, lengths)), flush=True)
        print()


if __name__ == "__main__":
    main()
