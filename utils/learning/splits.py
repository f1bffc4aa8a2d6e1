"""Nested folds that keep each patient whole and each class present.

Slides are indices; a fold's test, train and validation parts are sorted index arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import numpy as np

from utils.core.errors import SplitError, plural
from utils.core.runtime import derive_seed

_SHUFFLES = 10


@dataclass(frozen=True)
class InnerFold:
    train: np.ndarray
    val: np.ndarray


@dataclass(frozen=True)
class OuterFold:
    """`test` takes no part in any choice; `inner` are the ways to cut the rest into training and validation. Numbers go
    on over the repeats; the tests of one repeat do not overlap.
    """

    number: int
    test: np.ndarray
    inner: tuple[InnerFold, ...]
    repeat: int = 1

    @property
    def train(self) -> np.ndarray:
        """All slides that any inner fold trains or validates on."""
        return np.unique(np.concatenate([part for inner in self.inner for part in (inner.train, inner.val)]))


def nested_splits(
    labels: np.ndarray,
    cases: np.ndarray,
    class_names: Sequence[str],
    n_outer: int,
    n_inner: int,
    seed: int,
    unit: str = "patient",
) -> list[OuterFold]:
    """Outer and inner folds, stratified by class and grouped by case at both levels, numbered from 1.

    `labels (n,)` int, `cases (n,)` what no split divides, a slide's patient if `unit` says nothing else. Raises
    SplitError, saying the most folds that would work, when a class has fewer patients than folds.
    """
    tests = _grouped_folds(labels, cases, n_outer, derive_seed(seed, "outer"))
    patients = _patients(labels, cases, len(class_names))
    if patients.min() < n_outer or _most_inner(labels, cases, len(class_names), tests) < n_inner:
        raise SplitError(_shortage(labels, cases, class_names, n_outer, n_inner, seed, unit))
    folds = []
    for number, test in enumerate(tests, start=1):
        rest = np.setdiff1d(np.arange(len(labels)), test)
        vals = _grouped_folds(labels[rest], cases[rest], n_inner, derive_seed(seed, "inner", number))
        folds.append(
            OuterFold(number, test, tuple(InnerFold(np.setdiff1d(rest, rest[val]), rest[val]) for val in vals))
        )
    return folds


def repeated_splits(
    labels: np.ndarray,
    cases: np.ndarray,
    class_names: Sequence[str],
    n_outer: int,
    n_inner: int,
    repeats: int,
    seed: int,
    unit: str = "patient",
) -> list[OuterFold]:
    """`nested_splits` as often as `repeats` says, each time dealt anew; the folds of the first are those of `seed`."""
    folds = []
    for repeat in range(1, repeats + 1):
        dealt = seed if repeat == 1 else derive_seed(seed, "repeat", repeat)
        for fold in nested_splits(labels, cases, class_names, n_outer, n_inner, dealt, unit):
            folds.append(replace(fold, number=len(folds) + 1, repeat=repeat))
    return folds


def few_patients(folds: Sequence[OuterFold], labels: np.ndarray, cases: np.ndarray, class_names: Sequence[str]) -> str:
    """Return a warning where inner folds validate on a single patient of a class, or on none; empty where none do.

    `labels (n,)` and `cases (n,)` are the slides' classes and patients.
    """
    validated = [
        (f"outer fold {fold.number}, inner {number}", _patients(labels[inner.val], cases[inner.val], len(class_names)))
        for fold in folds
        for number, inner in enumerate(fold.inner, start=1)
    ]
    thin = [(place, class_names[int(patients.argmin())]) for place, patients in validated if patients.min() < 2]
    if not thin:
        return ""
    place, rarest = thin[0]
    fewer = "add patients" if len(folds[0].inner) == 2 else "give a smaller --n_inner"
    return (
        f"{len(thin)} of {plural(len(validated), 'inner fold')} validate on one patient of a class or none (the "
        f"first: {place}, {rarest}); what is chosen there, from epoch to threshold, is mostly chance: {fewer}, or "
        "average over the inner models with --final ensemble"
    )


def _patients(labels: np.ndarray, cases: np.ndarray, num_classes: int) -> np.ndarray:
    """How many patients have a slide of each class."""
    return np.array([len(set(cases[labels == index])) for index in range(num_classes)])


def _most_inner(labels: np.ndarray, cases: np.ndarray, num_classes: int, tests: Sequence[np.ndarray]) -> int:
    """The most inner folds that the training part of every outer fold has patients for."""
    rests = [np.setdiff1d(np.arange(len(labels)), test) for test in tests]
    return min(int(_patients(labels[rest], cases[rest], num_classes).min()) for rest in rests)


def _shortage(
    labels: np.ndarray,
    cases: np.ndarray,
    class_names: Sequence[str],
    n_outer: int,
    n_inner: int,
    seed: int,
    unit: str,
) -> str:
    """Why there are too few patients, and the folds nearest to those asked for, tried here, that work."""
    patients = _patients(labels, cases, len(class_names))
    fewest, rarest = int(patients.min()), class_names[int(patients.argmin())]
    if fewest == 0:
        return f"no slide has the class {rarest!r}; leave it out of --class_names"
    found = f"--n_outer {n_outer} --n_inner {n_inner}: only {plural(fewest, unit)} with class {rarest!r}"
    for outer in sorted(range(2, fewest + 1), key=lambda outer: abs(outer - n_outer)):
        tests = _grouped_folds(labels, cases, outer, derive_seed(seed, "outer"))
        inner = min(n_inner, _most_inner(labels, cases, len(class_names), tests))
        if inner < 2:
            continue
        if outer == n_outer:
            return f"{found}; at most --n_inner {inner} would work"
        most = "at most " if outer < n_outer else ""
        return f"{found}; {most}--n_outer {outer} would work" + (f", with --n_inner {inner}" if inner < n_inner else "")
    near = get_close_matches(rarest, [name for name in class_names if name != rarest], n=1, cutoff=0.8)
    hint = f"mend the label if {near[0]!r} is meant, or " if near else ""
    return f"{found}; no split would work; {hint}add slides of that class from more {unit}s"


def _grouped_folds(labels: np.ndarray, cases: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """Sorted slide indices of each fold.

    What is stratified is how many patients hold each class, so that one patient with forty slides weighs like any
    other; of a few shuffles, the one taken leaves the fewest folds without a class, then balances the slides best.
    """
    names, patient_of = np.unique(cases, return_inverse=True)
    slides = np.zeros((len(names), labels.max() + 1), dtype=int)
    np.add.at(slides, (patient_of, labels), 1)
    shuffles = []
    for attempt in range(_SHUFFLES):
        fold_of = _deal(slides, folds, np.random.default_rng(derive_seed(seed, attempt)))
        shuffles.append([np.flatnonzero(fold_of[patient_of] == fold) for fold in range(folds)])
    return min(shuffles, key=lambda tests: _imbalance(labels, tests))


def _deal(slides: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold of each patient, given how many `slides (patients, C)` of each class each one has.

    Iterative stratification (Sechidis et al. 2011, https://doi.org/10.1007/978-3-642-23808-6_10): the class with the
    fewest patients left is dealt first, each patient to the fold that has the fewest patients of that class, then the
    fewest slides. Patients of several classes, which other ways of stratifying pile up, are thus spread while there is
    still a choice, and so are those with many slides.
    """
    holds = slides > 0
    fold_of = np.full(len(holds), -1)
    patients_in = np.zeros((folds, holds.shape[1]), dtype=int)
    slides_in = np.zeros(folds, dtype=int)
    while (left := holds & (fold_of < 0)[:, None]).any():
        totals = left.sum(axis=0)
        rarest = int(np.where(totals > 0, totals, len(holds) + 1).argmin())
        waiting = rng.permutation(np.flatnonzero(left[:, rarest]))
        # Patients of many classes and many slides go first: the others can mend what they unbalance.
        for patient in sorted(waiting, key=lambda one: (-holds[one].sum(), -slides[one].sum())):
            fold = min(rng.permutation(folds), key=lambda one: (patients_in[one, rarest], slides_in[one]))
            fold_of[patient] = fold
            patients_in[fold] += holds[patient]
            slides_in[fold] += slides[patient].sum()
    return fold_of


def _imbalance(labels: np.ndarray, tests: list[np.ndarray]) -> tuple[int, float]:
    """How many (fold, class) pairs have no slide, and how unevenly the classes' slides spread over the folds."""
    counts = np.array([np.bincount(labels[test], minlength=labels.max() + 1) for test in tests])
    counts = counts[:, counts.sum(axis=0) > 0]
    return int((counts == 0).sum()), float((counts / counts.mean(axis=0)).var(axis=0).sum())
