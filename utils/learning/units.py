"""Units of training: each one is trained once, in this process or another, and then read back."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from MILS import build_mil
from MILS.bag_model import BagModel
from utils.bags.dataset import MILDataset
from utils.core.engine import Tell
from utils.core.errors import DivergedError, TrainingError
from utils.core.runtime import derive_seed, keep_freed_memory, log
from utils.core.tensors import load_tensors, save_tensors
from utils.learning.selection import Setting
from utils.learning.settings import Training
from utils.learning.splits import OuterFold
from utils.learning.training import Diverged, Fitted, fit, refit
from utils.prediction.feeding import SlideFeed

ModelFactory = Callable[[], BagModel]


@dataclass(frozen=True)
class Unit:
    """One training, the unit of resume: with which setting (from 1), on which inner fold (from 1; 0 is the refit on the
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
    """Trains units and keeps each in a file of `folder`; can be sent to other processes."""

    model_factory: ModelFactory
    spec: dict[str, Any]
    settings: tuple[Setting, ...]
    training: Training
    dataset: MILDataset
    feed: SlideFeed
    device: torch.device
    seed: int
    folder: Path

    def __call__(self, unit: Unit, tell: Tell) -> None:
        keep_freed_memory()
        try:
            fitted = self._train(unit, tell)
        except TrainingError as error:
            part = f"inner fold {unit.inner}" if unit.inner else "refit"
            setting = str(self.settings[unit.setting - 1])
            at_setting = f" with {setting}" if setting else ""
            reason = f"outer fold {unit.fold.number}, {part}{at_setting}: {error}"
            if not (isinstance(error, DivergedError) and unit.inner and len(self.settings) > 1):
                remedy = "; or leave this setting out of --grid" if setting else ""
                raise TrainingError(f"{reason}{remedy}") from error
            fitted = Diverged(reason)  # the other settings may do
        save_tensors(self.path(unit), {part.name: getattr(fitted, part.name) for part in fields(fitted)})
        tell(None)

    def _train(self, unit: Unit, tell: Tell) -> Fitted:
        setting = self.settings[unit.setting - 1]
        common: dict[str, Any] = {
            "seed": derive_seed(self.seed, "outer", unit.fold.number, "inner", unit.inner, str(setting)),
            "device": self.device,
            "on_epoch": tell,
        }
        factory, training = self.factory(setting), self.training_of(unit)
        if not unit.inner:
            return refit(factory, self.dataset, unit.fold.train, training, epochs=unit.epochs, **common)
        inner = unit.fold.inner[unit.inner - 1]
        return fit(
            factory, self.dataset, inner.train, inner.val, training, monitor=unit.monitor, feed=self.feed, **common
        )

    def training_of(self, unit: Unit) -> Training:
        """The unit's settings of training."""
        standardize = "on" if unit.standardize else "off"
        return replace(self.training, **self.settings[unit.setting - 1].training, standardize=standardize)

    def factory(self, setting: Setting) -> ModelFactory:
        """What makes the setting's models: the given factory, or its models with other hyperparameters."""
        return functools.partial(build_mil, **(self.spec | setting.model)) if setting.model else self.model_factory

    def path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.pt"

    def kept(self, unit: Unit) -> Fitted | Diverged | None:
        """The unit as an earlier run, or another process, ended it; None where there is none that can be read."""
        path = self.path(unit)
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

    def epochs_of_kept(self, unit: Unit) -> int | None:
        """Return after how many epochs the kept unit ended; None where it is not kept."""
        kept = self.kept(unit)
        return len(kept.history) if isinstance(kept, Fitted) else None if kept is None else 0
