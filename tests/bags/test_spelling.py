"""Names that differ, but hardly, are found; names that mean to differ are left alone."""

import pytest

from utils.bags.spelling import classes_alike, plain_spelling, spelled_alike, without_ending
from utils.core.placeholders import is_placeholder


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("TCGA-1", "tcga-1"), ("3", "3.0"), ("3", "003"), ("P 1", "P1"), ("P_1", "p-1"),
        ("M\u00fcller", "Mu\u0308ller"),
        ("P\u20131", "P-1"), ("P1\u200b", "P1"), ("\uff11\uff12", "12"), ("P1", "P01"), ("P1", "P-1"), ("P1", "P.1"),
        ("Pat1", "Pat 01"), ("TCGA-AA-0001", "TCGA.AA.0001"), ("Muller", "M\u00fcller"), ("\u0410B", "AB"),
        ("'P0", "P0"), ("1", "1.0E+0"), ("1", "1e0"),
    ],
)  # fmt: skip
def test_one_id_in_two_spellings(first, second):
    assert spelled_alike([first, "other", second, first]) == [(first, second)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1-11", "11-1"),
        ("P1", "P10"),
        ("S1-11", "S11-1"),
        ("3.5", "35"),
        ("10", "1"),
        ("0", "00.1"),
        ("1.05", "1.5"),
        ("A100", "A10"),
        ("TCGA-A2-A0CM", "TCGA-A2-A0CV"),
        ("P1-S2", "P12-S"),
        ("1e1", "1e0"),
    ],
)
def test_two_ids(first, second):
    assert spelled_alike([first, second]) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Tumor", "tumor"), ("0", "0.0"), ("MSI-H", "msi h"), ("MSIH", "MSI-H"), ("adenocarcinma", "adenocarcinoma"),
        ("malignent", "malignant"), ("tumor", "tumour"), ("squamos cell", "squamous cell"), ("benign", "benigne"),
        ("benign", "bening"), ("myxoid", "mixoid"), ("umor", "tumor"), ("stage I", "Stage_I"), ("grade 1", "grade1"),
        ("benign", "begnin"), ("malign", "malignant"), ("pos", "Positive"), ("neg.", "neg"), ("0", "False"),
        ("yes", "Y"), ("1", "TRUE"), ("1", "1e0"), ("G1", "G01"),
    ],
)  # fmt: skip
def test_one_class_in_two_spellings(first, second):
    assert classes_alike([first, second]) == [(first, second)]


@pytest.mark.parametrize(
    "classes",
    [
        ("benign", "malignant"), ("LUAD", "LUSC"), ("PRCC", "CCRCC", "CHRCC"), ("stage I", "stage II", "stage III"),
        ("grade 1", "grade 2"), ("G1", "G2"), ("ER+", "ER-"), ("MSI-H", "MSI-L", "MSS"), ("normal", "abnormal"),
        ("hypoplasia", "hyperplasia"), ("invasive", "noninvasive"), ("responder", "non-responder"), ("typea", "typeb"),
        ("luminal A", "luminal B"), ("positive", "negative"), ("adenoma", "adenocarcinoma"), ("IDC", "ILC"),
        ("typical", "atypical"), ("differentiated", "undifferentiated"), ("keratinizing", "nonkeratinizing"),
        ("sensitive", "insensitive"), ("symptomatic", "asymptomatic"), ("complete", "incomplete"),
        ("hypermethylated", "hypomethylated"), ("anterior", "interior"), ("micropapillary", "macropapillary"),
        ("1", "10"), ("HER2", "HER2-"), ("male", "female"), ("T cell", "B cell"), ("IDC", "IDC-mixed"), ("II", "III"),
        ("-1", "1"), ("no", "yes"), ("0", "1"), ("tumor", "non tumor"), ("MSI", "MSS"), ("0", "no"), ("IIIA", "IIIB"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_classes_that_mean_to_differ(classes):
    assert classes_alike(classes) == []


@pytest.mark.parametrize(
    "text", ["NA", "n.d.", "Not assessed", "[Not Available]", "unkown", "pd.NA", "no data", "[Discrepancy]", "-999"]
)
def test_a_placeholder(text):
    assert is_placeholder(text)


@pytest.mark.parametrize("text", ["other", "0", "none left", "normal", "N", "no", "negative", "NAT", "false"])
def test_a_value_is_no_placeholder(text):
    assert not is_placeholder(text)


@pytest.mark.parametrize(
    ("wsi_id", "bare"),
    [("a.svs", "a"), ("a.b.H5", "a.b"), ("a.b", "a.b"), ("12.0", "12"), ("1.5", "1.5"), ("a.0", "a.0")],
)
def test_the_ending_of_a_slide_goes_and_nothing_else(wsi_id, bare):
    assert without_ending(wsi_id) == bare


def test_plain_spelling_keeps_what_tells_ids_apart():
    ids = [f"TCGA-{a}{b}-{c}" for a in "AB" for b in "01" for c in range(20)]
    assert len({plain_spelling(name) for name in ids}) == len(ids)
