"""Strata of numbers: parts of about equal size, over which folds are balanced."""

from itertools import pairwise

import numpy as np

PATIENTS = 10  # at least, on average, in a stratum


def inner_quantiles(values: np.ndarray, patients: int, most: int) -> tuple[float, ...]:
    """Return the numbers at which `values (n,)` are cut into at most `most` strata, fewer where patients are few.

    Each is one of the values, and none is the greatest, so that each stratum holds at least one value.
    """
    parts = max(1, min(most, patients // PATIENTS))
    cuts = np.unique(np.quantile(values, np.arange(1, parts) / parts, method="inverted_cdf")) if parts > 1 else []
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
