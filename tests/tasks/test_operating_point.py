"""Thresholds fitted for the best balanced accuracy, or for a wanted sensitivity or specificity."""

import numpy as np
import pytest
import sklearn.metrics as sklearn
from hypothesis import given
from hypothesis import strategies as st

from utils.tasks.operating_point import OperatingPoint

BALANCED = OperatingPoint()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=1, max_size=25))
def test_no_threshold_beats_the_one_fitted_for_balanced_accuracy(slides):
    labels, scores = np.array([int(label) for label, _ in slides]), np.array([score / 20 for _, score in slides])
    fitted = BALANCED.threshold(labels, scores)
    if len(set(labels)) < 2:
        assert fitted is None
        return

    def balanced(threshold: float) -> float:
        return sklearn.balanced_accuracy_score(labels, scores >= threshold)

    # Every way to cut scores of 0, 1/20, ... but calling none positive where a score is 1.
    best = max(balanced(cut) for cut in [0.0, *(np.arange(20) + 0.5) / 20])
    assert balanced(fitted) == pytest.approx(best)
    assert fitted not in scores


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.9], 0.4),
        ([0, 1, 0, 1], [0.1, 0.2, 0.6, 0.9], 0.75),  # as good as 0.15, and nearer to 0.5
        ([0, 1], [0.7, 0.7], 0.35),  # nothing to tell them apart: 0.35 and 0.85 are as good, equally far
        ([1, 0], [0.2, 0.6], 0.8),  # the wrong way round: best to call all alike
    ],
)
def test_threshold_of_balanced_accuracy_by_hand(labels, scores, expected):
    assert BALANCED.threshold(np.array(labels), np.array(scores)) == pytest.approx(expected)


def test_a_wanted_rate_by_hand():
    labels, scores = np.array([0] * 4 + [1] * 9), np.array([0.1, 0.2, 0.3, 0.8, *np.arange(1, 10) / 10])
    # Of 9 positive slides a tenth is as likely to rank lowest as anywhere: one below 0.1 in 10.
    assert OperatingPoint.of("sensitivity=0.9").threshold(labels, scores) == 0.1
    assert OperatingPoint.of("sensitivity=0.8").threshold(labels, scores) == 0.2
    specific = OperatingPoint.of("specificity=0.8").threshold(labels, scores)
    assert 0.8 < specific < 0.8 + 1e-9
    assert OperatingPoint.of("sensitivity=0.95").threshold(labels, scores) is None, "takes 19 slides"
    assert OperatingPoint.of("specificity=0.9").threshold(labels, scores) is None, "takes 9 negative slides"
    assert OperatingPoint.of("sensitivity=0.9").threshold(labels[4:], scores[4:]) is None, "no negative slide"


@pytest.mark.parametrize(("text", "label"), [("sensitivity=0.9", 1), ("specificity=0.8", 0), ("sensitivity=0.95", 1)])
@pytest.mark.parametrize("count", [19, 30, 57])
def test_other_slides_have_the_wanted_rate_on_average(text, label, count):
    point, rng, rates = OperatingPoint.of(text), np.random.default_rng(count), []
    labels = np.repeat([0, 1], count)
    for _ in range(400):
        fitted = point.threshold(labels, rng.beta(2 + 2 * labels, 3))
        others = rng.beta(2 + 2 * label, 3, size=1000)
        rates.append(np.mean((others >= fitted) == (label == 1)))
    assert point.wanted - 0.01 < np.mean(rates) < point.wanted + 1 / (count + 1) + 0.01


@pytest.mark.parametrize(("text", "least"), [
    ("sensitivity=0.95", 19), ("specificity=0.9", 9), ("sensitivity=0.99", 99), ("sensitivity=0.5", 1),
    ("balanced_accuracy", 1),
])  # fmt: skip
def test_the_least_slides_are_those_that_have_a_threshold(text, least):
    point = OperatingPoint.of(text)
    assert (point.least_slides, str(point)) == (least, text)
    for count in {least, max(1, least - 1)}:
        scores = np.linspace(0.1, 0.9, 2 * count)
        assert (point.threshold(np.repeat([0, 1], count), scores) is None) is (count < least)


@pytest.mark.parametrize("text", ["sensitivity", "sensitivity=1", "specificity=0", "recall=0.9", "sensitivity=95%", ""])
def test_what_is_no_operating_point_is_refused(text):
    with pytest.raises(ValueError, match=r"balanced_accuracy, or sensitivity=S or specificity=S"):
        OperatingPoint.of(text)
