"""`Task`: what is predicted of a slide, and everything that depends on it.

A task defines its targets, loss, values and metrics. What only some tasks have (ranked outputs, a threshold, a
calibration) has a default here: none. PyTorch is imported only for a loss or an activation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from utils.tasks.answers import Answers
from utils.tasks.bases import Basis

if TYPE_CHECKING:
    from torch import Tensor

Figures = dict[str, float | None]
FittedFigures = Mapping[str, Any]  # what is fitted to inner validation, by name


class Task(Answers):
    """Define targets (`Targets`), values and answers (`Answers`), loss and metrics. A model's logits `(L,)` for a slide
    become its values `(C,)`. A task is a frozen dataclass of plain values.

    Attributes
        figure_names: the figures of predictions, from `evaluation.prediction_figures`.
        decision_figures: the names of those figures fitted to inner validation that decide, such as a threshold.
        main_metrics: the metrics of validation and of closing tables.
        compared_metrics: the metrics that runs are compared by, the primary one first.
        calibration_metrics: the metrics that calibration should improve.
        lower_is_better: the metrics of which a smaller value is better.
        metric_titles: the names of metrics in figures, if they differ from those in tables.
    """

    figure_names: ClassVar[tuple[str, ...]]
    decision_figures: ClassVar[tuple[str, ...]] = ()
    main_metrics: ClassVar[tuple[str, ...]]
    compared_metrics: ClassVar[tuple[str, ...]]
    calibration_metrics: ClassVar[tuple[str, ...]] = ()
    lower_is_better: ClassVar[tuple[str, ...]] = ()
    metric_titles: ClassVar[Mapping[str, str]] = MappingProxyType({})

    @property
    def num_logits(self) -> int:
        """Return the number L of logits that a model gives."""
        return len(self.outputs)

    def fitted_to(self, targets: np.ndarray, cases: Sequence[str]) -> Self:
        """Return the task for a model that is trained on slides with these targets and patients `(n,)`: with what is
        fitted to them.
        """
        return self

    @property
    def effects(self) -> np.ndarray:
        """Return how a linear model of few inputs gives logits: each of its K sums raises the logits by a row of
        `(K, L)`, and each logit has a constant. By default each logit has a sum of its own.
        """
        return np.eye(self.num_logits)

    def ranking_metrics(self, output: int) -> tuple[str, str] | None:
        """Return the metrics that are AUC and average precision of a ranked output alone, if there are such."""
        return None

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics."""

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

    @property
    def loss_titles(self) -> tuple[str, ...]:
        """Return what curves call the losses: one title if training and validation have the same loss, else two."""
        return ("Loss",)

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
        self, targets: np.ndarray, values: np.ndarray, cases: Sequence[str], operating_point: str, is_balanced: bool
    ) -> FittedFigures:
        """Return what is fitted to inner validation slides, by name; None if it is undefined for them.

        `cases (n,)` are their patients. `operating_point` is what a decision threshold is fitted for (see
        `tasks.operating_point`); `is_balanced` says whether the loss was weighted by `loss_weights`.
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

    def decision_text(self, fitted: FittedFigures, values: np.ndarray) -> str | None:
        """Return the decision of a slide in words, for its record (see `decided_key`); None if nothing decides.

        `values (M, C)` are those of each model.
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

    def further_figures(
        self, targets: np.ndarray, values: np.ndarray, folds: np.ndarray | None, decisions: np.ndarray | None
    ) -> dict[str, Any]:
        """Return further entries of `outputs.json` and `scores.json`, given one row of each slide."""
        return {}

    def table(self, pooled: Mapping[str, float | None], intervals: Mapping[str, Sequence[float] | None]) -> str:
        """Return a table of the metrics that the closing table leaves out; "" if it leaves out none."""
        return ""

    def closing_sentences(self, results: Mapping[str, Any]) -> list[str]:
        """Return the sentences below the closing table of an `outputs.json` or `scores.json`."""
        return []

    def unweighted_metrics(self, targets: np.ndarray, values: np.ndarray) -> Figures:
        """Return every metric of the slides; None if it is undefined."""
        return single(self.metrics(targets, values, np.ones((1, len(targets)))))


def single(figures: Mapping[str, np.ndarray]) -> Figures:
    """Return each metric, given as `(1,)`, as a number; None for NaN."""
    return {name: None if np.isnan(value[0]) else float(value[0]) for name, value in figures.items()}
