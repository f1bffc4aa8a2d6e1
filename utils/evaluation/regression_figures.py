"""Draw predicted numbers against the true ones."""

import numpy as np
from matplotlib.figure import Figure

from utils.core.plots import COLOURS, LEGEND, bare, bare_axes
from utils.core.text import escape_mathtext
from utils.evaluation.figure_text import pooled_title, with_interval
from utils.evaluation.predictions import Predictions

_MARGIN = 0.04  # of the range, around the points


def scatter_figure(predictions: Predictions) -> Figure:
    """Draw the predicted number of each slide against the true one, with the line of identity and the least-squares
    line; of several repeats the mean.
    """
    slides = predictions.mean_over_repeats()
    true, predicted = slides.labels, slides.values[:, 0]
    name = escape_mathtext(predictions.task.outputs[0])
    figure, axes = bare_axes(5, 5)
    bare(axes, f"True {name}", f"Predicted {name}")
    low, high = float(min(true.min(), predicted.min())), float(max(true.max(), predicted.max()))
    margin = _MARGIN * (high - low or 1)
    limits = low - margin, high + margin
    axes.plot(limits, limits, color="grey", lw=0.8, label="identity")
    alpha = float(np.clip(200 / len(true), 0.25, 0.9))
    axes.plot(true, predicted, ls="", marker="o", ms=4, mec="none", color=COLOURS[0], alpha=alpha)
    if np.ptp(true) > 0:
        slope, offset = np.polyfit(true, predicted, 1)
        ends = np.array([true.min(), true.max()])
        axes.plot(
            ends, offset + slope * ends, color=COLOURS[1], lw=1.6, ls="--", label=f"least squares, slope {slope:.2f}"
        )
    axes.set(xlim=limits, ylim=limits)
    axes.set_box_aspect(1)
    figure.legend(loc="outside lower center", ncols=2, **LEGEND)
    estimates, titles = predictions.pooled, predictions.task.metric_titles
    figures = [
        f"{titles.get(metric, metric)} {with_interval(estimates[metric])}" for metric in ("r2", "mae", "spearman")
    ]
    axes.set_title("\n".join([pooled_title(predictions), *figures]), fontsize=10)
    return figure
