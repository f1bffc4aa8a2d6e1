"""Figures drawn of a run that is finished."""

from pathlib import Path

from tests.drawing import drawn_coarsely
from tests.learning.runs import contents, make_cv
from utils.core.plots import FORMATS
from utils.learning import run_figures


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
