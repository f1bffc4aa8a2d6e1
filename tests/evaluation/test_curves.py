import numpy as np
import pytest
from sklearn.metrics import roc_curve

from tests.evaluation.predicted import noisy_answers, repeated
from tests.small import TASK
from utils.evaluation.curves import mean_precision, mean_roc, roc_band
from utils.evaluation.resampling import pooled_metrics


def brute_force(labels, probabilities, cases, repeats, seed, resamples):
    """Rows of each resample, copied out."""
    rng, patients = np.random.default_rng(seed), np.unique(cases)
    for _ in range(resamples):
        chosen = rng.integers(len(patients), size=len(patients))
        rows = np.concatenate([np.flatnonzero(cases == patients[index]) for index in chosen])
        yield labels[rows], probabilities[rows], repeats[rows]


def test_one_patient_has_no_roc_band():
    labels = np.arange(8) % 2
    scores = np.random.default_rng(0).random(8)
    assert roc_band(labels == 1, scores, np.array(["P1"] * 8), 0, resamples=50) is None
    assert roc_band(labels == 1, scores, np.arange(8).astype(str), 0, resamples=50) is not None


def test_the_roc_band_holds_the_curve_and_its_corners():
    labels = np.arange(80) % 2
    scores = noisy_answers(np.random.default_rng(0), labels, 0.7)[:, 1]
    rate, low, high = roc_band(labels == 1, scores, np.arange(80).astype(str), 0)
    for curve in (low, high):
        assert curve.shape == rate.shape
        assert (curve[0], curve[-1]) == (0, 1)
        assert (np.diff(curve) >= 0).all()
    assert (rate[0], rate[-1]) == (0, 1)
    middle = np.interp(rate[1:], *mean_roc(labels == 1, scores))
    assert (low[1:] <= middle + 1e-9).all()
    assert (middle <= high[1:] + 1e-9).all()
    assert (high - low).max() > 0.1


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


def test_the_roc_band_agrees_with_a_brute_force():
    labels, probabilities, cases, repeats = repeated(2)
    rate, low, high = roc_band(labels == 1, probabilities[:, 1], cases, 4, repeats=repeats, resamples=50)

    def curve(labels, probabilities, repeats):
        curves = []
        for repeat in np.unique(repeats):
            rows = repeats == repeat
            if len(set(labels[rows])) == 2:
                false, true, _ = roc_curve(labels[rows], probabilities[rows, 1])
                curves.append(np.interp(rate[1:], false, true))
        return np.mean(curves, axis=0) if curves else None

    drawn = [curve(*part) for part in brute_force(labels, probabilities, cases, repeats, 4, 50)]
    expected = np.percentile([one for one in drawn if one is not None], [2.5, 97.5], axis=0)
    assert np.stack([low, high])[:, 1:] == pytest.approx(expected)


def test_an_undefined_roc_band():
    scores, cases = np.array([0.1, 0.9]), np.array(["a", "b"])
    assert mean_roc(np.array([True, True]), scores) is mean_precision(np.array([True, True]), scores) is None
    assert roc_band(np.array([True, True]), scores, cases, 0) is None
    # Of two patients, half the resamples hold one class; by seed 2 more than half do.
    assert roc_band(np.array([False, True]), scores, cases, 2, resamples=101) is None
    assert mean_roc(np.array([False, True]), scores) is not None
