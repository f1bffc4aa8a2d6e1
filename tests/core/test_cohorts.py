"""What is known of public cohorts, and what their ids say."""

import pytest

from utils.core.cohorts import KNOWN_COHORTS, KnownCohort, cohort_classes, tcga_case, tcga_site


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("TCGA-05-4250", "05"),
        ("TCGA-A1-A0SB-01Z-00-DX1.B34C267B-CAAA-4AB6-AD5C-276C26F997A1", "A1"),
        ("tcga-a1-a0sb", "A1"),
        ("TCGA-05-4250.svs", "05"),
        ("TCGA-05", None),
        ("TCGA-05-42501", None),
        ("TUPAC-TR-001", None),
        ("my-TCGA-05-4250", None),
        ("", None),
    ],
)
def test_the_site_of_a_barcode(name, site):
    assert tcga_site(name) == site
    assert tcga_case(name) == (None if site is None else name[:12].upper())


def test_classes_that_are_given_go_before_the_known_ones_and_leave_out_none():
    assert cohort_classes("breast") == KNOWN_COHORTS["breast"]
    assert cohort_classes("breast", ["IDC", "MDLC"]) == KnownCohort(("IDC", "MDLC"))
    assert cohort_classes("tupac", ["High", "Low"]) == KnownCohort(("High", "Low"), {"0": "Low", "1": "High"})
    for name in ("mine", None):
        assert cohort_classes(name) == KnownCohort(())
        assert cohort_classes(name, ["a", "b"]) == KnownCohort(("a", "b"))
