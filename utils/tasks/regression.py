"""Regression of a number, such as a share, a count or a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from utils.core.errors import plural
from utils.tasks.answers import numbers_in
from utils.tasks.bases import Basis, Bounded, MeanLoss
from utils.tasks.counts import range_text
from utils.tasks.quantiles import inner_quantiles, stratum_names, stratum_of
from utils.tasks.regression_metrics import METRICS, regression_metrics
from utils.tasks.targets import Row
from utils.tasks.task import Figures, Task

if TYPE_CHECKING:
    from torch import Tensor

_STRATA = 5
# Beyond this many standard deviations, the loss grows linearly (Huber 1964, https://doi.org/10.1214/aoms/1177703732).
_HUBER = 1.0


@dataclass(frozen=True)
class Regression(Task):
    """A number in a column of the label table; a slide's value is the predicted number.

    Attributes
        target_column: the column.
        cuts: where the cohort's numbers are cut into strata.
        center, scale: mean and standard deviation of the training slides' numbers, by which models learn them.
    """

    target_column: str
    cuts: tuple[float, ...] = ()
    center: float = 0.0
    scale: float = 1.0

    kind, flags = "regression", "--task regression --target_column"
    figure_names = ("scatter",)
    main_metrics = METRICS
    compared_metrics = METRICS
    lower_is_better = ("mae",)
    fitted_fields = ("center", "scale")
    metric_titles = {"r2": "R2", "mae": "MAE"}  # noqa: RUF012 - a constant of the class, as the others

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the column of the number."""
        return (self.target_column,)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the column's name."""
        return (self.target_column,)

    @property
    def quantity(self) -> str:
        """Return that the signal is the predicted number."""
        return "predicted value"

    def of_cohort(self, targets: np.ndarray, cases: Sequence[str]) -> Self:
        """Return the task with the strata of a cohort: fifths of its numbers, or fewer where patients are few."""
        return replace(self, cuts=inner_quantiles(targets, cases, _STRATA))

    def fitted_to(self, targets: np.ndarray, cases: Sequence[str]) -> Self:
        """Return the task with mean and standard deviation of the training slides' numbers."""
        scale = float(targets.std())
        return replace(self, center=float(targets.mean()), scale=scale if scale > 0 else 1.0)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return `METRICS`."""
        return METRICS

    def target(self, row: Row) -> float:
        """Return the number in the column. Raise ValueError for anything else."""
        number = float(row[self.target_column])
        if not np.isfinite(number):
            raise ValueError(row[self.target_column])
        return number

    @property
    def no_target(self) -> str:
        """Return what the column must be."""
        return f"target that cannot be used ({self.target_column} must be a number)"

    def target_text(self, targets: np.ndarray) -> np.ndarray:
        """Return the numbers with four digits."""
        return np.array([f"{number:.4g}" for number in targets])

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Return the predicted numbers."""
        return values

    def prediction_text(self, values: np.ndarray) -> np.ndarray:
        """Return the predicted numbers with four digits."""
        return self.target_text(values[:, 0])

    def label_columns(self, targets: np.ndarray) -> dict[str, np.ndarray]:
        """Return the column of the number."""
        return {self.target_column: targets}

    def table_columns(
        self, targets: np.ndarray, values: np.ndarray, calibrated: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Return the column of the number, and `predicted`."""
        assert calibrated is None  # noqa: S101 - nothing calibrates a number
        return self.label_columns(targets) | {"predicted": values[:, 0]}

    def answer_columns(
        self, predicted: str, values: Mapping[str, float], calibrated: Mapping[str, float] | None
    ) -> dict[str, Any]:
        """Return `predicted`."""
        return {"predicted": values[self.target_column]}

    def values_in(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the column `predicted`."""
        values = numbers_in(rows, ["predicted"])
        if not np.isfinite(values).all():
            raise ValueError("a prediction that is no number")
        return values, None

    def of_case(self, targets: np.ndarray) -> np.ndarray:
        """Return the mean of the slides' numbers."""
        return targets.mean(axis=0)

    def counts_text(self, targets: np.ndarray, cases: Sequence[str]) -> str:
        """Return the range of the numbers, and how many slides and patients have them."""
        counts = f"{plural(len(targets), 'slide')} of {plural(len(set(cases)), 'patient')}"
        return f"{self.target_column} {range_text(targets)}; {counts}"

    @property
    def strata_names(self) -> tuple[str, ...]:
        """Return the ranges of the strata."""
        return tuple(f"{self.target_column} {name}" for name in stratum_names(self.cuts))

    def strata(self, targets: np.ndarray) -> np.ndarray:
        """Return the stratum of each number."""
        return stratum_of(targets, self.cuts)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the Huber loss `(B,)` in standard deviations of the training slides' numbers."""
        from torch.nn import functional

        standardized = (targets.float() - self.center) / self.scale
        return functional.huber_loss(logits[:, 0].float(), standardized, reduction="none", delta=_HUBER) * weights[0]

    @property
    def chance_loss(self) -> float:
        """Return the mean squared error of the mean, halved, which is the Huber loss of small errors."""
        return 0.5

    def activate(self, logits: Tensor) -> np.ndarray:
        """Return the numbers in float64."""
        return self.center + self.scale * logits.cpu().double().numpy()

    def signals(self, logits: Tensor, shares: Tensor) -> Tensor:
        """Return the number: the mean over the parts."""
        # A copy, as gradients cannot pass a tensor of inference mode.
        return self.center + self.scale * (shares.to(logits).clone() @ logits)

    def metrics(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return every metric `(B,)` (see `regression_metrics`)."""
        return regression_metrics(targets, values[:, 0], weights)

    def basis(self, metric: str, targets: np.ndarray, values: np.ndarray) -> Basis:
        """Return what a metric rests on: the absolute errors, or a scale without limits."""
        if metric == "mae":
            return MeanLoss(np.abs(values[:, 0] - targets), np.inf)
        return Bounded(-np.inf if metric == "r2" else -1, 1)

    def validation(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Figures:
        """Return the Huber loss, as in training, and the metrics."""
        errors = np.abs(values[:, 0] - targets) / self.scale
        loss = np.where(errors <= _HUBER, errors**2 / 2, _HUBER * (errors - _HUBER / 2))
        return {"loss": float(loss.mean())} | self.unweighted_metrics(targets, values)

    def why_undefined(self, metric: str, targets: np.ndarray) -> str:
        """Return that all numbers are equal where a metric compares with their spread."""
        return "has slides of one number only" if metric not in ("mae", "loss") and np.ptp(targets) == 0 else ""

    def gallery(self, targets: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows that are closest, and those that are most above and most below their number."""
        errors = values[:, 0] - targets
        closest, highest = np.argsort(np.abs(errors), kind="stable"), np.argsort(-errors, kind="stable")
        return {
            "closest": closest,
            "most above": highest[errors[highest] > 0],
            "most below": highest[::-1][errors[highest[::-1]] < 0],
        }

    def closing_sentences(self, results: Mapping[str, Any]) -> list[str]:
        """Return what the figures mean."""
        return [
            f"R2 is the share of the spread of {self.target_column} that predictions explain (0: no better than its "
            "mean); MAE is the mean absolute error, in its unit."
        ]
