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
_CELLS = "class", "grade"  # strata whose names are cells of the label table


@dataclass(frozen=True)
class InnerFold:
    train: np.ndarray
    val: np.ndarray


@dataclass(frozen=True)
class OuterFold:
    """An outer fold. No choice depends on its `test` slides; `inner` splits the other slides into training and
    validation. Numbers continue over the repeats; the test sets of one repeat do not overlap.
    """

    number: int
    test: np.ndarray
    inner: tuple[InnerFold, ...]
    repeat: int = 1

    @property
    def train(self) -> np.ndarray:
        """Return all slides that any inner fold trains or validates on."""
        return np.unique(np.concatenate([slides for inner in self.inner for slides in (inner.train, inner.val)]))


def nested_splits(
    labels: np.ndarray,
    cases: np.ndarray,
    class_names: Sequence[str],
    n_outer: int,
    n_inner: int,
    seed: int,
    unit: str = "patient",
    stratum: str = "class",
) -> list[OuterFold]:
    """Return outer and inner folds, stratified by class and grouped by case at both levels, numbered from 1.

    `labels (n,)` int are the classes, or what `stratum` names; `cases (n,)` are the groups that no split divides:
    patients, or what `unit` names. Raises SplitError, with the most folds that would work, if a class has fewer
    patients than folds.
    """
    tests = _grouped_folds(labels, cases, n_outer, derive_seed(seed, "outer"))
    patients = _patients(labels, cases, len(class_names))
    if patients.min() < n_outer or _most_inner(labels, cases, len(class_names), tests) < n_inner:
        raise SplitError(_shortage(labels, cases, class_names, n_outer, n_inner, seed, unit, stratum))
    folds = []
    for number, test in enumerate(tests, start=1):
        train = np.setdiff1d(np.arange(len(labels)), test)
        vals = _grouped_folds(labels[train], cases[train], n_inner, derive_seed(seed, "inner", number))
        inner = tuple(InnerFold(np.setdiff1d(train, train[val]), train[val]) for val in vals)
        folds.append(OuterFold(number, test, inner))
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
    stratum: str = "class",
) -> list[OuterFold]:
    """Return the folds of so many `nested_splits`, each with a seed of its own; the first has `seed` itself."""
    folds = []
    for repeat in range(1, repeats + 1):
        repeat_seed = seed if repeat == 1 else derive_seed(seed, "repeat", repeat)
        for fold in nested_splits(labels, cases, class_names, n_outer, n_inner, repeat_seed, unit, stratum):
            folds.append(replace(fold, number=len(folds) + 1, repeat=repeat))
    return folds


def few_patients(
    folds: Sequence[OuterFold],
    labels: np.ndarray,
    cases: np.ndarray,
    class_names: Sequence[str],
    stratum: str = "class",
) -> str:
    """Return a warning if inner folds validate on a single patient of a class, or on none; empty if none do.

    `labels (n,)` and `cases (n,)` are the slides' classes, or what `stratum` names, and patients.
    """
    validated = [
        (f"outer fold {fold.number}, inner {number}", _patients(labels[inner.val], cases[inner.val], len(class_names)))
        for fold in folds
        for number, inner in enumerate(fold.inner, start=1)
    ]
    thin = [(name, class_names[int(patients.argmin())]) for name, patients in validated if patients.min() < 2]
    if not thin:
        return ""
    name, rarest = thin[0]
    advice = "add patients" if len(folds[0].inner) == 2 else "give a smaller --n_inner"
    return (
        f"{len(thin)} of {plural(len(validated), 'inner fold')} validate on one patient of a {stratum} or none (the "
        f"first: {name}, {rarest}); what is chosen there, from epoch to threshold, is mostly chance: {advice}"
    )


def _patients(labels: np.ndarray, cases: np.ndarray, num_classes: int) -> np.ndarray:
    """Return how many patients have a slide of each class."""
    return np.array([len(set(cases[labels == index])) for index in range(num_classes)])


def _most_inner(labels: np.ndarray, cases: np.ndarray, num_classes: int, tests: Sequence[np.ndarray]) -> int:
    """Return the most inner folds for which every outer training set has enough patients."""
    trains = [np.setdiff1d(np.arange(len(labels)), test) for test in tests]
    return min(int(_patients(labels[train], cases[train], num_classes).min()) for train in trains)


def _shortage(
    labels: np.ndarray,
    cases: np.ndarray,
    class_names: Sequence[str],
    n_outer: int,
    n_inner: int,
    seed: int,
    unit: str,
    stratum: str,
) -> str:
    """Return the error text for too few patients, with the nearest numbers of folds that work."""
    patients = _patients(labels, cases, len(class_names))
    fewest, rarest = int(patients.min()), class_names[int(patients.argmin())]
    if fewest == 0:
        return f"no slide has the class {rarest!r}; leave it out of --class_names"
    problem = f"--n_outer {n_outer} --n_inner {n_inner}: only {plural(fewest, unit)} with {stratum} {rarest!r}"
    for outer in sorted(range(2, fewest + 1), key=lambda outer: abs(outer - n_outer)):
        tests = _grouped_folds(labels, cases, outer, derive_seed(seed, "outer"))
        inner = min(n_inner, _most_inner(labels, cases, len(class_names), tests))
        if inner < 2:
            continue
        if outer == n_outer:
            return f"{problem}; at most --n_inner {inner} would work"
        most = "at most " if outer < n_outer else ""
        with_inner = f", with --n_inner {inner}" if inner < n_inner else ""
        return f"{problem}; {most}--n_outer {outer} would work{with_inner}"
    others = [name for name in class_names if name != rarest and stratum in _CELLS]
    near = get_close_matches(rarest, others, n=1, cutoff=0.8)
    hint = f"mend the label if {near[0]!r} is meant, or " if near else ""
    return f"{problem}; no split would work; {hint}add slides of that {stratum} from more {unit}s"


def _grouped_folds(labels: np.ndarray, cases: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """Return the sorted slide indices of each fold.

    Folds are balanced by the patients with each class, so that a patient with forty slides weighs like any other. Of a
    few shuffles, the best one leaves the fewest folds without a class, then balances the slides best.
    """
    names, patient_of = np.unique(cases, return_inverse=True)
    slides = np.zeros((len(names), labels.max() + 1), dtype=int)
    np.add.at(slides, (patient_of, labels), 1)
    shuffles = []
    for attempt in range(_SHUFFLES):
        fold_of = _stratified(slides, folds, np.random.default_rng(derive_seed(seed, attempt)))
        shuffles.append([np.flatnonzero(fold_of[patient_of] == fold) for fold in range(folds)])
    return min(shuffles, key=lambda tests: _imbalance(labels, tests))


def _stratified(slides: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Return the fold of each patient; `slides (patients, C)` counts their slides of each class.

    Iterative stratification (Sechidis et al. 2011, https://doi.org/10.1007/978-3-642-23808-6_10): the class with the
    fewest remaining patients is distributed first, each patient to the fold that has the fewest patients of that class,
    then the fewest slides. Patients of several classes, which other methods pile up in one fold, and patients with many
    slides are thus placed while there is still a choice.
    """
    has_class = slides > 0
    fold_of = np.full(len(slides), -1)
    fold_patients = np.zeros((folds, slides.shape[1]), dtype=int)
    fold_slides = np.zeros(folds, dtype=int)
    while (remaining := has_class & (fold_of < 0)[:, None]).any():
        totals = remaining.sum(axis=0)
        rarest = int(np.where(totals > 0, totals, len(slides) + 1).argmin())
        patients = rng.permutation(np.flatnonzero(remaining[:, rarest]))
        # Patients of many classes and many slides go first; the others can even out the imbalance they cause.
        for patient in sorted(patients, key=lambda index: (-has_class[index].sum(), -slides[index].sum())):
            fold = min(rng.permutation(folds), key=lambda index: (fold_patients[index, rarest], fold_slides[index]))
            fold_of[patient] = fold
            fold_patients[fold] += has_class[patient]
            fold_slides[fold] += slides[patient].sum()
    return fold_of


def _imbalance(labels: np.ndarray, tests: list[np.ndarray]) -> tuple[int, float]:
    """Return how many (fold, class) pairs have no slide, and how unevenly the classes' slides spread over the folds."""
    counts = np.array([np.bincount(labels[test], minlength=labels.max() + 1) for test in tests])
    counts = counts[:, counts.sum(axis=0) > 0]
    return int((counts == 0).sum()), float((counts / counts.mean(axis=0)).var(axis=0).sum())
