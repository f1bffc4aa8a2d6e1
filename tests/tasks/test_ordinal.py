"""Ordinal grades: targets, loss, probabilities, metrics and records."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, cohen_kappa_score, mean_absolute_error

from utils.evaluation.intervals import ScoredRows
from utils.tasks.ordinal import Ordinal
from utils.tasks.ordinal_metrics import METRICS, ordinal_metrics
from utils.tasks.records import Answer, new_task, task_of

TASK = Ordinal("stage", ("I", "II", "III", "IV"))


def drawn(count: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Grades, and predicted ones near them."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 4, count)
    return targets, np.clip(targets + rng.integers(-1, 3, count), 0, 3)


def drawn_logits(count: int = 200, spread: float = 3) -> torch.Tensor:
    return spread * torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def higher(logits: np.ndarray) -> np.ndarray:
    """The probabilities of "higher than grade k", one grade after the other."""
    steps = np.log1p(np.exp(logits[:, 1:])) + 1e-6
    first = logits[:, :1]
    return 1 / (1 + np.exp(-np.concatenate([first, first - steps[:, :1], first - steps[:, :1] - steps[:, 1:]], axis=1)))


def test_metrics_are_those_of_scikit_learn():
    targets, predicted = drawn()
    figures = ordinal_metrics(targets, predicted, np.ones((1, 60)), 4)
    assert {name: float(value[0]) for name, value in figures.items()} == pytest.approx({
        "quadratic_kappa": cohen_kappa_score(targets, predicted, weights="quadratic"),
        "mae": mean_absolute_error(targets, predicted),
        "accuracy": accuracy_score(targets, predicted),
    })  # fmt: skip


def test_a_weight_counts_as_copies_of_a_slide():
    targets, predicted = drawn(30, 1)
    counts = np.random.default_rng(2).integers(0, 4, (5, 30))
    weighted = ordinal_metrics(targets, predicted, counts.astype(float), 4)
    for row, copies in enumerate(counts):
        ones = np.ones((1, copies.sum()))
        repeated = ordinal_metrics(np.repeat(targets, copies), np.repeat(predicted, copies), ones, 4)
        for name in METRICS:
            assert weighted[name][row] == pytest.approx(repeated[name][0]), name


def test_the_median_is_marked_where_another_grade_is_more_probable():
    values = np.array([0.4, 0.25, 0.2, 0.15])
    assert TASK.marked(values) == ("II",)
    assert "median" in TASK.shares({})[0]


def test_a_grade_without_a_row_is_named():
    assert TASK.of_cohort(np.arange(4), list("abcd")) is TASK
    with pytest.raises(ValueError, match="no row has the grade III; leave it out of --order"):
        TASK.of_cohort(np.array([0, 1, 3]), list("abc"))


def test_kappa_is_undefined_where_nothing_differs():
    alike, once = np.full(5, 2), np.ones((1, 5))
    assert np.isnan(ordinal_metrics(alike, alike, once, 4)["quadratic_kappa"])
    assert ordinal_metrics(alike, np.arange(5) % 4, once, 4)["quadratic_kappa"] == pytest.approx(0)
    assert ordinal_metrics(np.arange(5) % 4, alike, once, 4)["quadratic_kappa"] == pytest.approx(0)
    assert TASK.why_undefined("quadratic_kappa", alike) == "has slides of one grade only"
    assert not TASK.why_undefined("mae", alike)


def test_probabilities_are_the_differences_of_a_cumulative_link():
    logits = drawn_logits()
    values = TASK.activate(logits)
    cumulative = higher(logits.numpy())
    edges = np.concatenate([np.ones((200, 1)), cumulative, np.zeros((200, 1))], axis=1)
    np.testing.assert_allclose(values, edges[:, :-1] - edges[:, 1:], atol=1e-12)
    np.testing.assert_allclose(values.sum(axis=1), 1)
    assert (values > 0).all()


def test_the_loss_is_the_weighted_log_likelihood_in_training_and_validation():
    logits = drawn_logits()
    targets = np.arange(200) % 4
    weights = np.array([0.5, 1, 2, 4])
    by_hand = -np.log(TASK.activate(logits)[np.arange(200), targets]) * weights[targets]
    loss = TASK.loss(logits, torch.tensor(targets), torch.tensor(weights, dtype=torch.float32))
    assert loss.numpy() == pytest.approx(by_hand, rel=1e-4)
    validation = TASK.validation(targets, TASK.activate(logits), weights)
    assert validation["loss"] == pytest.approx(by_hand.sum() / weights[targets].sum())
    assert list(validation) == ["loss", *METRICS]
    assert TASK.chance_loss == pytest.approx(np.log(4))


@pytest.mark.parametrize("size", [0.0, 50.0, -50.0, 1e4, -1e4])
def test_gradients_are_finite_however_large_the_logits(size):
    logits = torch.full((4, 3), size, requires_grad=True)
    loss = TASK.loss(logits, torch.arange(4), torch.ones(4)).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_predicted_grade_has_the_smallest_expected_distance():
    values = np.random.default_rng(0).dirichlet(np.full(4, 0.5), 500)
    grades = np.arange(4)
    expected = values @ np.abs(grades[:, None] - grades)
    decided = TASK.decide(values)
    assert expected[np.arange(500), decided] == pytest.approx(expected.min(axis=1))
    assert (decided != values.argmax(axis=1)).any(), "the most probable grade is another one"
    assert TASK.decide(values[0]) == decided[0]
    assert TASK.prediction_text(values[:1]).tolist() == [TASK.order[decided[0]]]


def test_evidence_adds_up_to_the_expected_grade_of_the_slide():
    logits, shares = drawn_logits(3), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    signal = TASK.signals(logits, shares)
    assert signal.tolist() == pytest.approx([float(shares.numpy() @ TASK.activate(logits) @ np.arange(4))])
    assert TASK.signal_about(3) == 0


def test_records_and_answers_keep_the_task_and_the_grade():
    task = new_task("ordinal", {"target_column": "stage", "order": TASK.order})
    assert task == TASK == task_of(TASK.record)
    members = TASK.activate(drawn_logits(3))
    record = TASK.answer(members.mean(axis=0), None, members)
    answer = Answer.of(record)
    assert answer.task == TASK
    assert answer.predicted == answer.output == record["predicted_class"]
    assert record["confidence"] == answer.values[answer.predicted]
    assert answer.signal == "stage"
    assert answer.agreeing == (TASK.decide(members) == TASK.order.index(answer.predicted)).sum()
    assert len(answer.members) == 3
    assert answer.calibrated is None


def test_a_table_of_predictions_is_read_as_it_was_written():
    targets, values = np.arange(20) % 4, TASK.activate(drawn_logits(20))
    columns = TASK.table_columns(targets, values)
    rows = [{name: str(column[row]) for name, column in columns.items()} for row in range(20)]
    assert [TASK.target(row) for row in rows] == targets.tolist()
    np.testing.assert_array_equal(TASK.values_in(rows)[0], values)


@pytest.mark.parametrize("cell", ["", "NA", "V", "i"])
def test_a_cell_that_is_no_grade_is_refused(cell):
    with pytest.raises(ValueError, match="not in"):
        TASK.target({"stage": cell})
    assert TASK.no_target == "stage that is none of I, II, III, IV"


@pytest.mark.parametrize("grades", [("low", "high"), ("low", "mid", "low")])
def test_it_needs_three_different_grades(grades):
    with pytest.raises(ValueError, match=f"grades {', '.join(grades)}; an order needs three different ones"):
        Ordinal("grade", grades)


def test_every_metric_has_an_interval_that_holds_it():
    targets, values = np.arange(40) % 4, TASK.activate(drawn_logits(40))
    rows = ScoredRows(TASK, targets, values, np.arange(40) // 2, np.zeros(40))
    for name, estimate in rows.estimates(rows.pooled, 0).items():
        assert estimate.interval is not None, name
        assert estimate.interval[0] <= estimate.value <= estimate.interval[1]
