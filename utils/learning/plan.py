"""What a training run would take, from its folds and a short trial."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from utils.core.device import peak_memory
from utils.core.runtime import duration, file_size
from utils.learning.splits import OuterFold
from utils.learning.training import Bags, ModelTraining, validate
from utils.learning.units import Trainer, Unit

# A trial trains on so many patches, or one batch if that is more, and validates on as many.
_TRIAL_PATCHES = 30_000
# Beyond so many folds their table is cut.
_MOST_FOLDS_SHOWN = 20


@dataclass(frozen=True)
class Trial:
    """Seconds per patch, of training and of validation, with one setting; bytes of its model's weights."""

    training: float
    validation: float
    model_bytes: int

    def seconds(self, unit: Unit, sizes: np.ndarray) -> float:
        """What a unit takes if no epoch is spared; `sizes (slides,)` are the slides' patches."""
        if not unit.inner:
            return unit.epochs * self.training * sizes[unit.fold.train].sum()
        inner = unit.fold.inner[unit.inner - 1]
        return unit.epochs * (self.training * sizes[inner.train].sum() + self.validation * sizes[inner.val].sum())


def trial(trainer: Trainer, unit: Unit, sizes: np.ndarray) -> Trial:
    """Time an epoch of the unit on some of its slides, after another that fills caches."""
    setting, inner = trainer.settings[unit.setting - 1], unit.fold.inner[unit.inner - 1]
    settings, data = trainer.training_of(unit), trainer.dataset
    train, val = (_some(part, sizes, data.labels) for part in (inner.train, inner.val))
    training = ModelTraining(trainer.factory(setting), data, train, settings, trainer.seed, trainer.device)
    spent = []
    for epoch in (1, 2):
        began = time.perf_counter()
        training.epoch(epoch)
        trained = time.perf_counter()
        validate(training.model, data, val, training.class_weights, trainer.feed)
        spent = [trained - began, time.perf_counter() - trained]
    weights = sum(tensor.nbytes for tensor in training.model.state_dict().values())
    return Trial(spent[0] / sizes[train].sum(), spent[1] / sizes[val].sum(), weights)


def _some(slides: np.ndarray, sizes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Slides of every class in turn, until they hold enough patches."""
    turns = np.zeros(len(slides), dtype=int)
    for label in np.unique(labels[slides]):
        mine = labels[slides] == label
        turns[mine] = np.arange(mine.sum())
    dealt = slides[np.argsort(turns, kind="stable")]
    enough = int(np.searchsorted(sizes[dealt].cumsum(), _TRIAL_PATCHES)) + 1
    return dealt[: max(enough, len(np.unique(labels[slides])))]


def splits_table(folds: Sequence[OuterFold], data: Bags, cases: np.ndarray) -> str:
    """Slides, and in brackets patients, of each part of each fold and class."""
    rows = [["slides (patients)", *data.class_names]]
    for fold in folds[:_MOST_FOLDS_SHOWN]:
        parts = {f"fold {fold.number}: test": fold.test}
        for number, inner in enumerate(fold.inner, start=1):
            parts |= {f"inner {number}: train": inner.train, f"inner {number}: validation": inner.val}
        rows += [[name, *_counts(part, data, cases)] for name, part in parts.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    more = len(folds) - _MOST_FOLDS_SHOWN
    return "\n".join([*lines, f"and {more} folds more"] if more > 0 else lines)


def _counts(slides: np.ndarray, data: Bags, cases: np.ndarray) -> list[str]:
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

    def text(self, jobs: int, folder: Path) -> str:
        free = shutil.disk_usage(_existing(folder)).free
        lines = [
            f"time: about {duration(self.seconds)} of training at the trial's speed, less if stopped early",
            f"disk: {file_size(self.kept)} of checkpoints, {file_size(self.meanwhile)} more until the run ends; "
            f"{file_size(free)} free",
        ]
        if self.process is not None:
            processes = "" if jobs == 1 else f" for each of {jobs} processes"
            lines.append(
                f"memory: about {file_size(self.process)}{processes}, and {file_size(self.features)} of features"
            )
        if self.device is not None:
            lines.append(f"GPU memory: about {file_size(self.device * jobs)}")
        if self.kept + self.meanwhile > free:
            lines.append(f"warning: {folder} has too little disk for this run; give another --output_dir")
        return "\n".join(lines)


def estimate(
    units: Sequence[Unit],
    trials: Sequence[Trial],
    sizes: np.ndarray,
    *,
    checkpoints: int,
    jobs: int,
    packed: int,
    in_memory: int,
    device: torch.device,
) -> Estimate:
    """What the units, and as many `checkpoints`, would take. `trials` are of the settings, in their order; `sizes
    (slides,)` are patches; `packed` bytes are to be written for the run, `in_memory` bytes of features kept there.
    """
    seconds = [trials[unit.setting - 1].seconds(unit, sizes) for unit in units]
    # Several jobs share the time out, but none is shorter than its longest training.
    most = max(sum(seconds) / jobs, *seconds)
    model = max(one.model_bytes for one in trials)
    peak = peak_memory(device)
    meanwhile = len(units) * model + packed
    return Estimate(most, checkpoints * model, meanwhile, peak["process"], peak["device"], in_memory)


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())
