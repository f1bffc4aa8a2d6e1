"""predict.py --out_of_fold: each slide of a run by the model that did not see it; and a run given as checkpoint."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from MILS import build_mil
from tests.cohort import write_cohort
from tests.synthetic import stained_image, write_pyramid
from utils.bags.store import read_bag, write_bag
from utils.core.errors import CheckpointError
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation
from utils.prediction.out_of_fold import OutOfFold
from utils.prediction.predictor import SlidePredictor
from utils.prediction.trained_model import seen_as

pytestmark = pytest.mark.usefixtures("blank_figures")

SLIDES = 8


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """A cohort of bags of nine patches, which lie on slides of 512 px beside them."""
    home = tmp_path_factory.mktemp("cohort")
    write_cohort(home, patients_per_class=SLIDES // 2, slides_per_patient=1, patches=(9, 9))
    coords = np.stack(np.meshgrid([0, 128, 256], [0, 128, 256]), axis=-1).reshape(-1, 2)
    (home / "slides").mkdir()
    write_pyramid(home / "one.tif", stained_image(512, 512), mpp=0.25)
    for path in (home / "features").glob("*.h5"):
        bag = read_bag(path)
        passport = type(bag.passport)(bag.passport.recipe, {"name": path.stem, "mpp_delivered": 0.5})
        write_bag(path, type(bag)(bag.features, coords, 128, passport))
        shutil.copy(home / "one.tif", home / "slides" / f"{path.stem}.tif")
    return home


@pytest.fixture(scope="module")
def run(cohort) -> Path:
    """A finished run of two repeats of two folds."""
    dataset = MILDataset(cohort / "labels.csv", cohort / "features", chunk_size=4)
    make = partial(build_mil, "LiteMIL", input_dim=16, num_classes=2, hidden_dim=16, num_heads=2)
    NestedCrossValidation(
        make, dataset, dataset.class_names, cohort / "run", n_outer=2, n_inner=2, epochs=2, repeats=2, device="cpu",
        lr=1e-2, dataset_name="mine",
    ).run()  # fmt: skip
    return cohort / "run"


@pytest.fixture
def predict(script, run, tmp_path):
    def call(*flags, folder: Path = run, output="out"):
        flags = (*flags, "--output_dir", tmp_path / output) if output else flags
        return script("predict", "--out_of_fold", folder, "--device", "cpu", *flags)

    return call


def records_of(folder: Path) -> dict[str, dict]:
    return {path.name.split("_")[0]: json.loads(path.read_text()) for path in folder.glob("*_prediction.json")}


def altered(run: Path, folder: Path, **changes) -> Path:
    """A copy of the run whose record says something else."""
    shutil.copytree(run, folder)
    record = json.loads((folder / "run.json").read_text()) | changes
    (folder / "run.json").write_text(json.dumps({name: value for name, value in record.items() if value is not None}))
    return folder


def test_each_slide_is_answered_as_in_the_runs_table_by_a_model_that_did_not_see_it(run, predict, tmp_path):
    outcome = predict()
    assert outcome.code == 0, outcome.err
    expected = pd.read_csv(run / "predictions.csv").query("repeat == 1").set_index("wsi_id")
    records = records_of(tmp_path / "out")
    assert len(records) == SLIDES
    for slide, record in records.items():
        row = expected.loc[slide]
        assert record["seen_in_training"] is False
        assert record["fold"] == row["fold"]
        assert record["checkpoint"] == str(run / f"fold_{row['fold']}_best.pth")
        assert record["probabilities"]["malignant"] == pytest.approx(row["prob_malignant"], abs=1e-6)
        # Any other fold's model of the repeat has seen the slide.
        others = [fold for fold in (1, 2) if fold != row["fold"]]
        assert all(seen_as(SlidePredictor(run / f"fold_{fold}_best.pth").trained, slide) == "slide" for fold in others)
    table = pd.read_csv(tmp_path / "out" / "predictions.csv").set_index("wsi_id")
    assert not table["seen_in_training"].any()
    assert (table["label"] == expected.loc[table.index, "label"]).all()
    assert (table["fold"] == expected.loc[table.index, "fold"]).all()
    assert "in the first of 2 repeats (--repeat takes another)" in outcome.out
    assert f"The probabilities are those of {run / 'predictions.csv'} (largest difference" in outcome.out
    assert f"{SLIDES} done, 0 skipped" in outcome.out
    assert f"0 done, {SLIDES} skipped" in predict().out
    assert "out of fold" not in outcome.err


def test_another_repeat_is_taken_where_it_is_asked_for(run, predict, tmp_path):
    assert predict("--repeat", 2).code == 0
    assert {record["fold"] for record in records_of(tmp_path / "out").values()} == {3, 4}
    assert "--repeat 3: " in predict("--repeat", 3).errors[0]


def test_a_model_that_has_seen_its_slide_gives_no_answer(run, predict, tmp_path):
    folder = altered(run, tmp_path / "leaking")
    one, two = (folder / f"fold_{fold}_best.pth" for fold in (1, 2))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    outcome = predict(folder=folder)
    assert outcome.code == 1
    assert f"{SLIDES} failed" in outcome.out
    assert "which tests it, was trained on this slide" in outcome.errors[0]
    assert not records_of(tmp_path / "out")


def test_features_that_have_changed_are_named(cohort, run, predict, tmp_path):
    for path in (cohort / "features").glob("*.h5"):
        bag = read_bag(path)
        write_bag(tmp_path / "features" / path.name, type(bag)(-3 * bag.features, bag.coords, 128, bag.passport))
    outcome = predict("--input_dir", tmp_path / "features")
    assert outcome.code == 0, outcome.err
    assert "the values differ by up to" in outcome.err
    assert "have other probabilities than in" in outcome.out
    assert "so not compared" in predict("--mode", "full", output="whole").out


def test_the_features_folder_is_recorded_and_can_be_given(cohort, run, predict, tmp_path, monkeypatch):
    assert OutOfFold.read(run).features_dir == (cohort / "features").resolve()
    monkeypatch.chdir(tmp_path)
    before = altered(run, tmp_path / "before", features_dir=None)
    assert "does not say where its features are; give their folder with --input_dir" in predict(folder=before).errors[0]
    shutil.copytree(cohort / "features", tmp_path / "datasets/mine/features")
    assert predict(folder=before).code == 0
    some = tmp_path / "some"
    some.mkdir()
    for path in sorted((cohort / "features").glob("*.h5"))[:3]:
        shutil.copy(path, some)
    missing = predict("--input_dir", some, output="some_out").errors[0]
    assert f"no feature file of {SLIDES - 3} slides of {run}" in missing
    assert "--allow missing" in missing
    assert "3 done" in predict("--input_dir", some, "--allow", "missing", output="some_out").out
    shutil.copytree(some, some / "again")
    twice = predict("--input_dir", some, "--allow", "missing", output="some_out").errors[0]
    assert "3 slides with several feature files" in twice


def test_every_slide_is_drawn_and_the_index_page_shows_them(cohort, run, predict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    for name in ("P000-S1", "P001-S1", "P002-S1"):
        shutil.copy(cohort / "features" / f"{name}.h5", tmp_path / "some")
    some = ("--input_dir", tmp_path / "some", "--allow", "missing")
    outcome = predict(*some, "--visualize", "--wsi", cohort / "slides", "--top_k", 1, output=None)
    assert outcome.code == 0, outcome.err
    out = tmp_path / f"outputs/inference/LiteMIL_{run.name}_out_of_fold"  # another run has another folder
    assert run.name != "mine"
    assert len(list(out.glob("*_heatmap.png"))) == 3
    page = (out / "index.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 3
    assert page.count("_report.html") == 2 * 3
    assert "each slide by the model of the fold that did not see it" in page
    assert "out of fold, by the model of fold" in (out / "P000-S1_report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--checkpoint", "a.pth"), "knows its models, slides and labels; leave --checkpoint out"),
        (("--labels_csv", "a.csv"), "leave --labels_csv out"),
        (("--input", "a.h5"), "leave --input out"),
    ],
)
def test_what_contradicts_a_run(flags, message, predict):
    assert message in predict(*flags).errors[0]


def test_a_run_is_a_checkpoint(cohort, run, script, tmp_path):
    slide = cohort / "features" / "P000-S1.h5"
    outcome = script("predict", "--checkpoint", run, "--input", slide, "--output_dir", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "the model chosen in it is taken, all_folds_best.pth" in outcome.err
    assert records_of(tmp_path / "out")["P000-S1"]["checkpoint"] == str(run / "all_folds_best.pth")
    (tmp_path / "first_version").mkdir()
    shutil.copy(run / "all_folds_best.pth", tmp_path / "first_version")
    assert SlidePredictor(tmp_path / "first_version", device="cpu").path.name == "all_folds_best.pth"


def test_a_folder_that_is_no_finished_run_is_refused_with_what_to_give(cohort, run, tmp_path):
    unfinished = altered(run, tmp_path / "unfinished", finished=False)
    shutil.copytree(run, tmp_path / "pieces", ignore=shutil.ignore_patterns("run.json", "all_*"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("[]")
    for folder, message in (
        (unfinished, "its training is not finished; give its command again"),
        (cohort, r"no training run \(it has no run.json\); give one of the runs in it: run"),
        (tmp_path / "pieces", "give one of its files: fold_1_best.pth, fold_2_best.pth, fold_3_best.pth"),
        (cohort / "slides", "give the output folder of train.py"),
        (tmp_path / "damaged", "not the record of a training run"),
    ):
        for read in (SlidePredictor, OutOfFold.read):
            with pytest.raises(CheckpointError, match=message):
                read(folder)
    table = altered(run, tmp_path / "table") / "predictions.csv"
    for content in ("wsi_id,case_id\n", "wsi_id,case_id,label,fold,repeat\na,b,c,1,1\n", '"', "wsi_id,fold\na,x\n"):
        table.write_text(content)
        with pytest.raises(CheckpointError, match=r"predictions.csv: no"):
            OutOfFold.read(table.parent)


def test_a_runs_tables_are_not_written_over(cohort, run, script):
    flags = ("--checkpoint", run, "--input_dir", cohort / "features", "--output_dir", run)
    before = (run / "predictions.csv").read_bytes()
    assert "the folder of a training run, whose tables would be written over" in script("predict", *flags).errors[0]
    assert (run / "predictions.csv").read_bytes() == before
