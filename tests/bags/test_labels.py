"""Every row of a label table is used, or its absence is said; nothing is guessed."""

from collections import Counter
from pathlib import Path

import pytest

from utils.bags.label_table import read_table, several_names
from utils.bags.labels import (
    LabelRow,
    classes_in,
    classes_of,
    group_rows,
    resolve_labels,
    with_positive_last,
)
from utils.core.cohorts import KNOWN_COHORTS
from utils.core.errors import LabelsError
from utils.core.runtime import log
from utils.tasks.classification import Classification
from utils.tasks.counts import class_counts

CLASSES = ("benign", "malignant")
REAL_TABLES = Path(__file__).resolve().parents[3] / "shared" / "data" / "labels"


@pytest.fixture
def said(caplog, monkeypatch):
    """What is said from here on, as 'LEVEL message' lines."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger=log.name)
    return lambda: "\n".join(f"{record.levelname} {record.getMessage()}" for record in caplog.records)


class Table:
    """A table on disk, and the accounting of it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "labels.csv"

    def write(self, *rows: str, header: str = "case_id,wsi_id,label") -> "Table":
        return self.write_bytes("\n".join([header, *rows, ""]).encode())

    def write_bytes(self, content: bytes) -> "Table":
        self.path.write_bytes(content)
        return self

    def rows(self):
        return read_table(self.path).rows

    def resolve_labels(self, classes=CLASSES, absent=(), **settings) -> list[LabelRow]:
        def find_file(wsi_id: str) -> Path | None:
            return None if wsi_id in absent else Path(f"{wsi_id}.h5")

        return resolve_labels(read_table(self.path), Classification(classes), find_file, **settings)

    def refusal(self, **settings) -> str:
        with pytest.raises(LabelsError) as caught:
            self.resolve_labels(**settings)
        message = str(caught.value)
        assert message.startswith(f"{self.path}: ")
        assert "\n" not in message
        return message


@pytest.fixture
def table(tmp_path) -> Table:
    return Table(tmp_path)


def ids(rows: list[LabelRow]) -> list[str]:
    return [row.wsi_id for row in rows]


# Reading the table


def test_rows_keep_their_order_and_name_their_file(table):
    header = "case_id,wsi_id,label,age"
    rows = table.write("P2,S3,malignant,61", "P1,S1,benign,", "P1,S2,benign,07", header=header).resolve_labels()
    assert [(row.wsi_id, row.case_id, row.label, row.path) for row in rows] == [
        ("S3", "P2", 1, Path("S3.h5")),
        ("S1", "P1", 0, Path("S1.h5")),
        ("S2", "P1", 0, Path("S2.h5")),
    ]
    assert [row.columns["age"] for row in rows] == ["61", "", "07"]


@pytest.mark.parametrize("text", ["007", "1e5", "NA", "null", "nan", "None", "1.0", "0x10", "TRUE", "-", "2024-01-02"])
def test_ids_and_labels_are_text_as_it_stands(table, text):
    rows = table.write(f"P1,{text},{text}", f"P2,S,{text}").rows()
    assert rows[0] == {"case_id": "P1", "wsi_id": text, "label": text}
    assert ids(table.resolve_labels(classes=(text, "other"))) == [text, "S"], "a class that is named is one"


@pytest.mark.parametrize("text", ["NA", "nan", "None", "unknown", "[Not Available]", "-", "n/a", "N.A.", "NULL"])
def test_what_stands_for_no_value_is_neither_a_class_nor_a_patient_nor_a_site(table, text):
    table.write("P1,S1,benign,x", f"P2,S2,{text},x", "P3,S3,malignant,x", header="case_id,wsi_id,label,center")
    assert classes_in(table.rows()) == CLASSES
    assert f"{text!r} stands for no label: fill it in, or name it in --class_names" in table.refusal()
    table.write("P1,S1,benign", f"{text},S2,malignant")
    assert f"row 2 after the header names no patient (case_id {text!r})" in table.refusal()
    table.write("P1,S1,benign,x", f"P2,S2,malignant,{text}", header="case_id,wsi_id,label,center")
    with pytest.raises(LabelsError, match="1 row without a center: S2"):
        grouped(table, "center")


def test_a_byte_order_mark_spaces_and_windows_line_ends(table):
    content = b"\xef\xbb\xbfcase_id , wsi_id,label \r\n P1 , S1 ,benign\r\n\r\nP2,S2, malignant \r\n,,\r\n"
    rows = table.write_bytes(content).rows()
    assert rows == [
        {"case_id": "P1", "wsi_id": "S1", "label": "benign"},
        {"case_id": "P2", "wsi_id": "S2", "label": "malignant"},
    ]


def test_columns_stand_in_any_order_and_extra_ones_are_kept(table):
    table.write("x,benign,S1,P1,", "y,malignant,S2,P2,", header="site,label,wsi_id,case_id,")
    assert [row["site"] for row in table.rows()] == ["x", "y"]
    assert ids(table.resolve_labels()) == ["S1", "S2"]


def test_quoted_fields_hold_commas_quotes_and_line_ends(table):
    table.write('"P,1","S1",benign,"a ""note"",\nof two lines"', "P2,S2,malignant,", header="case_id,wsi_id,label,note")
    rows = table.rows()
    assert rows[0] == {"case_id": "P,1", "wsi_id": "S1", "label": "benign", "note": 'a "note",\nof two lines'}
    assert ids(table.resolve_labels()) == ["S1", "S2"]


def test_with_a_case_id_column_nothing_is_said(table, said):
    table.write("P1,S1,benign", "P2,S2,malignant").resolve_labels()
    assert said() == ""


@pytest.mark.parametrize("header", ["case_id,picture,label", "case_id wsi_id label", "case_id,wsi_id", "id,grade"])
def test_missing_columns_are_told_with_those_found(table, header):
    message = table.write("a,b,c", header=header).refusal()
    assert "no column " in message
    assert "expected case_id,wsi_id,label" in message
    assert f"found {', '.join(header.split(','))}" in message


@pytest.mark.parametrize(
    "header", ["case_id,wsi_id,label,label", "case_id,wsi_id,label, label ", "wsi_id,wsi_id,label,x"]
)
def test_two_columns_of_one_name_are_refused(table, header):
    assert "two columns are called" in table.write("a,b,c,d", header=header).refusal()


@pytest.mark.parametrize(
    "rows",
    [
        ["P1,S1,benign,", "P2,S2,malignant,"],
        ["P1,S1,benign,note", "P2,S2,malignant,note"],
        ["P1,S1,benign", "P2,S2,malignant,note"],
        ["P1,S1,benign", "P2,S2"],
        ["P1,S1,benign", "S2"],
    ],
    ids=["comma at the end of all", "a field too many in all", "in one", "a field too few", "one field"],
)
def test_rows_of_another_length_than_the_header_are_refused(table, rows):
    """Columns must not shift: a reader of tables may take the first of too many fields for the rows' names."""
    message = table.write(*rows).refusal()
    assert "more or fewer fields than the header's 3" in message
    assert repr(rows[-1]) in message


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file(table, content):
    assert "no column wsi_id and label; found nothing" in table.write_bytes(content).refusal()


def test_a_header_alone(table):
    assert "no rows; expected one row per slide" in table.write().refusal()


@pytest.mark.parametrize(
    "content",
    [
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "case_id,wsi_id,label\n".encode("utf-16"),
        b'case_id,wsi_id,label\na,"b,c',
    ],
    ids=["picture", "utf-16", "quote never closed"],
)
def test_what_is_no_csv(table, content):
    assert "not readable as a CSV table" in table.write_bytes(content).refusal()


def test_no_such_file_and_a_folder(tmp_path):
    with pytest.raises(LabelsError, match=r"nowhere\.csv: no such file; expected a table with the columns"):
        read_table(tmp_path / "nowhere.csv")
    with pytest.raises(LabelsError, match="not readable as a CSV table"):
        read_table(tmp_path)


# Accounting for every row


def test_an_unknown_label_is_told_with_its_slide(table):
    message = table.write("P1,S1,benign", "P2,S2,Malignant", "P3,S3,").refusal()
    assert "2 rows with a label that is none of benign, malignant: S2 ('Malignant'), S3 ('')" in message
    assert "--allow unknown" in message


def test_a_missing_file_is_told(table):
    message = table.write("P1,S1,benign", "P2,S2,malignant").refusal(absent={"S2"})
    assert "1 row with a wsi_id without a feature file: S2" in message
    assert "--allow missing" in message


def test_a_repeated_id_is_told(table):
    message = table.write("P1,S1,benign", "P2,S2,malignant", "P1,S1,benign").refusal()
    assert "1 row with a wsi_id of an earlier row: S1; " in message
    assert "--allow duplicate" in message


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("P1,S1,malignant", "S1 (label benign, then malignant)"),
        ("P9,S1,benign", "S1 (case_id P1, then P9)"),
        ("P9,S1,other", "S1 (case_id P1, then P9; label benign, then other)"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"left_out": ["other"]}, {"allow": ["unknown", "missing"]}])
def test_a_repeated_id_that_contradicts_itself_is_told_whatever_else_is_left_out(table, row, told, settings):
    message = table.write("P1,S1,benign", "P2,S2,malignant", row).refusal(**settings)
    assert f"wsi_id of an earlier row: {told}; " in message


@pytest.mark.parametrize(
    ("kind", "rows", "absent", "left"),
    [
        ("unknown", ["P1,S1,benign", "P2,S2,odd", "P3,S3,malignant"], (), ["S1", "S3"]),
        ("missing", ["P1,S1,benign", "P2,S2,benign", "P3,S3,malignant"], ("S2",), ["S1", "S3"]),
        ("duplicate", ["P1,S1,benign", "P1,S1,malignant", "P3,S3,malignant"], (), ["S1", "S3"]),
    ],
)
def test_what_is_allowed_is_left_out_aloud_and_nothing_else_is(table, said, kind, rows, absent, left):
    table.write(*rows)
    others = {"unknown", "missing", "duplicate"} - {kind}
    table.refusal(absent=absent, allow=others)
    assert said() == ""
    usable = table.resolve_labels(absent=absent, allow=[kind])
    assert ids(usable) == left
    assert usable[0].label == 0, "of rows that repeat an id the first one stands"
    assert said().startswith(f"WARNING {table.path}: 1 row with a ")
    assert ("S1" if kind == "duplicate" else "S2") in said()
    assert said().endswith("left out")


def test_many_offenders_are_counted_and_a_few_named(table):
    message = table.write("P,S,benign", *[f"P{k},S{k},odd" for k in range(30)]).refusal()
    assert "30 rows" in message
    assert "S4 ('odd') and 25 more" in message
    assert "S5" not in message


def test_a_table_of_which_nothing_is_left(table):
    assert "no usable row is left" in table.write("P1,S1,odd").refusal(allow=["unknown"])
    assert "no usable row is left" in table.write("P1,S1,benign").refusal(absent={"S1"}, allow=["missing"])


@pytest.mark.parametrize(
    ("wsi_id", "near", "cure"),
    [
        ("S1.svs", "S1", "write the ids without their ending .svs"),
        ("S1.h5", "S1", "write the ids without their ending .h5"),
        ("7", "007", "a spreadsheet has made the ids numbers and lost their zeros"),
        ("7.0", "007", "a spreadsheet has made the ids numbers"),
        ("Mu\u0308ller", "M\u00fcller", "in two Unicode forms, composed and decomposed"),
        ("s_1", "S-1", "write the ids alike"),
        ("s1", "S01", "write the ids alike"),
        ("S1.ome.tiff", "S1", "write the ids without their ending .ome.tiff"),
        ("S1.svs.h5", "S1", "write the ids without their ending .svs.h5"),
        ("S1.qptiff", "S1", "write the ids without their ending .qptiff"),
        ("S1", "S1.svs", "write the ids whole, with .svs"),
        ("TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0001-01Z-00-DX1.ABCDEF0-1111", "write the ids whole, with .ABCDEF0-1111"),
    ],
)
def test_an_id_that_just_misses_a_file_is_told_with_it_and_with_the_cure(table, wsi_id, near, cure):
    message = table.write(f"P1,{wsi_id},benign").refusal(absent=[wsi_id], ids=lambda: ["other", near])
    assert f"{wsi_id} (there is {near})" in message
    assert cure in message


def test_an_id_that_is_near_nothing_is_told_alone(table):
    table.write("P1,S1,benign", "P2,S2,benign")
    message = table.refusal(absent=["S1"], ids=lambda: ["S2"])
    assert "without a feature file: S1; mend the table, or leave them out with --allow missing" in message
    none_left = table.refusal(absent=["S1", "S2"], ids=lambda: ["S3"])
    assert none_left.endswith("S1, S2; mend the table"), "leaving out every row is no cure"


@pytest.mark.parametrize(("label", "hint"), [("Benign", "another spelling"), ("malignat", "did you mean malignant")])
def test_a_label_that_just_misses_a_class_is_told_with_it(table, label, hint):
    assert hint in table.write("P1,S1,benign", f"P2,S2,{label}").refusal()


def test_an_id_that_may_be_several_is_told_alone(table):
    assert "(there is" not in table.write("P1,S1,benign").refusal(absent=["S1"], ids=lambda: ["S1.a", "S1.b"])


def test_a_path_as_an_id_is_told_with_the_name_in_it(table):
    message = table.write("P1,/data/slides/S1.svs,benign").refusal()
    assert message.endswith("give names without folder and ending: write S1")


def test_a_class_that_reads_as_no_label_is_told(table):
    table.write("P1,S1,polyp", "P2,S2,none")
    with pytest.raises(LabelsError, match=r"'none' is taken as no label, .*: --class_names polyp none"):
        classes_of(read_table(table.path))
    assert ids(table.resolve_labels(classes=("polyp", "none"))) == ["S1", "S2"]


def test_classes_that_look_like_one_are_refused_until_they_are_named(table):
    table.write("P1,S1,Tumor", "P2,S2,normal", "P3,S3,tumor")
    with pytest.raises(LabelsError, match=r"'Tumor' and 'tumor'; .* --class_names Tumor normal tumor"):
        classes_of(read_table(table.path))
    assert ids(table.resolve_labels(classes=("Tumor", "normal", "tumor"))) == ["S1", "S2", "S3"]


def test_patients_are_counted_once_however_many_classes_they_have():
    counts = class_counts([(0, "P1"), (1, "P1"), (1, "P2"), (0, "P3")], CLASSES)
    assert counts == "benign 2 slides of 2 patients; malignant 2 slides of 2 patients; 3 patients in all (1 in both)"


@pytest.mark.parametrize("wsi_id", ["../S1", "a/b", "/etc/passwd", "..", ".", "..\\S1", "C:\\x", "S\x001"])
def test_an_id_that_leaves_the_features_folder_is_an_error_whatever_is_allowed(table, wsi_id):
    table.write(f"P1,{wsi_id},benign", "P2,S2,malignant")
    message = table.refusal(allow=["unknown", "missing", "duplicate"])
    assert "would leave the features folder" in message
    assert wsi_id in message
    # Not even where its row would be left out anyway.
    table.write(f"P1,{wsi_id},odd", "P2,S2,malignant")
    assert "would leave the features folder" in table.refusal(allow=["unknown"], left_out=["odd"])


def test_ids_with_dots_and_spaces_inside_are_plain(table):
    names = ["TCGA-1.B34C", "S 1", "..S", "S..h5", "a:b", "Präparat", "~", "-x"]
    assert ids(table.write(*[f"P{k},{name},benign" for k, name in enumerate(names)]).resolve_labels()) == names


@pytest.mark.parametrize(("row", "number"), [(",S2,benign", 2), ("P2,,benign", 2), (" , S2,benign", 2)])
def test_an_empty_id_is_an_error_with_its_row(table, row, number):
    message = table.write("P1,S1,benign", row).refusal(allow=["unknown", "missing", "duplicate"])
    assert f"row {number} after the header has an empty case_id or wsi_id" in message


def test_cases_with_slides_of_several_classes_are_told_and_kept(table, said):
    rows = table.write("P1,S1,benign", "P1,S2,malignant", "P2,S3,benign", "P2,S4,benign").resolve_labels()
    assert len(rows) == 4
    assert said().endswith("patients whose slides differ in label, which stay in one fold: P1")


# Names of labels


def test_labels_are_renamed_to_the_classes(table):
    known = KNOWN_COHORTS["tupac"]
    table.write("P1,S1,0", "P2,S2,1", "P3,S3,High")
    rows = table.resolve_labels(classes=known.class_names, label_names=known.label_names)
    assert [row.label for row in rows] == [0, 1, 1]
    assert "none of Low, High: S1 ('0'), S2 ('1')" in table.refusal(classes=known.class_names)


def test_a_label_that_is_a_class_as_it_stands_is_not_renamed(table):
    rows = table.write("P1,S1,0", "P2,S2,1").resolve_labels(classes=("1", "0"), label_names={"0": "Low", "1": "High"})
    assert [row.label for row in rows] == [1, 0]


def test_labels_that_are_no_class_are_left_out_aloud(table, said):
    rows = table.write("P1,S1,benign", "P2,S2,rare", "P3,S3,malignant").resolve_labels(left_out=["rare", "other"])
    assert ids(rows) == ["S1", "S3"]
    assert said() == f"INFO {table.path}: 1 row left out, of the labels other, rare"


def test_a_label_is_renamed_before_it_is_left_out(table):
    table.write("P1,S1,benign", "P2,S2,9")
    assert ids(table.resolve_labels(label_names={"9": "rare"}, left_out=["rare"])) == ["S1"]


def test_classes_in_a_table_are_sorted_renamed_and_without_the_empty_one(table):
    rows = table.write("P,S1,b", "P,S2,a", "P,S3,", "P,S4,10", "P,S5,9").rows()
    assert classes_in(rows) == ("10", "9", "a", "b")
    assert classes_in(rows, label_names={"10": "a", "9": "rare"}, left_out=["rare", "b"]) == ("a",)


# The real tables


@pytest.mark.parametrize(
    ("name", "usable", "counts"),
    [
        ("breast", 875, {"IDC": 726, "ILC": 149}),
        ("lung", 958, {"LUAD": 492, "LUSC": 466}),
    ],
)
def test_the_real_tables_with_the_known_cohorts(name, usable, counts):
    path = REAL_TABLES / f"{name}.csv"
    if not path.is_file():
        pytest.skip(f"real data not there: {path}")
    known = KNOWN_COHORTS[name]
    table = read_table(path)
    assert "subset" in table.rows[0], "extra columns are kept"
    assert several_names(table.rows, [row["case_id"] for row in table.rows]) == []
    rows = resolve_labels(
        table, Classification(known.class_names), lambda wsi_id: Path(f"{wsi_id}.pt"),
        label_names=known.label_names, left_out=known.left_out,
    )  # fmt: skip
    assert len(rows) == usable
    assert Counter(known.class_names[row.label] for row in rows) == counts
    assert all(row.wsi_id.startswith(row.case_id) for row in rows)
    assert len({row.wsi_id for row in rows}) == len(rows)
    assert len(table.rows) == len(rows) + sum(row["label"] in known.left_out for row in table.rows)


# What splits keep together


def grouped(table: Table, column: str | None) -> list[str]:
    return group_rows(table.path, [row.columns for row in table.resolve_labels()], column)


def test_without_a_column_cases_stay_together(table):
    assert grouped(table.write("P2,S3,malignant", "P1,S1,benign", "P1,S2,benign"), None) == ["P2", "P1", "P1"]


def test_a_column_in_another_case_is_named(table):
    table.write("P1,S1,benign,Oslo", "P2,S2,malignant,Oslo", header="case_id,wsi_id,label,Site")
    for column in ("site", "SITE", "sitee"):
        with pytest.raises(LabelsError, match="did you mean Site"):
            grouped(table, column)


def test_a_column_groups_its_cases(table):
    table.write("P1,S1,benign,Oslo", "P2,S2,malignant,Oslo", "P3,S3,benign,007", header="case_id,wsi_id,label,center")
    assert grouped(table, "center") == ["Oslo", "Oslo", "007"]


def test_the_site_is_read_off_tcga_barcodes_unless_there_is_a_column(table):
    slides = ("TCGA-05-4250,TCGA-05-4250-01Z-00-DX1.90f6", "C2,TCGA-4B-A93V-01Z-00-DX1.C263")
    table.write(*(f"{slide},{label}" for slide, label in zip(slides, CLASSES, strict=True)))
    assert grouped(table, "site") == ["05", "4B"]
    header = "case_id,wsi_id,label,site"
    table.write(*(f"{slide},{label},x" for slide, label in zip(slides, CLASSES, strict=True)), header=header)
    assert grouped(table, "site") == ["x", "x"]


@pytest.mark.parametrize(
    ("rows", "column", "reason"),
    [
        (("P1,S1,benign,x",), "scanner", "no column scanner to group by; found case_id, wsi_id, label, center"),
        (("P1,S1,benign,x", "P2,S2,benign,"), "center", "1 row without a center: S2; fill it in"),
        (("P1,S1,benign,x",), "site", "1 row without a site .there is no column site.*: S1; fill it in"),
        (
            ("P1,S1,benign,x", "P1,S2,benign,y"),
            "center",
            "patient P1 has slides of center x and y; a patient must stay",
        ),
    ],
)
def test_groups_that_cannot_be_kept_together(table, rows, column, reason):
    table.write(*rows, header="case_id,wsi_id,label,center")
    with pytest.raises(LabelsError, match=reason):
        grouped(table, column)


# Which of two classes is positive


def test_of_two_classes_the_rarer_one_is_last(table):
    rows = [f"P{k},S{k},msi" for k in range(2)] + [f"Q{k},T{k},stable" for k in range(3)]
    assert classes_of(read_table(table.write(*rows).path)) == ("stable", "msi")
    assert classes_of(read_table(table.write(*rows[:4]).path)) == ("msi", "stable"), "equally frequent: sorted"
    renamed = classes_of(read_table(table.path), label_names={"msi": "zz", "stable": "a"})
    assert renamed == ("a", "zz")
    assert classes_of(read_table(table.write(*rows, "R1,U1,third").path)) == ("msi", "stable", "third")


def test_the_positive_class_can_be_named(table):
    path = table.path
    assert with_positive_last(("a", "b"), None, path) == ("a", "b")
    assert with_positive_last(("a", "b"), "a", path) == ("b", "a")
    for classes, name, reason in (
        (("a", "b", "c"), "a", "there are 3 classes"),
        (("tumor", "b"), "tumour", "did you mean tumor"),
    ):
        with pytest.raises(LabelsError, match=f"--positive_class {name}: .*{reason}"):
            with_positive_last(classes, name, path)
