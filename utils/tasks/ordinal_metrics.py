"""Metrics of predicted grades, which have an order; an undefined one is NaN.

Each is computed for many weightings of the same slides at once; a weight of k counts as k copies of the slide.
"""

import numpy as np

from utils.tasks.weighted import group_sums, ratio

METRICS = ("quadratic_kappa", "mae", "accuracy")


def ordinal_metrics(
    targets: np.ndarray, predicted: np.ndarray, weights: np.ndarray, num_grades: int
) -> dict[str, np.ndarray]:
    """Return the metrics `METRICS` under each row of `weights (B, n)`, as `(B,)`, for the grades `targets (n,)` and
    `predicted (n,)`, int from 0.

    Cohen's kappa is weighted by the squared distance of the grades (Cohen 1968, https://doi.org/10.1037/h0026256); it
    is undefined if all slides have one grade that is also predicted for all. MAE is the mean distance.
    """
    pairs = group_sums(weights, targets * num_grades + predicted, num_grades**2)
    counts = pairs.reshape(-1, num_grades, num_grades)
    grades = np.arange(num_grades)
    distances = np.abs(grades[:, None] - grades)
    total, true, assigned = counts.sum(axis=(1, 2)), counts.sum(axis=2), counts.sum(axis=1)
    by_chance = ratio(np.einsum("bt,ta,ba->b", true, distances**2, assigned), total)
    return {
        "quadratic_kappa": 1 - ratio((counts * distances**2).sum(axis=(1, 2)), by_chance),
        "mae": ratio((counts * distances).sum(axis=(1, 2)), total),
        "accuracy": ratio(counts.trace(axis1=1, axis2=2), total),
    }
