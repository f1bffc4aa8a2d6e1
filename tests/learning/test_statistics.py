import numpy as np
import pytest

from utils.learning.metrics import METRICS, classification_metrics
from utils.learning.statistics import bootstrap_intervals


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
        bootstrap_intervals(labels, probabilities, cases, 1),
        classification_metrics(labels, probabilities),
    )
    assert set(intervals) == set(METRICS)
    for name, (low, high) in intervals.items():
        assert 0 <= low < estimates[name] < high <= 1


def test_the_seed_alone_decides():
    labels = np.arange(20) % 2
    probabilities, cases = noisy_answers(np.random.default_rng(0), labels), np.arange(20).astype(str)
    first, again, other = (bootstrap_intervals(labels, probabilities, cases, seed, 50) for seed in (1, 1, 2))
    assert first == again != other


def test_patients_are_drawn_not_slides():
    """Copies of a slide say nothing new: ten of each patient's leave the interval as wide as one of each does."""
    rng = np.random.default_rng(3)
    labels = np.arange(40) % 2
    probabilities, patients = noisy_answers(rng, labels), np.arange(40).astype(str)
    once = bootstrap_intervals(labels, probabilities, patients, 0)
    tenfold = np.repeat(np.arange(40), 10)
    copied = bootstrap_intervals(labels[tenfold], probabilities[tenfold], patients[tenfold], 0)
    as_if_slides = bootstrap_intervals(labels[tenfold], probabilities[tenfold], np.arange(400).astype(str), 0)
    for name in METRICS:
        assert copied[name] == pytest.approx(once[name])
        assert width(as_if_slides[name]) < 0.5 * width(copied[name])


def test_one_patient_of_many_slides_widens_the_interval():
    rng = np.random.default_rng(5)
    labels = np.arange(120) % 2
    probabilities = noisy_answers(rng, labels)
    probabilities[:60] = np.eye(2)[1 - labels[:60]]  # the patient of sixty slides is predicted all wrong
    cases = np.array(["big"] * 60 + [f"P{i}" for i in range(60)])
    by_patient = bootstrap_intervals(labels, probabilities, cases, 0)
    by_slide = bootstrap_intervals(labels, probabilities, np.arange(120).astype(str), 0)
    assert width(by_patient["accuracy"]) > 2 * width(by_slide["accuracy"])


def test_accuracy_of_single_slides_has_the_binomial_interval():
    """The bootstrap of n coin flips is Binomial(n, p) / n, whose spread is known."""
    labels, cases = np.zeros(400, dtype=int), np.arange(400).astype(str)
    probabilities = np.eye(2)[(np.arange(400) < 100).astype(int)]  # 75 % right
    low, high = bootstrap_intervals(labels, probabilities, cases, 0, 3000)["accuracy"]
    half = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.004)  # a 90 % interval would be off by 0.007
    assert high == pytest.approx(0.75 + half, abs=0.004)


def test_ninety_five_percent_of_intervals_hold_the_truth():
    rng = np.random.default_rng(11)
    labels, cases = np.zeros(60, dtype=int), np.arange(60).astype(str)
    held = 0
    for trial in range(100):
        probabilities = np.eye(2)[(rng.random(60) > 0.7).astype(int)]
        low, high = bootstrap_intervals(labels, probabilities, cases, trial, 200)["accuracy"]
        held += low <= 0.7 <= high
    assert 86 <= held <= 99


def test_undefined_figures():
    labels, cases = np.array([0] * 8), np.arange(8).astype(str)
    intervals = bootstrap_intervals(labels, noisy_answers(np.random.default_rng(0), labels), cases, 0, 50)
    assert intervals["auc"] is None
    assert intervals["accuracy"] is not None


@pytest.mark.parametrize(("patients", "defined"), [(8, True), (2, False)])
def test_an_auc_that_is_mostly_undefined_has_no_interval(patients, defined):
    """Of two patients, one of each class, half the resamples hold one class, and by seed 2 more than half do."""
    labels = np.arange(patients) % 2
    intervals = bootstrap_intervals(labels, np.eye(2)[labels], np.arange(patients).astype(str), 2, 101)
    assert (intervals["auc"] is not None) is defined
