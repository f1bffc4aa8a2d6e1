"""Faults of the label table, its patients and its splits."""

import json

import pandas as pd
import pytest

from tests.auditing.audit_helpers import lines, write_split
from utils.audit import as_json, audit


@pytest.mark.parametrize(
    ("column", "fault"),
    [("site", "1 row without a site: P000-S1; fill it in"), ("Side", "no column Side to group by; found")],
)
def test_groups_that_training_refuses_are_errors(cohort, column, fault):
    rows = cohort.labels_csv.read_text().splitlines()
    sites = ["site", *("NA" if number == 0 else f"A{row[:4]}" for number, row in enumerate(rows[1:]))]
    cohort.labels_csv.write_text("\n".join(f"{row},{site}" for row, site in zip(rows, sites, strict=True)))
    assert fault in cohort.found("error", "table", group_column=column)


def test_a_column_of_train_and_test_is_named(cohort, tmp_path):
    rows = cohort.labels_csv.read_text().splitlines()
    parts = ["subset", *("train" if number % 3 else "test" for number in range(len(rows) - 1))]
    cohort.labels_csv.write_text("\n".join(f"{row},{part}" for row, part in zip(rows, parts, strict=True)))
    assert "the column subset (test 10, train 18) is not used" in cohort.found("info", "splits")
    splits = write_split(tmp_path / "splits_0.csv", ["P000-S1"], ["P002-S1"], ["P001-S1"])
    assert not any("the column subset" in line for line in lines(cohort.audit(splits=splits)))


def test_repeated_rows(cohort):
    cohort.add_rows("P000,P000-S1,benign", "P001,P001-S1,benign", "P009,P002-S1,benign")
    assert "P000-S1; keep one" in cohort.found("warning", "table")
    message = cohort.found("error", "table")
    assert "P001-S1 (label malignant and benign), P002-S1 (case_id P002 and P009)" in message


def test_ids_that_cannot_be_used(cohort):
    cohort.add_rows("P000,../P000-S1,benign", ",P1,benign", "P3,,benign")
    told = lines(cohort.audit())
    assert any(
        "error table: no patient (case_id) or no slide (wsi_id) in row 30, 31 after the header" in line for line in told
    )
    assert any("error table: wsi_id that would leave the features folder: ../P000-S1;" in line for line in told)
    assert not any("without a feature file" in line for line in told)


def test_labels_that_are_no_class(cohort):
    cohort.add_rows("P020,P020-S1,odd", "P021,P021-S1,rare")
    told = lines(cohort.audit(class_names=("benign", "malignant"), left_out=("rare",)))
    assert any(
        "error table: 1 slide with a label that is none of benign, malignant: P020-S1 ('odd')" in t for t in told
    )
    assert "info table: 1 slide left out, of the labels rare" in told
    assert not any("P021" in line for line in told)


def test_labels_are_renamed_as_in_training(cohort):
    names = {"benign": "Low", "malignant": "High"}
    message = cohort.audit(class_names=("Low", "High"), label_names=names)[0].message
    assert message == "Low 14 slides of 7 patients; High 14 slides of 7 patients; 14 patients in all"
    own = cohort.audit(class_names=("benign", "malignant"), label_names=names)[0].message
    assert own.startswith("benign 14 slides"), "a label that is a class as it stands keeps its name"


@pytest.mark.parametrize(
    ("classes", "reason"), [(("benign",), "needs two different"), (("x", "y"), "no slide belongs")]
)
def test_classes_that_cannot_be_learned(clean, classes, reason):
    assert any(reason in line for line in lines(clean.audit(class_names=classes)) if line.startswith("error table"))


def test_patients(cohort):
    cohort.add_rows("P000,P000-S3,malignant", "P001,P001-S3,rare")
    told = [finding.message for finding in cohort.audit() if finding.level == "warning"]
    assert "2 patients with slides of several classes: P000, P001; check the labels" in told
    assert "rare has 1 patient, fewer than the 5 outer folds; add patients, or lower --n_outer" in told


def test_a_table_without_patients(cohort):
    table = pd.read_csv(cohort.labels_csv, dtype=str)
    table.drop(columns="case_id").to_csv(cohort.labels_csv, index=False)
    assert "or say that every slide is a patient's only one with --no_patients" in cohort.found("error", "table")
    assert "each slide is taken as a patient of its own" in cohort.found("warning", "table", no_patients=True)


def test_names_and_labels_that_look_like_one(cohort):
    cohort.add_rows("p000,P020-S1,benign", "P021,P021-S1,Benign", "P022,P022-S1,NA")
    told = lines(cohort.audit())
    assert any("error table: names that seem to mean the same: patient 'P000' and 'p000'" in line for line in told)
    assert any("error table: labels that look like one class" in line and "'Benign'" in line for line in told)
    assert any("none of Benign, benign, malignant: P022-S1 ('NA'); 'NA' stands for no label" in line for line in told)


def test_what_training_is_told_to_allow_is_no_error(cohort):
    cohort.add_rows("p000,P020-S1,benign", "P021,P021-S1,odd")
    classes = ("benign", "malignant")
    assert {f.topic for f in cohort.audit(class_names=classes) if f.level == "error"} == {"files", "table"}
    allow = ("missing", "unknown", "spelling")
    assert not [f for f in cohort.audit(class_names=classes, allow=allow) if f.level == "error"]


def test_a_split_that_shares_a_patient(clean, tmp_path):
    ids = pd.read_csv(clean.labels_csv)["wsi_id"].tolist()
    write_split(tmp_path / "splits_0.csv", ids[:13], ids[14:20], [*ids[20:27], "stranger.svs"])
    write_split(tmp_path / "splits_1.csv", ids[:12], ids[13:20], [*ids[12:13], *ids[20:]])
    told = lines([finding for finding in clean.audit(splits=tmp_path) if finding.topic == "splits"])
    assert told == [
        "error splits: 1 patient on both sides of a split: P006 (val and test of splits_1.csv); split by patient",
        "warning splits: 1 slide of the splits not in the table: stranger",
        "warning splits: 2 slides in no part of one or more splits: P006-S2, P013-S2",
    ]
    content = json.loads(as_json(clean.audit(splits=tmp_path)))
    details = {finding["level"]: finding["details"] for finding in content["findings"] if finding["topic"] == "splits"}
    assert content["errors"] == 1
    assert details["error"] == {"patients": {"P006": ["val and test of splits_1.csv"]}}
    assert details["warning"]["slides"].keys() == {"P006-S2", "P013-S2"}


def test_a_split_that_cannot_be_checked_is_not_ok(clean, tmp_path):
    write_split(splits := tmp_path / "splits_0.csv", ["a", "b"], [], ["c", "d"])
    found = {f.level: f.message for f in clean.audit(splits=splits) if f.topic == "splits"}
    assert "ok" not in found
    assert "4 slides of the splits not in the table" in found["error"]
    assert "nothing was checked: write the ids as the table does" in found["error"]


def test_a_barcode_tells_the_patient_of_a_slide_that_is_not_in_the_table(clean, tmp_path):
    train, test = (["P000-S1", "TCGA-99-9999-01Z-00-DX1"], ["P001-S1", "TCGA-99-9999-01Z-00-DX2"])
    write_split(splits := tmp_path / "splits_0.csv", train, [], test)
    found = clean.found("error", "splits", splits=splits)
    assert "1 patient on both sides of a split: TCGA-99-9999 (train and test of splits_0.csv)" in found


def test_a_split_by_patient(clean, tmp_path):
    ids = pd.read_csv(clean.labels_csv)["wsi_id"].tolist()
    path = write_split(tmp_path / "mine.csv", ids[:12], ids[12:20], ids[20:])
    assert clean.found("ok", "splits", splits=path) == "no patient is on both sides of any of 1 split"


def test_a_patient_shared_by_a_lung_split_is_named(shared_data, tmp_path):
    table = pd.read_csv(shared_data / "labels" / "lung.csv", dtype=str)
    case = table["case_id"].value_counts().index[0]
    mine, others = table[table.case_id == case].wsi_id.tolist(), table[table.case_id != case].wsi_id.tolist()
    path = write_split(tmp_path / "splits_0.csv", mine[:1], [], mine[1:])
    findings = audit(shared_data / "labels" / "lung.csv", class_names=("LUAD", "LUSC"), splits=path)
    messages = [finding.message for finding in findings if finding.topic == "splits"]
    assert (
        messages[0] == f"1 patient on both sides of a split: {case} (train and test of splits_0.csv); split by patient"
    )
    assert messages[1].startswith(f"{len(others)} slides in no part")
