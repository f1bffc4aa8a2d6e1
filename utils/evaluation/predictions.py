"""What models say of labelled slides: the table `predictions.csv`, and everything that is computed from it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from utils.evaluation.bootstrap import bootstrap_draws, bootstrap_intervals, pooled_metrics
from utils.evaluation.metrics import decision_metrics, mean_and_std

if TYPE_CHECKING:
    import pandas as pd

# What temperature scaling is there to mend.
CALIBRATION = ("brier", "ece")
Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Ranking:
    """How well one class is ranked before the others: AUC and average precision, each None where undefined, with their
    95% intervals over patients; and the share of the slides that are of the class.
    """

    auc: float | None
    auc_interval: Interval
    average_precision: float | None
    average_precision_interval: Interval
    prevalence: float


@dataclass(frozen=True, eq=False)
class Predictions:
    """A row per slide and repeat.

    Attributes
        slides (n,), cases (n,): ids of the slides, and of their patients.
        labels (n,): int, the class.
        probabilities (n, C): what was said; calibrated (n, C): the same, temperature-scaled, where that was done.
        repeats (n,), folds (n,): int, from 1; folds are None where there are none.
        decisions (n,): int, the class at a threshold fitted on inner validation, where there is one.
        seed: draws the patients of the intervals.
        title: which slides these are, by default the out-of-fold ones.
    """

    slides: np.ndarray
    cases: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    class_names: Sequence[str]
    repeats: np.ndarray
    seed: int
    folds: np.ndarray | None = None
    calibrated: np.ndarray | None = None
    decisions: np.ndarray | None = None
    title: str = ""

    @classmethod
    def read(cls, path: Path, seed: int, class_names: Sequence[str] | None = None) -> Self:
        """Read a `predictions.csv` of a training; the classes are those of its columns, where they are not given.

        Raises OSError or ValueError, which say what is wrong with the table.
        """
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file, strict=True))
        except csv.Error as failure:
            raise ValueError(str(failure)) from failure
        if not rows:
            raise ValueError("no slide in it")
        own = [name.removeprefix("prob_") for name in rows[0] if name.startswith("prob_")]
        names = list(own if class_names is None else class_names)
        columns = ["wsi_id", "case_id", "label", "fold", *(f"prob_{name}" for name in names)]
        missing = [name for name in columns if name not in rows[0]]
        if missing or not names:
            raise ValueError(f"no column {', '.join(missing or ['prob_<class>'])}")
        if not {row["label"] for row in rows} <= set(names):
            raise ValueError("a label that is no class")
        scaled = [f"calibrated_{name}" for name in names]
        return cls(
            slides=np.array([row["wsi_id"] for row in rows]),
            cases=np.array([row["case_id"] for row in rows]),
            labels=np.array([names.index(row["label"]) for row in rows]),
            probabilities=_numbers(rows, columns[4:]),
            class_names=names,
            repeats=np.array([int(row.get("repeat", 1)) for row in rows]),
            seed=seed,
            folds=np.array([int(row["fold"]) for row in rows]),
            calibrated=_numbers(rows, scaled) if set(scaled) <= rows[0].keys() else None,
        )

    def table(self) -> pd.DataFrame:
        """Return the rows as `predictions.csv` has them."""
        import pandas as pd

        names = self.class_names
        columns: dict[str, Any] = {
            "wsi_id": self.slides,
            "case_id": self.cases,
            "label": self.label_names,
            "predicted": np.array(names)[self.predicted],
        }
        columns |= {f"prob_{name}": self.probabilities[:, index] for index, name in enumerate(names)}
        if self.calibrated is not None:
            columns |= {f"calibrated_{name}": self.calibrated[:, index] for index, name in enumerate(names)}
        columns |= {} if self.folds is None else {"fold": self.folds}
        return pd.DataFrame(columns | {"repeat": self.repeats})

    def __len__(self) -> int:
        return len(self.slides)

    def where(self, rows: np.ndarray) -> Self:
        """Return some of the rows, in their order or in another: `rows (m,)` are indices, or `(n,)` bool."""
        parts = {
            name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray) and name in _ROWS
        }
        return replace(self, **parts)

    def mean_over_repeats(self) -> Self:
        """Return a row per slide, the mean of what the repeats say of it, in the order of their first rows."""
        _, first, row_of = np.unique(self.slides, return_index=True, return_inverse=True)
        means = np.zeros((len(first), len(self.class_names)))
        np.add.at(means, row_of, self.probabilities)
        means /= np.bincount(row_of)[:, None]
        order = np.argsort(first)
        rows = self.where(first[order])
        return replace(rows, probabilities=means[order], folds=None, calibrated=None, decisions=None)

    @property
    def predicted(self) -> np.ndarray:
        """`(n,)` int, the class of the largest probability."""
        return self.probabilities.argmax(axis=1)

    @property
    def label_names(self) -> np.ndarray:
        """`(n,)` str"""
        return np.array(self.class_names)[self.labels]

    @property
    def n_slides(self) -> int:
        return len(np.unique(self.slides))

    @property
    def n_cases(self) -> int:
        return len(np.unique(self.cases))

    @property
    def n_repeats(self) -> int:
        return len(np.unique(self.repeats))

    @property
    def n_folds(self) -> int:
        return 0 if self.folds is None else len(np.unique(self.folds))

    @cached_property
    def metrics(self) -> dict[str, float | None]:
        """Every figure (see `metrics.metric_names`), of several repeats their mean."""
        return pooled_metrics(self.labels, self.probabilities, self.repeats, self.class_names)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Of every figure the 95% interval over patients (see `bootstrap.bootstrap_intervals`)."""
        return bootstrap_intervals(
            self.labels, self.probabilities, self.cases, self.seed, repeats=self.repeats, class_names=self.class_names
        )

    def draws(self, seed: int, resamples: int) -> dict[str, np.ndarray]:
        """Return every figure of resampled patients, `(resamples,)` (see `bootstrap.bootstrap_draws`)."""
        return bootstrap_draws(
            self.labels, self.probabilities, self.cases, seed, resamples,
            repeats=self.repeats, class_names=self.class_names,
        )  # fmt: skip

    @property
    def calibrated_metrics(self) -> dict[str, float | None] | None:
        """What temperature scaling is there to mend, mended."""
        if self.calibrated is None:
            return None
        figures = pooled_metrics(self.labels, self.calibrated, self.repeats)
        return {name: figures[name] for name in CALIBRATION}

    @property
    def decision_metrics(self) -> dict[str, float | None] | None:
        """The figures of the classes decided on at a threshold, the mean over the repeats."""
        if self.decisions is None:
            return None
        parts = [self.repeats == repeat for repeat in np.unique(self.repeats)]
        each = [decision_metrics(self.labels[part], self.decisions[part], self.class_names) for part in parts]
        return {name: mean_and_std([figures[name] for figures in each])[0] for name in each[0]}

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


_ROWS = ("slides", "cases", "labels", "probabilities", "repeats", "folds", "calibrated", "decisions")


def _numbers(rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> np.ndarray:
    return np.array([[float(row[name]) for name in columns] for row in rows])
