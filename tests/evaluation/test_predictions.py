"""The table of predictions, and what is computed from it."""

from dataclasses import replace

import numpy as np
import pytest

from tests.evaluation.predicted import predicted
from tests.small import TASK
from utils.evaluation.predictions import Predictions
from utils.tasks.classification import Classification

HEAD = "wsi_id,case_id,label,fold,prob_no,prob_yes"


@pytest.mark.parametrize("is_calibrated", [True, False])
def test_a_table_reads_back(tmp_path, is_calibrated):
    whole = predicted(repeats=2)
    whole = replace(whole, calibrated=whole.values**2 if is_calibrated else None)
    whole.table().to_csv(tmp_path / "predictions.csv", index=False)
    again = Predictions.read(tmp_path / "predictions.csv", seed=5)
    assert again.task == TASK
    for name in ("slides", "cases", "labels", "repeats", "folds"):
        assert getattr(again, name).tolist() == getattr(whole, name).tolist(), name
    np.testing.assert_allclose(again.values, whole.values)
    if is_calibrated:
        np.testing.assert_allclose(again.calibrated, whole.calibrated)
    else:
        assert again.calibrated is None
    assert again.metrics == pytest.approx(whole.metrics)
    assert (again.n_slides, again.n_cases, again.n_repeats, again.n_folds) == (24, 12, 2, 6)


def test_a_table_without_repeats_is_of_one(tmp_path):
    (tmp_path / "predictions.csv").write_text(f"{HEAD}\na,A,no,1,0.8,0.2\n")
    assert Predictions.read(tmp_path / "predictions.csv", seed=0).repeats.tolist() == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, "no slide in it"),
        ("wsi_id,case_id,label,fold\na,A,no,1", "no column prob_<class>"),
        ("wsi_id,label,prob_no,prob_yes\na,no,0.8,0.2", "no column case_id, fold"),
        (f"{HEAD}\na,A,maybe,1,0.8,0.2", "a label that is none of"),
        (f'{HEAD}\n"a"b,A,no,1,0.8,0.2', "expected after"),
        (f"{HEAD}\na,A,no,1,much,0.2", "could not convert"),
    ],
)
def test_what_is_no_table_of_predictions_says_why(tmp_path, text, message):
    (tmp_path / "predictions.csv").write_text(f"{text}\n")
    with pytest.raises(ValueError, match=message):
        Predictions.read(tmp_path / "predictions.csv", seed=0)


def test_the_classes_may_be_given(tmp_path):
    (tmp_path / "predictions.csv").write_text(f"{HEAD}\na,A,no,1,0.8,0.2\n")
    read = Predictions.read(tmp_path / "predictions.csv", 0, Classification(("yes", "no")))
    assert (read.labels.tolist(), read.values.tolist()) == ([1], [[0.2, 0.8]])


@pytest.mark.parametrize("rows", [np.array([3, 0]), np.arange(24) == 5])
def test_rows_are_taken_of_every_column(rows):
    whole = predicted()
    whole = replace(whole, calibrated=whole.values**2, decisions=whole.labels)
    part = whole.where(rows)
    for name in ("slides", "cases", "labels", "values", "repeats", "folds", "calibrated", "decisions"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[rows])
    assert (part.task, part.seed) == (whole.task, whole.seed)


def test_the_mean_over_repeats_has_a_row_of_each_slide_in_the_order_of_the_first():
    whole = predicted(repeats=3)
    whole = whole.where(np.random.default_rng(1).permutation(len(whole)))
    mean = whole.mean_over_repeats()
    assert mean.slides.tolist() == list(dict.fromkeys(whole.slides.tolist()))
    for row, slide in enumerate(mean.slides):
        np.testing.assert_allclose(mean.values[row], whole.values[whole.slides == slide].mean(axis=0))
        assert {mean.labels[row]} == set(whole.labels[whole.slides == slide])
    assert (mean.folds, mean.calibrated, mean.decisions) == (None, None, None)


def test_decisions_are_measured_in_each_repeat_and_their_mean_is_taken():
    whole = predicted(repeats=2)
    assert whole.decision_metrics is None
    decisions = np.where(whole.repeats == 1, whole.labels, 1 - whole.labels)
    metrics = replace(whole, decisions=decisions).decision_metrics
    assert (metrics["accuracy"], metrics["balanced_accuracy"]) == (0.5, 0.5)


def test_calibrated_values_have_the_metrics_that_calibration_improves():
    whole = predicted()
    assert whole.calibrated_metrics is None
    sure = replace(whole, calibrated=np.eye(2)[whole.labels])
    assert sure.calibrated_metrics == {"brier": 0, "ece": 0}


def test_a_class_is_ranked_against_the_rest():
    rng = np.random.default_rng(0)
    task = Classification(("a", "b", "c"))
    labels = np.arange(24) % 3
    whole = predicted(labels=labels, values=rng.dirichlet(np.ones(3), size=24), task=task)
    assert list(whole.rankings) == [0, 1, 2]
    for index, ranking in whole.rankings.items():
        positive, others = whole.values[labels == index, index], whole.values[labels != index, index]
        assert ranking.auc.value == pytest.approx((positive[:, None] > others).mean())
        assert ranking.auc.interval[0] <= ranking.auc.value <= ranking.auc.interval[1]
        assert ranking.prevalence == pytest.approx(1 / 3)


@pytest.mark.parametrize("repeats", [1, 2])
def test_decisions_at_a_threshold_have_their_own_figures_and_intervals(repeats):
    whole = predicted(repeats=repeats)
    decided = replace(whole, decisions=(whole.values[:, 1] >= 0.3).astype(int))
    assert not whole.decided
    assert {name: found.value for name, found in decided.decided.items()} == pytest.approx(decided.decision_metrics)
    assert decided.decided["sensitivity_yes"].value > whole.metrics["sensitivity_yes"]
    for found in decided.decided.values():
        low, high = found.interval
        assert 0 <= low <= found.value <= high <= 1
        assert low < high
