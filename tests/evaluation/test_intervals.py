"""Intervals that are right by published formulas, by simulation, and at the edges."""

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from tests.evaluation.predicted import noisy_answers
from tests.small import TASK
from utils.evaluation.intervals import (
    Estimate,
    ScoredRows,
    mean_interval,
    newcombe,
    pair_variance,
    quantile,
    score_likeness,
    studentised,
    wilson,
)
from utils.evaluation.intervals import Patients as PatientsOf
from utils.tasks.classification import Classification

NORMAL = 1.959964


def rows_of(labels, probabilities, patients=None, **columns) -> ScoredRows:
    patients = np.arange(len(labels)) if patients is None else patients
    return ScoredRows(TASK, labels, probabilities, patients, columns.pop("repeats", np.ones(len(labels))), **columns)


def estimates(*arguments, seed=0, **columns) -> dict[str, Estimate]:
    rows = rows_of(*arguments, **columns)
    return rows.estimates(rows.pooled, seed)


def width(estimate: Estimate) -> float:
    return estimate.interval[1] - estimate.interval[0]


def two_normals(rng, patients, prevalence, auc, slides=1, likeness=0.5):
    """Labels, true probabilities (for equally frequent classes) and patients of a known AUC."""
    distance = np.sqrt(2) * norm.ppf(auc)
    patient = np.repeat(np.arange(patients), slides)
    labels = (rng.random(patients) < prevalence).astype(int)[patient]
    noise = np.sqrt(likeness) * rng.normal(size=patients)[patient]
    noise += np.sqrt(1 - likeness) * rng.normal(size=len(patient))
    positive = 1 / (1 + np.exp(-distance * (distance * labels + noise) + distance**2 / 2))
    return labels, np.stack([1 - positive, positive], axis=1), patient


def test_every_metric_but_the_calibration_error_has_an_interval_around_it():
    labels = np.arange(60) % 2
    found = estimates(labels, noisy_answers(np.random.default_rng(0), labels), np.arange(60) // 3)
    assert list(found) == list(TASK.metric_names)
    for name, estimate in found.items():
        if name == "ece":
            assert (estimate.interval, estimate.reason) == (None, "by chance alone it is above 0")
        else:
            low, high = estimate.interval
            assert 0 <= low < estimate.value < high <= 1
            assert estimate.method
            assert not estimate.reason


@pytest.mark.parametrize(("right", "count"), [(0, 8), (3, 8), (8, 8), (95, 120)])
def test_wilson_is_scipys(right, count):
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right / count, count, NORMAL) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_hanley_and_mcneils_example():
    """0.893 of 51 abnormal and 58 normal images: a standard error of 0.032 (Radiology 143, 1982, table II)."""
    assert np.sqrt(pair_variance(0.893, 51, 58)) == pytest.approx(0.032, abs=5e-4)


@pytest.mark.parametrize("auc", [0, 0.2, 0.5, 0.9, 0.999, 1])
def test_newcombes_limits_are_as_far_as_their_own_error_says(auc):
    low, high = newcombe(auc, 12, 40, NORMAL)
    assert 0 <= low <= auc <= high <= 1
    assert high - low > 0.05
    for limit in (low, high):
        if 0 < limit < 1:
            assert abs(auc - limit) == pytest.approx(NORMAL * np.sqrt(pair_variance(limit, 12, 40)), rel=1e-6)


def test_perfect_answers_have_an_interval_of_some_width():
    labels = np.arange(40) % 2
    found = estimates(labels, np.eye(2)[labels] * 0.8 + 0.1)
    for name in ("accuracy", "balanced_accuracy", "f1_macro", "auc", "average_precision", "sensitivity_yes"):
        assert found[name].value == 1
        assert 0.7 < found[name].interval[0] < 0.95
        assert found[name].interval[1] == pytest.approx(1)
    assert (found["brier"].interval, found["brier"].reason) == (None, "all patients have the same loss")


def test_copies_of_a_slide_say_nothing_new():
    rng = np.random.default_rng(3)
    labels = np.arange(40) % 2
    probabilities, tenfold = noisy_answers(rng, labels), np.repeat(np.arange(40), 10)
    once = estimates(labels, probabilities)
    copied = estimates(labels[tenfold], probabilities[tenfold], tenfold)
    as_if_patients = estimates(labels[tenfold], probabilities[tenfold])
    for name in ("accuracy", "balanced_accuracy", "f1_macro", "auc", "average_precision", "brier"):
        assert copied[name].interval == pytest.approx(once[name].interval, abs=1e-6)
        assert width(as_if_patients[name]) < 0.6 * width(copied[name])


def test_repeats_do_not_multiply_slides():
    labels = np.arange(40) % 2
    probabilities = noisy_answers(np.random.default_rng(3), labels)
    thrice = np.tile(np.arange(40), 3)
    once = estimates(labels, probabilities)
    repeated = estimates(labels[thrice], probabilities[thrice], thrice, repeats=np.repeat([1, 2, 3], 40))
    for name, estimate in once.items():
        assert repeated[name].interval == pytest.approx(estimate.interval, abs=1e-9)


def test_likeness_is_the_share_of_variance_between_patients():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(400), 3)
    labels = patients % 2
    for share in (0.0, 0.3, 0.8):
        scores = np.sqrt(share) * rng.normal(size=400)[patients] + np.sqrt(1 - share) * rng.normal(size=1200)
        found = score_likeness(PatientsOf(patients, np.ones(1200)), labels, [scores + 3 * labels])
        assert found == pytest.approx(share, abs=0.06)
    assert score_likeness(PatientsOf(np.arange(6), np.ones(6)), np.zeros(6, int), [rng.random(6)]) == 0


@pytest.mark.parametrize(
    ("slides", "auc", "prevalence"), [(1, 0.95, 0.2), (1, 0.7, 0.5), (4, 0.9, 0.2), (4, 0.99, 0.5)]
)
def test_about_ninety_five_percent_hold_the_true_auc(slides, auc, prevalence):
    """Percentiles of a bootstrap hold 0.87 of the first and 0.80 of the last kind of cohort."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(150):
        labels, probabilities, patients = two_normals(rng, 60, prevalence, auc, slides)
        low, high = estimates(labels, probabilities, patients)["auc"].interval
        held += low <= auc <= high
    assert held >= 136  # of a true 0.95, fewer in one of fifty tries


def test_the_mean_of_losses_has_scipys_studentised_spread():
    rng = np.random.default_rng(1)
    losses = rng.exponential(size=80)
    low, high = studentised(losses, np.arange(80), 0)
    half = 1.99 * losses.std(ddof=1) / np.sqrt(80)
    assert low == pytest.approx(losses.mean() - half, abs=0.1)
    assert high == pytest.approx(losses.mean() + half, abs=0.15)
    assert high - losses.mean() > losses.mean() - low, "a long tail reaches further up"
    assert studentised(losses, np.arange(80), 0) == (low, high)
    assert studentised(np.ones(80), np.arange(80), 0) is None


@pytest.mark.parametrize("count", [60, 100])
def test_a_single_sure_error_leaves_the_brier_score_below_wilsons_limit(count):
    """Resamples without that slide have hardly any error, and would set a limit above 1."""
    labels = np.arange(count) % 2
    positive = np.where(labels == 1, 0.98, 0.02)
    positive[0] = 0.999
    brier = estimates(labels, np.stack([1 - positive, positive], axis=1))["brier"]
    assert 0 <= brier.interval[0] < brier.value < brier.interval[1] < 0.15


@pytest.mark.parametrize("count", range(5, 40))
@pytest.mark.parametrize("is_right", [True, False])
def test_intervals_of_shares_end_at_0_and_1_without_rounding(count, is_right):
    labels = np.arange(2 * count) % 2
    positive = np.where((labels == 1) == is_right, 0.9, 0.1)
    found = estimates(labels, np.stack([1 - positive, positive], axis=1))
    for name in ("accuracy", "balanced_accuracy", "f1_macro", "sensitivity_yes", "specificity_yes"):
        assert found[name].interval[int(is_right)] == found[name].value == int(is_right)


def test_means_of_few_patients_have_no_interval():
    values = np.array([0.2, 0.9, 0.8, 0.4, 0.6, 0.7])
    assert mean_interval(values, np.array(list("aabbcd")), 0) is None
    low, high = mean_interval(values, np.array(list("abcdef")), 0)
    assert 0 <= low < values.mean() < high <= 1


@pytest.mark.parametrize(("patients", "reason"), [
    ([0, 0, 1, 1, 2, 2, 3, 3], "fewer than 5 patients"),
    ([0, 1, 2, 3, 4, 5, 6, 6], "fewer than 2 patients of a class"),
])  # fmt: skip
def test_too_few_patients_have_no_interval_and_the_reason_is_given(patients, reason):
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    found = estimates(labels, noisy_answers(np.random.default_rng(0), labels), np.array(patients))
    assert (found["auc"].interval, found["auc"].reason) == (None, reason)


def test_a_class_of_one_patient_or_few_groups_have_their_reason():
    labels = np.array([1] + [0] * 19)
    found = estimates(labels, noisy_answers(np.random.default_rng(0), labels))
    assert found["f1_macro"].reason == "fewer than 2 patients of a class"
    labels = np.arange(20) % 2
    found = estimates(labels, noisy_answers(np.random.default_rng(0), labels), np.arange(20) % 3, unit="group")
    assert found["accuracy"].reason == "fewer than 5 groups"


def test_an_undefined_metric_says_so():
    labels = np.zeros(8, dtype=int)
    found = estimates(labels, noisy_answers(np.random.default_rng(0), labels))
    assert (found["auc"].value, found["auc"].interval) == (None, None)
    assert found["auc"].reason == "undefined for these slides"
    assert found["accuracy"].interval is not None
    assert found["balanced_accuracy"].interval is not None, "of the one class that occurs"


def test_within_folds_offsets_between_models_do_not_count():
    """Every fold ranks perfectly, at a level of its own."""
    labels, folds = np.arange(60) % 2, np.arange(60) // 12 + 1
    positive = 0.05 + 0.15 * folds + 0.05 * labels
    rows = rows_of(labels, np.stack([1 - positive, positive], axis=1), folds=folds)
    pooled, within, means = (rows.estimates(weigh, 0) for weigh in (rows.pooled, rows.within_folds, rows.mean_of_folds))
    assert pooled["auc"].value < 0.7
    assert list(within) == list(means) == ["auc", "average_precision"]
    assert within["auc"].value == means["auc"].value == 1
    assert 0.85 < within["auc"].interval[0] < 1


def test_the_auc_within_folds_is_the_share_of_all_their_pairs():
    rng = np.random.default_rng(2)
    labels, folds = rng.integers(0, 2, 40), np.arange(40) % 3
    scores = rng.random(40).round(1)
    right = pairs = 0.0
    for first in np.flatnonzero(labels == 1):
        for second in np.flatnonzero(labels == 0):
            if folds[first] == folds[second]:
                pairs += 1
                right += (scores[first] > scores[second]) + 0.5 * (scores[first] == scores[second])
    rows = rows_of(labels, np.stack([1 - scores, scores], axis=1), folds=folds)
    assert rows.within_folds(np.ones((1, 40)))["auc"] == pytest.approx(right / pairs)


def test_several_classes_have_intervals_too():
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    values = rng.dirichlet(np.ones(3), size=90) * 0.7 + 0.3 * np.eye(3)[labels]
    task = Classification(("a", "b", "c"))
    rows = ScoredRows(task, labels, values, np.arange(90), np.ones(90))
    for name, estimate in rows.estimates(rows.pooled, 0).items():
        assert name == "ece" or estimate.interval[0] < estimate.value < estimate.interval[1]


def test_the_quantile_widens_for_few_patients():
    assert quantile(1000, 2000) == pytest.approx(1.96, abs=0.01)
    assert quantile(6, 60) == pytest.approx(2.201, abs=1e-3)  # of 11 degrees of freedom
    assert quantile(5, 5) == pytest.approx(2.776, abs=1e-3), "of 4, where each of five groups holds both classes"
