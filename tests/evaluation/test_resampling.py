import numpy as np
import pytest

from tests.evaluation.predicted import repeated
from tests.small import TASK, classification_metrics
from utils.evaluation.resampling import jackknife_variance, left_out, pooled_metrics, resampled


def test_pooled_metrics_average_over_the_repeats():
    labels, probabilities, _, repeats = repeated()
    found = pooled_metrics(TASK, labels, probabilities, repeats)
    each = [classification_metrics(*(part[repeats == r] for part in (labels, probabilities)), "ny") for r in (1, 2, 3)]
    for value, name in zip(found.values(), each[0], strict=True):
        assert value == pytest.approx(np.mean([figures[name] for figures in each]))
    assert found["auc"] != pytest.approx(classification_metrics(labels, probabilities)["auc"])


def test_pooled_metrics_leave_out_the_repeats_where_a_figure_is_undefined():
    labels, positive = np.array([0, 1, 1, 1]), np.array([0.2, 0.9, 0.8, 0.3])
    probabilities, repeats = np.stack([1 - positive, positive], axis=1), np.array([1, 1, 2, 2])
    found = pooled_metrics(TASK, labels, probabilities, repeats)
    assert found["auc"] == 1
    assert found["accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    only = pooled_metrics(TASK, labels[2:], probabilities[2:], repeats[2:])
    assert only["auc"] is only["sensitivity_no"] is None


def pooled(labels, probabilities, repeats, weights):
    """Every metric of the rows that weigh 1."""
    rows = weights == 1
    return pooled_metrics(TASK, labels[rows], probabilities[rows], repeats[rows])


@pytest.mark.parametrize("block", [1 << 20, 50])
def test_each_patient_is_left_out_with_all_its_rows(monkeypatch, block):
    """Whatever the size of the blocks in which they are computed."""
    monkeypatch.setattr("utils.evaluation.resampling.BLOCK_VALUES", block)
    labels, probabilities, cases, repeats = repeated()

    def weigh(weights):
        figures = [pooled(labels, probabilities, repeats, row) for row in weights]
        return {name: np.array([row[name] for row in figures], float) for name in figures[0]}

    without = left_out(cases, weigh)
    for number, case in enumerate(np.unique(cases)):
        expected = pooled(labels, probabilities, repeats, (cases != case).astype(float))
        assert {name: values[number] for name, values in without.items()} == pytest.approx(expected)


def test_of_many_patients_groups_are_left_out(monkeypatch):
    monkeypatch.setattr("utils.evaluation.resampling._MOST_LEFT_OUT", 3)
    without = left_out(np.arange(7), lambda weights: {"kept": weights.sum(axis=1)})
    assert without["kept"].tolist() == [4, 5, 5]


def test_the_jackknife_variance_of_a_mean_is_the_usual_one():
    values = np.array([1.0, 2.0, 4.0, 8.0])
    without = (values.sum() - values) / 3
    assert jackknife_variance(without) == pytest.approx(values.var(ddof=1) / 4)
    assert jackknife_variance(np.append(without, np.nan)) == jackknife_variance(without)
    assert jackknife_variance(np.full(3, np.nan)) == 0


def test_drawn_patients_come_with_all_their_rows():
    cases = np.array(list("aabccc"))
    weights = np.concatenate(list(resampled(cases, 3, 40)))
    assert weights.shape == (40, 6)
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3:] == weights[:, 3:4]).all()
    assert (np.concatenate(list(resampled(cases, 3, 40))) == weights).all()
