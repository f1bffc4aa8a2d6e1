import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tests.small import TASK, classification_metrics, scale_probabilities
from utils.prediction.forward_pass import SlideOutput, mean_calibrated
from utils.tasks.calibration import Scaling, calibration_lines, corrected_error, fitted_scaling


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def fit(temperature: float | None) -> dict[str, float | None]:
    return {"threshold": None, "temperature": temperature}


def drawn(classes: int, count: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their softmax: calibrated by construction."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((count, classes))
    labels = (softmax(logits).cumsum(axis=1) < rng.random((count, 1))).sum(axis=1)
    return logits, labels


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_made_a_model_too_sure(classes, factor):
    logits, labels = drawn(classes)
    scaling = fitted_scaling(labels, softmax(factor * logits))
    assert scaling.temperature == pytest.approx(factor, rel=0.05)
    assert scaling.intercepts == pytest.approx([0] * classes, abs=0.1)
    scaled = scaling.apply(softmax(factor * logits))
    assert classification_metrics(labels, scaled)["ece"] < 0.015


@pytest.mark.parametrize("slides", [60, 5000])
def test_the_intercepts_undo_a_training_for_equal_classes(slides):
    """15 % of the slides are positive, and the model answers as if half were."""
    rng = np.random.default_rng(3)
    labels = (rng.random(slides) < 0.15).astype(int)
    logit = 2 * (2 * labels - 1) * 0.8 + 1.6 * rng.standard_normal(slides)
    answers = np.stack([1 / (1 + np.exp(logit)), 1 / (1 + np.exp(-logit))], axis=1)
    scaling = fitted_scaling(labels, answers)
    assert answers[:, 1].mean() > labels.mean() + 0.1
    assert scaling.apply(answers)[:, 1].mean() == pytest.approx(labels.mean(), abs=0.02)
    assert scaling.prior == pytest.approx([1 - labels.mean(), labels.mean()])
    elsewhere = scaling.at((0.5, 0.5)).apply(answers)
    assert elsewhere[:, 1].mean() > labels.mean() + 0.1
    odds = elsewhere / scaling.apply(answers)
    assert odds[:, 1] / odds[:, 0] == pytest.approx((1 - labels.mean()) / labels.mean())


def test_without_class_weights_few_slides_are_held_at_the_probabilities_as_they_are():
    """A model that answers with the frequencies, as a loss without weights trains it to."""
    labels = np.repeat([0, 1], [17, 3])
    answers = np.repeat([[0.85, 0.15]], 20, axis=0)
    as_trained, undone = (fitted_scaling(labels, answers, is_balanced) for is_balanced in (False, True))
    assert as_trained.apply(answers)[0, 1] == pytest.approx(0.15, abs=0.06)
    assert undone.apply(answers)[0, 1] < as_trained.apply(answers)[0, 1] - 0.02


def test_a_temperature_alone_divides_the_logits_and_keeps_the_order():
    logits = np.random.default_rng(1).standard_normal((50, 4)) * 5
    scaled = scale_probabilities(softmax(logits), 1.7)
    np.testing.assert_allclose(scaled, softmax(logits / 1.7), rtol=1e-6)
    np.testing.assert_array_equal(np.argsort(scaled), np.argsort(logits))
    np.testing.assert_allclose(scale_probabilities(softmax(logits), 1.0), softmax(logits), rtol=1e-6)
    assert np.isfinite(scale_probabilities(np.array([0.0, 1.0]), 0.05)).all()
    with pytest.raises(ValueError, match="no frequencies"):
        Scaling(2.0).at((0.5, 0.5))


def test_few_slides_that_are_all_right_do_not_call_for_boundless_sureness():
    labels = np.array([0, 0, 0, 1, 1, 1])
    probabilities = np.where(np.eye(2)[labels] > 0, 0.7, 0.3)
    found = fitted_scaling(labels, probabilities)
    # All are right with 0.7: the most likely answer is Platt's target, (3 + 1) / (3 + 2), and the prior holds it back.
    assert 0.7 < found.apply(probabilities).max() < 0.8


def test_a_missing_class_gives_no_scaling():
    assert fitted_scaling(np.array([1, 1]), np.array([[0.2, 0.8], [0.4, 0.6]])) is None


def test_slope_and_intercept_are_those_of_a_logistic_regression():
    rng = np.random.default_rng(0)
    odds = rng.normal(size=400)
    outcome = rng.random(400) < 1 / (1 + np.exp(-(0.6 * odds - 0.4)))
    probability = 1 / (1 + np.exp(-odds))
    weights = np.stack([np.ones(400), rng.integers(0, 3, 400).astype(float)])
    slopes, intercepts = calibration_lines(probability, outcome, weights)
    for slope, row in zip(slopes, weights, strict=True):
        expected = LogisticRegression(C=np.inf, tol=1e-10).fit(odds[:, None], outcome, row)
        assert slope == pytest.approx(expected.coef_[0, 0], rel=1e-4)
    shifted = 1 / (1 + np.exp(-(odds + intercepts[0])))
    assert shifted.mean() == pytest.approx(outcome.mean()), "at slope 1 it predicts as often as it is true"


def test_separated_classes_have_no_slope():
    probability, outcome = np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])
    slopes, intercepts = calibration_lines(probability, outcome, np.ones((1, 4)))
    assert np.isnan(slopes).all()
    assert intercepts == pytest.approx([0], abs=1e-6)


def test_probabilities_that_do_not_vary_have_no_slope_and_one_bin():
    constant, outcome = np.full(20, 0.5), np.arange(20) >= 10
    slopes, intercepts = calibration_lines(constant, outcome, np.ones((1, 20)))
    assert np.isnan(slopes).all()
    assert intercepts == pytest.approx([0], abs=1e-6)
    assert corrected_error(constant, outcome) == 0


def test_chance_adds_nothing_to_the_corrected_error():
    rng = np.random.default_rng(0)
    plain, corrected = [], []
    for _ in range(200):
        probability = rng.random(40)
        outcome = rng.random(40) < probability
        answers = np.stack([1 - probability, probability], axis=1)
        plain.append(classification_metrics(outcome.astype(int), answers)["ece"])
        corrected.append(corrected_error(probability, outcome))
    assert np.mean(plain) > 0.1
    assert np.mean(corrected) < 0.08
    assert np.median(corrected) < 0.03
    probability = np.full(400, 0.9)
    outcome = rng.random(400) < 0.5
    assert corrected_error(probability, outcome) == pytest.approx(0.4, abs=0.06)


def test_each_model_of_an_ensemble_is_scaled_before_the_mean():
    members = np.array([[0.9, 0.1], [0.2, 0.8]])
    output = SlideOutput(members.mean(axis=0), members.mean(axis=0)[None], np.array([5]), None, members)
    expected = scale_probabilities(members, 2.0).mean(axis=0)
    np.testing.assert_allclose(mean_calibrated(TASK, [output], [fit(2.0)]), expected)
    alone = SlideOutput(members[0], members[:1], np.array([5]), None)
    np.testing.assert_allclose(mean_calibrated(TASK, [alone], [fit(2.0)]), scale_probabilities(members[0], 2.0))
    assert mean_calibrated(TASK, [alone], [None]) is None
    assert mean_calibrated(TASK, [alone], [fit(None)]) is None


def test_each_checkpoint_is_scaled_by_its_own_temperature():
    members = np.array([[0.9, 0.1], [0.2, 0.8]])
    outputs = [SlideOutput(one, one[None], np.array([5]), None) for one in members]
    expected = (scale_probabilities(members[0], 2.0) + scale_probabilities(members[1], 0.5)) / 2
    np.testing.assert_allclose(mean_calibrated(TASK, outputs, [fit(2.0), fit(0.5)]), expected)
    assert mean_calibrated(TASK, outputs, [fit(2.0), None]) is None
