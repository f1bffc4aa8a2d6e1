"""Draw the figures of a training run: those of its predictions, and its learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.core.plots import write_figures
from utils.evaluation.predictions import Predictions
from utils.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd


def figure_names(task: Task) -> tuple[str, ...]:
    """Return the names of a run's figures."""
    return (*task.figure_names, "learning_curves")


def draw_figures(
    folder: Path,
    predictions: Predictions,
    history: pd.DataFrame,
    monitors: Mapping[int, str],
    formats: Sequence[str],
    *,
    missing_only: bool = False,
) -> list[Path]:
    """Write the figures of a run in each of the formats, or only the missing ones; return their paths.

    `monitors` maps each outer fold to the metric that compared its epochs.
    """
    from utils.evaluation.prediction_figures import prediction_figures
    from utils.learning.learning_curves import learning_figure

    figures = prediction_figures(predictions) | {
        "learning_curves": learning_figure(predictions.task, history, monitors)
    }
    return write_figures(folder, figures, formats, missing_only=missing_only)
