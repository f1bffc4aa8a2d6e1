"""What a training run would take, from its folds and a short trial; and its largest step, from a shorter one."""

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
from utils.core.device import peak_memory
from utils.core.errors import DivergedError, plural
from utils.core.runtime import available_memory, duration, file_size, log, progress
from utils.core.text import aligned
from utils.learning.jobs import Trainer, TrainingJob
from utils.learning.splits import OuterFold
from utils.learning.training import ModelTraining, validate

# A trial trains on so many patches, or one batch if that is more, and validates on as many.
_TRIAL_PATCHES = 30_000
# A forecast goes by bags of so many patches.
_FORECAST_ROWS = 2048, 4096
# What a step keeps for the way back, and what passes on that way, in units of what it keeps.
_WAY_BACK = 1.5
# Steps of fewer patches take little, whatever the model.
_MANY_PATCHES = 50_000
# Beyond so many folds their table is cut.
_MOST_FOLDS_SHOWN = 20


def report(
    trainer: Trainer,
    folds: Sequence[OuterFold],
    jobs: list[TrainingJob],
    final: str,
    processes: int,
    is_sent_away: bool,
    folder: Path,
) -> str:
    """Return the folds as a table, and what their training would take by a short trial of every setting.

    `final` is as in `Protocol`. Trainings that are sent away leave this process, and share features packed for them.
    """
    data, sizes = trainer.dataset, _sizes(trainer.dataset)
    head = f"{len(jobs)} inner trainings of at most {max(job.epochs for job in jobs)} epochs"
    if final == "refit":
        longest = max(jobs, key=lambda job: job.epochs)
        jobs = jobs + [replace(longest, fold=fold, inner=0) for fold in folds]
        head += f", {len(folds)} refits"
    first = {job.setting: job for job in reversed(jobs)}
    bar = progress(sorted(first), "Trying each setting", unit="setting", leave=False)
    trials = [trial(trainer, first[setting], sizes, data.window) for setting in bar]
    members = len(folds[0].inner) if final == "ensemble" else 1
    in_memory = sum(info.nbytes for info in data.info) if data.is_in_memory else 0
    costs = estimate(
        jobs, trials, sizes, checkpoints=(len(folds) + 1) * members, processes=processes, device=trainer.device,
        packed=in_memory if is_sent_away else 0, in_memory=in_memory,
    )  # fmt: skip
    return f"{splits_table(folds, data, data.cases)}\n\n{head}\n{costs.text(processes, folder)}"


def _sizes(data: MILDataset) -> np.ndarray:
    """Return the patches of each slide."""
    return np.array([info.num_instances for info in data.info])


@dataclass(frozen=True)
class Trial:
    """Seconds per patch, of training and of validation, with one setting; bytes of its model's weights."""

    training: float
    validation: float
    model_bytes: int

    def seconds(self, job: TrainingJob, sizes: np.ndarray) -> float:
        """What a job takes if no epoch is spared; `sizes (slides,)` are the slides' patches."""
        if not job.inner:
            return job.epochs * self.training * sizes[job.fold.train].sum()
        inner = job.fold.inner[job.inner - 1]
        return job.epochs * (self.training * sizes[inner.train].sum() + self.validation * sizes[inner.val].sum())


def trial(trainer: Trainer, job: TrainingJob, sizes: np.ndarray, window: int) -> Trial:
    """Time an epoch of the job on some of its slides, after another that fills caches; then take the largest step that
    the run will, for the sake of its memory: `window` patches are held beside the batch.
    """
    setting, inner = trainer.settings[job.setting - 1], job.fold.inner[job.inner - 1]
    settings, data = trainer.training_of(job), trainer.dataset
    train, val = (_some(part, sizes, data.labels) for part in (inner.train, inner.val))
    training = ModelTraining(trainer.factory(setting), data, train, settings, trainer.seed, trainer.device)
    spent = []
    for epoch in (1, 2):
        began = time.perf_counter()
        with suppress(DivergedError):  # which takes no less time
            training.epoch(epoch)
        trained = time.perf_counter()
        with suppress(DivergedError):
            validate(training.model, data, val, training.loss_weights, trainer.feed)
        spent = [trained - began, time.perf_counter() - trained]
    slides, batch_size = largest_step(trainer, job, sizes)
    held = int(np.searchsorted(np.sort(sizes)[::-1].cumsum(), window)) + 1
    training.step(np.argsort(-sizes, kind="stable")[: max(len(slides), held)], batch_size)
    weights = sum(tensor.nbytes for tensor in training.model.state_dict().values())
    return Trial(spent[0] / sizes[train].sum(), spent[1] / sizes[val].sum(), weights)


def largest_step(trainer: Trainer, job: TrainingJob, sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the cohort's largest slides that fill a batch together, and the size of a batch of the job."""
    chunks = np.array([num_chunks(int(size), trainer.feed.chunk_size) for size in sizes])
    batch_size = trainer.training_of(job).batch_size
    if batch_size == "auto":
        batch_size = chunks_per_step(int(chunks[job.fold.inner[job.inner - 1].train].sum()))
    order = np.argsort(-sizes, kind="stable")
    enough = int(np.searchsorted(chunks[order].cumsum(), batch_size)) + 1
    return order[:enough], batch_size


def log_large_steps(trainer: Trainer, job: TrainingJob) -> None:
    """Log what the run's largest training step would take where whole slides make it large, from two short ones."""
    sizes = _sizes(trainer.dataset)
    slides, _ = largest_step(trainer, job, sizes)
    patches = int(sizes[slides].sum())
    if trainer.feed.mode != "full" or patches < _MANY_PATCHES:
        return
    seconds, memory = _forecast(trainer, job, trainer.dataset.input_dim, patches)
    an_epoch = seconds / patches * sizes.mean() * len(job.fold.inner[job.inner - 1].train)
    text = (
        f"{trainer.spec['name']} on whole slides: the largest training step ({plural(len(slides), 'slide')}, "
        f"{patches:,} patches) takes about {duration(seconds)} and {file_size(memory)} of memory, an epoch about "
        f"{duration(an_epoch)}; --mode chunked and a smaller --batch_size take less memory"
    )
    free = _free_memory(trainer.device)
    if free is not None and memory > free:
        log.warning("%s (%s free)", text, file_size(free))
    else:
        log.info(text)


def _forecast(trainer: Trainer, job: TrainingJob, input_dim: int, patches: int) -> tuple[float, float]:
    """Return seconds and bytes of a step on slides of `patches` in all, by two small ones of random features."""
    torch.manual_seed(0)
    model = trainer.factory(trainer.settings[job.setting - 1])().to(trainer.device)
    bags = [torch.randn(rows, input_dim, device=trainer.device) for rows in _FORECAST_ROWS]
    _measured(model, bags[0])  # what is new to a library costs it time
    few, many = (_measured(model, bag) for bag in bags)
    reach = (patches - _FORECAST_ROWS[0]) / (_FORECAST_ROWS[1] - _FORECAST_ROWS[0])
    seconds, memory = (low + reach * max(0, high - low) for low, high in zip(few, many, strict=True))
    return seconds, _WAY_BACK * memory


def _free_memory(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def _measured(model: BagModel, bag: torch.Tensor) -> tuple[float, int]:
    """Seconds of a step on one bag, and the bytes that it keeps for the way back."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits, _ = model.forward_bags([bag])
    logits.sum().backward()
    if bag.device.type == "cuda":
        torch.cuda.synchronize(bag.device)
    return time.perf_counter() - began, sum(kept.values())


def _some(slides: np.ndarray, sizes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Slides of every class in turn, until they hold enough patches."""
    turns = np.zeros(len(slides), dtype=int)
    for label in np.unique(labels[slides]):
        mine = labels[slides] == label
        turns[mine] = np.arange(mine.sum())
    dealt = slides[np.argsort(turns, kind="stable")]
    enough = int(np.searchsorted(sizes[dealt].cumsum(), _TRIAL_PATCHES)) + 1
    return dealt[: max(enough, len(np.unique(labels[slides])))]


def splits_table(folds: Sequence[OuterFold], data: MILDataset, cases: np.ndarray) -> str:
    """Slides, and in brackets patients, of each part of each fold and class."""
    rows = [["slides (patients)", *data.class_names]]
    for fold in folds[:_MOST_FOLDS_SHOWN]:
        parts = {f"fold {fold.number}: test": fold.test}
        for number, inner in enumerate(fold.inner, start=1):
            parts |= {f"inner {number}: train": inner.train, f"inner {number}: validation": inner.val}
        rows += [[name, *_counts(part, data, cases)] for name, part in parts.items()]
    more = len(folds) - _MOST_FOLDS_SHOWN
    return aligned([rows]) + (f"\nand {more} folds more" if more > 0 else "")


def _counts(slides: np.ndarray, data: MILDataset, cases: np.ndarray) -> list[str]:
    of_class = [slides[data.labels[slides] == label] for label in range(len(data.class_names))]
    return [f"{len(mine)} ({len(np.unique(cases[mine]))})" for mine in of_class]


@dataclass(frozen=True)
class Estimate:
    """Most seconds; bytes on disk that stay and that are needed meanwhile; bytes of memory of each process and of a
    CUDA device (None where the system does not tell), and of the features that the processes share.
    """

    seconds: float
    kept: int
    meanwhile: int
    process: int | None
    device: int | None
    features: int

    def text(self, processes: int, folder: Path) -> str:
        """Return the estimate in words, for so many processes that train into a folder."""
        free = shutil.disk_usage(_existing(folder)).free
        lines = [
            f"time: about {duration(self.seconds)} of training at the trial's speed, less if stopped early",
            f"disk: {file_size(self.kept)} of checkpoints, {file_size(self.meanwhile)} more until the run ends; "
            f"{file_size(free)} free",
        ]
        if self.process is not None:
            each = "" if processes == 1 else f" for each of {processes} processes"
            lines.append(f"memory: about {file_size(self.process)}{each}, and {file_size(self.features)} of features")
        if self.device is not None:
            lines.append(f"GPU memory: about {file_size(self.device * processes)}")
        if self.kept + self.meanwhile > free:
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
    """What the jobs, and as many `checkpoints`, would take. `trials` are of the settings, in their order; `sizes
    (slides,)` are patches; `packed` bytes are to be written for the run, `in_memory` bytes of features kept there.
    """
    seconds = [trials[job.setting - 1].seconds(job, sizes) for job in jobs]
    # Several processes share the time out, but none is shorter than its longest training.
    most = max(sum(seconds) / processes, *seconds)
    model = max(one.model_bytes for one in trials)
    peak = peak_memory(device)
    meanwhile = len(jobs) * model + packed
    return Estimate(most, checkpoints * model, meanwhile, peak["process"], peak["device"], in_memory)


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())
