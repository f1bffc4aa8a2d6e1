"""Regression: targets, loss, values and metrics."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import mean_absolute_error, r2_score

from utils.evaluation.intervals import ScoredRows
from utils.tasks.quantiles import inner_quantiles
from utils.tasks.records import Answer, task_of
from utils.tasks.regression import Regression
from utils.tasks.regression_metrics import METRICS, regression_metrics

AGE = Regression("age")


def drawn(count: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, some of them equal, and noisy predictions."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(20, 60, count).astype(float)
    return targets, np.round(targets + rng.normal(0, 8, count))


def once(count: int) -> np.ndarray:
    return np.ones((1, count))


def test_metrics_are_those_of_other_libraries():
    targets, predicted = drawn()
    figures = {name: float(value[0]) for name, value in regression_metrics(targets, predicted, once(40)).items()}
    assert figures == pytest.approx({
        "r2": r2_score(targets, predicted), "mae": mean_absolute_error(targets, predicted),
        "pearson": stats.pearsonr(targets, predicted).statistic,
        "spearman": stats.spearmanr(targets, predicted).statistic,
    })  # fmt: skip


def test_a_weight_counts_as_copies_of_a_slide():
    targets, predicted = drawn(30, 1)
    counts = np.random.default_rng(2).integers(0, 4, (5, 30))
    weighted = regression_metrics(targets, predicted, counts.astype(float))
    for row, copies in enumerate(counts):
        repeated = regression_metrics(np.repeat(targets, copies), np.repeat(predicted, copies), once(copies.sum()))
        for name in METRICS:
            assert weighted[name][row] == pytest.approx(repeated[name][0]), name


def test_without_a_spread_only_the_error_is_defined():
    for targets, predicted in ((np.full(5, 3.0), np.arange(5.0)), (np.full(5, 0.1), np.full(5, 0.1))):
        figures = regression_metrics(targets, predicted, once(5))
        assert [name for name in METRICS if not np.isnan(figures[name][0])] == ["mae"]
    constant = regression_metrics(np.arange(5.0), np.full(5, 2.0), once(5))
    assert [name for name in METRICS if np.isnan(constant[name][0])] == ["pearson", "spearman"]
    assert constant["r2"][0] == pytest.approx(0)
    assert AGE.why_undefined("r2", np.full(5, 3.0)) == "has slides of one number only"
    assert not AGE.why_undefined("mae", np.full(5, 3.0))


def test_large_numbers_lose_no_digits():
    targets, predicted = drawn()
    shifted = regression_metrics(targets + 1e7, predicted + 1e7, once(40))
    assert shifted["r2"][0] == pytest.approx(r2_score(targets, predicted), abs=1e-6)
    assert shifted["pearson"][0] == pytest.approx(stats.pearsonr(targets, predicted).statistic, abs=1e-6)


def test_models_learn_the_numbers_of_the_training_slides_in_standard_deviations():
    targets, _ = drawn()
    task = AGE.fitted_to(targets, ())
    assert (task.center, task.scale) == pytest.approx((targets.mean(), targets.std()))
    logits = torch.randn(40, 1, dtype=torch.float64)
    assert task.activate(logits)[:, 0] == pytest.approx(targets.mean() + targets.std() * logits[:, 0].numpy())
    standardized = (targets - targets.mean()) / targets.std()
    errors = np.abs(logits[:, 0].numpy() - standardized)
    by_hand = np.where(errors <= 1, errors**2 / 2, errors - 0.5)
    loss = task.loss(logits, torch.tensor(targets, dtype=torch.float32), torch.ones(1))
    assert loss.numpy() == pytest.approx(by_hand, abs=1e-5)
    validation = task.validation(targets, task.activate(logits), np.ones(1))
    assert validation["loss"] == pytest.approx(by_hand.mean(), abs=1e-5)
    assert AGE.fitted_to(np.full(4, 2.0), ()).scale == 1, "equal numbers have no spread"


def test_the_signal_is_the_predicted_number():
    task = AGE.fitted_to(drawn()[0], ())
    logits, shares = torch.tensor([[0.5], [-1.0]]), torch.tensor([0.75, 0.25], dtype=torch.float64)
    values = task.activate(logits)
    assert task.signals(logits, shares).item() == pytest.approx(
        np.average(values[:, 0], weights=[0.75, 0.25]), rel=1e-6
    )


def test_strata_are_fifths_or_fewer_where_patients_are_few():
    targets, cases = np.arange(100.0), [f"P{number}" for number in range(100)]
    task = AGE.of_cohort(targets, cases)
    assert np.bincount(task.strata(targets)).tolist() == [20] * 5
    assert task.strata_names[0] == "age up to 19"
    assert len(task.strata_names) == 5
    few = AGE.of_cohort(targets[:12], cases[:12])
    assert few.strata_names == ("age all",)
    assert not few.strata(targets[:12]).any()
    ties = AGE.of_cohort(np.repeat([0.0, 1.0], [80, 20]), cases)
    assert np.bincount(ties.strata(np.array([0.0, 1.0]))).tolist() == [1, 1], "no stratum is empty"
    assert inner_quantiles(np.repeat([0.0, 1.0], [10, 90]), cases, 5) == (), "nothing is above the greatest number"


@pytest.mark.parametrize("cell", ["", "NA", "old", "nan", "inf"])
def test_what_is_no_number_is_no_target(cell):
    with pytest.raises(ValueError):  # noqa: PT011 - of float, or of the task
        AGE.target({"age": cell})
    assert AGE.no_target == "target that cannot be used (age must be a number)"


def test_records_give_the_task_and_its_answer_back(tmp_path: Path):
    task = AGE.of_cohort(np.arange(100.0), list(map(str, range(100)))).fitted_to(np.arange(50.0), ())
    assert task_of(task.record) == task
    members = np.array([[30.0], [34.0]])
    answer = Answer.of({"slide": "S1", **task.answer(members.mean(axis=0), None, members)})
    assert (answer.task, answer.predicted, answer.values) == (task, "32", {"age": 32.0})
    assert [member["age"] for member in answer.members] == [30, 34]
    assert (answer.spread, answer.signal) == ({"age": pytest.approx(np.sqrt(8))}, "age")
    assert task.headline(answer.predicted) == "age 32"


def test_intervals_hold_the_truth():
    """In simulated cohorts of one slide a patient, each figure in 0.88 to 1 of 150."""
    rng, held, spread = np.random.default_rng(3), {name: [] for name in METRICS}, 8.0
    large = rng.normal(50, 10, 200_000)
    truth = regression_metrics(large, large + rng.normal(0, spread, len(large)), once(len(large)))
    for _ in range(150):
        targets = rng.normal(50, 10, 60)
        values = (targets + rng.normal(0, spread, 60))[:, None]
        rows = ScoredRows(AGE, targets, values, np.arange(60), np.ones(60))
        for name, estimate in rows.estimates(rows.pooled, 0).items():
            low, high = estimate.interval
            held[name].append(low <= truth[name][0] <= high)
    assert {name: np.mean(values) for name, values in held.items()} == {
        name: pytest.approx(0.95, abs=0.05) for name in METRICS
    }


def test_the_gallery_has_the_greatest_errors():
    targets, values = np.array([1.0, 2, 3, 4]), np.array([[1.1], [5.0], [0.0], [4.0]])
    kinds = {kind: rows.tolist() for kind, rows in AGE.gallery(targets, values).items()}
    assert kinds == {"closest": [3, 0, 1, 2], "most above": [1, 0], "most below": [2]}
