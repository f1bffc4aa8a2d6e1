"""Predictions for labelled slides, and all metrics computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from utils.evaluation.intervals import Estimate, Interval, ScoredRows
from utils.evaluation.prediction_rows import PredictionRows
from utils.evaluation.resampling import pooled_metrics
from utils.tasks.metrics import mean_and_std
from utils.tasks.records import task_of
from utils.tasks.task import Figures


@dataclass(frozen=True)
class Ranking:
    """AUC and average precision of a class against the rest, with their 95% intervals; the same AUC within folds, if
    there are some; and the share of the slides that are of the class.
    """

    auc: Estimate
    average_precision: Estimate
    auc_within_folds: Estimate | None
    prevalence: float


@dataclass(frozen=True, eq=False)
class Predictions(PredictionRows):
    """Predictions, one row per slide and repeat, with all their metrics."""

    @cached_property
    def metrics(self) -> Figures:
        """Every metric of the task, the mean over the repeats."""
        return pooled_metrics(self.task, self.labels, self.values, self.repeats)

    @property
    def scored(self) -> ScoredRows:
        """The rows as `intervals` takes them."""
        units, unit = (self.cases, "patient") if self.groups is None else (self.groups, "group")
        return ScoredRows(self.task, self.labels, self.values, units, self.repeats, self.folds, unit)

    @cached_property
    def pooled(self) -> dict[str, Estimate]:
        """Every metric of all slides with its 95% interval over patients, or over groups if there are some."""
        return self.scored.estimates(self.scored.pooled, self.seed)

    @cached_property
    def within_folds(self) -> dict[str, Estimate]:
        """The metrics that rank slides, comparing slides of a fold only; none without folds."""
        return {} if self.folds is None else self.scored.estimates(self.scored.within_folds, self.seed)

    @cached_property
    def mean_of_folds(self) -> dict[str, Estimate]:
        """The means over the folds of the metrics that rank slides; none without folds."""
        return {} if self.folds is None else self.scored.estimates(self.scored.mean_of_folds, self.seed)

    @property
    def ranked_within(self) -> dict[str, Estimate]:
        """The metrics that rank slides within folds, as far as they are defined there."""
        return {name: estimate for name, estimate in self.within_folds.items() if estimate.value is not None}

    @property
    def reported(self) -> Figures:
        """Every metric as it is to be reported: within folds if it ranks slides and is defined there, else of all
        slides.
        """
        return self.metrics | {name: estimate.value for name, estimate in self.ranked_within.items()}

    @property
    def reported_estimates(self) -> dict[str, Estimate]:
        """The same, with their 95% intervals."""
        return self.pooled | self.ranked_within

    @property
    def further(self) -> dict[str, Any]:
        """The task's further figures, of the first repeat's patients."""
        first = self.where(self.repeats == self.repeats.min()).by_case()
        return self.task.further_figures(first.labels, first.values, first.folds, first.decisions)

    @property
    def intervals(self) -> dict[str, Interval]:
        """The 95% interval of every metric of all slides."""
        return {name: estimate.interval for name, estimate in self.pooled.items()}

    @property
    def calibrated_metrics(self) -> Figures | None:
        """The metrics that calibration should improve, of the calibrated values."""
        return None if self.calibrated is None else self.metrics_of(self.calibrated, self.task.calibration_metrics)

    def metrics_of(self, values: np.ndarray, names: Sequence[str]) -> Figures:
        """Return these metrics of the slides, given other values `(n, C)` than the predicted ones."""
        figures = pooled_metrics(self.task, self.labels, values, self.repeats)
        return {name: figures[name] for name in names}

    @cached_property
    def decided(self) -> dict[str, Estimate]:
        """The metrics of the decisions at a threshold, with their 95% intervals; none without decisions."""
        if not self.decision_metrics:
            return {}
        certain = np.eye(len(self.task.outputs))[self.decisions]
        pooled = replace(self, values=certain, decisions=None).pooled
        return {name: pooled[name] for name in self.decision_metrics}

    @property
    def decision_metrics(self) -> Figures | None:
        """The metrics of the decisions at a threshold, the mean over the repeats; None if the task has none."""
        if self.decisions is None:
            return None
        masks = [self.repeats == repeat for repeat in np.unique(self.repeats)]
        by_repeat = [self.task.decision_metrics(self.labels[rows], self.decisions[rows]) for rows in masks]
        return {name: mean_and_std([metrics[name] for metrics in by_repeat])[0] for name in by_repeat[0]} or None

    def ranked(self, index: int) -> RankedRows:
        """Return the rows that a ranked output ranks, as those of two classes."""
        positive, negative = self.task.sides(index, self.labels)
        known = positive | negative
        scores = self.values[known, index]
        two_classes = replace(
            self.where(known),
            task=task_of({"class_names": ("other classes", "the class")}),
            labels=positive[known].astype(int),
            values=np.stack([1 - scores, scores], axis=1),
        )
        return RankedRows(two_classes)

    @cached_property
    def rankings(self) -> dict[int, Ranking]:
        """The ranking of each of the task's `ranked_outputs`."""
        return {index: self._ranking(index) for index in self.task.ranked_outputs}

    def _ranking(self, index: int) -> Ranking:
        ranked, own = self.ranked(index), self.task.ranking_metrics(index)
        source, (auc, precision) = (ranked.rows, ("auc", "average_precision")) if own is None else (self, own)
        return Ranking(
            source.pooled[auc], source.pooled[precision], source.within_folds.get(auc), float(ranked.is_positive.mean())
        )


@dataclass(frozen=True, eq=False)
class RankedRows:
    """The predictions that a class, a label or the like ranks: `rows` of two classes, the second one is positive."""

    rows: Predictions

    @property
    def is_positive(self) -> np.ndarray:
        """Which rows are positive, `(n,)` bool."""
        return self.rows.labels == 1

    @property
    def scores(self) -> np.ndarray:
        """The values `(n,)` that rank the rows."""
        return self.rows.values[:, 1]

    @property
    def repeats(self) -> np.ndarray:
        """The repeats `(n,)` of the rows."""
        return self.rows.repeats
