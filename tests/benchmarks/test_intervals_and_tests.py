"""The simulations know their truth, and run."""

import sys
from functools import partial

import numpy as np
import pytest

from tests.benchmarks.scripts import imported
from utils.tasks.metrics import weighted_metrics


@pytest.fixture(scope="module")
def simulation():
    return imported("intervals_and_tests")


@pytest.mark.parametrize("scores", ["normal", "exponential"])
@pytest.mark.parametrize("several", [False, True])
def test_cohorts_have_the_auc_that_was_asked_for(simulation, scores, several):
    cell = simulation.Cell(6000, 0.3, 0.9, several, scores)
    rows = simulation.draw(cell, np.random.default_rng(0))
    figures = weighted_metrics(rows.labels, rows.values, np.ones((1, len(rows.labels))))
    assert figures["auc"][0] == pytest.approx(0.9, abs=0.01)
    assert figures["brier"][0] == pytest.approx(simulation.truth(cell)["brier"], abs=0.01)


def test_algorithms_that_see_equal_features_are_equally_good_and_a_stronger_one_is_found(simulation):
    level = simulation.rejections("other features", 60, 0.5, 1, False, 30, 0)
    power = simulation.rejections("other features", 60, 0.5, 1, True, 30, 0)
    assert level[0] <= 0.2
    assert power[0] > level[0]
    assert power[1] >= power[0], "less is claimed for these models than for their algorithms"


def test_what_is_fitted_to_single_models_holds_for_their_vote_and_is_cautious_for_their_mean(simulation):
    one, mean = np.reshape(simulation.fitted(100, 0.5, 60, 0), (2, 3))
    assert one == pytest.approx([0.9, one[1], 1], abs=0.1)
    assert abs(one[0] - 0.9) < 0.02
    assert abs(mean[0] - 0.9) < 0.02
    assert mean[1] > one[1] + 0.02, "as many models find more than one"
    assert mean[2] > 1.2


def test_answers_have_the_correlation_that_was_asked_for(simulation):
    rows = simulation.draw_endpoint(simulation.ENDPOINTS["number"], 20000, 0.6, False, np.random.default_rng(0))
    figures = rows.pooled(np.ones((1, len(rows.labels))))
    assert figures["pearson"][0] == pytest.approx(0.6, abs=0.02)
    assert figures["r2"][0] == pytest.approx(2 * 0.6 - 1, abs=0.04)


def test_the_benchmark_prints_its_tables(simulation, monkeypatch, capsys):
    monkeypatch.setattr(simulation, "truth", partial(simulation.truth, size=2000))
    monkeypatch.setattr(simulation, "LARGE_COHORTS", 1)
    monkeypatch.setattr(sys, "argv", ["intervals_and_tests.py", "--patients", "20", "--cohorts", "2"])
    simulation.main()
    printed = capsys.readouterr().out
    assert printed.count("| 20 patients, ") == 48 + 1
    assert printed.count("| other seeds, 20 patients, ") == 6
    assert printed.count("| survival, 20 patients, correlation ") == 3
    assert printed.count("| 20 patients, 50% positive | ") == 1, "4 positive slides are too few for a threshold"
