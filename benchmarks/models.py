"""Parameters, arithmetic, time and memory of the models beside plain forms of two of them, as Markdown tables.

    uv run benchmarks/models.py
    uv run benchmarks/models.py --sizes 1000 50000 200000 --threads 1
    uv run benchmarks/models.py --device cuda --precisions bf16 fp16

A step is forward, loss and backward. Times are medians of runs that take turns, in one process. Memory is the peak
beyond input and weights, in a process of its own, after a warm-up on a small bag. Every model casts half-precision
features to float32. On a CPU times are given as multiples of LiteMIL's: the ratio of two models carries over to another
machine, a number of milliseconds does not.

On a card, in one process, each model runs in every precision; features are float16 where products are. Times are also
given as multiples of one read of the bags at the speed at which the card copies, and the forward pass's operations as a
share of what the card does in a large product of that precision; both ceilings are measured first.
"""

import argparse
import itertools
import math
import multiprocessing
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import card
import torch
from card import seconds
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
SIZES_ON_CARD = (*SIZES, 1_000_000)
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
    is_inference_only: bool = False


def mil(name: str) -> nn.Module:
    return build_mil(name, input_dim=INPUT_DIM, num_classes=NUM_CLASSES)


def plain() -> nn.Module:
    return PlainLiteMIL(INPUT_DIM, NUM_CLASSES)


MODELS = {name: Contender(lambda name=name: mil(name), lambda m, x, mask: m(x, mask)[0]) for name in list_mils()} | {
    "LiteMIL by nn.MultiheadAttention": Contender(plain, lambda m, x, mask: m(x.float(), mask)),
    "TransMIL as published": Contender(lambda: PublishedTransMIL(INPUT_DIM, NUM_CLASSES), lambda m, x, _: m(x.float())),
    "input projection alone": Contender(lambda: nn.Linear(INPUT_DIM, 256), lambda m, x, _: m(x.float())),
    "LiteMIL.forward_blocks": Contender(
        lambda: mil(BASE), lambda m, bag: m.forward_blocks(bag.split(4096))[0], lambda bags: (bags[0],), True
    ),
}
BATCHES = {
    "LiteMIL.forward_bags": Contender(lambda: mil(BASE), lambda m, bags: m.forward_bags(bags)[0], lambda bags: (bags,)),
    "LiteMIL, padded": Contender(lambda: mil(BASE), lambda m, x, mask: m(x, mask)[0]),
    "LiteMIL by nn.MultiheadAttention, padded": Contender(plain, lambda m, x, mask: m(x.float(), mask)),
}
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
        self.model.requires_grad_(True)
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
        taken = [seconds(getattr(subject, which), 1, "cpu")]
        if taken[0] < 10 * TURN_SECONDS:  # the first run is the slowest
            taken.append(seconds(getattr(subject, which), 1, "cpu"))
        runs[name] = math.ceil(TURN_SECONDS / min(taken))
    times: dict[str, list[float]] = {name: [] for name in group}
    for _ in range(setting.repeats):
        for name, subject in subjects.items():
            if sum(times[name]) < LIMIT_SECONDS:
                times[name].append(seconds(getattr(subject, which), runs[name], "cpu"))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {name: (median, subjects[name].flops() if which == "forward" else 0.0) for name, median in medians.items()}


def measure_memory(setting: Setting, contender: Contender, which: str, lengths: Sequence[int]) -> float:
    """Return the peak bytes of pass `which` beyond input and weights; NaN if the system does not tell."""
    getattr(Subject(contender, setting, setting.bags([min(WARM_UP, max(1, max(lengths) // 4))])), which)()
    return peak_of(getattr(Subject(contender, setting, setting.bags(lengths)), which))


def peak_of(run: Callable[[], None]) -> float:
    """Return the most memory that a run takes beyond what is resident; NaN if the system does not tell."""
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
            if which == "step" and contender.is_inference_only:
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
            cells[name][-2] = ratio
    progress("\n")
    return list(cells.values())


def progress(sign: str) -> None:
    print(sign, end="", file=sys.stderr, flush=True)


def measure_on_card(
    setting: Setting, contender: Contender, precision: str, lengths: Sequence[int], ceilings: card.Ceilings
) -> list[str]:
    """Return the cells of a contender in a precision: time, reads of the bags, and memory of each pass; of the forward
    pass also its share of the products' ceiling.
    """
    bags = replace(setting, dtype=card.dtype_of(precision)).bags(lengths)
    size, cells = sum(bag.nbytes for bag in bags), []
    with card.computing(precision, setting.device):
        subject = Subject(contender, setting, bags)
        for which in PASSES:
            share = [""] if which == "forward" else []
            if which == "step" and contender.is_inference_only:
                cells += [""] * 3
                continue
            run = getattr(subject, which)
            taken = or_none(lambda run=run: card.median_seconds(run, setting.device))
            if taken is None:
                cells += ["out of memory", "", *share, ""]
                continue
            memory = card.peak_bytes(run)
            if share:
                share = [f"{ceilings.share(subject.flops(), taken, precision):.1%}"]
            cells += [f"{1e3 * taken:.3f}", f"{ceilings.reads(taken, size):.1f}", *share, f"{memory / 1e6:,.0f}"]
    return cells


def on_card(asked: argparse.Namespace) -> Iterator[str]:
    """Yield the tables of a card: a model in each precision a row."""
    setting = Setting(asked.device, torch.float32, asked.threads, asked.repeats)
    budget = card.Budget(asked.seconds)
    ceilings = card.Ceilings.measured(asked.device)
    yield f"{ceilings}\n"
    heading = "precision | forward, ms | reads of the bags | of the products | MB | step, ms | reads of the bags | MB"
    scenes = [(f"One bag of {size:,} instances", [size], MODELS) for size in asked.sizes or SIZES_ON_CARD]
    scenes += [(f"{scene}: {sum(lengths):,} instances", lengths, BATCHES) for scene, lengths in SCENES.items()]
    skipped = []
    for title, lengths, group in scenes:
        rows = []
        for name, precision in itertools.product(group, asked.precisions):
            if budget.is_spent:
                skipped.append(f"{name} in {precision} ({title})")
                continue
            rows.append([name, precision, *on_card_or_not(setting, group[name], precision, lengths, ceilings)])
            progress(".")
        if rows:
            yield f"### {title}\n\n{table(f'model | {heading}', rows)}\n"
    progress("\n")
    yield budget.note(skipped)


def on_card_or_not(
    setting: Setting, contender: Contender, precision: str, lengths: Sequence[int], ceilings: card.Ceilings
) -> list[str]:
    cells = or_none(lambda: measure_on_card(setting, contender, precision, lengths, ceilings))
    if cells is None:
        torch.cuda.empty_cache()
    return cells or ["out of memory", *[""] * 6]


def machine(setting: Setting) -> str:
    """Return what ran the benchmark: processor, threads, versions."""
    dtype = str(setting.dtype).removeprefix("torch.")
    return ", ".join([processor(), f"{setting.threads} threads", dtype, f"{setting.repeats} turns", *versions()])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", help="instances per bag (default: to 100,000; on a card 1e6)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on the CPU")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of the features, on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each model, on a CPU")
    parser.add_argument("--precisions", nargs="+", choices=card.PRECISIONS, default=card.PRECISIONS, help="on a card")
    parser.add_argument("--device", choices=card.DEVICES, default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=card.SECONDS, help="on a card: begin nothing more after so many"
    )
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.device == "cuda":
        for text in on_card(asked):
            print(text, flush=True)
        return
    setting = Setting(asked.device, getattr(torch, asked.dtype), asked.threads, asked.repeats)
    unit = "multiple of LiteMIL's"
    heading = f"parameters | GFLOPs | forward, {unit} | forward, MB | step, {unit} | step, MB"
    print(f"{machine(setting)}\n")
    for size in asked.sizes or SIZES:
        print(f"### One bag of {size:,} instances\n")
        print(table(f"model | {heading}", measure(setting, MODELS, [size])), flush=True)
        print()
    for scene, lengths in SCENES.items():
        print(f"### {scene}: {sum(lengths):,} instances, the longest bag has {max(lengths):,}\n")
        print(table(f"batch | {heading}", measure(setting, BATCHES, lengths)), flush=True)
        print()


if __name__ == "__main__":
    main()
