"""Early stopping: which epoch of a training is kept, and when the training ends."""

from dataclasses import dataclass

import numpy as np

from utils.learning.ranking import Validation, rank
from utils.prediction.forward_pass import SlideFeed
from utils.tasks.task import Task


@dataclass(frozen=True)
class EarlyStopping:
    """The task of a training, its validation slides, how they are fed to the model, and the metric that compares its
    epochs.
    """

    task: Task
    slides: np.ndarray
    feed: SlideFeed
    monitor: str

    def is_better(self, validation: Validation, best: Validation) -> bool:
        """Return whether an epoch's validation is better than the best so far."""
        return rank(self.task, validation, self.monitor) > rank(self.task, best, self.monitor)

    def is_over(self, epoch: int, best_epoch: int, patience: int) -> bool:
        """Return whether the training ends: the best epoch is `patience` epochs back."""
        return epoch - best_epoch >= patience
