"""The audit sees each fault that was put into a cohort, names it, and finds nothing in a clean one."""

import json
import shlex
import shutil

import pytest

from tests.auditing.audit_helpers import lines
from utils.audit import as_json, as_text, audit
from utils.core.errors import ConfigError, FeatureFileError, LabelsError, SplitError


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
