"""Training jobs: each is trained once, in this process or another, saved to a file and read back from it."""

import functools
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from MILS import build_mil
from utils.bags.dataset import MILDataset, on_device
from utils.core.device import repeatable
from utils.core.errors import DivergedError, TrainingError
from utils.core.processes import Send
from utils.core.runtime import derive_seed, keep_freed_memory, log
from utils.core.tensor_files import load_tensors, save_tensors
from utils.learning.early_stopping import EarlyStopping
from utils.learning.grid import Setting
from utils.learning.model_factory import ModelFactory, as_training_errors
from utils.learning.settings import Training
from utils.learning.splits import OuterFold
from utils.learning.training import Diverged, Fitted, fit, refit
from utils.prediction.forward_pass import SlideFeed


@dataclass(frozen=True)
class TrainingJob:
    """One training, which is resumed as a whole. `setting` counts from 1, `inner` folds too; `inner` 0 is the refit on
    the whole outer training set, that of fold 0 on all slides. At most `epochs` are compared by `monitor`, unless the
    last is kept.
    """

    fold: OuterFold
    setting: int
    inner: int
    epochs: int
    monitor: str
    standardize: bool = False
    keep: Literal["last", "best"] = "best"

    @property
    def title(self) -> str:
        """Return which training this is, for messages."""
        if not self.fold.number:
            return "all slides"
        return f"outer fold {self.fold.number}, {f'inner fold {self.inner}' if self.inner else 'refit'}"

    @property
    def name(self) -> str:
        return f"fold_{self.fold.number}_setting_{self.setting}_inner_{self.inner}"


@dataclass(frozen=True)
class Trainer:
    """Trains jobs and saves each to a file in `folder`; can be sent to other processes."""

    model_factory: ModelFactory
    spec: dict[str, Any]
    settings: tuple[Setting, ...]
    training: Training
    dataset: MILDataset
    feed: SlideFeed
    device: torch.device
    seed: int
    folder: Path
    deterministic: bool = False

    def on_device(self, processes: int) -> "Trainer":
        """Return a trainer that keeps the features on its device, if that is a CUDA device and they fit (see
        `bags.dataset.on_device`). So many processes share the device.
        """
        if self.device.type != "cuda":
            return self
        # Whether features fit, and so are rounded, depends on what else runs on the device.
        is_exact = self.deterministic or self.training.amp_precision == "fp32"
        return replace(self, dataset=on_device(self.dataset, self.device, processes=processes, is_exact=is_exact))

    def __call__(self, job: TrainingJob, send: Send) -> None:
        keep_freed_memory()
        try:
            with repeatable(self.device, self.deterministic), as_training_errors():
                fitted = self._train(job, send)
        except TrainingError as error:
            setting = str(self.settings[job.setting - 1])
            with_setting = f" with {setting}" if setting else ""
            reason = f"{job.title}{with_setting}: {error}"
            if not (isinstance(error, DivergedError) and job.inner and len(self.settings) > 1):
                remedy = "; or leave this setting out of --grid" if setting else ""
                raise TrainingError(f"{reason}{remedy}") from error
            fitted = Diverged(reason)  # another setting may work
        save_tensors(self.path(job), {field.name: getattr(fitted, field.name) for field in fields(fitted)})
        send(None)

    def _train(self, job: TrainingJob, send: Send) -> Fitted:
        setting = self.settings[job.setting - 1]
        common: dict[str, Any] = {
            "seed": derive_seed(self.seed, "outer", job.fold.number, "inner", job.inner, str(setting)),
            "device": self.device,
            "on_epoch": send,
        }
        factory, training = self.factory(setting), self.training_of(job)
        dataset = self.dataset.fitted_to(job.fold.train)
        if not job.inner:
            return refit(factory, dataset, job.fold.train, training, epochs=job.epochs, **common)
        inner = job.fold.inner[job.inner - 1]
        stopping = EarlyStopping(dataset.task, inner.val, self.feed, job.monitor, job.keep)
        return fit(factory, dataset, inner.train, stopping, training, **common)

    def training_of(self, job: TrainingJob) -> Training:
        """Return the job's settings of training."""
        standardize = "on" if job.standardize else "off"
        return replace(self.training, **self.settings[job.setting - 1].training, standardize=standardize)

    def factory(self, setting: Setting) -> ModelFactory:
        """Return the factory of a setting's models: the one given, with the setting's hyperparameters."""
        return functools.partial(build_mil, **(self.spec | setting.model)) if setting.model else self.model_factory

    def path(self, job: TrainingJob) -> Path:
        return self.folder / f"{job.name}.pt"

    def saved(self, job: TrainingJob) -> Fitted | Diverged | None:
        """Return the job's saved result, or None if there is none; a damaged file is removed."""
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

    def saved_epochs(self, job: TrainingJob) -> int | None:
        """Return how many epochs the saved job took, 0 if it diverged; None if it is not saved."""
        saved = self.saved(job)
        return len(saved.history) if isinstance(saved, Fitted) else None if saved is None else 0
