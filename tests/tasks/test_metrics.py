import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from tests.small import classification_metrics
from utils.tasks.metrics import (
    METRICS,
    auc_is_defined,
    balanced_class_weights,
    decision_metrics,
    log_loss,
    mean_and_std,
    metric_names,
    weighted_metrics,
)


def answers(predicted: list[int], num_classes: int) -> np.ndarray:
    """Probabilities whose largest is `predicted`."""
    return np.eye(num_classes)[predicted] * 0.6 + 0.4 / num_classes


def drawn_answers(num_classes: int, count: int, seed: int, digits: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels in which each class occurs, and probabilities; of one digit many tie."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(num_classes), rng.integers(num_classes, size=count)])
    probabilities = rng.dirichlet(np.ones(num_classes), size=len(labels)).round(digits) + 0.01
    return labels, probabilities / probabilities.sum(axis=1, keepdims=True)


def test_two_classes_by_hand():
    labels = np.array([0, 0, 0, 1, 1])
    positive = np.array([0.1, 0.6, 0.4, 0.4, 0.9])  # predicted 0 1 0 0 1
    figures = classification_metrics(labels, np.stack([1 - positive, positive], axis=1))
    assert figures["accuracy"] == pytest.approx(3 / 5)
    assert figures["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert figures["f1_macro"] == pytest.approx((4 / 6 + 2 / 4) / 2)
    # Of the six pairs: 0.4 beats 0.1, loses to 0.6, ties with 0.4; 0.9 beats all three.
    assert figures["auc"] == pytest.approx((1 + 0 + 0.5 + 3) / 6)


def test_three_classes_by_hand():
    labels = np.array([0, 1, 2, 2])
    probabilities = np.array([[0.7, 0.2, 0.1], [0.3, 0.5, 0.2], [0.1, 0.3, 0.6], [0.5, 0.1, 0.4]])
    figures = classification_metrics(labels, probabilities)
    assert figures["accuracy"] == pytest.approx(3 / 4)
    assert figures["balanced_accuracy"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert figures["f1_macro"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert figures["auc"] == pytest.approx(1)  # each class ranks its own slides above all others


@given(st.integers(2, 4), st.integers(4, 30), st.integers(0, 10_000))
def test_agrees_with_scikit_learn(num_classes, count, seed):
    labels, probabilities = drawn_answers(num_classes, count, seed, digits=1)
    figures, predicted = classification_metrics(labels, probabilities), probabilities.argmax(axis=1)
    assert figures["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, predicted))
    assert figures["balanced_accuracy"] == pytest.approx(sklearn.balanced_accuracy_score(labels, predicted))
    assert figures["f1_macro"] == pytest.approx(sklearn.f1_score(labels, predicted, average="macro"))
    expected = (
        sklearn.roc_auc_score(labels, probabilities[:, 1])
        if num_classes == 2
        else sklearn.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    )
    assert figures["auc"] == pytest.approx(expected)


@given(st.integers(2, 4), st.integers(0, 30), st.integers(0, 10_000), st.sampled_from([1, 8]))
def test_scores_and_rates_agree_with_scikit_learn(num_classes, count, seed, digits):
    labels, probabilities = drawn_answers(num_classes, count, seed, digits)
    names = [f"class {index}" for index in range(num_classes)]
    figures, predicted = classification_metrics(labels, probabilities, names), probabilities.argmax(axis=1)
    truth = np.eye(num_classes)[labels]
    precision = sklearn.average_precision_score(truth, probabilities, average=None)
    assert figures["average_precision"] == pytest.approx(precision[1] if num_classes == 2 else np.mean(precision))
    brier = ((probabilities - truth) ** 2).sum(axis=1).mean()
    if num_classes == 2:
        assert sklearn.brier_score_loss(labels, probabilities[:, 1]) == pytest.approx(brier / 2)
    assert figures["brier"] == pytest.approx(brier / 2 if num_classes == 2 else brier)
    for index, name in enumerate(names):
        for kind, positive in (("sensitivity", 1), ("specificity", 0)):
            expected = sklearn.recall_score(labels == index, predicted == index, pos_label=positive)
            assert figures[f"{kind}_{name}"] == pytest.approx(expected)


@given(st.integers(2, 4), st.integers(0, 20), st.integers(0, 10_000))
def test_a_weight_is_so_many_copies(num_classes, count, seed):
    labels, probabilities = drawn_answers(num_classes, count, seed, digits=1)
    weights = np.random.default_rng(seed).integers(3, size=(4, len(labels)))
    weights[:, 0] += 1
    found = weighted_metrics(labels, probabilities, weights.astype(float), "abcd"[:num_classes])
    for row, weight in enumerate(weights):
        rows = np.repeat(np.arange(len(labels)), weight)
        expected = classification_metrics(labels[rows], probabilities[rows], "abcd"[:num_classes])
        for name, value in expected.items():
            assert found[name][row] == pytest.approx(np.nan if value is None else value, nan_ok=True), name


def test_expected_calibration_error_by_hand():
    """0.9 belongs to the bin below the edge, with 0.85; 0.95 and 1 lie above it."""
    confidence, right = np.array([0.85, 0.9, 0.95, 1.0, 0.6]), np.array([1, 0, 1, 1, 1])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    expected = (abs(0.85 + 0.9 - 1) + abs(0.95 + 1.0 - 2) + abs(0.6 - 1)) / 5
    assert classification_metrics(1 - right, probabilities)["ece"] == pytest.approx(expected)


def test_names_are_in_order():
    assert metric_names() == METRICS
    names = (*METRICS, "sensitivity_no", "specificity_no", "sensitivity_yes", "specificity_yes")
    assert metric_names(("no", "yes")) == names
    labels, probabilities = drawn_answers(2, 5, 0, digits=8)
    assert tuple(classification_metrics(labels, probabilities)) == METRICS
    assert tuple(classification_metrics(labels, probabilities, ("no", "yes"))) == names


def test_decisions_need_no_probabilities():
    labels, probabilities = drawn_answers(3, 30, 0, digits=8)
    expected = classification_metrics(labels, probabilities, "abc")
    figures = decision_metrics(labels, probabilities.argmax(axis=1), "abc")
    assert figures == {name: expected[name] for name in figures}
    assert [*figures] == ["accuracy", "balanced_accuracy", "f1_macro", *metric_names("abc")[len(METRICS) :]]


def test_rates_of_a_class_that_is_missing_or_alone():
    figures = decision_metrics(np.array([1, 1, 1]), np.array([1, 1, 0]), ("no", "yes"))
    assert figures["sensitivity_no"] is figures["specificity_yes"] is None
    assert figures["specificity_no"] == figures["sensitivity_yes"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_auc_and_raises_no_warning(label):
    labels = np.full(4, label)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = classification_metrics(labels, answers([label, label, label, 1 - label], 2))
    assert figures["auc"] is figures["average_precision"] is None
    assert figures["accuracy"] == figures["balanced_accuracy"] == pytest.approx(3 / 4)
    assert figures["f1_macro"] == pytest.approx(6 / 7)


def test_a_class_that_is_never_predicted_counts_as_missed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = classification_metrics(np.array([0, 0, 1, 2]), answers([0, 0, 0, 2], 3))
    assert figures["balanced_accuracy"] == pytest.approx((1 + 0 + 1) / 3)
    assert figures["f1_macro"] == pytest.approx((4 / 5 + 0 + 1) / 3)


def test_a_class_that_is_only_predicted_is_not_averaged_in():
    """A fold without class 2: predicting it is a mistake of the class that was there, not a zero of its own."""
    labels, predicted = np.array([0, 0, 1, 1]), [0, 2, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = classification_metrics(labels, answers(predicted, 3))
    assert figures["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert figures["f1_macro"] == pytest.approx((2 / 3 + 1) / 2)
    assert figures["auc"] is None
    assert not auc_is_defined(labels, 3)


def test_every_figure_is_a_plain_number():
    figures = classification_metrics(np.array([0, 1, 1]), answers([0, 1, 0], 2))
    assert {type(value) for value in figures.values()} == {float}


def test_auc_takes_float32_probabilities_of_three_classes():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), size=30).astype(np.float32) * np.float32(1.0001)
    assert 0 < classification_metrics(np.arange(30) % 3, probabilities)["auc"] < 1


def test_class_weights_give_each_class_the_same_total():
    weights = balanced_class_weights(np.array([0, 0, 0, 1]), 2)
    assert weights == pytest.approx([4 / (2 * 3), 4 / 2])
    assert 3 * weights[0] == pytest.approx(1 * weights[1])
    assert weights[[0, 0, 0, 1]].mean() == pytest.approx(1)


def test_a_class_without_slides_has_no_weight():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert balanced_class_weights(np.array([0, 2, 2]), 3) == pytest.approx([1, 0, 1 / 2])


def test_log_loss_by_hand():
    labels = np.array([0, 0, 1])
    probabilities = np.array([[0.8, 0.2], [0.5, 0.5], [0.9, 0.1]])
    expected = (-np.log(0.8) - np.log(0.5) - 3 * np.log(0.1)) / 5
    assert log_loss(labels, probabilities, np.array([1.0, 3.0])) == pytest.approx(expected)


def test_log_loss_of_a_sure_mistake_is_finite():
    assert log_loss(np.array([0]), np.array([[0.0, 1.0]]), np.ones(2)) == pytest.approx(-np.log(1e-12))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, None, 0.7], (0.6, np.sqrt(0.02))),
        ([0.5], (0.5, None)),
        ([None, 0.25], (0.25, None)),
        ([None, None], (None, None)),
        ([], (None, None)),
    ],
)
def test_mean_and_std_over_the_folds_that_are_defined(values, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mean_and_std(values) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
