import numpy as np
import pytest
from sklearn.metrics import roc_curve

from tests.small import TASK, classification_metrics
from utils.evaluation.bootstrap import (
    bootstrap_draws,
    bootstrap_intervals,
    mean_precision,
    mean_roc,
    pooled_metrics,
    roc_band,
)
from utils.tasks.metrics import METRICS


def noisy_answers(rng: np.random.Generator, labels: np.ndarray, right: float = 0.8) -> np.ndarray:
    """Probabilities that are on the right side with this chance."""
    hit = rng.random(len(labels)) < right
    positive = np.where(hit, labels, 1 - labels) * 0.5 + rng.random(len(labels)) * 0.5
    return np.stack([1 - positive, positive], axis=1)


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def test_intervals_contain_their_estimate():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    probabilities, cases = noisy_answers(rng, labels), np.array([f"P{i // 3}" for i in range(60)])
    intervals, estimates = (
        bootstrap_intervals(TASK, labels, probabilities, cases, 1),
        TASK.unweighted_metrics(labels, probabilities),
    )
    assert set(intervals) == set(TASK.metric_names)
    for name, (low, high) in intervals.items():
        assert 0 <= low < estimates[name] < high <= 1


def test_the_seed_alone_decides():
    labels = np.arange(20) % 2
    probabilities, cases = noisy_answers(np.random.default_rng(0), labels), np.arange(20).astype(str)
    first, again, other = (bootstrap_intervals(TASK, labels, probabilities, cases, seed, 50) for seed in (1, 1, 2))
    assert first == again != other


def test_patients_are_drawn_not_slides():
    """Copies of a slide say nothing new: ten of each patient's leave the interval as wide as one of each does."""
    rng = np.random.default_rng(3)
    labels = np.arange(40) % 2
    probabilities, patients = noisy_answers(rng, labels), np.arange(40).astype(str)
    once = bootstrap_intervals(TASK, labels, probabilities, patients, 0)
    tenfold = np.repeat(np.arange(40), 10)
    copied = bootstrap_intervals(TASK, labels[tenfold], probabilities[tenfold], patients[tenfold], 0)
    as_if_slides = bootstrap_intervals(TASK, labels[tenfold], probabilities[tenfold], np.arange(400).astype(str), 0)
    for name in METRICS:
        assert copied[name] == pytest.approx(once[name])
        assert width(as_if_slides[name]) < 0.5 * width(copied[name])


def test_one_patient_of_many_slides_widens_the_interval():
    rng = np.random.default_rng(5)
    labels = np.arange(120) % 2
    probabilities = noisy_answers(rng, labels)
    probabilities[:60] = np.eye(2)[1 - labels[:60]]  # the patient of sixty slides is predicted all wrong
    cases = np.array(["big"] * 60 + [f"P{i}" for i in range(60)])
    by_patient = bootstrap_intervals(TASK, labels, probabilities, cases, 0)
    by_slide = bootstrap_intervals(TASK, labels, probabilities, np.arange(120).astype(str), 0)
    assert width(by_patient["accuracy"]) > 2 * width(by_slide["accuracy"])


def test_accuracy_of_single_slides_has_the_binomial_interval():
    """The bootstrap of n coin flips is Binomial(n, p) / n, whose spread is known."""
    labels, cases = np.zeros(400, dtype=int), np.arange(400).astype(str)
    probabilities = np.eye(2)[(np.arange(400) < 100).astype(int)]  # 75 % right
    low, high = bootstrap_intervals(TASK, labels, probabilities, cases, 0, 3000)["accuracy"]
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.004)  # a 90 % interval would be off by 0.007
    assert high == pytest.approx(0.75 + half, abs=0.004)


def test_ninety_five_percent_of_intervals_hold_the_truth():
    rng = np.random.default_rng(11)
    labels, cases = np.zeros(60, dtype=int), np.arange(60).astype(str)
    held = 0
    for trial in range(100):
        probabilities = np.eye(2)[(rng.random(60) > 0.7).astype(int)]
        low, high = bootstrap_intervals(TASK, labels, probabilities, cases, trial, 200)["accuracy"]
        held += low <= 0.7 <= high
    assert 86 <= held <= 99


def test_undefined_figures():
    labels, cases = np.array([0] * 8), np.arange(8).astype(str)
    intervals = bootstrap_intervals(TASK, labels, noisy_answers(np.random.default_rng(0), labels), cases, 0, 50)
    assert intervals["auc"] is None
    assert intervals["accuracy"] is not None


@pytest.mark.parametrize(("patients", "defined"), [(12, True), (2, False)])
def test_an_auc_that_is_mostly_undefined_has_no_interval(patients, defined):
    """Of two patients, one of each class, half the resamples hold one class, and by seed 2 more than half do."""
    labels = np.arange(patients) % 2
    intervals = bootstrap_intervals(TASK, labels, np.eye(2)[labels], np.arange(patients).astype(str), 2, 101)
    assert (intervals["auc"] is not None) is defined


@pytest.mark.parametrize(("patients", "right", "defined"), [(1, 1, False), (1, 0.5, False), (4, 1, False),
                                                           (4, 0.5, True), (9, 1, False), (10, 1, True)])  # fmt: skip
def test_few_patients_that_all_give_the_same_figure_have_no_interval(patients, right, defined):
    labels, cases = np.zeros(4 * patients, dtype=int), np.repeat(np.arange(patients).astype(str), 4)
    wrong = np.arange(len(labels)) >= right * len(labels)
    intervals = bootstrap_intervals(TASK, labels, np.eye(2)[wrong.astype(int)], cases, 0, 100)
    assert (intervals["accuracy"] is not None) is defined


def test_one_patient_has_no_roc_band():
    labels = np.arange(8) % 2
    scores = np.random.default_rng(0).random(8)
    assert roc_band(labels == 1, scores, np.array(["P1"] * 8), 0, resamples=50) is None
    assert roc_band(labels == 1, scores, np.arange(8).astype(str), 0, resamples=50) is not None


def repeated(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities, patients and repeats of 12 slides, tested thrice; patients of one to three slides."""
    rng = np.random.default_rng(seed)
    labels, cases = np.tile(np.arange(12) % 2, 3), np.tile(np.array(list("aabccdeefghh")), 3)
    return labels, noisy_answers(rng, labels), cases, np.repeat([1, 2, 3], 12)


def brute_force(labels, probabilities, cases, repeats, seed, resamples):
    """Rows of each resample, copied out."""
    rng, patients = np.random.default_rng(seed), np.unique(cases)
    for _ in range(resamples):
        chosen = rng.integers(len(patients), size=len(patients))
        rows = np.concatenate([np.flatnonzero(cases == patients[index]) for index in chosen])
        yield labels[rows], probabilities[rows], repeats[rows]


def test_pooled_metrics_average_over_the_repeats():
    labels, probabilities, _, repeats = repeated()
    found = pooled_metrics(TASK, labels, probabilities, repeats)
    each = [classification_metrics(*(part[repeats == r] for part in (labels, probabilities)), "ny") for r in (1, 2, 3)]
    for value, name in zip(found.values(), each[0], strict=True):
        assert value == pytest.approx(np.mean([figures[name] for figures in each]))
    assert found["auc"] != pytest.approx(classification_metrics(labels, probabilities)["auc"])


def test_pooled_metrics_leave_out_the_repeats_where_a_figure_is_undefined():
    labels, positive = np.array([0, 1, 1, 1]), np.array([0.2, 0.9, 0.8, 0.3])
    probabilities, repeats = np.stack([1 - positive, positive], axis=1), np.array([1, 1, 2, 2])
    found = pooled_metrics(TASK, labels, probabilities, repeats)
    assert found["auc"] == 1
    assert found["accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    only = pooled_metrics(TASK, labels[2:], probabilities[2:], repeats[2:])
    assert only["auc"] is only["sensitivity_no"] is None


@pytest.mark.parametrize("several", [True, False])
def test_intervals_agree_with_a_brute_force(several):
    labels, probabilities, cases, repeats = repeated()
    if not several:
        labels, probabilities, cases, repeats = labels[:12], probabilities[:12], cases[:12], repeats[:12]
    found = bootstrap_intervals(TASK, labels, probabilities, cases, 5, 60, repeats=repeats if several else None)
    drawn = [pooled_metrics(TASK, *part) for part in brute_force(labels, probabilities, cases, repeats, 5, 60)]
    assert found.keys() == drawn[0].keys()
    for name, interval in found.items():
        values = [figures[name] for figures in drawn if figures[name] is not None]
        assert interval == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))


def test_many_slides_are_drawn_like_few(monkeypatch):
    """The resamples are computed in blocks; the block's size changes nothing."""
    labels, probabilities, cases, repeats = repeated()
    whole = bootstrap_intervals(TASK, labels, probabilities, cases, 5, 60, repeats=repeats)
    monkeypatch.setattr("utils.evaluation.bootstrap.BLOCK_VALUES", 7 * len(labels))
    assert bootstrap_intervals(TASK, labels, probabilities, cases, 5, 60, repeats=repeats) == whole


def test_draws_of_two_models_are_pairs():
    """Whatever the order of the rows, the same patients are drawn."""
    labels, probabilities, cases, repeats = repeated()
    order = np.random.default_rng(1).permutation(len(labels))
    first = bootstrap_draws(TASK, labels, probabilities, cases, 3, 40, repeats=repeats)
    shuffled = (part[order] for part in (labels, probabilities, cases))
    second = bootstrap_draws(TASK, *shuffled, 3, 40, repeats=repeats[order])
    for name in METRICS:
        assert first[name].shape == (40,)
        assert first[name] == pytest.approx(second[name], nan_ok=True)


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
