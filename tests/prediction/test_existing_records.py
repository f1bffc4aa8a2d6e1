"""What becomes of the predictions of an earlier command."""

import json

import pytest
import torch

from MILS import build_mil
from tests.prediction.predict_helpers import CLASSES, of, write_model
from tests.synthetic import stained_image, write_pyramid
from utils.bags.store import read_bag, write_bag

pytestmark = pytest.mark.usefixtures("blank_figures")


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
