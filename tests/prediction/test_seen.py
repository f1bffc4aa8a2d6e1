"""Whether a model was trained on a slide, by its name, its patient and its content."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cohort import synthetic_passport
from tests.prediction.predict_helpers import write_model
from utils.bags.content_digest import DigestedFeatures, features_digest
from utils.bags.store import Bag, open_bag, read_bag, write_bag
from utils.core.passport import Passport
from utils.prediction.checkpoint import id_digests
from utils.prediction.forward_pass import SlideFeed
from utils.prediction.predictor import SlidePredictor

NAMES = {"slide": id_digests("slide", ["train"]), "case": id_digests("case", ["P1"])}


def bag_of(seed: int, **record) -> Bag:
    features = np.random.default_rng(seed).standard_normal((5, 16)).astype(np.float16)
    return Bag(features, np.zeros((5, 2), np.int64), 512, Passport(synthetic_passport("x").recipe, record))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A model trained on the slide "train", of patient P1, with the features of `bag_of(0)` and the hash "h"."""
    digest = features_digest(torch.from_numpy(bag_of(0).features))
    seen = NAMES | {"slide_hash": id_digests("slide_hash", ["h"]), "features": id_digests("features", [digest])}
    return write_model(tmp_path / "model.pth", 1, seen=seen)


@pytest.fixture
def predict(script, tmp_path):
    def run(*flags):
        return script("predict", *flags, "--output_dir", tmp_path / "out", "--device", "cpu")

    return run


def record_of(tmp_path: Path, slide: str) -> dict:
    return json.loads((tmp_path / "out" / f"{slide}_prediction.json").read_text())


@pytest.mark.parametrize(
    ("name", "bag", "seen", "compared"),
    [
        ("train", bag_of(1), "slide", "name"),
        ("renamed", bag_of(0), "slide", "content"),
        ("extracted_again", bag_of(1, quick_hash="h"), "slide", "content"),
        ("other", bag_of(1, quick_hash="g"), "", "content"),
    ],
)
@pytest.mark.parametrize("ending", ["h5", "pt"])
def test_a_renamed_slide_is_seen_by_its_content(checkpoint, predict, tmp_path, name, bag, seen, compared, ending):
    write_bag(tmp_path / f"{name}.{ending}", bag)
    flags = ("--checkpoint", checkpoint, "--input", tmp_path / f"{name}.{ending}")
    outcome = predict(*flags)
    assert outcome.code == 0, outcome.err
    record = record_of(tmp_path, name)
    assert (record["seen_as"], record["seen_in_training"]) == (seen, bool(seen))
    assert record["seen_compared"] == compared
    is_renamed = bool(seen) and compared == "content"
    assert ("trained on this slide, under another name;" in outcome.err) == is_renamed
    before = (tmp_path / "out" / f"{name}_prediction.json").stat().st_mtime_ns
    predict(*flags)
    assert (tmp_path / "out" / f"{name}_prediction.json").stat().st_mtime_ns == before


def test_renamed_copies_of_training_slides_are_not_scored_as_unseen(checkpoint, predict, tmp_path):
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        write_bag(tmp_path / "in" / f"{name}.h5", bag_of(seed))
    (tmp_path / "labels.csv").write_text("case_id,wsi_id,label\nQ1,a,benign\nQ2,b,malignant\nQ3,c,benign\n")
    flags = ("--checkpoint", checkpoint, "--input_dir", tmp_path / "in", "--labels_csv", tmp_path / "labels.csv")
    outcome = predict(*flags)
    assert "1 slide seen in training, or of patients seen there (1 under another name)" in outcome.out
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["n_seen_in_training"], scores["n_seen_under_another_name"]) == (1, 1)
    assert (scores["unseen"]["n_slides"], scores["n_unseen_by_name_alone"]) == (2, 0)
    assert "slide, under another name" in (tmp_path / "out" / "prediction_report.csv").read_text()


def test_a_checkpoint_that_records_names_alone_claims_no_more(predict, tmp_path):
    """Earlier checkpoints: what is not seen by its name is said to be compared by its name."""
    model = write_model(tmp_path / "model.pth", 1, seen=NAMES)
    write_bag(tmp_path / "renamed.h5", bag_of(0))
    outcome = predict("--checkpoint", model, "--input", tmp_path / "renamed.h5")
    record = record_of(tmp_path, "renamed")
    assert (record["seen_in_training"], record["seen_compared"]) == (False, "name")
    assert "by name alone" in outcome.err
    unknown = write_model(tmp_path / "unknown.pth", 1, seen={"slide": [], "case": []})
    write_bag(tmp_path / "slide.h5", bag_of(0))
    predict("--checkpoint", unknown, "--input", tmp_path / "slide.h5")
    record = record_of(tmp_path, "slide")
    assert (record["seen_in_training"], record["seen_as"], record["seen_compared"]) == (None, None, None)


def test_a_record_that_compared_names_is_made_again_with_a_checkpoint_that_knows_more(checkpoint, predict, tmp_path):
    write_bag(tmp_path / "renamed.h5", bag_of(0))
    flags = ("--checkpoint", checkpoint, "--input", tmp_path / "renamed.h5")
    predict(*flags)
    path = tmp_path / "out" / "renamed_prediction.json"
    record = record_of(tmp_path, "renamed") | {"seen_as": "", "seen_in_training": False}
    del record["seen_compared"]
    path.write_text(json.dumps(record))
    predict(*flags)
    assert record_of(tmp_path, "renamed")["seen_as"] == "slide"


@pytest.mark.parametrize("rows_each", [2, 100])
def test_features_are_read_once_for_prediction_and_digest(tmp_path, monkeypatch, rows_each):
    write_bag(tmp_path / "slide.h5", bag_of(0))
    features = DigestedFeatures(open_bag(tmp_path / "slide.h5").features)
    expected = features_digest(torch.from_numpy(read_bag(tmp_path / "slide.h5").features))
    assert features.digest() == expected
    again = DigestedFeatures(features)
    assert sum(map(len, again.blocks(rows_each))) == 5
    monkeypatch.setattr("utils.bags.store.StoredFeatures.blocks", None)
    assert again.digest() == expected


def test_a_slide_in_memory_is_compared_too(checkpoint):
    predictor = SlidePredictor(checkpoint, device="cpu")
    prediction = predictor.predict_bag(replace(bag_of(0)), Path("other.h5"))
    assert prediction.seen_as == "slide"
    chunked = predictor.predict_bag(bag_of(0), Path("other.h5"), mode="chunked", chunk_size=2)
    assert chunked.feed == SlideFeed.of_mode("chunked", 2)
    assert chunked.seen_as == "slide"
