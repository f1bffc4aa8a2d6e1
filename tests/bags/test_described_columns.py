"""Columns of a label table that describe patients: numbers or words, what is unknown, and what cannot be used."""

from pathlib import Path

import numpy as np
import pytest

from utils.bags.described_columns import Column, read_columns, read_covariates
from utils.bags.labels import LabelRow
from utils.core.errors import LabelsError
from utils.tasks.classification import Classification
from utils.tasks.survival import Survival

TABLE = Path("labels.csv")
CLASSES = Classification(("no", "yes"))


def rows(cells: dict[str, list[str]], cases: list[str] | None = None) -> list[LabelRow]:
    count = len(next(iter(cells.values())))
    cells = {"case_id": cases or [f"P{n}" for n in range(count)], "label": ["no", "yes"] * (count // 2)} | cells
    texts = [{name: column[n] for name, column in cells.items()} for n in range(count)]
    return [LabelRow(f"S{n}", row["case_id"], int(row["label"] == "yes"), TABLE, row) for n, row in enumerate(texts)]


class TestColumn:
    def test_numbers_and_what_is_unknown(self):
        column = Column.of("age", ["63", "NA", "", "70.5"])
        assert column.is_number
        np.testing.assert_array_equal(column.values, [63, np.nan, np.nan, 70.5])
        assert column.missing(np.array(["P0", "P1", "P2", "P3"])) == 2
        assert column.missing(np.array(["P0", "P0", "P2", "P2"])) == 0, "another slide of the patient has it"

    def test_one_cell_that_is_no_number_makes_words(self):
        assert Column.of("stage", ["1", "2", "3A", "unknown"]).values.tolist() == ["1", "2", "3A", ""]
        assert not Column.of("age", ["1", "inf"]).is_number

    @pytest.mark.parametrize(
        ("name", "cells", "why"),
        [
            ("site", ["A"] * 12, "has one value only"),
            ("site", ["NA"] * 12, "has no value"),
            ("remark", [f"text {n}" for n in range(12)], "12 different values in 12 patients, such as 'text 0'"),
            ("age", [*map(str, range(50, 61)), ">89"], "such as '>89'"),
            ("patient_id", list(map(str, range(12))), "identifies patients"),
            ("age", list(map(str, range(12))), ""),
            ("site", list("ABCDEABCDEAB"), ""),
        ],
    )
    def test_what_cannot_be_used_says_why(self, name, cells, why):
        fault = Column.of(name, cells).fault(np.array([f"P{n}" for n in range(12)]))
        assert why in fault
        assert bool(why) is bool(fault)

    def test_groups_are_words_few_numbers_or_the_sides_of_the_median(self):
        words = Column.of("sex", ["m", "f", "NA", "m"]).groups()
        assert {name: rows.tolist() for name, rows in words.items()} == {
            "f": [False, True, False, False], "m": [True, False, False, True], "unknown": [False, False, True, False],
        }  # fmt: skip
        assert list(Column.of("grade", ["2", "10", "1"]).groups()) == ["1", "2", "10"], "in the order of numbers"
        ages = Column.of("age", [*map(str, range(20)), "NA"]).groups()
        assert list(ages) == ["at most 9.5", "above 9.5", "unknown"]
        assert np.stack(list(ages.values())).sum(axis=0).tolist() == [1] * 21


class TestReading:
    def test_a_patients_value_counts_for_all_slides(self):
        cells = {"age": ["61", "", "72", "72"]}
        (column,) = read_covariates(TABLE, rows(cells, ["P0", "P0", "P1", "P1"]), ["age"], CLASSES)
        assert column.values.tolist() == [61, 61, 72, 72]

    def test_two_values_of_a_patient(self):
        cells = {"age": ["61", "62", "72", "73"]}
        with pytest.raises(LabelsError, match=r"--covariates age: patient P0 has 61.0 and 62.0; give all slides of"):
            read_covariates(TABLE, rows(cells, ["P0", "P0", "P1", "P1"]), ["age"], CLASSES)

    def test_a_name_that_is_not_there(self):
        table = [row.columns for row in rows({"Age": ["61", "62"]})]
        with pytest.raises(
            LabelsError, match=r"labels.csv: --subgroups age: no such column; found .*; did you mean Age"
        ):
            read_columns(TABLE, table, ["age"], "--subgroups")

    @pytest.mark.parametrize(
        ("cells", "task"),
        [
            ({"label": ["no", "yes"] * 3}, CLASSES),
            ({"code": ["0", "1"] * 3}, CLASSES),
            ({"state": ["alive", "dead"] * 3, "t": list("123456"), "e": ["0", "1"] * 3}, Survival("t", "e")),
            (
                {"months": list("123456"), "t": ["30", "60", "90", "120", "150", "180"], "e": ["1"] * 6},
                Survival("t", "e"),
            ),
        ],
    )
    def test_the_target_is_no_covariate(self, cells, task):
        name = next(iter(cells))
        with pytest.raises(LabelsError, match=f"--covariates {name}: the column says the target itself"):
            read_covariates(TABLE, rows(cells), [name], task)

    @pytest.mark.parametrize(
        ("cells", "is_doubted"),
        [
            (list("abcbabcb"), True),
            (list("abababaa"), False),
            (list("abcdabce"), False),
            (["0.1", "0.8", "0.2", "0.9"] * 2, True),
            (["0.1", "0.8", "0.85", "0.9"] * 2, False),
            (["0", "0", "0", "1"] * 2, False),
        ],
    )
    def test_a_column_that_tells_the_target_is_doubted(self, cells, is_doubted, caplog):
        read_covariates(TABLE, rows({"marker": cells}), ["marker"], CLASSES)
        assert ("each of its values comes with one target only" in caplog.text) is is_doubted


def test_a_number_that_differs_in_each_patient_is_no_target_that_does():
    cases = [f"P{number // 2}" for number in range(16)]
    days = [str(100 + 7 * (number // 2)) for number in range(16)]
    measured = [str(number * 37 % 101) for number in range(8) for _ in range(2)]
    cohort = rows({"bmi": measured, "days": days, "died": ["1"] * 16}, cases)
    (column,) = read_covariates(TABLE, cohort, ["bmi"], Survival("days", "died"))
    assert column.is_number


def test_a_patient_s_other_slides_say_what_is_unknown_where_they_agree():
    cases = np.array(["P0", "P0", "P1", "P1", "P1"])
    column = Column.of("sex", ["f", "NA", "m", "f", ""])
    assert column.filled(cases).values.tolist() == ["f", "f", "m", "f", ""]
    with pytest.raises(ValueError, match="patient P1 has m and f"):
        column.of_patients(cases)


def test_a_column_whose_name_holds_a_comma_is_to_be_renamed():
    cohort = rows({"ki,67": ["1", "2", "3", "4"]})
    with pytest.raises(LabelsError, match=r"no such column; .*commas separate names, so rename the column 'ki,67'"):
        read_columns(TABLE, [row.columns for row in cohort], ["ki", "67"], "--covariates")
