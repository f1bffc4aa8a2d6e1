"""How far predicted probabilities come true: slope, intercept and a calibration error, with intervals."""

from typing import Any

import numpy as np

from utils.evaluation.intervals import LEAST_OF_A_CLASS, LEAST_PATIENTS, quantile
from utils.evaluation.predictions import Predictions
from utils.evaluation.resampling import Weighted, jackknife_variance, left_out, mean_over_repeats
from utils.tasks.calibration import calibration_lines, corrected_error
from utils.tasks.task import single


def reliability_figures(predictions: Predictions) -> dict[str, Any]:
    """Return the calibration of the values as predicted and, if there are some, of the calibrated ones.

    Each has a slope and an intercept, None if undefined, with 95% intervals over patients (see
    `calibration.calibration_lines`); the calibration error less what chance adds; and the mean probability beside the
    share that came true. Empty for a task without reliability diagrams.
    """
    if predictions.task.reliability_titles is None:
        return {}
    figures = {"predicted": _figures(predictions, predictions.values)}
    if predictions.calibrated is not None:
        figures["calibrated"] = _figures(predictions, predictions.calibrated)
    return figures


def _figures(predictions: Predictions, values: np.ndarray) -> dict[str, Any]:
    probability, is_true = predictions.task.reliability(predictions.labels, values)

    def weigh(weights: np.ndarray) -> Weighted:
        return mean_over_repeats(
            lambda rows: dict(
                zip(
                    ("slope", "intercept"),
                    calibration_lines(probability[rows], is_true[rows], weights[:, rows]),
                    strict=True,
                )
            ),
            predictions.repeats,
        )

    lines, without = single(weigh(np.ones((1, len(probability))))), left_out(predictions.scored.patients, weigh)
    units = predictions.scored.patients
    fewest, patients = min(len(np.unique(units[is_true == side])) for side in (True, False)), len(np.unique(units))
    figures: dict[str, Any] = {}
    for name, value in lines.items():
        half = quantile(patients, patients) * np.sqrt(jackknife_variance(without[name]))
        # Where one patient decides whether it is defined, a jackknife does not tell how uncertain it is.
        is_stable = value is not None and not np.isnan(without[name]).any()
        has_interval = is_stable and half > 0 and patients >= LEAST_PATIENTS and fewest >= LEAST_OF_A_CLASS
        figures |= {name: value, f"{name}_interval_95": [value - half, value + half] if has_interval else None}
    repeats = [predictions.repeats == repeat for repeat in np.unique(predictions.repeats)]
    errors = [corrected_error(probability[rows], is_true[rows]) for rows in repeats]
    return figures | {
        "corrected_error": float(np.mean(errors)),
        "mean_probability": float(probability.mean()),
        "observed_share": float(is_true.mean()),
    }


def reliability_words(figures: dict[str, Any]) -> str:
    """Return a sentence on the calibration, or "" if slope and intercept are undefined."""
    texts = []
    for kind, name in (("predicted", "as predicted"), ("calibrated", "calibrated")):
        if kind in figures and figures[kind]["slope"] is not None:
            texts.append(
                f"{name} {figures[kind]['slope']:.2f} and {figures[kind]['intercept']:+.2f} "
                f"(error beyond chance {figures[kind]['corrected_error']:.3f})"
            )
    return f"Calibration slope and intercept (perfect: 1 and 0): {'; '.join(texts)}." if texts else ""
