import numpy as np
import pytest

from tests.small import TASK, classification_metrics
from utils.prediction.forward_pass import SlideOutput, mean_calibrated
from utils.tasks.calibration import fitted_temperature, scale_probabilities


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
    found = fitted_temperature(labels, softmax(factor * logits))
    assert found == pytest.approx(factor, rel=0.05)
    scaled = scale_probabilities(softmax(factor * logits), found)
    assert classification_metrics(labels, scaled)["ece"] < 0.015


def test_scaling_divides_the_logits_and_keeps_the_order():
    logits = np.random.default_rng(1).standard_normal((50, 4)) * 5
    scaled = scale_probabilities(softmax(logits), 1.7)
    np.testing.assert_allclose(scaled, softmax(logits / 1.7), rtol=1e-6)
    np.testing.assert_array_equal(np.argsort(scaled), np.argsort(logits))
    np.testing.assert_allclose(scale_probabilities(softmax(logits), 1.0), softmax(logits), rtol=1e-6)
    assert np.isfinite(scale_probabilities(np.array([0.0, 1.0]), 0.05)).all()


def test_few_slides_that_are_all_told_right_do_not_call_for_boundless_sureness():
    labels = np.array([0, 0, 0, 1, 1, 1])
    probabilities = np.where(np.eye(2)[labels] > 0, 0.7, 0.3)
    found = fitted_temperature(labels, probabilities)
    # All are told with 0.7, so that the best answer is Platt's target, (3 + 1) / (3 + 2).
    assert scale_probabilities(probabilities, found).max() == pytest.approx(0.8, abs=1e-4)


def test_a_missing_class_gives_no_temperature():
    assert fitted_temperature(np.array([1, 1]), np.array([[0.2, 0.8], [0.4, 0.6]])) is None


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
