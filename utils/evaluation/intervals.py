"""95% intervals over patients, for each metric by a method that covers it on small cohorts and at good results.

Slides of a patient count less than as many patients. By how much, a jackknife over patients and the likeness of their
scores tell. All intervals are conditional on the trained models: they cover other patients, not other trainings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from utils.evaluation.resampling import (
    RESAMPLES,
    Weighted,
    jackknife_variance,
    left_out,
    mean_over_repeats,
    resampled,
)
from utils.tasks.bases import (
    Basis,
    Bounded,
    MeanLoss,
    MeanOfProportions,
    NoInterval,
    PairRanking,
    Precision,
    Proportion,
    Share,
)
from utils.tasks.task import Figures, Task, single

Interval = tuple[float, float] | None

LEAST_PATIENTS, LEAST_OF_A_CLASS = 5, 2
_LEVEL = 0.975
# How far the variance of an AUC may be from the formula's: below, few patients would make it too small by chance.
_LEAST_RATIO, _MOST_RATIO = 0.85, 2.0
_TINY = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A metric, None if undefined; its 95% interval by a `method`, or None for a `reason`."""

    value: float | None
    interval: Interval
    method: str = ""
    reason: str = ""


class Patients:
    """The patients `(n,)` of rows, or the groups of patients that count as one."""

    def __init__(self, names: np.ndarray, repeats: np.ndarray, unit: str = "patient") -> None:
        self.unit = unit
        self.patient_of = np.unique(names, return_inverse=True)[1]
        self.count = int(self.patient_of.max()) + 1
        self.is_once = repeats == repeats[0]

    def slides(self, rows: np.ndarray) -> np.ndarray:
        """Return how many slides each patient has among the rows `(n,)` bool, of patients that have some."""
        counts = np.bincount(self.patient_of[rows & self.is_once])
        return counts[counts > 0]

    def size(self, rows: np.ndarray, likeness: float) -> float:
        """Return the effective number of slides among the rows: as many independent ones would say as much.

        `likeness` is the intraclass correlation of slides of a patient (Kish 1965, Survey Sampling).
        """
        slides = self.slides(rows)
        return float(slides.sum() / design_effect(slides, likeness))


def design_effect(slides: np.ndarray, likeness: float) -> float:
    """Return by which factor the variance of a mean rises over that of as many independent slides."""
    return float(1 + ((slides**2).sum() / slides.sum() - 1) * likeness)


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Slides that were tested: one row per slide and repeat.

    Attributes
        labels (n,), values (n, C): the targets and the model's values.
        patients (n,): the patients, or the groups of patients that count as one; repeats (n,), folds (n,): int.
        unit: what `patients` are, "patient" or "group".
    """

    task: Task
    labels: np.ndarray
    values: np.ndarray
    patients: np.ndarray
    repeats: np.ndarray
    folds: np.ndarray | None = None
    unit: str = "patient"

    def pooled(self, weights: np.ndarray) -> Weighted:
        """Return every metric of all slides, the mean over the repeats, under each row of `weights (B, n)`."""
        return mean_over_repeats(
            lambda rows: self.task.metrics(self.labels[rows], self.values[rows], weights[:, rows]), self.repeats
        )

    def within_folds(self, weights: np.ndarray) -> Weighted:
        """Return the metrics that rank slides, comparing slides of a fold only; the mean over the repeats."""
        folds = self.folds
        assert folds is not None  # noqa: S101 - for the type checker
        return mean_over_repeats(
            lambda rows: self.task.metrics_within(self.labels[rows], self.values[rows], weights[:, rows], folds[rows]),
            self.repeats,
        )

    def mean_of_folds(self, weights: np.ndarray) -> Weighted:
        """Return the metrics that rank slides, the mean over the folds where they are defined."""
        assert self.folds is not None  # noqa: S101 - for the type checker
        return mean_over_repeats(
            lambda rows: self.task.metrics_within(
                self.labels[rows], self.values[rows], weights[:, rows], np.zeros(len(rows))
            ),
            self.folds,
        )

    def estimates(self, weigh: Callable[[np.ndarray], Weighted], seed: int) -> dict[str, Estimate]:
        """Return the metrics that `weigh`, one of the methods above, returns, with their 95% intervals."""
        patients = Patients(self.patients, self.repeats, self.unit)
        scores = [self.values[:, index] for index in self.task.ranked_outputs or (0,)]
        strata = self.task.strata(self.labels)
        figures = single(weigh(np.ones((1, len(self.labels)))))
        variances = {name: jackknife_variance(values) for name, values in left_out(self.patients, weigh).items()}
        intervals = _Intervals(
            patients, score_likeness(patients, strata, scores), figures, variances, seed, self.task.side_word
        )
        return intervals.all({name: self.task.basis(name, self.labels, self.values) for name in figures})


def mean_interval(values: np.ndarray, patients: np.ndarray, seed: int) -> Interval:
    """Return the interval of the mean of slides' `values (n,)` from 0 to 1 (see `studentised`); None for fewer than 5
    `patients (n,)`.
    """
    patient_of = np.unique(patients, return_inverse=True)[1]
    interval = studentised(values, patient_of, seed) if patient_of.max() + 1 >= LEAST_PATIENTS else None
    return interval and (interval[0], min(1.0, interval[1]))


def score_likeness(patients: Patients, labels: np.ndarray, scores: Sequence[np.ndarray]) -> float:
    """Return the intraclass correlation of the scores of a patient's slides with one label (stratum), from 0 to 1.

    Scores are replaced by their normal scores less the mean of the label. The correlation is the one of a one-way
    analysis of variance; the mean over several `scores (n,)` of the same slides. 0 if no patient has two slides.
    """
    from scipy.special import ndtri
    from scipy.stats import rankdata

    rows = patients.is_once
    cells = np.unique(patients.patient_of[rows] * (labels.max() + 1) + labels[rows], return_inverse=True)[1]
    slides = np.bincount(cells)
    if len(slides) in (1, len(cells)):
        return 0.0
    correlations = []
    for column in scores:
        normal = ndtri((rankdata(column[rows]) - 0.5) / len(cells))
        for label in np.unique(labels[rows]):
            normal[labels[rows] == label] -= normal[labels[rows] == label].mean()
        means = np.bincount(cells, normal) / slides
        between = (slides * means**2).sum() / (len(slides) - 1)
        within = ((normal - means[cells]) ** 2).sum() / (len(cells) - len(slides))
        usual = (len(cells) - (slides**2).sum() / len(cells)) / (len(slides) - 1)
        total = between + (usual - 1) * within
        correlations.append(min(1.0, max(0.0, (between - within) / total)) if total > _TINY else 1.0)
    return float(np.mean(correlations))


@dataclass(frozen=True)
class _Intervals:
    patients: Patients
    likeness: float
    figures: Figures
    variances: Mapping[str, float]
    seed: int
    side_word: str

    def all(self, bases: Mapping[str, Basis]) -> dict[str, Estimate]:
        """Return the estimate of each metric from its basis."""
        estimates = {name: self._estimate(name, basis) for name, basis in bases.items()}
        means = {name: basis.names for name, basis in bases.items() if isinstance(basis, MeanOfProportions)}
        return estimates | {
            name: self._mean(name, [estimates[part] for part in parts]) for name, parts in means.items()
        }

    def _estimate(self, name: str, basis: Basis) -> Estimate:
        value = self.figures[name]
        if value is None:
            return Estimate(None, None, reason="undefined for these slides")
        reason = self._too_few(basis)
        if reason:
            return Estimate(value, None, reason=reason)
        match basis:
            case Proportion():
                return self._proportion(name, value, basis)
            case PairRanking():
                return self._ranking(name, value, basis)
            case Precision():
                return self._precision(name, value, basis)
            case MeanLoss():
                return self._loss(value, basis)
            case Share():
                return self._share(name, value, basis)
            case Bounded():
                return self._bounded(name, value, basis)
            case NoInterval(reason):
                return Estimate(value, None, reason=reason)
            case MeanOfProportions():
                return Estimate(value, None)

    def _too_few(self, basis: Basis) -> str:
        if self.patients.count < LEAST_PATIENTS:
            return f"fewer than {LEAST_PATIENTS} {self.patients.unit}s"
        if isinstance(basis, Bounded) and any(len(self.patients.slides(rows)) < LEAST_PATIENTS for rows in basis.kinds):
            return f"fewer than {LEAST_PATIENTS} {self.patients.unit}s {basis.words}"
        sides: list[np.ndarray] = []
        if isinstance(basis, PairRanking | Precision):
            sides = [*basis.positives, *basis.negatives]
        elif isinstance(basis, Proportion):
            sides = [basis.rows]
        elif isinstance(basis, Share):
            sides = [rows for rows in basis.kinds if rows.any()]
        if any(len(self.patients.slides(rows)) < LEAST_OF_A_CLASS for rows in sides):
            return f"fewer than {LEAST_OF_A_CLASS} {self.patients.unit}s {self.side_word}"
        return ""

    def _quantile(self, patients: int) -> float:
        return quantile(patients, self.patients.count)

    def _proportion(self, name: str, value: float, basis: Proportion) -> Estimate:
        slides = self.patients.slides(basis.rows)
        binomial = value * (1 - value) / slides.sum()
        effect = design_effect(slides, self.likeness)
        if binomial > _TINY:
            # Few patients may show less of it by chance: at least half of what the scores' likeness adds is there.
            least, most = (1 + effect) / 2, design_effect(slides, 1)
            effect = min(max(self.variances[name] / binomial, least), most)
        interval = wilson(value, slides.sum() / effect, self._quantile(len(slides)))
        return Estimate(value, interval, "Wilson, effective number of slides")

    def _mean(self, name: str, parts: Sequence[Estimate]) -> Estimate:
        """Return the mean of proportions with the interval from theirs (Newcombe 2001,
        https://doi.org/10.1198/000313001317097858: square and add).
        """
        value = self.figures[name]
        defined = [part for part in parts if part.value is not None]
        if value is None or not defined:
            return Estimate(value, None, reason="undefined for these slides")
        reasons = [part.reason for part in defined if part.interval is None]
        if reasons:
            return Estimate(value, None, reason=reasons[0])
        below = [part.value - part.interval[0] for part in defined if part.value is not None and part.interval]
        above = [part.interval[1] - part.value for part in defined if part.value is not None and part.interval]
        low, high = (float(np.linalg.norm(sides)) / len(defined) for sides in (below, above))
        interval = max(0.0, value - low), min(1.0, value + high)
        return Estimate(value, interval, "square and add, of Wilson intervals")

    def _ranking(self, name: str, value: float, basis: PairRanking) -> Estimate:
        sizes = [
            (self.patients.size(positives, self.likeness), self.patients.size(negatives, self.likeness))
            for positives, negatives in zip(basis.positives, basis.negatives, strict=True)
        ]
        positives, negatives = np.mean(sizes, axis=0)
        formula = pair_variance(value, positives, negatives)
        ratio = 1.0
        if formula > _TINY:
            least = _LEAST_RATIO / len(basis.positives)
            ratio = min(max(self.variances[name] / formula, least), _MOST_RATIO)
        z = self._quantile(self.patients.count) * np.sqrt(ratio)
        return Estimate(value, newcombe(value, positives, negatives, z), "Newcombe, effective numbers of slides")

    def _precision(self, name: str, value: float, basis: Precision) -> Estimate:
        most, likely, least = (
            float(np.mean([self.patients.size(rows, likeness) for rows in basis.positives]))
            for likeness in (0, self.likeness, 1)
        )
        size = likely
        if self.variances[name] > _TINY:
            size = min(max(value * (1 - value) / self.variances[name], least / 2), 2 * most)
        fewest = min(len(self.patients.slides(rows)) for rows in basis.positives)
        return Estimate(
            value, wilson(value, size, self._quantile(fewest)), "Wilson, effective number of positive slides"
        )

    def _share(self, name: str, value: float, basis: Share) -> Estimate:
        everything = np.ones(len(self.patients.patient_of), bool)
        size = self.patients.size(everything, self.likeness)
        if self.variances[name] > _TINY:
            size = min(value * (1 - value) / self.variances[name], self.patients.size(everything, 0))
        fewest = min(len(slides) for rows in basis.kinds if len(slides := self.patients.slides(rows)))
        return Estimate(value, wilson(value, size, self._quantile(fewest)), "Wilson, effective number of slides")

    def _bounded(self, name: str, value: float, basis: Bounded) -> Estimate:
        """Return the interval from a jackknife on a scale without limits: the logit, or the logarithm of the distance
        to the only limit.
        """
        error = np.sqrt(self.variances[name])
        if error <= _TINY or not basis.low < value < basis.high:
            return Estimate(value, None, reason=f"the same without any {self.patients.unit}")
        below, above = value - basis.low, basis.high - value
        half = self._quantile(self.patients.count) * error * (1 / below + 1 / above)
        if np.isinf(below):
            low, high = (basis.high - above * np.exp(side * half) for side in (1, -1))
            return Estimate(value, (float(low), float(high)), "jackknife over patients, on a logarithmic scale")
        low, high = (
            basis.low + (basis.high - basis.low) / (1 + above / below * np.exp(-side * half)) for side in (-1, 1)
        )
        return Estimate(value, (float(low), float(high)), "jackknife over patients, on the logit scale")

    def _loss(self, value: float, basis: MeanLoss) -> Estimate:
        interval = studentised(basis.losses, self.patients.patient_of, self.seed)
        if interval is None:
            return Estimate(value, None, reason="all patients have the same loss")
        if np.isinf(basis.most):
            return Estimate(value, interval, "studentised bootstrap over patients")
        # Nothing between 0 and the greatest loss varies more than a share of slides that have it.
        everything = np.ones(len(self.patients.patient_of), bool)
        size = self.patients.size(everything, self.likeness)
        most = basis.most * wilson(min(value / basis.most, 1), size, self._quantile(self.patients.count))[1]
        interval = interval[0], max(value, min(interval[1], most))
        return Estimate(value, interval, "studentised bootstrap over patients, at most Wilson's limit")


def quantile(patients: int, everyone: int) -> float:
    """Return the multiple of the standard error to either side: the t quantile (see `degrees`)."""
    from scipy.stats import t as student

    return float(student.ppf(_LEVEL, degrees(patients, everyone)))


def degrees(patients: int, everyone: int) -> int:
    """Return the degrees of freedom where m `patients` of the rarest kind count, of `everyone`: 2 m - 1, but fewer than
    everyone. Chosen by simulation (`benchmarks/intervals_and_tests.py`).
    """
    return max(min(2 * patients, everyone) - 1, 1)


def wilson(share: float, count: float, z: float) -> tuple[float, float]:
    """Return the interval of a share of `count` (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    # At a share of 0 or 1 that limit is the share itself, but for rounding.
    return max(0.0, min(share, float(middle - half))), min(1.0, max(share, float(middle + half)))


def pair_variance(auc: float, positives: float, negatives: float) -> float:
    """Return the variance of an AUC of so many slides (Hanley and McNeil 1982, with the means of both numbers as in
    Newcombe's method 5: https://doi.org/10.1002/sim.2324).
    """
    others = (positives + negatives) / 2 - 1
    spread = 1 + others * (1 - auc) / (2 - auc) + others * auc / (1 + auc)
    return auc * (1 - auc) * spread / (positives * negatives)


def newcombe(auc: float, positives: float, negatives: float, z: float) -> tuple[float, float]:
    """Return the interval of an AUC: the values from which it is `z` of their own standard errors away (Newcombe 2006,
    method 5, https://doi.org/10.1002/sim.2324).
    """
    from scipy.optimize import brentq

    def distance(truth: float) -> float:
        return (auc - truth) ** 2 - z**2 * pair_variance(truth, positives, negatives)

    # At the ends the distance is 0; just inside it is negative.
    inside = min(max(auc, 1e-9), 1 - 1e-9)
    low = 0.0 if auc < _TINY else brentq(distance, 0, inside)
    high = 1.0 if auc > 1 - _TINY else brentq(distance, inside, 1)
    return float(low), float(high)  # pyright: ignore[reportArgumentType] - brentq returns more only if asked to


def studentised(losses: np.ndarray, patient_of: np.ndarray, seed: int) -> Interval:
    """Return the studentised bootstrap interval over patients of the mean of `losses (n,)`, which are 0 or more (Efron
    and Tibshirani 1993, An Introduction to the Bootstrap, chapter 12). None if all patients have the same mean.
    """
    sums, counts = np.bincount(patient_of, losses), np.bincount(patient_of).astype(float)

    def mean_and_error(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total = weights @ counts
        mean = weights @ sums / total
        squares = weights @ sums**2 - 2 * mean * (weights @ (sums * counts)) + mean**2 * (weights @ counts**2)
        return mean, np.sqrt(np.maximum(squares, 0)) / total

    (mean,), (error,) = mean_and_error(np.ones((1, len(counts))))
    if error <= _TINY:
        return None
    pairs = [mean_and_error(weights) for weights in resampled(np.arange(len(counts)), seed, RESAMPLES)]
    means, errors = (np.concatenate(columns) for columns in zip(*pairs, strict=True))
    defined = errors > _TINY
    low, high = np.percentile((means[defined] - mean) / errors[defined], [2.5, 97.5])
    return max(0.0, float(mean - high * error)), float(mean - low * error)
