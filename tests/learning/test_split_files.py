"""Folds read from files of splits."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.learning.runs import make_cv
from utils.core.errors import ConfigError, SplitError
from utils.core.files import read_json, write_text
from utils.learning.settings import Protocol
from utils.learning.split_files import folds_from_file, read_splits, shared_cases, unused_split
from utils.mil_dataset import MILDataset


def write_parts(path: Path, train: list[str], val: list[str], test: list[str]) -> Path:
    """As CLAM writes it: a first column without a name, columns as long as the longest."""
    pd.DataFrame({"train": pd.Series(train), "val": pd.Series(val), "test": pd.Series(test)}).to_csv(path)
    return path


# The counts of a command line that does not say any: a file of splits says them.
UNSAID = {"n_outer": Protocol.n_outer, "n_inner": Protocol.n_inner}


class TestSplitsFile:
    def test_our_own_file_gives_the_run_again(self, finished, dataset, tmp_path, no_figures):
        cv = make_cv(dataset, tmp_path / "run", splits=finished.folder / "splits.json")
        results = cv.run()
        for name in ("predictions.csv", "history.csv", "splits.json", "fold_2_best.pth"):
            assert (tmp_path / "run" / name).read_bytes() == (finished.folder / name).read_bytes(), name
        assert results["pooled"] == finished.results["pooled"]

    def test_repeats_are_read_back(self, dataset, tmp_path, unfitted):
        first = make_cv(dataset, tmp_path / "a", repeats=2).run()
        again = make_cv(dataset, tmp_path / "b", splits=tmp_path / "a", **UNSAID).run()
        assert (tmp_path / "b" / "splits.json").read_bytes() == (tmp_path / "a" / "splits.json").read_bytes()
        assert (again["n_repeats"], again["n_folds"]) == (first["n_repeats"], first["n_folds"]) == (2, 6)

    def clam(self, folder: Path, dataset: MILDataset, tests: list[range]) -> Path:
        """Splits of patients P000-P011, each tested range its own file."""
        folder.mkdir()
        slides_of = {case: [row.wsi_id for row in dataset.rows if row.case_id == case] for case in set(dataset.cases)}
        for number, tested in enumerate(tests):
            left = [patient for patient in range(12) if patient not in tested]
            parts = [
                [wsi_id for patient in part for wsi_id in slides_of[f"P{patient:03d}"]]
                for part in (left[:-4], left[-4:], tested)
            ]
            write_parts(folder / f"splits_{number}.csv", *parts)
        return folder

    def test_clams_disjoint_tests_are_one_repeat(self, dataset, tmp_path, unfitted):
        splits = self.clam(tmp_path / "splits", dataset, [range(4), range(4, 8), range(8, 12)])
        results = make_cv(dataset, tmp_path / "run", splits=splits, **UNSAID).run()
        assert (results["n_repeats"], results["n_folds"], len(unfitted.states)) == (1, 3, 3)
        rows = pd.read_csv(tmp_path / "run" / "predictions.csv")
        assert rows["fold"].tolist() == [1 + patient // 4 for patient in range(12) for _ in range(2)]

    def test_clams_overlapping_tests_are_repeats(self, dataset, tmp_path, unfitted, aloud):
        splits = self.clam(tmp_path / "splits", dataset, [range(4), range(2, 6)])
        results = make_cv(dataset, tmp_path / "run", splits=splits, **UNSAID).run()
        assert (results["n_repeats"], results["n_folds"], results["n_slides"], results["n_cases"]) == (2, 2, 12, 6)
        assert "12 of 24 slides are tested by no fold" in aloud.text
        assert "the tests overlap; each of the 2 splits is a repeat of its own" in aloud.text
        assert len(pd.read_csv(tmp_path / "run" / "predictions.csv")) == 16

    def test_a_shared_patient_is_refused(self, dataset, tmp_path):
        ids = [row.wsi_id for row in dataset.rows]
        write_parts(tmp_path / "splits_0.csv", ids[:11], ids[12:18], [ids[11], *ids[18:]])
        cv = make_cv(dataset, tmp_path / "run", splits=tmp_path / "splits_0.csv", **UNSAID)
        with pytest.raises(SplitError, match=r"1 patient on both sides of splits_0.csv: P005 \(train and test\)"):
            cv.run()
        assert not (tmp_path / "run").exists()

    def test_a_shared_group_is_refused(self, cohort, tmp_path):
        table = pd.read_csv(cohort[0], dtype=str)
        table.assign(site=table["case_id"].str[1:].astype(int) // 4).to_csv(tmp_path / "labels.csv", index=False)
        data = MILDataset(tmp_path / "labels.csv", cohort[1], group_column="site")
        ids = [row.wsi_id for row in data.rows]
        write_parts(tmp_path / "splits_0.csv", ids[:12], ids[12:16], ids[16:])
        with pytest.raises(
            SplitError, match=r"1 site on both sides of splits_0.csv: 1 \(train and val\).*split by site"
        ):
            make_cv(data, tmp_path / "run", splits=tmp_path / "splits_0.csv", **UNSAID).run()

    @pytest.mark.parametrize(
        ("train", "val", "test", "message"),
        [
            (range(12), range(12, 24), range(0), "splits_0.csv has no slide in test"),
            ([0, 1, 4, 5], range(12, 16), range(16, 24), "has no slide of class malignant"),
        ],
    )
    def test_parts_that_cannot_serve(self, train, val, test, message, dataset, tmp_path):
        ids = [row.wsi_id for row in dataset.rows]
        write_parts(tmp_path / "splits_0.csv", *[[ids[slide] for slide in part] for part in (train, val, test)])
        with pytest.raises(SplitError, match=message):
            make_cv(dataset, tmp_path / "run", splits=tmp_path / "splits_0.csv", **UNSAID).run()

    def test_slides_that_the_cohort_lacks(self, cohort, dataset, tmp_path, unfitted):
        ids = [row.wsi_id for row in dataset.rows]
        write_parts(tmp_path / "splits_0.csv", [*ids[:8], "P099-S1"], ids[8:16], ids[16:])
        with pytest.raises(SplitError, match=r"1 slide of the splits not in the cohort: P099-S1; .*--allow missing"):
            make_cv(dataset, tmp_path / "run", splits=tmp_path / "splits_0.csv", **UNSAID).run()
        lenient = MILDataset(*cohort, chunk_size=20, allow=["missing"])
        assert make_cv(lenient, tmp_path / "run", splits=tmp_path / "splits_0.csv", **UNSAID).run()["n_folds"] == 1

    def test_counts_that_contradict_the_file(self, finished, dataset, tmp_path):
        cv = make_cv(dataset, tmp_path / "run", splits=finished.folder, n_outer=4)
        with pytest.raises(ConfigError, match=r"--n_outer 4: .* holds 3; leave it out"):
            cv.run()
        with pytest.raises(ConfigError, match=r"--repeats 2: --splits .* says which folds"):
            make_cv(dataset, tmp_path / "run", splits=finished.folder, repeats=2)

    def test_repeats_may_number_their_folds_alike(self, dataset, tmp_path, unfitted):
        """Two repeats with folds 1 to 3 each: none is taken for a part of the other."""
        make_cv(dataset, tmp_path / "a", repeats=2).run()
        content = read_json(tmp_path / "a" / "splits.json")
        for fold in content["folds"]:
            fold["fold"] = (fold["fold"] - 1) % 3 + 1
        write_text(tmp_path / "splits.json", json.dumps(content))
        make_cv(dataset, tmp_path / "b", splits=tmp_path / "splits.json", **UNSAID).run()
        assert (tmp_path / "b" / "splits.json").read_bytes() == (tmp_path / "a" / "splits.json").read_bytes()
        for fold in read_json(tmp_path / "b" / "splits.json")["folds"]:
            used = {one for inner in fold["inner"] for part in inner.values() for one in part}
            assert not used & set(fold["test"])
            assert len(used) + len(fold["test"]) == len(dataset)

    def test_a_fold_that_stands_twice(self, finished, dataset, tmp_path):
        content = read_json(finished.folder / "splits.json")
        content["folds"][1]["fold"] = 1
        write_text(tmp_path / "splits.json", json.dumps(content))
        with pytest.raises(SplitError, match="fold 1 more than once; give each fold a number of its own"):
            make_cv(dataset, tmp_path / "run", splits=tmp_path / "splits.json", **UNSAID).run()

    def test_a_slide_tested_twice_in_a_repeat(self, finished, dataset, tmp_path):
        content = read_json(finished.folder / "splits.json")
        content["folds"][1] = content["folds"][0] | {"fold": 2}
        write_text(tmp_path / "splits.json", json.dumps(content))
        with pytest.raises(SplitError, match="a slide is tested by two folds of repeat 1"):
            make_cv(dataset, tmp_path / "run", splits=tmp_path / "splits.json", **UNSAID).run()


def test_a_slide_of_given_splits_that_just_misses_one_is_told_with_it(tmp_path):
    path = tmp_path / "splits_0.csv"
    path.write_text(",train,val,test\n0,7,S2,S3\n1,S4,,\n")
    with pytest.raises(
        SplitError, match=r"not in the cohort: 7 \(there is 007\); a spreadsheet has made the ids numbers"
    ):
        folds_from_file(path, ["007", "S2", "S3", "S4"], np.array([0, 1, 0, 1]), np.array(list("abcd")), ("x", "y"))


def test_a_table_of_parts_is_read_as_text(tmp_path):
    path = write_parts(tmp_path / "splits_3.csv", ["007", "a.b", "c"], ["d.svs"], ["e.h5", "f.PT"])
    (found,) = read_splits(path)
    assert (found.name, found.fold) == ("splits_3.csv", 3)
    assert found.slides == {"train": ["007", "a.b", "c"], "val": ["d"], "test": ["e", "f"]}
    assert read_splits(path, {"d.svs"})[0].slides["val"] == ["d.svs"]


def test_whole_numbers_that_pandas_made_floats_are_ids_again(tmp_path):
    path = tmp_path / "splits_0.csv"
    pd.DataFrame({"train": pd.Series([1, 2, 3]), "val": pd.Series([4]), "test": pd.Series([5, 6])}).to_csv(path)
    assert "4.0" in path.read_text()
    assert read_splits(path)[0].slides == {"train": ["1", "2", "3"], "val": ["4"], "test": ["5", "6"]}


def test_a_folder_of_tables_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 0):
        write_parts(tmp_path / f"splits_{number}.csv", [f"train{number}"], ["v"], ["t"])
        pd.DataFrame({"train": [True], "val": [False], "test": [False]}).to_csv(tmp_path / f"splits_{number}_bool.csv")
        (tmp_path / f"splits_{number}_descriptor.csv").write_text(",train,val,test\nbenign,1,1,1\n")
    assert [(found.fold, found.slides["train"]) for found in read_splits(tmp_path)] == [
        (0, ["train0"]),
        (2, ["train2"]),
        (10, ["train10"]),
    ]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("splits_0.csv", "train,test\na,b\n", "no single column val; found train, test, expected .*train,val,test"),
        ("splits_0.csv", "", "no single column train and val and test; found nothing"),
        ("splits_0.csv", ",train,train,val,test\n0,a,b,c,d\n", "no single column train;"),
        ("splits_0_bool.csv", ",train,val,test\nS1,True,False,False\n", "holds True and False instead of slide ids"),
        ("splits_0.csv", b"\xff\xfe\x00", "not readable as a CSV table"),
        ("splits.json", "{", "not readable as JSON"),
        ("splits.json", "[]", "no folds as train.py writes them"),
        ("splits.json", json.dumps({"folds": []}), "no folds in it"),
        ("splits.json", json.dumps({"folds": [{"fold": 1, "test": ["a"]}]}), "no folds as .*'inner'"),
        (
            "splits.json",
            json.dumps({"folds": [{"fold": 1, "test": "ab", "inner": [{"train": [], "val": []}]}]}),
            "a part that is no list of slide ids: ab;",
        ),
    ],
)
def test_what_holds_no_splits_is_refused_by_name(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SplitError, match=f"{re.escape(str(path))}: {reason}"):
        read_splits(path)


def test_missing_splits_are_refused_by_name(tmp_path):
    with pytest.raises(SplitError, match="nowhere: no such file; expected"):
        read_splits(tmp_path / "nowhere")
    (tmp_path / "splits_0_bool.csv").write_text("a\n")
    with pytest.raises(SplitError, match=r"no splits_<k>.csv in this folder"):
        read_splits(tmp_path)


def test_patients_in_two_parts_are_named():
    parts = {"train": ["a1", "b1", "x"], "val": ["b2", "c1"], "test": ["a2", "b3", "c2", "x", "d1"]}
    case_of = {wsi_id: wsi_id[0].upper() for ids in parts.values() for wsi_id in ids if wsi_id != "x"}
    assert shared_cases(parts, case_of) == {
        "A": ["train", "test"],
        "B": ["train", "val", "test"],
        "C": ["val", "test"],
        "x": ["train", "test"],
    }
    assert shared_cases({"train": ["a1", "a2"], "test": ["b1"]}, case_of) == {}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["train", "test", "train"], "the column subset (test 1, train 2) is not used"),
        (["Training", "Validation", ""], "the column subset (training 1, validation 1) is not used"),
        (["train", "train", "train"], ""),
        (["train", "test", "tumour"], "the column subset (test 1, train 1, tumour 1) is not used"),
        (["0", "1", "1"], "the column subset (0 1, 1 2) is not used"),
    ],
)
def test_a_column_that_parts_slides_into_train_and_test_is_named(values, told):
    message = unused_split([{"wsi_id": f"S{k}", "subset": value} for k, value in enumerate(values)])
    assert message.startswith(told)
    assert bool(message) is bool(told)


@pytest.mark.parametrize(
    ("values", "is_told"),
    [(["train", "test", "train"], True), (["train", "test", "tumour"], False), (["val", "test", "test"], False)],
)
def test_a_column_of_another_name_parts_slides_by_its_words(values, is_told):
    assert bool(unused_split([{"wsi_id": f"S{k}", "arm": value} for k, value in enumerate(values)])) is is_told
