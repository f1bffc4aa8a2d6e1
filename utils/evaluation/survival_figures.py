"""Draw survival by predicted risk, and predicted against observed survival."""

from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.core.errors import plural
from utils.core.plots import COLOURS, LEGEND, SMALL, bare, bare_axes
from utils.core.text import escape_mathtext
from utils.evaluation.figure_text import with_interval
from utils.evaluation.predictions import Predictions
from utils.tasks.survival import RISK_GROUPS, Survival
from utils.tasks.survival_curves import calibration_at, kaplan_meier, log_rank

_TICKS = 8
_LOOKS = ((COLOURS[0], "-"), (COLOURS[1], "--"))


def kaplan_meier_figure(predictions: Predictions) -> Figure:
    """Draw Kaplan-Meier curves of the patients of low and of high predicted risk, with 95% limits, marks where patients
    are censored, the log-rank test and the numbers at risk; of several repeats the first.

    High is above the median of the mean risks of the patients that each fold's model was validated on.
    """
    task, first = _first_repeat(predictions)
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes, table = figure.subplots(2, sharex=True, height_ratios=[5, 1])
    high = first.decisions
    title = f"{_title(predictions)}\nC-index {with_interval(predictions.by_case().reported_estimates['c_index'])}"
    if high is None:
        axes.set_title(f"{title}\n(the table does not say who is of high risk)", fontsize=10)
        return figure
    longest = first.labels[:, 0].max()
    ticks = MaxNLocator(_TICKS).tick_values(0, longest)
    ticks = ticks[ticks <= longest]
    for group, (name, (colour, style)) in enumerate(zip(RISK_GROUPS, _LOOKS, strict=True)):
        targets = first.labels[high == group]
        if len(targets):
            _draw_group(axes, targets, name, colour, style)
            _write_at_risk(table, kaplan_meier(targets).numbers_at_risk(ticks), ticks, group, colour)
    p = log_rank(first.labels, high)
    text = "" if np.isnan(p) else f"; log-rank p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    axes.set_title(f"{title}{text}", fontsize=10)
    axes.set(ylim=(0, 1.02), xlim=(-0.03 * longest, longest * 1.02), xticks=ticks)
    bare(axes, "", f"Share without {escape_mathtext(task.event_column)}")
    table.set(ylim=(1.6, -0.6), yticks=(0, 1), yticklabels=RISK_GROUPS)
    table.tick_params(left=False, labelsize=SMALL, pad=8)
    bare(table, escape_mathtext(task.time_column))
    table.spines["left"].set_visible(False)
    table.set_title("at risk", fontsize=SMALL, loc="left")
    figure.legend(loc="outside lower center", ncols=2, **LEGEND)
    return figure


def survival_calibration_figure(predictions: Predictions) -> Figure:
    """Draw observed against predicted survival at the middle one of the task's horizons, in fifths of the predictions,
    with the 95% limits of Kaplan-Meier; of several repeats the first.
    """
    task, first = _first_repeat(predictions)
    horizon = task.horizons[len(task.horizons) // 2]
    predicted = first.values[:, 1 + task.times.index(horizon)]
    figure, axes = bare_axes(4.8, 5)
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8, label="perfect calibration")
    groups = calibration_at(first.labels, predicted, horizon)
    for group in groups:
        axes.plot([group.predicted] * 2, [group.low, group.high], color=COLOURS[0], lw=1.4)
    points = [(group.predicted, group.observed) for group in groups]
    axes.plot(
        *zip(*points, strict=True), color=COLOURS[0], marker="o", ls="", label="a fifth of the patients, 95% limits"
    )
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_box_aspect(1)
    name = f"{escape_mathtext(task.time_column)} {horizon:.4g}"
    bare(axes, f"Predicted survival until {name}", "Observed (Kaplan-Meier)")
    figure.legend(loc="outside lower center", ncols=2, **LEGEND)
    axes.set_title(_title(predictions), fontsize=10)
    return figure


def _title(predictions: Predictions) -> str:
    if predictions.title:
        return f"{plural(predictions.n_cases, 'patient')}, predicted"
    return "Out-of-fold patients" + (", first repeat" if predictions.n_repeats > 1 else "")


def _first_repeat(predictions: Predictions) -> tuple[Survival, Predictions]:
    """Return the task, and the first repeat's predictions, one of each patient."""
    first = predictions.where(predictions.repeats == predictions.repeats.min())
    return cast(Survival, first.task), first.by_case()


def _draw_group(axes: Axes, targets: np.ndarray, name: str, colour: str, style: str) -> None:
    curve = kaplan_meier(targets)
    events = int(targets[:, 1].sum())
    median = "not reached" if curve.median is None else f"{curve.median:.4g}"
    label = f"{name}: {len(targets)} patients, {events} events, median {median}"
    axes.step(curve.times, curve.survival, where="post", color=colour, ls=style, lw=1.8, label=label)
    axes.fill_between(curve.times, curve.low, curve.high, step="post", color=colour, alpha=0.15, lw=0)
    is_censored = curve.censored > 0
    axes.plot(curve.times[is_censored], curve.survival[is_censored], ls="", marker="|", ms=5, color=colour)


def _write_at_risk(axes: Axes, counts: np.ndarray, ticks: np.ndarray, row: int, colour: str) -> None:
    for tick, count in zip(ticks, counts, strict=True):
        axes.text(tick, row, str(count), ha="center", va="center", fontsize=SMALL, color=colour)
