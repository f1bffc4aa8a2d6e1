"""The public cohorts whose features can be downloaded; any other name is the user's own cohort."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class KnownCohort:
    """`label_names` renames labels of the table; rows with a label in `left_out` belong to no class."""

    class_names: tuple[str, ...]
    label_names: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


# The demo's slides are drawn by rule; they show nobody's tissue.
SYNTHETIC = "demo"
_BREAST_RARE = ("ACBC", "BRCA", "BRCNOS", "IMMC", "MBC", "MDLC", "MPT", "PD", "SPC")

KNOWN_COHORTS: Mapping[str, KnownCohort] = {
    "breast": KnownCohort(("IDC", "ILC"), left_out=_BREAST_RARE),
    "lung": KnownCohort(("LUAD", "LUSC")),
    "kidney": KnownCohort(("PRCC", "CCRCC", "CHRCC")),
    "tupac": KnownCohort(("Low", "High"), label_names={"0": "Low", "1": "High"}),
}


def cohort_classes(dataset: str | None, class_names: Sequence[str] | None = None) -> KnownCohort:
    """Return a cohort's classes: those given, which leave out no label, else those of a public cohort, or none."""
    cohort = KNOWN_COHORTS.get(dataset or "", KnownCohort(()))
    return KnownCohort(tuple(class_names), cohort.label_names) if class_names else cohort


def tcga_case(slide_id: str) -> str | None:
    """Return the patient of a TCGA barcode (TCGA-05-4250-01Z... -> "TCGA-05-4250"); None for any other id."""
    barcode = re.match(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])", slide_id, re.IGNORECASE)
    return barcode[0].upper() if barcode else None


def tcga_site(case_or_slide_id: str) -> str | None:
    """Return the tissue source site of a TCGA barcode (TCGA-05-4250-01Z... -> "05"); None for any other id."""
    case = tcga_case(case_or_slide_id)
    return case.split("-")[1] if case else None
