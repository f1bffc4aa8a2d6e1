"""predict.py --annotations: maps are scored against what is annotated on the slide or in the feature file."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from MILS import build_mil
from tests.cohort import synthetic_passport
from tests.synthetic import stained_image, write_pyramid
from utils.bags.store import Bag, write_bag
from utils.core.passport import Passport
from utils.evaluation.localization import map_scores
from utils.prediction.checkpoint import Checkpoint, id_digests, save_checkpoint
from utils.prediction.forward_pass import SlideFeed
from utils.prediction.predictor import SlidePredictor

pytestmark = pytest.mark.usefixtures("blank_figures")

EDGE, CELLS = 64, 6
CORNERS = np.stack(np.meshgrid(np.arange(CELLS), np.arange(CELLS)), axis=-1).reshape(-1, 2) * EDGE
# Patches of the first two columns are tumour.
IS_TUMOUR = CORNERS[:, 0] < 2 * EDGE


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Three feature files, the slide of one, and models of two and of three classes."""
    home, rng = tmp_path_factory.mktemp("annotations"), np.random.default_rng(0)
    for name in ("s1", "s2", "s3"):
        features = rng.standard_normal((len(CORNERS), 16)).astype(np.float32)
        passport = Passport(synthetic_passport(name).recipe, {"name": name, "mpp_delivered": 0.5})
        write_bag(home / "features" / f"{name}.h5", Bag(features, CORNERS, EDGE, passport))
    (home / "slides").mkdir()
    write_pyramid(home / "slides" / "s1.tif", stained_image(CELLS * EDGE, CELLS * EDGE), mpp=0.25)
    for classes in (("benign", "malignant"), ("a", "b", "c")):
        torch.manual_seed(len(classes))
        model = build_mil("LiteMIL", input_dim=16, num_classes=len(classes), hidden_dim=16).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        save_checkpoint(home / f"of_{len(classes)}.pth", Checkpoint(
            model=model.spec, state_dict=model.state_dict(), class_names=classes, dataset="demo",
            feed=SlideFeed(None, "merge").as_dict(), recipe=synthetic_passport("x").recipe, mpp_range=(0.5, 0.5),
            selection={}, seen={"slide": id_digests("slide", ["none"]), "case": []},
        ))  # fmt: skip
    return home


def outlined(folder: Path, name: str, class_name: str = "Tumor", columns: int = 2) -> Path:
    """A QuPath file in which the first columns of patches are of a class."""
    width, height = columns * EDGE, CELLS * EDGE
    ring = [[0, 0], [width, 0], [width, height], [0, height], [0, 0]]
    feature = {
        "type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation", "classification": {"name": class_name}},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": [feature] if columns else []})
    )
    return folder


@pytest.fixture
def predict(script, home, tmp_path):
    def run(*flags, model=2, output="out"):
        flags = ("--checkpoint", home / f"of_{model}.pth", "--device", "cpu", "--output_dir", tmp_path / output, *flags)
        return script("predict", *flags)

    return run


def record(folder: Path, slide: str) -> dict:
    return json.loads((folder / f"{slide}_prediction.json").read_text())


def expected(home: Path, slide: str, index: int = 1) -> dict:
    path = home / "features" / f"{slide}.h5"
    predictor = SlidePredictor(home / "of_2.pth", device="cpu")
    prediction = predictor.predict_bag(predictor.bag(path), path, evidence=True)
    maps = {"attention": prediction.patch_attention, "evidence": prediction.evidence.contributions[index]}
    return {name: map_scores(values, IS_TUMOUR) for name, values in maps.items()}


def test_a_folder_is_scored_and_averaged(home, predict, tmp_path):
    drawn = outlined(tmp_path / "drawn", "s1")
    outlined(drawn, "s2", columns=0)
    outlined(drawn, "s9")
    table = tmp_path / "labels.csv"
    table.write_text("case_id,wsi_id,label\np1,s1,malignant\np2,s2,benign\np3,s3,malignant\n")
    flags = ("--input_dir", home / "features", "--annotations", drawn, "--annotation_class", "Tumor=malignant")
    outcome = predict(*flags, "--labels_csv", table)
    assert outcome.code == 0, outcome.err
    assert "1 of 3 files match no slide by name, and are not used: s9.geojson" in outcome.err
    out = tmp_path / "out"
    entry = record(out, "s1")["localization"]
    assert entry["annotations"] == str(drawn / "s1.geojson")
    assert entry["classes"]["malignant"] == {"patches": 12, "of": 36} | expected(home, "s1")
    assert record(out, "s2")["localization"]["classes"] == {}
    assert record(out, "s3")["localization"] is None
    means = json.loads((out / "scores.json").read_text())["localization"]["malignant"]
    assert (means["n_slides"], means["chance_overlap"]) == (1, pytest.approx(1 / 3))
    assert means["evidence"]["auc"] == entry["classes"]["malignant"]["evidence"]["auc"]
    assert "Annotated malignant, mean of 1 slide (chance" in outcome.out

    assert "0 done, 3 skipped" in predict(*flags).out
    outlined(drawn, "s1", columns=3)
    assert "1 done, 2 skipped" in predict(*flags).out
    assert record(out, "s1")["localization"]["classes"]["malignant"]["patches"] == 18
    outlined(drawn, "s3")
    assert "1 done, 2 skipped" in predict(*flags).out
    assert "Annotated malignant, mean of 2 slides" in predict(*flags).out


def test_a_class_of_the_models_name_needs_no_flag_and_the_page_says_the_scores(home, predict, tmp_path):
    drawn = outlined(tmp_path / "drawn", "mine", "Malignant") / "mine.geojson"
    slide = home / "slides" / "s1.tif"
    flags = ("--input", home / "features" / "s1.h5", "--visualize", "--wsi", slide)
    assert predict(*flags).code == 0
    outcome = predict(*flags, "--annotations", drawn)
    assert outcome.code == 0, outcome.err
    assert record(tmp_path / "out", "s1")["localization"]["classes"]["malignant"]["patches"] == 12
    page = (tmp_path / "out" / "s1_report.html").read_text()
    assert "annotated malignant" in page
    assert "12 of 36 patches; attention AUC " in page
    assert "annotated malignant: 12 of 36 patches; attention AUC " in outcome.out
    drawn.rename(drawn.with_name("s1.geojson"))
    outcome = predict("--input", home / "features" / "s2.h5", "--annotations", drawn.parent)
    assert f"{drawn.parent} has no annotations of this slide, so no map is scored" in outcome.err


def test_labels_of_the_feature_file_are_truth_too(home, predict, tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    for name in ("s1", "s2"):
        (folder / f"{name}.h5").write_bytes((home / "features" / f"{name}.h5").read_bytes())
    for name, labels in (("s1", IS_TUMOUR.astype(np.int8)), ("s2", np.where(IS_TUMOUR, 1, -1)[:, None])):
        with h5py.File(folder / f"{name}.h5", "a") as file:
            file["inst_labels"] = labels
    outcome = predict("--input_dir", folder, "--annotations", "inst_labels")
    assert outcome.code == 0, outcome.err
    classes = record(tmp_path / "out", "s1")["localization"]["classes"]
    assert classes == {"malignant": {"patches": 12, "of": 36} | expected(home, "s1")}
    # A negative label says that it is not known.
    unknown = record(tmp_path / "out", "s2")["localization"]["classes"]["malignant"]
    assert (unknown["patches"], unknown["of"], unknown["attention"]["auc"]) == (12, 12, None)
    outcome = predict("--input_dir", folder, "--annotations", "inst_labels", "--annotation_class", "1=benign")
    assert list(record(tmp_path / "out", "s1")["localization"]["classes"]) == ["benign"]


def test_labels_beside_the_features_that_change_are_scored_anew(home, predict, tmp_path):
    for name in ("features", "inst_labels"):
        (tmp_path / name).mkdir()
    (tmp_path / "features" / "s1.h5").write_bytes((home / "features" / "s1.h5").read_bytes())
    flags = ("--input", tmp_path / "features" / "s1.h5", "--annotations", "inst_labels")
    for columns in (2, 3):
        with h5py.File(tmp_path / "inst_labels" / "s1.h5", "w") as file:
            file["inst_labels"] = (CORNERS[:, 0] < columns * EDGE).astype(np.int8)
        outcome = predict(*flags)
        assert outcome.code == 0, outcome.err
        assert record(tmp_path / "out", "s1")["localization"]["classes"]["malignant"]["patches"] == columns * CELLS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--annotation_class", "a=b"), "--annotation_class a=b: goes with --annotations; give it"),
        (("--annotations", "{drawn}/s1.geojson"), "s1.geojson: none of its areas is of class benign, malignant; there"),
        (("--annotations", "{drawn}/s1.geojsn"), "no such file or folder, nor inst_labels; did you mean"),
        (("--annotations", "{drawn}/s1.geojson", "--annotation_class", "Tumor"), "Tumor: expected NAME=CLASS"),
        (("--annotations", "{drawn}", "--annotation_class", "Tumor=malign"), "malign is no class of the model (benign"),
        (("--annotations", "inst_labels"), "s1.h5: no inst_labels in it, nor a file"),
        (("--annotations", "inst_labels", "--annotation_class", "Tumor=malignant"), "inst_labels are numbers: 1=CLASS"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_in_a_line(home, predict, tmp_path, flags, message):
    drawn = outlined(tmp_path / "drawn", "s1")
    flags = [flag.format(drawn=drawn) for flag in flags]
    outcome = predict("--input", home / "features" / "s1.h5", *flags)
    assert (outcome.code, len(outcome.errors)) == (1, 1), outcome.err
    assert message in outcome.errors[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "not readable as JSON"), (None, "none of its areas is of class"), ("two", "which are the")],
)
def test_refused_annotations_of_one_slide_leave_its_prediction(home, predict, tmp_path, content, reason):
    drawn = outlined(tmp_path / "drawn", "s1", "malignant")
    outlined(drawn, "s2", "Necrosis")
    if content == "two":
        (drawn / "s2.h5.geojson").write_bytes((drawn / "s2.geojson").read_bytes())
    elif content:
        (drawn / "s2.geojson").write_text(content)
    flags = ("--input_dir", home / "features", "--annotations", drawn)
    outcome = predict(*flags)
    assert outcome.code == 0, outcome.err
    out = tmp_path / "out"
    entry = record(out, "s2")["localization"]
    assert (entry["classes"], reason in entry["reason"]) == ({}, True), entry["reason"]
    assert record(out, "s1")["localization"]["classes"]["malignant"]["patches"] == 12
    assert outcome.err.count("predicted, but no map is scored") == 1
    assert "1 slide without scores of maps: s2; see prediction_report.csv" in outcome.out
    assert f"not scored: {entry['reason'][:20]}" in (out / "prediction_report.csv").read_text()
    assert "0 done, 3 skipped" in predict(*flags).out
    (drawn / "s2.h5.geojson").unlink(missing_ok=True)
    outlined(drawn, "s2", "malignant")
    outcome = predict(*flags)
    assert "1 done, 2 skipped" in outcome.out
    assert "without scores of maps" not in outcome.out
    assert record(out, "s2")["localization"]["classes"]["malignant"]["patches"] == 12


def test_a_file_for_a_folder_and_labels_of_several_classes_are_refused(home, predict, tmp_path):
    drawn = outlined(tmp_path / "drawn", "s1")
    outcome = predict("--input_dir", home / "features", "--annotations", drawn / "s1.geojson")
    assert "a file of one slide; give the folder of the slides' files" in outcome.errors[0]
    outcome = predict("--input", home / "features" / "s1.h5", "--annotations", "inst_labels", model=3)
    assert "which of a, b, c do its numbers stand for? Give --annotation_class 1=c" in outcome.errors[0]
