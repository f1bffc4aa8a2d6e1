"""Figures of a training run, drawn without pyplot so that nothing stays open; told apart in grey print too."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import confusion_matrix

from utils.core.files import whole_file
from utils.core.text import literal
from utils.learning.metrics import BINS, probability_bins
from utils.learning.statistics import bootstrap_intervals, mean_roc, pooled_metrics, roc_band

# Okabe and Ito's colours, told apart in the common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# As many dash patterns as nine classes need where no colour is printed.
STYLES = (
    "-",
    (0, (5, 2)),
    (0, (1, 1)),
    (0, (6, 2, 1, 2)),
    (0, (10, 2)),
    (0, (4, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
    (0, (10, 2, 3, 2)),
    (0, (3, 4)),
)
# More curves with their bands and folds are a tangle.
_MOST_BANDS = 3
_MOST_SETTINGS = 6
_SMALL = 8  # points
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": _SMALL, "handlelength": 4}
_LOSSES = {"train_loss": "training", "val_loss": "validation"}


def save_figure(figure: Figure, path: Path) -> None:
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=300, bbox_inches="tight")


def roc_figure(
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    folds: np.ndarray | None,
    cases: np.ndarray,
    repeats: np.ndarray,
    seed: int,
    title: str = "",
) -> Figure:
    """Pooled curve per class (the positive one alone when there are two), the mean over repeats.

    Up to three classes have their 95% band over patients and each fold's own curve, where there are folds. `labels`,
    `folds`, `cases` and `repeats (n,)`, `probabilities (n, C)`: one row per tested slide and repeat; `seed` draws the
    patients; `title` says which slides, by default the out-of-fold ones.
    """
    positives = [1] if len(class_names) == 2 else range(len(class_names))
    detailed = len(positives) <= _MOST_BANDS
    width = max(4.5, 2.8 + 0.08 * max(map(len, class_names)))
    figure, axes = _axes("False positive rate", "True positive rate", width, height=4.5 + 0.17 * len(positives))
    for index, colour, style in zip(positives, cycle(COLOURS), cycle(STYLES), strict=False):
        is_class, scores = labels == index, probabilities[:, index]
        curve = mean_roc(is_class, scores, repeats)
        if curve is None:
            continue
        if detailed:
            if folds is not None:
                _fold_curves(axes, is_class, scores, folds, colour)
            band = roc_band(is_class, scores, cases, seed, repeats=repeats)
            if band is not None:
                axes.fill_between(band[0], band[2], band[3], color=colour, alpha=0.15, lw=0)
        name = _auc_text(class_names[index], is_class, scores, cases, repeats, seed)
        axes.plot(*curve, color=colour, ls=style, lw=1.8, label=name)
    axes.set_box_aspect(1)
    shown = "band: 95% over patients" + ("" if folds is None else "; thin: each fold")
    if not detailed:
        shown = "bands left out" if folds is None else "bands and folds left out"
    if axes.lines:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), **_LEGEND)
    else:
        shown = "undefined: the slides are of one class"
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8)
    axes.set_title(f"{title or _pooled_title(repeats)}\n({shown})", fontsize=10)
    return figure


def confusion_figure(
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    repeats: np.ndarray | None = None,
    title: str = "",
) -> Figure:
    """Counts of slides (`title`, by default the out-of-fold ones), shaded by the fraction of the true class; each slide
    once per repeat.
    """
    num_classes = len(class_names)
    counts = confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(num_classes))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4, 1.6 + 0.55 * num_classes)
    figure, axes = _axes("Predicted", "True", width=side, height=side)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        dark = share[row, column] > 0.7
        text = f"{count}\n{share[row, column]:.0%}"
        size = 10 if num_classes <= 4 else _SMALL
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=size)
    names = [literal(name) for name in class_names]
    wrapped = [fill(name, 16) for name in names]
    widest = max(len(line) for name in wrapped for line in name.splitlines())
    if widest * num_classes > 40:
        figure.set_size_inches(side + 0.05 * max(map(len, names)), side + 0.05 * max(map(len, names)))
        axes.set_xticks(range(num_classes), names, fontsize=9, rotation=45, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(num_classes), wrapped, fontsize=9)
    axes.set_yticks(range(num_classes), wrapped, fontsize=9)
    times = 1 if repeats is None else len(np.unique(repeats))
    slides = f"Out-of-fold slides x {times} repeats" if times > 1 else "Out-of-fold slides"
    axes.set_title(f"{title or slides} (% of the true class)", fontsize=10)
    return figure


def calibration_figure(
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    repeats: np.ndarray | None = None,
    calibrated: np.ndarray | None = None,
    title: str = "",
) -> Figure:
    """Reliability diagram over ten bins of the probability, with 95% Wilson intervals, over the slides in each bin.

    Of two classes, the positive one's probability against its observed share; beyond, the predicted class's against
    accuracy. The slides of one patient count as if they were several; each slide counts once, whatever the repeats.
    `calibrated (n, C)` are drawn beside, without intervals; `title` says which slides, by default the out-of-fold ones.
    """
    repeats = np.zeros(len(labels)) if repeats is None else repeats
    if len(class_names) == 2:
        positive = literal(class_names[1])
        x_label, y_label = f"Predicted probability of {positive}", f"Observed share of {positive}"
    else:
        x_label, y_label = "Probability of the predicted class", "Accuracy"
    bins, points = _reliability(labels, probabilities)
    slides = np.bincount(bins, minlength=BINS) / len(np.unique(repeats))
    figure = Figure(figsize=(4.5, 5), layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=[3, 1])
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8)
    for index, at, share in points:
        low, high = _wilson(share, float(slides[index]))
        axes.plot([at, at], [low, high], color=COLOURS[0], lw=1.2)
        axes.plot(at, share, color=COLOURS[0], marker="o", ms=5)
    figures_text = _calibration_text(labels, probabilities, repeats)
    if calibrated is not None:
        _, points = _reliability(labels, calibrated)
        axes.plot(*np.array(points)[:, 1:].T, color=COLOURS[1], marker="s", mfc="none", ms=5, ls="")
        figures_text += f"; squares, temperature-scaled: {_calibration_text(labels, calibrated, repeats)}"
    below.bar((np.arange(BINS) + 0.5) / BINS, slides, 0.9 / BINS, color=COLOURS[0])
    _label(axes, "", fill(literal(y_label), 36))
    _label(below, fill(literal(x_label), 48), "Slides")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    below.locator_params(axis="y", nbins=4, integer=True)
    figures_text += "; lines: 95% intervals, slides taken as independent"
    axes.set_title(f"{title or _pooled_title(repeats)}\n{fill(f'({figures_text})', 62)}", fontsize=10)
    return figure


def _reliability(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, list[tuple[int, float, float]]]:
    """Each slide's bin `(n,)`; and of each bin with slides its number, their mean probability and the share that came
    true.
    """
    if probabilities.shape[1] == 2:
        probability, happened = probabilities[:, 1], labels == 1
    else:
        probability, happened = probabilities.max(axis=1), labels == probabilities.argmax(axis=1)
    bins = probability_bins(probability.astype(np.float64))
    return bins, [
        (int(index), float(probability[bins == index].mean()), float(happened[bins == index].mean()))
        for index in np.unique(bins)
    ]


def _calibration_text(labels: np.ndarray, probabilities: np.ndarray, repeats: np.ndarray) -> str:
    figures = pooled_metrics(labels, probabilities, repeats)
    return f"Brier {figures['brier']:.3f}, ECE {figures['ece']:.3f}"


def learning_figure(history: pd.DataFrame) -> Figure:
    """Training and validation loss of the inner trainings, and their mean while most of them still run.

    `history` has a row per `fold`, `setting`, `inner` and `epoch` with `train_loss` and `val_loss`; `inner` 0, a refit
    on all training slides, is left out. Of several settings the means alone are drawn, of the six at most whose mean
    validation loss falls lowest.
    """
    inner = history.loc[history["inner"] > 0]
    named = inner.assign(setting=inner["setting"].astype(object).where(inner["setting"].notna(), ""))
    settings = {str(name): rows for name, rows in named.groupby("setting", sort=False)}
    if len(settings) > 1:
        return _settings_figure(settings)
    figure, axes = _axes("Epoch", "Loss", width=5)
    runs = inner.groupby(["fold", "inner"])
    for column, colour, style, name in zip(_LOSSES, COLOURS, STYLES, _LOSSES.values(), strict=False):
        for _, run in runs:
            axes.plot(run["epoch"], run[column], color=colour, ls=style, alpha=0.25, lw=0.7)
        _plot_mean(axes, inner, column, color=colour, ls=style, lw=1.8, label=f"{name} (mean)")
    axes.set_title(f"{runs.ngroups} inner trainings", fontsize=10)
    _whole_epochs(axes)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _settings_figure(settings: dict[str, pd.DataFrame]) -> Figure:
    lowest = sorted(settings, key=lambda name: _mean_loss(settings[name], "val_loss")[1].min())[:_MOST_SETTINGS]
    figure = Figure(figsize=(7, 3.6 + 0.17 * len(lowest)), layout="constrained")
    for axes, (column, title) in zip(figure.subplots(1, 2, sharey=True), _LOSSES.items(), strict=True):
        for name, colour, style in zip(lowest, COLOURS, STYLES, strict=False):
            label = literal(name) if column == "val_loss" else None
            _plot_mean(axes, settings[name], column, color=colour, ls=style, lw=1.5, label=label)
        _label(axes, "Epoch", "Loss" if column == "train_loss" else "")
        _whole_epochs(axes)
        axes.set_title(title.capitalize(), fontsize=10)
    title = f"Mean of the inner trainings of {len(lowest)} settings"
    if len(lowest) < len(settings):
        title += f", of {len(settings)} those of the lowest validation loss"
    figure.suptitle(title, fontsize=10)
    figure.legend(loc="outside lower center", **_LEGEND)
    return figure


def _pooled_title(repeats: np.ndarray) -> str:
    count = len(np.unique(repeats))
    return "Out-of-fold slides, " + (f"mean of {count} repeats" if count > 1 else "pooled")


def _fold_curves(axes: Axes, is_class: np.ndarray, scores: np.ndarray, folds: np.ndarray, colour: str) -> None:
    for fold in np.unique(folds):
        curve = mean_roc(is_class[folds == fold], scores[folds == fold])
        if curve is not None:
            axes.plot(*curve, color=colour, alpha=0.3, lw=0.7)


def _auc_text(
    name: str, is_class: np.ndarray, scores: np.ndarray, cases: np.ndarray, repeats: np.ndarray, seed: int
) -> str:
    labels, probabilities = is_class.astype(int), np.stack([1 - scores, scores], axis=1)
    auc = pooled_metrics(labels, probabilities, repeats)["auc"]
    interval = bootstrap_intervals(labels, probabilities, cases, seed, repeats=repeats)["auc"]
    within = "" if interval is None else f" (95% CI {interval[0]:.3f} to {interval[1]:.3f})"
    return f"{literal(name)}: AUC {auc:.3f}{within}"


def _wilson(share: float, count: float) -> tuple[float, float]:
    """95% interval of a share of `count` (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    z2 = 1.959964**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = np.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return middle - half, middle + half


def _plot_mean(axes: Axes, history: pd.DataFrame, column: str, **line: Any) -> None:
    epochs, mean = _mean_loss(history, column)
    axes.plot(epochs, mean, marker="o" if len(mean) == 1 else None, ms=4, **line)


def _mean_loss(history: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and means over the trainings, up to where half of them have ended."""
    by_epoch = history.groupby("epoch", as_index=False).agg(mean=(column, "mean"), count=(column, "count"))
    running = by_epoch[by_epoch["count"] >= history.groupby(["fold", "inner"]).ngroups / 2]
    return np.asarray(running["epoch"]), np.asarray(running["mean"])


def _whole_epochs(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _axes(x_label: str, y_label: str, width: float = 4.5, height: float = 4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _label(axes, x_label, y_label)
    return figure, axes


def _label(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def comparison_figure(differences: Mapping[str, Mapping[tuple[str, str], tuple[float, float, float]]]) -> Figure:
    """Forest plot of pairs of runs, metric by metric: `(difference, low, high)`, of the first minus the second."""
    figure, axes = _axes("Difference, first minus second (95% interval)", "", width=6)
    pairs = list(dict.fromkeys(pair for by_pair in differences.values() for pair in by_pair))
    names: list[str] = []
    for (metric, by_pair), colour, marker in zip(differences.items(), cycle(COLOURS), cycle("osD^vP"), strict=False):
        if len(pairs) > 1:
            names.append(metric)
        for (first, second), (difference, low, high) in by_pair.items():
            row = len(names)
            names.append(f"{first}\n- {second}" if len(pairs) > 1 else metric)
            axes.plot([low, high], [row, row], color=colour, lw=2, solid_capstyle="butt")
            axes.plot(difference, row, marker, color=colour, ms=6)
            told = f"{difference:+z.3f} ({low:+z.3f} to {high:+z.3f})"
            axes.text(1.02, row, told, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.axvline(0, color="black", lw=0.8, ls="--", zorder=0)
    axes.set_yticks(range(len(names)), [literal(name) for name in names], fontsize=9)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if len(pairs) > 1 and name in differences else "normal")
    if len(pairs) < 2:
        axes.set_title(literal(" - ".join(pairs[0])) if pairs else "No difference is defined", fontsize=10)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    figure.set_figheight(0.9 + 0.38 * max(1, len(names)))
    return figure
