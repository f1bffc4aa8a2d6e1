"""predict.py over folders, with several models, with labels: what it writes, keeps and refuses."""

import json
import re
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from MILS import build_mil, registry
from MILS.bag_model import BagModel
from MILS.ensemble import members_of
from tests.cohort import synthetic_passport
from tests.prediction.predict_helpers import of, write_model
from tests.small import scale_probabilities
from tests.synthetic import stained_image, write_pyramid
from utils.bags.store import Bag, read_bag, write_bag
from utils.core.errors import CheckpointError
from utils.features.extractor import WSIFeatureExtractor
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation
from utils.pictures.attention_map import AttentionMap
from utils.prediction.checkpoint import id_digests, load_checkpoint
from utils.prediction.forward_pass import SlideFeed
from utils.prediction.predictor import SlidePredictor
from utils.prediction.settings import Prediction, PredictionRecipe

pytestmark = pytest.mark.usefixtures("blank_figures")


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
            "intercepts": None, "prior": None, "weights_digest": checkpoint.weights_digest,
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


def test_patients_of_training_in_another_spelling_are_named(cohort, predict, tmp_path):
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


def test_overwriting_replaces_what_is_in_the_way_of_features(predict, tmp_path):
    write_pyramid(tmp_path / "slide.tif", stained_image(256, 256), mpp=0.5)
    write_bag(tmp_path / "out" / "slide.h5", Bag(np.ones((1, 16), np.float16)))
    path = write_raw_model(tmp_path / "m.pth", mpp=0.5)
    flags = ("--checkpoint", path, "--input", tmp_path / "slide.tif", "--save_features")
    assert "slide.h5: was made by something else" in predict(*flags).errors[0]
    assert predict(*flags, "--overwrite").code == 0
    assert len(read_bag(tmp_path / "out" / "slide.h5").features) == 16


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
    (ensemble,) = SlidePredictor(best, device="cpu").models
    assert {type(member) for member in members_of(ensemble)} == {silent}


def test_prevalence_moves_the_calibrated_probabilities_and_nothing_else(cohort, predict, tmp_path):
    model = write_model(tmp_path / "model.pth", 1, intercepts=(0.4, -0.4), prior=(0.7, 0.3))
    flags = ("--checkpoint", model, "--input", cohort[1] / "P003-S1.h5")
    predict(*flags)
    plain = of(tmp_path / "out", "P003-S1")
    again = predict(*flags, "--prevalence", "0.05")
    assert (again.code, len(again.errors)) == (1, 1), "another request than the one that is answered there"
    predict(*flags, "--prevalence", "0.05", output="rare")
    rare = of(tmp_path / "rare", "P003-S1")
    assert rare["probabilities"] == plain["probabilities"]
    assert rare["prior"] == [0.95, 0.05]
    odds = [
        record["calibrated_probabilities"]["malignant"] / record["calibrated_probabilities"]["benign"]
        for record in (plain, rare)
    ]
    assert odds[1] / odds[0] == pytest.approx((0.05 / 0.95) / (0.3 / 0.7))


def test_prevalence_needs_a_model_that_knows_its_own(cohort, models, predict):
    outcome = predict("--checkpoint", models[0], "--input", cohort[1] / "P003-S1.h5", "--prevalence", "0.05")
    assert outcome.code == 1
    (line,) = outcome.errors
    assert "--prevalence 0.05: no frequencies of the classes are recorded; leave it out" in line


def test_predictions_for_another_prevalence_are_not_mixed_with_those_there(cohort, predict, tmp_path):
    """In either order: the table of a folder is of one prevalence."""
    model = write_model(tmp_path / "model.pth", 1, intercepts=(0.4, -0.4), prior=(0.7, 0.3))
    slide, other = cohort[1] / "P003-S1.h5", cohort[1] / "P004-S1.h5"
    for first, second in (([], ["--prevalence", "0.1"]), (["--prevalence", "0.1"], [])):
        output = f"out_{len(first)}"
        assert predict("--checkpoint", model, "--input", slide, *first, output=output).code == 0
        assert predict("--checkpoint", model, "--input", slide, *second, output=output).code == 1
        folder = tmp_path / f"in_{len(first)}"
        folder.mkdir()
        for path in (slide, other):
            write_bag(folder / path.name, read_bag(path))
        outcome = predict("--checkpoint", model, "--input_dir", folder, *second, output=output)
        assert outcome.code == 1
        assert "prevalence" in outcome.err


def test_prevalence_needs_slides_fed_as_in_training(cohort, predict, tmp_path):
    model = write_model(tmp_path / "model.pth", 1, intercepts=(0.4, -0.4), prior=(0.7, 0.3))
    mode = "chunked" if load_checkpoint(model).slide_feed.mode == "full" else "full"
    outcome = predict("--checkpoint", model, "--input", cohort[1] / "P003-S1.h5", "--prevalence", "0.1", "--mode", mode)
    assert outcome.code == 1
    assert "--prevalence: only slides fed as in training are calibrated" in outcome.err


def test_earlier_records_are_of_the_trainings_prevalence(cohort, models, predict, tmp_path):
    flags = ("--checkpoint", models[0], "--input", cohort[1] / "P003-S1.h5")
    predict(*flags)
    path = tmp_path / "out" / "P003-S1_prediction.json"
    record = json.loads(path.read_text())
    assert record["request"].pop("prevalence", "absent") in (None, "absent")
    path.write_text(json.dumps(record))
    before = path.read_bytes()
    assert predict(*flags).code == 0
    assert path.read_bytes() == before, "it is known, and kept"
