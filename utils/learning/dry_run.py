"""Estimate the time, memory and disk of a training run from a short trial, and those of its largest training step."""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from MILS.bag_model import BagModel
from utils.bags.chunks import chunks_per_step, num_chunks
from utils.bags.dataset import MILDataset
from utils.core.device import free_memory, peak_memory
from utils.core.errors import DivergedError, plural
from utils.core.runtime import duration, file_size, log, progress
from utils.core.text import aligned
from utils.learning.jobs import Trainer, TrainingJob
from utils.learning.splits import InnerFold, OuterFold
from utils.learning.training import ModelTraining, validate

# A trial trains on at least this many patches and at least one slide per class, and validates on as many.
_TRIAL_PATCHES = 30_000
# Patches of the two bags that a forecast extrapolates from.
FORECAST_ROWS = 2048, 4096
# Peak memory of a step, in units of the tensors that it saves for its backward pass.
_PEAK_PER_SAVED = 1.5
# Steps of fewer patches take little memory and time, whatever the model.
MANY_PATCHES = 50_000
_MOST_FOLDS_SHOWN = 20


def report(
    trainer: Trainer,
    folds: Sequence[OuterFold],
    jobs: list[TrainingJob],
    final: str,
    processes: int,
    uses_workers: bool,
    folder: Path,
) -> str:
    """Return the folds as a table, and an estimate of their training from a short trial of every setting.

    `final` is as in `Protocol`. `uses_workers`: the trainings run in other processes, which share packed features.
    """
    data, sizes = trainer.dataset, _sizes(trainer.dataset)
    head = f"{len(jobs)} inner trainings of at most {max(job.epochs for job in jobs)} epochs"
    if final == "refit":
        longest = max(jobs, key=lambda job: job.epochs)
        jobs = jobs + [replace(longest, fold=fold, inner=0) for fold in folds]
        head += f", {len(folds)} refits"
    if final == "all":
        everything, nothing = np.arange(len(data)), np.arange(0)
        longest = max(jobs, key=lambda job: job.epochs)
        jobs = [*jobs, replace(longest, fold=OuterFold(0, nothing, (InnerFold(everything, nothing),)), inner=0)]
        head += ", one on all slides"
    first = {job.setting: job for job in reversed(jobs)}
    bar = progress(sorted(first), "Trying each setting", unit="setting", leave=False)
    trials = [trial(trainer, first[setting], sizes, data.window) for setting in bar]
    members = len(folds[0].inner) if final == "ensemble" else 1
    in_memory = sum(info.nbytes for info in data.info) if data.is_in_memory else 0
    costs = estimate(
        jobs, trials, sizes, checkpoints=(len(folds) + 1) * members, processes=processes, device=trainer.device,
        packed=in_memory if uses_workers else 0, in_memory=in_memory,
    )  # fmt: skip
    return f"{splits_table(folds, data)}\n\n{head}\n{costs.text(processes, folder)}"


def _sizes(data: MILDataset) -> np.ndarray:
    """Return each slide's number of patches, `(slides,)`."""
    return np.array([info.num_instances for info in data.info])


@dataclass(frozen=True)
class Trial:
    """One setting's seconds per patch of training and of validation, and its model's bytes of weights."""

    training: float
    validation: float
    model_bytes: int

    def seconds(self, job: TrainingJob, sizes: np.ndarray) -> float:
        """Return the seconds of a job without early stopping; `sizes (slides,)` are the slides' patches."""
        if not job.inner:
            return job.epochs * self.training * sizes[job.fold.train].sum()
        inner = job.fold.inner[job.inner - 1]
        return job.epochs * (self.training * sizes[inner.train].sum() + self.validation * sizes[inner.val].sum())


def trial(trainer: Trainer, job: TrainingJob, sizes: np.ndarray, window: int) -> Trial:
    """Time an epoch of the job on some of its slides, after one that fills the caches; then take the run's largest step
    to reach its peak memory. The dataset holds `window` patches beside the batch.
    """
    setting, inner = trainer.settings[job.setting - 1], job.fold.inner[job.inner - 1]
    settings, data = trainer.training_of(job), trainer.dataset.fitted_to(job.fold.train)
    train, val = (_trial_slides(slides, sizes, data.task.strata(data.labels)) for slides in (inner.train, inner.val))
    training = ModelTraining(trainer.factory(setting), data, train, settings, trainer.seed, trainer.device)
    seconds = []
    for epoch in (1, 2):
        started = time.perf_counter()
        with suppress(DivergedError):  # which takes no less time
            training.epoch(epoch)
        trained = time.perf_counter()
        with suppress(DivergedError):
            validate(training.model, data, val, training.loss_weights, trainer.feed)
        seconds = [trained - started, time.perf_counter() - trained]
    slides, batch_size = largest_step(trainer, job, sizes)
    in_window = int(np.searchsorted(np.sort(sizes)[::-1].cumsum(), window)) + 1
    training.step(np.argsort(-sizes, kind="stable")[: max(len(slides), in_window)], batch_size)
    weights = sum(tensor.nbytes for tensor in training.model.state_dict().values())
    return Trial(seconds[0] / sizes[train].sum(), seconds[1] / sizes[val].sum(), weights)


def largest_step(trainer: Trainer, job: TrainingJob, sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the cohort's largest slides, as many as fill a batch, and the job's batch size."""
    chunks = np.array([num_chunks(int(size), trainer.feed.chunk_size) for size in sizes])
    batch_size = trainer.training_of(job).batch_size
    if batch_size == "auto":
        batch_size = chunks_per_step(int(chunks[job.fold.inner[job.inner - 1].train].sum()))
    order = np.argsort(-sizes, kind="stable")
    count = int(np.searchsorted(chunks[order].cumsum(), batch_size)) + 1
    return order[:count], batch_size


def log_large_steps(trainer: Trainer, job: TrainingJob) -> None:
    """If whole slides make the run's training steps large, forecast time and memory of the largest one, and log it."""
    sizes = _sizes(trainer.dataset)
    slides, _ = largest_step(trainer, job, sizes)
    patches = int(sizes[slides].sum())
    if trainer.feed.mode != "full" or patches < MANY_PATCHES:
        return
    seconds, memory = _forecast(trainer, job, trainer.dataset.input_dim, patches)
    epoch_seconds = seconds / patches * sizes.mean() * len(job.fold.inner[job.inner - 1].train)
    text = (
        f"{trainer.spec['name']} on whole slides: the largest training step ({plural(len(slides), 'slide')}, "
        f"{patches:,} patches) takes about {duration(seconds)} and {file_size(memory)} of memory, an epoch about "
        f"{duration(epoch_seconds)}; --mode chunked and a smaller --batch_size take less memory"
    )
    free = free_memory(trainer.device)
    if free is not None and memory > free:
        log.warning("%s (%s free)", text, file_size(free))
    else:
        log.info(text)


def _forecast(trainer: Trainer, job: TrainingJob, input_dim: int, patches: int) -> tuple[float, float]:
    """Return seconds and bytes of a step on slides of `patches` in all, extrapolated from two small random bags."""
    torch.manual_seed(0)
    model = trainer.factory(trainer.settings[job.setting - 1])().to(trainer.device)
    bags = [torch.randn(rows, input_dim, device=trainer.device) for rows in FORECAST_ROWS]
    _measure_step(model, bags[0])  # warm up
    small, large = (_measure_step(model, bag) for bag in bags)
    factor = (patches - FORECAST_ROWS[0]) / (FORECAST_ROWS[1] - FORECAST_ROWS[0])
    seconds, memory = (low + factor * max(0, high - low) for low, high in zip(small, large, strict=True))
    return seconds, _PEAK_PER_SAVED * memory


def _measure_step(model: BagModel, bag: torch.Tensor) -> tuple[float, int]:
    """Return the seconds of a step on one bag, and the bytes that it saves for the backward pass."""
    saved: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logits, _ = model.forward_bags([bag])
    logits.sum().backward()
    if bag.device.type == "cuda":
        torch.cuda.synchronize(bag.device)
    return time.perf_counter() - started, sum(saved.values())


def _trial_slides(slides: np.ndarray, sizes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return slides of every class in turn, until they hold enough patches."""
    turns = np.zeros(len(slides), dtype=int)
    for label in np.unique(labels[slides]):
        in_class = labels[slides] == label
        turns[in_class] = np.arange(in_class.sum())
    in_turn = slides[np.argsort(turns, kind="stable")]
    count = int(np.searchsorted(sizes[in_turn].cumsum(), _TRIAL_PATCHES)) + 1
    return in_turn[: max(count, len(np.unique(labels[slides])))]


def splits_table(folds: Sequence[OuterFold], data: MILDataset) -> str:
    """Return how many slides (and patients) of each class (stratum) each fold trains, validates and tests on, as a
    table.
    """
    rows = [["slides (patients)", *data.task.strata_names]]
    for fold in folds[:_MOST_FOLDS_SHOWN]:
        subsets = {f"fold {fold.number}: test": fold.test}
        for number, inner in enumerate(fold.inner, start=1):
            subsets |= {f"inner {number}: train": inner.train, f"inner {number}: validation": inner.val}
        rows += [[name, *_stratum_counts(slides, data)] for name, slides in subsets.items()]
    more = len(folds) - _MOST_FOLDS_SHOWN
    return aligned([rows]) + (f"\nand {more} folds more" if more > 0 else "")


def _stratum_counts(slides: np.ndarray, data: MILDataset) -> list[str]:
    strata = data.task.strata(data.labels[slides])
    groups = [slides[strata == stratum] for stratum in range(len(data.task.strata_names))]
    return [f"{len(group)} ({len(np.unique(data.cases[group]))})" for group in groups]


@dataclass(frozen=True)
class Estimate:
    """Seconds without early stopping; bytes on disk of the `checkpoints` and of `temporary` files; bytes of memory of a
    `process` and of a CUDA `device` (None if the system does not tell), and of the `features` that processes share.
    """

    seconds: float
    checkpoints: int
    temporary: int
    process: int | None
    device: int | None
    features: int

    def text(self, processes: int, folder: Path) -> str:
        """Return the estimate in words, for `processes` that train into `folder`."""
        free = shutil.disk_usage(_existing(folder)).free
        lines = [
            f"time: about {duration(self.seconds)} of training at the trial's speed, less if stopped early",
            f"disk: {file_size(self.checkpoints)} of checkpoints, {file_size(self.temporary)} more until the run ends; "
            f"{file_size(free)} free",
        ]
        if self.process is not None:
            each = "" if processes == 1 else f" for each of {processes} processes"
            lines.append(f"memory: about {file_size(self.process)}{each}, and {file_size(self.features)} of features")
        if self.device is not None:
            lines.append(f"GPU memory: about {file_size(self.device * processes)}")
        if self.checkpoints + self.temporary > free:
            lines.append(f"warning: {folder} has too little disk for this run; give another --output_dir")
        return "\n".join(lines)


def estimate(
    jobs: Sequence[TrainingJob],
    trials: Sequence[Trial],
    sizes: np.ndarray,
    *,
    checkpoints: int,
    processes: int,
    packed: int,
    in_memory: int,
    device: torch.device,
) -> Estimate:
    """Return what the jobs and so many `checkpoints` would take, given a trial of each setting and the slides' patches
    `sizes (slides,)`; `packed` are bytes of features written to disk for the run, `in_memory` those in memory.
    """
    seconds = [trials[job.setting - 1].seconds(job, sizes) for job in jobs]
    # The processes share the work, but the run is no shorter than its longest training.
    total = max(sum(seconds) / processes, *seconds)
    model = max(trial.model_bytes for trial in trials)
    peak = peak_memory(device)
    temporary = len(jobs) * model + packed
    return Estimate(total, checkpoints * model, temporary, peak["process"], peak["device"], in_memory)


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())
