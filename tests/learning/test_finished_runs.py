"""Figures drawn of a run that is finished."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.drawing import drawn_coarsely
from tests.learning.runs import contents, make_cv
from utils.core.errors import ConfigError
from utils.core.plots import FORMATS
from utils.evaluation.predictions import Predictions
from utils.learning import run_figures
from utils.learning.finished_runs import Run, check_same_slides
from utils.tasks.survival import Survival


class TestKinds:
    def test_figures_come_in_other_formats_without_another_training(self, dataset, tmp_path, caplog):
        """The format is nothing that a run depends on: an unfinished one goes on, a finished one draws what lacks."""
        with drawn_coarsely(blank=FORMATS):
            make_cv(dataset, tmp_path / "run", figure_format=("svg",)).run()
        before = contents(tmp_path / "run")
        assert {Path(name).stem for name in before if name.endswith(".svg")} == set(
            run_figures.figure_names(dataset.task)
        )
        (tmp_path / "run" / "roc.svg").unlink()
        with drawn_coarsely(blank=FORMATS), caplog.at_level("INFO"):
            make_cv(dataset, tmp_path / "run", figure_format=("svg", "pdf")).run()
        assert "nothing is trained" in caplog.text
        assert "drawn from its tables: roc.svg, roc.pdf, precision_recall.pdf" in caplog.text
        after = contents(tmp_path / "run")
        assert {name: after[name] for name in before} == before
        assert {name for name in after if name not in before} == {
            f"{name}.pdf" for name in run_figures.figure_names(dataset.task)
        }


def survival_run(name: str, slides: list[str], days: list[float], times: tuple[float, ...] = ()) -> Run:
    targets = np.array([(day, 1) for day in days], float)
    task = Survival("days", "died", times=times).of_cohort(targets, slides)
    values = np.ones((len(slides), len(task.outputs)))
    names = np.array(slides)
    predictions = Predictions(names, names, targets, values, task, np.ones(len(slides), int), 0)
    return Run(Path(name), name, {}, predictions, [])


@pytest.mark.parametrize(("slides", "days", "times", "message"), [
    (["P", "Q"], [1, 2], (), "b: not one slide of a; give runs of one cohort"),
    (["A", "B", "D"], [1, 2, 9], (), "a and b: 1 slide in a alone: C"),
    (["A", "B", "C"], [1, 2, 9], (), "1 slide with another days or died: C (event at 3, event at 9)"),
    (["A", "B", "C"], [1, 2, 3], (2,), "b: it predicts risk, survival_2, a predicts risk, survival_1, survival_2"),
])  # fmt: skip
def test_runs_of_other_survival_cohorts_are_told_by_slides_and_times(slides, days, times, message):
    """Each cohort has times of its own at which survival is predicted, which no user has asked for."""
    first, second = survival_run("a", ["A", "B", "C"], [1, 2, 3]), survival_run("b", slides, days, times)
    check_same_slides(first, replace(first, path=Path("b")))
    with pytest.raises(ConfigError) as caught:
        check_same_slides(first, second)
    assert message in str(caught.value)
