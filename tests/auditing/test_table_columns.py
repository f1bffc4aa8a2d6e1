"""Columns of the label table that predict the label, whatever they are called."""

import numpy as np
import pytest

from tests.auditing.audit_helpers import lines
from utils.audit import audit
from utils.tasks.regression import Regression
from utils.tasks.survival import Survival

PATIENTS = 80


def table(folder, columns: int = 3):
    """Patients whose age goes with the class, and whose other columns say nothing or cannot be looked at."""
    rng = np.random.default_rng(0)
    head = [
        "case_id",
        "wsi_id",
        "diagnosis",
        "age",
        "remark",
        "country",
        "days",
        "died",
        *[f"c{n}" for n in range(columns)],
    ]
    rows = [head]
    for patient in range(PATIENTS):
        age = 60 + 10 * (patient % 2) + 8 * rng.standard_normal()
        others = [str(rng.integers(3)) for _ in range(columns)]
        days = 1000 * np.exp(-age / 20) + rng.random()
        label = ("benign", "malignant")[patient % 2]
        cells = [f"P{patient}", f"S{patient}", label, f"{age:.0f}", f"text {patient}", "FI", f"{days:.3f}", "1"]
        rows.append([*cells, *others])
    path = folder / "labels.csv"
    path.write_text("\n".join(",".join(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("columns", [3, 60])
def test_the_column_that_predicts_is_named_and_the_others_are_counted(tmp_path, columns):
    found = [line for line in lines(audit(table(tmp_path, columns))) if " column" in line and "confounding" in line]
    (told,) = [line for line in found if "other columns" in line]
    assert told.startswith(f"info confounding: of {columns + 2} other columns of the table, 2 alone predict the label")
    assert "age (AUC 0." in told
    assert "--covariates age,days " in told or "--covariates days,age " in told
    (skipped,) = [line for line in found if "not looked at" in line]
    assert "3 columns of the table: remark identifies patients" in skipped
    assert "country has one value only" in skipped
    assert "died has one value only" in skipped
    assert "diagnosis" not in told + skipped, "it is the label"


def test_no_column_predicts(tmp_path):
    path = table(tmp_path)
    rows = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("\n".join(",".join([*row[:3], *row[8:]]) for row in rows) + "\n")
    told = [line for line in lines(audit(path)) if "other columns" in line]
    assert told[0].startswith("ok confounding: no sign that 3 other columns of the table predict the label")


def test_a_column_that_gives_the_label_away_is_a_warning(tmp_path):
    path = table(tmp_path)
    rows = [line.split(",") for line in path.read_text().splitlines()]
    marked = [",".join([*row, "code" if number == 0 else str(number % 2)]) for number, row in enumerate(rows)]
    path.write_text("\n".join(marked) + "\n")
    (told,) = [line for line in lines(audit(path)) if line.startswith("warning confounding")]
    assert "the column code (AUC 1.00, p 0." in told
    assert told.endswith("is it known before the label is?")
    (others,) = [line for line in lines(audit(path)) if "alone predict the label" in line]
    assert "code (AUC 1.00" in others
    assert "code" not in others.partition("--covariates")[2], "it is doubtful, so it is not suggested"


@pytest.mark.parametrize(
    ("task", "targets"), [(Regression("days"), ["days"]), (Survival("days", "died"), ["days", "died"])]
)
def test_targets_of_other_tasks_are_not_looked_at(tmp_path, task, targets):
    (told,) = [f for f in audit(table(tmp_path), task=task) if "other columns" in f.message]
    assert "age (AUC" in told.message
    assert not set(targets) & set(told.details["columns"])
