import numpy as np
import pytest
from scipy.stats import bootstrap, norm, ttest_rel
from sklearn.datasets import make_moons
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
from sklearn.svm import SVC

from tests.small import TASK, classification_metrics
from utils.evaluation.bootstrap import bootstrap_draws
from utils.evaluation.paired_tests import holm, nadeau_bengio, paired_interval

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


def draws(labels, answers, cases, metric, resamples=500, **settings) -> list[np.ndarray]:
    """The resampled figures of each model."""
    return [bootstrap_draws(TASK, labels, answer, cases, 0, resamples, **settings)[metric] for answer in answers]


def spread(labels, answers, cases, metric, resamples=500) -> float:
    """The bootstrap's standard error of the difference."""
    first, second = draws(labels, answers, cases, metric, resamples)
    return float((first - second).std())


def test_accuracy_differences_are_scipys_paired_bootstrap():
    labels, answers = two_answers(2, better=0.5)
    right = [answer.argmax(axis=1) == labels for answer in answers]
    drawn = bootstrap(
        right,
        lambda first, second, axis: first.mean(axis=axis) - second.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    low, high, p = paired_interval(*draws(labels, answers, own_case(SLIDES), "accuracy", 4000))
    assert (low, high) == pytest.approx(tuple(drawn.confidence_interval), abs=1.01 / SLIDES)
    rarer = min((drawn.bootstrap_distribution <= 1e-9).mean(), (drawn.bootstrap_distribution >= -1e-9).mean())
    assert p == pytest.approx(2 * rarer, abs=0.02)
    assert 0.002 < p < 0.5


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
def test_auc_differences_spread_as_delong_says(seed):
    labels, answers = two_answers(seed, 300)
    paired = spread(labels, answers, own_case(300), "auc", 1500)
    assert paired == pytest.approx(delong_error(labels, answers), rel=0.1)
    apart = np.hypot(*[np.std(one) for one in draws(labels, answers, own_case(300), "auc")])
    assert paired < 0.9 * apart


def test_the_bootstraps_p_agrees_with_delongs():
    labels, answers = two_answers(7, 300, better=0.25)
    first, second = (classification_metrics(labels, answer)["auc"] for answer in answers)
    expected = 2 * norm.sf(abs(first - second) / delong_error(labels, answers))
    p = paired_interval(*draws(labels, answers, own_case(300), "auc", 2000))[2]
    assert 0.01 < expected < 0.5
    assert p == pytest.approx(expected, abs=0.03)


def test_patients_are_drawn_not_slides():
    """Copies of each patient's slides say nothing new."""
    labels, answers = two_answers(4)
    fivefold = np.repeat(np.arange(SLIDES), 5)
    copies = labels[fivefold], [answer[fivefold] for answer in answers]
    for metric in ("accuracy", "auc", "brier"):
        once = spread(labels, answers, own_case(SLIDES), metric)
        assert spread(*copies, own_case(SLIDES)[fivefold], metric) == pytest.approx(once)
        assert spread(*copies, own_case(5 * SLIDES), metric) < 0.6 * once


def test_a_drawn_patient_brings_its_slides_of_all_repeats():
    """Where the models differ in one repeat of two, they differ by half as much."""
    labels, (first, second) = two_answers(5)
    once = paired_interval(*draws(labels, [first, second], own_case(SLIDES), "auc"))
    answers = [np.concatenate([first, first]), np.concatenate([second, first])]
    repeats, cases = np.repeat([1, 2], SLIDES), np.tile(own_case(SLIDES), 2)
    both = paired_interval(*draws(np.tile(labels, 2), answers, cases, "auc", repeats=repeats))
    assert both == pytest.approx((once[0] / 2, once[1] / 2, once[2]))


def test_the_interval_and_its_p():
    values = np.arange(1000) / 1000 - 0.0995  # 100 of 1000 below 0
    low, high, p = paired_interval(values, np.zeros(1000))
    assert (low, high) == pytest.approx((0.025 * 0.999 - 0.0995, 0.975 * 0.999 - 0.0995))
    assert p == pytest.approx(2 * 101 / 1001)
    assert paired_interval(-values, np.zeros(1000)) == pytest.approx((-high, -low, p))
    assert paired_interval(np.zeros(1000), values)[2] == p


def test_a_p_is_never_0_and_equal_runs_have_p_1():
    assert paired_interval(np.ones(2000), np.zeros(2000)) == (1, 1, 2 / 2001)
    assert paired_interval(np.full(2000, 0.1) * 3, np.full(2000, 0.3)) == pytest.approx(
        (0, 0, 1)
    )  # equal but for rounding


def test_undefined_resamples_do_not_count():
    values = np.concatenate([np.ones(60), np.full(40, np.nan)])
    assert paired_interval(values, np.zeros(100)) == (1, 1, 2 / 61)
    assert paired_interval(values, np.where(np.arange(100) < 15, np.nan, 0)) is None


def test_equal_models_are_rarely_found_different():
    """Over many cohorts in which neither model is better, p falls below 0.1 in about a tenth."""
    cohorts = [two_answers(seed, 60) for seed in range(100, 200)]
    found = [paired_interval(*draws(*cohort, own_case(60), "auc", 200))[2] for cohort in cohorts]
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
