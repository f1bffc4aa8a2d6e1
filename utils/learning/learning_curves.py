"""The figure of learning curves: every inner training to its end, their mean, and the epochs that were kept."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.core.errors import plural
from utils.core.plots import COLOURS, SMALL, STYLES, bare, legend_below
from utils.core.text import escape_mathtext
from utils.learning.ranking import best_of, mean_rank, rank

_MOST_SETTINGS = 6
# A training leaves the plot where its loss rises above so many times what the tamest setting needs, or a coin's answer.
_WILD = 10
_FIGURES = {"slide_auc": "AUC", "slide_balanced_accuracy": "balanced accuracy", "slide_f1_macro": "macro F1"}
_CAPTION = (
    "Bold: mean of all trainings, each carried on at its last value once it has stopped; faded where fewer than half "
    "of them still run. Dots: the epoch that was kept of each."
)


@dataclass(frozen=True, eq=False)
class _Training:
    """An inner training of a setting in an outer fold: its rows of `history`, an epoch each, the `monitor` that its
    epochs were compared by, and the index of the row that was kept.
    """

    fold: int
    setting: str
    rows: pd.DataFrame
    monitor: str
    kept: int

    def values(self, column: str) -> np.ndarray:
        """`(epochs,)`"""
        return self.rows[column].to_numpy(dtype=float)


@dataclass(frozen=True, eq=False)
class _Curve:
    """A column of the history of some trainings, drawn as the `number`-th of a plot's curves."""

    trainings: Sequence[_Training]
    column: str
    number: int
    label: str | None


def learning_figure(history: pd.DataFrame, monitors: Mapping[int, str]) -> Figure:
    """Draw the losses of the inner trainings, and the figure that their epochs were compared by where that is another.

    `history` has a row per `fold`, `setting`, `inner` and `epoch` with `train_loss`, `val_loss` and the figures that
    `monitors` names for each fold; `inner` 0, a refit, has no validation and is left out. The mean is over all
    trainings at every epoch: over those that still run it would fall as soon as a bad one stops. Of several settings,
    each with a colour, the six at most are drawn that inner validation puts first.
    """
    trainings = _trainings(history, monitors)
    settings = _ordered_settings(trainings)
    shown = settings[:_MOST_SETTINGS]
    title = plural(len(trainings), "inner training")
    if len(settings) > 1:
        title += f" of {len(settings)} settings"
        if len(shown) < len(settings):
            title += f"; drawn are the {len(shown)} that inner validation puts first"
        panels = _panels_of_settings(trainings, shown)
    else:
        panels = _panels_of_one(trainings)
    figure = Figure(figsize=(1 + 3.4 * len(panels), 3.6), layout="constrained")
    for axes, (name, curves) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        for curve in curves:
            _draw(axes, curve)
        label, _, where = name.partition("\n")
        bare(axes, "Epoch", label)
        axes.set_title(where or _cut_off(axes, curves), fontsize=SMALL)
        _end_with(axes, [training for curve in curves for training in curve.trainings])
    figure.suptitle(title, fontsize=10)
    caption = fill(_CAPTION, 60 if len(panels) == 1 else 106)
    legend_below(figure, title=caption, title_fontsize=SMALL)
    return figure


def _trainings(history: pd.DataFrame, monitors: Mapping[int, str]) -> list[_Training]:
    inner = history.loc[history["inner"] > 0]
    named = inner.assign(setting=inner["setting"].astype(object).where(inner["setting"].notna(), "").astype(str))
    trainings = []
    for (fold, setting, _), rows in named.groupby(["fold", "setting", "inner"], sort=False):
        monitor = monitors[int(fold)]
        ordered = rows.sort_values("epoch")
        kept = best_of([rank(row, monitor) for row in ordered.to_dict("records")])
        trainings.append(_Training(int(fold), setting, ordered, monitor, kept))
    return trainings


def _choices(trainings: Sequence[_Training]) -> dict[int, list[str]]:
    """By outer fold, the settings as inner validation orders them, the chosen one first; those of which a training
    diverged, and has no history, last.
    """
    choices = {}
    settings = list(dict.fromkeys(training.setting for training in trainings))
    for fold in dict.fromkeys(training.fold for training in trainings):
        validations: dict[str, list[dict[str, Any]]] = {setting: [] for setting in settings}
        for training in trainings:
            if training.fold == fold:
                kept = training.rows.iloc[training.kept].to_dict()
                validations[training.setting].append(kept)
        monitor = next(training.monitor for training in trainings if training.fold == fold)
        most = max(map(len, validations.values()))
        ranks = {setting: mean_rank(each, monitor) for setting, each in validations.items() if len(each) == most}
        best_first = sorted(ranks, key=lambda setting, ranks=ranks: ranks[setting], reverse=True)
        choices[fold] = best_first + [setting for setting in settings if setting not in ranks]
    return choices


def _ordered_settings(trainings: Sequence[_Training]) -> list[str]:
    """The settings, those first that most outer folds chose, then by their mean place in the folds' orders."""
    orders = list(_choices(trainings).values())
    chosen = Counter(order[0] for order in orders)
    places = {setting: sum(order.index(setting) for order in orders) for setting in orders[0]}
    return sorted(places, key=lambda setting: (-chosen[setting], places[setting]))


def _panels_of_one(trainings: Sequence[_Training]) -> dict[str, list[_Curve]]:
    """Of a single setting: both losses in one plot, and what the epochs were compared by."""
    losses = [
        _Curve(trainings, "train_loss", 0, "training, mean"),
        _Curve(trainings, "val_loss", 1, "validation, mean"),
    ]
    scores = {name: [_Curve(some, column, 1, None)] for name, column, some in _scores(trainings)}
    return {"Loss": losses} | scores


def _panels_of_settings(trainings: Sequence[_Training], shown: Sequence[str]) -> dict[str, list[_Curve]]:
    """A plot for each loss, and for what the epochs were compared by, with a curve for each setting."""
    orders = _choices(trainings).values()
    chosen = Counter(order[0] for order in orders)
    finished = Counter(training.setting for training in trainings)
    most = max(finished.values())
    columns = [("Training loss", "train_loss", trainings), ("Validation loss", "val_loss", trainings)]
    panels: dict[str, list[_Curve]] = {}
    for name, column, some in [*columns, *_scores(trainings)]:
        for number, setting in enumerate(shown):
            remarks = [f"chosen in {chosen[setting]} of {plural(len(orders), 'fold')}"]
            if finished[setting] < most:
                remarks.append(f"without the {most - finished[setting]} of {most} trainings that diverged")
            label = f"{escape_mathtext(setting)}, mean ({', '.join(remarks)})"
            label = label if column == "train_loss" else None  # one entry for all plots
            curve = _Curve([one for one in some if one.setting == setting], column, number, label)
            panels.setdefault(name, []).append(curve)
    return panels


def _scores(trainings: Sequence[_Training]) -> list[tuple[str, str, list[_Training]]]:
    """What epochs were compared by besides the loss: its name, its column, and the trainings."""
    found = []
    for monitor in sorted({training.monitor for training in trainings} - {"slide_loss"}):
        some = [training for training in trainings if training.monitor == monitor]
        name = f"Validation {_FIGURES.get(monitor, monitor.removeprefix('slide_'))}"
        if len(some) < len(trainings):
            part, whole = (len({training.fold for training in group}) for group in (some, trainings))
            name += f"\n({part} of {whole} outer folds; in the others the loss chose)"
        found.append((name, monitor.replace("slide_", "val_"), some))
    return found


def _draw(axes: Axes, curve: _Curve) -> None:
    """Draw each training faintly, with a dot at the epoch kept, and their mean."""
    colour, style = COLOURS[curve.number], STYLES[curve.number]
    lengths = sorted(len(training.rows) for training in curve.trainings)
    is_point, faint = lengths[-1] == 1, min(0.3, 6 / len(lengths))
    for training in curve.trainings:
        epochs, values = training.rows["epoch"].to_numpy(), training.values(curve.column)
        axes.plot(epochs, values, color=colour, alpha=faint, lw=0.7, marker="." if is_point else None)
        if curve.column != "train_loss":
            kept = epochs[training.kept], values[training.kept]
            axes.plot(*kept, "o", color=colour, ms=4, mew=0.6, mec="white", clip_on=False, zorder=5)
    mean = np.mean([_carried(training.values(curve.column), lengths[-1]) for training in curve.trainings], axis=0)
    epochs = np.arange(1, len(mean) + 1)
    half = lengths[len(lengths) // 2]  # the last epoch that at least half of them reach
    line: dict[str, Any] = {"color": colour, "ls": style, "lw": 2.2, "zorder": 4}
    axes.plot(epochs, mean, color="white", lw=3.6, zorder=3)
    axes.plot(epochs[half - 1 :], mean[half - 1 :], **line, alpha=0.5)
    marker = {"marker": "_", "ms": 16, "mew": 2.2} if is_point else {}
    axes.plot(epochs[:half], mean[:half], **line, **marker, label=curve.label)


def _carried(values: np.ndarray, length: int) -> np.ndarray:
    """`(length,)`: the values, the last of them again and again."""
    return np.append(values, np.full(length - len(values), values[-1]))


def _cut_off(axes: Axes, curves: Sequence[_Curve]) -> str:
    """Let the axis of a loss end where the tame trainings do; return what to say of those that go on above, if any."""
    if not curves[0].column.endswith("_loss"):
        return ""
    peaks = [[training.values(curve.column).max() for training in curve.trainings] for curve in curves]
    every = np.concatenate(peaks)
    tame = every[every <= _WILD * max(math.log(2), min(map(np.median, peaks)))]
    if len(tame) == len(every):
        return ""
    low = min(training.values(curve.column).min() for curve in curves for training in curve.trainings)
    top = tame.max()
    margin = 0.05 * (top - low) or 0.01
    axes.set_ylim(low - margin, top + margin)
    for line in axes.lines:
        if np.max(line.get_ydata()) > top:
            line.set_clip_on(True)  # the dots, too
    trainings = {training for curve in curves for training in curve.trainings}
    wild = {one for curve in curves for one in curve.trainings if one.values(curve.column).max() > top}
    how_many = f"{len(wild)} of {plural(len(trainings), 'training')}"
    return f"(cut off above: {how_many}, up to {every.max():.2g}, and their mean)"


def _end_with(axes: Axes, trainings: Sequence[_Training]) -> None:
    """Let the epochs end where the longest training does."""
    longest = max(len(training.rows) for training in trainings)
    axes.set_xlim((0.5, 1.5) if longest == 1 else (1, longest))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
