"""Calibration: probabilities that come true as often as they say, fitted on slides the model was not trained on.

The logarithms of the probabilities are divided by a temperature, which sharpens or softens them (Guo et al. 2017,
https://arxiv.org/abs/1706.04599), and shifted by an intercept of each class, which undoes that class weights train for
equally frequent classes (Alexandari et al. 2020, https://arxiv.org/abs/1901.06852). Of two classes that is Platt's
scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from utils.tasks.metrics import auc_is_defined, equal_bins

_LEAST, _MOST = 0.05, 20.0
_TINY = 1e-12
# How far, in standard deviations of a prior, few slides may pull the temperature's logarithm from 0 and the intercepts
# from what undoes the weights of the loss.
_TEMPERATURE_SPREAD, _INTERCEPT_SPREAD = 0.7, 0.5
_STEPS, _CONVERGED, _STEEPEST, _VARYING = 50, 1e-8, 100.0, 1e-6


@dataclass(frozen=True)
class Scaling:
    """What calibrates probabilities `(..., C)`; earlier models have a temperature alone.

    Attributes
        temperature: divides the logarithms.
        intercepts (C,): are added then; their sum is 0.
        prior (C,): the frequencies of the classes that the intercepts refer to.
    """

    temperature: float
    intercepts: tuple[float, ...] | None = None
    prior: tuple[float, ...] | None = None

    def apply(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the calibrated probabilities `(..., C)`."""
        logarithms = np.log(np.maximum(probabilities, _TINY)) / self.temperature
        if self.intercepts is not None:
            logarithms = logarithms + np.array(self.intercepts)
        powers = np.exp(logarithms - logarithms.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    def at(self, frequencies: Sequence[float]) -> Self:
        """Return the scaling for a cohort with other frequencies of the classes. Raise ValueError without a prior."""
        if self.intercepts is None or self.prior is None:
            raise ValueError("no frequencies of the classes are recorded")
        shift = np.log(frequencies) - np.log(self.prior)
        intercepts = np.array(self.intercepts) + shift
        return replace(
            self, intercepts=tuple((intercepts - intercepts.mean()).tolist()), prior=tuple(map(float, frequencies))
        )


def fitted_scaling(labels: np.ndarray, probabilities: np.ndarray, is_balanced: bool = True) -> Scaling | None:
    """Return the scaling that makes `probabilities (n, C)` most likely for the true classes `labels (n,)`.

    Targets are smoothed by the number of slides of each class as in Platt scaling (Platt 1999), because on a few slides
    that are all classified correctly the optimal temperature would be zero. Weak priors hold temperature and intercepts
    of few slides: at 1, and at what undoes the weights of the training's loss, the classes' frequencies if it
    `is_balanced`, else nothing. None if a class is missing.
    """
    from scipy.optimize import minimize  # slow to import, and prediction fits nothing

    num_classes = probabilities.shape[1]
    if not auc_is_defined(labels, num_classes):
        return None
    counts = np.bincount(labels, minlength=num_classes)
    target = ((counts + 1) / (counts + 2))[labels]
    targets = np.repeat(((1 - target) / (num_classes - 1))[:, None], num_classes, axis=1)
    targets[np.arange(len(labels)), labels] = target
    logarithms = np.log(np.maximum(probabilities, _TINY))
    prior = (counts + 1) / (counts + 1).sum()
    expected = np.log(prior) - np.log(prior).mean() if is_balanced else np.zeros(num_classes)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        slope, intercepts = math.exp(parameters[0]), parameters[1:]
        logits = slope * logarithms + intercepts
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        surplus = np.exp(logits) * targets.sum(axis=1, keepdims=True) - targets
        pull = (intercepts - expected) / _INTERCEPT_SPREAD
        value = -(targets * logits).sum() + (parameters[0] / _TEMPERATURE_SPREAD) ** 2 / 2 + (pull**2).sum() / 2
        gradient = np.concatenate(
            [
                [slope * (surplus * logarithms).sum() + parameters[0] / _TEMPERATURE_SPREAD**2],
                surplus.sum(axis=0) + pull / _INTERCEPT_SPREAD,
            ]
        )
        return value, gradient

    bounds = [(math.log(1 / _MOST), math.log(1 / _LEAST)), *[(None, None)] * num_classes]
    found = minimize(loss, np.concatenate([[0.0], expected]), jac=True, bounds=bounds, method="L-BFGS-B").x
    intercepts = found[1:] - found[1:].mean()
    return Scaling(math.exp(-found[0]), tuple(intercepts.tolist()), tuple((counts / counts.sum()).tolist()))


def calibration_lines(
    probability: np.ndarray, is_true: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return calibration slope and intercept under each row of `weights (B, n)`, as `(B,)`; NaN if undefined.

    The slope is of a logistic regression of `is_true (n,)` on the log-odds of `probability (n,)`, the intercept of
    another with the slope held at 1: 1 and 0 are perfect, a slope below 1 is over-sure, an intercept below 0 predicts
    too often (Cox 1958; Van Calster et al. 2019, https://doi.org/10.1186/s12916-019-1466-7). Undefined if no finite
    line is most likely, as where the classes are separated, or if the probabilities do not vary.
    """
    clipped = np.clip(probability, 1e-9, 1 - 1e-9)
    odds = np.log(clipped / (1 - clipped))
    outcome = is_true.astype(float)
    ones = np.ones_like(odds)
    if np.ptp(odds) < _VARYING:
        slope = np.full(len(weights), np.nan)
        return slope, _regression(ones[None], odds, outcome, weights)[0]
    slope = _regression(np.stack([odds, ones]), np.zeros_like(odds), outcome, weights)[0]
    return slope, _regression(ones[None], odds, outcome, weights)[0]


def _regression(columns: np.ndarray, offset: np.ndarray, outcome: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the coefficients `(K, B)` of logistic regressions on `columns (K, n)` and an `offset (n,)`."""
    coefficients = np.zeros((len(weights), len(columns)))
    step = np.full_like(coefficients, np.inf)
    for _ in range(_STEPS):
        fitted = 1 / (1 + np.exp(-np.clip(coefficients @ columns + offset, -500, 500)))
        gradient = (weights * (outcome - fitted)) @ columns.T
        spread = weights * fitted * (1 - fitted)
        curvature = np.einsum("bn,kn,ln->bkl", spread, columns, columns) + 1e-10 * np.eye(len(columns))
        step = np.clip(np.linalg.solve(curvature, gradient[..., None])[..., 0], -2, 2)
        coefficients = coefficients + step
        if np.abs(step).max() < _CONVERGED:
            break
    has_ended = np.abs(step).max(axis=1) < 1e-4
    is_finite = np.abs(coefficients).max(axis=1) < _STEEPEST
    return np.where((has_ended & is_finite)[:, None], coefficients, np.nan).T


def corrected_error(probability: np.ndarray, is_true: np.ndarray) -> float:
    """Return the root mean square calibration error over bins of equally many slides, less what chance adds to it.

    The squared gap of a bin of n slides with a share s is s (1 - s) / (n - 1) too large by chance (Kumar et al. 2019,
    https://arxiv.org/abs/1909.10155). 0 if chance explains it all.
    """
    total = 0.0
    for rows in equal_bins(probability):
        share = float(is_true[rows].mean())
        by_chance = share * (1 - share) / max(len(rows) - 1, 1)
        total += len(rows) * ((share - float(probability[rows].mean())) ** 2 - by_chance)
    return math.sqrt(max(0.0, total / len(probability)))
