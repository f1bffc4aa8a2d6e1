"""What `nested_cv.py --device cuda` measures: epochs with features kept on the card and sent there, and whole runs."""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import card
import numpy as np
import torch
from nested_cv import our_dataset, pooled_auc, timed
from report import table
from trained_cohort import CLASSES, SEED, Cohort, Plan, write_cohort

from MILS import build_mil
from utils.bags.chunks import Batch
from utils.bags.dataset import on_device
from utils.bags.device_stream import batches_ahead
from utils.core.device import free_memory
from utils.learning.training import ModelTraining, validate
from utils.mil_dataset import MILDataset
from utils.prediction.forward_pass import SlideFeed

EPOCHS = 3  # timed, after one that fills what is to be filled
JOBS = (1, 2, 4)


@dataclass(frozen=True)
class Epochs:
    """Median seconds of an epoch, of its steps alone on batches that lie on the card, and of a validation; bytes of the
    epoch's features as stored; peak bytes on the card.
    """

    epoch: float
    steps: float
    validation: float
    size: int
    peak: int

    def cells(self, ceilings: card.Ceilings, patches: int) -> list[str]:
        waits = max(0.0, 1 - self.steps / self.epoch)
        return [
            f"{self.epoch:.3f}", f"{patches / self.epoch:,.0f}", f"{ceilings.reads(self.epoch, self.size):.1f}",
            f"{self.size / self.epoch / ceilings.upload:.2f}", f"{waits:.0%}", f"{self.validation:.3f}",
            f"{self.peak / 1e6:,.0f}",
        ]  # fmt: skip


HEADING = (
    "features | epoch, s | patches/s | reads of the features | of the upload | the card waits | validation, s | MB"
)


def measure_epochs(plan: Plan, dataset: MILDataset, train: np.ndarray, val: np.ndarray) -> Epochs:
    """Time epochs of one training of LiteMIL."""
    device = torch.device(plan.device)
    factory = functools.partial(build_mil, "LiteMIL", input_dim=plan.dim, num_classes=len(CLASSES))
    training = ModelTraining(factory, dataset, train, plan.training, SEED, device)
    feed = SlideFeed.of_mode(dataset.mode, dataset.chunk_size, dataset.sequential)

    def validation() -> None:
        validate(training.model, dataset, val, training.loss_weights, feed)

    def run() -> tuple[list[float], list[float]]:
        training.epoch(1)
        validation()
        epochs = [wall(functools.partial(training.epoch, number), plan.device) for number in range(2, EPOCHS + 2)]
        return epochs, [wall(validation, plan.device) for _ in range(EPOCHS)]

    taken: list[tuple[list[float], list[float]]] = []
    peak = card.peak_bytes(lambda: taken.append(run()))
    epochs, validations = taken[0]
    batches = batches_ahead(dataset.batches(train, plan.batch_size, SEED, pin_memory=plan.device == "cuda"), device)
    steps = steps_alone(training, list(batches), plan.device)
    size = sum(dataset.info[slide].nbytes for slide in train.tolist())
    return Epochs(float(np.median(epochs)), steps, float(np.median(validations)), size, peak)


def steps_alone(training: ModelTraining, batches: list[Batch], device: str) -> float:
    """Return the median seconds of the steps of an epoch whose batches lie on the device."""
    return float(np.median([wall(lambda: training._steps(batches), device) for _ in range(EPOCHS)]))


def wall(run: Callable[[], object], device: str) -> float:
    """Return the seconds until the device has done a run: what the machine does meanwhile counts."""
    card.wait(device)
    before = time.perf_counter()
    run()
    card.wait(device)
    return time.perf_counter() - before


def on_card(plan: Plan, asked: argparse.Namespace, home: Path) -> Iterator[str]:
    """Yield the tables of a card."""
    budget = card.Budget(asked.seconds)
    ceilings = card.Ceilings.measured(plan.device)
    write_cohort(home / "cohort", plan)
    yield f"{ceilings}\n\n{free_words(plan.device)}\n"
    dataset = our_dataset(plan, home / "cohort", home / "packed")
    inner = Cohort.of(home / "cohort").folds(plan)[0].inner[0]
    patches = sum(dataset.info[slide].num_instances for slide in inner.train.tolist())
    rows = []
    kept = on_device(dataset, torch.device(plan.device))
    for name, data in {"kept on the card": kept, "sent ahead": dataset}.items():
        rows.append([name, *measure_epochs(plan, data, inner.train, inner.val).cells(ceilings, patches)])
    yield f"An inner training, {patches:,} patches an epoch\n\n{table(HEADING, rows)}\n"
    del kept, data
    card.free(plan.device)
    yield from whole_runs(plan, asked.jobs or JOBS, home, budget)


def whole_runs(plan: Plan, jobs: list[int] | tuple[int, ...], home: Path, budget: card.Budget) -> Iterator[str]:
    """Yield the table of whole cross-validations, and what there was no time for."""
    rows, skipped, first = [], [], 0.0
    for count in jobs:
        if budget.is_spent:
            skipped.append(f"--jobs {count}")
            continue
        output = home / f"ours_{count}"
        wall_seconds, cpu = timed("ours", replace(plan, jobs=count), home / "cohort", output)["in all"]
        first = first or wall_seconds
        auc = pooled_auc(home / "cohort", output)
        rows.append([str(count), f"{wall_seconds:.1f}", f"{first / wall_seconds:.2f}", f"{cpu:.1f}", f"{auc:.3f}"])
    shape = f"{plan.n_outer} x {plan.n_inner} folds, {plan.epochs} epochs"
    if rows:
        yield f"Whole cross-validations, {shape}\n\n{table('jobs | s | times as fast | CPU s | AUC', rows)}\n"
    yield budget.note(skipped)


def free_words(device: str) -> str:
    free = free_memory(torch.device(device))
    return "free memory: unknown" if free is None else f"free memory: {free / 1e9:.1f} GB"
