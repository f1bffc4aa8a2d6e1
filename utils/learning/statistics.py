"""How sure a figure is: patient-cluster bootstrap intervals."""

import numpy as np

from utils.learning.metrics import METRICS, classification_metrics

RESAMPLES = 1000


def bootstrap_intervals(
    labels: np.ndarray, probabilities: np.ndarray, cases: np.ndarray, seed: int, resamples: int = RESAMPLES
) -> dict[str, tuple[float, float] | None]:
    """95% percentile intervals of each metric over resampled patients (all slides of a drawn patient come along).

    `labels (n,)`, `probabilities (n, C)`, `cases (n,)`. They are conditional on the trained models: what another
    cohort of patients would have given, not what another training would. Resamples in which a figure is undefined
    do not count for it; None when it is undefined in more than half of them.
    """
    rng = np.random.default_rng(seed)
    slides_of = [np.flatnonzero(cases == case) for case in np.unique(cases)]
    drawn: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(resamples):
        chosen = rng.integers(len(slides_of), size=len(slides_of))
        rows = np.concatenate([slides_of[patient] for patient in chosen])
        for name, value in classification_metrics(labels[rows], probabilities[rows]).items():
            if value is not None:
                drawn[name].append(value)
    return {name: _interval(values, resamples) for name, values in drawn.items()}


def _interval(values: list[float], resamples: int) -> tuple[float, float] | None:
    if len(values) < resamples / 2:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
