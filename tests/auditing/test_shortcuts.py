"""What predicts the label without a look at the tissue."""

import numpy as np
import pytest

from tests.auditing.audit_helpers import lines
from utils.audit import audit
from utils.bags.store import Bag, write_bag


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


def test_nothing_to_test_is_said(clean):
    (finding,) = [f for f in audit(clean.labels_csv) if f.topic == "confounding"]
    assert (finding.level, finding.message[:41]) == ("info", "no site, scanner or other origin is known")


def test_the_site_of_tcga_lung_gives_the_label_away(shared_data):
    findings = audit(shared_data / "labels" / "lung.csv", class_names=("LUAD", "LUSC"))
    (told,) = [finding for finding in findings if finding.level == "warning"]
    assert told.message.startswith("the TCGA site code alone gives the label away (AUC 1.00 by patient-grouped")
    assert told.message.endswith("p 0.001); train with --group_column site")
