"""Grades in an order, such as of a tumour, learned with a cumulative link."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from utils.tasks.bases import Basis, Bounded, MeanLoss, Proportion
from utils.tasks.metrics import log_loss
from utils.tasks.named_classes import NamedClasses
from utils.tasks.ordinal_metrics import METRICS, ordinal_metrics
from utils.tasks.task import Figures

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_STEP = 1e-6  # between two logits, so that no grade is impossible
_LEAST_GRADES = 3


@dataclass(frozen=True)
class Ordinal(NamedClasses):
    """Three or more grades; a slide's values are their probabilities.

    A model has a logit of "higher than grade k" for each grade but the last (McCullagh 1980,
    https://doi.org/10.1111/j.2517-6161.1980.tb01109.x). The first is free, each further one is lower by a softplus, so
    that no probability is negative.

    Attributes
        target_column: the column of the grade.
        order: the grades, from the lowest to the highest.

    Raises ValueError if there are fewer than three grades, or if two have the same name.
    """

    target_column: str
    order: tuple[str, ...]

    kind, flags = "ordinal", "--task ordinal --target_column --order"
    figure_names = ("confusion_matrix",)
    main_metrics = METRICS
    compared_metrics = METRICS
    lower_is_better = ("mae",)
    metric_titles = {"quadratic_kappa": "quadratic kappa", "mae": "MAE"}  # noqa: RUF012 - a constant of the class
    answer_word = "median"
    output_word, side_word, stratum_words = "grade", "of a grade", ("grade", "grades")

    def __post_init__(self) -> None:
        if len(self.order) < _LEAST_GRADES or len(set(self.order)) < len(self.order):
            raise ValueError(f"grades {', '.join(self.order)}; an order needs three different ones")

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the column of the grade."""
        return (self.target_column,)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the grades."""
        return self.order

    @property
    def num_logits(self) -> int:
        """Return the number of grades that another one is above."""
        return len(self.order) - 1

    @property
    def effects(self) -> np.ndarray:
        """Return that one sum raises the first logit, and with it those of all higher grades (proportional odds)."""
        return np.eye(1, self.num_logits)

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Return the expected grade, counted from 0."""
        return values @ np.arange(len(self.order))[:, None]

    @property
    def signal_names(self) -> tuple[str, ...]:
        """Return the column's name."""
        return (self.target_column,)

    @property
    def quantity(self) -> str:
        """Return that the signal is the expected grade, which takes the column's name."""
        return "expected value"

    @property
    def quantity_key(self) -> str:
        """Return that records call it the expected grade."""
        return "expected_grade"

    @property
    def about(self) -> str:
        """Return the column and the grades."""
        return f"{self.target_column} in the order {', '.join(self.order)}"

    def of_cohort(self, targets: np.ndarray, cases: Sequence[str]) -> Self:
        """Return the task. Raise ValueError if a grade has no row."""
        absent = [name for grade, name in enumerate(self.order) if not (targets == grade).any()]
        if absent:
            raise ValueError(f"no row has the grade {', '.join(absent)}; leave it out of --order")
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Return `METRICS`."""
        return METRICS

    def answer(
        self, values: np.ndarray, calibrated: np.ndarray | None = None, members: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Return the task, the predicted grade, its probability and the probabilities by grade."""
        return {"task": self.record, **super().answer(values, calibrated, members)}

    def shares(self, values: Mapping[str, float]) -> tuple[str, dict[str, float]]:
        """Return the probabilities."""
        return "probability (marked: the median)", dict(values)

    def decide(self, values: np.ndarray) -> np.ndarray:
        """Return the median of the grades: the lowest one that, with those below it, has half of the probability.

        No other grade has a smaller expected distance from the true one. The most probable grade, by contrast, may lie
        at an end while most of the probability lies elsewhere.
        """
        return (values[..., :-1].cumsum(axis=-1) < 0.5).sum(axis=-1)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Return the negative log-likelihood `(B,)` of the grades, weighted by grade."""
        from torch.nn import functional

        return functional.nll_loss(_log_probabilities(logits.float()), targets, weight=weights, reduction="none")

    @property
    def chance_loss(self) -> float:
        """Return the loss of equal probabilities."""
        return math.log(len(self.order))

    def activate(self, logits: Tensor) -> np.ndarray:
        """Return the probabilities of the grades in float64."""
        return _log_probabilities(logits.cpu().double()).exp().numpy()

    def signals(self, logits: Tensor, shares: Tensor) -> Tensor:
        """Return the expected grade, counted from 0: the mean over the parts."""
        # A copy, as gradients cannot pass a tensor of inference mode.
        higher = _monotone(logits).sigmoid().sum(dim=-1, keepdim=True)
        return shares.to(logits).clone() @ higher

    def metrics(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return every metric `(B,)` of the predicted grades (see `ordinal_metrics`)."""
        return ordinal_metrics(targets, self.decide(values), weights, len(self.order))

    def basis(self, metric: str, targets: np.ndarray, values: np.ndarray) -> Basis:
        """Return what a metric rests on: right grades, distances, or a scale from -1 to 1."""
        if metric == "accuracy":
            return Proportion(np.ones(len(targets), bool))
        if metric == "mae":
            return MeanLoss(np.abs(self.decide(values) - targets).astype(float), len(self.order) - 1)
        return Bounded(-1, 1)

    def validation(self, targets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Figures:
        """Return the negative log-likelihood, weighted by grade, and the metrics."""
        return {"loss": log_loss(targets, values, weights)} | self.unweighted_metrics(targets, values)

    def why_undefined(self, metric: str, targets: np.ndarray) -> str:
        """Return that all slides have one grade, for which kappa may be undefined."""
        is_defined = metric != "quadratic_kappa" or len(np.unique(targets)) > 1
        return "" if is_defined else "has slides of one grade only"

    def closing_sentences(self, results: Mapping[str, Any]) -> list[str]:
        """Return what the figures mean."""
        return [
            "Quadratic kappa is the agreement beyond chance, where a distance of two grades counts four times (1: "
            f"perfect, 0: chance); MAE is the mean distance of the predicted {self.target_column}, in grades."
        ]


def _monotone(logits: Tensor) -> Tensor:
    """Return the logits `(..., K - 1)` of "higher than grade k", each lower than the one before it."""
    import torch

    return torch.cat([logits[..., :1], logits[..., :1] - _steps(logits).cumsum(dim=-1)], dim=-1)


def _steps(logits: Tensor) -> Tensor:
    """Return by how much `(..., K - 2)` each logit after the first is lower than the one before it."""
    from torch.nn.functional import softplus

    return softplus(logits[..., 1:]) + _LEAST_STEP


def _log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithms `(..., K)` of the probabilities of the grades.

    Of a grade between the ends, with the logits a and b = a - s of "higher than" the grade below and itself, the
    probability is sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(-s)), which loses no digits.
    """
    from torch.nn.functional import logsigmoid, pad

    higher = _monotone(logits)
    above, not_above = pad(logsigmoid(higher), (1, 0)), pad(logsigmoid(-higher), (0, 1))
    return above + not_above + pad((-(-_steps(logits)).expm1()).log(), (1, 1))
