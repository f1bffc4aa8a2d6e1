"""The main job on real histology: 117 colon images of 11 patients, real ImageNet weights, the README's figures."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def features(shared_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    weights = shared_data / "weights" / "tf_efficientnet_lite0.pth"
    images = shared_data / "glas" / "images"
    run(
        "extractFeatures.py", "--input_dir", images, "--extensions", ".jpg", "--output_dir", folder, "--backbone",
        "timm:tf_efficientnet_lite0", "--weights", weights, "--patch_size", 112,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("seed", [42, 43, 44])
def test_growth_pattern_is_learned_across_patients(seed, features, shared_data, tmp_path):
    labels = shared_data / "glas" / "labels.csv"
    run(
        "train.py", "--mil", "LiteMIL", "--dataset", "glas", "--features_dir", features, "--labels_csv", labels,
        "--output_dir", tmp_path, "--n_outer", 5, "--n_inner", 4, "--epochs", 30, "--patience", 30, "--batch_size", 16,
        "--seed", seed,
    )  # fmt: skip
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert len(predictions) == 117
    assert (predictions.groupby("case_id")["fold"].nunique() == 1).all()
    assert json.loads((tmp_path / "outputs.json").read_text())["pooled"]["auc"] >= 0.93

    slide, weights = (
        shared_data / "slides" / "CMU-1-Small-Region.svs",
        shared_data / "weights" / "tf_efficientnet_lite0.pth",
    )
    run("predict.py", "--checkpoint", tmp_path / "all_folds_best.pth", "--input", slide, "--weights", weights,
        "--visualize", "--output_dir", tmp_path / "predict")  # fmt: skip
    assert json.loads((tmp_path / "predict" / "CMU-1-Small-Region_prediction.json").read_text())["num_instances"] > 100
