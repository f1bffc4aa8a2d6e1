"""The folds of a run, its repeats, and the metric that each fold chooses by."""

import numpy as np
import pandas as pd
import pytest

from tests.learning.runs import N_OUTER, make_cv, strict_json
from utils.evaluation.closing_table import closing_text, results_table
from utils.learning import protocol
from utils.learning.grid import grid_settings
from utils.learning.settings import Training
from utils.learning.splits import InnerFold, OuterFold
from utils.mil_dataset import MILDataset

pytestmark = pytest.mark.usefixtures("blank_figures")


class TestOutputs:
    def test_splits_are_the_ones_used(self, finished, dataset):
        content = strict_json(finished.folder / "splits.json")
        ids = [row.wsi_id for row in dataset.rows]
        fits = [event for event in finished.events if event[0] == "fit"]
        said = [inner for fold in content["folds"] for inner in fold["inner"]]
        assert [({*inner["train"]}, {*inner["val"]}) for inner in said] == [
            ({ids[slide] for slide in train}, {ids[slide] for slide in val}) for _, train, val in fits
        ]
        assert sorted(slide for fold in content["folds"] for slide in fold["test"]) == sorted(ids)
        assert content["seed"] == 5


class TestSelection:
    def test_folds_of_one_class_use_the_loss_and_leave_no_nan(self, dataset, tmp_path, monkeypatch, aloud):
        """Where an inner fold holds one class the loss chooses; a test fold of one class has no AUC."""
        benign, malignant = (np.flatnonzero(dataset.labels == label) for label in (0, 1))

        def one_class_folds(*_):
            folds = []
            for number, test in enumerate((benign[:6], np.setdiff1d(np.arange(24), benign[:6])), start=1):
                rest = np.setdiff1d(np.arange(24), test) if number == 1 else np.concatenate([benign[:6], malignant])
                vals = (rest[dataset.labels[rest] == 0][:4], rest[dataset.labels[rest] == 1][:4])
                inner = tuple(InnerFold(np.setdiff1d(rest, val), val) for val in vals)
                folds.append(OuterFold(number, test, inner))
            return folds

        monkeypatch.setattr(protocol, "repeated_splits", one_class_folds)
        results = make_cv(dataset, tmp_path / "run", n_outer=2).run()
        assert results["fold_results"][0]["slide"]["auc"] is None
        assert results["fold_results"][0]["selection"]["monitor"] == "slide_loss"
        assert results["slide_auc_mean"] == results["fold_results"][1]["slide"]["auc"]
        assert (results["slide_auc_std"], results["slide_auc_folds"]) == (None, 1)
        assert strict_json(tmp_path / "run" / "outputs.json") == results
        text = "an inner fold lacks a class, so the slide loss chooses instead of the AUC"
        assert aloud.text.count(f"outer fold 1: {text}") == 1
        assert [line.levelname for line in aloud.records if text in line.getMessage()] == ["WARNING"] * 2
        assert results["changed_monitors"] == {"1": text, "2": text}
        assert f"In 2 of 2 folds (1, 2) {text}." in closing_text(results)
        lacking = [line.split()[0] for line in results_table(results).splitlines() if "-" in line.split()]
        assert lacking == ["fold", "std", "95%", "95%"], "no interval of the calibration error"
        assert pd.read_csv(tmp_path / "run" / "history.csv")["val_auc"].isna().all()


class TestKeep:
    @pytest.mark.parametrize(("keep", "many", "kept"), [
        ("auto", 4, "best"), ("auto", 5, "last"), ("best", 5, "best"), ("last", 4, "last"),
    ])  # fmt: skip
    def test_where_few_slides_validate_the_last_epoch_is_kept(
        self, keep, many, kept, dataset, tmp_path, monkeypatch, aloud
    ):
        """Inner folds of 24 slides validate on 4 of each class."""
        monkeypatch.setattr(protocol, "MANY_VALIDATED", many)
        cv = make_cv(dataset, tmp_path, keep=keep)
        assert {job.keep for job in cv.jobs(cv.folds())} == {kept}
        protocol.log_kept_epoch(dataset, keep, cv.folds(), Training())
        is_said = (keep, kept) == ("auto", "last")
        assert "nothing depends on it" not in aloud.text
        protocol.log_kept_epoch(dataset, keep, cv.folds(), Training(patience=3))
        assert ("--patience: nothing depends on it" in aloud.text) is (kept == "last")
        settings = grid_settings({"least_steps": (0, 8), "lr": (1e-3,)}, "LiteMIL")
        protocol.log_kept_epoch(dataset, keep, cv.folds(), Training(), settings)
        assert ("--grid least_steps: nothing depends on it" in aloud.text) is (kept == "last")
        assert ("as few as 4 slides of a class, so each training keeps its last epoch" in aloud.text) is is_said

    @pytest.mark.parametrize("keep", ["best", "last"])
    def test_results_say_which_epoch_was_kept(self, keep, dataset, tmp_path):
        results = make_cv(dataset, tmp_path / "run", keep=keep, least_steps=0, epochs=3).run()
        history = pd.read_csv(tmp_path / "run" / "history.csv")
        kept = history[history["kept"] == 1]
        assert (kept.groupby(["fold", "inner"]).size() == 1).all()
        assert {fold["selection"]["keep"] for fold in results["fold_results"]} == {keep}
        assert keep == "best" or set(kept["epoch"]) == {3}
        for fold in results["fold_results"]:
            rows = kept[(kept["fold"] == fold["fold"]) & (kept["inner"] == fold["selection"]["inner_fold"])]
            assert rows["epoch"].tolist() == [fold["selection"]["epoch"]]


class TestRepeats:
    def test_each_repeat_tests_each_slide_once_on_other_folds(self, dataset, tmp_path, unfitted):
        results = make_cv(dataset, tmp_path, repeats=3).run()
        rows = pd.read_csv(tmp_path / "predictions.csv")
        ids = [row.wsi_id for row in dataset.rows]
        assert rows["wsi_id"].tolist() == ids * 3
        assert rows["repeat"].tolist() == [number for number in (1, 2, 3) for _ in ids]
        assert (rows.groupby("repeat")["fold"].unique().map(sorted).tolist()) == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
        partitions = {
            frozenset(frozenset(part) for _, part in repeat.groupby("fold")["wsi_id"])
            for _, repeat in rows.groupby("repeat")
        }
        assert len(partitions) == 3
        assert (results["n_folds"], results["n_repeats"], results["n_slides"]) == (9, 3, 24)
        assert len(list(tmp_path.glob("fold_*_best.pth"))) == 9
        assert "tested once in each of 3 repeats" in closing_text(results)

    def test_the_first_repeat_is_the_run_without_repeats(self, finished, dataset, tmp_path, no_figures):
        make_cv(dataset, tmp_path / "run", repeats=2).run()
        for name in (f"fold_{k}_best.pth" for k in range(1, N_OUTER + 1)):
            assert (tmp_path / "run" / name).read_bytes() == (finished.folder / name).read_bytes()
        rows = pd.read_csv(tmp_path / "run" / "predictions.csv")
        first = pd.read_csv(finished.folder / "predictions.csv")
        pd.testing.assert_frame_equal(rows[rows["repeat"] == 1], first)
        gallery = pd.read_csv(tmp_path / "run" / "gallery.csv").set_index("wsi_id")
        for wsi_id, probability in gallery["prob_malignant"].items():
            assert probability == pytest.approx(rows.loc[rows["wsi_id"] == wsi_id, "prob_malignant"].mean())


class TestKinds:
    def test_groups_stay_together_in_every_part(self, cohort, tmp_path, no_figures):
        table = pd.read_csv(cohort[0], dtype=str)
        numbers = table["case_id"].str[1:].astype(int)
        table.assign(site=(numbers % 6).map("site {}".format)).to_csv(tmp_path / "labels.csv", index=False)
        data = MILDataset(tmp_path / "labels.csv", cohort[1], chunk_size=20, group_column="site")
        results = make_cv(data, tmp_path / "run", n_outer=3, n_inner=2, epochs=1).run()
        rows = pd.read_csv(tmp_path / "run" / "predictions.csv")
        assert rows["group"].tolist() == list(data.groups), "intervals are over them"
        assert results["interval_methods"]["ece"] == "none: by chance alone it is above 0", "six groups are enough"
        site_of = {row.wsi_id: group for row, group in zip(data.rows, data.groups, strict=True)}
        for fold in strict_json(tmp_path / "run" / "splits.json")["folds"]:
            for inner in fold["inner"]:
                sites = [{site_of[wsi_id] for wsi_id in part} for part in (fold["test"], *inner.values())]
                assert sum(map(len, sites)) == len(set().union(*sites)) == 6
