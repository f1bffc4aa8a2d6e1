import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lifelines import KaplanMeierFitter
from lifelines.statistics import multivariate_logrank_test
from lifelines.utils import median_survival_times
from scipy.stats import kstest

from tests.tasks.drawn_survival import drawn_patients, once
from utils.tasks.survival_curves import calibration_at, kaplan_meier, log_rank, product_limit


def fitted(targets: np.ndarray) -> KaplanMeierFitter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of limits where survival is 0
        return KaplanMeierFitter().fit(targets[:, 0], targets[:, 1])


@given(st.integers(2, 60), st.integers(0, 10_000), st.sampled_from([0.2, 0.7, 1.1]))
def test_curve_limits_and_median_are_those_of_lifelines(count, seed, events):
    targets, _ = drawn_patients(count, seed, events=events)
    curve, reference = kaplan_meier(targets), fitted(targets)
    assert curve.times == pytest.approx(reference.survival_function_.index)
    assert curve.survival == pytest.approx(reference.survival_function_.to_numpy()[:, 0])
    limits = reference.confidence_interval_.to_numpy()
    above_zero = curve.survival > 0
    assert curve.low[above_zero] == pytest.approx(limits[above_zero, 0])
    assert curve.high[above_zero] == pytest.approx(limits[above_zero, 1])
    assert np.isnan(curve.low[~above_zero]).all()
    assert np.isnan(curve.high[~above_zero]).all()
    median = median_survival_times(reference.survival_function_.round(12))  # a half is a half
    limits_at_half = median_survival_times(reference.confidence_interval_[above_zero])  # at 0 there are none
    medians = [median, *limits_at_half.to_numpy()[0]]
    ours = [curve.median, *curve.median_interval]
    assert [np.inf if time is None else time for time in ours] == medians


def test_curve_by_hand():
    curve = kaplan_meier(np.array([[2.0, 1], [3, 0], [3, 1], [5, 0]]))
    assert curve.times.tolist() == [0, 2, 3, 5]
    assert curve.survival == pytest.approx([1, 3 / 4, 1 / 2, 1 / 2])
    assert (curve.at_risk.tolist(), curve.events.tolist(), curve.censored.tolist()) == (
        [4, 4, 3, 1], [0, 1, 1, 0], [0, 0, 1, 1],
    )  # fmt: skip
    assert curve.numbers_at_risk(np.array([0, 2, 2.5, 3, 5, 6])).tolist() == [4, 4, 3, 3, 1, 0]
    assert curve.median == 3
    assert curve.at(1.9) == (1, 1, 1)
    assert curve.at(2)[0] == pytest.approx(3 / 4)
    assert curve.at(5)[0] == pytest.approx(1 / 2)
    assert np.isnan(curve.at(5.1)).all()


def test_curves_of_one_patient():
    dead, censored = kaplan_meier(np.array([[2.0, 1]])), kaplan_meier(np.array([[2.0, 0]]))
    assert (dead.survival.tolist(), dead.median) == ([1, 0], 2)
    assert dead.at(7)[0] == 0  # known, for all have died
    assert (censored.survival.tolist(), censored.median, censored.median_interval) == ([1, 1], None, (None, None))
    assert censored.low.tolist() == censored.high.tolist() == [1, 1]


def test_limits_cover_the_truth():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        times, follow_up = rng.exponential(10, size=60), rng.uniform(0, 30, size=60)
        curve = kaplan_meier(np.stack([np.minimum(times, follow_up), times <= follow_up], axis=1))
        _, low, high = curve.at(8)
        covered.append(low <= np.exp(-0.8) <= high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)


@given(st.integers(2, 40), st.integers(0, 10_000))
def test_weighted_curves_are_those_of_repeated_patients(count, seed):
    targets, _ = drawn_patients(count, seed)
    copies = np.random.default_rng(seed).integers(0, 3, size=count)
    copies[0] = 1
    repeated, times = np.repeat(targets, copies, axis=0), np.array([0, 1, 3, 3.5, 90])
    for of_censoring in (False, True):
        weighted = product_limit(targets, copies[None].astype(float), of_censoring)
        plain = product_limit(repeated, once(repeated), of_censoring)
        assert weighted.before(times) == pytest.approx(plain.before(times))
        assert weighted.after(times) == pytest.approx(plain.after(times))


def test_of_equal_times_the_event_is_before_the_censoring():
    limit = product_limit(np.array([[2.0, 0], [2, 1], [4, 0]]), np.ones((1, 3)), of_censoring=True)
    assert limit.before(np.array([2])) == 1
    assert limit.after(np.array([2])) == pytest.approx(1 / 2)  # one of the two whom the event has left
    assert limit.after(np.array([4])) == 0


@pytest.mark.parametrize("groups", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_log_rank_is_that_of_lifelines(groups, seed):
    targets, risks = drawn_patients(60, seed)
    names = np.clip(np.digitize(risks, np.quantile(risks, np.arange(1, groups) / groups)), 0, groups - 1)
    reference = multivariate_logrank_test(targets[:, 0], names, targets[:, 1])
    assert log_rank(targets, np.array(["low", "b", "c", "d", "high"])[names]) == pytest.approx(reference.p_value)


def test_log_rank_of_equal_groups_is_uniform():
    rng = np.random.default_rng(0)
    values = [log_rank(drawn_patients(80, seed)[0], rng.integers(3, size=80)) for seed in range(300)]
    assert kstest(values, "uniform").pvalue > 0.01


def test_log_rank_needs_two_groups_and_events():
    targets, risks = drawn_patients(30, 0)
    assert np.isnan(log_rank(targets, np.zeros(30)))
    assert np.isnan(log_rank(targets * [1, 0], risks > 0))
    assert np.isnan(log_rank(np.array([[5.0, 1], [5, 1]]), np.array([0, 1])))  # everybody has the event at once
    assert np.isnan(log_rank(np.array([[1.0, 0], [5, 1], [6, 1]]), np.array([0, 1, 1])))  # one left before any event


def test_log_rank_leaves_out_a_group_that_no_event_reaches():
    targets, risks = drawn_patients(30, 0)
    with_early = np.concatenate([targets, [[0.5, 0]]])
    assert log_rank(with_early, np.append(risks > 0, 2)) == pytest.approx(log_rank(targets, risks > 0))


def test_calibration_compares_with_the_curves_of_groups():
    targets, risks = drawn_patients(103, 0, ties=False)
    survival = np.exp(-0.5 * np.exp(risks / 2)) + np.arange(103) * 1e-9
    groups = calibration_at(targets, survival, horizon=5, groups=4)
    assert [group.patients for group in groups] == [26, 26, 26, 25]
    assert [group.predicted for group in groups] == sorted(group.predicted for group in groups)
    lowest = np.argsort(survival)[:26]
    assert groups[0].predicted == pytest.approx(survival[lowest].mean())
    assert groups[0].observed == pytest.approx(fitted(targets[lowest]).predict(5))
    assert all(group.low < group.observed < group.high for group in groups)


def test_true_survival_is_calibrated():
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.02, 0.2, size=5000)
    times, follow_up = rng.exponential(1 / rates), rng.uniform(0, 30, size=5000)
    targets = np.stack([np.minimum(times, follow_up), times <= follow_up], axis=1)
    groups = calibration_at(targets, np.exp(-5 * rates), horizon=5)
    assert [group.observed for group in groups] == pytest.approx([group.predicted for group in groups], abs=0.04)


def test_calibration_of_equal_predictions_few_patients_and_short_follow_up():
    targets, _ = drawn_patients(20, 0)
    (group,) = calibration_at(targets, np.full(20, 0.6), horizon=4)
    assert (group.patients, group.predicted) == (20, pytest.approx(0.6))
    groups = calibration_at(np.array([[3.0, 0], [9, 0]]), np.array([0.2, 0.9]), horizon=5)
    assert [group.patients for group in groups] == [1, 1]
    assert np.isnan(groups[0].observed)
    assert groups[1].observed == 1
