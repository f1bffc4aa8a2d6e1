"""Figures of predictions against labels, legible in grey too; drawn without pyplot, which keeps figures open."""

from collections.abc import Iterator
from itertools import cycle
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.core.plots import COLOURS, LEGEND, SMALL, STYLES, bare, bare_axes, legend_below
from utils.core.text import escape_mathtext
from utils.evaluation.curves import mean_precision, mean_roc, roc_band
from utils.evaluation.figure_text import pooled_title, with_interval
from utils.evaluation.intervals import wilson
from utils.evaluation.predictions import Predictions, RankedRows
from utils.evaluation.regression_figures import scatter_figure
from utils.evaluation.survival_figures import kaplan_meier_figure, survival_calibration_figure
from utils.tasks.metrics import BINS, probability_bins

_MOST_BANDS = 3  # curves drawn with bands and folds; more would be illegible
_FEW = 10  # slides in a bin, below which its share is uncertain
_NORMAL = 1.959964  # of standard errors to either side of a 95% interval
_LINE_WIDTH = 60  # characters of a line of a legend


def prediction_figures(predictions: Predictions) -> dict[str, Figure]:
    """Draw the figures of the predictions' task; the keys are their file names."""
    drawings = {
        "roc": roc_figure,
        "precision_recall": precision_recall_figure,
        "confusion_matrix": confusion_figure,
        "calibration": calibration_figure,
        "scatter": scatter_figure,
        "kaplan_meier": kaplan_meier_figure,
        "survival_calibration": survival_calibration_figure,
    }
    return {name: drawings[name](predictions) for name in predictions.task.figure_names}


def roc_figure(predictions: Predictions) -> Figure:
    """Draw the pooled ROC curve of each class against the rest, of two classes the positive one alone; of several
    repeats their mean.

    Up to three curves have a 95% band over patients, and each fold's curve if there are folds.
    """
    figure, axes = _curve_axes("False positive rate (1 - specificity)", "True positive rate (sensitivity)")
    is_detailed = len(predictions.task.ranked_outputs) <= _MOST_BANDS
    for index, line in _class_lines(predictions):
        ranked = predictions.ranked(index)
        curve = mean_roc(ranked.is_positive, ranked.scores, ranked.repeats)
        if curve is None:
            continue
        if is_detailed:
            _fold_curves(axes, ranked, line["color"])
            band = roc_band(ranked.is_positive, ranked.scores, ranked.rows.scored.patients, ranked.repeats)
            if band is not None:
                axes.fill_between(*band, color=line["color"], alpha=0.15, lw=0)
        ranking, name = predictions.rankings[index], escape_mathtext(predictions.task.outputs[index])
        text = f"{name}: AUC {with_interval(ranking.auc)}"
        if ranking.auc_within_folds is not None:
            text += f"; within folds {with_interval(ranking.auc_within_folds, '')}"
        label = fill(text, _LINE_WIDTH)
        axes.plot(*curve, **line, label=label)
    has_folds = predictions.folds is not None
    legend = "band: 95% over patients" + ("; thin: each fold" if has_folds else "")
    if not is_detailed:
        legend = f"bands{' and folds' if has_folds else ''} left out"
    _finish_curves(figure, axes, predictions, legend)
    draw_chance_line(axes)
    return figure


def precision_recall_figure(predictions: Predictions) -> Figure:
    """Draw precision against recall of each class, of two classes the positive one alone; of several repeats their
    mean. Thin lines show the precision of chance, which is the share of the class.
    """
    figure, axes = _curve_axes("Recall (sensitivity)", "Precision (positive predictive value)")
    has_baselines = len(predictions.task.ranked_outputs) <= _MOST_BANDS
    for index, line in _class_lines(predictions):
        ranked = predictions.ranked(index)
        curve = mean_precision(ranked.is_positive, ranked.scores, ranked.repeats)
        if curve is None:
            continue
        ranking, name = predictions.rankings[index], escape_mathtext(predictions.task.outputs[index])
        value = with_interval(ranking.average_precision)
        label = fill(f"{name}: AP {value}, chance {ranking.prevalence:.3f}", _LINE_WIDTH)
        axes.plot(*curve, **line, label=label)
        if has_baselines:
            axes.axhline(ranking.prevalence, color=line["color"], ls=line["ls"], lw=0.8, alpha=0.6)
    thin = f"; thin: chance, the share of the {predictions.task.output_word}" if has_baselines else ""
    _finish_curves(figure, axes, predictions, f"AP: average precision{thin}")
    return figure


def confusion_figure(predictions: Predictions) -> Figure:
    """Draw the confusion matrix in slides, shaded by the fraction of the true class or grade; each repeat counts."""
    num_classes = len(predictions.task.outputs)
    pairs = predictions.labels * num_classes + predictions.task.decide(predictions.values)
    counts = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4, 1.6 + 0.55 * num_classes)
    figure, axes = bare_axes(side, side)
    bare(axes, "Predicted", "True")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        text, colour = f"{count}\n{share[row, column]:.0%}", "white" if share[row, column] > 0.7 else "black"
        size = 10 if num_classes <= 4 else SMALL
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    names = [escape_mathtext(name) for name in predictions.task.outputs]
    wrapped = [fill(name, 16) for name in names]
    widest = max(len(line) for name in wrapped for line in name.splitlines())
    if widest * num_classes > 40:
        figure.set_size_inches(side + 0.05 * max(map(len, names)), side + 0.05 * max(map(len, names)))
        axes.set_xticks(range(num_classes), names, fontsize=9, rotation=45, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(num_classes), wrapped, fontsize=9)
    axes.set_yticks(range(num_classes), wrapped, fontsize=9)
    slides = "Out-of-fold slides" + (f" x {predictions.n_repeats} repeats" if predictions.n_repeats > 1 else "")
    axes.set_title(f"{predictions.title or slides} (% of the true {predictions.task.output_word})", fontsize=10)
    return figure


def calibration_figure(predictions: Predictions) -> Figure:
    """Draw a reliability diagram over ten bins of the probability, with 95% Wilson intervals; bars below count the
    slides of each bin, and bins of fewer than ten slides are hollow.

    Of two classes, the positive one's probability is drawn against its observed share; of more, the predicted class's
    against accuracy. Slides of one patient count as independent; repeats do not multiply slides. Calibrated
    probabilities are drawn too, if there are any.
    """
    x_label, y_label = map(escape_mathtext, predictions.task.reliability_titles or ("", ""))
    figure = Figure(figsize=(4.8, 6), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8, label="perfect calibration")
    counts, figures_text = _draw_reliability(axes, predictions, predictions.values, "as predicted", 0, "o")
    if predictions.calibrated is not None:
        _, scaled_text = _draw_reliability(axes, predictions, predictions.calibrated, "calibrated", 1, "s")
        figures_text += f"\n{scaled_text}"
    bars = below.bar((np.arange(BINS) + 0.5) / BINS, counts, 0.9 / BINS, color=COLOURS[0])
    below.bar_label(bars, [f"{count:.3g}" if count else "" for count in counts], fontsize=SMALL)
    below.margins(y=0.25)
    bare(axes, "", fill(y_label, 36))
    bare(below, fill(x_label, 48), "Slides,\nas predicted")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    below.locator_params(axis="y", nbins=4, integer=True)
    axes.plot([], [], color="black", marker="o", mfc="white", ms=4, ls="", label=f"hollow: fewer than {_FEW} slides")
    note = "The intervals take the slides as independent."
    figure.legend(
        loc="outside lower center", ncols=2, title=note, title_fontsize=SMALL, **LEGEND | {"handlelength": 2}
    )  # fmt: skip
    axes.set_title(f"{pooled_title(predictions)}\n{figures_text}", fontsize=10)
    return figure


def draw_chance_line(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8, zorder=1)


def _curve_axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure, axes = bare_axes(5, 4.8)
    bare(axes, x_label, y_label)
    axes.set_box_aspect(1)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    return figure, axes


def _class_lines(predictions: Predictions) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each class that has a curve, and the style of its line."""
    for index, colour, style in zip(predictions.task.ranked_outputs, cycle(COLOURS), cycle(STYLES), strict=False):
        yield index, {"color": colour, "ls": style, "lw": 1.8}


def _finish_curves(figure: Figure, axes: Axes, predictions: Predictions, explanation: str) -> None:
    """Add the legend below, and a title with the slides, the positive class and the explanation of the curves."""
    positive, word = predictions.task.positive_output, predictions.task.output_word
    meaning = f"each {word} against the rest" if positive is None else f"positive: {escape_mathtext(positive)}"
    about = f"{fill(meaning, _LINE_WIDTH)}\n({explanation})"
    if axes.lines:
        legend_below(figure)
    else:
        about = f"(undefined: the slides are of one {word})"
    axes.set_title(f"{pooled_title(predictions)}\n{about}", fontsize=10)


def _fold_curves(axes: Axes, ranked: RankedRows, colour: str) -> None:
    folds = ranked.rows.folds
    if folds is None:
        return
    for fold in np.unique(folds):
        rows = folds == fold
        curve = mean_roc(ranked.is_positive[rows], ranked.scores[rows])
        if curve is not None:
            axes.plot(*curve, color=colour, alpha=0.3, lw=0.7)


def _draw_reliability(
    axes: Axes, predictions: Predictions, probabilities: np.ndarray, name: str, colour: int, marker: str
) -> tuple[np.ndarray, str]:
    """Draw the observed share of each bin; return the number of slides in each, `(BINS,)`, and Brier score and
    calibration error as text.
    """
    probability, is_true = predictions.task.reliability(predictions.labels, probabilities)
    bins = probability_bins(probability.astype(np.float64))
    counts = np.bincount(bins, minlength=BINS) / predictions.n_repeats
    for index in np.unique(bins):
        mean, share = float(probability[bins == index].mean()), float(is_true[bins == index].mean())
        is_few = counts[index] < _FEW
        low, high = wilson(share, float(counts[index]), _NORMAL)
        axes.plot([mean, mean], [low, high], color=COLOURS[colour], lw=0.8 if is_few else 1.4)
        axes.plot(
            mean, share, color=COLOURS[colour], marker=marker, ms=4 if is_few else 6, ls="",
            mfc="white" if is_few else COLOURS[colour],
        )  # fmt: skip
    axes.plot([], [], color=COLOURS[colour], marker=marker, ms=6, lw=1.4, label=f"{name}, 95% interval")
    figures = predictions.metrics_of(probabilities, predictions.task.calibration_metrics)
    titles = predictions.task.metric_titles
    return counts, f"{name}: " + ", ".join(f"{titles.get(key, key)} {value:.3f}" for key, value in figures.items())
