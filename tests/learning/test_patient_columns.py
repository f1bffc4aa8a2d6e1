"""Covariates and subgroups of a run, for every task: what is written, and that test slides have no say in answers."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.cohort import synthetic_bag
from tests.conftest import SHARED
from tests.learning.runs import leave_unfinished, make_cv, small
from utils.bags.store import write_bag
from utils.core.errors import ConfigError, LabelsError
from utils.evaluation.closing_table import closing_text
from utils.evaluation.predictions import Predictions
from utils.evaluation.subgroups import subgroup_figures
from utils.learning.covariates import ALONE, BOTH, SLIDES, compared_predictions
from utils.learning.inner_predictions import FILE, InnerPredictions
from utils.mil_dataset import MILDataset
from utils.tasks.multilabel import Multilabel
from utils.tasks.ordinal import Ordinal
from utils.tasks.regression import Regression
from utils.tasks.survival import Survival

PATIENTS, DIM = 48, 8
TASKS = {
    "classification": (None, "auc"),
    "regression": (Regression("share"), "r2"),
    "survival": (Survival("days", "died"), "c_index"),
    "ordinal": (Ordinal("grade", ("low", "mid", "high")), "quadratic_kappa"),
    "multilabel": (Multilabel(("A", "B")), "auc"),
}
BOTH_FLAGS = {"covariates": "age,sex", "subgroups": "sex,age"}


@pytest.fixture(scope="session")
def patients(tmp_path_factory) -> tuple[Path, Path]:
    """Patients of one or two slides without any signal, whose age tells every target, and a fifth of whose sexes is
    unknown.
    """
    folder, rng = tmp_path_factory.mktemp("patients"), np.random.default_rng(0)
    rows = []
    for patient in range(PATIENTS):
        share = rng.random()
        age = round(60 + 30 * (share - 0.5 + 0.2 * rng.standard_normal()), 1)
        target = {
            "label": "yes" if share > 0.5 else "no", "share": share, "days": 1000 * np.exp(-3 * share) + rng.random(),
            "died": int(rng.random() < 0.7), "grade": ("low", "mid", "high")[int(3 * share)], "A": int(share > 0.5),
            "B": "" if patient % 7 == 0 else int(share > 0.6),
        }  # fmt: skip
        sex = "" if patient % 5 == 0 else "fm"[patient % 2]
        for slide in range(1 + patient % 2):
            name = f"P{patient:02d}-{slide}"
            bag = synthetic_bag(name, rng.standard_normal((6, DIM)).astype(np.float32), rng)
            write_bag(folder / "features" / f"{name}.h5", bag)
            rows.append({"case_id": f"P{patient:02d}", "wsi_id": name, **target, "age": age, "sex": sex})
    pd.DataFrame(rows).to_csv(folder / "labels.csv", index=False)
    return folder / "labels.csv", folder / "features"


def cv_of(patients, kind: str, folder: Path, **changes):
    dataset = MILDataset(*patients, task=TASKS[kind][0])
    model = partial(small, input_dim=DIM, num_classes=dataset.task.num_logits)
    return make_cv(dataset, folder, model, **({"n_outer": 3, "n_inner": 2, "final": "ensemble"} | BOTH_FLAGS | changes))


@pytest.fixture(scope="session")
def ended(patients, tmp_path_factory):
    """A run with covariates and subgroups, by task."""
    runs = {}

    def run(kind: str):
        if kind not in runs:
            cv = cv_of(patients, kind, tmp_path_factory.mktemp("runs") / kind)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("utils.learning.run_figures.draw_figures", lambda *_: [])
                cv.run()
            runs[kind] = cv
        return runs[kind]

    return run


@pytest.mark.parametrize("kind", TASKS)
def test_covariates_that_tell_the_target_do_better_than_slides_that_do_not(kind, ended):
    cv = ended(kind)
    results = json.loads((cv.output_dir / "outputs.json").read_text())
    content, metric = results["covariates"], TASKS[kind][1]
    assert content["columns"][0] == {"name": "age", "kind": "number", "missing": 0}
    assert content["columns"][1] == {"name": "sex", "kind": "words", "missing": 10}
    figures = {
        name: (model["within_folds"] if model["within_folds"].get(metric) is not None else model["pooled"])[metric]
        for name, model in content["models"].items()
    }
    assert list(figures) == [BOTH, ALONE, SLIDES]
    assert figures[ALONE] > figures[SLIDES] + 0.1
    assert figures[BOTH] > figures[SLIDES] + 0.1
    (pair,) = [d for d in content["differences"] if (d["first"], d["second"], d["metric"]) == (ALONE, SLIDES, metric)]
    assert pair["difference"] == pytest.approx(figures[ALONE] - figures[SLIDES])
    assert pair["low"] < pair["difference"] < pair["high"]
    table = pd.read_csv(cv.output_dir / "predictions_covariates.csv")
    slides = table[table["model"] == SLIDES].drop(columns="model").reset_index(drop=True)
    of_run = pd.read_csv(cv.output_dir / "predictions.csv")
    for name in slides.columns:
        expected = of_run.sort_values(["repeat", "wsi_id"]).reset_index(drop=True)[name]
        pd.testing.assert_series_equal(slides[name], expected)
    assert set(table["model"]) == {BOTH, ALONE, SLIDES}


@pytest.mark.parametrize("kind", TASKS)
def test_every_group_has_its_figures_and_patients(kind, ended):
    cv = ended(kind)
    results = json.loads((cv.output_dir / "outputs.json").read_text())
    groups = results["subgroups"]["sex"]
    assert {name: (group["n_cases"], group["n_slides"]) for name, group in groups.items()} == {
        "f": (19, 19), "m": (19, 38), "unknown": (10, 15),
    }  # fmt: skip
    predictions = Predictions.read(cv.output_dir / "predictions.csv", 0, cv.dataset.task)
    men = {row.wsi_id for row in cv.dataset.rows if row.columns["sex"] == "m"}
    of_men = predictions.where(np.isin(predictions.slides, list(men))).by_case()
    assert groups["m"]["pooled"] == pytest.approx(of_men.metrics)
    assert len(results["subgroups"]["age"]) == 2, "at the median"
    table = pd.read_csv(cv.output_dir / "subgroups.csv")
    assert len(table) == 5 * len(cv.dataset.task.metric_names)
    text = closing_text(results)
    assert "Covariates age, sex (unknown for 10)" in text
    assert "sex: unknown" in text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", TASKS)
def test_a_group_of_few_patients_has_reasons_instead_of_intervals(kind, ended):
    cv = ended(kind)
    predictions = Predictions.read(cv.output_dir / "predictions.csv", 0, cv.dataset.task)
    numbers = np.unique(predictions.cases, return_inverse=True)[1]
    groups = {str(count): numbers < count for count in (1, 2, 4)}
    for figures in subgroup_figures(predictions, {"few": groups})["few"].values():
        assert not any(figures["intervals_95"].values())
        assert all(reason.startswith("none: ") for reason in figures["interval_methods"].values())


def test_a_finished_run_gets_them_without_training(patients, tmp_path, no_figures, monkeypatch):
    first = cv_of(patients, "classification", tmp_path / "run", covariates=None, subgroups=None)
    before = first.run()
    assert "covariates" not in before
    monkeypatch.setattr("utils.learning.jobs.fit", lambda *_, **__: pytest.fail("trained again"))
    after = cv_of(patients, "classification", tmp_path / "run").run()
    assert {name: after[name] for name in before} == before
    assert after["covariates"]["columns"][0]["name"] == "age"
    (tmp_path / "run" / FILE).unlink()
    with pytest.raises(ConfigError, match=rf"{FILE}: not there or damaged .*; train again into another --output_dir"):
        cv_of(patients, "classification", tmp_path / "run").run()


@pytest.mark.parametrize(
    "settings", [{"final": "refit", "repeats": 2}, {"final": "all", "grid": "lr=1e-2,1e-3"}, {"class_weights": "none"}]
)
def test_of_any_tested_model(settings, patients, tmp_path, no_figures):
    cv = cv_of(patients, "classification", tmp_path / "run", **({"n_outer": 2} | settings))
    results = cv.run()
    tested = pd.read_csv(cv.output_dir / FILE).query("subset == 'test' and fold == 1")
    assert tested["model"].nunique() == (1 if "final" in settings else cv.protocol.n_inner)
    assert results["covariates"]["models"][ALONE]["within_folds"]["auc"] > 0.7
    repeats = settings.get("repeats", 1)
    table = pd.read_csv(cv.output_dir / "predictions_covariates.csv")
    assert len(table) == 3 * repeats * len(cv.dataset)
    assert table[["prob_no", "prob_yes"]].sum(axis=1).to_numpy() == pytest.approx(np.ones(len(table)))


def test_a_killed_run_ends_with_the_same_bytes(patients, ended, tmp_path, no_figures):
    cv = cv_of(patients, "classification", tmp_path / "run")
    leave_unfinished(cv)
    cv.run()
    for name in ("predictions_covariates.csv", "subgroups.csv", FILE, "outputs.json"):
        assert (cv.output_dir / name).read_bytes() == (ended("classification").output_dir / name).read_bytes(), name


def test_the_command_shows_what_is_unknown_before_and_the_tables_after(patients, script, tmp_path, no_figures):
    flags = (
        "train", "--mil", "meanPool", "--dataset", "mine", "--labels_csv", patients[0], "--features_dir", patients[1],
        "--output_dir", tmp_path / "run", "--n_outer", 2, "--n_inner", 2, "--epochs", 2, "--device", "cpu",
        "--covariates", "age,sex", "--subgroups", "sex",
    )  # fmt: skip
    planned = script(*flags, "--dry_run")
    assert "--covariates sex: 2 words, unknown for 10 of 48 patients" in planned.err
    assert not (tmp_path / "run").exists()
    outcome = script(*flags)
    assert (outcome.code, planned.code) == (0, 0)
    assert "slides and covariates - covariates alone" in outcome.out
    assert "sex: unknown        10      15" in outcome.out


def test_columns_are_checked_before_anything_is_trained(patients, tmp_path):
    with pytest.raises(LabelsError, match=r"labels.csv: --covariates agee: no such column; .*; did you mean age"):
        cv_of(patients, "classification", tmp_path / "run", covariates="agee")
    with pytest.raises(ConfigError, match="--subgroups sex,,age: a name is empty"):
        cv_of(patients, "classification", tmp_path / "run", subgroups="sex,,age")


@pytest.mark.parametrize("kind", TASKS)
def test_test_slides_have_no_say_in_their_answers(kind, ended):
    """Other targets and covariates of the test slides, and other answers of theirs, change no other slide's answer."""
    cv = ended(kind)
    data, fold = cv.dataset, cv.folds()[0]
    predictions = Predictions.read(cv.output_dir / "predictions.csv", 0, data.task)
    inner = InnerPredictions.read(cv.output_dir, data.task)

    def answers(data, columns, inner):
        runs = compared_predictions(predictions, inner, columns, data, [fold], is_balanced=True)
        rows = predictions.folds == fold.number
        return {name: dict(zip(run.slides[rows], run.values[rows], strict=True)) for name, run in runs.items()}

    before = answers(data, cv.columns.covariates, inner)
    kept, changed = data.rows[fold.test[0]].wsi_id, fold.test[1:]
    others = np.random.default_rng(0).permutation(len(data))[: len(changed)]
    labels, columns = data.labels.copy(), []
    labels[changed] = labels[others]
    for column in cv.columns.covariates:
        values = column.values.copy()
        values[changed] = 1e6 if column.is_number else "x"
        columns.append(replace(column, values=values))
    relabelled = MILDataset(data.labels_csv, data.features_dir, task=TASKS[kind][0])
    relabelled.labels = labels
    ids = [data.rows[slide].wsi_id for slide in changed]
    values = inner.rows.values.copy()
    is_changed = (inner.rows.folds == fold.number) & ~inner.is_validation & np.isin(inner.rows.slides, ids)
    values[is_changed] = values[is_changed][::-1]
    after = answers(relabelled, columns, replace(inner, rows=replace(inner.rows, values=values)))
    for name in (ALONE, BOTH):
        np.testing.assert_array_equal(before[name][kept], after[name][kept])
        assert any((before[name][wsi_id] != after[name][wsi_id]).any() for wsi_id in ids), "the test does change them"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"real data not there: {SHARED}")
def test_stage_tells_the_survival_of_real_patients(tmp_path, no_figures):
    """Of 434 patients with a lung adenocarcinoma, as is known."""
    folder = SHARED / "cohorts" / "hif"
    table = pd.read_csv(folder / "labels.csv", dtype=str, keep_default_na=False)
    table[table["label"] == "LUAD"].to_csv(tmp_path / "labels.csv", index=False)
    task = Survival("os_days", "os_event")
    data = MILDataset(tmp_path / "labels.csv", folder / "features", task=task, allow=("unknown", "spelling"))
    model = partial(small, "meanPool", input_dim=data.input_dim, num_classes=data.task.num_logits)
    results = make_cv(data, tmp_path / "run", model, covariates="stage,age", subgroups="gender").run()
    alone = results["covariates"]["models"][ALONE]
    assert alone["within_folds"]["c_index"] > 0.62
    assert alone["within_folds_intervals_95"]["c_index"][0] > 0.55
    assert {name: group["n_cases"] for name, group in results["subgroups"]["gender"].items()} == {
        "FEMALE": 235, "MALE": 199,
    }  # fmt: skip
