"""Figures that compare training runs: their differences, and their ROC curves."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.core.plots import COLOURS, LEGEND, STYLES, bare, bare_axes, legend_below
from utils.core.text import escape_mathtext
from utils.evaluation.curves import mean_roc
from utils.evaluation.figure_text import pooled_title, with_interval
from utils.evaluation.prediction_figures import draw_chance_line
from utils.evaluation.predictions import Predictions

_COLUMNS = 3


def comparison_figure(
    differences: Mapping[str, Mapping[tuple[str, str], tuple[float, float, float]]], unit: str
) -> Figure:
    """Draw a forest plot of pairs of runs for each metric, of slides or patients as `unit` says: `(difference, low,
    high)`, the first minus the second.
    """
    pairs = list(dict.fromkeys(pair for by_pair in differences.values() for pair in by_pair))
    names: list[str] = []
    figure, axes = bare_axes(6, 4)
    bare(axes, f"Difference of the {unit}s' figures, first minus second (95% interval)")
    for (metric, by_pair), colour, marker in zip(differences.items(), cycle(COLOURS), cycle("osD^vP"), strict=False):
        if len(pairs) > 1:
            names.append(metric)
        for (first, second), (difference, low, high) in by_pair.items():
            row = len(names)
            names.append(f"{first}\n- {second}" if len(pairs) > 1 else metric)
            axes.plot([low, high], [row, row], color=colour, lw=2, solid_capstyle="butt")
            axes.plot(difference, row, marker, color=colour, ms=6)
            text = f"{difference:+z.3f} ({low:+z.3f} to {high:+z.3f})"
            axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.axvline(0, color="black", lw=0.8, ls="--", zorder=0)
    axes.set_yticks(range(len(names)), [escape_mathtext(name) for name in names], fontsize=9)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if len(pairs) > 1 and name in differences else "normal")
    if len(pairs) < 2:
        axes.set_title(escape_mathtext(" - ".join(pairs[0])) if pairs else "No difference is defined", fontsize=10)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    figure.set_figheight(0.9 + 0.38 * max(1, len(names)))
    return figure


def runs_roc_figure(runs: Mapping[str, Predictions]) -> Figure:
    """Draw the ROC curves of runs on the same slides, each with its AUC and the 95% interval over patients.

    Of two classes the positive one is drawn; of more, each class against the rest in a plot of its own.
    """
    first = next(iter(runs.values()))
    title = f"{pooled_title(first)}; AUC with its 95% interval over patients"
    if len(first.task.ranked_outputs) == 1:
        figure, axes = bare_axes(5, 4.8)
        _draw_runs(axes, runs, first.task.ranked_outputs[0], width=60)
        legend_below(figure)
        axes.set_title(f"{title}\n{fill(f'positive: {escape_mathtext(first.task.outputs[1])}', 60)}", fontsize=10)
        return figure
    columns = min(_COLUMNS, len(first.task.ranked_outputs))
    rows = -(-len(first.task.ranked_outputs) // columns)
    figure = Figure(figsize=(3.7 * columns, rows * (3.9 + 0.2 * len(runs))), layout="constrained")
    plots: Sequence[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, index in zip(plots, first.task.ranked_outputs, strict=False):
        _draw_runs(axes, runs, index, width=44)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), **LEGEND | {"handlelength": 2.5})
        axes.set_title(fill(escape_mathtext(first.task.outputs[index]), 40), fontsize=9)
    for axes in plots[len(first.task.ranked_outputs) :]:
        axes.set_axis_off()
    figure.suptitle(f"{title}\neach {first.task.output_word} against the rest", fontsize=10)
    return figure


def _draw_runs(axes: Axes, runs: Mapping[str, Predictions], index: int, width: int) -> None:
    """Draw each run's curve of a class, if it is defined; `width` is the longest line of the legend, in characters."""
    bare(axes, "False positive rate (1 - specificity)", "True positive rate (sensitivity)")
    axes.set_box_aspect(1)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    draw_chance_line(axes)
    for (name, predictions), colour, style in zip(runs.items(), cycle(COLOURS), cycle(STYLES), strict=False):
        ranking = predictions.rankings[index]
        label = fill(f"{escape_mathtext(name)}: AUC {with_interval(ranking.auc, '')}", width)
        ranked = predictions.ranked(index)
        curve = mean_roc(ranked.is_positive, ranked.scores, ranked.repeats)
        axes.plot(*(curve or ([], [])), color=colour, ls=style, lw=1.6, label=label)
