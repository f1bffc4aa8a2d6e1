"""Draw the learning curves: every inner training to its end, their mean, and the epochs that were kept."""

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
from utils.tasks.task import Task

_MOST_SETTINGS = 6
# Losses above this multiple of the steadiest setting's median peak, or of chance, are cut off.
_WILD = 10
_CAPTION = (
    "Bold: mean of all trainings, each carried on at its last value once it has stopped; faded where fewer than half "
    "of them still run. Dots: the epoch that was kept of each."
)


@dataclass(frozen=True, eq=False)
class _Training:
    """An inner training: its task, outer fold and setting, its `rows` of the history, one per epoch, the `monitor` that
    compared them, and the index of the `kept` one.
    """

    task: Task
    fold: int
    setting: str
    rows: pd.DataFrame
    monitor: str
    kept: int

    def values(self, column: str) -> np.ndarray:
        """Return a column `(epochs,)`."""
        return self.rows[column].to_numpy(dtype=float)


@dataclass(frozen=True, eq=False)
class _Curve:
    """A column of the trainings' histories, drawn in the plot's colour and style `number`."""

    trainings: Sequence[_Training]
    column: str
    number: int
    label: str | None


def learning_figure(task: Task, history: pd.DataFrame, monitors: Mapping[int, str]) -> Figure:
    """Draw the losses of the inner trainings, and the metric that compared their epochs, if it is not the loss.

    `history` has a row per `fold`, `setting`, `inner` and `epoch` with `train_loss`, `val_loss`, the metric that
    `monitors` names for each fold, and whether the epoch was `kept`: 1 or 0 (without that column, the best one was).
    `inner` 0, a refit, has no validation and is left out. The mean is over all trainings at every epoch: over those
    still running it would fall as soon as a bad one stops. Of several settings, each in its colour, at most the six
    best on inner validation are drawn.
    """
    trainings = _trainings(task, history, monitors)
    settings = _ordered_settings(trainings)
    drawn_settings = settings[:_MOST_SETTINGS]
    title = plural(len(trainings), "inner training")
    if len(settings) > 1:
        title += f" of {len(settings)} settings"
        if len(drawn_settings) < len(settings):
            title += f"; drawn are the {len(drawn_settings)} that inner validation puts first"
        panels = _panels_of_settings(trainings, drawn_settings)
    else:
        panels = _panels_of_single_setting(trainings)
    figure = Figure(figsize=(1 + 3.4 * len(panels), 3.6), layout="constrained")
    for axes, (name, curves) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        for curve in curves:
            _draw(axes, curve)
        label, _, note = name.partition("\n")
        bare(axes, "Epoch", label)
        axes.set_title(note or _cut_off(axes, curves), fontsize=SMALL)
        _end_with(axes, [training for curve in curves for training in curve.trainings])
    figure.suptitle(title, fontsize=10)
    caption = fill(_CAPTION, 60 if len(panels) == 1 else 106)
    legend_below(figure, title=caption, title_fontsize=SMALL)
    return figure


def _trainings(task: Task, history: pd.DataFrame, monitors: Mapping[int, str]) -> list[_Training]:
    inner = history.loc[history["inner"] > 0]
    inner = inner.assign(setting=inner["setting"].astype(object).where(inner["setting"].notna(), "").astype(str))
    trainings = []
    for (fold, setting, _), rows in inner.groupby(["fold", "setting", "inner"], sort=False):
        monitor = monitors[int(fold)]
        ordered = rows.sort_values("epoch")
        if "kept" in ordered:
            kept = int(ordered["kept"].to_numpy(dtype=bool).argmax())
        else:  # of an earlier version
            kept = best_of([rank(task, row, monitor) for row in ordered.to_dict("records")])
        trainings.append(_Training(task, int(fold), setting, ordered, monitor, kept))
    return trainings


def _orders(trainings: Sequence[_Training]) -> list[list[str]]:
    """Return each outer fold's order of the settings, the best on inner validation first; settings with a training that
    diverged, and so has no history, last.
    """
    orders = []
    settings = list(dict.fromkeys(training.setting for training in trainings))
    for fold in dict.fromkeys(training.fold for training in trainings):
        validations: dict[str, list[dict[str, Any]]] = {setting: [] for setting in settings}
        for training in trainings:
            if training.fold == fold:
                validations[training.setting].append(training.rows.iloc[training.kept].to_dict())
        monitor = next(training.monitor for training in trainings if training.fold == fold)
        most = max(map(len, validations.values()))
        ranks = {
            setting: mean_rank(trainings[0].task, each, monitor)
            for setting, each in validations.items()
            if len(each) == most
        }
        best_first = sorted(ranks, key=lambda setting, ranks=ranks: ranks[setting], reverse=True)
        orders.append(best_first + [setting for setting in settings if setting not in ranks])
    return orders


def _ordered_settings(trainings: Sequence[_Training]) -> list[str]:
    """Return the settings by how many outer folds chose them, then by their mean position in the folds' orders."""
    orders = _orders(trainings)
    chosen = Counter(order[0] for order in orders)
    positions = {setting: sum(order.index(setting) for order in orders) for setting in orders[0]}
    return sorted(positions, key=lambda setting: (-chosen[setting], positions[setting]))


def _panels_of_single_setting(trainings: Sequence[_Training]) -> dict[str, list[_Curve]]:
    """Return one plot of both losses, or two if they are not the same loss, and one of the metric that compared the
    epochs.
    """
    titles = trainings[0].task.loss_titles
    panels: dict[str, list[_Curve]] = {title: [] for title in titles}
    panels[titles[0]].append(_Curve(trainings, "train_loss", 0, "training, mean"))
    panels[titles[-1]].append(_Curve(trainings, "val_loss", 1, "validation, mean"))
    return panels | {name: [_Curve(group, column, 1, None)] for name, column, group in _scores(trainings)}


def _panels_of_settings(trainings: Sequence[_Training], settings: Sequence[str]) -> dict[str, list[_Curve]]:
    """Return a plot of each loss and of the metric that compared the epochs, with a curve for each setting."""
    orders = _orders(trainings)
    chosen = Counter(order[0] for order in orders)
    finished = Counter(training.setting for training in trainings)
    most = max(finished.values())
    titles = trainings[0].task.loss_titles
    titles = titles if len(titles) > 1 else ("Training loss", "Validation loss")
    columns = [(titles[0], "train_loss", trainings), (titles[1], "val_loss", trainings)]
    panels: dict[str, list[_Curve]] = {}
    for name, column, group in [*columns, *_scores(trainings)]:
        for number, setting in enumerate(settings):
            remarks = [f"chosen in {chosen[setting]} of {plural(len(orders), 'fold')}"]
            if finished[setting] < most:
                remarks.append(f"without the {most - finished[setting]} of {most} trainings that diverged")
            label = f"{escape_mathtext(setting)}, mean ({', '.join(remarks)})"
            label = label if column == "train_loss" else None  # one entry for all plots
            curve = _Curve([training for training in group if training.setting == setting], column, number, label)
            panels.setdefault(name, []).append(curve)
    return panels


def _scores(trainings: Sequence[_Training]) -> list[tuple[str, str, list[_Training]]]:
    """Return name, column and trainings of each metric other than the loss that compared epochs."""
    scores = []
    for monitor in sorted({training.monitor for training in trainings} - {"slide_loss"}):
        group = [training for training in trainings if training.monitor == monitor]
        metric = monitor.removeprefix("slide_")
        name = f"Validation {group[0].task.metric_titles.get(metric, metric.replace('_', ' '))}"
        if len(group) < len(trainings):
            folds, all_folds = (len({training.fold for training in each}) for each in (group, trainings))
            name += f"\n({folds} of {all_folds} outer folds; in the others the loss chose)"
        scores.append((name, monitor.replace("slide_", "val_"), group))
    return scores


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
    mean = np.mean([_extended(training.values(curve.column), lengths[-1]) for training in curve.trainings], axis=0)
    epochs = np.arange(1, len(mean) + 1)
    half = lengths[len(lengths) // 2]  # the last epoch that at least half of them reach
    line: dict[str, Any] = {"color": colour, "ls": style, "lw": 2.2, "zorder": 4}
    axes.plot(epochs, mean, color="white", lw=3.6, zorder=3)
    axes.plot(epochs[half - 1 :], mean[half - 1 :], **line, alpha=0.5)
    marker = {"marker": "_", "ms": 16, "mew": 2.2} if is_point else {}
    axes.plot(epochs[:half], mean[:half], **line, **marker, label=curve.label)


def _extended(values: np.ndarray, length: int) -> np.ndarray:
    """Return the values `(length,)`, the last one repeated."""
    return np.append(values, np.full(length - len(values), values[-1]))


def _cut_off(axes: Axes, curves: Sequence[_Curve]) -> str:
    """End the axis of a loss above the steady trainings; return a note about those cut off, or ""."""
    if not curves[0].column.endswith("_loss"):
        return ""
    chance_loss = curves[0].trainings[0].task.chance_loss
    peaks = [[training.values(curve.column).max() for training in curve.trainings] for curve in curves]
    all_peaks = np.concatenate(peaks)
    steady = all_peaks[all_peaks <= _WILD * max(chance_loss, min(map(np.median, peaks)))]
    if len(steady) == len(all_peaks):
        return ""
    low = min(training.values(curve.column).min() for curve in curves for training in curve.trainings)
    top = steady.max()
    margin = 0.05 * (top - low) or 0.01
    axes.set_ylim(low - margin, top + margin)
    for line in axes.lines:
        if np.max(line.get_ydata()) > top:
            line.set_clip_on(True)  # the dots, too
    trainings = {training for curve in curves for training in curve.trainings}
    wild = {training for curve in curves for training in curve.trainings if training.values(curve.column).max() > top}
    counts = f"{len(wild)} of {plural(len(trainings), 'training')}"
    return f"(cut off above: {counts}, up to {all_peaks.max():.2g}, and their mean)"


def _end_with(axes: Axes, trainings: Sequence[_Training]) -> None:
    """End the epoch axis with the longest training."""
    longest = max(len(training.rows) for training in trainings)
    axes.set_xlim((0.5, 1.5) if longest == 1 else (1, longest))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
