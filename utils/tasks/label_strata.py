"""Strata of slides with several labels, over which folds are balanced."""

import numpy as np

from utils.tasks.quantiles import PATIENTS


def stratum_labels(has_label: np.ndarray, cases: np.ndarray) -> tuple[int, ...]:
    """Return the labels by which folds can be balanced, the rarest first.

    `has_label (n, K)` bool and `cases (n,)` are those of the slides. Each slide belongs to the rarest of them that it
    has, or to none. A label is left out if fewer than ten patients would belong to it, and the commonest ones if fewer
    than ten would belong to none.
    """
    patients = [len(np.unique(cases[column])) for column in has_label.T]
    chosen: list[int] = []
    free = np.ones(len(has_label), bool)
    for label in np.argsort(patients, kind="stable").tolist():
        rows = free & has_label[:, label]
        if len(np.unique(cases[rows])) >= PATIENTS:
            chosen.append(label)
            free &= ~rows
    while chosen and len(np.unique(cases[free])) < PATIENTS:
        chosen.pop()
        free = ~has_label[:, chosen].any(axis=1)
    return tuple(chosen)


def stratum_of_labels(has_label: np.ndarray, chosen: tuple[int, ...]) -> np.ndarray:
    """Return the stratum `(n,)` int of each slide: the first of the `chosen` labels that it has, or a last one."""
    return np.column_stack([has_label[:, chosen], np.ones(len(has_label), bool)]).argmax(axis=1)
