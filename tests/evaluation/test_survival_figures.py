"""Drawings of survival say what they show."""

import numpy as np

from tests.tasks.drawn_survival import drawn_patients
from utils.evaluation.predictions import Predictions
from utils.evaluation.survival_figures import kaplan_meier_figure
from utils.tasks.survival import Survival


def test_numbers_at_risk_stand_at_the_ticks_of_the_time_axis():
    targets, risks = drawn_patients(120, 0, ties=False)
    names = np.arange(120).astype(str)
    task = Survival("days", "died").of_cohort(targets, names.tolist())
    survival = np.exp(-np.exp(risks)[:, None] * np.arange(1, len(task.times) + 1) / 10)
    high = (risks > 0).astype(int)
    predictions = Predictions(
        names, names, targets, np.concatenate([risks[:, None], survival], axis=1), task, np.ones(120), 0,
        decisions=high,
    )  # fmt: skip
    axes, table = kaplan_meier_figure(predictions).axes
    ticks = axes.get_xticks()
    assert len(ticks) > 3
    shown = {(text.get_position()[0], text.get_position()[1]): int(text.get_text()) for text in table.texts}
    assert shown == {
        (tick, group): int((targets[high == group, 0] >= tick).sum()) for tick in ticks for group in (0, 1)
    }
