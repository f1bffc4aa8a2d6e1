import numpy as np
import pytest
from scipy.stats import norm, ttest_rel
from sklearn.datasets import make_moons
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
from sklearn.svm import SVC

from tests.small import TASK
from utils.evaluation.intervals import ScoredRows, quantile
from utils.evaluation.paired_tests import PairedTest, holm, nadeau_bengio, paired_test, training_inflation
from utils.evaluation.resampling import left_out
from utils.tasks.bases import Bounded, MeanLoss, Proportion, greatest_difference

SLIDES = 120


def two_answers(seed: int, slides: int = SLIDES, better: float = 0.0) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels and two models' probabilities; they share half their noise, the first's signal is `better` stronger."""
    rng = np.random.default_rng(seed)
    labels = np.arange(slides) % 2
    shared = rng.standard_normal(slides)
    answers = []
    for signal in (1 + better, 1):
        positive = 1 / (1 + np.exp(-(signal * (2 * labels - 1) + shared + rng.standard_normal(slides))))
        answers.append(np.stack([1 - positive, positive], axis=1))
    return labels, answers


def own_case(slides: int) -> np.ndarray:
    return np.arange(slides).astype(str)


def compared(labels, answers, cases, metric, inflation=1.0, **columns) -> tuple[float, PairedTest]:
    """The difference of two models in a metric, and its test."""
    rows = [ScoredRows(TASK, labels, answer, cases, columns.get("repeats", np.ones(len(labels)))) for answer in answers]
    first, second = (row.pooled(np.ones((1, len(labels))))[metric][0] for row in rows)
    without = [left_out(cases, row.pooled)[metric] for row in rows]
    patients = min(len(np.unique(cases[labels == label])) for label in (0, 1))
    return first - second, paired_test(first - second, without[0] - without[1], patients, inflation)


def error_of(test: PairedTest, patients: int) -> float:
    return (test.interval[1] - test.interval[0]) / 2 / quantile(patients, 2 * patients)


def delong_error(labels: np.ndarray, answers: list[np.ndarray]) -> float:
    """Standard error of the difference of two correlated AUCs (DeLong, DeLong and Clarke-Pearson 1988)."""
    sides = []
    for scores in (answer[:, 1] for answer in answers):
        wins = np.sign(scores[labels == 1][:, None] - scores[labels == 0]) / 2 + 0.5
        sides.append((wins.mean(axis=1), wins.mean(axis=0)))
    parts = [np.cov(first, second) / len(first) for first, second in zip(*sides, strict=True)]
    covariance = np.sum(parts, axis=0)
    return float(np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]))


@pytest.mark.parametrize("seed", [0, 1])
def test_auc_differences_have_delongs_error(seed):
    labels, answers = two_answers(seed, 300)
    _, test = compared(labels, answers, own_case(300), "auc")
    assert error_of(test, 150) == pytest.approx(delong_error(labels, answers), rel=0.02)


def test_the_p_is_delongs():
    labels, answers = two_answers(7, 300, better=0.25)
    difference, test = compared(labels, answers, own_case(300), "auc")
    expected = 2 * norm.sf(abs(difference) / delong_error(labels, answers))
    assert 0.01 < expected < 0.5
    assert test.p == pytest.approx(expected, abs=0.01)


def test_accuracy_differences_are_the_paired_t_test():
    labels, answers = two_answers(2, better=0.5)
    right = [(answer.argmax(axis=1) == labels).astype(float) for answer in answers]
    expected = ttest_rel(*right)
    _, test = compared(labels, answers, own_case(SLIDES), "accuracy")
    assert test.p == pytest.approx(expected.pvalue, abs=1e-6)
    assert test.interval == pytest.approx(tuple(expected.confidence_interval()), abs=1e-6)


def test_copies_of_slides_say_nothing_new():
    labels, answers = two_answers(4)
    fivefold = np.repeat(np.arange(SLIDES), 5)
    copies = labels[fivefold], [answer[fivefold] for answer in answers]
    for metric in ("accuracy", "auc", "brier"):
        _, once = compared(labels, answers, own_case(SLIDES), metric)
        _, copied = compared(*copies, own_case(SLIDES)[fivefold], metric)
        _, as_if_patients = compared(*copies, own_case(5 * SLIDES), metric)
        assert copied.interval == pytest.approx(once.interval)
        assert error_of(as_if_patients, 300) < 0.6 * error_of(copied, 60)


def test_a_patient_is_left_out_of_all_repeats():
    """Where the models differ in one repeat of two, they differ by half as much."""
    labels, (first, second) = two_answers(5)
    _, once = compared(labels, [first, second], own_case(SLIDES), "auc")
    answers = [np.concatenate([first, first]), np.concatenate([second, first])]
    repeats, cases = np.repeat([1, 2], SLIDES), np.tile(own_case(SLIDES), 2)
    _, both = compared(np.tile(labels, 2), answers, cases, "auc", repeats=repeats)
    assert both.interval == pytest.approx((once.interval[0] / 2, once.interval[1] / 2))
    assert both.p == pytest.approx(once.p)


def test_models_that_answer_alike_have_p_1_and_no_interval():
    labels, (first, _) = two_answers(0)
    assert compared(labels, [first, first], own_case(SLIDES), "auc") == (0, PairedTest(None, 1.0))
    assert paired_test(None, np.zeros(9), 20) == PairedTest(None, None)
    assert paired_test(0.1, np.full(9, 0.1), 20) == PairedTest(None, None), "no patient changes it"
    assert paired_test(0.1, np.array([0, 0.1, 0.2, 0.1]), 2) == PairedTest(None, None), "four patients"


def test_the_inflation_widens_the_interval_by_its_root():
    labels, answers = two_answers(1)
    _, plain = compared(labels, answers, own_case(SLIDES), "auc")
    _, inflated = compared(labels, answers, own_case(SLIDES), "auc", inflation=1.5)
    assert error_of(inflated, 60) == pytest.approx(np.sqrt(1.5) * error_of(plain, 60))
    assert inflated.p > plain.p


def test_repeats_enlarge_the_share_of_the_training_slides_and_patients_make_it_smaller():
    assert training_inflation([60] * 5, [15] * 5, 1, patients=75) == pytest.approx(1.375)
    assert training_inflation([60] * 15, [15] * 15, 3, patients=75) == pytest.approx(1 + 0.25 * 13 / 6)
    assert training_inflation([240] * 5, [60] * 5, 1, patients=300) == pytest.approx(1 + 0.375 / 2)


def test_equal_models_are_rarely_found_different():
    """Over many cohorts in which neither model is better, p falls below 0.1 in about a tenth."""
    cohorts = [two_answers(seed, 60) for seed in range(100, 200)]
    found = [compared(*cohort, own_case(60), "auc")[1].p for cohort in cohorts]
    assert 3 <= sum(p < 0.1 for p in found) <= 20


def test_the_corrected_t_of_scikit_learns_published_example():
    """scikit-learn's "Statistical comparison of models using grid search": t 0.750, one-sided p 0.227, where the t test
    that takes the hundred folds for independent has 2.611 and 0.005.
    """
    data = make_moons(noise=0.352, random_state=1, n_samples=100)
    folds = RepeatedStratifiedKFold(n_splits=10, n_repeats=10, random_state=0)
    rbf, linear = (
        cross_val_score(SVC(kernel=kernel, random_state=0), *data, cv=folds, scoring="roc_auc")
        for kernel in ("rbf", "linear")
    )
    t, p = nadeau_bengio(rbf - linear, [90] * 100, [10] * 100)
    assert t == pytest.approx(0.750, abs=5e-4)
    assert p / 2 == pytest.approx(0.227, abs=5e-4)
    naive = ttest_rel(rbf, linear)
    assert (naive.statistic, naive.pvalue / 2) == pytest.approx((2.611, 0.005), abs=6e-4)
    assert nadeau_bengio(linear - rbf, [90] * 100, [10] * 100) == pytest.approx((-t, p))


def test_the_corrected_t_by_hand():
    """d = 0.1, 0.2, 0.3: mean 0.2, s^2 0.01; ratios 0.2, 0.3, 0.4: variance (1/3 + 0.3) 0.01, 2 degrees of freedom."""
    t, p = nadeau_bengio([0.1, 0.2, 0.3], [100, 100, 100], [20, 30, 40])
    assert t == pytest.approx(0.2 / np.sqrt(0.01 * (1 / 3 + 0.3)))
    # Student's t with 2 degrees of freedom has a closed form.
    assert p == pytest.approx(1 - t / np.sqrt(2 + t**2))


def test_without_shared_trainings_it_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 12))
    expected = ttest_rel(first, second)
    assert nadeau_bengio(first - second, [100] * 12, [0] * 12) == pytest.approx((expected.statistic, expected.pvalue))


@pytest.mark.parametrize("values", [[], [0.1], [0.0] * 5, [0.1] * 5, [0.3, 0.1 * 3]])
def test_no_t_without_variance(values):
    assert nadeau_bengio(values, [80] * len(values), [20] * len(values)) is None


def test_holms_published_example():
    """Of Wikipedia's "Holm-Bonferroni method": 0.01, 0.04, 0.03, 0.005 reject the first and the last at 0.05."""
    adjusted = holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [p < 0.05 for p in adjusted] == [True, False, False, True]


def test_holm_is_sequential_rejection():
    """By Holm's own procedure: at level a the k smallest are rejected, up to the first p above a / (m - k)."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        p_values = rng.random(6).round(2) * rng.choice([0.05, 1])
        adjusted = holm(p_values.tolist())
        for level in (0.01, 0.0503, 0.2):
            rejected = set()
            for rank, index in enumerate(np.argsort(p_values)):
                if p_values[index] > level / (6 - rank):
                    break
                rejected.add(int(index))
            assert {index for index, p in enumerate(adjusted) if p <= level} == rejected


def test_holm_of_what_is_undefined_and_of_ones():
    assert holm([None, 0.02, None, 0.04]) == [None, 0.04, None, 0.04]
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
    assert holm([0.3]) == [0.3]


def test_a_difference_has_the_limits_of_its_metric():
    without = np.array([0.5, 1.5, 0.2, 0.9, 1.4])
    assert paired_test(0.9, without, 20).interval == (-1, 1)
    low, high = paired_test(0.9, without, 20, most=np.inf).interval or (0, 0)
    assert low < -1
    assert high > 1
    assert greatest_difference(MeanLoss(without, np.inf)) == np.inf
    assert greatest_difference(Bounded(-1, 1)) == 2
    assert greatest_difference(Proportion(without > 0)) == 1
