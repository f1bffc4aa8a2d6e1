"""Predictions for labelled slides: the table `predictions.csv`, and all metrics computed from it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from utils.evaluation.intervals import Estimate, Interval, ScoredRows
from utils.evaluation.resampling import pooled_metrics
from utils.tasks.metrics import mean_and_std
from utils.tasks.records import task_of
from utils.tasks.task import Figures, Task

if TYPE_CHECKING:
    import pandas as pd


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
class Predictions:
    """Predictions, one row per slide and repeat.

    Attributes
        slides (n,), cases (n,): ids of the slides and of their patients.
        groups (n,): what the splits keep together, if it is more than a patient, or None.
        labels (n,) or (n, k): the targets; of a classification the indices of the classes.
        values (n, C): the task's values, such as probabilities; calibrated (n, C): those calibrated on inner
            validation, or None.
        repeats (n,), folds (n,): int, from 1; folds may be None.
        decisions (n,): int, the class at a threshold fitted on inner validation, or None.
        seed: of the resampled patients of some intervals.
        title: names the slides; by default they are the out-of-fold slides.
    """

    slides: np.ndarray
    cases: np.ndarray
    labels: np.ndarray
    values: np.ndarray
    task: Task
    repeats: np.ndarray
    seed: int
    folds: np.ndarray | None = None
    calibrated: np.ndarray | None = None
    decisions: np.ndarray | None = None
    groups: np.ndarray | None = None
    title: str = ""

    @classmethod
    def read(cls, path: Path, seed: int, task: Task | None = None) -> Self:
        """Read a `predictions.csv` of a training; without a task, the classes are those of its columns.

        Raises OSError or ValueError with what is wrong with the table.
        """
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, strict=True))
        except csv.Error as failure:
            raise ValueError(str(failure)) from failure
        if not rows:
            raise ValueError("no slide in it")
        if task is None:
            names = [name.removeprefix("prob_") for name in rows[0] if name.startswith("prob_")]
            if not names:
                raise ValueError("no column prob_<class>")
            task = task_of({"class_names": names})
        missing = [name for name in ("wsi_id", "case_id", *task.columns, "fold") if name not in rows[0]]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}")
        values, calibrated = task.values_in(rows)
        try:
            labels = np.array([task.target(row) for row in rows])
        except ValueError as failure:
            raise ValueError(f"a row with a {task.no_target}") from failure
        return cls(
            slides=np.array([row["wsi_id"] for row in rows]),
            cases=np.array([row["case_id"] for row in rows]),
            labels=labels,
            values=values,
            task=task,
            repeats=np.array([int(row.get("repeat", 1)) for row in rows]),
            seed=seed,
            folds=np.array([int(row["fold"]) for row in rows]),
            calibrated=calibrated,
            decisions=_decisions(rows, task.decision_column),
            groups=np.array([row["group"] for row in rows]) if "group" in rows[0] else None,
        )

    def table(self) -> pd.DataFrame:
        """Return the table of `predictions.csv`."""
        import pandas as pd

        columns: dict[str, Any] = {"wsi_id": self.slides, "case_id": self.cases}
        columns |= self.task.table_columns(self.labels, self.values, self.calibrated)
        if self.task.decision_column is not None and self.decisions is not None:
            columns[self.task.decision_column] = self.decisions
        columns |= {} if self.folds is None else {"fold": self.folds}
        columns |= {} if self.groups is None else {"group": self.groups}
        return pd.DataFrame(columns | {"repeat": self.repeats})

    def __len__(self) -> int:
        return len(self.slides)

    def where(self, rows: np.ndarray) -> Self:
        """Return the rows selected by indices `rows (m,)`, in their order, or by `rows (n,)` bool."""
        columns = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **columns)

    def mean_over_repeats(self) -> Self:
        """Return one row per slide with the mean of its values over the repeats, in the order of first occurrence."""
        _, first, row_of = np.unique(self.slides, return_index=True, return_inverse=True)
        means = np.zeros((len(first), self.values.shape[1]))
        np.add.at(means, row_of, self.values)
        means /= np.bincount(row_of)[:, None]
        order = np.argsort(first)
        rows = self.where(first[order])
        return replace(rows, values=means[order], folds=None, calibrated=None, decisions=None)

    def by_case(self) -> Self:
        """Return one row per patient, repeat and target (see `Task.case_keys`), in the order of first occurrence: the
        mean of the slides' targets and values, and the decision of most slides, of equally many the greater one.
        """
        keys = zip(self.repeats.tolist(), self.cases.tolist(), self.task.case_keys(self.labels).tolist(), strict=True)
        numbers: dict[Any, int] = {}
        row_of = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
        first = np.unique(row_of, return_index=True)[1]

        def mean(values: np.ndarray | None) -> np.ndarray | None:
            if values is None:
                return None
            sums = np.zeros((len(first), *values.shape[1:]))
            np.add.at(sums, row_of, values)
            return sums / np.bincount(row_of).reshape(-1, *[1] * (values.ndim - 1))

        labels, values, decisions = mean(self.labels), mean(self.values), mean(self.decisions)
        assert labels is not None  # noqa: S101 - for the type checker
        assert values is not None  # noqa: S101 - for the type checker
        return replace(
            self.where(first), labels=labels.astype(self.labels.dtype), values=values, calibrated=mean(self.calibrated),
            decisions=None if decisions is None else (decisions >= 0.5).astype(int), slides=self.cases[first],
        )  # fmt: skip

    @property
    def target_texts(self) -> np.ndarray:
        """The targets as a reader sees them, `(n,)`."""
        return self.task.target_text(self.labels)

    @property
    def n_slides(self) -> int:
        return len(np.unique(self.slides))

    @property
    def n_cases(self) -> int:
        return len(np.unique(self.cases))

    @property
    def n_groups(self) -> int | None:
        """The number of groups that intervals are computed over; None if they are computed over patients."""
        return None if self.groups is None else len(np.unique(self.groups))

    @property
    def n_repeats(self) -> int:
        return len(np.unique(self.repeats))

    @property
    def n_folds(self) -> int:
        return 0 if self.folds is None else len(np.unique(self.folds))

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
        """The metrics of the decisions at a threshold, the mean over the repeats."""
        if self.decisions is None:
            return None
        masks = [self.repeats == repeat for repeat in np.unique(self.repeats)]
        by_repeat = [self.task.decision_metrics(self.labels[rows], self.decisions[rows]) for rows in masks]
        return {name: mean_and_std([metrics[name] for metrics in by_repeat])[0] for name in by_repeat[0]}

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


def _decisions(rows: Sequence[Mapping[str, str]], column: str | None) -> np.ndarray | None:
    return np.array([int(row[column]) for row in rows]) if column is not None and column in rows[0] else None
