"""Folds read from files of splits."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.learning.runs import make_cv
from utils.core.errors import ConfigError, SplitError
from utils.core.files import read_json, write_text
from utils.learning.settings import Protocol
from utils.mil_dataset import MILDataset


def write_clam_split(path: Path, train: list[str], val: list[str], test: list[str]) -> None:
    """As CLAM writes it: a first column without a name, columns as long as the longest."""
    pd.DataFrame({name: pd.Series(ids) for name, ids in {"train": train, "val": val, "test": test}.items()}).to_csv(
        path
    )


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
            write_clam_split(folder / f"splits_{number}.csv", *parts)
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
        write_clam_split(tmp_path / "splits_0.csv", ids[:11], ids[12:18], [ids[11], *ids[18:]])
        cv = make_cv(dataset, tmp_path / "run", splits=tmp_path / "splits_0.csv", **UNSAID)
        with pytest.raises(SplitError, match=r"1 patient on both sides of splits_0.csv: P005 \(train and test\)"):
            cv.run()
        assert not (tmp_path / "run").exists()

    def test_a_shared_group_is_refused(self, cohort, tmp_path):
        table = pd.read_csv(cohort[0], dtype=str)
        table.assign(site=table["case_id"].str[1:].astype(int) // 4).to_csv(tmp_path / "labels.csv", index=False)
        data = MILDataset(tmp_path / "labels.csv", cohort[1], group_column="site")
        ids = [row.wsi_id for row in data.rows]
        write_clam_split(tmp_path / "splits_0.csv", ids[:12], ids[12:16], ids[16:])
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
        write_clam_split(tmp_path / "splits_0.csv", *[[ids[slide] for slide in part] for part in (train, val, test)])
        with pytest.raises(SplitError, match=message):
            make_cv(dataset, tmp_path / "run", splits=tmp_path / "splits_0.csv", **UNSAID).run()

    def test_slides_that_the_cohort_lacks(self, cohort, dataset, tmp_path, unfitted):
        ids = [row.wsi_id for row in dataset.rows]
        write_clam_split(tmp_path / "splits_0.csv", [*ids[:8], "P099-S1"], ids[8:16], ids[16:])
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
