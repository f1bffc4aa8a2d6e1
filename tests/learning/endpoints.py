"""What end-to-end tests of tasks share: small trainings, and what a task's outputs are checked for.

Import with `from tests.learning.endpoints import ...`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

SMALL = (
    "--n_outer", 2, "--n_inner", 2, "--epochs", 30, "--hidden_dim", 16, "--num_heads", 2, "--device", "cpu",
    "--lr", "1e-2", "--seed", 3,
)  # fmt: skip
Cohort = tuple[Path, Path]  # the label table, and the folder of the features


@dataclass(frozen=True)
class Endpoint:
    """The flags of a task, its primary metric with what a model that has learned something reaches, the figures, what
    the values are called in a slide's record, and what evidence is the sum of.
    """

    flags: tuple[str, ...]
    metric: str
    least: float
    figures: tuple[str, ...]
    values_key: str = "values"
    quantity: str = ""


def cohort_fixture(write: Callable[[Path, int], Cohort], seed: int) -> Any:
    """Return a fixture of the cohort that `write` makes in a folder."""

    @pytest.fixture(scope="module")
    def cohort(tmp_path_factory) -> Cohort:
        return write(tmp_path_factory.mktemp("cohort"), seed)

    return cohort


def train_fixture(endpoints: Mapping[str, Endpoint]) -> Any:
    """Return a fixture that trains a task on the module's `cohort`, or on another table of it, in a folder `name`."""

    @pytest.fixture
    def train(script, cohort, tmp_path):
        def run(task: str, *flags, labels: Path | None = None, name: str = "run"):
            asked = (*endpoints[task].flags, *SMALL, *flags)
            return train_with(script, (labels or cohort[0], cohort[1]), tmp_path / name, asked)

        return run

    return train


def train_with(script, cohort: Cohort, folder: Path, flags: tuple):
    """Train on a cohort with no other flags than these."""
    return script(
        "train", "--mil", "LiteMIL", "--dataset", "mine", "--labels_csv", cohort[0], "--features_dir", cohort[1],
        "--output_dir", folder, *flags,
    )  # fmt: skip


def check_target_is_named(train, cohort: Cohort, folder: Path, task: str, column: str, value: str, message: str):
    """Check that a training refuses a table whose first row has this cell; return the table."""
    table = pd.read_csv(cohort[0], dtype=str, keep_default_na=False)
    table.loc[0, column] = value
    table.to_csv(folder / "labels.csv", index=False)
    outcome = train(task, labels=folder / "labels.csv")
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert message in outcome.errors[0]
    assert "--allow unknown" in outcome.errors[0]
    return folder / "labels.csv"


def check_flags_are_refused(script, cohort: Cohort, folder: Path, flags: tuple, message: str) -> None:
    outcome = train_with(script, cohort, folder / "run", flags)
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert message in outcome.errors[0]
    assert not (folder / "run" / "run.json").exists()
