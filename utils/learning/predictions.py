"""What models said of labelled slides, with what a figure of it needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from utils.learning.statistics import bootstrap_intervals, pooled_metrics


@dataclass(frozen=True)
class Ranking:
    """How well one class is ranked before the others: AUC and average precision, each None where undefined, with their
    95% intervals over patients; and the share of the slides that are of the class.
    """

    auc: float | None
    auc_interval: tuple[float, float] | None
    average_precision: float | None
    average_precision_interval: tuple[float, float] | None
    prevalence: float


@dataclass(frozen=True, eq=False)
class Predictions:
    """A row per slide and repeat: `labels (n,)` int, `probabilities (n, C)`, `cases (n,)` the patients, `repeats (n,)`;
    where there are folds `folds (n,)`, where there is a temperature the `calibrated (n, C)` probabilities.

    `seed` draws the patients of the intervals. `title` says which slides, by default the out-of-fold ones.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    class_names: Sequence[str]
    cases: np.ndarray
    repeats: np.ndarray
    seed: int
    folds: np.ndarray | None = None
    calibrated: np.ndarray | None = None
    title: str = ""

    @property
    def times(self) -> int:
        """How many repeats there are."""
        return len(np.unique(self.repeats))

    @property
    def ranked_classes(self) -> Sequence[int]:
        """The classes that are ranked before the others: the positive one of two, each of more."""
        return [1] if len(self.class_names) == 2 else range(len(self.class_names))

    def one_against_rest(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which rows are of a class, `(n,)` bool, and its probabilities `(n,)`."""
        return self.labels == index, self.probabilities[:, index]

    @cached_property
    def rankings(self) -> dict[int, Ranking]:
        """By class."""
        return {index: self._ranking(index) for index in self.ranked_classes}

    def _ranking(self, index: int) -> Ranking:
        is_class, scores = self.one_against_rest(index)
        labels, probabilities = is_class.astype(int), np.stack([1 - scores, scores], axis=1)
        figures = pooled_metrics(labels, probabilities, self.repeats)
        intervals = bootstrap_intervals(labels, probabilities, self.cases, self.seed, repeats=self.repeats)
        return Ranking(
            figures["auc"], intervals["auc"], figures["average_precision"], intervals["average_precision"],
            float(is_class.mean()),
        )  # fmt: skip
