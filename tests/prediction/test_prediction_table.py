"""The table of predicted slides and their scores."""

import json
import os

import numpy as np
import pandas as pd
import pytest

from tests.prediction.predict_helpers import CLASSES, of, write_model
from tests.small import TASK, classification_metrics
from utils.bags.store import read_bag, write_bag
from utils.evaluation.intervals import ScoredRows
from utils.prediction.checkpoint import id_digests
from utils.prediction.predictor import SlidePredictor

pytestmark = pytest.mark.usefixtures("blank_figures")


def test_the_scores_are_those_of_training(cohort, models, predict, tmp_path):
    labels_csv, features = cohort
    predict("--checkpoint", models[0], "--input_dir", features, "--labels_csv", labels_csv)
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    truth = np.array([CLASSES.index(label) for label in table["label"]])
    probabilities = table[["prob_benign", "prob_malignant"]].to_numpy()
    expected = classification_metrics(truth, probabilities, CLASSES)
    assert scores["pooled"] == pytest.approx(expected)
    calibrated = classification_metrics(truth, table[["calibrated_benign", "calibrated_malignant"]].to_numpy())
    assert scores["pooled_calibrated"] == pytest.approx({name: calibrated[name] for name in ("brier", "ece")})
    assert (scores["n_slides"], scores["n_cases"], scores["n_seen_in_training"]) == (24, 12, 0)
    at = classification_metrics(truth, np.eye(2)[(probabilities[:, 1] >= 0.4).astype(int)])
    assert scores["pooled_thresholded"]["balanced_accuracy"] == pytest.approx(at["balanced_accuracy"])
    rows = ScoredRows(TASK, truth, probabilities, table["case_id"].to_numpy(), np.ones(len(table)))
    low, high = rows.estimates(rows.pooled, 0)["auc"].interval
    assert low <= expected["auc"] <= high
    assert scores["intervals_95"]["auc"] == pytest.approx([low, high])
    assert scores["interval_methods"]["auc"].startswith("Newcombe")


def test_the_models_of_an_ensemble_vote_at_its_threshold(cohort, predict, tmp_path):
    labels_csv, features = cohort
    model = write_model(tmp_path / "model.pth", 7, members=3)
    predict("--checkpoint", model, "--input_dir", features, "--labels_csv", labels_csv)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    records = [of(tmp_path / "out", slide) for slide in table["wsi_id"]]
    votes = [sum(member["malignant"] >= 0.4 for member in record["member_probabilities"]) > 1.5 for record in records]
    by_mean = [record["probabilities"]["malignant"] >= 0.4 for record in records]
    assert votes != by_mean, "the cohort tells the vote from the mean"
    right = np.mean(np.array(votes) == (table["label"] == "malignant").to_numpy())
    assert scores["pooled_thresholded"]["accuracy"] == pytest.approx(right)
    assert scores["operating_point"] == "balanced_accuracy"


def test_what_was_seen_in_training_is_marked_everywhere(cohort, predict, tmp_path):
    labels_csv, features = cohort
    seen = {"slide": id_digests("slide", ["P000-S1"]), "case": id_digests("case", ["P000", "P001"])}
    model = write_model(tmp_path / "model.pth", 1, seen=seen)
    outcome = predict("--checkpoint", model, "--input_dir", features, "--labels_csv", labels_csv)
    out = tmp_path / "out"
    marks = pd.read_csv(out / "predictions.csv").set_index("wsi_id")["seen_in_training"]
    assert set(marks[marks].index) == {"P000-S1", "P000-S2", "P001-S1", "P001-S2"}
    assert [of(out, name)["seen_as"] for name in ("P000-S1", "P000-S2", "P002-S1")] == ["slide", "case", ""]
    assert "4 slides seen in training, or of patients seen there" in outcome.out
    scores = json.loads((out / "scores.json").read_text())
    assert (scores["n_seen_in_training"], scores["unseen"]["n_slides"], scores["unseen"]["n_cases"]) == (4, 20, 10)
    (line,) = [line for line in outcome.out.splitlines() if line.strip().startswith("unseen patients")]
    assert f"{scores['unseen']['cases']['pooled']['auc']:.3f}" in line.split()
    unseen = pd.read_csv(out / "predictions.csv").query("not seen_in_training")
    is_called = unseen["prob_malignant"] >= 0.4
    right = np.mean(is_called == (unseen["label"] == "malignant"))
    assert scores["unseen"]["pooled_thresholded"]["accuracy"] == pytest.approx(right)
    # What an earlier run kept without knowing the patients is no answer to one that does.
    predict("--checkpoint", model, "--input_dir", features, output="first")
    assert of(tmp_path / "first", "P001-S1")["seen_in_training"] is False
    again = predict("--checkpoint", model, "--input_dir", features, "--labels_csv", labels_csv, output="first")
    assert "3 done, 21 skipped" in again.out
    assert of(tmp_path / "first", "P001-S1")["seen_in_training"] is True
    # A patient's slide is known by its barcode where there is no table.
    barcode = write_model(tmp_path / "b.pth", 1, seen=seen | {"case": id_digests("case", ["TCGA-05-4250"])})
    bag = read_bag(features / "P005-S1.h5")
    write_bag(tmp_path / "TCGA-05-4250-01Z-00-DX9.h5", bag)
    one = predict("--checkpoint", barcode, "--input", tmp_path / "TCGA-05-4250-01Z-00-DX9.h5")
    assert "trained on this case" in one.err


def test_a_table_without_patients_says_what_is_taken_for_them(cohort, models, predict, tmp_path):
    pd.read_csv(cohort[0]).drop(columns="case_id").to_csv(tmp_path / "labels.csv", index=False)
    flags = ("--checkpoint", models[0], "--input_dir", cohort[1], "--labels_csv")
    outcome = predict(*flags, tmp_path / "labels.csv")
    assert (
        "each slide is taken as a patient of its own, called as the slide is, in the intervals and in what"
        in outcome.err
    )
    assert "No patients are known: where some have several slides, the intervals are too narrow." in outcome.out
    taken = json.loads((tmp_path / "out" / "scores.json").read_text())["patients_from"]
    assert taken == "nothing: each slide was taken as a patient of its own"
    outcome = predict(*flags, cohort[0], output="with_patients")
    assert "No patients are known" not in outcome.out
    taken = json.loads((tmp_path / "with_patients" / "scores.json").read_text())["patients_from"]
    assert taken == "the column case_id"


def test_intervals_are_over_the_groups_of_a_column(cohort, models, predict, tmp_path):
    labels = pd.read_csv(cohort[0])
    labels["centre"] = [f"C{number % 6}" for number in labels["case_id"].str[1:].astype(int)]
    labels.to_csv(tmp_path / "labels.csv", index=False)
    flags = ("--checkpoint", models[0], "--input_dir", cohort[1], "--labels_csv", tmp_path / "labels.csv")
    outcome = predict(*flags, "--group_column", "centre")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert "cover other groups of patients (6 are known here), not other trainings" in outcome.out
    assert (scores["n_cases"], scores["n_groups"]) == (12, 6)
    truth = np.array([CLASSES.index(label) for label in table["label"]])
    values = table[["prob_benign", "prob_malignant"]].to_numpy()
    rows = ScoredRows(TASK, truth, values, table["group"].to_numpy(), np.ones(len(table)), unit="group")
    assert scores["intervals_95"]["auc"] == pytest.approx(rows.estimates(rows.pooled, 0)["auc"].interval)
    # The intervals of other groups are other scores.
    again = predict(*flags)
    assert "holds scores of other slides, labels or settings" in again.err
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["n_groups"] is None
    missing = predict(*flags, "--group_column", "center")
    assert missing.code == 1
    assert "no column center to group by" in missing.err
    assert "did you mean centre?" in missing.err


def test_the_groups_of_columns_are_scored(cohort, models, predict, tmp_path):
    labels = pd.read_csv(cohort[0])
    numbers = labels["case_id"].str[1:].astype(int)
    labels["sex"] = ["f" if number < 8 else "" if number == 11 else "m" for number in numbers]
    labels["age"] = 50 + numbers
    labels.to_csv(tmp_path / "labels.csv", index=False)
    flags = ("--checkpoint", models[0], "--input_dir", cohort[1], "--labels_csv", tmp_path / "labels.csv")
    outcome = predict(*flags, "--subgroups", "sex,age")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    counts = {name: group["n_cases"] for name, group in scores["subgroups"]["sex"].items()}
    assert counts == {"f": 8, "m": 3, "unknown": 1}
    assert list(scores["subgroups"]["age"]) == ["at most 55.5", "above 55.5"]
    few = scores["subgroups"]["sex"]["m"]
    assert few["intervals_95"]["auc"] is None
    assert few["interval_methods"]["auc"] == "none: fewer than 5 patients"
    assert "sex: f         8" in outcome.out
    assert "-: fewer than 5 patients; undefined for these slides" in outcome.out
    missing = predict(*flags, "--subgroups", "Sex")
    assert "--subgroups Sex: no such column" in missing.err
    assert "did you mean sex?" in missing.err


@pytest.mark.parametrize(("patients", "reason"), [
    (("Q",) * 3, "3 slides of 1 patient. No 95% intervals: fewer than 5 patients."),
    (("Q", "R", "R"), "3 slides of 2 patients. No 95% intervals: fewer than 5 patients."),
])  # fmt: skip
def test_few_patients_have_no_interval_and_the_reason_is_given(cohort, models, predict, tmp_path, patients, reason):
    slides, predictor = sorted(cohort[1].glob("*.h5"))[:3], SlidePredictor(models[0], device="cpu")
    rows = []
    for case_id, path in zip(patients, slides, strict=True):
        write_bag(tmp_path / "in" / path.name, read_bag(path))
        rows.append(f"{case_id},{path.stem},{predictor.predict(path).predicted_class}")  # all right
    (tmp_path / "labels.csv").write_text("\n".join(["case_id,wsi_id,label", *rows]) + "\n")
    flags = ("--checkpoint", models[0], "--input_dir", tmp_path / "in", "--labels_csv", tmp_path / "labels.csv")
    outcome = predict(*flags)
    assert outcome.code == 0, outcome.err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["pooled"]["accuracy"], scores["intervals_95"]["accuracy"]) == (1, None)
    assert "1.000-1.000" not in outcome.out
    assert reason in outcome.out


def test_a_part_predicted_again_leaves_the_table_whole(cohort, models, predict, tmp_path):
    labels_csv, features = cohort
    part = tmp_path / "part"
    part.mkdir()
    for name in ("P000-S1", "P001-S1"):
        (part / f"{name}.h5").write_bytes((features / f"{name}.h5").read_bytes())
        os.utime(part / f"{name}.h5", ns=(0, (features / f"{name}.h5").stat().st_mtime_ns))
    flags, out = ("--checkpoint", models[0], "--input_dir"), tmp_path / "out"
    predict(*flags, features, "--labels_csv", labels_csv)
    names = ("predictions.csv", "scores.json", "roc.png")
    before = {name: (out / name).read_bytes() for name in names}
    report = pd.read_csv(out / "prediction_report.csv").set_index("output")
    outcome = predict(*flags, part)
    assert "2 skipped" in outcome.out
    assert "With 22 slides of earlier commands" in outcome.out
    assert {name: (out / name).read_bytes() for name in names} == before  # labels and patients too
    again = pd.read_csv(out / "prediction_report.csv").set_index("output")
    assert list(again["seconds"][report.index]) == list(report["seconds"])
    assert (out / "index.html").read_text().count("<tr") == 25
    # By another model the part has a table of its own, and the other one stays.
    assert predict("--checkpoint", models[1], "--input_dir", part, "--overwrite").code == 0
    assert len(pd.read_csv(out / "predictions.csv")) == 2
    assert (out / "predictions.1.csv").read_bytes() == before["predictions.csv"]


def test_a_slide_of_a_folder_predicted_again_stands_in_its_table_and_page(cohort, models, predict, tmp_path):
    out, one = tmp_path / "out", cohort[1] / "P000-S1.h5"
    predict("--checkpoint", models[0], "--input_dir", cohort[1])
    before = (out / "predictions.csv").read_bytes()
    assert "With 23 slides of earlier commands" in predict("--checkpoint", models[0], "--input", one).out
    assert (out / "predictions.csv").read_bytes() == before
    predict("--checkpoint", models[1], "--input", one, "--overwrite")
    assert list(pd.read_csv(out / "predictions.csv")["wsi_id"]) == ["P000-S1"], "the others are another model's"
    assert str(models[1]) in (out / "index.html").read_text()
    assert (out / "predictions.1.csv").read_bytes() == before


def test_scores_of_other_labels_do_not_replace_those_that_are_there(cohort, models, predict, tmp_path):
    labels_csv, features = cohort
    flags, out = ("--checkpoint", models[0], "--input_dir", features, "--labels_csv"), tmp_path / "out"
    predict(*flags, labels_csv)
    before = {name: (out / name).read_bytes() for name in ("scores.json", "roc.png")}
    assert "scores of other" not in predict(*flags, labels_csv).err
    swapped = {"benign": "malignant", "malignant": "benign"}
    table = pd.read_csv(labels_csv)
    table.assign(label=table["label"].map(swapped)).to_csv(tmp_path / "other.csv", index=False)
    outcome = predict(*flags, tmp_path / "other.csv")
    assert "scores.json: holds scores of other slides, labels or settings; moved to" in outcome.err
    assert (out / "scores.1.json").read_bytes() == before["scores.json"]
    assert (out / "roc.1.png").read_bytes() == before["roc.png"]
    assert pd.read_csv(out / "predictions.csv")["label"][0] == swapped[table["label"][0]]
    predict(*flags, labels_csv, "--overwrite")
    assert not (out / "scores.2.json").exists()


def test_what_was_known_of_a_patient_stays_known_without_the_table(cohort, predict, tmp_path):
    labels_csv, features = cohort
    seen = {"slide": id_digests("slide", ["none"]), "case": id_digests("case", ["P000"])}
    flags = ("--checkpoint", write_model(tmp_path / "m.pth", 1, seen=seen), "--input_dir", features)
    predict(*flags, "--labels_csv", labels_csv)
    outcome = predict(*flags)
    assert "24 skipped" in outcome.out
    assert of(tmp_path / "out", "P000-S1")["seen_as"] == "case"
    assert "2 slides seen in training" in outcome.out
