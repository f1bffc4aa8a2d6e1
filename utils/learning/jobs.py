"""Training jobs: each one is trained once, in this process or another, and then read back."""

import functools
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from MILS import build_mil
from utils.bags.dataset import MILDataset
from utils.core.engine import Send
from utils.core.errors import DivergedError, TrainingError
from utils.core.runtime import derive_seed, keep_freed_memory, log
from utils.core.tensors import load_tensors, save_tensors
from utils.learning.early_stopping import EarlyStopping
from utils.learning.grid import Setting
from utils.learning.model_factory import ModelFactory
from utils.learning.settings import Training
from utils.learning.splits import OuterFold
from utils.learning.training import Diverged, Fitted, fit, refit
from utils.prediction.feeding import SlideFeed


@dataclass(frozen=True)
class TrainingJob:
    """One training, the job of resume: with which setting (from 1), on which inner fold (from 1; 0 is the refit on the
    whole outer training set), for at most how many epochs, compared by what; whether its model standardises features.
    """

    fold: OuterFold
    setting: int
    inner: int
    epochs: int
    monitor: str
    standardize: bool = False

    @property
    def name(self) -> str:
        return f"fold_{self.fold.number}_setting_{self.setting}_inner_{self.inner}"


@dataclass(frozen=True)
class Trainer:
    """Trains jobs and keeps each in a file of `folder`; can be sent to other processes."""

    model_factory: ModelFactory
    spec: dict[str, Any]
    settings: tuple[Setting, ...]
    training: Training
    dataset: MILDataset
    feed: SlideFeed
    device: torch.device
    seed: int
    folder: Path

    def __call__(self, job: TrainingJob, send: Send) -> None:
        keep_freed_memory()
        try:
            fitted = self._train(job, send)
        except TrainingError as error:
            part = f"inner fold {job.inner}" if job.inner else "refit"
            setting = str(self.settings[job.setting - 1])
            at_setting = f" with {setting}" if setting else ""
            reason = f"outer fold {job.fold.number}, {part}{at_setting}: {error}"
            if not (isinstance(error, DivergedError) and job.inner and len(self.settings) > 1):
                remedy = "; or leave this setting out of --grid" if setting else ""
                raise TrainingError(f"{reason}{remedy}") from error
            fitted = Diverged(reason)  # the other settings may do
        save_tensors(self.path(job), {part.name: getattr(fitted, part.name) for part in fields(fitted)})
        send(None)

    def _train(self, job: TrainingJob, send: Send) -> Fitted:
        setting = self.settings[job.setting - 1]
        common: dict[str, Any] = {
            "seed": derive_seed(self.seed, "outer", job.fold.number, "inner", job.inner, str(setting)),
            "device": self.device,
            "on_epoch": send,
        }
        factory, training = self.factory(setting), self.training_of(job)
        if not job.inner:
            return refit(factory, self.dataset, job.fold.train, training, epochs=job.epochs, **common)
        inner = job.fold.inner[job.inner - 1]
        stopping = EarlyStopping(inner.val, self.feed, job.monitor)
        return fit(factory, self.dataset, inner.train, stopping, training, **common)

    def training_of(self, job: TrainingJob) -> Training:
        """The job's settings of training."""
        standardize = "on" if job.standardize else "off"
        return replace(self.training, **self.settings[job.setting - 1].training, standardize=standardize)

    def factory(self, setting: Setting) -> ModelFactory:
        """What makes the setting's models: the given factory, or its models with other hyperparameters."""
        return functools.partial(build_mil, **(self.spec | setting.model)) if setting.model else self.model_factory

    def path(self, job: TrainingJob) -> Path:
        return self.folder / f"{job.name}.pt"

    def kept(self, job: TrainingJob) -> Fitted | Diverged | None:
        """The job as an earlier run, or another process, ended it; None where there is none that can be read."""
        path = self.path(job)
        if not path.is_file():
            return None
        try:
            content = load_tensors(path, TrainingError, "resume state")
            kind = Diverged if isinstance(content, dict) and "reason" in content else Fitted
            return kind(**content)
        except (TrainingError, TypeError):
            log.warning("%s: damaged resume state; this training is done again", path)
            path.unlink()
            return None

    def epochs_of_kept(self, job: TrainingJob) -> int | None:
        """Return after how many epochs the kept job ended; None where it is not kept."""
        kept = self.kept(job)
        return len(kept.history) if isinstance(kept, Fitted) else None if kept is None else 0
