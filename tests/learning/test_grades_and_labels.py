"""Grades and several labels from the label table to the scores of an external cohort."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.cohort import synthetic_bag
from tests.learning.endpoints import (
    Endpoint,
    check_flags_are_refused,
    check_target_is_named,
    cohort_fixture,
    train_fixture,
)
from tests.learning.runs import assert_same, contents
from utils.bags.store import write_bag
from utils.pictures.prediction_caption import Caption
from utils.prediction.checkpoint import load_checkpoint

GRADES, LABELS, PATIENTS, DIM = ("low", "mid", "high"), ("A", "B"), 36, 8
ENDPOINTS = {
    "ordinal": Endpoint(
        ("--task", "ordinal", "--target_column", "grade", "--order", ",".join(GRADES)),
        "quadratic_kappa", 0.5, ("confusion_matrix",), "probabilities", "expected_grade",
    ),
    "multilabel": Endpoint(
        ("--task", "multilabel", "--target_columns", ",".join(LABELS)),
        "auc", 0.75, ("roc", "precision_recall"), "values", "log_odds",
    ),
}  # fmt: skip


def write_patients(folder: Path, seed: int) -> tuple[Path, Path]:
    """Synthetic patients of one slide: feature 0 says the grade, features 1 and 2 say labels, of which some are missing
    in the table.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(PATIENTS):
        grade, labels = patient % 3, (int(patient % 4 == 0), int(patient % 2))
        features = rng.standard_normal((int(rng.integers(5, 15)), DIM)).astype(np.float32)
        features[:, :3] += 2 * np.array([grade - 1, *labels])
        name = f"P{patient:02d}"
        write_bag(folder / "features" / f"{name}.h5", synthetic_bag(name, features, rng))
        hidden = patient % 7 == 0
        rows.append((name, name, GRADES[grade], labels[0], "NA" if hidden else labels[1]))
    table = pd.DataFrame(rows, columns=["case_id", "wsi_id", "grade", *LABELS])
    table.to_csv(folder / "labels.csv", index=False)
    return folder / "labels.csv", folder / "features"


cohort, external = cohort_fixture(write_patients, 0), cohort_fixture(write_patients, 1)
train = train_fixture(ENDPOINTS)


def known(table: pd.DataFrame) -> list[tuple[str, ...]]:
    return [tuple("" if pd.isna(cell) else f"{cell:.0f}" for cell in row) for row in table[list(LABELS)].to_numpy()]


@pytest.mark.usefixtures("coarse_figures")
@pytest.mark.parametrize("task", ENDPOINTS)
def test_from_the_label_table_to_the_scores_of_an_external_cohort(task, train, script, cohort, external, tmp_path):
    endpoint, run, out = ENDPOINTS[task], tmp_path / "run", tmp_path / "out"
    outcome = train(task)
    assert outcome.code == 0, outcome.err
    outputs = json.loads((run / "outputs.json").read_text())
    assert (outputs["task"], outputs["n_slides"], outputs["n_cases"]) == (task, PATIENTS, PATIENTS)
    assert outputs["pooled"][endpoint.metric] > endpoint.least, "it learns what is there"
    low, high = outputs["intervals_95"][endpoint.metric]
    assert low < outputs["pooled"][endpoint.metric] < high
    assert {f"{name}.png" for name in (*endpoint.figures, "learning_curves")} <= {path.name for path in run.iterdir()}
    assert load_checkpoint(run / "fold_1_best.pth").task.record["task"] == task
    if task == "multilabel":
        written, given = pd.read_csv(run / "predictions.csv"), pd.read_csv(cohort[0])
        assert known(written) == known(given), "what is unknown stays empty"

    scored = script(
        "predict", "--checkpoint", run, "--input_dir", external[1], "--labels_csv", external[0], "--output_dir", out,
        "--device", "cpu",
    )  # fmt: skip
    assert scored.code == 0, scored.err
    scores = json.loads((out / "scores.json").read_text())
    assert scores["pooled"][endpoint.metric] > endpoint.least
    assert {f"{name}.png" for name in endpoint.figures} <= {path.name for path in out.iterdir()}
    record = json.loads((out / "P00_prediction.json").read_text())
    predicted = pd.read_csv(out / "predictions.csv").set_index("wsi_id").loc["P00"]
    for name, value in record[endpoint.values_key].items():
        assert predicted[f"prob_{name}"] == pytest.approx(value)
    again = script("predict", "--out_of_fold", run, "--output_dir", tmp_path / "again", "--device", "cpu")
    assert f"are those of {run / 'predictions.csv'}" in again.out, again.err


@pytest.mark.usefixtures("coarse_figures")
@pytest.mark.parametrize("task", ENDPOINTS)
def test_a_run_goes_on_to_the_same_bytes_is_compared_and_drawn(task, train, script, external, monkeypatch, tmp_path):
    short, drawn = ("--epochs", 2), tmp_path / "drawn"
    assert train(task, *short, name="expected").code == 0
    with monkeypatch.context() as patch:
        patch.setattr("utils.learning.cross_validation.write_results", lambda *_: exit(9))
        train(task, *short, name="resumed")
    assert train(task, *short, name="resumed").code == 0
    assert_same(contents(tmp_path / "resumed"), contents(tmp_path / "expected"))

    assert train(task, *short, "--lr", "1e-3", name="other").code == 0
    compared = script(
        "utils.compare", tmp_path / "expected", tmp_path / "other", "--output_dir", tmp_path / "comparison"
    )
    assert compared.code == 0, compared.err
    assert ENDPOINTS[task].metric in pd.read_csv(tmp_path / "comparison" / "comparison.csv")["metric"].tolist()
    assert (tmp_path / "comparison" / "roc.png").exists() is (task == "multilabel")

    flags = ("--checkpoint", tmp_path / "expected" / "fold_1_best.pth", "--output_dir", drawn, "--device", "cpu")
    outcome = script("predict", *flags, "--input", external[1] / "P01.h5", "--visualize")
    assert outcome.code == 0, outcome.err
    assert (drawn / "P01_evidence.png").exists()
    record = json.loads((drawn / "P01_prediction.json").read_text())
    caption, values = Caption.of(record), record[ENDPOINTS[task].values_key]
    with np.load(drawn / "P01_attention.npz") as arrays:
        assert arrays[ENDPOINTS[task].values_key].tolist() == list(values.values())
        assert arrays["class_names" if task == "ordinal" else "value_names"].tolist() == list(values)
    if task == "ordinal":
        assert caption.answer.startswith(f"{record['predicted_class']} (median, ")
        assert caption.marked == (record["predicted_class"],)
        assert caption.evidence.startswith("expected value of grade ")
    else:
        assert set(caption.marked) == {name for name, value in values.items() if value >= 0.5}
    evidence = record["evidence"]
    names = ["grade"] if task == "ordinal" else list(LABELS)
    assert list(evidence[ENDPOINTS[task].quantity]) == names
    for name in names:
        total = sum(evidence[part][name] for part in ("reference", "for", "against"))
        assert total == pytest.approx(evidence[ENDPOINTS[task].quantity][name], abs=1e-4)


def test_of_several_labels_none_is_taken_for_the_numbers_of_patches(train, script, external, tmp_path):
    assert train("multilabel", "--epochs", 1).code == 0
    outcome = script(
        "predict", "--checkpoint", tmp_path / "run", "--input_dir", external[1], "--output_dir", tmp_path / "out",
        "--device", "cpu", "--annotations", "inst_labels",
    )  # fmt: skip
    assert outcome.code == 1
    assert "which of A, B do its numbers stand for? Give --annotation_class 1=B" in outcome.errors[0]


@pytest.mark.parametrize("task", ENDPOINTS)
def test_the_cohort_is_audited_by_the_strata_of_the_task(task, script, cohort, train):
    audited = script("utils.audit", "--labels_csv", cohort[0], "--features_dir", cohort[1], *ENDPOINTS[task].flags)
    assert audited.code == 0, audited.err
    assert ("low 12 slides of 12 patients" if task == "ordinal" else "A in 9 slides of 9 patients") in audited.out
    dry = train(task, "--dry_run")
    assert dry.code == 0, dry.err
    assert "Nothing was trained" in dry.out


@pytest.mark.parametrize(("task", "column", "value", "message"), [
    ("ordinal", "grade", "medium", "1 row with a grade that is none of low, mid, high: P00 ('medium')"),
    ("multilabel", "A", "2", "1 row with a target that cannot be used (A, B must be 1, 0 or empty, and not all of"),
])  # fmt: skip
def test_a_target_that_cannot_be_used_is_named(task, column, value, message, train, cohort, tmp_path):
    check_target_is_named(train, cohort, tmp_path, task, column, value, message)


@pytest.mark.parametrize(("flags", "message"), [
    (("--task", "ordinal", "--target_column", "grade"), "--task ordinal: give --order, the grades, the lowest first"),
    (("--task", "multilabel"), "--task multilabel: give --target_columns, columns of the label table"),
    (("--order", "a,b,c"), "--order a,b,c: goes with --task ordinal"),
    (("--target_column", "grade"), "--target_column grade: goes with --task regression or ordinal"),
    (("--task", "multilabel", "--target_columns", "A,,B"), "--target_columns A,,B: a name is empty"),
    (("--task", "multilabel", "--target_columns", "A"), "--task multilabel: labels A; several labels are"),
    (("--task", "ordinal", "--target_column", "grade", "--order", "low,high"), "grades low, high; an order needs"),
    (("--task", "multilabel", "--target_columns", "A,Q"), "no column Q to predict"),
])  # fmt: skip
def test_flags_that_do_not_go_together(flags, message, script, cohort, tmp_path):
    check_flags_are_refused(script, cohort, tmp_path, flags, message)
