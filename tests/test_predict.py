"""predict.py over folders, with several models, with labels: what it writes, keeps and refuses."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from MILS import build_mil, list_mils
from MILS.ensemble import Ensemble
from tests.cohort import synthetic_passport, write_cohort
from tests.synthetic import stained_image, write_pyramid
from utils.bags.store import Bag, read_bag, write_bag
from utils.core.passport import Passport
from utils.inference import SlidePredictor
from utils.learning.aggregation import SlideFeed
from utils.learning.calibration import scale_probabilities
from utils.learning.checkpoint import Checkpoint, id_digests, save_checkpoint
from utils.learning.metrics import classification_metrics
from utils.learning.statistics import bootstrap_intervals

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
        "predictions.csv", "scores.json", "roc.png", "confusion_matrix.png", "calibration.png", "prediction_report.csv",
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
    assert "is another prediction (checkpoint: found" in other.errors[0]
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
    some_seed = bootstrap_intervals(truth, probabilities, cases, 0)["auc"]
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


def test_checkpoints_that_do_not_go_together_are_refused(cohort, models, predict, tmp_path):
    features = cohort[1] / "P003-S1.h5"
    recipe = synthetic_passport("x").recipe
    for changes, message in (
        ({"class_names": ("malignant", "benign")}, "its classes are ('malignant', 'benign')"),
        ({"recipe": recipe | {"backbone": "uni"}}, "backbone: found uni, expected synthetic"),
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
    assert "slide_prediction.json: is another prediction (input_" in refused.errors[0]
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
    ],
)
def test_inputs_that_contradict_each_other(flags, message, models, predict, tmp_path):
    outcome = predict("--checkpoint", models[0], *flags)
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert message in outcome.errors[0]
    assert not (tmp_path / "out").exists()


def test_a_table_that_does_not_account_for_the_folder(cohort, models, predict, tmp_path):
    labels_csv, features = cohort
    table = pd.read_csv(labels_csv)
    extra = pd.concat(
        [table.iloc[:20], pd.DataFrame([("P9", "P9-S1", "benign"), ("P8", "P001-S1", "odd")], columns=table.columns)]
    )
    extra.to_csv(tmp_path / "labels.csv", index=False)
    flags = ("--checkpoint", models[0], "--input_dir", features, "--labels_csv", tmp_path / "labels.csv")
    assert "wsi_id that stands in an earlier row" in predict(*flags).errors[0]
    assert "P9-S1" in predict(*flags, "--allow", "duplicate").errors[0]
    assert not (tmp_path / "out").exists()
    outcome = predict(*flags, "--allow", "duplicate", "missing")
    assert outcome.code == 0, outcome.err
    assert "4 slides of 24 have no label, and are not scored" in outcome.err
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["n_slides"] == 20
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 24


def test_two_inputs_of_one_name_are_refused(cohort, models, predict, tmp_path):
    bag = read_bag(cohort[1] / "P000-S1.h5")
    for place in ("a/slide.h5", "b/slide.h5"):
        write_bag(tmp_path / "in" / place, bag)
    outcome = predict("--checkpoint", models[0], "--input_dir", tmp_path / "in")
    assert "would both be written to" in outcome.errors[0]


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
    flags = ("--checkpoint", models[0], "--input_dir", tmp_path / "in", "--wsi", tmp_path / "slides", "--visualize")
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


@pytest.fixture
def drawable(tmp_path):
    """Flags of a prediction of nine patches, and those that draw it, for an untrained model of a kind."""
    coords = np.stack(np.meshgrid([0, 128, 256], [0, 128, 256]), axis=-1).reshape(-1, 2)
    features = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float16)
    write_bag(tmp_path / "slide.h5", Bag(features, coords, 128, Passport(synthetic_passport("slide").recipe)))
    write_pyramid(tmp_path / "slide.tif", stained_image(512, 512), mpp=0.25)

    def make(mil: str):
        torch.manual_seed(0)
        model = build_mil(mil, input_dim=16, num_classes=2)
        write_model(tmp_path / "model.pth", 1, model=model.spec, state_dict=model.state_dict())
        flags = ("--checkpoint", tmp_path / "model.pth", "--input", tmp_path / "slide.h5")
        return flags, ("--visualize", "--wsi", tmp_path / "slide.tif")

    return make


@pytest.mark.parametrize("mil", list_mils())
def test_every_model_draws_its_set_and_measures_it(mil, drawable, predict, tmp_path):
    flags, drawn = drawable(mil)
    outcome = predict(*flags, *drawn, "--faithfulness")
    assert outcome.code == 0, outcome.err
    assert len(list((tmp_path / "out").iterdir())) == 9
    found = of(tmp_path / "out", "slide")["faithfulness"]
    assert found["random_orders"] == (3 if mil == "TransMIL" else 10)
    assert np.isfinite(found["deletion"]["gap"])
    assert (tmp_path / "out" / "slide_faithfulness.png").stat().st_size > 5000
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
