"""The demo: made once, by the command that a newcomer types; no matter of colour; its heatmaps find the lesions."""

import json
import shutil
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from sklearn.metrics import roc_auc_score

from datasets import demo
from datasets.demo import HELD_OUT, HOLDOUT, PATIENTS, RECIPE, TRAINING, demo_slides, make_demo, make_test_slide
from datasets.synthetic import MASK_PX
from utils.bags.store import peek_bag, read_bag
from utils.prediction.predictor import extractPredict

ROOT = Path(__file__).resolve().parents[2]


def auc(folder: Path) -> float:
    return json.loads((folder / "outputs.json").read_text())["pooled"]["auc"]


@pytest.fixture(params=["small_demo", pytest.param("whole_demo", marks=pytest.mark.slow)])
def demo_home(request):
    return request.getfixturevalue(request.param)


def test_the_first_command_trains_and_says_what_to_do_next(demo_home):
    home, told = demo_home
    table = pd.read_csv(home / "datasets" / "demo" / "labels.csv")
    assert f"{len(table)} slides of {table['case_id'].nunique()} patients" in told.stdout
    assert "Results are in outputs/LiteMIL/demo" in told.stdout
    slide = "datasets/demo/holdout/wsi/synthetic-25-1.tif"
    expected = f"uv run predict.py --checkpoint outputs/LiteMIL/demo/all_folds_best.pth --input {slide} --visualize"
    assert told.stdout.strip().splitlines()[-1].strip() == expected
    assert "synthetic" in told.stdout
    assert (home / slide).exists()


@pytest.mark.slow
def test_the_whole_cohort_is_as_large_as_is_said_and_can_be_learned(whole_demo):
    home, printed = whole_demo
    folder = home / "datasets" / "demo"
    assert "48 slides of 24 patients" in printed.stdout
    assert [tuple(row) for row in pd.read_csv(folder / "labels.csv").to_numpy()] == [astuple(row) for row in TRAINING]
    assert len(pd.read_csv(folder / "holdout" / "labels.csv")) == HELD_OUT
    assert auc(home / "outputs" / "LiteMIL" / "demo") > 0.85


def test_the_slides_are_so_many_of_each_pattern_at_each_site():
    assert (len(TRAINING), len({row.case_id for row in TRAINING})) == (48, 24)
    assert (len(HOLDOUT), len({row.case_id for row in HOLDOUT} - {row.case_id for row in TRAINING})) == (6, 6)
    assert set(Counter((row.label, row.site) for row in TRAINING).values()) == {8}


def test_the_cohort_is_balanced_over_sites_and_holds_nobody_back_that_it_trains_on(demo_home):
    folder = demo_home[0] / "datasets" / "demo"
    table = pd.read_csv(folder / "labels.csv")
    assert set(table.groupby(["label", "site"]).size()) == {len(table) // 6}
    held_out = pd.read_csv(folder / "holdout" / "labels.csv")
    assert set(held_out["label"]) == set(table["label"])
    assert not set(held_out["case_id"]) & set(table["case_id"])
    for home, rows in ((folder, table), (folder / "holdout", held_out)):
        for kind, ending in (("wsi", "tif"), ("masks", "png")):
            assert {path.name for path in (home / kind).iterdir()} == {f"{name}.{ending}" for name in rows["wsi_id"]}
    assert all(name.startswith("synthetic-") for name in (*table["wsi_id"], *held_out["wsi_id"]))
    features = peek_bag(folder / "features" / f"{table['wsi_id'][0]}.h5")
    assert features.passport.recipe.backbone == "stain-texture"


def test_the_patterns_differ_less_in_mean_colour_than_patients_of_one_pattern_do(small_demo):
    """In optical densities of red, green and blue over the tissue, beside what the sites differ by."""
    folder = small_demo[0] / "datasets" / "demo"
    table = pd.read_csv(folder / "labels.csv")
    images = [tifffile.imread(folder / "wsi" / f"{name}.tif") for name in table["wsi_id"]]
    tissue = [image[image.min(axis=2) < 200].astype(float) for image in images]
    densities = pd.DataFrame([-np.log10((pixels + 1) / 256).mean(axis=0) for pixels in tissue])
    densities -= densities.groupby(table["site"]).transform("mean")
    of_pattern = densities.groupby(table["label"])
    difference, spread = of_pattern.mean().diff().iloc[-1], of_pattern.std().mean()
    assert (difference.abs() < spread).all()


@pytest.mark.slow
def test_colour_alone_does_not_tell_the_patterns(whole_demo, script, tmp_path, monkeypatch):
    monkeypatch.chdir(whole_demo[0])
    flags = ("--input_dir", "datasets/demo/wsi", "--output_dir", tmp_path / "stain", "--backbone", "stain")
    assert script("extractFeatures", *flags, "--patch_size", 128, "--mpp", 0.5, "--no-preview").code == 0
    trained = script("train", "--mil", "LiteMIL", "--dataset", "demo", "--features_dir", tmp_path / "stain",
                     "--output_dir", tmp_path / "run", "--n_outer", 4, "--n_inner", 2)  # fmt: skip
    assert trained.code == 0, trained.err
    assert auc(tmp_path / "run") < 0.65


def test_the_heatmap_ranks_lesions_of_slides_that_were_not_seen(demo_home):
    """From few slides and steps nothing is learned: there the slides are unseen, and each patch has its place."""
    folder = demo_home[0] / "datasets" / "demo" / "holdout"
    predictor = extractPredict(demo_home[0] / "outputs" / "LiteMIL" / "demo" / "all_folds_best.pth", device="cpu")
    found, right = [], 0
    for row in pd.read_csv(folder / "labels.csv").itertuples():
        prediction = predictor.predict(folder / "wsi" / f"{row.wsi_id}.tif")
        assert prediction.seen_in_training is False
        right += prediction.predicted_class == row.label
        mask, side = np.asarray(Image.open(folder / "masks" / f"{row.wsi_id}.png")), RECIPE.patch_size // MASK_PX
        corners = prediction.coords // MASK_PX
        lesion = [mask[y : y + side, x : x + side].mean() > 0.5 for x, y in corners]
        found.append(roc_auc_score(lesion, prediction.patch_attention))
        assert 0 < sum(lesion) < len(lesion)
    if len(found) == HELD_OUT:
        assert min(found) > 0.8, found
        assert right >= len(found) - 1


def test_what_is_there_stays_and_what_is_missing_is_made_alike(demo_home, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAINING", demo_slides(2, 1))
    monkeypatch.setattr(demo, "HOLDOUT", demo_slides(1, 1, first=PATIENTS))
    monkeypatch.setattr(demo, "processors", lambda: 1)
    folder = tmp_path / "demo"
    make_demo(folder)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".csv"}
    whole = demo_home[0] / "datasets" / "demo"
    for path, content in files.items():
        if path.suffix in (".tif", ".png"):
            assert content == (whole / path.relative_to(folder)).read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in files}
    gone = folder / "wsi" / "synthetic-01-1.tif"
    gone.unlink()
    shutil.rmtree(folder / "holdout")
    make_demo(folder)
    assert all(path.read_bytes() == content for path, content in files.items())
    redrawn = {gone, folder / "masks" / "synthetic-01-1.png", *(path for path in files if "holdout" in path.parts)}
    assert {path for path, then in kept.items() if path.stat().st_mtime_ns != then} == redrawn


def test_the_test_slide_is_the_one_its_generator_draws(tmp_path):
    slide = tmp_path / "testSlide.svs"
    make_test_slide(slide)
    kept = ROOT / "testSlides" / "testSlide.svs"
    assert kept.stat().st_size < 1.5e6
    first, second = (read_bag(path.with_suffix(".h5")) for path in (slide, kept))
    np.testing.assert_array_equal(first.coords, second.coords)
    np.testing.assert_allclose(first.features, second.features, atol=0.05)


@pytest.mark.parametrize("flags", [(), ("--test_slide",)])
def test_it_is_made_without_training_too(flags, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "TRAINING", demo_slides(1, 1))
    monkeypatch.setattr(demo, "HOLDOUT", demo_slides(1, 1, first=PATIENTS))
    monkeypatch.setattr("sys.argv", ["demo", *flags])
    demo.main()
    assert (tmp_path / ("testSlides/testSlide.h5" if flags else "datasets/demo/labels.csv")).exists()
