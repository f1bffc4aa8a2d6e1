"""Columns of a label table that describe slides and patients, such as age and sex: numbers or words, some unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.bags.label_table import names_slide_or_patient
from utils.bags.labels import LabelRow
from utils.core.errors import LabelsError, did_you_mean, plural
from utils.core.placeholders import is_placeholder
from utils.core.runtime import log
from utils.tasks.targets import Row
from utils.tasks.task import Task

# More different words than this, of more than half of the patients, are no groups of patients.
_FEW_WORDS = 5
_MOST_GROUPS = 10  # of a column of numbers; more are divided at the median
_COPY = 0.9999  # the least correlation of a number with a target that it is a copy of
UNKNOWN = "unknown"


@dataclass(frozen=True, eq=False)
class Column:
    """A column of a label table: its `values (n,)`, numbers with NaN where unknown, or words with "" where unknown."""

    name: str
    values: np.ndarray

    @classmethod
    def of(cls, name: str, cells: Sequence[str]) -> Column:
        """Read the cells `(n,)` of a column: as numbers if all that are known are numbers."""
        known = [not is_placeholder(cell) for cell in cells]
        try:
            numbers = np.array(
                [float(cell) if is_known else np.nan for cell, is_known in zip(cells, known, strict=True)]
            )
        except ValueError:
            numbers = np.full(len(cells), np.nan)
        if any(known) and np.isfinite(numbers[known]).all():
            return cls(name, numbers)
        return cls(name, np.array([cell if is_known else "" for cell, is_known in zip(cells, known, strict=True)]))

    @property
    def is_number(self) -> bool:
        """Return whether the values are numbers."""
        return self.values.dtype.kind == "f"

    @property
    def is_known(self) -> np.ndarray:
        """Return which values are known, `(n,)` bool."""
        return ~np.isnan(self.values) if self.is_number else self.values != ""

    def missing(self, cases: np.ndarray) -> int:
        """Return for how many of the patients `(n,)` no value is known."""
        return len(set(cases.tolist()) - set(cases[self.is_known].tolist()))

    def fault(self, cases: np.ndarray) -> str:
        """Return why the column tells patients `(n,)` nothing, or is the name of each; "" if it can be used."""
        known = np.unique(self.values[self.is_known])
        if len(known) < 2:
            return f"has {'one value only' if len(known) else 'no value'}"
        patients = len(set(cases[self.is_known].tolist()))
        if names_slide_or_patient(self.name) or (
            not self.is_number and len(known) > _FEW_WORDS and 2 * len(known) > patients
        ):
            odd = next((value for value in known.tolist() if not _is_number(value)), known.tolist()[0])
            return (
                f"identifies patients: {len(known)} different values in {plural(patients, 'patient')}, such as {odd!r}"
            )
        return ""

    def of_patients(self, cases: np.ndarray) -> Column:
        """Return the column with each patient's value in all rows. Raise ValueError for a patient with two values."""
        for case, values in self._values_of(cases).items():
            if len(values) > 1:
                raise ValueError(f"patient {case} has {values[0]} and {values[1]}; give all slides of a patient one")
        return self.filled(cases)

    def filled(self, cases: np.ndarray) -> Column:
        """Return the column with a patient's value in the rows where it is unknown, if all others say the same."""
        values_of, values = self._values_of(cases), self.values.copy()
        for row in np.flatnonzero(~self.is_known):
            known = values_of.get(cases[row], [])
            values[row] = known[0] if len(known) == 1 else values[row]
        return replace(self, values=values)

    def _values_of(self, cases: np.ndarray) -> dict[str, list[Any]]:
        """Return the different known values of each patient."""
        values_of: dict[str, dict[Any, None]] = {}
        for case, value in zip(cases[self.is_known].tolist(), self.values[self.is_known].tolist(), strict=True):
            values_of.setdefault(case, {})[value] = None
        return {case: list(values) for case, values in values_of.items()}

    def where(self, rows: np.ndarray) -> Column:
        """Return the column of these rows `(m,)`, given by their numbers."""
        return replace(self, values=self.values[rows])

    def groups(self) -> dict[str, np.ndarray]:
        """Return the rows `(n,)` bool of each group, in order: of a word, of a number if they are few, else of a side
        of the median; those whose value is unknown come last.
        """
        distinct = np.unique(self.values[self.is_known]).tolist()
        groups = {f"{value:g}" if self.is_number else value: self.values == value for value in distinct}
        if self.is_number and len(distinct) > _MOST_GROUPS:
            middle = float(np.median(self.values[self.is_known]))
            groups = {f"at most {middle:g}": self.values <= middle, f"above {middle:g}": self.values > middle}
        return groups if self.is_known.all() else groups | {UNKNOWN: ~self.is_known}


def read_columns(path: Path, rows: Sequence[Row], names: Sequence[str], flag: str) -> list[Column]:
    """Return the columns that a flag names, of the rows of a label table.

    Raises LabelsError for a column that is not there, that has one value only, or that identifies patients.
    """
    cases = np.array([row["case_id"] for row in rows])
    columns = []
    for name in dict.fromkeys(names):
        if name not in rows[0]:
            near = did_you_mean(name, rows[0])
            whole = next((column for column in rows[0] if "," in column and name in column.split(",")), None)
            near = near if whole is None else f"; commas separate names, so rename the column {whole!r}"
            raise LabelsError(f"{path}: {flag} {name}: no such column; found {', '.join(rows[0])}{near}")
        column = Column.of(name, [row[name] for row in rows])
        if fault := column.fault(cases):
            raise LabelsError(f"{path}: {flag} {name}: the column {fault}; leave it out")
        columns.append(column)
    return columns


def of_all_slides(path: Path, columns: Sequence[Column], cases: np.ndarray, flag: str) -> list[Column]:
    """Return the columns with each patient's value in all rows. Raises LabelsError for a patient with two values."""
    patients = []
    for column in columns:
        try:
            patients.append(column.of_patients(cases))
        except ValueError as error:
            raise LabelsError(f"{path}: {flag} {column.name}: {error}") from None
    return patients


def read_covariates(path: Path, rows: Sequence[LabelRow], names: Sequence[str], task: Task) -> list[Column]:
    """Return the columns of the label table that `--covariates` names, each with a value of each patient; log how many
    are unknown, and warn of columns that tell the target.

    Raises LabelsError as `read_columns`, for a patient with two values, and for a column that is the target.
    """
    cases = np.array([row.case_id for row in rows])
    columns = []
    for column in read_columns(path, [row.columns for row in rows], names, "--covariates"):
        about = f"{path}: --covariates {column.name}"
        columns += of_all_slides(path, [column], cases, "--covariates")
        told = _target_told(column, rows, task)
        if told == "is":
            raise LabelsError(f"{about}: the column says the target itself ({', '.join(task.columns)}); leave it out")
        if told:
            log.warning("%s: each of its values comes with one target only; is it known before the target is?", about)
        kind = "numbers" if column.is_number else f"{len(set(column.values[column.is_known].tolist()))} words"
        missing = columns[-1].missing(cases)
        log.info("%s: %s, unknown for %d of %s", about, kind, missing, plural(len(set(cases.tolist())), "patient"))
    return columns


def _target_told(column: Column, rows: Sequence[LabelRow], task: Task) -> str:
    """Return whether a column "is" a target, or "tells" it: each of its values comes with one target only; else ""."""
    known = column.is_known
    values, told = column.values[known], ""
    for name in task.columns:
        cells = np.array([row.columns[name] for row in rows])[known]
        target = Column.of(name, cells.tolist())
        if name == column.name or (column.is_number and target.is_number and _is_copy(values, target.values)):
            return "is"
        pairs = {(value, cell) for value, cell in zip(values.tolist(), cells.tolist(), strict=True)}
        many, few = len(np.unique(values)), len(np.unique(cells))
        patients = len({row.case_id for row, is_known in zip(rows, known.tolist(), strict=True) if is_known})
        # Two columns that are different in each patient determine each other, whatever they mean.
        if len(pairs) == many == few <= patients / 2:
            return "is"
        codes = np.unique(cells, return_inverse=True)[1]
        runs = 1 + int((np.diff(codes[np.argsort(values)]) != 0).sum())
        are_apart = runs == few if column.is_number else 2 * many <= len(values)
        if len(pairs) == many and 1 < few < len(values) and are_apart:
            told = "tells"
    return told


def _is_copy(values: np.ndarray, target: np.ndarray) -> bool:
    """Return whether numbers are a target in another unit."""
    if np.isnan(target).any() or len(np.unique(target)) < 3 or np.ptp(values) == 0:
        return False
    return abs(float(np.corrcoef(values, target)[0, 1])) >= _COPY


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def columns_record(columns: Sequence[Column], cases: np.ndarray) -> list[Mapping[str, Any]]:
    """Return what `outputs.json` says of columns: name, kind, and for how many patients `(n,)` they are unknown."""
    return [
        {"name": column.name, "kind": "number" if column.is_number else "words", "missing": column.missing(cases)}
        for column in columns
    ]
