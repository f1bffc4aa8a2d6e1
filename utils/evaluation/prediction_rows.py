"""Predictions for labelled slides as rows: the table `predictions.csv`, and the rows of patients."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from utils.tasks.records import task_of
from utils.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class PredictionRows:
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
        unit: what a row is of, "slide" or "patient".
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
    unit: str = "slide"

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

        values, decisions = mean(self.values), mean(self.decisions)
        slides_of = np.split(np.argsort(row_of, kind="stable"), np.bincount(row_of).cumsum()[:-1])
        labels = np.array([self.task.of_case(self.labels[rows]) for rows in slides_of])
        assert values is not None  # noqa: S101 - for the type checker
        return replace(
            self.where(first), labels=labels, values=values, calibrated=mean(self.calibrated),
            decisions=None if decisions is None else (decisions >= 0.5).astype(int), slides=self.cases[first],
            unit="patient",
        )  # fmt: skip

    def by_unit(self) -> dict[str, Self]:
        """Return the rows by what they are of, those to be reported first: where a patient has several
        slides, those of patients, then those of slides; else the rows as they are, named by the task's unit if they
        are of slides.
        """
        cases = self.by_case()
        if len(cases) < len(self):
            return {cases.unit: cases, self.unit: self}
        return {self.task.unit if self.unit == "slide" else self.unit: self}

    @property
    def primary_unit(self) -> str:
        """What the figures to report are of: "patient" where a patient has several slides, else "slide"; of a task that
        has one target a patient always "patient".
        """
        return next(iter(self.by_unit()))

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


def _decisions(rows: Sequence[Mapping[str, str]], column: str | None) -> np.ndarray | None:
    return np.array([int(row[column]) for row in rows]) if column is not None and column in rows[0] else None
