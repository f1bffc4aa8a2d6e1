"""Sums and shares under many weightings of the same slides."""

import numpy as np


def group_sums(values: np.ndarray, groups: np.ndarray, num_groups: int) -> np.ndarray:
    """Return the sums `(B, num_groups)` of `values (B, n)` over each of the `groups (n,)`."""
    return values @ (groups[:, None] == np.arange(num_groups))


def ratio(numerator: np.ndarray, denominator: np.ndarray, empty: float = np.nan) -> np.ndarray:
    """Return the ratio; `empty` where the denominator is not above 0."""
    return np.divide(numerator, denominator, out=np.full(denominator.shape, empty, float), where=denominator > 0)
