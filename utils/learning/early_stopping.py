"""Early stopping: which epoch of a training is kept, and when the training ends."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from utils.learning.ranking import Validation, rank
from utils.learning.settings import Training
from utils.prediction.forward_pass import SlideFeed
from utils.tasks.task import Task


@dataclass(frozen=True)
class EarlyStopping:
    """The task of a training, its validation slides, how they are fed to the model, the metric that compares its
    epochs, and which epoch is kept: the best by that metric, or the last.
    """

    task: Task
    slides: np.ndarray
    feed: SlideFeed
    monitor: str
    keep: Literal["last", "best"] = "best"

    def may_keep(self, epoch: int, steps: int, settings: Training) -> bool:
        """Return whether an epoch, after which the training has taken so many optimiser steps, may be kept. The last
        one always may.
        """
        return epoch == settings.epochs or (self.keep == "best" and steps >= settings.least_steps)

    def is_better(self, validation: Validation, best: Validation) -> bool:
        """Return whether an epoch's validation is better than the best so far, of an earlier epoch, or as good by the
        metric: a longer training is preferred.
        """
        return rank(self.task, validation, self.monitor)[0] >= rank(self.task, best, self.monitor)[0]

    def is_over(self, epoch: int, best_epoch: int, settings: Training) -> bool:
        """Return whether the training ends: the best epoch is `patience` epochs back and the warm-up is over."""
        return epoch - best_epoch >= settings.patience and epoch > settings.warmup
