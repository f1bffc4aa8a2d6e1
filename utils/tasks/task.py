"""`Task`: what is predicted of a slide, and everything that depends on it.

A task defines its targets, loss, values and metrics. What only some tasks have (ranked outputs, a threshold, a
calibration) has a default here: none. PyTorch is imported only for a loss or an activation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from utils.tasks.bases import Basis

if TYPE_CHECKING:
    from torch import Tensor

Figures = dict[str, float | None]
FittedFigures = Mapping[str, Any]  # what is fitted to inner validation, by name
Target = int | float | tuple[float, ...]
Row = Mapping[str, str]  # of a label table or of predictions.csv, by column


class Task(ABC):
    """Define targets, loss, values and metrics.

    A slide's target comes from the label table. A model's logits `(L,)` for a slide become its values `(C,)`. Targets
    of n slides are an array `(n,)`, or `(n, k)` if a target is k numbers. A task is a frozen dataclass of plain values.

    Attributes
        kind: the name of the task in records and on the command line; flags: those that say what is predicted.
        figure_names: the figures of predictions, from `evaluation.prediction_figures`.
        decision_figures: the names of those figures fitted to inner validation that decide, such as a threshold.
        main_metrics: the metrics of validation and of closing tables.
        compared_metrics: the metrics that runs are compared by, the primary one first.
        calibration_metrics: the metrics that calibration should improve.
        lower_is_better: the metrics of which a smaller value is better.
        metric_titles: the names of metrics in figures, if they differ from those in tables.
        predicted_key, values_key: what the answer and its values are called in a slide's record.
        output_word: what an output is called, such as "class".
    """

    kind: ClassVar[str]
    flags: ClassVar[str]
    figure_names: ClassVar[tuple[str, ...]]
    decision_figures: ClassVar[tuple[str, ...]] = ()
    main_metrics: ClassVar[tuple[str, ...]]
    compared_metrics: ClassVar[tuple[str, ...]]
    calibration_metrics: ClassVar[tuple[str, ...]] = ()
    lower_is_better: ClassVar[tuple[str, ...]] = ()
    metric_titles: ClassVar[Mapping[str, str]] = MappingProxyType({})
    predicted_key: ClassVar[str] = "predicted"
    values_key: ClassVar[str] = "values"
    output_word: ClassVar[str] = "class"

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Return the columns of the label table, and of predictions.csv, that hold the target."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the C values of a slide."""

    @property
    def num_logits(self) -> int:
        """Return the number L of logits that a model gives."""
        return len(self.outputs)

    @property
    def signal_names(self) -> tuple[str, ...]:
        """Return what each of the `signals` argues for."""
        return self.outputs

    @property
    @abstractmethod
    def quantity(self) -> str:
        """Return what the signals are, as in "log-odds of malignant"."""

    @property
    def quantity_key(self) -> str:
        """Return the name of the signals in records and files."""
        return self.quantity.replace("-", "_").replace(" ", "_")

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

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the task that `record` has written."""
        values = {field.name: record[field.name] for field in _fields(cls)}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def of_cohort(self, targets: np.ndarray, cases: Sequence[str]) -> Self:
        """Return the task for a cohort with these targets and patients `(n,)`: with what is the same in all folds, such
        as the limits of strata. Raise ValueError if they cannot be evaluated.
        """
        return self

    def fitted_to(self, targets: np.ndarray) -> Self:
        """Return the task for a model that is trained on slides with these targets: with what is fitted to them."""
        return self

    @property
    def ranked_outputs(self) -> Sequence[int]:
        """Return the outputs whose values rank the slides, each against the rest, as ROC curves show."""
        return ()

    def sides(self, output: int, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which slides are positive and which negative `(n,)` bool, as a ranked output should rank them."""
        return targets == output, targets != output

    def ranking_metrics(self, output: int) -> tuple[str, str] | None:
        """Return the metrics that are AUC and average precision of a ranked output alone, if there are such."""
        return None

    @property
    def positive_output(self) -> str | None:
        """Return the name of the only ranked output; None if each output is ranked against the rest, or none is."""
        return None

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics."""

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
    def prediction_text(self, values: np.ndarray) -> np.ndarray:
        """Return the answers of values `(n, C)` as a reader sees them, `(n,)`."""

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
    def counts_text(self, targets: np.ndarray, cases: Sequence[str]) -> str:
        """Return how many slides and patients there are, and how their targets are spread."""

    @property
    @abstractmethod
    def strata_names(self) -> tuple[str, ...]:
        """Return the names of the strata."""

    @abstractmethod
    def strata(self, targets: np.ndarray) -> np.ndarray:
        """Return the stratum `(n,)` int of each slide; folds are balanced over the strata."""

    def loss_weights(self, targets: np.ndarray) -> np.ndarray:
        """Return the weights of the loss for training slides with these targets; by default they have none."""
        return np.ones(1)

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the loss `(B,)` of each bag; logits are `(B, L)`, weights those of `loss_weights`."""

    @property
    @abstractmethod
    def chance_loss(self) -> float:
        """Return the loss of a model that knows nothing of the slides."""

    @abstractmethod
    def activate(self, logits: Tensor) -> np.ndarray:
        """Return the values `(..., C)` in float64 for logits `(..., L)`."""

    @abstractmethod
    def signals(self, logits: Tensor, shares: Tensor) -> Tensor:
        """Return the signals `(S,)` that evidence adds up to, differentiable: each rises with what it argues for.

        `logits (K, L)` are those of the K parts of a slide, whose values count by their `shares (K,)`.
        """

    @abstractmethod
    def metrics(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return every metric under each row of `weights (B, n)`, as `(B,)`; NaN where it is undefined."""

    def metrics_within(
        self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray, strata: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return the metrics that rank slides, as `metrics`, but compare only slides of a stratum `(n,)`."""
        return {}

    @abstractmethod
    def basis(self, metric: str, targets: np.ndarray, values: np.ndarray) -> Basis:
        """Return what a metric rests on, from which its interval is computed."""

    @abstractmethod
    def validation(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Figures:
        """Return the loss and the main metrics of validation slides; `weights` are those of the loss."""

    def why_undefined(self, metric: str, targets: np.ndarray) -> str:
        """Return why a metric is undefined for these targets; "" if it is defined."""
        return ""

    @property
    def default_monitor(self) -> str:
        """Return the metric of validation that chooses by default, as `--monitor` names it."""
        return "slide_loss"

    def fit_on_validation(
        self, targets: np.ndarray, values: np.ndarray, operating_point: str, is_balanced: bool
    ) -> FittedFigures:
        """Return what is fitted to inner validation slides, by name; None if it is undefined for them.

        `operating_point` is what a decision threshold is fitted for (see `tasks.operating_point`); `is_balanced` says
        whether the loss was weighted by `loss_weights`.
        """
        return {}

    def fitted_figures(self, fitted: FittedFigures, targets: np.ndarray, values: np.ndarray) -> dict[str, Any]:
        """Return a fold's entries in `outputs.json` on what was fitted, and on the test slides' metrics with it;
        `values (M, n, C)` are those of each model, as for `decide_by`.
        """
        return {"thresholded": None}

    def decide_by(self, fitted: FittedFigures, values: np.ndarray) -> np.ndarray | None:
        """Return the decision `(n,)` int by what was fitted on validation; None if nothing of it decides.

        `values (M, n, C)` are those of M models, each of which decides, as it was fitted to single models: they vote.
        """
        return None

    @property
    def decision_column(self) -> str | None:
        """Return the column of predictions.csv with the decisions by what was fitted; None if they are not kept."""
        return None

    def decision_metrics(self, targets: np.ndarray, decisions: np.ndarray) -> Figures:
        """Return the metrics that depend on the decisions only."""
        return {}

    def calibrate(self, fitted: FittedFigures, values: np.ndarray) -> np.ndarray | None:
        """Return the values `(..., C)` calibrated by what was fitted; None if nothing of it calibrates."""
        return None

    def at_prevalence(self, fitted: FittedFigures, prevalence: float) -> FittedFigures:
        """Return what was fitted, changed for slides of which another share is positive. Raises ValueError."""
        raise ValueError(f"a share of positive slides needs two classes; the task is {self.kind}")

    @property
    def reliability_titles(self) -> tuple[str, str] | None:
        """Return what reliability diagrams show, the probability and the share that was observed; None if there are
        none.
        """
        return None

    def reliability(self, targets: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probability `(n,)` of each slide in a reliability diagram, and whether it was right, `(n,)`."""
        raise NotImplementedError(f"{self.kind} has no reliability diagram")

    def case_keys(self, targets: np.ndarray) -> np.ndarray:
        """Return what must be equal, `(n,)`, for slides of one patient to be combined to one answer."""
        return np.zeros(len(targets))

    def further_figures(
        self, targets: np.ndarray, values: np.ndarray, folds: np.ndarray | None, decisions: np.ndarray | None
    ) -> dict[str, Any]:
        """Return further entries of `outputs.json` and `scores.json`, given one row of each slide."""
        return {}

    @abstractmethod
    def gallery(self, targets: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows to look at first, by kind ("surest wrong"), each kind in order of interest."""

    def table(self, pooled: Mapping[str, float | None], intervals: Mapping[str, Sequence[float] | None]) -> str:
        """Return a table of the metrics that the closing table leaves out; "" if it leaves out none."""
        return ""

    def closing_sentences(self, results: Mapping[str, Any]) -> list[str]:
        """Return the sentences below the closing table of an `outputs.json` or `scores.json`."""
        return []

    def unweighted_metrics(self, targets: np.ndarray, values: np.ndarray) -> Figures:
        """Return every metric of the slides; None if it is undefined."""
        return single(self.metrics(targets, values, np.ones((1, len(targets)))))


def _fields(task: Any) -> tuple[Field, ...]:
    return fields(task)


def single(figures: Mapping[str, np.ndarray]) -> Figures:
    """Return each metric, given as `(1,)`, as a number; None for NaN."""
    return {name: None if np.isnan(value[0]) else float(value[0]) for name, value in figures.items()}


def numbers_in(rows: Sequence[Row], columns: Sequence[str]) -> np.ndarray:
    """Return the numbers `(n, k)` in k columns of rows. Raise ValueError for a missing column or no number."""
    missing = [name for name in columns if name not in rows[0]]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}")
    return np.array([[float(row[name]) for name in columns] for row in rows])
