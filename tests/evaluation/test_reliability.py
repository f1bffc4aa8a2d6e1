"""Slope, intercept and error of predicted probabilities."""

from dataclasses import replace

import numpy as np
import pytest

from tests.evaluation.predicted import predicted
from utils.evaluation.reliability import reliability_figures, reliability_words


def rows(over: float, patients: int = 200, seed: int = 0):
    """Slides whose log-odds are `over` times too large."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(size=patients)
    labels = (rng.random(patients) < 1 / (1 + np.exp(-odds))).astype(int)
    positive = 1 / (1 + np.exp(-over * odds))
    names = np.arange(patients).astype(str)
    values = np.stack([1 - positive, positive], axis=1)
    return replace(
        predicted(), slides=names, cases=names, labels=labels, values=values, repeats=np.ones(patients, int), folds=None
    )


def test_an_over_sure_model_has_a_slope_below_1_and_calibration_mends_it():
    sure = rows(2.0)
    figures = reliability_figures(replace(sure, calibrated=rows(1.0).values))
    low, high = figures["predicted"]["slope_interval_95"]
    assert low < figures["predicted"]["slope"] < high < 1
    low, high = figures["calibrated"]["slope_interval_95"]
    assert low < 1 < high
    assert figures["predicted"]["corrected_error"] > figures["calibrated"]["corrected_error"]
    assert figures["predicted"]["observed_share"] == pytest.approx(sure.labels.mean())
    assert "Calibration slope and intercept (perfect: 1 and 0): as predicted 0." in reliability_words(figures)


def test_separated_classes_have_no_slope_and_nothing_is_said_of_it():
    labels = np.arange(24) % 2
    whole = replace(predicted(labels=labels, values=np.eye(2)[labels] * 0.8 + 0.1), cases=np.arange(24).astype(str))
    figures = reliability_figures(whole)
    assert (figures["predicted"]["slope"], figures["predicted"]["slope_interval_95"]) == (None, None)
    assert reliability_words(figures) == ""


def test_repeats_are_averaged_and_few_patients_have_no_interval():
    figures = reliability_figures(predicted(repeats=3))
    alone = reliability_figures(predicted(repeats=3).where(np.arange(24)))
    assert figures["predicted"]["slope"] != alone["predicted"]["slope"]
    few = reliability_figures(predicted(patients=4, folds=2))
    assert few["predicted"]["intercept_interval_95"] is None


def test_a_slope_that_hangs_on_one_patient_has_no_interval():
    odds = np.linspace(-2, 2, 30)
    labels = (odds > 0).astype(int)
    labels[13] = 1  # without it, the classes are separated
    positive = 1 / (1 + np.exp(-odds))
    names = np.arange(30).astype(str)
    whole = replace(
        predicted(), slides=names, cases=names, labels=labels, values=np.stack([1 - positive, positive], axis=1),
        repeats=np.ones(30, int), folds=None,
    )  # fmt: skip
    figures = reliability_figures(whole)["predicted"]
    assert figures["slope"] > 1
    assert figures["slope_interval_95"] is None
