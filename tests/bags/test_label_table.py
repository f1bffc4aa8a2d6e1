"""A table is read as its writer meant it, what was chosen is said, and what can be read in two ways is refused."""

import pytest

from utils.bags.label_table import read_table, several_names, unknown_patients
from utils.bags.labels import doubted_patients, missing_patients
from utils.core.errors import LabelsError


@pytest.fixture
def table(tmp_path):
    """Writes a table and reads it."""

    def write(header: str, *rows: str):
        (tmp_path / "labels.csv").write_text("\n".join([header, *rows, ""]))
        return read_table(tmp_path / "labels.csv")

    return write


@pytest.mark.parametrize(
    "header",
    [
        "patient_id,slide_id,label", "Case ID,Slide ID,Label", "submitter_id,slide,class", "Patient,wsi,diagnosis",
        "case,filename,target", "PATIENT-ID,Image Name,oncotree_code", "subject,WSI_ID,LABEL", "case_id,file,subtype",
    ],
)  # fmt: skip
def test_other_names_of_the_columns_are_taken_and_said(table, header):
    read = table(header, "P1,S1,a", "P1,S2,b")
    assert [(row["case_id"], row["wsi_id"], row["label"]) for row in read.rows] == [
        ("P1", "S1", "a"),
        ("P1", "S2", "b"),
    ]
    patient, slide, label = header.split(",")
    assert read.patients_from == f"the column {patient}"
    taken = [f"the column {name} is taken as {ours}" for name, ours in ((slide, "wsi_id"), (label, "label"))]
    assert set(taken) - set(read.notes) <= {"the column label is taken as label"}
    assert read.rows[0][patient] == "P1", "the column keeps its own name beside ours"


def test_our_own_names_are_taken_without_a_word_whatever_else_is_there(table):
    read = table("case_id,wsi_id,label,class,slide_id", "P1,S1,a,x,y", "P2,S2,b,x,z")
    assert (read.rows[0]["wsi_id"], read.rows[0]["label"], read.notes) == ("S1", "a", ())


@pytest.mark.parametrize(
    ("header", "rows", "name"),
    [
        ("subject,patient,slide_id,label", ("A,P1,S1,a", "A,P2,S2,b"), "case_id"),
        ("case_id,slide,wsi,label", ("P1,S1,T1,a", "P1,S1,T2,b"), "wsi_id"),
        ("case_id,wsi_id,diagnosis,subtype", ("P1,S1,a,b", "P2,S2,a,c"), "label"),
    ],
)
def test_two_columns_that_could_be_ours_are_refused_by_name(table, header, rows, name):
    with pytest.raises(LabelsError, match=rf"could each be {name}; rename the right one to {name}"):
        table(header, *rows)


def test_two_columns_that_say_the_same_are_no_question(table):
    read = table("patient_id,submitter_id,slide_id,label", "1,P1,S1,a", "1,P1,S2,b", "2,P2,S3,b")
    assert [row["case_id"] for row in read.rows] == ["1", "1", "2"]


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_other_marks_between_the_fields_are_told_by_the_header(table, mark, name):
    read = table(mark.join(["case_id", "wsi_id", "label"]), mark.join(["P1", "S1", "a, b"]))
    assert read.rows[0]["label"] == "a, b"
    assert read.notes == (f"its fields are taken as separated by {name}",)


def test_the_first_line_of_a_spreadsheet_names_the_mark(table):
    assert table("sep=;", "case_id;wsi_id;label", "P1;S1;a").rows[0]["wsi_id"] == "S1"


def test_patients_are_read_off_barcodes_where_all_slides_have_one(table):
    ids = ["TCGA-AA-0001-01Z-00-DX1", "tcga-aa-0001-01Z-00-DX2", "TCGA-AB-0002-01A"]
    read = table("wsi_id,label", *(f"{wsi_id},a" for wsi_id in ids))
    assert [row["case_id"] for row in read.rows] == ["TCGA-AA-0001", "TCGA-AA-0001", "TCGA-AB-0002"]
    assert read.notes == ("no column of patients; the TCGA barcodes give 2 patients",)
    assert table("wsi_id,label", f"{ids[0]},a", "S2,b").patients_from is None, "not where one has none"


def test_a_table_without_patients_is_refused_until_that_is_meant(table):
    read = table("wsi_id,label", "p0_s0,a", "p0_s1,b", "p1_s0,a")
    with pytest.raises(LabelsError, match=r"\(p0_s0 and p0_s1 look like one patient's\).*--no_patients"):
        missing_patients(read, no_patients=False)
    assert "each slide is taken as a patient of its own" in (missing_patients(read, no_patients=True) or "")
    assert "look like" not in unknown_patients(table("wsi_id,label", "a1,a", "b2,b"))
    assert "look like" not in unknown_patients(
        table("wsi_id,label", *(f"tumor_{k},a" for k in range(20)), "normal_1,b")
    )
    assert "(perhaps the column study_id does)" in unknown_patients(
        table("wsi_id,label,age,study_id", "a1,a,40,x", "b2,b,41,x", "c3,a,41,y")
    )


@pytest.mark.parametrize(
    "header", ["cases.submitter_id", "cases.0.case_id", "PID", "pat_id", "MRN", "Patients", "case no"]
)
def test_patients_go_by_many_names(header, table):
    assert table(f"wsi_id,label,{header}", "S1,a,P1", "S2,b,P1").patients_from == f"the column {header}"


def test_a_patient_for_each_slide_is_doubted_where_slides_look_like_ones(table):
    alike = table("case_id,wsi_id,label", *(f"P{p}-S{s},P{p}-S{s},a" for p in range(4) for s in range(2)))
    assert "every slide has a patient of its own (P0-S0 and P0-S1 look like one patient's)" in (
        doubted_patients(alike) or ""
    )
    assert doubted_patients(table("case_id,wsi_id,label", *(f"S{s},S{s},a" for s in range(9)))) is None
    assert doubted_patients(table("case_id,wsi_id,label", "P0,P0-S0,a", "P0,P0-S1,a", "P1,P1-S0,b")) is None


def test_a_table_without_our_columns_says_what_to_call_them(table):
    with pytest.raises(
        LabelsError, match=r"found slide_path, Dx, .*; rename the column that holds the slides' names to wsi_id and"
    ):
        table("slide_path,Dx", "S1,a")


def test_a_table_that_names_patients_needs_no_yes(table):
    read = table("patient,wsi_id,label", "P1,S1,a")
    assert missing_patients(read, no_patients=False) is None
    with pytest.raises(LabelsError, match="the column patient names the patients; leave --no_patients out"):
        missing_patients(read, no_patients=True)


def doubts(read, groups=None, column=None) -> list[str]:
    cases = [row["case_id"] for row in read.rows]
    return [str(doubt) for doubt in several_names(read.rows, groups or cases, read.patient_columns, column)]


def test_a_patient_under_two_names(table):
    header, slides = "case_id,wsi_id,label", ["TCGA-AA-0001-01Z", "TCGA-AA-0001-02Z"]
    assert doubts(table(header, "P1,S1,a", "p1,S2,b")) == ["patient 'P1' and 'p1' (differ in spelling only)"]
    joined = "patient '1' and '2' (are of the barcode TCGA-AA-0001)"
    assert doubts(table(header, f"1,{slides[0]},a", f"2,{slides[1]},b")) == [joined]
    by_column = table("case_id,patient,wsi_id,label", "A,P1,S1,a", "B,P1,S2,b", "C,NA,S3,a", "D,NA,S4,b")
    assert doubts(by_column) == [
        "patient 'A' and 'B' (share the patient P1: --group_column patient keeps them together)"
    ]


def test_two_names_within_one_group_do_no_harm_and_groups_have_names_too(table):
    read = table("case_id,wsi_id,label,site", "P1,S1,a,x", "p1,S2,b,x", "P2,S3,a,X")
    assert doubts(read, ["x", "x", "y"]) == []
    assert doubts(read, ["x", "x", "X"], "site") == ["site 'x' and 'X' (differ in spelling only)"]


def test_a_slide_under_two_names(table):
    read = table("case_id,wsi_id,label", "P1,S 1,a", "P1,s1,a")
    assert doubts(read) == ["slide 'S 1' and 's1' (differ in spelling only)"]
