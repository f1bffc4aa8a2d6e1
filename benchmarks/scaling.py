"""What handing work to Ray costs: overhead of a task, efficiency with workers, memory of the driver over many slides.

    uv run --extra ray benchmarks/scaling.py
    uv run --extra ray benchmarks/scaling.py --slides 1000 --parts memory

Slides are simulated: each sleeps for its time (drawn from a lognormal distribution, as slides' sizes are about) and
writes nothing, so that what is measured is the sharing out, on a Ray of this machine.
"""

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from report import processor, table, versions

from utils.core.engine import Engine, Processes, open_engine
from utils.core.errors import plural
from utils.core.ray_settings import Cluster
from utils.core.runtime import be_quiet
from utils.slides.batch import SlideStatus, work_through

PARTS = ("overhead", "efficiency", "memory")
SLIDES, SECONDS = 60, 1.0  # of the simulated slides: how many, how long on average


def no_op(slide: Path, _: Path) -> SlideStatus:
    return SlideStatus(slide, "done", patches=0)


def sleep(times: dict[Path, float], slide: Path, _: Path) -> SlideStatus:
    time.sleep(times[slide])
    return SlideStatus(slide, "done", patches=0, seconds=times[slide])


def simulated(folder: Path, seconds: Sequence[float]) -> dict[Path, Path]:
    """Return slides and targets. Each slide is an empty file of a size by its seconds, as the largest go first."""
    slides = [folder / f"simulated_{one:05d}.svs" for one in range(len(seconds))]
    for slide, time_of_it in zip(slides, seconds, strict=True):
        with slide.open("wb") as file:
            file.truncate(round(1e6 * time_of_it))
    return {slide: slide.with_suffix(".h5") for slide in slides}


def seconds_of(engine: Engine, work, targets: dict[Path, Path], report: Path) -> float:
    started = time.perf_counter()
    statuses = work_through(targets, engine, work, report)
    took = time.perf_counter() - started
    if {one.status for one in statuses} != {"done"}:
        sys.exit("a simulated slide failed")
    return took


def resident() -> float:
    """Return the MB of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1e3


def overhead(folder: Path, number: int) -> str:
    targets, report = simulated(folder, [0.0] * number), folder / "report.csv"
    rows = [["this process", f"{1e3 * seconds_of(Processes(), no_op, targets, report) / number:.2f}"]]
    for actors in (1, 2):
        with open_engine(Cluster(ray="local", actors=actors), Processes(), "cpu") as engine:
            few = dict(list(targets.items())[:10])
            start = seconds_of(engine, no_op, few, report)
            took = seconds_of(engine, no_op, targets, report)
            rows.append([f"Ray, {plural(actors, 'actor')}", f"{1e3 * (took - start) / (number - len(few)):.2f}"])
    return f"### Overhead: {number:,} slides that take no time\n\n{table(' | ms a slide', rows)}"


def efficiency(folder: Path) -> str:
    drawn = np.random.default_rng(0).lognormal(0, 0.6, SLIDES)
    seconds, rows = (drawn * SECONDS / drawn.mean()).tolist(), []
    targets = simulated(folder, seconds)
    times = dict(zip(targets, seconds, strict=True))
    total = sum(times.values())
    for actors in (1, 2):
        with open_engine(Cluster(ray="local", actors=actors), Processes(), "cpu") as engine:
            few = dict(list(targets.items())[:actors])
            start = seconds_of(engine, no_op, few, folder / "report.csv")
            took = seconds_of(engine, partial(sleep, times), targets, folder / "report.csv")
        shares = [f"{total / actors / seconds:.0%}" for seconds in (took, took - start)]
        rows.append([str(actors), f"{took:.1f}", f"{start:.1f}", *shares])
    head = f"### Efficiency: {SLIDES} simulated slides of {total:.0f} s together"
    columns = "actors | s | s to start them | of what is possible | after their start"
    return f"{head}\n\n{table(columns, rows)}"


def memory(folder: Path, number: int) -> str:
    targets, report = simulated(folder, [0.0] * number), folder / "report.csv"
    with open_engine(Cluster(ray="local", actors=2), Processes(), "cpu") as engine:
        seconds_of(engine, no_op, dict(list(targets.items())[:100]), report)
        began = resident()
        took = seconds_of(engine, no_op, targets, report)
        rows = [["before", f"{began:.0f}"], ["after", f"{resident():.0f}"]]
    with report.open(newline="") as file:
        written = sum(1 for _ in csv.DictReader(file))
    head = f"### Memory of the driver: {number:,} slides that take no time, in {took:.0f} s; {written:,} are reported"
    return f"{head}\n\n{table(' | MB', rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=10_000, help="slides that take no time (default: 10000)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    asked = parser.parse_args()
    be_quiet()
    torch.set_num_threads(1)
    print(f"{', '.join([processor(), *versions()])}\n")
    for part in asked.parts:
        with tempfile.TemporaryDirectory() as folder:
            if part == "efficiency":
                print(efficiency(Path(folder)), flush=True)
            else:
                print({"overhead": overhead, "memory": memory}[part](Path(folder), asked.slides), flush=True)
            print()


if __name__ == "__main__":
    main()
