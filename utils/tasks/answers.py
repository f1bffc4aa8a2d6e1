"""`Answers`: the values that a task predicts of a slide, in words, tables and records."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from utils.tasks.targets import Row, Targets


class Answers(Targets):
    """Define the values `(C,)` of a slide, and how they are written.

    Attributes
        predicted_key, values_key: what the answer and its values are called in a slide's record.
        names_key: what the names of the values are called in a slide's arrays.
        output_word: what an output is called, such as "class".
        side_word: whom a figure needs several patients of, such as "of a class".
        answer_word: what the answer is of its values where that is not plain, such as "median".
        decided_key: what the decision by what was fitted is called in a slide's record; "" if records have none.
    """

    predicted_key: ClassVar[str] = "predicted"
    values_key: ClassVar[str] = "values"
    names_key: ClassVar[str] = "value_names"
    output_word: ClassVar[str] = "class"
    side_word: ClassVar[str] = "of a class"
    answer_word: ClassVar[str] = ""
    decided_key: ClassVar[str] = ""

    @property
    @abstractmethod
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the C values of a slide."""

    @property
    def signal_names(self) -> tuple[str, ...]:
        """Return what each of the `signals` argues for."""
        return self.outputs

    @property
    def main_signal(self) -> str | None:
        """Return the signal that a 1 stands for by itself: the only one, or that of the positive output."""
        return self.signal_names[0] if len(self.signal_names) == 1 else self.positive_output

    @property
    @abstractmethod
    def quantity(self) -> str:
        """Return what the signals are, as in "log-odds of malignant"."""

    @property
    def quantity_key(self) -> str:
        """Return the name of the signals in records and files."""
        return self.quantity.replace("-", "_").replace(" ", "_")

    @property
    def ranked_outputs(self) -> Sequence[int]:
        """Return the outputs whose values rank the slides, each against the rest, as ROC curves show."""
        return ()

    def sides(self, output: int, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which slides are positive and which negative `(n,)` bool, as a ranked output should rank them."""
        return targets == output, targets != output

    @property
    def positive_output(self) -> str | None:
        """Return the name of the only ranked output; None if each output is ranked against the rest, or none is."""
        return None

    @abstractmethod
    def scores(self, values: np.ndarray) -> np.ndarray:
        """Return values `(..., C)` as numbers `(..., S)` on scales without limits, as a linear model takes them."""

    @abstractmethod
    def prediction_text(self, values: np.ndarray) -> np.ndarray:
        """Return the answers of values `(n, C)` as a reader sees them, `(n,)`."""

    @abstractmethod
    def label_columns(self, targets: np.ndarray) -> dict[str, np.ndarray]:
        """Return the columns `(n,)` of predictions.csv with the targets, named as in the label table."""

    def label_cells(self, targets: np.ndarray) -> list[dict[str, str]]:
        """Return the cells of these columns by name, for each of n slides."""
        columns = self.label_columns(targets)
        return [dict(zip(columns, map(str, cells), strict=True)) for cells in zip(*columns.values(), strict=True)]

    @abstractmethod
    def table_columns(
        self, targets: np.ndarray, values: np.ndarray, calibrated: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Return the columns `(n,)` of predictions.csv for slides with these targets and values `(n, C)`."""

    def answer_columns(
        self, predicted: str, values: Mapping[str, float], calibrated: Mapping[str, float] | None
    ) -> dict[str, Any]:
        """Return the columns of a slide's answer in the predictions.csv of `predict.py`, by their names in training."""
        return dict(values)

    @abstractmethod
    def values_in(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the values `(n, C)` in rows of predictions.csv and the calibrated ones, if there are some.

        Raise ValueError if columns are missing or hold something else.
        """

    def answer(
        self, values: np.ndarray, calibrated: np.ndarray | None = None, members: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Return the answer's entries in a slide's record: from its values `(C,)`, the calibrated ones, and those of
        each of several models, `members (M, C)`.
        """
        return {
            "task": self.record,
            self.predicted_key: str(self.prediction_text(values[None])[0]),
            self.values_key: self._by_output(values),
            **self._by_member(members),
        }

    def headline(self, predicted: str) -> str:
        """Return the answer of a slide in a few words, given its text (see `prediction_text`)."""
        return f"{self.outputs[0]} {predicted}"

    def shares(self, values: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """Return a title, and those of a slide's values by output that are shares from 0 to 1, to be drawn as bars."""
        return "", {}

    def marked(self, values: np.ndarray) -> tuple[str, ...]:
        """Return which of the shares are the answer of values `(C,)`, as bars mark them."""
        return ()

    def decide(self, values: np.ndarray) -> np.ndarray:
        """Return which of the outputs each answer is about, `(...)` int, for values `(..., C)`: of classes the decided
        one.
        """
        return np.zeros(values.shape[:-1], int)

    def signal_about(self, output: int) -> int:
        """Return which of the signals argues for an output: its own one, if each output has one."""
        return output if len(self.signal_names) == len(self.outputs) else 0

    def _by_output(self, values: np.ndarray) -> dict[str, float]:
        return dict(zip(self.outputs, values.tolist(), strict=True))

    def _by_member(self, members: np.ndarray | None) -> dict[str, Any]:
        """Return the values of each of several models, `members (M, C)`, and their standard deviation."""
        if members is None:
            return {}
        each = [self._by_output(values) for values in members]
        return {f"member_{self.values_key}": each, "spread": self._by_output(members.std(axis=0, ddof=1))}

    @abstractmethod
    def gallery(self, targets: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows to look at first, by kind ("surest wrong"), each kind in order of interest."""


def numbers_in(rows: Sequence[Row], columns: Sequence[str]) -> np.ndarray:
    """Return the numbers `(n, k)` in k columns of rows. Raise ValueError for a missing column or no number."""
    missing = [name for name in columns if name not in rows[0]]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}")
    return np.array([[float(row[name]) for name in columns] for row in rows])
