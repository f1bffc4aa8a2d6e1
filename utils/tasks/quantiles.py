"""Strata of numbers: parts of about equal size, over which folds are balanced."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

PATIENTS = 10  # at least, on average, in a stratum


def patient_quantiles(values: np.ndarray, cases: Sequence[str], parts: int) -> np.ndarray:
    """Return the numbers between `parts` equal parts of the slides' `values (n,)`, where each patient counts once,
    however many slides there are. Each is one of the values.
    """
    _, patient, counts = np.unique(np.asarray(cases), return_inverse=True, return_counts=True)
    shares = np.arange(1, parts) / parts
    return np.quantile(values, shares, weights=1 / counts[patient], method="inverted_cdf")


def inner_quantiles(values: np.ndarray, cases: Sequence[str], most: int) -> tuple[float, ...]:
    """Return the numbers at which the slides' `values (n,)` are cut into at most `most` strata with about equally many
    patients, fewer where patients are few.

    Each is one of the values, and none is the greatest, so that each stratum holds at least one value.
    """
    parts = max(1, min(most, len(set(cases)) // PATIENTS))
    cuts = np.unique(patient_quantiles(values, cases, parts)) if parts > 1 else []
    return tuple(float(cut) for cut in cuts if cut < values.max())


def stratum_of(values: np.ndarray, cuts: tuple[float, ...]) -> np.ndarray:
    """Return the stratum `(n,)` int of each of the `values (n,)`; a value at a cut belongs to the stratum below."""
    return np.searchsorted(np.array(cuts), values, side="left")


def stratum_names(cuts: tuple[float, ...]) -> list[str]:
    """Return the names of the strata: "up to 3", "over 3 to 5", "over 5"."""
    if not cuts:
        return ["all"]
    between = [f"over {low:.4g} to {high:.4g}" for low, high in pairwise(cuts)]
    return [f"up to {cuts[0]:.4g}", *between, f"over {cuts[-1]:.4g}"]
