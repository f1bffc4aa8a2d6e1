"""Figures of a training run, drawn without pyplot so that nothing stays open."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

from utils.core.files import whole_file

# Okabe and Ito's colours, told apart in the common kinds of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def save_figure(figure: Figure, path: Path) -> None:
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=150, bbox_inches="tight")


def roc_figure(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str], folds: np.ndarray) -> Figure:
    """Pooled out-of-fold curve per class (the positive one alone when there are two), over each fold's own."""
    figure, axes = _axes("False positive rate", "True positive rate")
    positives = [1] if len(class_names) == 2 else range(len(class_names))
    for colour, index in zip(cycle(COLOURS), positives, strict=False):
        is_class, score = labels == index, probabilities[:, index]
        for fold in np.unique(folds):
            if len(np.unique(is_class[folds == fold])) == 2:
                axes.plot(
                    *roc_curve(is_class[folds == fold], score[folds == fold])[:2], color=colour, alpha=0.25, lw=0.8
                )
        if len(np.unique(is_class)) == 2:
            name = f"{class_names[index]}: AUC {roc_auc_score(is_class, score):.3f}"
            axes.plot(*roc_curve(is_class, score)[:2], color=colour, lw=2, label=name)
    axes.plot([0, 1], [0, 1], color="grey", lw=0.8, ls="--")
    axes.set_title("Out-of-fold slides, pooled (thin: each fold)", fontsize=10)
    axes.set_aspect("equal")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", frameon=False)
    return figure


def confusion_figure(labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Counts of out-of-fold slides, shaded by the fraction of the true class."""
    counts = confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(len(class_names)))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = _axes("Predicted", "True")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        dark = share[row, column] > 0.5
        text = f"{count}\n{share[row, column]:.0%}"
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(class_names)), class_names)
    axes.set_yticks(range(len(class_names)), class_names, rotation=90, va="center")
    axes.set_title("Out-of-fold slides (% of the true class)", fontsize=10)
    return figure


def learning_figure(history: pd.DataFrame) -> Figure:
    """Training and validation loss of every inner training, and their mean while most of them still run."""
    figure, axes = _axes("Epoch", "Loss")
    runs = history.groupby(["fold", "inner"])
    for column, colour, name in (("train_loss", COLOURS[0], "training"), ("val_loss", COLOURS[1], "validation")):
        for _, run in runs:
            axes.plot(run["epoch"], run[column], color=colour, alpha=0.2, lw=0.8)
        by_epoch = history.groupby("epoch", as_index=False).agg(mean=(column, "mean"), count=(column, "count"))
        running = by_epoch[by_epoch["count"] >= runs.ngroups / 2]
        axes.plot(running["epoch"], running["mean"], color=colour, lw=2, label=f"{name} (mean)")
    axes.set_title(f"{runs.ngroups} inner trainings", fontsize=10)
    axes.legend(frameon=False)
    return figure


def _axes(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes
