"""Nested folds that keep each patient whole and each class present.

Slides are indices; a fold's test, train and validation parts are sorted index arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from utils.core.errors import SplitError
from utils.core.runtime import derive_seed

_SHUFFLES = 10


@dataclass(frozen=True)
class InnerFold:
    train: np.ndarray
    val: np.ndarray


@dataclass(frozen=True)
class OuterFold:
    """`test` takes no part in any choice; `inner` are the ways to cut the rest into training and validation."""

    number: int
    test: np.ndarray
    inner: tuple[InnerFold, ...]

    @property
    def train(self) -> np.ndarray:
        return np.sort(np.concatenate([self.inner[0].train, self.inner[0].val]))


def nested_splits(
    labels: np.ndarray, cases: np.ndarray, class_names: Sequence[str], n_outer: int, n_inner: int, seed: int
) -> list[OuterFold]:
    """Outer and inner folds, stratified by class and grouped by case at both levels, numbered from 1.

    `labels (n,)` int, `cases (n,)` patient of each slide. Raises SplitError, saying the most folds that would work,
    when a class has fewer patients than folds.
    """
    everything = np.arange(len(labels))
    _check_enough_patients(labels, cases, class_names, n_outer, "--n_outer", "the cohort")
    folds = []
    for number, test in enumerate(_grouped_folds(labels, cases, n_outer, derive_seed(seed, "outer")), start=1):
        rest = np.setdiff1d(everything, test)
        where = f"the training part of outer fold {number}"
        _check_enough_patients(labels[rest], cases[rest], class_names, n_inner, "--n_inner", where)
        vals = [
            rest[val] for val in _grouped_folds(labels[rest], cases[rest], n_inner, derive_seed(seed, "inner", number))
        ]
        folds.append(OuterFold(number, test, tuple(InnerFold(np.setdiff1d(rest, val), val) for val in vals)))
    return folds


def _check_enough_patients(
    labels: np.ndarray, cases: np.ndarray, class_names: Sequence[str], folds: int, flag: str, where: str
) -> None:
    patients = {name: len(set(cases[labels == index])) for index, name in enumerate(class_names)}
    rarest = min(patients, key=lambda name: patients[name])
    if patients[rarest] < folds:
        most = patients[rarest]
        remedy = f"at most {flag} {most} would work" if most >= 2 else "no split would work; add patients of that class"
        raise SplitError(f"{flag} {folds}: {where} has only {most} patients with class {rarest!r}; {remedy}")


def _grouped_folds(labels: np.ndarray, cases: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """Sorted slide indices of each fold.

    What is stratified is how many patients hold each class, so that one patient with forty slides weighs like any
    other; of a few shuffles, the one taken leaves the fewest folds without a class, then balances the slides best.
    """
    pairs = np.array(sorted(set(zip(cases.tolist(), labels.tolist(), strict=True))), dtype=object)
    shuffles = []
    for attempt in range(_SHUFFLES):
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=derive_seed(seed, attempt) % 2**32)
        tests = splitter.split(pairs, pairs[:, 1].astype(int), pairs[:, 0])
        shuffles.append([np.flatnonzero(np.isin(cases, list(pairs[test, 0]))) for _, test in tests])
    return min(shuffles, key=lambda tests: _imbalance(labels, tests))


def _imbalance(labels: np.ndarray, tests: list[np.ndarray]) -> tuple[int, float]:
    """How many (fold, class) pairs have no slide, and how unevenly the classes' slides spread over the folds."""
    counts = np.array([np.bincount(labels[test], minlength=labels.max() + 1) for test in tests])
    counts = counts[:, counts.sum(axis=0) > 0]
    return int((counts == 0).sum()), float((counts / counts.mean(axis=0)).var(axis=0).sum())
