"""predict.py over folders, with several models, with labels: what it writes, keeps and refuses."""

import json
import os
import re
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from MILS import build_mil, list_mils, registry
from MILS.bag_model import BagModel
from MILS.ensemble import Ensemble
from tests.cohort import synthetic_passport, write_cohort
from tests.conftest import drawn_coarsely
from tests.small import TASK, classification_metrics
from tests.synthetic import stained_image, write_pyramid
from utils.bags.store import Bag, read_bag, write_bag
from utils.core.errors import CheckpointError
from utils.core.passport import Passport
from utils.core.plots import FORMATS
from utils.evaluation.bootstrap import bootstrap_intervals
from utils.features.extractor import WSIFeatureExtractor
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation
from utils.pictures.attention_map import AttentionMap
from utils.pictures.heatmap import save_picture
from utils.prediction.checkpoint import Checkpoint, id_digests, load_checkpoint, save_checkpoint
from utils.prediction.forward_pass import SlideFeed
from utils.prediction.predictor import SlidePredictor
from utils.prediction.settings import Prediction, PredictionRecipe
from utils.slides.slide import quick_hash_of
from utils.tasks.calibration import scale_probabilities

pytestmark = pytest.mark.usefixtures("blank_figures")

CLASSES = ("benign", "malignant")


def write_model(path: Path, seed: int, *, members: int = 1, feed=None, seen=None, temperature=2.0, **changes) -> Path:
    """An untrained model, its weights stirred, of 16 features."""
    torch.manual_seed(seed)
    models = [build_mil("LiteMIL", input_dim=16, num_classes=2, hidden_dim=32).eval() for _ in range(members)]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    state = (Ensemble(models) if members > 1 else models[0]).state_dict()
    checkpoint = {
        "model": models[0].spec, "state_dict": state, "class_names": CLASSES, "dataset": "demo",
        "feed": (feed or SlideFeed(None, "merge")).as_dict(), "recipe": synthetic_passport("x").recipe,
        "mpp_range": (0.5, 0.5), "selection": {"threshold": 0.4}, "temperature": temperature,
        "seen": {"slide": id_digests("slide", ["none"]), "case": []} if seen is None else seen,
    }  # fmt: skip
    save_checkpoint(path, Checkpoint(**(checkpoint | changes)))
    return path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> tuple[Path, Path]:
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    home = tmp_path_factory.mktemp("models")
    return [write_model(home / f"fold_{seed}_best.pth", seed) for seed in (1, 2, 3)]


@pytest.fixture
def predict(script, tmp_path):
    def run(*flags, output="out"):
        return script("predict", *flags, "--output_dir", tmp_path / output, "--device", "cpu")

    return run


def of(folder: Path, slide: str) -> dict:
    return json.loads((folder / f"{slide}_prediction.json").read_text())


def test_a_folder_is_predicted_scored_and_kept(cohort, models, predict, tmp_path):
    labels_csv, features = cohort
    out = tmp_path / "out"
    flags = ("--checkpoint", models[0], "--input_dir", features, "--labels_csv", labels_csv)
    outcome = predict(*flags)
    assert outcome.code == 0, outcome.err
    assert "24 done, 0 skipped" in outcome.out
    assert "Slides" in outcome.err  # the bar
    names = {path.name for path in out.iterdir()}
    assert names >= {
        "predictions.csv", "scores.json", "roc.png", "precision_recall.png", "confusion_matrix.png", "calibration.png",
        "prediction_report.csv",
    }  # fmt: skip
    labels = pd.read_csv(labels_csv)
    table = pd.read_csv(out / "predictions.csv")
    assert list(table) == [
        "wsi_id", "case_id", "label", "predicted", "prob_benign", "prob_malignant", "calibrated_benign",
        "calibrated_malignant", "num_instances", "seen_in_training",
    ]  # fmt: skip
    assert list(table["wsi_id"]) == sorted(labels["wsi_id"])
    assert dict(zip(table["wsi_id"], table["label"], strict=True)) == dict(
        zip(labels["wsi_id"], labels["label"], strict=True)
    )
    predictor = SlidePredictor(models[0], device="cpu")
    for _, row in table.iterrows():
        alone = predictor.predict(features / f"{row['wsi_id']}.h5")
        assert row["prob_malignant"] == pytest.approx(alone.probabilities[1], abs=1e-12)
        assert row["calibrated_malignant"] == pytest.approx(scale_probabilities(alone.probabilities, 2.0)[1])
        assert of(out, row["wsi_id"])["probabilities"]["malignant"] == row["prob_malignant"]

    before = {path: path.stat().st_mtime_ns for path in out.glob("*_prediction.json")}
    again = predict(*flags)
    assert "0 done, 24 skipped" in again.out
    assert {path: path.stat().st_mtime_ns for path in out.glob("*_prediction.json")} == before
    other = predict("--checkpoint", models[1], *flags[2:])
    assert (other.code, len(other.errors)) == (1, 1)
    assert f"P000-S1_prediction.json: is another prediction, by {models[0]} (checkpoint: found " in other.errors[0]
    assert len(other.errors[0]) < 500
    assert {path: path.stat().st_mtime_ns for path in out.glob("*_prediction.json")} == before
    assert predict("--checkpoint", models[1], *flags[2:], "--overwrite").code == 0


def test_the_scores_are_those_of_training(cohort, models, predict, tmp_path):
    labels_csv, features = cohort
    predict("--checkpoint", models[0], "--input_dir", features, "--labels_csv", labels_csv)
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    truth = np.array([CLASSES.index(label) for label in table["label"]])
    probabilities = table[["prob_benign", "prob_malignant"]].to_numpy()
    expected = classification_metrics(truth, probabilities, CLASSES)
    assert scores["pooled"] == pytest.approx(expected)
    calibrated = classification_metrics(truth, table[["calibrated_benign", "calibrated_malignant"]].to_numpy())
    assert scores["pooled_calibrated"] == pytest.approx({name: calibrated[name] for name in ("brier", "ece")})
    assert (scores["n_slides"], scores["n_cases"], scores["n_seen_in_training"]) == (24, 12, 0)
    at = classification_metrics(truth, np.eye(2)[(probabilities[:, 1] >= 0.4).astype(int)])
    assert scores["pooled_thresholded"]["balanced_accuracy"] == pytest.approx(at["balanced_accuracy"])
    # Patients are resampled, not slides.
    cases, width = table["case_id"].to_numpy(), scores["intervals_95"]["auc"]
    assert width[0] <= expected["auc"] <= width[1]
    some_seed = bootstrap_intervals(TASK, truth, probabilities, cases, 0)["auc"]
    assert width == pytest.approx(some_seed, abs=0.08)


def test_what_was_seen_in_training_is_marked_everywhere(cohort, predict, tmp_path):
    labels_csv, features = cohort
    seen = {"slide": id_digests("slide", ["P000-S1"]), "case": id_digests("case", ["P000", "P001"])}
    model = write_model(tmp_path / "model.pth", 1, seen=seen)
    outcome = predict("--checkpoint", model, "--input_dir", features, "--labels_csv", labels_csv)
    out = tmp_path / "out"
    marks = pd.read_csv(out / "predictions.csv").set_index("wsi_id")["seen_in_training"]
    assert set(marks[marks].index) == {"P000-S1", "P000-S2", "P001-S1", "P001-S2"}
    assert [of(out, name)["seen_as"] for name in ("P000-S1", "P000-S2", "P002-S1")] == ["slide", "case", ""]
    assert "4 slides seen in training, or of patients seen there" in outcome.out
    scores = json.loads((out / "scores.json").read_text())
    assert (scores["n_seen_in_training"], scores["unseen"]["n_slides"], scores["unseen"]["n_cases"]) == (4, 20, 10)
    assert "unseen" in outcome.out
    # What an earlier run kept without knowing the patients is no answer to one that does.
    predict("--checkpoint", model, "--input_dir", features, output="first")
    assert of(tmp_path / "first", "P001-S1")["seen_in_training"] is False
    again = predict("--checkpoint", model, "--input_dir", features, "--labels_csv", labels_csv, output="first")
    assert "3 done, 21 skipped" in again.out
    assert of(tmp_path / "first", "P001-S1")["seen_in_training"] is True
    # A patient's slide is known by its barcode where there is no table.
    barcode = write_model(tmp_path / "b.pth", 1, seen=seen | {"case": id_digests("case", ["TCGA-05-4250"])})
    bag = read_bag(features / "P005-S1.h5")
    write_bag(tmp_path / "TCGA-05-4250-01Z-00-DX9.h5", bag)
    one = predict("--checkpoint", barcode, "--input", tmp_path / "TCGA-05-4250-01Z-00-DX9.h5")
    assert "trained on this case" in one.err


def test_several_checkpoints_answer_as_their_mean(cohort, models, predict, tmp_path):
    features = cohort[1] / "P003-S1.h5"
    ensemble = write_model(tmp_path / "ensemble.pth", 7, members=2, temperature=0.5)
    outcome = predict("--checkpoint", *models[:2], ensemble, "--input", features)
    assert outcome.code == 0, outcome.err
    alone = [SlidePredictor(path, device="cpu").predict(features) for path in (*models[:2], ensemble)]
    each = np.stack([alone[0].probabilities, alone[1].probabilities, *alone[2].member_probabilities])
    record = of(tmp_path / "out", "P003-S1")
    np.testing.assert_allclose(list(record["probabilities"].values()), each.mean(axis=0))
    assert len(record["member_probabilities"]) == 4
    assert record["spread"]["malignant"] == pytest.approx(each[:, 1].std(ddof=1))
    scaled = np.concatenate([scale_probabilities(each[:2], 2.0), scale_probabilities(each[2:], 0.5)])
    np.testing.assert_allclose(list(record["calibrated_probabilities"].values()), scaled.mean(axis=0))
    assert [Path(path).name for path in record["checkpoint"]] == ["fold_1_best.pth", "fold_2_best.pth", "ensemble.pth"]
    assert record["temperature"] == [2.0, 2.0, 0.5]
    together = SlidePredictor([*models[:2], ensemble], device="cpu").predict(features)
    weights = np.average([one.attention for one in alone], axis=0, weights=[1, 1, 2])
    np.testing.assert_allclose(together.attention, weights, rtol=1e-5)
    assert together.attention.sum(axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_the_models_of_a_record_are_a_list_whatever_their_number(cohort, models, predict, tmp_path, count):
    predict("--checkpoint", *models[:count], "--input_dir", cohort[1], "--labels_csv", cohort[0])
    record = of(tmp_path / "out", "P003-S1")
    assert [model["checkpoint"] for model in record["models"]] == list(map(str, models[:count]))
    for model, path in zip(record["models"], models, strict=False):
        checkpoint = load_checkpoint(path)
        assert model == {
            "checkpoint": str(path), "model": checkpoint.model, "selection": {"threshold": 0.4}, "temperature": 2.0,
            "weights_digest": checkpoint.weights_digest,
        }  # fmt: skip
    # The entries of earlier records stay.
    for name in ("checkpoint", "model", "selection", "temperature"):
        values = [model[name] for model in record["models"]]
        assert record[name] == (values if count > 1 else values[0])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["checkpoints"] == list(map(str, models[:count]))


def test_one_model_in_two_files_counts_once(cohort, models, predict, tmp_path):
    """As `--checkpoint run/*_best.pth` gives the best fold's model twice, the other time as all_folds_best.pth."""
    copy = write_model(tmp_path / "all_folds_best.pth", 1, selection={"best_of_all_folds": True})
    features = cohort[1] / "P003-S1.h5"
    outcome = predict("--checkpoint", copy, *models[:2], "--input", features)
    assert outcome.code == 0, outcome.err
    assert f"{models[0]}: the same weights as {copy}; left out, so that they count once" in outcome.err
    record = of(tmp_path / "out", "P003-S1")
    assert record["checkpoint"] == [str(copy), str(models[1])]
    expected = SlidePredictor(models[:2], device="cpu").predict(features)
    np.testing.assert_allclose(list(record["probabilities"].values()), expected.probabilities)
    alone = SlidePredictor([models[0], models[0], copy], device="cpu")
    assert alone.predict(features).member_probabilities is None


def test_checkpoints_that_do_not_go_together_are_refused(cohort, models, predict, tmp_path):
    features = cohort[1] / "P003-S1.h5"
    recipe = synthetic_passport("x").recipe
    for changes, message in (
        ({"class_names": ("malignant", "benign")}, "its classes are ('malignant', 'benign')"),
        ({"recipe": replace(recipe, backbone="uni")}, "backbone: found uni, expected synthetic"),
        ({"feed": SlideFeed(100, "mean")}, "fed differently (whole; in chunks of 100); give --mode"),
    ):
        other = write_model(tmp_path / "other.pth", 5, **changes)
        outcome = predict("--checkpoint", models[0], other, "--input", features)
        assert (outcome.code, len(outcome.errors)) == (1, 1)
        assert message in outcome.errors[0]
    assert predict("--checkpoint", models[0], other, "--input", features, "--mode", "full").code == 0
    torch.manual_seed(0)
    wide = build_mil("ABMIL", input_dim=8, num_classes=2, hidden_dim=16)
    write_model(tmp_path / "wide.pth", 1, model=wide.spec, state_dict=wide.state_dict())
    outcome = predict("--checkpoint", models[0], tmp_path / "wide.pth", "--input", features)
    assert "its feature width are 8" in outcome.errors[0]


def test_models_with_other_heads_share_the_mean_of_theirs(cohort, models, tmp_path):
    torch.manual_seed(0)
    other = build_mil("ABMIL", input_dim=16, num_classes=2, hidden_dim=16)
    write_model(tmp_path / "other.pth", 1, model=other.spec, state_dict=other.state_dict())
    paths = [models[0], tmp_path / "other.pth"]
    features = cohort[1] / "P003-S1.h5"
    alone = [SlidePredictor(path, device="cpu").predict(features).patch_attention for path in paths]
    together = SlidePredictor(paths, device="cpu").predict(features)
    assert len(together.attention) == 1
    np.testing.assert_allclose(together.patch_attention, np.mean(alone, axis=0), rtol=1e-5)


def test_a_bad_slide_does_not_stop_the_others(cohort, models, predict, tmp_path):
    folder = tmp_path / "features"
    (folder / "site").mkdir(parents=True)
    for number, name in enumerate(("P000-S1", "P001-S1", "P002-S1")):
        write_bag(folder / ("site" if number else "") / f"{name}.h5", read_bag(cohort[1] / f"{name}.h5"))
    (folder / "damaged.h5").write_bytes(b"this is no HDF5 file")
    write_bag(folder / "narrow.h5", Bag(np.ones((5, 8), np.float16)))
    outcome = predict("--checkpoint", models[0], "--input_dir", folder)
    assert outcome.code == 1
    assert [line.split(": ")[1] for line in outcome.errors] == [str(folder / "damaged.h5"), str(folder / "narrow.h5")]
    assert "3 done, 0 skipped, 0 no tissue, 2 failed" in outcome.out
    report = pd.read_csv(tmp_path / "out" / "prediction_report.csv")
    assert sorted(report["status"]) == ["done"] * 3 + ["failed"] * 2
    assert report[report["status"] == "failed"]["reason"].str.contains("not a readable HDF5|8 wide").all()
    assert list(pd.read_csv(tmp_path / "out" / "predictions.csv")["wsi_id"]) == ["P000-S1", "P001-S1", "P002-S1"]
    assert "2 slides without an answer: see prediction_report.csv." in (tmp_path / "out" / "index.html").read_text()
    (folder / "damaged.h5").unlink()
    (folder / "narrow.h5").unlink()
    assert "0 done, 3 skipped" in predict("--checkpoint", models[0], "--input_dir", folder).out


def test_an_input_that_has_changed_is_no_kept_answer(cohort, models, predict, tmp_path):
    path = tmp_path / "slide.h5"
    write_bag(path, read_bag(cohort[1] / "P000-S1.h5"))
    flags = ("--checkpoint", models[0], "--input", path)
    assert predict(*flags).code == 0
    write_bag(path, read_bag(cohort[1] / "P001-S1.h5"))
    refused = predict(*flags)
    assert "(input_" in refused.errors[0]
    assert predict(*flags, "--overwrite").code == 0
    (tmp_path / "out" / "slide_prediction.json").write_text("{")
    assert "no prediction that can be read" in predict(*flags).errors[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--input", "a.h5", "--input_dir", "b"), "exactly one of --input"),
        ((), "exactly one of --input"),
        (("--input", "a.h5", "--labels_csv", "l.csv"), "--labels_csv goes with --input_dir"),
        (("--input_dir", "b", "--allow", "missing"), "is about rows of --labels_csv"),
        (("--input_dir", "nowhere"), "--input_dir nowhere: no such folder"),
        (("--input", "/"), "/: is a folder; give it with --input_dir"),
        (("--input", "a.h5", "--figure_format", "pdf"), "--figure_format pdf: no figure is drawn; give --visualize"),
    ],
)
def test_inputs_that_contradict_each_other(flags, message, models, predict, tmp_path):
    outcome = predict("--checkpoint", models[0], *flags)
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert message in outcome.errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "near"),
    [
        (("--input", "features/slide.h5", "--checkpoint", "runs/gals"), "runs/glas"),
        (("--input", "features/slide.h5", "--checkpoint", "runs/gals/best.pth"), "runs/glas/best.pth"),
        (("--input", "features/slide.h5", "--checkpoint", "runs/glas/bset.pth"), "runs/glas/best.pth"),
        (("--out_of_fold", "runs/gals"), "runs/glas"),
        (("--checkpoint", "runs/glas/best.pth", "--input", "features/slid.h5"), "features/slide.h5"),
        (("--checkpoint", "runs/glas/best.pth", "--input_dir", "feature"), "features"),
        (("--checkpoint", "runs/glas/best.pth", "--input_dir", "features", "--visualize", "--wsi", "feat"), "features"),
    ],
)  # fmt: skip
def test_a_mistyped_path_is_answered_with_the_nearest(predict, tmp_path, monkeypatch, flags, near):
    monkeypatch.chdir(tmp_path)
    Path("runs/glas").mkdir(parents=True)
    write_model(Path("runs/glas/best.pth"), 1)
    write_bag(Path("features/slide.h5"), Bag(np.ones((1, 16), np.float16)))
    outcome = predict(*flags)
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert outcome.errors[0].endswith(f"; did you mean {near}?")
    assert "no such" in outcome.errors[0] or "no folder" in outcome.errors[0]


def test_a_table_that_does_not_account_for_the_folder(cohort, models, predict, tmp_path):
    labels_csv, features = cohort
    table = pd.read_csv(labels_csv)
    extra = pd.concat(
        [table.iloc[:20], pd.DataFrame([("P9", "P9-S1", "benign"), ("P8", "P001-S1", "odd")], columns=table.columns)]
    )
    extra.to_csv(tmp_path / "labels.csv", index=False)
    flags = ("--checkpoint", models[0], "--input_dir", features, "--labels_csv", tmp_path / "labels.csv")
    assert "wsi_id of an earlier row" in predict(*flags).errors[0]
    assert "P9-S1" in predict(*flags, "--allow", "duplicate").errors[0]
    assert not (tmp_path / "out").exists()
    outcome = predict(*flags, "--allow", "duplicate", "missing")
    assert outcome.code == 0, outcome.err
    assert "4 slides of 24 have no label, and are not scored" in outcome.err
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["n_slides"] == 20
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 24


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Q1,001.svs,benign", "001.svs (there is 001); write the ids without their ending .svs"),
        ("Q1,1,benign", "1 (there is 001); a spreadsheet has made the ids numbers and lost their zeros"),
    ],
)
def test_ids_that_just_miss_a_file_are_told_with_it(cohort, models, predict, tmp_path, row, message):
    write_bag(tmp_path / "in" / "001.h5", read_bag(cohort[1] / "P000-S1.h5"))
    (tmp_path / "labels.csv").write_text(f"case_id,wsi_id,label\n{row}\n")
    flags = ("--input_dir", tmp_path / "in", "--labels_csv", tmp_path / "labels.csv")
    outcome = predict("--checkpoint", models[0], *flags)
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert message in outcome.errors[0]


def test_a_table_without_patients_says_what_is_taken_for_them(cohort, models, predict, tmp_path):
    pd.read_csv(cohort[0]).drop(columns="case_id").to_csv(tmp_path / "labels.csv", index=False)
    flags = ("--checkpoint", models[0], "--input_dir", cohort[1], "--labels_csv")
    outcome = predict(*flags, tmp_path / "labels.csv")
    assert (
        "each slide is taken as a patient of its own, called as the slide is, in the intervals and in what"
        in outcome.err
    )
    assert "No patients are known: where some have several slides, the intervals are too narrow." in outcome.out
    taken = json.loads((tmp_path / "out" / "scores.json").read_text())["patients_from"]
    assert taken == "nothing: each slide was taken as a patient of its own"
    outcome = predict(*flags, cohort[0], output="with_patients")
    assert "No patients are known" not in outcome.out
    taken = json.loads((tmp_path / "with_patients" / "scores.json").read_text())["patients_from"]
    assert taken == "the column case_id"


def test_patients_of_training_in_another_spelling_are_told(cohort, predict, tmp_path):
    write_bag(tmp_path / "in" / "a.h5", read_bag(cohort[1] / "P000-S1.h5"))
    write_bag(tmp_path / "in" / "b.h5", read_bag(cohort[1] / "P001-S1.h5"))
    seen = {"slide": id_digests("slide", ["none"]), "case": id_digests("case", ["007"]),
            "case_spelling": id_digests("case_spelling", ["7"])}  # fmt: skip
    flags = ("--checkpoint", write_model(tmp_path / "m.pth", 1, seen=seen), "--input_dir", tmp_path / "in")
    (tmp_path / "labels.csv").write_text("case_id,wsi_id,label\n7,a,benign\n8,b,malignant\n")
    outcome = predict(*flags, "--labels_csv", tmp_path / "labels.csv")
    assert "labels.csv: patients whose names differ in spelling only from those of training (" in outcome.err
    assert "leading zeros, marks): 7; they count as unseen" in outcome.err
    (tmp_path / "labels.csv").write_text("case_id,wsi_id,label\n007,a,benign\n8,b,malignant\n")
    outcome = predict(*flags, "--labels_csv", tmp_path / "labels.csv", output="same")
    assert "differ in spelling" not in outcome.err
    assert of(tmp_path / "same", "a")["seen_as"] == "case"


@pytest.mark.parametrize(("patients", "reason"), [
    (("Q",) * 3, "3 slides of 1 patient. No 95% intervals: they come from resampling patients, and there is one."),
    (("Q", "R", "R"), "There is none (-) where resamples of 2 patients all give one figure, or mostly none."),
])  # fmt: skip
def test_few_patients_have_no_interval_and_the_reason_is_told(cohort, models, predict, tmp_path, patients, reason):
    slides, predictor = sorted(cohort[1].glob("*.h5"))[:3], SlidePredictor(models[0], device="cpu")
    rows = []
    for case_id, path in zip(patients, slides, strict=True):
        write_bag(tmp_path / "in" / path.name, read_bag(path))
        rows.append(f"{case_id},{path.stem},{predictor.predict(path).predicted_class}")  # all right
    (tmp_path / "labels.csv").write_text("\n".join(["case_id,wsi_id,label", *rows]) + "\n")
    flags = ("--checkpoint", models[0], "--input_dir", tmp_path / "in", "--labels_csv", tmp_path / "labels.csv")
    outcome = predict(*flags)
    assert outcome.code == 0, outcome.err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["pooled"]["accuracy"], scores["intervals_95"]["accuracy"]) == (1, None)
    assert "1.000-1.000" not in outcome.out
    assert reason in outcome.out


def test_two_inputs_of_one_name_are_refused(cohort, models, predict, tmp_path):
    bag = read_bag(cohort[1] / "P000-S1.h5")
    for place in ("a/slide.h5", "b/slide.h5"):
        write_bag(tmp_path / "in" / place, bag)
    outcome = predict("--checkpoint", models[0], "--input_dir", tmp_path / "in")
    assert "would both be written to" in outcome.errors[0]


@pytest.fixture
def coarse_heatmaps(monkeypatch) -> None:
    """Of the pictures of a slide the heatmap is drawn, with few pixels."""

    def save(figure, path) -> None:
        with drawn_coarsely(blank=() if path.name.endswith("_heatmap.png") else ("png",)):
            save_picture(figure, path)

    monkeypatch.setattr("utils.pictures.picture_set.save_picture", save)


@pytest.mark.usefixtures("coarse_heatmaps")
def test_a_folders_pictures_are_drawn_on_the_slides_of_another(cohort, models, predict, tmp_path):
    """Each on the slide of its name; a slide that is not there is that slide's failure alone; new looks draw anew."""
    (tmp_path / "in").mkdir()
    (tmp_path / "slides").mkdir()
    rng = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        passport = synthetic_passport(name, 512)
        coords = np.stack(np.meshgrid([0, 128, 256], [0, 128, 256]), axis=-1).reshape(-1, 2)
        features = rng.standard_normal((9, 16)).astype(np.float16)
        bare = Passport(passport.recipe, {"mpp_delivered": 0.5})
        write_bag(tmp_path / "in" / f"{name}.h5", Bag(features, coords, 128, bare))
        if name != "three":
            write_pyramid(tmp_path / "slides" / f"{name}.tif", stained_image(512, 512), mpp=0.25)
    flags = ("--checkpoint", models[0], "--input_dir", tmp_path / "in", "--wsi", tmp_path / "slides", "--visualize",
             "--top_k", 1)  # fmt: skip
    outcome = predict(*flags)
    out = tmp_path / "out"
    assert outcome.code == 1
    assert "holds no slide three to draw it on" in outcome.errors[0]
    assert (out / "one_heatmap.png").exists()
    assert (out / "two_report.html").exists()
    assert not (out / "three_prediction.json").exists()
    before = Image.open(out / "one_heatmap.png").tobytes()
    assert "2 skipped" in predict(*flags).out
    assert "2 done" in predict(*flags, "--cmap", "magma").out
    assert Image.open(out / "one_heatmap.png").tobytes() != before
    (out / "two_detailed.png").unlink()
    assert "1 done, 1 skipped" in predict(*flags, "--cmap", "magma").out
    assert "2 skipped" in predict(*flags[:4]).out  # the pictures are not asked for again
    (tmp_path / "in" / "three.h5").unlink()
    for wrong, message in (
        (("--wsi", tmp_path / "slides" / "one.tif"), "no folder; give the one that holds the slides"),
        ((), "--visualize needs the slide of each feature file"),
    ):
        outcome = predict(*flags[:4], "--visualize", *wrong)
        assert message in outcome.errors[0]


def test_of_two_slides_of_one_name_the_one_the_features_were_made_from_is_drawn_on(models, predict, tmp_path):
    for seed, name in enumerate("ab"):
        (tmp_path / "slides" / name).mkdir(parents=True)
        write_pyramid(tmp_path / "slides" / name / "S1.tif", stained_image(256, 256, seed=seed), mpp=0.25)
    slide = tmp_path / "slides" / "a" / "S1.tif"
    passport = Passport(synthetic_passport("S1").recipe, {"quick_hash": quick_hash_of(slide)})
    bag = Bag(np.ones((2, 16), np.float16), np.array([[0, 0], [64, 64]]), 64, passport)
    write_bag(tmp_path / "in" / "S1.h5", bag)
    flags = ("--input_dir", tmp_path / "in", "--visualize", "--wsi", tmp_path / "slides")
    outcome = predict("--checkpoint", models[0], *flags)
    assert outcome.code == 0, outcome.err
    assert f"drawn on {slide}, by the slide's hash" in outcome.err
    assert of(tmp_path / "out", "S1")["pictures"]["look"]["wsi"] == str(slide)
    write_bag(tmp_path / "in" / "S1.h5", Bag(bag.features, bag.coords, 64, Passport(passport.recipe)))
    outcome = predict("--checkpoint", models[0], *flags, output="unknown")
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert "holds 2 slides S1 (a/S1.tif, b/S1.tif), and it records no hash of its slide" in outcome.errors[0]


@pytest.fixture
def drawable(tmp_path):
    """Flags of a prediction of nine patches, and those that draw it, for an untrained model of a kind."""
    coords = np.stack(np.meshgrid([0, 128, 256], [0, 128, 256]), axis=-1).reshape(-1, 2)
    features = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float16)
    write_bag(tmp_path / "slide.h5", Bag(features, coords, 128, Passport(synthetic_passport("slide").recipe)))
    write_pyramid(tmp_path / "slide.tif", stained_image(512, 512), mpp=0.25)

    def make(mil: str, **changes):
        torch.manual_seed(0)
        model = build_mil(mil, input_dim=16, num_classes=2)
        write_model(tmp_path / "model.pth", 1, model=model.spec, state_dict=model.state_dict(), **changes)
        flags = ("--checkpoint", tmp_path / "model.pth", "--input", tmp_path / "slide.h5")
        return flags, ("--visualize", "--wsi", tmp_path / "slide.tif", "--top_k", 2)

    return make


@pytest.mark.usefixtures("coarse_figures")
@pytest.mark.parametrize("mil", list_mils())
def test_every_model_draws_its_set_and_measures_it(mil, drawable, predict, tmp_path):
    flags, drawn = drawable(mil)
    outcome = predict(*flags, *drawn, "--faithfulness")
    assert outcome.code == 0, outcome.err
    gives_evidence = mil != "TransMIL"
    assert len(list((tmp_path / "out").iterdir())) == 10 + gives_evidence
    record = of(tmp_path / "out", "slide")
    found = record["faithfulness"]
    assert found["random_orders"] == (10 if gives_evidence else 3)
    assert ("evidence" in found) is gives_evidence
    assert (record["evidence"] is not None) is gives_evidence
    with np.load(tmp_path / "out" / "slide_attention.npz") as data:
        assert ("evidence" in data) is gives_evidence
    tiles = json.loads((tmp_path / "out" / "slide_attention.geojson").read_text())["features"]
    classes = {name for name in tiles[0]["properties"]["measurements"] if name.startswith("Evidence ")}
    assert classes == ({f"Evidence {name}" for name in record["probabilities"]} if gives_evidence else set())
    page = (tmp_path / "out" / "slide_report.html").read_text()
    assert ('<select id="map">' in page) is gives_evidence
    assert np.isfinite(found["deletion"]["gap"])
    assert (tmp_path / "out" / "slide_faithfulness.png").stat().st_size > 1000
    assert "faithfulness" in (tmp_path / "out" / "slide_report.html").read_text()


def test_faithfulness_is_measured_when_it_is_asked_for_later(drawable, predict, tmp_path):
    flags, drawn = drawable("LiteMIL")
    record, figure = tmp_path / "out" / "slide_prediction.json", tmp_path / "out" / "slide_faithfulness.png"
    predict(*flags)
    assert "faithfulness" not in of(record.parent, "slide")
    assert predict(*flags, "--faithfulness").code == 0
    assert figure.exists()
    before = record.stat().st_mtime_ns
    for again in ((), ("--faithfulness",)):
        predict(*flags, *again)
        assert record.stat().st_mtime_ns == before
    figure.unlink()
    assert predict(*flags, "--faithfulness").code == 0
    assert figure.exists()
    measured = of(record.parent, "slide")["faithfulness"]
    assert predict(*flags, *drawn).code == 0  # what was measured stays, and stands in the pictures
    assert of(record.parent, "slide")["faithfulness"] == measured
    assert "faithfulness" in (record.parent / "slide_report.html").read_text()


def test_a_patient_known_by_the_barcode_stays_known_beside_a_table(cohort, predict, tmp_path):
    name = "TCGA-05-4250-01Z-00-DX1"
    seen = {"slide": id_digests("slide", ["none"]), "case": id_digests("case", ["TCGA-05-4250"])}
    model = write_model(tmp_path / "model.pth", 1, seen=seen)
    write_bag(tmp_path / "in" / f"{name}.h5", read_bag(cohort[1] / "P000-S1.h5"))
    (tmp_path / "labels.csv").write_text(f"wsi_id,label\n{name},benign\n")
    flags = ("--checkpoint", model, "--input_dir", tmp_path / "in")
    predict(*flags)
    assert of(tmp_path / "out", name)["seen_as"] == "case"
    outcome = predict(*flags, "--labels_csv", tmp_path / "labels.csv")
    assert outcome.code == 0, outcome.err
    assert of(tmp_path / "out", name)["seen_as"] == "case"
    assert "1 skipped" in outcome.out
    report = pd.read_csv(tmp_path / "out" / "prediction_report.csv")
    assert list(report["reason"]) == ["the model was trained on this case"]


@pytest.fixture
def texts_of_figures(monkeypatch) -> dict[str, str]:
    """All words of each figure that is written, by the file's name."""
    told = {}

    def note(figure, path):
        told[Path(path).name] = "\n".join(text.get_text() for text in figure.findobj(Text))
        save_picture(figure, path)

    monkeypatch.setattr("utils.pictures.picture_set.save_picture", note)
    monkeypatch.setattr("utils.pictures.heatmap.save_picture", note)
    return told


def test_pictures_say_what_was_seen_in_training_also_when_that_is_learnt_later(
    drawable, predict, tmp_path, texts_of_figures
):
    flags, drawn = drawable(
        "LiteMIL", seen={"slide": id_digests("slide", ["none"]), "case": id_digests("case", ["P1"])}
    )
    folder = ("--checkpoint", flags[1], "--input_dir", tmp_path / "in")
    (tmp_path / "in").mkdir()
    (tmp_path / "slide.h5").rename(tmp_path / "in" / "slide.h5")
    (tmp_path / "slides").mkdir()
    (tmp_path / "slide.tif").rename(tmp_path / "slides" / "slide.tif")
    (tmp_path / "labels.csv").write_text("case_id,wsi_id,label\nP1,slide,benign\n")
    drawn, labels = (*drawn[:-3], tmp_path / "slides", *drawn[-2:]), ("--labels_csv", tmp_path / "labels.csv")
    out = tmp_path / "out"
    assert predict(*folder, *drawn).code == 0
    assert not any("seen in training" in text for text in texts_of_figures.values())
    assert predict(*folder, *labels).code == 0
    assert of(out, "slide")["seen_in_training"] is True
    assert not list(out.glob("slide_*.png"))  # they said otherwise
    assert not (out / "slide_report.html").exists()
    texts_of_figures.clear()
    assert predict(*folder, *labels, *drawn, "--faithfulness").code == 0
    assert set(texts_of_figures) == {
        f"slide_{kind}.png" for kind in ("heatmap", "detailed", "patch_grid", "evidence", "faithfulness")
    }
    assert all("seen in training" in text for text in texts_of_figures.values())
    assert json.loads((out / "slide_attention.geojson").read_text())["litemil"]["seen_in_training"] is True
    assert str(np.load(out / "slide_attention.npz")["seen_in_training"]) == "True"
    assert "not independent evidence" in (out / "slide_report.html").read_text()
    assert pd.read_csv(out / "slide_top_patches" / "patches.csv")["seen_in_training"].all()


def test_a_flag_that_is_left_out_asks_for_another_answer(predict, tmp_path):
    write_pyramid(tmp_path / "slide.tif", stained_image(512, 512), mpp=0.5)
    torch.manual_seed(0)
    model = build_mil("LiteMIL", input_dim=45, num_classes=2)
    path = write_model(
        tmp_path / "model.pth", 1, model=model.spec, state_dict=model.state_dict(), recipe=None, mpp_range=None
    )
    flags = ("--checkpoint", path, "--input", tmp_path / "slide.tif", "--backbone", "stain", "--patch_size", "64")
    flags += ("--tissue_threshold", "0")
    assert predict(*flags, "--stride", "32").code == 0
    assert of(tmp_path / "out", "slide")["num_instances"] == 225
    refused = predict(*flags)
    assert refused.code == 1
    assert "(recipe.stride: found 32, expected 64)" in refused.errors[0]
    assert predict(*flags, "--overwrite").code == 0
    assert of(tmp_path / "out", "slide")["num_instances"] == 64
    # Features that are asked for later are made.
    assert predict(*flags, "--save_features").code == 0
    assert len(read_bag(tmp_path / "out" / "slide.h5").features) == 64


def test_the_name_of_the_features_is_part_of_what_is_asked_for(cohort, models, predict, tmp_path):
    flags = ("--checkpoint", models[0], "--input", cohort[1] / "P000-S1.h5")
    predict(*flags)
    record = tmp_path / "out" / "P000-S1_prediction.json"
    content = json.loads(record.read_text())
    content["request"]["feat_type"] = "uni_v1"
    record.write_text(json.dumps(content))
    assert "feat_type: found uni_v1, expected features" in predict(*flags).errors[0]


def test_a_run_killed_while_drawing_leaves_no_picture_beside_another_answer(
    drawable, models, predict, tmp_path, monkeypatch
):
    flags, drawn = drawable("LiteMIL")
    predict(*flags, *drawn)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            "utils.pictures.picture_set.write_report", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        stopped = predict("--checkpoint", models[1], *flags[2:], *drawn, "--overwrite")
    assert stopped.code == 130
    assert of(out, "slide")["checkpoint"] == str(models[1])
    assert not (out / "slide_report.html").exists()
    assert "slide_report.html" in predict("--checkpoint", models[1], *flags[2:], *drawn).out
    assert (out / "slide_report.html").exists()


def test_pictures_and_figures_come_in_other_formats_of_the_same_answer(drawable, cohort, models, predict, tmp_path):
    flags, drawn = drawable("LiteMIL")
    predict(*flags, *drawn, "--faithfulness")
    out, first = tmp_path / "out", of(tmp_path / "out", "slide")
    shown = predict(*flags, *drawn, "--faithfulness", "--figure_format", "pdf", "svg").out
    names = [f"slide_{part}" for part in ("heatmap", "detailed", "patch_grid", "evidence", "faithfulness")]
    for name in names:
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert "<svg" in (out / f"{name}.svg").read_text(encoding="utf-8")[:2000]
        assert (out / f"{name}.png").exists()  # it shows the same
        assert f"{name}.svg" in shown
    second = of(out, "slide")
    assert second["request"] == first["request"]
    assert set(second["pictures"]["files"]) > set(first["pictures"]["files"])
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    predict(*flags, *drawn, "--faithfulness")  # all of it is there
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    predict("--checkpoint", models[1], *flags[2:], *drawn, "--overwrite", "--faithfulness")
    assert sorted(path.name for path in out.iterdir() if path.suffix in (".pdf", ".svg", ".png")) == sorted(
        f"{name}.png" for name in names
    )

    labels_csv, features = cohort
    given = ("--input_dir", features, "--labels_csv", labels_csv)
    with drawn_coarsely(blank=FORMATS):
        predict("--checkpoint", models[0], *given, output="scored")
        predict("--checkpoint", models[0], *given, "--figure_format", "svg", output="scored")
        assert {(tmp_path / "scored" / f"roc.{kind}").exists() for kind in ("png", "svg")} == {True}
        predict("--checkpoint", models[1], *given, "--figure_format", "pdf", "--overwrite", output="scored")
    assert sorted(path.name for path in (tmp_path / "scored").glob("*.???") if path.suffix != ".csv") == [
        "calibration.pdf", "confusion_matrix.pdf", "precision_recall.pdf", "roc.pdf",
    ]  # fmt: skip


def test_overwriting_removes_what_it_does_not_renew(drawable, cohort, models, predict, tmp_path):
    flags, drawn = drawable("LiteMIL")
    predict(*flags, *drawn, "--faithfulness")
    mine = tmp_path / "out" / "slide_top_patches" / "mine.txt"
    mine.write_text("the user's own")
    predict("--checkpoint", models[1], *flags[2:], "--overwrite")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"slide_prediction.json", "slide_top_patches"}
    assert [path.name for path in mine.parent.iterdir()] == ["mine.txt"]
    mine.unlink()
    predict("--checkpoint", models[1], *flags[2:], *drawn)
    predict("--checkpoint", models[0], *flags[2:], "--overwrite")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["slide_prediction.json"]

    labels_csv, features = cohort
    folder, labels = ("--input_dir", features), ("--labels_csv", labels_csv)
    predict("--checkpoint", models[0], *folder, *labels, output="scored")
    scored = tmp_path / "scored"
    scores = json.loads((scored / "scores.json").read_text())
    assert scores["checkpoint"] == str(models[0])
    predict("--checkpoint", models[0], *folder, output="scored")  # the same answers: what was scored holds
    assert (scored / "roc.png").exists()
    predict("--checkpoint", models[1], *folder, "--overwrite", output="scored")
    assert not any((scored / name).exists() for name in ("scores.json", "roc.png", "confusion_matrix.png"))
    # Several models have no threshold of their own, nor has one that is fed in another way.
    for asked in ((*models[:2],), (models[0], "--mode", "chunked", "--chunk_size", "10")):
        predict("--checkpoint", *asked, *folder, *labels, "--overwrite", output="scored")
        scores = json.loads((scored / "scores.json").read_text())
        assert scores["threshold"] is None
        assert scores["pooled_thresholded"] is None
    assert scores["pooled_calibrated"] is None  # the temperature belongs to slides fed whole


@pytest.mark.parametrize(("top_k", "most", "least"), [(2, 2, 2), (4, 4, 4), (5, 5, 4), (10, 5, 4)])
def test_no_patch_is_shown_as_the_most_and_the_least_attended(drawable, predict, tmp_path, top_k, most, least):
    flags, drawn = drawable("LiteMIL")
    outcome = predict(*flags, *drawn[:-1], top_k)
    assert outcome.code == 0, outcome.err
    files = pd.read_csv(tmp_path / "out" / "slide_top_patches" / "patches.csv")["file"]
    assert (files.str.startswith("top_").sum(), files.str.startswith("least_").sum()) == (most, least)
    text = f"slide: the {most} most and the {least} least attended patches are shown, not {top_k} of each, as it has 9"
    assert (text in outcome.err) == (most < top_k or least < top_k)


@pytest.mark.usefixtures("coarse_figures")
def test_no_top_patches_are_shown_if_none_are_wanted(drawable, predict, tmp_path, texts_of_figures):
    flags, drawn = drawable("LiteMIL")
    predict(*flags, *drawn)
    for status in ("done", "skipped"):
        outcome = predict(*flags, *drawn[:-1], 0)
        assert outcome.code == 0, (status, outcome.err)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            f"slide_{name}" for name in ("prediction.json", "heatmap.png", "detailed.png", "evidence.png",
                                         "thumbnail.jpg", "attention.npz", "attention.geojson", "report.html")
        }  # fmt: skip
    assert "numbered" not in texts_of_figures["slide_detailed.png"]
    assert "attended patches</h2>" not in (tmp_path / "out" / "slide_report.html").read_text()


def test_a_patch_that_is_gone_is_drawn_again(drawable, predict, tmp_path):
    flags, drawn = drawable("LiteMIL")
    predict(*flags, *drawn)
    patches = tmp_path / "out" / "slide_top_patches"
    next(patches.glob("top_1_*.png")).unlink()
    predict(*flags, *drawn)
    assert len(list(patches.glob("top_*.png"))) == 2


def test_pictures_follow_a_faithfulness_that_is_measured_later(drawable, predict, tmp_path):
    flags, drawn = drawable("LiteMIL")
    predict(*flags, *drawn)
    page = tmp_path / "out" / "slide_report.html"
    predict(*flags, "--faithfulness")
    assert page.exists()
    assert "faithfulness" not in page.read_text()
    predict(*flags, *drawn, "--faithfulness")
    assert "faithfulness" in page.read_text()


def test_a_slide_of_one_patch_has_no_faithfulness_but_an_answer(models, predict, tmp_path):
    write_bag(tmp_path / "one.h5", Bag(np.ones((1, 16), np.float16)))
    flags = ("--checkpoint", models[0], "--input", tmp_path / "one.h5", "--faithfulness")
    outcome = predict(*flags)
    assert outcome.code == 0, outcome.err
    assert "single patch" in outcome.err
    assert of(tmp_path / "out", "one")["faithfulness"] is None
    before = (tmp_path / "out" / "one_prediction.json").stat().st_mtime_ns
    assert predict(*flags).code == 0
    assert (tmp_path / "out" / "one_prediction.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("place", [0, 1])
def test_an_unreadable_answer_is_its_slides_failure_alone(cohort, models, predict, tmp_path, place):
    folder = tmp_path / "in"
    for name in ("P000-S1", "P001-S1", "P002-S1"):
        write_bag(folder / f"{name}.h5", read_bag(cohort[1] / f"{name}.h5"))
    flags = ("--checkpoint", models[0], "--input_dir", folder)
    predict(*flags)
    (tmp_path / "out" / f"P00{place}-S1_prediction.json").write_text("{")
    outcome = predict(*flags)
    assert "2 skipped, 0 no tissue, 1 failed" in outcome.out
    assert "no prediction that can be read" in outcome.errors[0]


@pytest.mark.usefixtures("coarse_figures")
def test_names_with_dollar_signs_are_no_mathematics(predict, tmp_path):
    name, classes = "a$_{$b", ("x$\\frac$", "y")
    rng = np.random.default_rng(0)
    coords = np.stack(np.meshgrid([0, 128], [0, 128]), axis=-1).reshape(-1, 2)
    passport = Passport(synthetic_passport(name).recipe)
    write_bag(tmp_path / "in" / f"{name}.h5", Bag(rng.standard_normal((4, 16)), coords, 128, passport))
    (tmp_path / "slides").mkdir()
    write_pyramid(tmp_path / "slides" / f"{name}.tif", stained_image(512, 512), mpp=0.25)
    (tmp_path / "labels.csv").write_text(f"case_id,wsi_id,label\nP1,{name},y\n")
    model = write_model(tmp_path / "m$_{$.pth", 1, class_names=classes)
    outcome = predict(
        "--checkpoint", model, "--input_dir", tmp_path / "in", "--labels_csv", tmp_path / "labels.csv", "--visualize",
        "--wsi", tmp_path / "slides", "--faithfulness",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / f"{name}_report.html").exists()


def test_several_models_say_on_the_picture_how_far_they_agree(drawable, models, predict, texts_of_figures, tmp_path):
    flags, drawn = drawable("LiteMIL")
    outcome = predict("--checkpoint", *models, *flags[2:], *drawn)
    assert outcome.code == 0, outcome.err
    record = json.loads(next((tmp_path / "out").glob("*_prediction.json")).read_text())
    votes = [max(one, key=one.__getitem__) for one in record["member_probabilities"]]
    told = f"({record['confidence']:.1%}, {votes.count(record['predicted_class'])} of 3 models)"
    assert told in outcome.out
    page = next((tmp_path / "out").glob("*_report.html")).read_text()
    for text in (*texts_of_figures.values(), page):
        assert told in text
    assert f"{record['predicted_class']} by each model" in page
    assert f"{record['member_probabilities'][0][record['predicted_class']]:.1%}" in page


def test_slides_beside_feature_files_are_not_left_out_in_silence(cohort, models, predict, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    name = next(cohort[1].glob("*.h5"))
    (folder / name.name).write_bytes(name.read_bytes())
    write_pyramid(folder / "slide.tif", stained_image(256, 256), mpp=0.5)
    outcome = predict("--checkpoint", models[0], "--input_dir", folder)
    assert outcome.code == 0, outcome.err
    assert "holds feature files; left out: 1 slide. For those give --extensions .tif" in outcome.err
    (folder / "previews").mkdir()
    (folder / "slide.tif").rename(folder / "previews" / "slide.tif")
    assert "left out" not in predict("--checkpoint", models[0], "--input_dir", folder).err


# Where answers go, and what of earlier ones stays


def test_each_model_has_a_folder_of_its_own(cohort, models, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slide = cohort[1] / "P000-S1.h5"
    unknown = write_model(tmp_path / "kidney run" / "model.pth", 1, dataset=None)
    torch.manual_seed(0)
    other = build_mil("ABMIL", input_dim=16, num_classes=2, hidden_dim=16)
    theirs = write_model(tmp_path / "b.pth", 1, model=other.spec, state_dict=other.state_dict(), dataset="a b/../c")
    for checkpoints, name in (
        (models[:1], "LiteMIL_demo"), ([theirs], "ABMIL_a_b_.._c"),
        ([models[0], theirs], "LiteMIL+ABMIL_demo+a_b_.._c"),
        ([unknown], "LiteMIL_kidney_run"),
    ):  # fmt: skip
        outcome = script("predict", "--checkpoint", *checkpoints, "--input", slide, "--device", "cpu")
        assert outcome.code == 0, outcome.err
        assert (tmp_path / "outputs" / "inference" / name / "P000-S1_prediction.json").exists()
    # Another run of the same name into the same folder is refused by name.
    refused = script("predict", "--checkpoint", models[1], "--input", slide, "--device", "cpu").errors[0]
    assert f"is another prediction, by {models[0]} (checkpoint: found" in refused
    assert len(refused) < 400


def test_features_and_their_slide_are_told_apart_in_a_line(predict, tmp_path):
    write_pyramid(tmp_path / "slide.tif", stained_image(512, 512), mpp=0.5)
    torch.manual_seed(0)
    model = build_mil("LiteMIL", input_dim=45, num_classes=2)
    flags = ("--checkpoint", write_model(tmp_path / "m.pth", 1, model=model.spec, state_dict=model.state_dict(),
             recipe=None, mpp_range=None), "--backbone", "stain", "--patch_size", "64")  # fmt: skip
    assert predict(*flags, "--input", tmp_path / "slide.tif", "--save_features").code == 0
    refused = predict(*flags, "--input", tmp_path / "out" / "slide.h5").errors[0]
    assert "(input: found slide.tif, expected slide.h5; recipe: found {" in refused
    assert len(refused) < 600


def test_the_record_holds_each_thing_once_and_says_what_it_is_for(predict, tmp_path):
    write_pyramid(tmp_path / "slide.tif", stained_image(512, 512), mpp=0.5)
    torch.manual_seed(0)
    model = build_mil("LiteMIL", input_dim=45, num_classes=2)
    path = write_model(tmp_path / "m.pth", 1, model=model.spec, state_dict=model.state_dict(), recipe=None,
                       mpp_range=None)  # fmt: skip
    flags = ("--checkpoint", path, "--backbone", "stain", "--patch_size", "64", "--input", tmp_path / "slide.tif")
    assert predict(*flags, "--visualize", "--faithfulness").code == 0
    text = (tmp_path / "out" / "slide_prediction.json").read_text()
    for name, count in {
        "tissue_threshold": 1,
        "chunk_size": 1,
        "weights_digest": 2,  # of the backbone, and of the model
        "rank_correlation_with_random_weights": 1,
        "num_heads": 2,  # of `model`, and in the list `models`
    }.items():
        assert text.count(f'"{name}"') == count, name
    record = json.loads(text)
    assert record["notice"] == "For research, not a diagnosis."
    assert record.keys() >= {"predicted_class", "confidence", "probabilities", "num_instances", "mode", "model",
                             "checkpoint", "recipe"}  # fmt: skip
    assert predict(*flags, "--visualize", "--faithfulness").code == 0
    assert (tmp_path / "out" / "slide_prediction.json").read_text() == text


@pytest.fixture
def record_of_before(drawable, predict, tmp_path):
    """Flags of a drawn prediction whose record was written as it was before: its request told everything again."""
    flags, drawn = drawable("LiteMIL")
    flags = (*flags, *drawn, "--faithfulness")
    assert predict(*flags).code == 0
    path = tmp_path / "out" / "slide_prediction.json"
    record = json.loads(path.read_text())
    feed = {name: record[name] for name in ("mode", "chunk_size", "aggregation", "sequential")}
    heads = [record["model"]["num_heads"]]
    record["request"] |= {"num_heads": heads, "class_names": list(CLASSES), "feed": feed, "recipe": None}
    del record["request"]["input"], record["notice"], record["dataset"]
    record["pictures"]["faithfulness"] = record["faithfulness"]
    path.write_text(json.dumps(record))
    return flags, path


def test_a_record_of_before_is_known(record_of_before, models, predict):
    flags, path = record_of_before
    before = path.read_bytes()
    assert predict(*flags).code == 0
    assert path.read_bytes() == before
    refused = predict("--checkpoint", models[1], *flags[2:]).errors[0]
    assert "is another prediction, by" in refused
    assert "checkpoint: found" in refused


def test_a_part_predicted_again_leaves_the_table_whole(cohort, models, predict, tmp_path):
    labels_csv, features = cohort
    part = tmp_path / "part"
    part.mkdir()
    for name in ("P000-S1", "P001-S1"):
        (part / f"{name}.h5").write_bytes((features / f"{name}.h5").read_bytes())
        os.utime(part / f"{name}.h5", ns=(0, (features / f"{name}.h5").stat().st_mtime_ns))
    flags, out = ("--checkpoint", models[0], "--input_dir"), tmp_path / "out"
    predict(*flags, features, "--labels_csv", labels_csv)
    names = ("predictions.csv", "scores.json", "roc.png")
    before = {name: (out / name).read_bytes() for name in names}
    report = pd.read_csv(out / "prediction_report.csv").set_index("output")
    outcome = predict(*flags, part)
    assert "2 skipped" in outcome.out
    assert "With 22 slides of earlier commands" in outcome.out
    assert {name: (out / name).read_bytes() for name in names} == before  # labels and patients too
    again = pd.read_csv(out / "prediction_report.csv").set_index("output")
    assert list(again["seconds"][report.index]) == list(report["seconds"])
    assert (out / "index.html").read_text().count("<tr") == 25
    # By another model the part has a table of its own, and the other one stays.
    assert predict("--checkpoint", models[1], "--input_dir", part, "--overwrite").code == 0
    assert len(pd.read_csv(out / "predictions.csv")) == 2
    assert (out / "predictions.1.csv").read_bytes() == before["predictions.csv"]


def test_a_slide_of_a_folder_predicted_again_stands_in_its_table_and_page(cohort, models, predict, tmp_path):
    out, one = tmp_path / "out", cohort[1] / "P000-S1.h5"
    predict("--checkpoint", models[0], "--input_dir", cohort[1])
    before = (out / "predictions.csv").read_bytes()
    assert "With 23 slides of earlier commands" in predict("--checkpoint", models[0], "--input", one).out
    assert (out / "predictions.csv").read_bytes() == before
    predict("--checkpoint", models[1], "--input", one, "--overwrite")
    assert list(pd.read_csv(out / "predictions.csv")["wsi_id"]) == ["P000-S1"], "the others are another model's"
    assert str(models[1]) in (out / "index.html").read_text()
    assert (out / "predictions.1.csv").read_bytes() == before


def test_scores_of_other_labels_do_not_replace_those_that_are_there(cohort, models, predict, tmp_path):
    labels_csv, features = cohort
    flags, out = ("--checkpoint", models[0], "--input_dir", features, "--labels_csv"), tmp_path / "out"
    predict(*flags, labels_csv)
    before = {name: (out / name).read_bytes() for name in ("scores.json", "roc.png")}
    assert "scores of other" not in predict(*flags, labels_csv).err
    swapped = {"benign": "malignant", "malignant": "benign"}
    table = pd.read_csv(labels_csv)
    table.assign(label=table["label"].map(swapped)).to_csv(tmp_path / "other.csv", index=False)
    outcome = predict(*flags, tmp_path / "other.csv")
    assert "scores.json: holds scores of other slides, labels or settings; moved to" in outcome.err
    assert (out / "scores.1.json").read_bytes() == before["scores.json"]
    assert (out / "roc.1.png").read_bytes() == before["roc.png"]
    assert pd.read_csv(out / "predictions.csv")["label"][0] == swapped[table["label"][0]]
    predict(*flags, labels_csv, "--overwrite")
    assert not (out / "scores.2.json").exists()


def test_what_was_known_of_a_patient_stays_known_without_the_table(cohort, predict, tmp_path):
    labels_csv, features = cohort
    seen = {"slide": id_digests("slide", ["none"]), "case": id_digests("case", ["P000"])}
    flags = ("--checkpoint", write_model(tmp_path / "m.pth", 1, seen=seen), "--input_dir", features)
    predict(*flags, "--labels_csv", labels_csv)
    outcome = predict(*flags)
    assert "24 skipped" in outcome.out
    assert of(tmp_path / "out", "P000-S1")["seen_as"] == "case"
    assert "2 slides seen in training" in outcome.out


def test_a_folder_has_an_index_page_and_an_end_that_says_what_is_next(cohort, models, predict, tmp_path):
    flags = ("--checkpoint", models[0], "--input_dir", cohort[1], "--labels_csv", cohort[0])
    outcome, out = predict(*flags), tmp_path / "out"
    page = (out / "index.html").read_text()
    assert page.count("_prediction.json") == 24
    for text in ("For research, not a diagnosis.", "Trained on synthetic slides", f"LiteMIL ({models[0]})"):
        assert text in page
    end = outcome.out.splitlines()[-3:]
    assert end[0].startswith(f"24 done, 0 skipped, 0 no tissue, 0 failed; results are in {out} (took ")
    assert end[1] == "For research, not a diagnosis."
    assert end[2].startswith(f"Next: look at {out / 'index.html'}; the same command with --visualize --wsi SLIDES_DIR")
    one = predict("--checkpoint", models[0], "--input", cohort[1] / "P000-S1.h5").out.splitlines()
    assert one[-2].startswith("For research, not a diagnosis. (took ")
    assert one[-1].startswith("Next: the same command with --visualize --wsi SLIDE ")


def test_every_picture_says_what_it_is_for(drawable, predict, tmp_path, texts_of_figures):
    flags, drawn = drawable("LiteMIL")
    assert predict(*flags, *drawn, "--faithfulness").code == 0
    assert len(texts_of_figures) == 5
    for text in (*texts_of_figures.values(), *(
        (tmp_path / "out" / f"slide_{name}").read_text()
        for name in ("report.html", "attention.geojson", "prediction.json")
    )):  # fmt: skip
        assert "For research, not a diagnosis." in text
    assert "synthetic" in texts_of_figures["slide_detailed.png"]


# Raw slides


def test_a_raw_slide_is_extracted_by_all_of_the_recipe(monkeypatch):
    """Each setting of a recipe, those to come too: what is made of one has the same."""
    made = WSIFeatureExtractor("stain-texture", 96, 48, tissue_threshold=0.25, dtype="float32", mpp=0.75, qc=True,
                               edge="keep")  # fmt: skip
    again = WSIFeatureExtractor.of_recipe(made.recipe, weights=None, batch_size=64, device="cpu")
    assert again.recipe == made.recipe
    leveled = WSIFeatureExtractor("stain", 96, level=1)
    assert WSIFeatureExtractor.of_recipe(leveled.recipe, weights=None, batch_size=64, device="cpu").config.qc is False


def test_a_raw_slide_is_predicted_from_what_qc_leaves(predict, tmp_path, monkeypatch):
    write_pyramid(tmp_path / "slide.tif", stained_image(512, 512), mpp=0.5)
    recipe = WSIFeatureExtractor("stain", 64, mpp=0.5, tissue_threshold=0, qc=True).recipe
    torch.manual_seed(0)
    model = build_mil("LiteMIL", input_dim=45, num_classes=2)
    path = write_model(tmp_path / "m.pth", 1, model=model.spec, state_dict=model.state_dict(), recipe=recipe)
    monkeypatch.setattr("utils.features.encoding.patch_quality", lambda patches, _: np.array(["pen"] * 3 + [""] * 61))
    assert predict("--checkpoint", path, "--input", tmp_path / "slide.tif").code == 0
    assert of(tmp_path / "out", "slide")["num_instances"] == 61


def test_a_raw_slide_keeps_its_edge_and_is_painted_up_to_it(predict, tmp_path):
    Image.fromarray(stained_image(155, 104)).save(tmp_path / "slide.png")
    recipe = WSIFeatureExtractor("stain", 50, tissue_threshold=0, edge="keep").recipe
    torch.manual_seed(0)
    model = build_mil("LiteMIL", input_dim=45, num_classes=2)
    path = write_model(tmp_path / "m.pth", 1, model=model.spec, state_dict=model.state_dict(), recipe=recipe)
    outcome = predict("--checkpoint", path, "--input", tmp_path / "slide.png", "--visualize", "--save_features")
    assert outcome.code == 0, outcome.err
    out = tmp_path / "out"
    assert of(out, "slide")["num_instances"] == 12
    assert (out / "slide_heatmap.png").exists()
    assert '<th scope="row">edge</th><td>keep</td>' in (out / "slide_report.html").read_text()
    coords = np.load(out / "slide_attention.npz")["coords"]
    assert coords.tolist() == [[x, y] for y in (0, 50, 54) for x in (0, 50, 100, 105)]
    tiles = json.loads((out / "slide_attention.geojson").read_text())["features"]
    corners = np.array([corner for tile in tiles for corner in tile["geometry"]["coordinates"][0]])
    assert corners.max(axis=0).tolist() == [155, 104]
    attention = AttentionMap(coords, np.full(12, 1 / 12), 50)
    assert not np.isnan(attention.raster(attention.attention, (155, 104), (104, 155))).any()


def test_the_um_per_px_of_raw_slides_can_be_told_of_all(predict, tmp_path):
    (tmp_path / "slides").mkdir()
    for name in "ab":
        Image.fromarray(stained_image(256, 256)).save(tmp_path / "slides" / f"{name}.png")
    torch.manual_seed(0)
    model = build_mil("LiteMIL", input_dim=45, num_classes=2)
    recipe = WSIFeatureExtractor("stain", 64, mpp=0.5, tissue_threshold=0).recipe
    path = write_model(tmp_path / "m.pth", 1, model=model.spec, state_dict=model.state_dict(), recipe=recipe)
    flags = ("--checkpoint", path, "--input_dir", tmp_path / "slides")
    untold = predict(*flags)
    assert untold.code == 1
    assert "give it with --slide_mpp" in untold.errors[0]
    (tmp_path / "mpp.csv").write_text("wsi,mpp\na.png,0.25\nb.pgn,0.25\n")
    outcome = predict(*flags, "--slide_mpp", "0.5", "--slides_csv", tmp_path / "mpp.csv")
    assert outcome.code == 0, outcome.err
    assert "mpp.csv: 1 of 2 rows match no slide of" in outcome.err
    assert "b.pgn" in outcome.err
    told = {name: of(tmp_path / "out", name)["slide_record"]["mpp"] for name in "ab"}
    assert told == {"a": 0.25, "b": 0.5}
    assert "told_mpp: found 0.5, expected 0.4" in predict(*flags, "--slide_mpp", "0.4").err
    one = ("--checkpoint", path, "--input", tmp_path / "slides" / "b.png", "--slide_mpp", "0.5")
    assert "no row for b.png" in predict(*one, "--slides_csv", tmp_path / "mpp.csv", output="one").err


def write_raw_model(path: Path, mpp_range=(0.5, 0.5), **recipe) -> Path:
    """A model of patches of 64 px, encoded by "stain"."""
    torch.manual_seed(0)
    model = build_mil("LiteMIL", input_dim=45, num_classes=2)
    made = WSIFeatureExtractor("stain", 64, **({"tissue_threshold": 0} | recipe)).recipe
    return write_model(path, 1, model=model.spec, state_dict=model.state_dict(), recipe=made, mpp_range=mpp_range)


@pytest.mark.parametrize(
    ("flag", "value", "patches"), [("stride", 32, 49), ("tissue_threshold", 1, 0), ("tissue_threshold", 0, 16)]
)
def test_flags_that_choose_the_patches_and_change_no_feature_are_taken(predict, tmp_path, flag, value, patches):
    """As for feature files: those of another stride or tissue threshold are predicted, too."""
    image = stained_image(256, 256) if patches else np.full((256, 256, 3), 245, np.uint8)
    write_pyramid(tmp_path / "slide.tif", image, mpp=0.5)
    threshold = 0.1 if flag == "tissue_threshold" else 0
    path = write_raw_model(tmp_path / "m.pth", mpp=0.5, tissue_threshold=threshold)
    outcome = predict("--checkpoint", path, "--input", tmp_path / "slide.tif", f"--{flag}", value, "--save_features")
    assert f"chosen in another way than in training ({flag}: found {value}" in outcome.err
    if patches:
        record = of(tmp_path / "out", "slide")
        assert (record["num_instances"], record["recipe"][flag]) == (patches, value)
        predict("--checkpoint", path, "--input", tmp_path / "out" / "slide.h5", output="features")
        assert of(tmp_path / "features", "slide")["probabilities"] == record["probabilities"]
    else:
        assert "draw it and extract it with extractFeatures.py --tissue" in outcome.errors[0]


def test_a_slide_of_another_scanner_is_resampled_as_its_refusal_advises(predict, tmp_path):
    write_pyramid(tmp_path / "slide.tif", stained_image(512, 512), mpp=0.25, downsamples=(1, 2))
    flags = ("--checkpoint", write_raw_model(tmp_path / "m.pth", level=0), "--input", tmp_path / "slide.tif")
    refused = predict(*flags)
    assert "mpp: found 0.25 um/px, expected 0.5 to 0.5" in refused.errors[0]
    assert "; give --mpp 0.5, which resamples it to that, or give --allow_mismatch" in refused.errors[0]
    outcome = predict(*flags, "--mpp", "0.5")
    assert outcome.code == 0, outcome.err
    record = of(tmp_path / "out", "slide")
    assert (record["num_instances"], record["slide_record"]["mpp_delivered"]) == (16, 0.5)
    assert "expected 0.5 to 0.5" in predict(*flags, "--mpp", "0.3", "--overwrite").errors[0]
    # Of a model that does not record the um/px of its patches, nothing tells whether they agree.
    unknown = write_raw_model(tmp_path / "unknown.pth", None, level=0)
    refused = predict("--checkpoint", unknown, *flags[2:], "--mpp", "0.5", output="unknown")
    assert "mpp: found 0.5, expected level 0" in refused.errors[0]


@pytest.mark.parametrize(
    ("size", "mpp", "brightness"), [(256, 0.5, 245), (256, 0.5, 0), (256, 1, 200), (32, 0.5, 200), (256, None, 200)]
)
def test_advice_names_flags_that_predict_has(predict, tmp_path, size, mpp, brightness):
    """No tissue, fluorescence, too coarse, too small, no um/px: the remedies of an extraction are called so."""
    write_pyramid(tmp_path / "slide.tif", np.full((size, size, 3), brightness, np.uint8), mpp=mpp, downsamples=(1,))
    path = write_raw_model(tmp_path / "m.pth", mpp=0.5, tissue_threshold=0.5)
    refused = predict("--checkpoint", path, "--input", tmp_path / "slide.tif")
    assert (refused.code, len(refused.errors)) == (1, 1)
    flags = re.findall(r"(?<!extractFeatures\.py )--(\w+)", refused.errors[0])
    own = {item.name for kind in (Prediction, PredictionRecipe) for item in fields(kind)}
    assert set(flags) <= own - {"mpp", "level", "patch_size"}, refused.errors[0]


def test_the_size_of_patches_to_draw_is_given_by_a_level_beside_a_recipe_in_um(drawable, predict, tmp_path):
    recipe = replace(synthetic_passport("slide").recipe, level=None, mpp=0.5)
    flags, drawn = drawable("LiteMIL", recipe=recipe)
    bag = read_bag(tmp_path / "slide.h5")
    write_bag(tmp_path / "slide.h5", Bag(bag.features, bag.coords // 2, None, None))
    refused = predict(*flags, *drawn)
    assert "does not record the patch size; give --patch_size, and --level if not 0" in refused.errors[0]
    assert predict(*flags, *drawn, "--patch_size", 256, "--level", 0).code == 0


def test_overwriting_replaces_what_is_in_the_way_of_features(predict, tmp_path):
    write_pyramid(tmp_path / "slide.tif", stained_image(256, 256), mpp=0.5)
    write_bag(tmp_path / "out" / "slide.h5", Bag(np.ones((1, 16), np.float16)))
    path = write_raw_model(tmp_path / "m.pth", mpp=0.5)
    flags = ("--checkpoint", path, "--input", tmp_path / "slide.tif", "--save_features")
    assert "slide.h5: was made by something else" in predict(*flags).errors[0]
    assert predict(*flags, "--overwrite").code == 0
    assert len(read_bag(tmp_path / "out" / "slide.h5").features) == 16


def test_advice_on_labels_names_flags_that_predict_has(cohort, models, predict, tmp_path):
    (tmp_path / "labels.csv").write_text("case_id,wsi_id,label\nP000,P000-S1,NA\n")
    flags = ("--checkpoint", models[0], "--input_dir", cohort[1], "--labels_csv", tmp_path / "labels.csv")
    for allowed in ((), ("--allow", "unknown")):
        error = predict(*flags, *allowed).errors[0]
        assert "--class_names" not in error
        assert "--features_dir" not in error


class Silent(BagModel):
    """A model of one's own that gives no attention: the mean of the patches, classified."""

    def __init__(self, input_dim, num_classes):
        super().__init__(input_dim, num_classes)
        self.head = torch.nn.Linear(input_dim, num_classes)

    def forward(self, x, mask=None):
        self.check_bags(x, mask)
        kept = torch.ones(x.shape[:2]) if mask is None else (~mask).to(x)
        mean = (self.cast(x) * kept[..., None]).sum(dim=1) / kept.sum(dim=1, keepdim=True)
        return self.head(mean), {"attn": None}


@pytest.fixture
def silent(monkeypatch) -> type[BagModel]:
    monkeypatch.setitem(registry.MODELS, "Silent", Silent)
    return Silent


def test_a_model_without_attention_predicts_and_its_maps_are_refused(cohort, predict, tmp_path, silent):
    spec = silent(16, 2).spec
    model = write_model(tmp_path / "silent.pth", 1, model=spec, state_dict=silent(16, 2).state_dict())
    flags = ("--checkpoint", model, "--input_dir", cohort[1])
    assert predict(*flags).code == 0
    for needing, said in (
        (("--visualize", "--wsi", tmp_path), "leave --visualize out"),
        (("--faithfulness",), "leave --faithfulness out"),
    ):
        outcome = predict(*flags, *needing)
        assert outcome.errors == [f"error: {model}: its model gives no attention; {said}"]
    predictor = SlidePredictor(model, device="cpu")
    prediction = predictor.predict(next(cohort[1].glob("*.h5")))
    assert prediction.attention is None
    with pytest.raises(CheckpointError, match=r"silent.pth: its model gives no attention, so there is no faithfulness"):
        predictor.faithfulness(prediction)


def test_a_model_of_one_s_own_is_trained_tested_and_predicts(cohort, tmp_path, silent):
    dataset = MILDataset(*cohort)
    cv = NestedCrossValidation(
        partial(silent, 16, 2), dataset, dataset.class_names, tmp_path / "run", n_outer=2, n_inner=2, epochs=1,
        device="cpu", dataset_name="mine",
    )  # fmt: skip
    assert cv.run()["model"] == {"name": "Silent", "input_dim": 16, "num_classes": 2}
    best = tmp_path / "run" / "all_folds_best.pth"
    assert isinstance(SlidePredictor(best, device="cpu").models[0], silent)
