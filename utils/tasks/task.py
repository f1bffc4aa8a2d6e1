"""`Task`: what is predicted of a slide, and everything that depends on it.

PyTorch is imported only for a loss or an activation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from utils.tasks.bases import Basis

if TYPE_CHECKING:
    from torch import Tensor

Figures = dict[str, float | None]
FittedFigures = Mapping[str, Any]  # what is fitted to inner validation, by name


class Task(ABC):
    """Define targets, loss, values and metrics.

    A slide's target comes from the label table. A model's logits `(C,)` for a slide become its values `(C,)`.

    Attributes
        figure_names: the figures of predictions, from `evaluation.prediction_figures`.
        main_metrics: the metrics of validation and of closing tables.
        calibration_metrics: the metrics that calibration should improve.
        lower_is_better: the metrics of which a smaller value is better.
        metric_titles: the names of metrics in figures, if they differ from those in tables.
    """

    figure_names: ClassVar[tuple[str, ...]]
    main_metrics: ClassVar[tuple[str, ...]]
    calibration_metrics: ClassVar[tuple[str, ...]]
    lower_is_better: ClassVar[tuple[str, ...]]
    metric_titles: ClassVar[Mapping[str, str]]

    @property
    @abstractmethod
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the C outputs in columns and records."""

    @property
    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return what records keep of the task; `tasks.records.task_of` reads it."""

    @property
    @abstractmethod
    def ranked_outputs(self) -> Sequence[int]:
        """Return the outputs whose values rank the slides, each against the rest, as ROC curves show."""

    @property
    @abstractmethod
    def positive_output(self) -> str | None:
        """Return the name of the only ranked output; None if each output is ranked against the rest."""

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics."""

    @abstractmethod
    def target(self, text: str) -> int:
        """Return the target for a cell of the label table. Raise ValueError if it is not a valid target."""

    @property
    @abstractmethod
    def no_target(self) -> str:
        """Return what a cell of the label table is that is no target, to follow "label that is"."""

    @abstractmethod
    def target_text(self, targets: np.ndarray) -> np.ndarray:
        """Return the cells `(n,)` of a label table for targets `(n,)`, the inverse of `target`."""

    @property
    @abstractmethod
    def strata_names(self) -> tuple[str, ...]:
        """Return the names of the strata."""

    @abstractmethod
    def strata(self, targets: np.ndarray) -> np.ndarray:
        """Return the stratum `(n,)` int of each slide; folds are balanced over the strata."""

    @abstractmethod
    def loss_weights(self, targets: np.ndarray) -> np.ndarray:
        """Return the weights of the loss for training slides with these targets `(n,)`."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the loss `(B,)` of each bag; logits are `(B, C)`, targets `(B,)`, weights from `loss_weights`."""

    @property
    @abstractmethod
    def chance_loss(self) -> float:
        """Return the loss of a model that knows nothing of the slides."""

    @abstractmethod
    def activate(self, logits: Tensor) -> np.ndarray:
        """Return the values `(..., C)` in float64 for logits `(..., C)`."""

    @abstractmethod
    def signals(self, logits: Tensor, shares: Tensor) -> Tensor:
        """Return the signals `(C,)` that evidence adds up to, differentiable: each rises with its value `(C,)`.

        `logits (K, C)` are those of the K parts of a slide, whose values count by their `shares (K,)`.
        """

    @abstractmethod
    def metrics(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return every metric under each row of `weights (B, n)`, as `(B,)`; NaN where it is undefined."""

    @abstractmethod
    def metrics_within(
        self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray, strata: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return the metrics that rank slides, as `metrics`, but compare only slides of a stratum `(n,)`."""

    @abstractmethod
    def basis(self, metric: str, targets: np.ndarray, values: np.ndarray) -> Basis:
        """Return what a metric rests on, from which its interval is computed."""

    @abstractmethod
    def validation(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Figures:
        """Return the loss and the main metrics of validation slides; `weights` are those of the loss."""

    @abstractmethod
    def why_undefined(self, metric: str, targets: np.ndarray) -> str:
        """Return why a metric is undefined for these targets; "" if it is defined."""

    @abstractmethod
    def fit_on_validation(
        self, targets: np.ndarray, values: np.ndarray, operating_point: str, is_balanced: bool
    ) -> FittedFigures:
        """Return what is fitted to inner validation slides, by name; None if it is undefined for them.

        `operating_point` is what a decision threshold is fitted for (see `tasks.operating_point`); `is_balanced` says
        whether the loss was weighted by `loss_weights`.
        """

    @abstractmethod
    def fitted_figures(self, fitted: FittedFigures, targets: np.ndarray, values: np.ndarray) -> dict[str, Any]:
        """Return a fold's entries in `outputs.json` on what was fitted, and on the test slides' metrics with it;
        `values (M, n, C)` are those of each model, as for `decide_by`.
        """

    @abstractmethod
    def decide(self, values: np.ndarray) -> np.ndarray:
        """Return the decision `(n,)` int for values `(n, C)`."""

    @abstractmethod
    def decide_by(self, fitted: FittedFigures, values: np.ndarray) -> np.ndarray | None:
        """Return the decision `(n,)` int by what was fitted on validation; None if nothing of it decides.

        `values (M, n, C)` are those of M models, each of which decides, as it was fitted to single models: they vote.
        """

    @abstractmethod
    def decision_metrics(self, targets: np.ndarray, decisions: np.ndarray) -> Figures:
        """Return the metrics that depend on the decisions only."""

    @abstractmethod
    def calibrate(self, fitted: FittedFigures, values: np.ndarray) -> np.ndarray | None:
        """Return the values `(..., C)` calibrated by what was fitted; None if nothing of it calibrates."""

    @abstractmethod
    def at_prevalence(self, fitted: FittedFigures, prevalence: float) -> FittedFigures:
        """Return what was fitted, changed for slides of which another share is positive. Raises ValueError."""

    @property
    @abstractmethod
    def reliability_titles(self) -> tuple[str, str]:
        """Return what reliability diagrams show: the probability and the share that was observed."""

    @abstractmethod
    def reliability(self, targets: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probability `(n,)` of each slide in a reliability diagram, and whether it was right, `(n,)`."""

    @abstractmethod
    def gallery(self, targets: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows to look at first, by kind ("surest wrong"), each kind in order of interest."""

    @abstractmethod
    def table(self, pooled: Mapping[str, float | None], intervals: Mapping[str, Sequence[float] | None]) -> str:
        """Return a table of the metrics that the closing table leaves out."""

    @abstractmethod
    def closing_sentences(self, results: Mapping[str, Any]) -> list[str]:
        """Return the sentences below the closing table of an `outputs.json` or `scores.json`."""

    def unweighted_metrics(self, targets: np.ndarray, values: np.ndarray) -> Figures:
        """Return every metric of the slides; None if it is undefined."""
        return single(self.metrics(targets, values, np.ones((1, len(targets)))))


def single(figures: Mapping[str, np.ndarray]) -> Figures:
    """Return each metric, given as `(1,)`, as a number; None for NaN."""
    return {name: None if np.isnan(value[0]) else float(value[0]) for name, value in figures.items()}
