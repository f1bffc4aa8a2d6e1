"""The audit sees each fault that was put into a cohort, names it, and finds nothing in a clean one."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.cohort import write_cohort
from utils.audit import Finding, as_json, as_text, audit
from utils.bags.store import Bag, read_bag, write_bag
from utils.core.errors import ConfigError, FeatureFileError, LabelsError, SplitError


class Cohort:
    """A cohort on disk that faults can be put into: patients P000 to P013, benign and malignant in turn."""

    def __init__(self, folder: Path) -> None:
        self.labels_csv, self.features_dir = write_cohort(folder, patients_per_class=7, patches=(20, 40))

    def file(self, wsi_id: str) -> Path:
        return self.features_dir / f"{wsi_id}.h5"

    def change(self, wsi_id: str, **fields: object) -> None:
        write_bag(self.file(wsi_id), replace(read_bag(self.file(wsi_id)), **fields))

    def change_passport(self, wsi_id: str, part: str, **fields: object) -> None:
        passport = read_bag(self.file(wsi_id)).passport
        assert passport is not None
        own = getattr(passport, part)
        changed = replace(own, **fields) if part == "recipe" else own | fields
        self.change(wsi_id, passport=replace(passport, **{part: changed}))

    def add_rows(self, *rows: str) -> None:
        self.labels_csv.write_text(self.labels_csv.read_text() + "\n".join([*rows, ""]))

    def audit(self, **settings) -> list[Finding]:
        return audit(self.labels_csv, self.features_dir, **settings)

    def found(self, level: str, topic: str, **settings) -> str:
        """The one finding of this level and topic."""
        messages = [f.message for f in self.audit(**settings) if (f.level, f.topic) == (level, topic)]
        assert len(messages) == 1, messages
        return messages[0]


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Cohort:
    """Not to be changed."""
    return Cohort(tmp_path_factory.mktemp("clean"))


@pytest.fixture
def cohort(clean, tmp_path) -> Cohort:
    copy = object.__new__(Cohort)
    copy.labels_csv, copy.features_dir = tmp_path / "labels.csv", tmp_path / "features"
    shutil.copy(clean.labels_csv, copy.labels_csv)
    shutil.copytree(clean.features_dir, copy.features_dir)
    return copy


def lines(findings: list[Finding]) -> list[str]:
    return [f"{finding.level} {finding.topic}: {finding.message}" for finding in findings]


def write_split(path: Path, train: list[str], val: list[str], test: list[str]) -> Path:
    pd.DataFrame({"train": pd.Series(train), "val": pd.Series(val), "test": pd.Series(test)}).to_csv(path)
    return path


def test_a_clean_cohort(clean):
    findings = clean.audit()
    assert {finding.level for finding in findings} == {"info", "ok"}
    told = lines(findings)
    counts = "benign 14 slides of 7 patients; malignant 14 slides of 7 patients; 14 patients in all"
    assert told[0] == f"info table: {counts}"
    assert told[1] == "info table: slides per patient: 2 to 2, median 2"
    assert "ok files: 28 slides, each with a feature file that opens" in told
    assert "ok content: no two slides have the same features" in told
    assert "ok recipe: 28 slides recorded as made in one way" in told
    assert any(line.startswith("ok confounding: no sign that bag size (patches per slide) predicts") for line in told)
    assert as_text(findings).endswith("\n\n0 errors, 0 warnings")


@pytest.mark.parametrize("factor", [1e4, 1e-4])
def test_features_of_another_scale(cohort, factor):
    assert "root mean square is 1." in cohort.found("ok", "scale")
    for path in cohort.features_dir.iterdir():
        cohort.change(path.stem, features=read_bag(path).features.astype("f4") * np.float32(factor))
    told = cohort.found("warning", "scale")
    assert "models are initialised for 0.1 to 10 (28 slides); train standardises them unless told --standardize" in told


def test_all_features_are_read_for_what_cannot_be_used(cohort, monkeypatch):
    features = read_bag(cohort.file("P003-S2")).features.copy()
    features[4, 2] = np.nan
    cohort.change("P003-S2", features=features)
    assert "P003-S2.h5" in cohort.found("error", "files")
    monkeypatch.setattr("utils.auditing.feature_files.MOST_READ", 1000)
    assert "of 28, others were not read" in cohort.found("ok", "scale")


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


def test_bag_sizes_are_told_per_class(clean):
    (told,) = [finding for finding in clean.audit() if finding.details.get("class") == "malignant"]
    sizes = [len(read_bag(clean.file(f"P{k:03d}-S{s}")).features) for k in range(1, 14, 2) for s in (1, 2)]
    quartiles = np.percentile(sizes, [0, 25, 50, 75, 100]).tolist()
    assert [value for name, value in told.details.items() if name != "class"] == quartiles
    assert f"malignant: {min(sizes)} to {max(sizes)} patches a slide, median {np.median(sizes):.0f}" in told.message


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


def test_a_row_that_just_misses_its_file_is_told_with_it(cohort):
    cohort.file("P000-S1").rename(cohort.file("p000_s1"))
    assert "P000-S1 (there is p000_s1); write the ids alike" in cohort.found("error", "files")


def test_files_and_rows_that_miss_each_other(cohort):
    cohort.file("P001-S1").unlink()
    shutil.copy(cohort.file("P002-S1"), cohort.file("A.1"))
    assert "1 slide without a feature file in" in cohort.found("error", "files")
    assert "P001-S1" in cohort.found("error", "files")
    assert cohort.found("info", "files") == "1 feature file without a row in the table: A.1.h5"


def test_leaving_out_every_slide_is_no_cure(cohort):
    for file in cohort.features_dir.iterdir():
        file.rename(file.with_name(f"x{file.name}"))
    assert "--allow missing" not in cohort.found("error", "files")


def test_files_in_subfolders_are_found_and_two_of_one_slide_told(cohort):
    for number, file in enumerate(sorted(cohort.features_dir.iterdir())):
        place = cohort.features_dir / f"site{number % 3}" / file.name
        place.parent.mkdir(exist_ok=True)
        file.rename(place)
    assert "ok files: 28 slides, each with a feature file that opens" in lines(cohort.audit())
    shutil.copy(cohort.features_dir / "site0/P000-S1.h5", cohort.file("P000-S1"))
    assert "slide P000-S1 has P000-S1.h5 and site0/P000-S1.h5; keep one" in cohort.found("error", "files")


def test_every_damaged_file_is_named_with_its_reason(cohort):
    cohort.file("P000-S1").write_bytes(cohort.file("P000-S1").read_bytes()[:500])
    cohort.file("P001-S1").write_bytes(b"nothing")
    write_bag(cohort.features_dir / "P002-S1.pt", read_bag(cohort.file("P002-S1")))
    told = [finding for finding in cohort.audit() if (finding.level, finding.topic) == ("error", "files")]
    assert [finding.details["slide"] for finding in told] == ["P000-S1", "P001-S1", "P002-S1"]
    assert "P000-S1.h5: not a readable HDF5 file" in told[0].message
    assert "P002-S1.h5 and P002-S1.pt; keep one of them" in told[2].message


def test_the_same_fault_everywhere_is_not_told_a_thousand_times(clean):
    told = [finding for finding in clean.audit(feat_type="uni") if (finding.level, finding.topic) == ("error", "files")]
    assert len(told) == 21
    assert told[-1].message.startswith("8 more files")
    assert len(told[-1].details["slides"]) == 28


def test_copies_of_content(cohort):
    shutil.copy(cohort.file("P000-S1"), cohort.file("P000-S2"))
    assert "more than once: P000-S1 (P000, benign), P000-S2 (P000, benign)" in cohort.found("warning", "content")
    copied = read_bag(cohort.file("P001-S1"))
    write_bag(cohort.file("P003-S1"), replace(copied, features=copied.features.astype(np.float32)))
    message = cohort.found("error", "content")
    assert "under several patients or labels: P001-S1 (P001, malignant), P003-S1 (P003, malignant)" in message


def test_one_patients_copy_under_two_labels(cohort):
    cohort.add_rows("P000,P000-S3,malignant")
    shutil.copy(cohort.file("P000-S1"), cohort.file("P000-S3"))
    assert "P000-S3 (P000, malignant)" in cohort.found("error", "content")


def test_what_shows_only_when_a_file_is_read(cohort):
    """Files are read where another has the same size; a NaN in such a one is seen."""
    bag = read_bag(cohort.file("P000-S1"))
    broken = bag.features.copy()
    broken[3, 0] = np.nan
    cohort.change("P001-S1", features=broken, coords=bag.coords)
    assert "P001-S1.h5: 1 values are NaN or infinite, the first in row 3" in cohort.found("error", "files")


def test_small_bags(cohort):
    bag = read_bag(cohort.file("P000-S1"))
    assert bag.coords is not None
    cohort.change("P000-S1", features=bag.features[:9], coords=bag.coords[:9])
    cohort.change("P000-S2", features=bag.features[:10], coords=bag.coords[:10])
    assert "1 slide of fewer than 10 patches: P000-S1 (9)" in cohort.found("warning", "bags")


def test_features_made_in_different_ways(cohort):
    cohort.change("P000-S1", features=read_bag(cohort.file("P000-S1")).features[:, :8])
    cohort.change_passport("P001-S1", "recipe", backbone="uni")
    cohort.change_passport("P002-S1", "recipe", stride=128)
    cohort.change_passport("P003-S1", "slide", mpp_delivered=0.6)
    cohort.change("P004-S1", passport=None)
    told = lines([finding for finding in cohort.audit() if finding.topic == "recipe"])
    assert told == [
        "error recipe: features of different widths: 16 in 27 slides, 8 in 1 slide (P000-S1); "
        "extract all slides with one backbone",
        "error recipe: backbone differs: synthetic in 26 slides, uni in 1 slide (P001-S1); "
        "extract all slides with one recipe",
        "warning recipe: stride differs: 256 in 26 slides, 128 in 1 slide (P002-S1); make sure that this is meant",
        "warning recipe: patches were read at 0.5 to 0.6 um/px, more than 15% apart; "
        "extract all slides at one resolution",
        "info recipe: 1 of 28 slides without a record of how they were made",
    ]


def test_a_small_spread_of_mpp_is_no_fault(cohort):
    cohort.change_passport("P003-S1", "slide", mpp_delivered=0.56)
    assert "recorded as made in one way" in cohort.found("ok", "recipe")


def test_slides_of_unknown_resolution_are_warned_of(cohort):
    for wsi_id in ("P000-S1", "P003-S2"):
        cohort.change_passport(wsi_id, "slide", mpp=None, mpp_delivered=None)
    message = cohort.found("warning", "recipe")
    assert message.startswith("2 slides of 28 whose um/px is not known: P000-S1, P003-S2; their patches may show")
    assert "--slides_csv" in message


def test_an_auc_below_a_half_is_no_finding_and_says_why(clean):
    by_chance = [f for f in clean.audit() if f.topic == "confounding" and f.details["auc"] < 0.5]
    others = [f for f in clean.audit() if f.topic == "confounding" and f.details["auc"] >= 0.5]
    assert by_chance, "the cohort has such a field"
    assert all("; below 0.5 is usual by chance" in finding.message for finding in by_chance)
    assert not any("below 0.5" in finding.message for finding in others)


def test_a_scanner_that_goes_with_the_class(cohort):
    """Two scanners: no folds can have each class on both sides and a scanner on one."""
    for patient in range(14):
        for slide in ("S1", "S2"):
            cohort.change_passport(f"P{patient:03d}-{slide}", "slide", vendor=("aperio", "hamamatsu")[patient % 2])
    (told,) = [f for f in cohort.audit() if f.details.get("field") == "the slide's vendor"]
    assert told.level == "warning"
    assert told.message.startswith("the slide's vendor alone gives the label away (AUC 1.00 by patient-grouped")
    assert "benign comes with 1 value of it for 5 outer folds, so that no split can separate the two" in told.message


@pytest.mark.parametrize(
    ("column", "name", "sites", "remedy"),
    [
        (None, "the TCGA site code", 5, "train with --group_column site"),
        ("Site", "the column Site", 5, "train with --group_column Site"),
        (
            "scanner",
            "the column scanner",
            4,
            "benign comes with 4 values of it for 5 outer folds, so that no split can",
        ),
    ],
)
def test_folds_by_site_are_offered_where_they_can_be_made(tmp_path, column, name, sites, remedy):
    """Every site has patients of one class only: grouped folds need as many sites of each class as folds."""
    lines = [f"case_id,wsi_id,label{',' + column if column else ''}"]
    for patient in range(60):
        label = patient % 2
        site = f"{'BM'[label]}{patient // 2 % (sites + label)}"
        case = f"TCGA-{site if column is None else 'XX'}-{patient:04d}"
        lines.append(f"{case},{case}-01,{('benign', 'malignant')[label]}{',' + site if column else ''}")
    (tmp_path / "labels.csv").write_text("\n".join([*lines, ""]))
    (told,) = [finding for finding in audit(tmp_path / "labels.csv") if finding.details.get("field") == name]
    assert (told.level, told.details["values_per_class"]) == ("warning", {"benign": sites, "malignant": sites + 1})
    assert told.message.startswith(f"{name} alone gives the label away")
    assert f"; {remedy}" in told.message


def test_the_remedy_says_what_stands_in_its_way(tmp_path):
    """Training by a column refuses a patient of two values, and a slide without one."""

    def remedy(first: str) -> str:
        rows = [f"P{n // 2},S{n},{'ab'[n // 2 % 2]},{'ab'[n // 2 % 2]}{n // 4 % 5}" for n in range(2, 80)]
        (tmp_path / "labels.csv").write_text("\n".join(["case_id,wsi_id,label,batch", first, *rows, ""]))
        (told,) = [finding for finding in audit(tmp_path / "labels.csv") if finding.level == "warning"]
        return told.message.split("; ")[-1]

    assert remedy("P0,S0,a,a0") == "train with --group_column batch"
    assert remedy("P0,S0,a,") == "train with --group_column batch, after filling it in for 1 slide"
    assert remedy("P1,S0,b,b3").endswith("patients and its values whole: several values in P1")


def test_a_column_of_one_value_is_nothing_to_test(tmp_path):
    (tmp_path / "labels.csv").write_text("case_id,wsi_id,label,batch\nP0,S0,a,1\nP1,S1,b,1\nP2,S2,b,\n")
    told = lines(audit(tmp_path / "labels.csv"))
    assert "info confounding: the column batch: one value or one class only, nothing to test" in told


def test_bag_size_has_no_grouping(cohort):
    rng = np.random.default_rng(0)
    for patient in range(1, 14, 2):
        for slide in ("S1", "S2"):
            features = rng.standard_normal((int(rng.integers(50, 70)), 16)).astype(np.float16)
            write_bag(cohort.file(f"P{patient:03d}-{slide}"), Bag(features))
    (told,) = [f for f in cohort.audit() if f.details.get("field", "").startswith("bag size")]
    assert told.level == "warning"
    assert told.message.endswith("a model that does not clearly beat this AUC may have learned no more")


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


def test_nothing_to_test_is_said(clean):
    (finding,) = [f for f in audit(clean.labels_csv) if f.topic == "confounding"]
    assert (finding.level, finding.message[:41]) == ("info", "no site, scanner or other origin is known")


def test_a_split_by_patient(clean, tmp_path):
    ids = pd.read_csv(clean.labels_csv)["wsi_id"].tolist()
    path = write_split(tmp_path / "mine.csv", ids[:12], ids[12:20], ids[20:])
    assert clean.found("ok", "splits", splits=path) == "no patient is on both sides of any of 1 split"


def test_what_cannot_be_read_at_all_is_an_error(clean, tmp_path):
    with pytest.raises(LabelsError, match=r"nowhere.csv: no such file"):
        audit(tmp_path / "nowhere.csv")
    with pytest.raises(FeatureFileError, match=r"nowhere: no such folder"):
        audit(clean.labels_csv, tmp_path / "nowhere")
    with pytest.raises(SplitError, match=r"nowhere: no such file"):
        clean.audit(splits=tmp_path / "nowhere")


def test_the_same_audit_twice_gives_the_same_bytes(clean):
    assert as_json(clean.audit()) == as_json(clean.audit())


def test_the_command(clean, cohort, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--labels_csv", clean.labels_csv, "--features_dir", clean.features_dir
    good = script("utils.audit", *flags)
    assert (good.code, good.errors) == (0, [])
    assert good.out.startswith("table\n  info     benign 14 slides")
    next_command = shlex.split(good.out.splitlines()[-1])
    assert next_command[:5] == ["uv", "run", "train.py", "--mil", "LiteMIL"]
    assert set(next_command[5:]) == {"--dataset", "NAME", "--dry_run", *map(str, flags)}
    as_object = json.loads(script("utils.audit", *flags, "--json").out)
    assert (as_object["errors"], as_object["warnings"]) == (0, 0)
    assert {finding["topic"] for finding in as_object["findings"]} >= {"table", "files", "bags", "confounding"}

    cohort.file("P000-S1").unlink()
    flags = "--labels_csv", cohort.labels_csv, "--features_dir", cohort.features_dir
    bad = script("utils.audit", *flags)
    assert (bad.code, bad.errors) == (1, [])
    assert "\n1 error, 0 warnings\n" in bad.out
    assert bad.out.rstrip().endswith("Mend the errors, then audit again.")
    assert script("utils.audit", *flags, "--json").code == 1


def test_the_command_finds_a_cohort_by_name(clean, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clean.labels_csv.parent, tmp_path / "datasets" / "mine")
    outcome = script("utils.audit", "--dataset", "mine")
    assert outcome.code == 0
    assert "28 slides, each with a feature file that opens" in outcome.out
    shutil.rmtree(tmp_path / "datasets" / "mine" / "features")
    outcome = script("utils.audit", "--dataset", "mine")
    assert outcome.code == 0
    assert "no features folder: what needs files is skipped" in outcome.out
    assert script("utils.audit", "--dataset", "mine", "--features_dir", "nowhere").code == 1


def test_the_command_needs_a_cohort(script):
    outcome = script("utils.audit")
    assert outcome.code == 1
    assert outcome.errors == ["error: give --dataset (a cohort's name) or --labels_csv (its table)"]


def test_the_site_of_tcga_lung_gives_the_label_away(shared_data):
    findings = audit(shared_data / "labels" / "lung.csv", class_names=("LUAD", "LUSC"))
    (told,) = [finding for finding in findings if finding.level == "warning"]
    assert told.message.startswith("the TCGA site code alone gives the label away (AUC 1.00 by patient-grouped")
    assert told.message.endswith("p 0.001); train with --group_column site")


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


def test_the_rare_labels_of_tcga_breast_are_counted(shared_data, script):
    outcome = script("utils.audit", "--dataset", "breast", "--labels_csv", shared_data / "labels" / "breast.csv")
    assert outcome.code == 0
    assert "IDC 726 slides of 694 patients; ILC 149 slides of 143 patients" in outcome.out
    assert "62 slides left out, of the labels ACBC, BRCA, BRCNOS, IMMC, MBC, MDLC, MPT, PD, SPC" in outcome.out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"class_names": "ab"}, "--class_names 'ab': expected a list of text"),
        ({"class_names": [0, 1]}, r"--class_names \[0, 1\]: expected a list of text"),
        ({"allow": "missing"}, "--allow 'missing': expected a list"),
        ({"allow": ["speling"]}, r"--allow \['speling'\]: expected .* spelling"),
        ({"feat_type": 3}, "--feat_type 3: expected text"),
    ],
)
def test_settings_that_cannot_be_used(clean, settings, message):
    with pytest.raises(ConfigError, match=message):
        clean.audit(**settings)
