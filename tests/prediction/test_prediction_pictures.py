"""The pictures of predicted slides, and when they are drawn."""

import html
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from MILS import list_mils
from tests.cohort import synthetic_passport
from tests.drawing import drawn_coarsely
from tests.prediction.predict_helpers import of, write_model
from tests.synthetic import stained_image, write_pyramid
from utils.bags.store import Bag, read_bag, write_bag
from utils.core.passport import Passport
from utils.core.plots import FORMATS
from utils.pictures.heatmap import save_picture
from utils.prediction.checkpoint import id_digests
from utils.slides.slide import quick_hash_of

pytestmark = pytest.mark.usefixtures("blank_figures")


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
    outcome = predict(*flags[:4], "--visualize", "--wsi", tmp_path / "slides" / "one.tif")
    assert "no folder; give the one that holds the slides" in outcome.errors[0]


@pytest.mark.parametrize("is_recorded", [True, False])
def test_without_the_slide_maps_are_drawn_by_the_patches_coordinates(
    is_recorded, drawable, predict, tmp_path, coarse_figures
):
    flags, _ = drawable("LiteMIL")
    bag = read_bag(tmp_path / "slide.h5")
    size = {"width": 600, "height": 512, "mpp": 0.25, "bounds": [0, 0, 512, 400]} if is_recorded else {}
    passport = Passport(bag.passport.recipe, {"name": "slide", **size})
    write_bag(tmp_path / "slide.h5", Bag(bag.features, bag.coords, 128, passport))
    outcome = predict(*flags, "--visualize", "--top_k", 2)
    assert outcome.code == 0, outcome.err
    assert "maps are drawn on white ground by the patches' coordinates" in outcome.err
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "slide_prediction.json", "slide_heatmap.png", "slide_detailed.png", "slide_evidence.png", "slide_thumbnail.jpg",
        "slide_attention.npz", "slide_attention.geojson", "slide_report.html", "slide_top_patches",
    }  # fmt: skip
    table = pd.read_csv(out / "slide_top_patches" / "patches.csv")
    assert len(table) == 4
    assert table["file"].isna().all()
    frame = json.loads((out / "slide_attention.geojson").read_text())["litemil"]
    assert (frame["width"], frame["height"]) == ((600, 512) if is_recorded else (384, 384))
    assert np.load(out / "slide_attention.npz")["mpp"] == pytest.approx(0.25 if is_recorded else np.nan, nan_ok=True)
    assert [path.name for path in (out / "slide_top_patches").iterdir()] == ["patches.csv"]
    record = (out / "slide_prediction.json").stat().st_mtime_ns
    assert predict(*flags, "--visualize", "--top_k", 2).code == 0
    assert (out / "slide_prediction.json").stat().st_mtime_ns == record


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


@pytest.mark.parametrize("mil", list_mils())
def test_every_model_draws_its_set_and_measures_it(mil, drawable, predict, tmp_path, request):
    """With and without evidence the set is drawn; that of other models has no more than these to draw."""
    is_drawn = mil in ("LiteMIL", "TransMIL")
    if is_drawn:
        request.getfixturevalue("coarse_figures")
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
    assert (">evidence for " in page) is gives_evidence
    reason = "TransMIL mixes the patches by self-attention, so that a patch's share of the log-odds is not defined"
    assert outcome.err.count(reason) == html.unescape(page).count(reason) == (not gives_evidence)
    assert (found["deletion"]["gap"] is None) is (mil == "meanPool")
    assert (tmp_path / "out" / "slide_faithfulness.png").stat().st_size > (1000 if is_drawn else 0)
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
    assert np.load(out / "slide_attention.npz")["seen_in_training"] == np.bool_(True)
    assert "not independent evidence" in (out / "slide_report.html").read_text()
    assert pd.read_csv(out / "slide_top_patches" / "patches.csv")["seen_in_training"].all()


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
    calibrated = record["calibrated_probabilities"][record["predicted_class"]]
    told = f"({calibrated:.1%} calibrated, {votes.count(record['predicted_class'])} of 3 models)"
    assert told in outcome.out
    page = next((tmp_path / "out").glob("*_report.html")).read_text()
    for text in (*texts_of_figures.values(), page):
        assert told in text
    assert f"{record['predicted_class']} by each model" in page
    assert f"{record['member_probabilities'][0][record['predicted_class']]:.1%}" in page


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


def test_the_size_of_patches_to_draw_is_given_by_a_level_beside_a_recipe_in_um(drawable, predict, tmp_path):
    recipe = replace(synthetic_passport("slide").recipe, level=None, mpp=0.5)
    flags, drawn = drawable("LiteMIL", recipe=recipe)
    bag = read_bag(tmp_path / "slide.h5")
    write_bag(tmp_path / "slide.h5", Bag(bag.features, bag.coords // 2, None, None))
    refused = predict(*flags, *drawn)
    assert "does not record the patch size; give --patch_size, and --level if not 0" in refused.errors[0]
    assert predict(*flags, *drawn, "--patch_size", 256, "--level", 0).code == 0
