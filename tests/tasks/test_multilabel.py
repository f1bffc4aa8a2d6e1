"""Several labels, some of them unknown: targets, loss, probabilities, metrics and records."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from utils.evaluation.intervals import ScoredRows
from utils.evaluation.predictions import Predictions
from utils.tasks.classification import Classification
from utils.tasks.multilabel import Multilabel
from utils.tasks.multilabel_metrics import UNKNOWN
from utils.tasks.records import Answer, new_task, task_of

NAMES = ("EGFR", "KRAS", "TP53")
TASK = Multilabel(NAMES)


def drawn(count: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, a fifth of them unknown, and probabilities that know a little of them, with ties."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((count, 3)) < (0.2, 0.5, 0.7)).astype(int)
    values = np.round((truth + rng.random((count, 3)) * 2) / 3.2 + 0.02, 2)
    return np.where(rng.random((count, 3)) < 0.2, UNKNOWN, truth), values


def test_metrics_are_those_of_scikit_learn_on_the_known_slides():
    targets, values = drawn()
    figures = TASK.unweighted_metrics(targets, values)
    assert list(figures) == list(TASK.metric_names)
    for label, name in enumerate(NAMES):
        known = targets[:, label] >= 0
        pair = targets[known, label], values[known, label]
        assert figures[f"auc_{name}"] == pytest.approx(roc_auc_score(*pair))
        assert figures[f"average_precision_{name}"] == pytest.approx(average_precision_score(*pair))
    for kind in ("auc", "average_precision"):
        assert figures[kind] == pytest.approx(np.mean([figures[f"{kind}_{name}"] for name in NAMES]))


def test_a_weight_counts_as_copies_of_a_slide():
    targets, values = drawn(30, 1)
    counts = np.random.default_rng(2).integers(0, 4, (5, 30))
    weighted = TASK.metrics(targets, values, counts.astype(float))
    for row, copies in enumerate(counts):
        repeated = TASK.unweighted_metrics(np.repeat(targets, copies, axis=0), np.repeat(values, copies, axis=0))
        for name in TASK.metric_names:
            assert weighted[name][row] == pytest.approx(repeated[name]), name


def test_the_value_of_an_unknown_label_changes_nothing():
    targets, values = drawn()
    other = np.where(targets == UNKNOWN, 1 - values, values)
    assert TASK.unweighted_metrics(targets, values) == TASK.unweighted_metrics(targets, other)
    weights = TASK.loss_weights(targets)
    assert TASK.validation(targets, values, weights) == TASK.validation(targets, other, weights)


def test_a_label_that_no_slide_has_leaves_the_mean_undefined():
    targets, values = drawn()
    targets[:, 0] = np.minimum(targets[:, 0], 0)
    figures = TASK.unweighted_metrics(targets, values)
    undefined = {name for name, value in figures.items() if value is None}
    assert undefined == {"auc", "average_precision", "auc_EGFR", "average_precision_EGFR"}
    assert TASK.why_undefined("auc", targets) == "lacks slides with EGFR"
    assert not TASK.why_undefined("loss", targets)
    with pytest.raises(ValueError, match="no row has a 1 in EGFR, so that it cannot be learned; leave it out"):
        TASK.of_cohort(targets, ["P"] * 60)


def test_within_folds_each_label_is_that_of_two_classes():
    targets, values = drawn()
    folds, ones = np.arange(60) % 3, np.ones((1, 60))
    figures = TASK.metrics_within(targets, values, ones, folds)
    for label, name in enumerate(NAMES):
        known = targets[:, label] >= 0
        two = np.stack([1 - values[known, label], values[known, label]], axis=1)
        expected = Classification(("no", "yes")).metrics_within(
            targets[known, label], two, ones[:, known], folds[known]
        )
        assert figures[f"auc_{name}"] == pytest.approx(expected["auc"])
        assert figures[f"average_precision_{name}"] == pytest.approx(expected["average_precision"])


def test_intervals_and_curves_of_a_label_are_those_of_two_classes_on_the_known_slides():
    targets, values = drawn(120)
    patients, once = np.arange(120).astype(str), np.zeros(120)
    predictions = Predictions(patients, patients, targets, values, TASK, once, seed=0)
    for label, name in enumerate(NAMES):
        known = targets[:, label] >= 0
        two = np.stack([1 - values[known, label], values[known, label]], axis=1)
        rows = ScoredRows(Classification(("no", "yes")), targets[known, label], two, patients[known], once[known])
        expected = rows.estimates(rows.pooled, 0)
        for metric in ("auc", "average_precision"):
            assert predictions.pooled[f"{metric}_{name}"].interval == pytest.approx(expected[metric].interval, abs=5e-3)
        ranking, ranked = predictions.rankings[label], predictions.ranked(label)
        assert ranking.auc == predictions.pooled[f"auc_{name}"]
        assert ranking.prevalence == pytest.approx(targets[known, label].mean())
        np.testing.assert_array_equal(ranked.is_positive, targets[known, label] == 1)
        np.testing.assert_array_equal(ranked.scores, values[known, label])


def test_the_loss_is_the_mean_of_the_known_labels_cross_entropy():
    targets, _ = drawn()
    logits = 3 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    values = TASK.activate(logits)
    np.testing.assert_allclose(values, 1 / (1 + np.exp(-logits.double().numpy())))
    weights = np.array([[1, 2], [3, 4], [5, 6.0]])
    by_hand = []
    for row in range(60):
        losses = []
        for label in range(3):
            truth = targets[row, label]
            if truth >= 0:
                losses.append(-np.log(values[row, label] if truth else 1 - values[row, label]) * weights[label, truth])
        by_hand.append(np.mean(losses))
    loss = TASK.loss(logits, torch.tensor(targets), torch.tensor(weights, dtype=torch.float32))
    assert loss.numpy() == pytest.approx(by_hand, rel=1e-4)
    assert TASK.validation(targets, values, weights)["loss"] == pytest.approx(np.mean(by_hand))


@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_gradients_are_finite_and_none_comes_from_an_unknown_label(size):
    targets = torch.tensor([[1, 0, UNKNOWN], [UNKNOWN, UNKNOWN, 1]])
    logits = torch.full((2, 3), size, requires_grad=True)
    TASK.loss(logits, targets, torch.ones(3, 2)).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[targets == UNKNOWN].any()


def test_weights_give_slides_with_and_without_a_label_the_same_total():
    targets, _ = drawn()
    for column, weights in zip(targets.T, TASK.loss_weights(targets), strict=True):
        totals = [weights[cell] * (column == cell).sum() for cell in (0, 1)]
        assert totals == pytest.approx([(column >= 0).sum() / 2] * 2)


def test_a_slide_is_in_the_stratum_of_the_rarest_label_that_it_has():
    cells = [(1, 1, 0)] * 12 + [(0, 1, 0)] * 15 + [(0, 0, 1)] * 5 + [(0, UNKNOWN, 0)] * 20
    targets, cases = np.array(cells), [f"P{row}" for row in range(len(cells))]
    task = TASK.of_cohort(targets, cases)
    assert task.stratum_labels == ("EGFR", "KRAS"), "too few patients have TP53"
    assert task.strata_names == ("with EGFR", "with KRAS", "with none of EGFR, KRAS")
    assert np.bincount(task.strata(targets)).tolist() == [12, 15, 25]
    few = TASK.of_cohort(targets, ["P0", "P1"] * 26)
    assert few.strata_names == ("all",)
    assert not few.strata(targets).any()


def test_the_commonest_label_is_no_stratum_if_too_few_slides_lack_all():
    targets = np.array([(1, 0, 1)] * 12 + [(0, 1, 0)] * 15 + [(0, 0, 1)] * 3)
    task = TASK.of_cohort(targets, [f"P{row}" for row in range(30)])
    assert task.strata_names == ("with EGFR", "with none of EGFR")


@pytest.mark.parametrize(("cells", "target"), [
    ("1 0 1", (1, 0, 1)), ("1.0 NA 0", (1, UNKNOWN, 0)), ("0 nan unknown", (0, UNKNOWN, UNKNOWN)),
])  # fmt: skip
def test_cells_that_can_be_used(cells, target):
    assert TASK.target(dict(zip(NAMES, cells.split(), strict=True))) == target
    assert TASK.target(dict(zip(NAMES, ("", "1", "0"), strict=True))) == (UNKNOWN, 1, 0)


@pytest.mark.parametrize("cells", ["2 0 1", "yes 0 1", "0.5 0 1", "-1 0 1", "NA NA NA"])
def test_cells_that_cannot_be_used(cells):
    with pytest.raises(ValueError, match=r".+"):
        TASK.target(dict(zip(NAMES, cells.split(), strict=True)))
    assert "EGFR, KRAS, TP53 must be 1, 0 or empty, and not all of them empty" in TASK.no_target


@pytest.mark.parametrize("names", [("EGFR",), ("EGFR", "EGFR")])
def test_it_needs_two_different_labels(names):
    with pytest.raises(ValueError, match="several labels are two different ones or more"):
        Multilabel(names)


def test_records_and_answers_keep_the_task_and_the_labels():
    targets, _ = drawn()
    task = new_task("multilabel", {"target_columns": NAMES}).of_cohort(targets, [f"P{row}" for row in range(60)])
    assert task_of(task.record) == task
    members = np.array([[0.9, 0.2, 0.6], [0.7, 0.1, 0.8]])
    answer = Answer.of(task.answer(members.mean(axis=0), None, members))
    assert answer.predicted == "EGFR, TP53"
    assert (answer.output, answer.signal, answer.agreeing) == ("EGFR", "EGFR", 1)
    assert answer.values == pytest.approx(dict(zip(NAMES, (0.8, 0.15, 0.7), strict=True)))
    assert task.prediction_text(np.array([[0.1, 0.2, 0.3]])).tolist() == ["none"]
    texts = task.target_text(np.array([[1, 0, 1], [0, 0, UNKNOWN]]))
    assert texts.tolist() == ["EGFR, TP53", "none (unknown: TP53)"]


def test_a_table_of_predictions_is_read_as_it_was_written():
    targets, values = drawn()
    columns = TASK.table_columns(targets, values)
    rows = [{name: str(column[row]) for name, column in columns.items()} for row in range(60)]
    known = (targets != UNKNOWN).any(axis=1)
    assert [TASK.target(row) for row, is_known in zip(rows, known, strict=True) if is_known] == [
        tuple(cells) for cells in targets[known].tolist()
    ]
    np.testing.assert_array_equal(TASK.values_in(rows)[0], values)


def test_evidence_adds_up_to_the_log_odds_of_the_mean_probability():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    chance = shares.numpy() @ TASK.activate(logits)
    assert TASK.signals(logits, shares).tolist() == pytest.approx(np.log(chance / (1 - chance)).tolist())
    assert [TASK.signal_about(output) for output in range(3)] == [0, 1, 2]


def test_the_gallery_shows_known_labels_only():
    targets = np.array([[1, 0, UNKNOWN], [0, UNKNOWN, 1], [1, 1, 0]])
    values = np.array([[0.9, 0.1, 0.5], [0.9, 0.5, 0.7], [0.6, 0.9, 0.1]])
    rows = {kind: order.tolist() for kind, order in TASK.gallery(targets, values).items()}
    assert rows == {"surest correct": [0, 2], "surest wrong": [1], "most uncertain": [2, 1, 0]}


def test_a_patient_has_a_label_that_a_slide_has_and_lacks_one_that_none_has():
    slides = np.array([[1, 0, np.nan, np.nan], [np.nan, 0, 0, np.nan], [0, 0, 1, np.nan]])
    assert Multilabel(("A", "B", "C", "D")).of_case(slides).tolist() == pytest.approx([1, 0, 1, np.nan], nan_ok=True)
