"""What a classification asks of its classes, and how it decides."""

import numpy as np
import pytest
import torch

from utils.tasks.classification import Classification

TWO, THREE = Classification(("no", "yes")), Classification(("a", "b", "c"))


@pytest.mark.parametrize("names", [(), ("one",), ("one", "one")])
def test_it_needs_two_different_classes(names):
    with pytest.raises(ValueError, match="a classifier needs two different ones"):
        Classification(names)


def test_a_target_is_the_index_of_its_class():
    assert [TWO.target({"label": name}) for name in ("no", "yes")] == [0, 1]
    with pytest.raises(ValueError, match="not in"):
        TWO.target({"label": "maybe"})


def test_the_auc_alone_needs_every_class():
    assert THREE.why_undefined("auc", np.array([0, 1, 1])) == "lacks a class"
    assert THREE.why_undefined("auc", np.array([0, 1, 2])) == ""
    assert THREE.why_undefined("accuracy", np.array([0, 0])) == ""


def test_a_threshold_decides_between_two_classes_and_the_greatest_value_without():
    values = np.array([[0.7, 0.3], [0.6, 0.4], [0.1, 0.9]])
    assert TWO.decide(values).tolist() == [0, 0, 1]
    assert TWO.decide_by({"threshold": 0.4}, values[None]).tolist() == [0, 1, 1]
    assert TWO.decide_by({"threshold": None}, values[None]) is None
    others = np.array([[[0.5, 0.5], [0.7, 0.3], [0.8, 0.2]], [[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]]])
    half = [
        TWO.decide_by({"threshold": 0.4, "operating_point": point}, others).tolist()
        for point in ("sensitivity=0.9", "specificity=0.9", "balanced_accuracy")
    ]
    assert half == [[0, 0, 0], [1, 0, 1], [0, 0, 1]], "against the wanted rate, or the most probable class"
    assert TWO.decide_by({"threshold": 0.4}, np.stack([values, *others])).tolist() == [0, 0, 1]
    assert THREE.decide(np.array([[0.2, 0.5, 0.3]])).tolist() == [1]


def test_two_classes_have_a_threshold_and_all_a_temperature():
    rng = np.random.default_rng(0)
    for task in (TWO, THREE):
        targets = np.arange(30) % len(task.outputs)
        fitted = task.fit_on_validation(
            targets,
            rng.dirichlet(np.ones(len(task.outputs)), size=30),
            list(map(str, range(30))),
            "balanced_accuracy",
            True,
        )
        assert (fitted["threshold"] is None) is (task is THREE)
        assert fitted["temperature"] > 0


def test_the_validation_has_the_loss_before_the_main_metrics():
    values = np.array([[0.9, 0.1], [0.2, 0.8]])
    figures = TWO.validation(np.array([0, 1]), values, np.ones(2))
    assert list(figures) == ["loss", *TWO.main_metrics]
    assert figures["loss"] == pytest.approx(-np.log([0.9, 0.8]).mean())
    assert figures["auc"] == 1


def test_activation_is_the_softmax_and_the_loss_its_weighted_cross_entropy():
    logits = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    values = TWO.activate(logits)
    assert values.dtype == np.float64
    powers = np.exp(logits.double().numpy())
    np.testing.assert_allclose(values, powers / powers.sum(axis=1, keepdims=True))
    losses = TWO.loss(logits, torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
    np.testing.assert_allclose(losses.numpy(), -np.log([values[0, 0], values[1, 1]]) * [1, 3], rtol=1e-6)


def test_the_signal_of_two_classes_is_the_margin_of_their_logits():
    logits, shares = torch.tensor([[1.0, 3.0]]), torch.ones(1)
    np.testing.assert_allclose(TWO.signals(logits, shares).numpy(), [-2, 2], rtol=1e-6)


def test_the_gallery_is_in_the_order_of_sureness():
    values = np.array([[0.9, 0.1], [0.45, 0.55], [0.2, 0.8], [0.65, 0.35]])
    rows = TWO.gallery(np.array([0, 0, 1, 1]), values)
    assert {kind: index.tolist() for kind, index in rows.items()} == {
        "surest correct": [0, 2], "surest wrong": [3, 1], "most uncertain": [1, 3, 2, 0],
    }  # fmt: skip


def test_reliability_is_of_the_positive_class_or_of_the_predicted_one():
    assert (TWO.positive_output, THREE.positive_output) == (TWO.outputs[1], None)
    two = np.array([[0.9, 0.1], [0.2, 0.8]])
    probability, is_true = TWO.reliability(np.array([0, 0]), two)
    assert (probability.tolist(), is_true.tolist()) == ([0.1, 0.8], [False, False])
    three = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    probability, is_true = THREE.reliability(np.array([0, 1]), three)
    assert (probability.tolist(), is_true.tolist()) == ([0.7, 0.6], [True, False])
