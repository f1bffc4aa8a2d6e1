import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_curve

from tests.evaluation.predicted import noisy_answers, repeated
from tests.small import TASK
from utils.evaluation.curves import mean_precision, mean_roc, roc_band
from utils.evaluation.resampling import pooled_metrics


def test_a_class_of_one_patient_has_no_roc_band():
    labels = np.arange(8) % 2
    scores = np.random.default_rng(0).random(8)
    names = np.arange(8).astype(str)
    assert roc_band(labels == 1, scores, names) is not None
    assert roc_band(labels == 1, scores, np.where(labels == 1, "P1", names)) is None


def test_the_roc_band_holds_the_curve():
    labels = np.arange(80) % 2
    scores = noisy_answers(np.random.default_rng(0), labels, 0.7)[:, 1]
    rate, low, high = roc_band(labels == 1, scores, np.arange(80).astype(str))
    assert (rate[0], rate[-1]) == (0, 1)
    for curve in (low, high):
        assert curve.shape == rate.shape
        assert (np.diff(curve) >= 0).all()
    middle = np.interp(rate, *mean_roc(labels == 1, scores))
    assert (low <= middle + 1e-9).all()
    assert (middle <= high + 1e-9).all()
    assert (high - low).max() > 0.1


@pytest.mark.parametrize("several", [False, True])
def test_the_roc_band_is_what_the_rectangles_around_the_points_cover(several):
    labels, probabilities, cases, repeats = repeated(2)
    repeats = repeats if several else None
    rate, low, high = roc_band(labels == 1, probabilities[:, 1], cases, repeats)
    counts = [len(np.unique(cases[labels == label])) for label in (0, 1)]
    corners = [
        (*proportion(false, counts[0]), *proportion(true, counts[1]))
        for false, true in zip(*mean_roc(labels == 1, probabilities[:, 1], repeats), strict=True)
    ]
    for at, bottom, top in zip(rate, low, high, strict=True):
        reached = [corner for corner in corners if corner[0] <= at + 1e-12 and corner[1] >= at - 1e-12]
        assert top == pytest.approx(max(corner[3] for corner in reached), abs=1e-6)
        assert bottom == pytest.approx(min(corner[2] for corner in reached), abs=1e-6)


def proportion(share: float, count: int) -> tuple[float, float]:
    """The 90% interval by Wilson's formula."""
    z = norm.isf(0.05)
    ends = np.roots([1 + z**2 / count, -(2 * share + z**2 / count), share**2])
    return float(ends.real.min()), float(ends.real.max())


def test_separated_classes_have_a_roc_band_with_width():
    labels = np.arange(60) % 2
    _, low, high = roc_band(labels == 1, labels + np.linspace(0, 0.5, 60), np.arange(60).astype(str))
    assert (high == 1).all()
    assert (low < 0.95).all()


@pytest.mark.parametrize("auc", [0.7, 0.9, 0.99])
def test_the_roc_band_holds_the_true_curve(auc):
    rng, distance, rates = np.random.default_rng(1), np.sqrt(2) * norm.ppf(auc), np.array([0.02, 0.05, 0.1, 0.2, 0.5])
    truth = norm.cdf(distance - norm.isf(rates))
    is_class, held = np.arange(60) < 30, []
    for _ in range(100):
        rate, low, high = roc_band(is_class, rng.normal(size=60) + distance * is_class, np.arange(60).astype(str))
        at = np.searchsorted(rate, rates)
        held.append((low[at] <= truth) & (truth <= high[at]))
    assert np.mean(held, axis=0).min() > 0.87


def area(curve: tuple[np.ndarray, np.ndarray]) -> float:
    return float(np.trapezoid(curve[1], curve[0]))


def is_stepped(curve: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether every line of it is level or upright."""
    return bool((np.diff(curve, axis=1) == 0).any(axis=0).all())


@pytest.mark.parametrize("decimals", [1, 17])
@pytest.mark.parametrize("several", [False, True])
def test_the_area_below_the_curves_is_the_figure_beside_them(decimals, several):
    """Drawn through a grid of false positive rates, it would not be."""
    labels, probabilities, _, repeats = repeated(3)
    repeats = repeats if several else np.arange(len(labels)) * 0
    scores = probabilities[:, 1].round(decimals)
    figures = pooled_metrics(TASK, labels, np.stack([1 - scores, scores], axis=1), repeats)
    roc, precision = mean_roc(labels == 1, scores, repeats), mean_precision(labels == 1, scores, repeats)
    assert area(roc) == pytest.approx(figures["auc"], abs=1e-12)
    assert area(precision) == pytest.approx(figures["average_precision"], abs=1e-12)
    assert is_stepped(precision)
    assert is_stepped(roc) == (decimals == 17)  # slides of both kinds with one score: a slanted line, which counts half


@pytest.mark.parametrize("decimals", [1, 17])
def test_the_roc_curve_is_scikit_learns(decimals):
    labels = np.arange(40) % 2
    scores = noisy_answers(np.random.default_rng(0), labels)[:, 1].round(decimals)
    points = list(zip(*np.round(roc_curve(labels, scores, drop_intermediate=False)[:2], 9), strict=True))
    found = list(zip(*np.round(mean_roc(labels == 1, scores), 9), strict=True))
    assert set(found) <= set(points)
    for rate, height in points:  # those left out lie on an upright line
        there = [other for at, other in found if at == rate]
        assert min(there) <= height <= max(there)


def test_a_curve_rises_from_the_corner_before_its_first_false_positive():
    rate, curve = mean_roc(np.array([False, False, True]), np.array([0.1, 0.4, 0.8]))
    assert (list(rate), list(curve)) == ([0, 0, 0.5, 1], [0, 1, 1, 1])


def test_precision_by_hand():
    """Two of the class, at the first and the third place: precisions 1 and 2/3."""
    recall, precision = mean_precision(np.array([True, False, True, False]), np.array([0.9, 0.8, 0.7, 0.1]))
    assert list(recall) == [0, 0.5, 0.5, 1]
    assert list(precision) == pytest.approx([1, 1, 2 / 3, 2 / 3])


def test_an_undefined_roc_band():
    scores, cases = np.array([0.1, 0.9]), np.array(["a", "b"])
    assert mean_roc(np.array([True, True]), scores) is mean_precision(np.array([True, True]), scores) is None
    assert roc_band(np.array([True, True]), scores, cases) is None
    assert mean_roc(np.array([False, True]), scores) is not None
