"""Patients as bags, from the label table to a map of each slide."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.cohort import write_cohort
from tests.learning.runs import assert_same, contents
from utils.compare import check_metrics, compare
from utils.core.files import write_text
from utils.learning.finished_runs import read_runs
from utils.prediction.predictor import SlidePredictor
from utils.prediction.slide_prediction import parts_of

SMALL = (
    "--n_outer", 3, "--n_inner", 2, "--epochs", 3, "--hidden_dim", 16, "--num_heads", 2, "--device", "cpu",
    "--chunk_size", 40,
)  # fmt: skip


@pytest.fixture
def train(script, cohort, tmp_path):
    labels, features = cohort

    def run(*flags, name: str = "run", table: Path | None = None):
        return script(
            "train", "--mil", "LiteMIL", "--dataset", "mine", "--labels_csv", table or labels, "--features_dir",
            features, "--output_dir", tmp_path / name, *SMALL, *flags,
        )  # fmt: skip

    return run


@pytest.fixture
def predict(script, tmp_path):
    def run(*flags, name: str = "out"):
        return script("predict", "--output_dir", tmp_path / name, "--device", "cpu", *flags)

    return run


def records(folder: Path) -> dict[str, dict]:
    return {path.stem.removesuffix("_prediction"): json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.usefixtures("blank_figures")
def test_patients_have_one_answer_each_and_a_map_for_each_slide(train, predict, cohort, tmp_path):
    labels, features = cohort
    outcome = train("--unit", "case")
    assert outcome.code == 0, outcome.err
    table, run = pd.read_csv(labels), tmp_path / "run"
    patients = table["case_id"].nunique()
    assert f"{len(table)} slides of {patients} patients, each patient's as one bag, tested once" in outcome.out
    outputs = json.loads((run / "outputs.json").read_text())
    assert (outputs["unit"], outputs["n_slides"], outputs["n_cases"]) == ("case", len(table), patients)
    assert outputs["cases"] is None
    assert sum(fold["n_slides"] for fold in outputs["fold_results"]) == len(table)
    assert all(fold["n_train"] == len(table) - fold["n_slides"] for fold in outputs["fold_results"])
    tested = pd.read_csv(run / "predictions.csv").set_index("wsi_id")
    assert sorted(tested.index) == sorted(table["case_id"].unique())

    # Every slide of a patient has the answer of the fold that did not see the patient.
    again = predict("--out_of_fold", run)
    assert again.code == 0, again.err
    assert f"are those of {run / 'predictions.csv'} (largest difference 0)" in again.out
    of_slide = {name: record for name, record in records(tmp_path / "out").items() if "slide" in record}
    assert sorted(of_slide) == sorted(table["wsi_id"])
    for case, slides in table.groupby("case_id")["wsi_id"]:
        own = [of_slide[slide] for slide in slides]
        for record in own:
            assert record["probabilities"]["malignant"] == pytest.approx(tested.loc[case, "prob_malignant"], abs=1e-6)
            assert record["case"]["slides"] == list(slides)
        assert sum(record["case"]["share"] for record in own) == pytest.approx(1, abs=1e-5)

    # Its maps compare the patches of all slides.
    slides = table[table["case_id"] == table["case_id"][0]]["wsi_id"].tolist()
    (tmp_path / "one").mkdir()
    for slide in slides:
        (tmp_path / "one" / f"{slide}.h5").write_bytes((features / f"{slide}.h5").read_bytes())
    drawn = predict(
        "--checkpoint", run, "--input_dir", tmp_path / "one", "--cases_csv", labels, "--visualize", "--allow",
        "missing", name="drawn",
    )  # fmt: skip
    assert drawn.code == 0, drawn.err
    for slide in slides:
        terms = json.loads((tmp_path / "drawn" / f"{slide}_prediction.json").read_text())["evidence"]
        for name, total in terms["log_odds"].items():
            parts = (terms[part][name] for part in ("reference", "for", "against", "other_slides"))
            assert sum(parts) == pytest.approx(total, abs=1e-4)
        page = (tmp_path / "drawn" / f"{slide}_report.html").read_text()
        assert f"all slides as one bag: {', '.join(slides)}" in page
        assert f"(answer for all {len(slides)} slides of patient {table['case_id'][0]})" in page
        assert "percentile within the patient&#39;s slides" in page or "percentile within the patient's slides" in page


@pytest.mark.usefixtures("coarse_figures")
def test_the_slides_of_a_table_are_scored_as_patients(train, predict, cohort, tmp_path):
    labels, features = cohort
    assert train("--unit", "case").code == 0
    checkpoint = tmp_path / "run"
    scored = predict("--checkpoint", checkpoint, "--input_dir", features, "--labels_csv", labels)
    assert scored.code == 0, scored.err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    table = pd.read_csv(labels)
    assert (scores["unit"], scores["n_slides"], scores["n_cases"]) == ("case", len(table), table["case_id"].nunique())
    assert f"{table['case_id'].nunique()} patients, each a bag of all slides." in scored.out

    # As a bag in memory, of the same patches in the same order.
    slides = table[table["case_id"] == table["case_id"][0]]["wsi_id"].tolist()
    predictor = SlidePredictor(checkpoint, device="cpu")
    paths = [features / f"{slide}.h5" for slide in slides]
    joined = predictor.predict_bags({path: predictor.bag(path) for path in paths}, case_id="P000", evidence=True)
    first = records(tmp_path / "out")[slides[0]]
    assert joined[0].probabilities[1] == pytest.approx(first["probabilities"]["malignant"])
    attention = np.concatenate([part.patch_attention for part in joined])
    assert attention.sum() == pytest.approx(1, abs=1e-5)
    assert [part.of_case.first for part in joined] == [0, len(joined[0].bag.features)]
    for part in joined:
        rows = slice(part.of_case.first, part.of_case.first + part.num_instances)
        assert np.array_equal(part.of_case.attention[rows], part.patch_attention)

    # A slide that a model was not trained on is seen with another one of its patient.
    bags = {path: part.bag for path, part in zip(paths, joined, strict=True)}
    seen = [part.seen_as for part in parts_of(joined[0], bags, ["", "slide"], "P000")]
    assert seen == ["case", "slide"]
    assert [part.seen_as for part in parts_of(joined[0], bags, ["", ""], "P000")] == ["", ""]

    # Nothing is predicted twice, until a slide of the patient changes.
    once_more = predict("--checkpoint", checkpoint, "--input_dir", features, "--labels_csv", labels)
    assert f"0 done, {len(table)} skipped" in once_more.out
    bag = paths[1].read_bytes()
    paths[1].write_bytes(bag)
    changed = predict("--checkpoint", checkpoint, "--input_dir", features, "--labels_csv", labels)
    assert "case_slides" in changed.err
    assert f"0 done, {len(table) - 2} skipped, 0 no tissue, 2 failed" in changed.out


@pytest.mark.usefixtures("coarse_figures")
def test_what_a_model_of_patients_refuses(train, predict, cohort, tmp_path):
    labels, features = cohort
    assert train("--unit", "case").code == 0
    inputs = "--checkpoint", tmp_path / "run", "--input_dir", features
    assert "which slides are one patient's? Give --cases_csv" in predict(*inputs).errors[0]
    table = pd.read_csv(labels)
    cases, fewer = tmp_path / "cases.csv", tmp_path / "fewer.csv"
    table[["case_id", "wsi_id"]][1:].to_csv(fewer, index=False)
    assert "no row for 1 slide of" in predict(*inputs, "--cases_csv", fewer).errors[0]
    write_text(cases, table[["case_id", "wsi_id"]].to_csv(index=False) + f"{table['case_id'][0]},unscanned\n")
    assert (
        "1 slide of these patients without a feature file: unscanned"
        in predict(*inputs, "--cases_csv", cases).errors[0]
    )
    assert predict(*inputs, "--cases_csv", cases, "--allow", "missing").code == 0
    write_text(cases, table[["case_id", "wsi_id"]].to_csv(index=False) + f"other,{table['wsi_id'][0]}\n")
    assert "is of patient P000 and of other" in predict(*inputs, "--cases_csv", cases).errors[0]
    assert "leave it out" in predict(*inputs, "--cases_csv", cases, "--faithfulness").errors[0]
    alone = predict("--checkpoint", tmp_path / "run", "--input", features / f"{table['wsi_id'][0]}.h5", name="alone")
    assert alone.code == 0
    assert "this slide is taken as all slides of its patient" in alone.err


@pytest.mark.usefixtures("coarse_figures")
def test_runs_of_slides_and_of_patients_share_their_splits(train, tmp_path, aloud):
    assert train(name="slides").code == 0
    assert train("--unit", "case", "--splits", tmp_path / "slides", name="cases").code == 0
    assert train("--splits", tmp_path / "cases", name="again").code == 0
    folds = {name: json.loads((tmp_path / name / "splits.json").read_text()) for name in ("slides", "cases", "again")}
    case_of = {slide: case for case, slides in folds["cases"]["slides_of_cases"].items() for slide in slides}
    for first, second, third in zip(*(folds[name]["folds"] for name in folds), strict=True):
        assert {case_of[slide] for slide in first["test"]} == set(second["test"])
        assert sorted(third["test"]) == sorted(first["test"])

    # Beside a run of patients, a run of slides is one of patients too, whose answers are averaged.
    runs = read_runs([tmp_path / "slides", tmp_path / "cases"])
    cases = pd.read_csv(tmp_path / "slides" / "predictions_cases.csv").sort_values("case_id")
    assert runs[0].predictions.values[:, 1].tolist() == pytest.approx(cases["prob_malignant"].tolist())
    (difference,) = compare(runs, ["auc"])
    assert (difference.unit, difference.is_primary) == ("patient", True)
    outputs = [json.loads((tmp_path / name / "outputs.json").read_text()) for name in ("slides", "cases")]
    expected = outputs[0]["cases"]["within_folds"]["auc"] - outputs[1]["within_folds"]["auc"]
    assert difference.difference == pytest.approx(expected)
    check_metrics(runs, ["auc", "brier"])


@pytest.mark.usefixtures("coarse_figures")
def test_a_run_of_patients_goes_on_to_the_same_bytes_and_several_jobs_give_them_too(train, monkeypatch, tmp_path):
    assert train("--unit", "case", name="expected").code == 0
    expected = contents(tmp_path / "expected")
    with monkeypatch.context() as patch:
        patch.setattr("utils.learning.cross_validation.write_results", lambda *_: exit(9))
        train("--unit", "case", name="resumed")
    assert train("--unit", "case", name="resumed").code == 0
    assert_same(contents(tmp_path / "resumed"), expected)
    assert train("--unit", "case", "--jobs", 2, name="jobs").code == 0
    assert_same(contents(tmp_path / "jobs"), expected)


@pytest.mark.usefixtures("blank_figures")
def test_a_slide_called_as_a_patient_is_split_with_the_patient(script, tmp_path):
    labels, features = write_cohort(tmp_path / "cohort")
    table = pd.read_csv(labels)
    for case in table["case_id"].unique():  # the first slide of each patient has the patient's name
        (features / f"{case}-S1.h5").rename(features / f"{case}.h5")
    table["wsi_id"] = table["wsi_id"].str.removesuffix("-S1")
    table.to_csv(labels, index=False)
    flags = "--mil", "LiteMIL", "--dataset", "mine", "--labels_csv", labels, "--features_dir", features, *SMALL
    cases = script("train", *flags, "--unit", "case", "--output_dir", tmp_path / "cases")
    assert cases.code == 0, cases.err
    slides = script("train", *flags, "--splits", tmp_path / "cases", "--output_dir", tmp_path / "slides")
    assert slides.code == 0, slides.err
    assert "tested by no fold" not in slides.err
    assert len(pd.read_csv(tmp_path / "slides" / "predictions.csv")) == len(table)


@pytest.mark.usefixtures("blank_figures")
def test_a_model_of_slides_takes_no_table_of_patients(train, predict, cohort, tmp_path):
    labels, features = cohort
    assert train().code == 0
    outputs = json.loads((tmp_path / "run" / "outputs.json").read_text())
    assert outputs["primary_unit"] == "patient"
    inputs = "--checkpoint", tmp_path / "run", "--input_dir", features
    assert "answers for each slide; leave it out" in predict(*inputs, "--cases_csv", labels).errors[0]
    assert predict(*inputs, "--labels_csv", labels).code == 0
    cases = pd.read_csv(tmp_path / "out" / "predictions_cases.csv")
    slides = pd.read_csv(tmp_path / "out" / "predictions.csv").groupby("case_id")["prob_malignant"].mean()
    assert cases.set_index("case_id")["prob_malignant"].sort_index().tolist() == pytest.approx(slides.tolist())


@pytest.mark.usefixtures("coarse_figures")
def test_patients_have_covariates_and_subgroups(train, cohort, tmp_path):
    table = pd.read_csv(cohort[0])
    number = table["case_id"].str[1:].astype(int)
    table["age"], table["sex"] = 40 + number * 7 % 31, np.where(number % 3 == 0, "f", "m")
    table.loc[1, "age"] = np.nan  # the patient's other slide says it
    table.to_csv(tmp_path / "labels.csv", index=False)
    outcome = train("--unit", "case", "--covariates", "age", "--subgroups", "sex", table=tmp_path / "labels.csv")
    assert outcome.code == 0, outcome.err
    outputs = json.loads((tmp_path / "run" / "outputs.json").read_text())
    assert outputs["covariates"]["columns"][0]["missing"] == 0
    assert sum(group["n_cases"] for group in outputs["subgroups"]["sex"].values()) == table["case_id"].nunique()
    assert {group["n_slides"] for group in outputs["subgroups"]["sex"].values()} == {None}
    assert "slides" not in pd.read_csv(tmp_path / "run" / "subgroups.csv")

    table.loc[1, "sex"] = "m" if table["sex"][0] == "f" else "f"
    table.to_csv(tmp_path / "labels.csv", index=False)
    refused = train("--unit", "case", "--subgroups", "sex", table=tmp_path / "labels.csv", name="other")
    assert "--subgroups sex: patient P000 has" in refused.errors[0]
