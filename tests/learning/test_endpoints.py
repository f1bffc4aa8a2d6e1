"""Numbers and survival from the label table to the scores of an external cohort."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from tests.learning.endpoints import (
    Endpoint,
    check_flags_are_refused,
    check_target_is_named,
    cohort_fixture,
    train_fixture,
)
from tests.learning.runs import assert_same, contents
from utils.bags.store import Bag, write_bag
from utils.core.errors import CheckpointError, ConfigError
from utils.core.recipe import Recipe
from utils.evaluation import prediction_figures
from utils.mil_dataset import MILDataset
from utils.pictures.prediction_caption import Caption
from utils.prediction.checkpoint import load_checkpoint
from utils.prediction.trained_model import check_alike
from utils.tasks.classification import Classification
from utils.tasks.ordinal import Ordinal
from utils.tasks.regression import Regression

PATIENTS, DIM = 40, 8
ENDPOINTS = {
    "regression": Endpoint(("--task", "regression", "--target_column", "share"), "r2", 0.3, ("scatter",)),
    "survival": Endpoint(
        ("--task", "survival", "--time_column", "days", "--event_column", "died"),
        "c_index",
        0.57,
        ("kaplan_meier", "survival_calibration"),
    ),
}


def write_patients(folder: Path, seed: int) -> tuple[Path, Path]:
    """Synthetic patients of one or two slides: feature 0 of a slide's patches says its share, and how soon they die."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(PATIENTS):
        share = rng.random()
        days, followed = rng.exponential(1000 * np.exp(-4 * share)), rng.uniform(50, 1500)
        for slide in range(1 + patient % 2):
            name = f"P{patient:02d}-{slide}"
            features = rng.standard_normal((int(rng.integers(5, 15)), DIM)).astype(np.float32)
            features[:, 0] += 3 * share
            write_bag(folder / "features" / f"{name}.h5", Bag(features))
            rows.append((f"P{patient:02d}", name, share, min(days, followed) + 1, int(days <= followed)))
    pd.DataFrame(rows, columns=["case_id", "wsi_id", "share", "days", "died"]).to_csv(
        folder / "labels.csv", index=False
    )
    return folder / "labels.csv", folder / "features"


cohort, external = cohort_fixture(write_patients, 0), cohort_fixture(write_patients, 1)
train = train_fixture(ENDPOINTS)


@pytest.mark.usefixtures("coarse_figures")
@pytest.mark.parametrize("task", ENDPOINTS)
def test_from_the_label_table_to_the_scores_of_an_external_cohort(task, train, script, external, tmp_path, monkeypatch):
    endpoint = ENDPOINTS[task]
    outcome = train(task)
    assert outcome.code == 0, outcome.err
    assert "class" not in outcome.out + outcome.err, "there are none"
    run = tmp_path / "run"
    outputs = json.loads((run / "outputs.json").read_text())
    assert (outputs["task"], outputs["n_slides"], outputs["n_cases"]) == (task, 60, PATIENTS)
    assert outputs["cases"]["n_several_slides"] == PATIENTS // 2
    assert outputs["pooled"][endpoint.metric] > endpoint.least, "it learns what is there"
    assert not {"center", "scale", "edges", "operating_point"} & outputs.keys(), "they mean nothing for all folds"
    assert outputs["pooled_thresholded"] is None
    low, high = outputs["cases"]["intervals_95"][endpoint.metric]
    assert low < outputs["cases"]["pooled"][endpoint.metric] < high
    assert {f"{name}.png" for name in (*endpoint.figures, "learning_curves")} <= {path.name for path in run.iterdir()}
    assert "Report the figures of patients: 20 patients of 40 have several slides" in outcome.out
    cases = pd.read_csv(run / "predictions_cases.csv")
    assert len(cases) == PATIENTS
    table = pd.read_csv(run / "predictions.csv")
    assert cases.set_index("case_id").loc["P01"].get("predicted", 0) == pytest.approx(
        table[table["case_id"] == "P01"].get("predicted", pd.Series([0])).mean()
    )

    # Each fold's model knows what it was fitted to, and a run gives its own values again.
    checkpoint = load_checkpoint(run / "fold_1_best.pth")
    assert checkpoint.task.record["task"] == task
    again = script("predict", "--out_of_fold", run, "--output_dir", tmp_path / "again", "--device", "cpu")
    assert again.code == 0, again.err
    assert f"The values are those of {run / 'predictions.csv'}" in again.out

    labels, features = external
    drawn, draw = [], prediction_figures.prediction_figures
    monkeypatch.setattr(prediction_figures, "prediction_figures", lambda rows: drawn.append(rows) or draw(rows))
    scored = script(
        "predict", "--checkpoint", run, "--input_dir", features, "--labels_csv", labels,
        "--output_dir", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert scored.code == 0, scored.err
    assert "class" not in scored.out + scored.err
    assert (drawn[0].decisions is not None) == (task == "survival"), "risk groups are drawn"
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["pooled"][endpoint.metric] > endpoint.least
    assert not {"center", "scale", "edges", "operating_point", "threshold"} & scores.keys()
    assert scores["pooled_thresholded"] is None
    assert scores["cases"]["n_several_slides"] == PATIENTS // 2
    assert {f"{name}.png" for name in endpoint.figures} <= {path.name for path in (tmp_path / "out").iterdir()}
    first = json.loads((tmp_path / "out" / "P00-0_prediction.json").read_text())
    predicted = pd.read_csv(tmp_path / "out" / "predictions.csv").set_index("wsi_id").loc["P00-0"]
    own = pd.read_csv(labels).set_index("wsi_id").loc["P00-0"]
    for column in ("share",) if task == "regression" else ("days", "died"):
        assert predicted[column] == pytest.approx(own[column])
    assert ("risk_group" in first) is (task == "survival")
    for name, value in first["values"].items():
        column = "predicted" if task == "regression" else name
        assert predicted[column] == pytest.approx(value)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<label hidden>") == 2, "no class is chosen, right or wrong"
    refused = script(
        "predict",
        "--checkpoint",
        run,
        "--input",
        features / "P00-0.h5",
        "--output_dir",
        tmp_path / "no",
        "--faithfulness",
    )
    assert refused.code == 1
    assert "--faithfulness: measures how a class's probability falls" in refused.errors[0]


@pytest.mark.usefixtures("coarse_figures")
@pytest.mark.parametrize("task", [pytest.param("regression", marks=pytest.mark.slow), "survival"])
def test_a_run_goes_on_to_the_same_bytes_and_several_jobs_give_them_too(task, train, monkeypatch, tmp_path):
    short = ("--epochs", 3)
    assert train(task, *short, name="expected").code == 0
    expected = contents(tmp_path / "expected")
    with monkeypatch.context() as patch:
        patch.setattr("utils.learning.results.write_results", lambda *_: exit(9))
        patch.setattr("utils.learning.cross_validation.write_results", lambda *_: exit(9))
        train(task, *short, name="resumed")
    assert train(task, *short, name="resumed").code == 0
    assert_same(contents(tmp_path / "resumed"), expected)
    assert train(task, *short, "--jobs", 2, name="jobs").code == 0
    assert_same(contents(tmp_path / "jobs"), expected)


@pytest.mark.parametrize("task", ENDPOINTS)
def test_shuffled_targets_give_chance(task, train, cohort, tmp_path):
    table = pd.read_csv(cohort[0])
    columns, rng = ["share", "days", "died"], np.random.default_rng(7)
    patients = table.groupby("case_id", sort=False)[columns].first()
    shuffled = patients.iloc[rng.permutation(len(patients))].set_axis(patients.index)
    table[columns] = shuffled.loc[table["case_id"]].to_numpy()
    table["died"] = table["died"].astype(int)
    table.to_csv(tmp_path / "shuffled.csv", index=False)
    assert train(task, labels=tmp_path / "shuffled.csv").code == 0
    figures = json.loads((tmp_path / "run" / "outputs.json").read_text())["cases"]["pooled"]
    assert figures[ENDPOINTS[task].metric] < (0.1 if task == "regression" else 0.65)


@pytest.mark.parametrize(("task", "column", "value", "message"), [
    ("survival", "days", "-4", "1 row with a target that cannot be used (days must be a number above 0"),
    ("survival", "died", "", "1 row with a target that cannot be used"),
    ("regression", "share", "high", "1 row with a target that cannot be used (share must be a number): P00-0 ('high')"),
])  # fmt: skip
def test_a_target_that_cannot_be_used_is_named(task, column, value, message, train, cohort, tmp_path):
    labels = check_target_is_named(train, cohort, tmp_path, task, column, value, message)
    dry = train(task, "--allow", "unknown", "--dry_run", labels=labels)
    assert dry.code == 0, dry.err
    assert "warning  1 slide with a target that cannot be used" in dry.out


@pytest.mark.parametrize(("flags", "message"), [
    (("--task", "survival", "--time_column", "days"), "no column event to predict"),
    (("--task", "regression"), "--task regression: give --target_column"),
    (("--target_column", "share"), "--target_column share: goes with --task regression"),
    (("--task", "regression", "--target_column", "shares"), "no column shares to predict"),
    (("--task", "regression", "--target_column", "share", "--class_names", "a", "b"), "a regression has no classes"),
    (("--task", "regression", "--target_column", "share", "--monitor", "auc"), "a regression has loss, r2, mae"),
    (("--task", "regression", "--target_column", "share", "--operating_point", "sensitivity=0.9"), "needs two classes"),
])  # fmt: skip
def test_flags_that_do_not_go_together(flags, message, script, cohort, tmp_path):
    check_flags_are_refused(script, cohort, tmp_path, flags, message)


def test_several_models_answer_by_what_each_was_fitted_to(train, script, external, tmp_path):
    """The folds' models learn in the units of their own training slides."""
    assert train("regression", "--epochs", 3).code == 0
    paths = [tmp_path / "run" / f"fold_{fold}_best.pth" for fold in (1, 2)]
    slide, answers = external[1] / "P01-0.h5", {}
    for name, checkpoints in {"one": paths[:1], "two": paths[1:], "both": paths, "reverse": paths[::-1]}.items():
        outcome = script(
            "predict",
            "--checkpoint",
            *checkpoints,
            "--input",
            slide,
            "--output_dir",
            tmp_path / name,
            "--device",
            "cpu",
        )
        assert outcome.code == 0, outcome.err
        record = json.loads((tmp_path / name / "P01-0_prediction.json").read_text())
        answers[name] = [value["share"] for value in record["member_values"]]
    assert answers["both"] == pytest.approx(answers["one"] + answers["two"])
    assert sorted(answers["reverse"]) == pytest.approx(sorted(answers["both"]))


def test_a_patient_with_two_outcomes_is_named(train, cohort, tmp_path):
    table = pd.read_csv(cohort[0])
    table.loc[table["wsi_id"] == "P01-1", "days"] += 1
    table.to_csv(tmp_path / "labels.csv", index=False)
    outcome = train("survival", labels=tmp_path / "labels.csv")
    assert outcome.code == 1
    assert "patient P01 has two outcomes" in outcome.errors[0]
    dry = train("survival", "--dry_run", labels=tmp_path / "labels.csv")
    assert "patient P01 has two outcomes" in dry.out


@pytest.mark.parametrize(("task", "n_inner"), [("regression", 4), ("survival", 2)])
def test_strata_are_not_called_classes(task, n_inner, train, tmp_path):
    dry = train(task, "--dry_run", "--n_inner", n_inner)
    assert dry.code == 0, dry.err
    assert "class" not in dry.out + dry.err
    assert "inner folds validate on one patient of a stratum or none" in dry.err
    short = train(task, "--n_outer", 15)
    assert "with stratum '" in short.errors[0]
    assert "class" not in short.errors[0]


@pytest.mark.parametrize(("task", "change", "message"), [
    ("regression", {"share": "high"}, "no row has a target that can be used"),
    ("survival", {"died": "0"}, "no row has an event (1 in died)"),
])  # fmt: skip
def test_the_audit_says_what_no_training_can_use(task, change, message, train, cohort, tmp_path):
    pd.read_csv(cohort[0], dtype=str).assign(**change).to_csv(tmp_path / "labels.csv", index=False)
    assert message in train(task, "--dry_run", labels=tmp_path / "labels.csv").out


def test_a_column_that_predictions_have_too_is_no_target(train, cohort, script, tmp_path):
    pd.read_csv(cohort[0]).rename(columns={"share": "fold"}).to_csv(tmp_path / "labels.csv", index=False)
    outcome = script(
        "train", "--mil", "LiteMIL", "--dataset", "mine", "--labels_csv", tmp_path / "labels.csv", "--features_dir",
        cohort[1], "--task", "regression", "--target_column", "fold", "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert outcome.code == 1
    assert "fold is also a column of predictions.csv" in outcome.errors[0]


def test_classes_beside_another_task_are_refused(cohort):
    with pytest.raises(ConfigError, match="the task is a regression, which has no classes"):
        MILDataset(*cohort, ("a", "b"), task=Regression("share"))


def test_models_of_different_tasks_are_not_averaged():
    names = ("low", "mid", "high")
    models = [
        SimpleNamespace(
            path=Path(task.kind), recipe=Recipe(),
            checkpoint=SimpleNamespace(task=task, class_names=names, model={"input_dim": 8}),
        )
        for task in (Classification(names), Ordinal("grade", names))
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="its targets are"):
        check_alike(models)


def test_a_risk_is_called_high_or_low(train, script, external, tmp_path):
    """By the median of the risks that the model was validated on; of several models, each of which has its own, not."""
    assert train("survival", "--epochs", 3).code == 0
    paths = [tmp_path / "run" / f"fold_{fold}_best.pth" for fold in (1, 2)]
    flags = ("--labels_csv", external[0], "--device", "cpu", "--input_dir", external[1])
    outcome = script("predict", "--checkpoint", paths[0], *flags, "--output_dir", tmp_path / "one")
    assert outcome.code == 0, outcome.err
    median = load_checkpoint(paths[0]).selection["median_risk"]
    table = pd.read_csv(tmp_path / "one" / "predictions.csv")
    assert (table["risk_group"] == np.where(table["risk"] > median, "high risk", "low risk")).all()
    assert table["risk_group"].nunique() == 2
    slide = table.iloc[0]
    record = json.loads((tmp_path / "one" / f"{slide['wsi_id']}_prediction.json").read_text())
    assert record["risk_group"] == slide["risk_group"]
    assert Caption.of(record).answer.endswith(f"; {slide['risk_group']}")
    facts = dict(Caption.of(record).facts)
    assert facts["risk group"] == f"{slide['risk_group']}; median risk of inner validation {median:.4g}"
    alone = script("predict", "--checkpoint", paths[0], "--input", external[1] / f"{slide['wsi_id']}.h5",
                   "--output_dir", tmp_path / "alone", "--device", "cpu")  # fmt: skip
    assert f"; {slide['risk_group']}" in alone.out
    both = script("predict", "--checkpoint", *paths, *flags, "--output_dir", tmp_path / "both")
    assert both.code == 0, both.err
    assert pd.read_csv(tmp_path / "both" / "predictions.csv")["risk_group"].isna().all()
    again = script("predict", "--out_of_fold", tmp_path / "run", "--output_dir", tmp_path / "again", "--device", "cpu")
    assert again.code == 0, again.err
    own = pd.read_csv(tmp_path / "run" / "predictions.csv").set_index("wsi_id")
    other = pd.read_csv(tmp_path / "again" / "predictions.csv").set_index("wsi_id").loc[own.index]
    assert ((other["risk_group"] == "high risk") == own["high_risk"]).all()
    assert (other[["days", "died"]] == own[["days", "died"]]).all().all()
