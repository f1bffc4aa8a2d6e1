"""What predict.py takes for its inputs, and for their labels."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.prediction.predict_helpers import write_model
from tests.synthetic import stained_image, write_pyramid
from utils.bags.store import Bag, read_bag, write_bag

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--input", "a.h5", "--input_dir", "b"), "exactly one of --input"),
        ((), "exactly one of --input"),
        (("--input", "a.h5", "--labels_csv", "l.csv"), "--labels_csv goes with --input_dir"),
        (("--input_dir", "b", "--group_column", "site"), "--group_column site: is a column of --labels_csv"),
        (("--input_dir", "b", "--subgroups", "sex"), "--subgroups sex: is a column of --labels_csv"),
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


def test_two_inputs_of_one_name_are_refused(cohort, models, predict, tmp_path):
    bag = read_bag(cohort[1] / "P000-S1.h5")
    for place in ("a/slide.h5", "b/slide.h5"):
        write_bag(tmp_path / "in" / place, bag)
    outcome = predict("--checkpoint", models[0], "--input_dir", tmp_path / "in")
    assert "would both be written to" in outcome.errors[0]


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
def test_ids_that_just_miss_a_file_are_named_with_it(cohort, models, predict, tmp_path, row, message):
    write_bag(tmp_path / "in" / "001.h5", read_bag(cohort[1] / "P000-S1.h5"))
    (tmp_path / "labels.csv").write_text(f"case_id,wsi_id,label\n{row}\n")
    flags = ("--input_dir", tmp_path / "in", "--labels_csv", tmp_path / "labels.csv")
    outcome = predict("--checkpoint", models[0], *flags)
    assert (outcome.code, len(outcome.errors)) == (1, 1)
    assert message in outcome.errors[0]


def test_advice_on_labels_names_flags_that_predict_has(cohort, models, predict, tmp_path):
    (tmp_path / "labels.csv").write_text("case_id,wsi_id,label\nP000,P000-S1,NA\n")
    flags = ("--checkpoint", models[0], "--input_dir", cohort[1], "--labels_csv", tmp_path / "labels.csv")
    for allowed in ((), ("--allow", "unknown")):
        error = predict(*flags, *allowed).errors[0]
        assert "--class_names" not in error
        assert "--features_dir" not in error
