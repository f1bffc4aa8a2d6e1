"""The tables and figures that a cross-validation writes, and what it prints at its end."""

import numpy as np
import pandas as pd
import pytest

from tests.cohort import write_cohort
from tests.learning.runs import EPOCHS, N_OUTER, make_cv, small, strict_json
from tests.small import classification_metrics
from utils.evaluation.closing_table import closing_text
from utils.evaluation.outputs import NO_PATIENTS
from utils.mil_dataset import MILDataset
from utils.tasks.metrics import METRICS


class TestOutputs:
    def test_the_files(self, finished):
        assert {path.name for path in finished.folder.iterdir()} == {
            *(f"fold_{k}_best.pth" for k in range(1, N_OUTER + 1)),
            "all_folds_best.pth", "outputs.json", "splits.json", "predictions.csv", "predictions_cases.csv",
            "history.csv", "run.json", "features.csv", "gallery.csv", "roc.png", "precision_recall.png",
            "confusion_matrix.png", "calibration.png", "learning_curves.png",
            "inner_predictions.csv",
        }  # fmt: skip

    def test_predictions_have_one_out_of_fold_row_per_slide_in_table_order(self, finished, dataset):
        rows = finished.table()
        assert list(rows[0]) == [
            "wsi_id", "case_id", "label", "predicted", "prob_benign", "prob_malignant", "calibrated_benign",
            "calibrated_malignant", "fold", "repeat",
        ]  # fmt: skip
        expected = [(row.wsi_id, row.case_id, dataset.class_names[row.label]) for row in dataset.rows]
        assert [(row["wsi_id"], row["case_id"], row["label"]) for row in rows] == expected
        for row in rows:
            benign, malignant = float(row["prob_benign"]), float(row["prob_malignant"])
            assert benign + malignant == pytest.approx(1, abs=1e-12)
            assert row["predicted"] == ("malignant" if malignant > benign else "benign")
        tested = {fold["fold"]: set(fold["test"]) for fold in strict_json(finished.folder / "splits.json")["folds"]}
        assert all(row["wsi_id"] in tested[int(row["fold"])] for row in rows)

    def test_outputs_hold_what_they_promise(self, finished, dataset):
        outputs = strict_json(finished.folder / "outputs.json")
        assert outputs == finished.results
        names = ("chunk_accuracy", "slide_accuracy", "slide_f1_macro", "slide_auc", "slide_balanced_accuracy")
        assert {f"{name}_{part}" for name in names for part in ("mean", "std")} < outputs.keys()
        assert outputs["n_folds"] == N_OUTER
        assert outputs["class_names"] == ["benign", "malignant"]
        assert (outputs["n_slides"], outputs["n_cases"], outputs["dataset"]) == (24, 12, "demo")
        assert outputs["model"] == small().spec

    def test_the_figures_follow_from_the_predictions(self, finished, dataset):
        outputs, rows = finished.results, finished.table()
        probabilities = np.array([[float(row["prob_benign"]), float(row["prob_malignant"])] for row in rows])
        folds = np.array([int(row["fold"]) for row in rows])
        for result in outputs["fold_results"]:
            part = folds == result["fold"]
            assert result["n_slides"] == part.sum()
            assert result["slide"] == classification_metrics(
                dataset.labels[part], probabilities[part], dataset.class_names
            )
        assert [result["fold"] for result in outputs["fold_results"]] == [1, 2, 3]
        for name in METRICS:
            values = [result["slide"][name] for result in outputs["fold_results"]]
            assert outputs[f"slide_{name}_mean"] == pytest.approx(np.mean(values))
            assert outputs[f"slide_{name}_std"] == pytest.approx(np.std(values, ddof=1))
            low, high = outputs["intervals_95"][name] or (0, 1)
            assert low <= outputs["pooled"][name] <= high
            has_reason = outputs["interval_methods"][name].startswith("none: ")
            assert (outputs["intervals_95"][name] is None) is has_reason is (name == "ece")
        assert set(outputs["within_folds"]) == {"auc", "average_precision"}
        for name in ("within_folds", "mean_of_folds"):
            low, high = outputs[f"{name}_intervals_95"]["auc"]
            assert low <= outputs[name]["auc"] <= high
        assert outputs["mean_of_folds"]["auc"] == pytest.approx(outputs["slide_auc_mean"])
        expected = classification_metrics(dataset.labels, probabilities, dataset.class_names)
        assert outputs["pooled"] == pytest.approx(expected, abs=1e-12)
        assert set(expected) == set(outputs["intervals_95"]) > {"sensitivity_benign", "specificity_malignant"}

    def test_history_has_every_epoch_of_every_training(self, finished):
        history = pd.read_csv(finished.folder / "history.csv")
        assert list(history)[:5] == ["fold", "setting", "inner", "epoch", "train_loss"]
        assert {"val_loss", "val_auc", "val_accuracy", "val_balanced_accuracy", "val_f1_macro", "lr"} < set(history)
        expected = [(k, i, e) for k in range(1, 4) for i in range(1, 3) for e in range(1, EPOCHS + 1)]
        assert list(history[["fold", "inner", "epoch"]].itertuples(index=False, name=None)) == expected
        assert history["setting"].isna().all()
        assert np.isfinite(history.drop(columns="setting").to_numpy()).all()

    def test_where_the_patients_are_known_from_is_recorded(self, finished):
        assert finished.results["patients_from"] == "the column case_id"
        unknown = closing_text(finished.results | {"patients_from": NO_PATIENTS})
        assert "No patients are known" in unknown
        assert "No patients are known" not in closing_text(finished.results)


class TestKinds:
    def test_three_classes(self, tmp_path, coarse_figures):
        names = ("CCRCC", "CHRCC", "PRCC")
        cohort = write_cohort(tmp_path / "cohort", classes=names, slides_per_patient=1, signal=4)
        data = MILDataset(*cohort, class_names=("PRCC", "CCRCC", "CHRCC"), chunk_size=30)
        results = make_cv(data, tmp_path / "run", lambda: small("ABMIL", num_classes=3), epochs=12).run()
        assert strict_json(tmp_path / "run" / "outputs.json") == results
        assert results["class_names"] == ["PRCC", "CCRCC", "CHRCC"]
        rows = pd.read_csv(tmp_path / "run" / "predictions.csv")
        probabilities = rows[["prob_PRCC", "prob_CCRCC", "prob_CHRCC"]].to_numpy()
        assert probabilities.sum(axis=1) == pytest.approx(1)
        assert [("PRCC", "CCRCC", "CHRCC")[k] for k in probabilities.argmax(axis=1)] == rows["predicted"].tolist()
        assert results["pooled"]["auc"] > 0.8
        assert results["pooled"]["accuracy"] == pytest.approx((rows["predicted"] == rows["label"]).mean())
        assert (tmp_path / "run" / "roc.png").stat().st_size > 1000
