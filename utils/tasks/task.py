"""What is predicted of a slide, as one object: all that depends on it is asked of a `Task`.

Nothing here imports PyTorch before a loss or an activation is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Figures = dict[str, float | None]


class Task(ABC):
    """How targets, loss, values and figures are made.

    A slide's target is what the label table says of it. A model's logits `(C,)` for a slide become its values `(C,)`.

    Attributes
        drawings: the figures drawn of predictions, by the names that `evaluation.figures` knows them by.
        shown_metrics: the metrics of validation and of closing tables.
        calibration_metrics: those that calibration is there to improve.
        lower_is_better: metrics of which a smaller value is better.
    """

    drawings: ClassVar[tuple[str, ...]]
    shown_metrics: ClassVar[tuple[str, ...]]
    calibration_metrics: ClassVar[tuple[str, ...]]
    lower_is_better: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the C outputs, as columns and records have them."""

    @property
    @abstractmethod
    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics."""

    @abstractmethod
    def target(self, text: str) -> int:
        """Return the target that a cell of the label table stands for. Raise ValueError for one that is none."""

    @property
    @abstractmethod
    def strata_names(self) -> tuple[str, ...]:
        """Return the names of the strata."""

    @abstractmethod
    def strata(self, targets: np.ndarray) -> np.ndarray:
        """Return `(n,)` int, the stratum of each slide: every fold gets its share of each."""

    @abstractmethod
    def loss_weights(self, targets: np.ndarray) -> np.ndarray:
        """Return the weights of the loss, from the targets `(n,)` of the training slides."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the loss `(B,)` of each bag: logits `(B, C)`, targets `(B,)`, weights as `loss_weights` gives them."""

    @abstractmethod
    def activate(self, logits: Tensor) -> np.ndarray:
        """Return the values `(..., C)` in float64 of logits `(..., C)`."""

    @abstractmethod
    def metrics(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return every metric under each row of `weights (B, n)`, as `(B,)`; NaN where it is undefined."""

    @abstractmethod
    def validation(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Figures:
        """Return the loss and the shown metrics of slides that were held back; `weights` are those of the loss."""

    @abstractmethod
    def why_undefined(self, metric: str, targets: np.ndarray) -> str:
        """Return why a metric is undefined for these targets; empty where it is defined."""

    @abstractmethod
    def fit_inner(self, targets: np.ndarray, values: np.ndarray) -> dict[str, float | None]:
        """Return the `threshold` and the `temperature` fitted to inner validation slides; None where there is none."""

    @abstractmethod
    def decide(self, values: np.ndarray, threshold: float | None = None) -> np.ndarray:
        """Return `(n,)` int, what values `(n, C)` decide for."""

    @abstractmethod
    def decision_metrics(self, targets: np.ndarray, decisions: np.ndarray) -> Figures:
        """Return the metrics that look at decisions alone."""

    @abstractmethod
    def calibrate(self, values: np.ndarray, temperature: float) -> np.ndarray:
        """Return the values `(..., C)`, calibrated."""

    @abstractmethod
    def gallery(self, targets: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows most worth a look, the most telling first, by the kind of what they show."""

    @abstractmethod
    def table(self, pooled: Mapping[str, float | None], intervals: Mapping[str, Sequence[float] | None]) -> str:
        """Return the metrics that are not shown in the closing table, as a table of their own."""

    @abstractmethod
    def closing_words(self, results: Mapping[str, Any]) -> list[str]:
        """Return the sentences below the closing table of an `outputs.json` or `scores.json`."""

    def plain_metrics(self, targets: np.ndarray, values: np.ndarray) -> Figures:
        """Return every metric of the slides; None where it is undefined."""
        return plain(self.metrics(targets, values, np.ones((1, len(targets)))))


def plain(figures: Mapping[str, np.ndarray]) -> Figures:
    """Return the first of each metric's `(B,)` values, None for NaN."""
    return {name: None if np.isnan(value[0]) else float(value[0]) for name, value in figures.items()}
