"""A small cohort, and a run on it that is trained once, for all tests of this room."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cohort import write_cohort
from tests.drawing import drawn_coarsely
from tests.learning.runs import CHUNKED, TRAIN, VAL, Finished, Unfitted, Watch, make_cv
from tests.small import make_model  # noqa: F401 - a fixture
from utils.core.engine import threads
from utils.core.files import write_text
from utils.learning import jobs, run_figures
from utils.learning.early_stopping import EarlyStopping
from utils.learning.settings import Training
from utils.learning.training import fit
from utils.mil_dataset import MILDataset


@pytest.fixture
def aloud(caplog) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "litemil"):
        yield caplog


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> tuple[Path, Path]:
    """24 slides of 12 patients, of 5 to 50 patches."""
    return write_cohort(tmp_path_factory.mktemp("cohort"), patches=(5, 50))


@pytest.fixture(scope="session")
def dataset(cohort) -> MILDataset:
    """One to three chunks of each slide."""
    return MILDataset(*cohort, chunk_size=20)


@pytest.fixture
def no_figures(monkeypatch) -> None:
    def write(folder, predictions, *_):
        for name in run_figures.figure_names(predictions.task):
            write_text(folder / f"{name}.png", "a figure")

    monkeypatch.setattr(run_figures, "draw_figures", write)


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory) -> Finished:
    """One uninterrupted run, watched."""
    with pytest.MonkeyPatch.context() as patch, threads(1), drawn_coarsely(blank=("png",)):
        watch = Watch()
        watch.install(patch)
        cv = make_cv(dataset, tmp_path_factory.mktemp("runs") / "LiteMIL" / "demo")
        results = cv.run()
    return Finished(cv.output_dir, cv, results, watch.events)


@pytest.fixture
def unfitted(monkeypatch, no_figures) -> Unfitted:
    """Runs in no time, where what is tested is not the training."""
    stand_in = Unfitted()
    monkeypatch.setattr(jobs, "fit", stand_in)
    return stand_in


@pytest.fixture
def train(dataset, make_model):  # noqa: F811 - the fixture
    """A short training on the shared cohort; settings and arguments by name."""

    def run(
        make=make_model, *, data=dataset, slides=TRAIN, val=VAL, monitor="slide_auc", keep="best", seed=7,
        on_epoch=None, **settings,
    ):  # fmt: skip
        chosen = Training(**({"epochs": 3, "batch_size": 8, "lr": 1e-2, "least_steps": 0} | settings))
        hook = {} if on_epoch is None else {"on_epoch": on_epoch}
        return fit(
            make,
            data,
            slides,
            EarlyStopping(data.task, val, CHUNKED, monitor, keep),
            chosen,
            seed=seed,
            device=torch.device("cpu"),
            **hook,
        )

    return run
