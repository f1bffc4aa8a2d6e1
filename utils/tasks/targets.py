"""`Targets`: what a task takes from the label table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, ClassVar, Self

import numpy as np

Target = int | float | tuple[float, ...]
Row = Mapping[str, str]  # of a label table or of predictions.csv, by column


class Targets(ABC):
    """Define the targets of slides, and how folds are balanced over them. Targets of n slides are an array `(n,)`, or
    `(n, k)` if a target is k numbers.

    Attributes
        kind: the name of the task in records and on the command line; flags: those that say what is predicted.
        unit: what has a target, a "slide" or a "patient".
        stratum_words: what a stratum is called, and several of them.
        fitted_fields: the fields that are fitted to training slides.
    """

    kind: ClassVar[str]
    flags: ClassVar[str]
    unit: ClassVar[str] = "slide"
    stratum_words: ClassVar[tuple[str, str]] = ("stratum", "strata")
    fitted_fields: ClassVar[tuple[str, ...]] = ()

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Return the columns of the label table, and of predictions.csv, that hold the target."""

    @property
    def about(self) -> str:
        """Return what is predicted, in a few words."""
        return f"{self.kind} of {', '.join(self.columns)}"

    @property
    def record(self) -> dict[str, Any]:
        """Return what records keep of the task, plain values: its kind and fields. `tasks.records.task_of` reads it."""
        values = {field.name: getattr(self, field.name) for field in _fields(self)}
        return {"task": self.kind} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
        }

    @property
    def cohort_record(self) -> dict[str, Any]:
        """Return what records keep of the task of several models: nothing that was fitted to the slides of one."""
        return {name: value for name, value in self.record.items() if name not in self.fitted_fields}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the task that `record` or `cohort_record` has written."""
        names = [field.name for field in _fields(cls) if field.name in record or field.name not in cls.fitted_fields]
        values = {name: record[name] for name in names}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def of_cohort(self, targets: np.ndarray, cases: Sequence[str]) -> Self:
        """Return the task for a cohort with these targets and patients `(n,)`: with what is the same in all folds, such
        as the limits of strata. Raise ValueError if they cannot be evaluated.
        """
        return self

    @abstractmethod
    def target(self, row: Row) -> Target:
        """Return the target in a row of the label table. Raise ValueError if it is not a valid target."""

    @property
    @abstractmethod
    def no_target(self) -> str:
        """Return what is wrong with a row without a valid target, to follow "row with a"."""

    @property
    def target_words(self) -> tuple[str, ...]:
        """Return the valid cells of the label table, if these are a few words."""
        return ()

    @abstractmethod
    def target_text(self, targets: np.ndarray) -> np.ndarray:
        """Return targets as a reader sees them, `(n,)`."""

    @abstractmethod
    def counts_text(self, targets: np.ndarray, cases: Sequence[str]) -> str:
        """Return how many slides and patients there are, and how their targets are spread."""

    @property
    @abstractmethod
    def strata_names(self) -> tuple[str, ...]:
        """Return the names of the strata."""

    @abstractmethod
    def strata(self, targets: np.ndarray) -> np.ndarray:
        """Return the stratum `(n,)` int of each slide; folds are balanced over the strata."""

    def case_keys(self, targets: np.ndarray) -> np.ndarray:
        """Return what must be equal, `(n,)`, for slides of one patient to be combined to one answer."""
        return np.zeros(len(targets))

    def of_case(self, targets: np.ndarray) -> np.ndarray:
        """Return the target of a patient, given those of the slides `(m,)` or `(m, k)` that are combined."""
        return targets[0]


def _fields(task: Any) -> tuple[Field, ...]:
    return fields(task)
