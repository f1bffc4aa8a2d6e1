"""Faults of feature files: missing, damaged, copied, odd of scale, small, made in several ways."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from tests.auditing.audit_helpers import lines
from utils.bags.store import read_bag, write_bag


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


def test_bag_sizes_are_told_per_class(clean):
    (told,) = [finding for finding in clean.audit() if finding.details.get("class") == "malignant"]
    sizes = [len(read_bag(clean.file(f"P{k:03d}-S{s}")).features) for k in range(1, 14, 2) for s in (1, 2)]
    quartiles = np.percentile(sizes, [0, 25, 50, 75, 100]).tolist()
    assert [value for name, value in told.details.items() if name != "class"] == quartiles
    assert f"malignant: {min(sizes)} to {max(sizes)} patches a slide, median {np.median(sizes):.0f}" in told.message


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
