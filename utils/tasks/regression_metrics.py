"""Metrics of predicted numbers; an undefined one is NaN.

Each is computed for many weightings of the same slides at once; a weight of k counts as k copies of the slide.
"""

import numpy as np

from utils.tasks.weighted import ratio

METRICS = ("r2", "mae", "pearson", "spearman")


def regression_metrics(targets: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics `METRICS` under each row of `weights (B, n)`, as `(B,)`, for `targets (n,)` and `predicted
    (n,)`: the coefficient of determination, the mean absolute error, and the correlations of Pearson and Spearman.
    """
    total = weights.sum(axis=1)
    errors = weights @ (predicted - targets) ** 2
    mean = ratio(weights @ targets, total)
    # Around the middle of the targets, so that large numbers lose no digits.
    middle = targets.mean()
    spread = weights @ (targets - middle) ** 2 - total * (mean - middle) ** 2
    return {
        "r2": 1 - ratio(errors, np.where(spread > _least(targets) * total, spread, 0)),
        "mae": ratio(weights @ np.abs(predicted - targets), total),
        "pearson": _correlation(targets[None], predicted[None], weights),
        "spearman": _correlation(_ranks(targets, weights), _ranks(predicted, weights), weights),
    }


def _correlation(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted correlation `(B,)` of `first` and `second`, each `(B, n)` or `(1, n)`."""
    total = weights.sum(axis=1, keepdims=True)
    shares = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    deviations = [values - (shares * values).sum(axis=1, keepdims=True) for values in (first, second)]
    covariance = (shares * deviations[0] * deviations[1]).sum(axis=1)
    variances = [(shares * each**2).sum(axis=1) for each in deviations]
    is_flat = [variance <= _least(values) for variance, values in zip(variances, (first, second), strict=True)]
    scale = np.where(is_flat[0] | is_flat[1], 0, np.sqrt(variances[0] * variances[1]))
    return np.clip(ratio(covariance, scale), -1, 1)


def _least(values: np.ndarray) -> float:
    """Return the variance up to which numbers of this size are equal but for rounding."""
    return float(np.finfo(np.float64).eps * np.abs(values).max(initial=0)) ** 2 * 16


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the ranks `(B, n)` of `values (n,)` among their copies; equal values share the middle one."""
    order = np.argsort(values, kind="stable")
    _, starts, group_of = np.unique(values[order], return_index=True, return_inverse=True)
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)
    middles = sizes.cumsum(axis=1) - (sizes - 1) / 2
    ranks = np.empty(weights.shape)
    ranks[:, order] = middles[:, group_of]
    return ranks
