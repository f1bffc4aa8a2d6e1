"""The three commands, run as a user runs them on a small synthetic cohort."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from MILS import list_mils
from tests.conftest import BACKBONE, PATCH
from tests.reference_litemil import KIDNEY, ReferenceLiteMIL, write_all_folds, write_fold
from tests.synthetic import stained_image, write_pyramid
from utils.pictures.attention_map import AttentionMap
from utils.pictures.heatmap import save_picture
from utils.prediction import slide_worker
from utils.slides import open_slides

pytestmark = pytest.mark.usefixtures("blank_figures")

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ("--epochs", 2, "--n_outer", 2, "--n_inner", 2, "--batch_size", 4, "--device", "cpu")


def cohort_flags(cohort) -> tuple:
    return "--dataset", "stains", "--features_dir", cohort.features, "--labels_csv", cohort.labels


@pytest.fixture(scope="module")
def trained(slide_cohort, tmp_path_factory) -> Path:
    """A finished run, made by the real command in a process of its own."""
    folder = tmp_path_factory.mktemp("trained")
    command = [
        sys.executable, ROOT / "train.py", "--mil", "LiteMIL", *cohort_flags(slide_cohort), *TRAINING,
        "--epochs", 12, "--lr", 1e-2, "--patience", 12, "--hidden_dim", 32, "--output_dir", folder / "run",
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pooled" in done.stdout
    assert "trainings=4/4" in done.stderr  # the progress bar
    return folder / "run"


def recipe(cohort) -> tuple:
    return (
        "--backbone",
        BACKBONE,
        "--weights",
        cohort.weights,
        "--patch_size",
        PATCH,
        "--level",
        1,
        "--tissue_threshold",
        0.3,
    )


def test_extraction_writes_one_whole_file_per_slide(slide_cohort):
    report = pd.read_csv(slide_cohort.features / "extraction_report.csv")
    assert list(report["status"]) == ["done"] * 10
    labels = pd.read_csv(slide_cohort.labels)
    for wsi_id in labels["wsi_id"]:
        with h5py.File(slide_cohort.features / f"{wsi_id}.h5") as file:
            passport = json.loads(file.attrs["litemil_passport"])
            assert file["features"].shape == (len(file["coords"]), 64)
        assert passport["recipe"]["patch_size"] == PATCH
        assert passport["slide"]["patch_size_level0"] == 2 * PATCH
        assert passport["slide"]["mpp_delivered"] == pytest.approx(1.0, rel=1e-3)


def test_a_second_extraction_skips_and_changes_nothing(slide_cohort, script):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in slide_cohort.features.glob("*.h5")}
    again = script(
        "extractFeatures",
        "--input_dir",
        slide_cohort.slides,
        "--output_dir",
        slide_cohort.features,
        *recipe(slide_cohort),
    )
    assert again.code == 0, again.err
    assert "0 extracted" in again.out
    assert "10 skipped" in again.out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in slide_cohort.features.glob("*.h5")}


def test_another_recipe_is_an_error_and_overwrites_only_when_told(slide_cohort, script, tmp_path):
    slide = slide_cohort.slides / "P00_0.tif"
    target = tmp_path / "P00_0.h5"
    flags = ("--input", slide, "--output", target, "--backbone", BACKBONE, "--weights", slide_cohort.weights)
    assert script("extractFeatures", *flags, "--patch_size", 64).code == 0
    first = target.read_bytes()
    other = script("extractFeatures", *flags, "--patch_size", 48)
    assert other.code == 1
    assert len(other.errors) == 1
    assert "patch_size: found 64, expected 48" in other.errors[0]
    assert target.read_bytes() == first
    assert script("extractFeatures", *flags, "--patch_size", 48, "--overwrite").code == 0
    assert target.read_bytes() != first


def test_extraction_is_reproducible_to_the_byte(slide_cohort, script, tmp_path):
    slide = slide_cohort.slides / "P00_0.tif"
    script("extractFeatures", "--input", slide, "--output", tmp_path / "again.h5", *recipe(slide_cohort))
    assert (tmp_path / "again.h5").read_bytes() == (slide_cohort.features / "P00_0.h5").read_bytes()


def test_a_bad_slide_does_not_stop_the_batch(slide_cohort, script, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    write_pyramid(slides / "good.tif", stained_image(256, 256), mpp=0.5, downsamples=(1,))
    write_pyramid(slides / "glass.tif", np.full((256, 256, 3), 244, np.uint8), mpp=0.5, downsamples=(1,))
    (slides / "bad.svs").write_text("this is no slide")
    flags = ("--backbone", BACKBONE, "--weights", slide_cohort.weights, "--patch_size", 32)
    outcome = script("extractFeatures", "--input_dir", slides, "--output_dir", tmp_path / "features", *flags)
    assert outcome.code == 1
    report = pd.read_csv(tmp_path / "features" / "extraction_report.csv", index_col="slide")
    assert dict(zip((Path(slide).name for slide in report.index), report["status"], strict=True)) == {
        "bad.svs": "failed", "glass.tif": "no tissue", "good.tif": "done",
    }  # fmt: skip
    assert (
        f",{len(h5py.File(tmp_path / 'features' / 'good.h5')['coords'])},"
        in (tmp_path / "features" / "extraction_report.csv").read_text()
    )  # a whole number of patches
    assert sorted(path.name for path in (tmp_path / "features").glob("*")) == [
        "contact_sheet.html", "extraction_report.csv", "good.h5", "previews",
    ]  # fmt: skip


def test_what_is_not_ours_is_never_overwritten_unasked(slide_cohort, script, tmp_path):
    torch.save({"weights": torch.ones(3)}, tmp_path / "theirs.pt")
    with h5py.File(tmp_path / "theirs.h5", "w") as file:
        file["feats"] = np.ones((4, 3), np.float16)
    (tmp_path / "text.h5").write_text("their notes")
    slide = slide_cohort.slides / "P00_0.tif"
    for name in ("theirs.pt", "theirs.h5", "text.h5"):
        before = (tmp_path / name).read_bytes()
        outcome = script("extractFeatures", "--input", slide, "--output", tmp_path / name, *recipe(slide_cohort))
        assert outcome.code == 1
        assert "--overwrite" in outcome.errors[0]
        assert (tmp_path / name).read_bytes() == before


def test_a_missing_slide_is_told_before_a_backbone_is_loaded(script, tmp_path):
    outcome = script("extractFeatures", "--input", tmp_path / "nowhere.svs", "--backbone", "uni")
    assert outcome.code == 1
    assert "no such file; give a slide" in outcome.errors[0]


def test_slides_that_would_share_an_output_are_refused(slide_cohort, script, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_pyramid(tmp_path / folder / "same.tif", stained_image(64, 64), downsamples=(1,))
    flags = ("--backbone", BACKBONE, "--weights", slide_cohort.weights)
    outcome = script("extractFeatures", "--input_dir", tmp_path, "--output_dir", tmp_path / "features", *flags)
    assert outcome.code == 1
    assert "would both be written" in outcome.errors[0]


def test_limit_extensions_and_format(slide_cohort, script, tmp_path):
    flags = ("--input_dir", slide_cohort.slides, "--output_dir", tmp_path, "--format", "pt", *recipe(slide_cohort))
    assert script("extractFeatures", *flags, "--limit", 2, "--extensions", "TIF").code == 0
    assert len(list(tmp_path.glob("*.pt"))) == 2
    none = script("extractFeatures", *flags, "--extensions", ".svs")
    assert none.code == 1
    assert "no file with .svs" in none.errors[0]


def test_training_writes_its_results(trained, slide_cohort):
    labels = pd.read_csv(slide_cohort.labels)
    predictions = pd.read_csv(trained / "predictions.csv")
    assert list(predictions["wsi_id"]) == list(labels["wsi_id"])
    assert (predictions.groupby("case_id")["fold"].nunique() == 1).all()
    outputs = json.loads((trained / "outputs.json").read_text())
    assert outputs["n_folds"] == 2
    assert outputs["pooled"]["auc"] > 0.9  # the two stains differ in colour
    for name in ("fold_1_best.pth", "fold_2_best.pth", "all_folds_best.pth", "roc.png", "history.csv", "run.json"):
        assert (trained / name).stat().st_size > 0
    assert not (trained / "resume").exists()


@pytest.mark.parametrize("mil", [*list_mils(), "MADMIL"])
def test_every_model_trains_from_the_command_line(mil, slide_cohort, script, tmp_path):
    outcome = script(
        "train", "--mil", mil, *cohort_flags(slide_cohort), *TRAINING, "--epochs", 1, "--output_dir", tmp_path / "run"
    )
    assert outcome.code == 0, outcome.err
    assert len(pd.read_csv(tmp_path / "run" / "predictions.csv")) == 10


def test_full_mode_and_predict_follow_each_other(slide_cohort, script, tmp_path):
    run = tmp_path / "run"
    script("train", "--mil", "ABMIL", *cohort_flags(slide_cohort), *TRAINING, "--mode", "full", "--output_dir", run)
    predictions = pd.read_csv(run / "predictions.csv").set_index("wsi_id")
    first = predictions[predictions["fold"] == 1].iloc[0]
    flags = ("--checkpoint", run / "fold_1_best.pth", "--input", slide_cohort.features / f"{first.name}.h5")
    assert script("predict", *flags, "--output_dir", tmp_path / "out", "--device", "cpu").code == 0
    answer = json.loads((tmp_path / "out" / f"{first.name}_prediction.json").read_text())
    assert answer["mode"] == "full"
    assert answer["probabilities"]["pink"] == pytest.approx(first["prob_pink"], abs=1e-12)


def test_where_features_are_changes_no_number(slide_cohort, script, tmp_path):
    written = {}
    for cache in ("off", "ram", tmp_path / "packed"):
        run = tmp_path / "run" / str(cache).rpartition("/")[2]
        flags = ("--mil", "LiteMIL", *cohort_flags(slide_cohort), *TRAINING, "--epochs", 2, "--sequential")
        outcome = script("train", *flags, "--cache", cache, "--chunk_size", 5, "--output_dir", run)
        assert outcome.code == 0, outcome.err
        written[cache] = [
            (run / name).read_bytes() for name in ("predictions.csv", "history.csv", "all_folds_best.pth")
        ]
    assert written["off"] == written["ram"] == written[tmp_path / "packed"]
    assert [path.suffix for path in sorted((tmp_path / "packed").iterdir())] == [".packed", ".lock"]


@pytest.mark.usefixtures("coarse_figures")
def test_the_whole_protocol_in_one_command(slide_cohort, script, tmp_path):
    """Grid, ensemble, repeats and another monitor; then given splits; then its ensemble predicts a raw slide."""
    run, flags = tmp_path / "run", ("--mil", "LiteMIL", *cohort_flags(slide_cohort), *TRAINING, "--epochs", 1)
    outcome = script(
        "train", *flags, "--grid", "lr=1e-3,1e-2 num_queries=1,2", "--final", "ensemble", "--repeats", 2,
        "--monitor", "slide_balanced_accuracy", "--output_dir", run,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "tested once in each of 2 repeats" in outcome.out
    assert "Chosen in the inner loop: lr=" in outcome.out
    outputs = json.loads((run / "outputs.json").read_text())
    assert (outputs["n_folds"], outputs["n_repeats"]) == (4, 2)
    given = script("train", *flags, "--n_outer", 4, "--splits", run / "splits.json", "--output_dir", tmp_path / "given")
    assert given.code == 0, given.err
    assert (tmp_path / "given" / "splits.json").read_bytes() == (run / "splits.json").read_bytes()
    slide = next(slide_cohort.slides.rglob("*.tif"))
    predicted = script(
        "predict", "--checkpoint", run / "all_folds_best.pth", "--input", slide, "--weights", slide_cohort.weights,
        "--visualize", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert predicted.code == 0, predicted.err
    assert (tmp_path / "out" / f"{slide.stem}_heatmap.png").stat().st_size > 5000


def test_a_dry_run_audits_estimates_and_trains_nothing(slide_cohort, script, tmp_path):
    flags = (*cohort_flags(slide_cohort), *TRAINING, "--output_dir", tmp_path / "run")
    outcome = script("train", "--mil", "LiteMIL", *flags, "--dry_run")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "run").exists()
    for said in ("each with a feature file that opens", "fold 2: test", "time: about", "Nothing was trained"):
        assert said in outcome.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mil", "LiteMIL", "--group_column", "site"), "10 rows without a site"),
        (("--mil", "LiteMIL", "--sequential", "--mode", "full"), "--sequential: whole slides are not cut"),
        (("--mil", "LiteMil2"), "did you mean 'LiteMIL'"),
        (("--mil", "meanPool", "--num_heads", 2), "meanPool has no hyperparameter num_heads"),
        (("--mil", "LiteMIL", "--input_dim", 32), "the features are 64 wide"),
        (("--mil", "LiteMIL", "--n_outer", 5), "at most --n_outer 4 would work"),
        (("--mil", "LiteMIL", "--labels_csv", "nowhere.csv"), "nowhere.csv: no such file"),
        (("--mil", "LiteMIL", "--features_dir", "nowhere"), "nowhere: no such folder"),
        (("--mil", "LiteMIL", "--class_names", "pink", "green"), "label that is none of pink, green"),
        (("--mil", "LiteMIL", "--hidden_dim", 30), "hidden_dim 30 is not divisible by num_heads 4"),
        (("--mil", "LiteMIL", "--device", "cuda:99"), "PyTorch sees"),
        (("--mil", "LiteMIL", "--device", "cpu", "--precision", "bf16"), "--precision bf16: needs a CUDA device"),
        (("--mil", "LiteMIL", "--grid", "lr=fast"), "--grid lr='fast': expected a number"),
        (("--mil", "LiteMIL", "--grid", "lr=1e10"), "--grid lr=10000000000.0: out of range"),
        (("--mil", "LiteMIL", "--lr", 0), "--lr 0.0: out of range; give a number from 1e-08 to 1"),
        (("--mil", "LiteMIL", "--grid", "gated=true"), "--grid gated: no hyperparameter of training or LiteMIL"),
        (("--mil", "LiteMIL", "--splits", "nowhere.csv"), "nowhere.csv: no such file"),
    ],
)
def test_bad_training_input_gets_one_line(flags, message, slide_cohort, script, tmp_path):
    outcome = script("train", *cohort_flags(slide_cohort), *TRAINING, "--output_dir", tmp_path / "run", *flags)
    assert outcome.code == 1
    assert len(outcome.errors) == 1
    assert message in outcome.errors[0]
    assert not (tmp_path / "run" / "predictions.csv").exists()


@pytest.mark.usefixtures("coarse_figures")
def test_a_raw_slide_is_predicted_by_the_training_recipe(trained, slide_cohort, script, tmp_path):
    """The same slide, raw and as features, gives the same answer and pictures; nothing but the weights is said."""
    slide = slide_cohort.slides / "P00_0.tif"
    raw, cut = tmp_path / "raw", tmp_path / "cut"
    base = ("--checkpoint", trained / "fold_1_best.pth", "--visualize", "--top_k", 3, "--device", "cpu")
    outcome = script(
        "predict", *base, "--input", slide, "--weights", slide_cohort.weights, "--output_dir", raw, "--save_features"
    )
    assert outcome.code == 0, outcome.err
    features = slide_cohort.features / "P00_0.h5"
    assert script("predict", *base, "--input", features, "--wsi", slide, "--output", cut).code == 0
    assert (raw / "P00_0.h5").read_bytes() == features.read_bytes()
    answers = [json.loads((folder / "P00_0_prediction.json").read_text()) for folder in (raw, cut)]
    assert answers[0].pop("request")["input_bytes"] != answers[1].pop("request")["input_bytes"]
    assert answers[0] == answers[1]
    assert answers[0]["mode"] == "chunked"
    for name in ("P00_0_heatmap.png", "P00_0_patch_grid.png", "P00_0_attention.npz"):
        assert (raw / name).read_bytes() == (cut / name).read_bytes()
    assert len(list((raw / "P00_0_top_patches").glob("top_*.png"))) == 3
    data = np.load(raw / "P00_0_attention.npz")
    assert data["attention"].sum() == pytest.approx(1, abs=1e-5)
    assert data["attention_heads"].shape == (4, len(data["coords"]))
    assert int(data["patch_size_level0"]) == 2 * PATCH


def test_a_raw_slide_with_pictures_is_opened_painted_and_recorded_once(
    trained, slide_cohort, script, tmp_path, monkeypatch
):
    calls = []

    def counted(function, name):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    open_slide = counted(open_slides.open_slide, "opened")
    for module in (open_slides, slide_worker):
        monkeypatch.setattr(module, "open_slide", open_slide)
    monkeypatch.setattr(AttentionMap, "raster", counted(AttentionMap.raster, "painted"))
    monkeypatch.setattr(slide_worker, "write_json", counted(slide_worker.write_json, "recorded"))
    slide = next(slide_cohort.slides.rglob("*.tif"))
    outcome = script(
        "predict", "--checkpoint", trained / "fold_1_best.pth", "--input", slide, "--weights", slide_cohort.weights,
        "--visualize", "--device", "cpu", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    # The map of attention and its thumbnail, each with its grey patches, and the evidence for either class.
    assert Counter(calls) == {"opened": 1, "recorded": 1, "painted": 6}


def test_prediction_equals_the_out_of_fold_row(trained, slide_cohort, script, tmp_path):
    for _, row in pd.read_csv(trained / "predictions.csv").iterrows():
        flags = ("--checkpoint", trained / f"fold_{row['fold']}_best.pth", "--output_dir", tmp_path, "--device", "cpu")
        script("predict", *flags, "--input", slide_cohort.features / f"{row['wsi_id']}.h5")
        answer = json.loads((tmp_path / f"{row['wsi_id']}_prediction.json").read_text())
        assert answer["probabilities"]["pink"] == pytest.approx(row["prob_pink"], abs=1e-6)
        assert answer["seen_in_training"] is False


def test_predicting_a_feature_file_waits_for_no_library_that_it_does_not_need(trained, slide_cohort, tmp_path):
    source = next(slide_cohort.features.glob("*.h5"))
    command = [sys.executable, "-X", "importtime", ROOT / "predict.py", "--checkpoint", trained / "fold_1_best.pth"]
    command += ["--input", source, "--output_dir", tmp_path, "--device", "cpu"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in lines}
    assert "torch" in imported, "the measure does not see what is imported"
    assert not imported & {"pandas", "matplotlib", "sklearn", "scipy", "timm"}


def test_a_training_slide_is_said_to_be_seen(trained, slide_cohort, script, tmp_path):
    predictions = pd.read_csv(trained / "predictions.csv")
    seen = predictions[predictions["fold"] == 2].iloc[0]["wsi_id"]
    flags = ("--checkpoint", trained / "fold_1_best.pth", "--output_dir", tmp_path, "--device", "cpu")
    outcome = script("predict", *flags, "--input", slide_cohort.features / f"{seen}.h5")
    assert "trained on this slide" in outcome.err
    assert json.loads((tmp_path / f"{seen}_prediction.json").read_text())["seen_in_training"] is True


def test_a_model_of_the_first_version_is_predicted(slide_cohort, script, tmp_path):
    torch.manual_seed(0)
    reference = ReferenceLiteMIL(64, 32, 3, 8, 4).eval()
    features = slide_cohort.features / "P00_0.h5"
    with h5py.File(features) as file, torch.inference_mode():
        expected = torch.softmax(reference(torch.from_numpy(file["features"][:]).float())[0], dim=0).tolist()
    base = ("--input", features, "--output_dir", tmp_path / "out", "--device", "cpu", "--num_heads", 8)
    fold = ("--checkpoint", write_fold(tmp_path / "fold_1_best.pth", reference))
    best = ("--checkpoint", write_all_folds(tmp_path / "all_folds_best.pth", reference, KIDNEY))
    flags = ("--mil", "LiteMIL", "--dataset", "kidney", "--input_dim", 64)
    for asked in (("predict", *base, *fold, *flags), ("predict", *base, *best, "--overwrite")):
        outcome = script(*asked)
        assert outcome.code == 0, outcome.err
        assert outcome.err.count("a checkpoint of the first version") == 1
        answer = json.loads((tmp_path / "out" / "P00_0_prediction.json").read_text())
        assert list(answer["probabilities"]) == list(KIDNEY)
        assert list(answer["probabilities"].values()) == pytest.approx(expected, rel=1e-5)
        assert answer["seen_in_training"] is None
        assert answer["model"]["num_heads"] == 8
        assert answer["selection"]["chosen_by"] == "the first version of LiteMIL"
    for wrong, message in (
        ((), "what its 3 classes are called; give --dataset kidney"),
        (("--dataset", "lung"), "has 3 classes, --dataset lung names 2"),
        (("--dataset", "kidney", "--num_heads", 5), "5 attention heads do not divide its width of 32"),
        (("--dataset", "kidney", "--mil", "ABMIL"), "was trained with mil 'LiteMIL', not 'ABMIL'"),
        (("--dataset", "kidney", "--input_dim", 1024), "was trained with input_dim 64, not 1024"),
    ):
        outcome = script("predict", *base, *fold, *wrong)
        assert outcome.code == 1, wrong
        assert len(outcome.errors) == 1
        assert message in outcome.errors[0]


def bad_inputs(trained, cohort, folder) -> list[tuple[tuple, str]]:
    features, slide = cohort.features / "P00_0.h5", cohort.slides / "P00_0.tif"
    (folder / "text.svs").write_text("this is no slide")
    (folder / "notes.xyz").write_text("this is nothing")
    with h5py.File(folder / "narrow.h5", "w") as file:
        file["features"] = np.ones((5, 32), np.float32)
        file["coords"] = np.zeros((5, 2), np.int64)
    with h5py.File(folder / "bare.h5", "w") as file:
        file["features"] = np.ones((5, 64), np.float32)
    with h5py.File(features) as source, h5py.File(folder / "other.h5", "w") as file:
        for name in ("features", "coords"):
            source.copy(name, file)
        file.attrs["litemil_passport"] = source.attrs["litemil_passport"].replace(
            '"patch_size": 64', '"patch_size": 96'
        )
    write_pyramid(folder / "small.tif", stained_image(100, 100), downsamples=(1,))
    weights = ("--weights", cohort.weights)
    return [
        (("--input", folder / "missing.h5"), "no such file"),
        (("--input", folder / "text.svs", *weights), "text.svs"),
        (("--input", folder / "notes.xyz", *weights), "neither a feature file"),
        (("--input", folder / "narrow.h5"), "features are 32 wide"),
        (("--input", folder / "other.h5"), "patch_size: found 96, expected 64"),
        (("--input", features, "--backbone", "uni"), "backbone: found uni, expected timm:test_vit"),
        (("--input", features, "--save_features"), "--save_features goes with raw slides"),
        (("--input", features, "--mil", "ABMIL"), "was trained with mil 'LiteMIL', not 'ABMIL'"),
        (("--input", features, "--dataset", "lung"), "was trained with dataset 'stains', not 'lung'"),
        (("--input", features, "--input_dim", 1024), "was trained with input_dim 64, not 1024"),
        (("--input", features, "--num_heads", 8), "was trained with num_heads 4, not 8"),
        (("--input", features, "--visualize", "--wsi", features), "a feature file; give the slide"),
        (("--input", features, "--visualize", "--wsi", folder / "small.tif"), "not the slide that"),
        (("--input", features, "--visualize", "--wsi", slide, "--cmap", "rainbows"), "no such colour map"),
        (("--input", folder / "bare.h5", "--visualize", "--wsi", slide), "no coordinates"),
        (("--input", features, "--visualize", "--wsi", cohort.slides / "P02_0.tif"), "not the slide that"),
        (("--input", features, "--visualize", "--wsi", folder / "nowhere.tif"), "no such file"),
        (("--input", features, "--wsi", slide), "give --visualize with it"),
        (("--input", slide, "--patch_size", 96, *weights), "patch_size: found 96, expected 64"),
        (("--input", slide, "--weights", trained / "fold_1_best.pth"), "not the weights of this backbone"),
        (("--input", features, "--mode", "full", "--chunk_size", 10), "--chunk_size has no meaning in full mode"),
        (("--checkpoint", features, "--input", features), "not loadable as a checkpoint"),
        (("--checkpoint", cohort.weights, "--input", features), "not a LiteMIL checkpoint"),
    ]  # fmt: skip


def test_bad_prediction_input_gets_one_line(trained, slide_cohort, script, tmp_path):
    for flags, message in bad_inputs(trained, slide_cohort, tmp_path):
        checkpoint = () if "--checkpoint" in flags else ("--checkpoint", trained / "fold_1_best.pth")
        outcome = script("predict", *checkpoint, *flags, "--output_dir", tmp_path / "out", "--device", "cpu")
        assert outcome.code == 1, flags
        assert len(outcome.errors) == 1, outcome.err
        assert message in outcome.errors[0]
        assert not (tmp_path / "out").exists()  # nothing is half written


def test_wrong_usage_is_argparse_2(script):
    assert script("train", "--mil", "LiteMIL").code == 2
    assert "give --checkpoint" in script("predict", "--input", "x.h5").errors[0]
    assert script("predict", "--inpu", "x.h5").code == 2


def test_a_slide_that_does_not_tell_its_resolution_is_predicted_by_the_users_word(script, tmp_path, monkeypatch):
    """A plain image, whose scale bar, too, is that of what was told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slides").mkdir()
    for patient in range(12):
        image = stained_image(384, 384, seed=patient, coverage=0.9)
        write_pyramid(tmp_path / "slides" / f"P{patient:02d}.tif", image, mpp=0.5, tile=128)
    rows = [f"P{patient:02d},P{patient:02d},{'ab'[patient % 2]}" for patient in range(12)]
    Path("labels.csv").write_text("\n".join(["case_id,wsi_id,label", *rows]) + "\n")
    made = script("extractFeatures", "--input_dir", "slides", "--output_dir", "features", "--backbone", "stain",
                  "--patch_size", 96, "--mpp", 0.5, "--no-preview")  # fmt: skip
    assert made.code == 0, made.err
    trained = script("train", "--mil", "meanPool", "--dataset", "x", "--features_dir", "features", "--labels_csv",
                     "labels.csv", *TRAINING, "--output_dir", "run")  # fmt: skip
    assert trained.code == 0, trained.err
    Image.fromarray(stained_image(384, 384, seed=99, coverage=0.9)).save("plain.png")
    Path("mpp.csv").write_text("wsi,mpp\nplain.png,0.5\n")
    flags = ("--checkpoint", "run/all_folds_best.pth", "--input", "plain.png", "--device", "cpu", "--visualize")
    assert "in --slides_csv (a table wsi,mpp)" in script("predict", *flags).errors[0]
    texts = []

    def save(figure, path):
        texts.extend(text.get_text() for text in figure.findobj(Text))
        save_picture(figure, path)

    monkeypatch.setattr("utils.pictures.picture_set.save_picture", save)
    told = script("predict", *flags, "--slides_csv", "mpp.csv")
    assert told.code == 0, told.err
    assert any(text.endswith(" µm") for text in texts)  # the scale bar
    Path("mpp.csv").write_text("wsi,mpp\nplain.png,0.4\n")
    other = script("predict", *flags, "--slides_csv", "mpp.csv")
    assert "is another prediction" in other.errors[0]
    features = script("predict", *flags[:3], "features/P00.h5", "--slides_csv", "mpp.csv")
    assert "--slides_csv goes with raw slides" in features.errors[0]
