"""Texts that figures of predictions share."""

from utils.evaluation.intervals import Estimate
from utils.evaluation.predictions import Predictions


def with_interval(estimate: Estimate, kind: str = "95% CI ") -> str:
    """Return a metric with its interval as text."""
    value, interval = estimate.value, estimate.interval
    within = "" if interval is None else f" ({kind}{interval[0]:.3f} to {interval[1]:.3f})"
    return "-" if value is None else f"{value:.3f}{within}"


def pooled_title(predictions: Predictions) -> str:
    """Return a title that names the slides, or patients, and, if there are several, the number of repeats."""
    times = predictions.n_repeats
    return predictions.title or f"Out-of-fold {predictions.unit}s, " + (
        f"mean of {times} repeats" if times > 1 else "pooled"
    )
