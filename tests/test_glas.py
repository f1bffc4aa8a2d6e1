"""The main job on real histology: 117 colon images of 11 patients, real ImageNet weights, the README's figures."""

import json
import os
import random
import signal
import subprocess
import sys
import time
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


def train(features: Path, shared_data: Path, folder: Path, *flags: object) -> list[str]:
    labels = shared_data / "glas" / "labels.csv"
    command = ["train.py", "--dataset", "glas", "--features_dir", features, "--labels_csv", labels]
    return [str(part) for part in [*command, "--output_dir", folder, *flags]]


@pytest.mark.parametrize("seed", [42, 43, 44])
def test_growth_pattern_is_learned_across_patients(seed, features, shared_data, tmp_path):
    run(*train(features, shared_data, tmp_path, "--mil", "LiteMIL", "--seed", seed))
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert len(predictions) == 117
    assert (predictions.groupby("case_id")["fold"].nunique() == 1).all()
    outputs = json.loads((tmp_path / "outputs.json").read_text())
    assert outputs["pooled"]["auc"] >= 0.93
    assert outputs["within_folds"]["auc"] >= 0.97
    low, high = outputs["intervals_95"]["auc"]
    assert low < outputs["pooled"]["auc"] < high

    slide, weights = (
        shared_data / "slides" / "CMU-1-Small-Region.svs",
        shared_data / "weights" / "tf_efficientnet_lite0.pth",
    )
    run("predict.py", "--checkpoint", tmp_path / "all_folds_best.pth", "--input", slide, "--weights", weights,
        "--visualize", "--output_dir", tmp_path / "predict")  # fmt: skip
    assert json.loads((tmp_path / "predict" / "CMU-1-Small-Region_prediction.json").read_text())["num_instances"] > 100


def test_two_models_are_compared(features, shared_data, tmp_path):
    for mil in ("LiteMIL", "meanPool"):
        run(*train(features, shared_data, tmp_path / mil, "--mil", mil, "--epochs", 10))
    said = run("-m", "utils.compare", tmp_path / "LiteMIL", tmp_path / "meanPool", "--output_dir", tmp_path / "out")
    assert "117 slides" in said
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5000


def test_a_run_killed_five_times_ends_as_one_that_was_not(features, shared_data, tmp_path):
    """Two processes beside the first, killed with it or orphaned; the bytes are those of one undisturbed process."""
    flags = ("--mil", "LiteMIL", "--epochs", 3)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, *train(features, shared_data, whole, *flags)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    command = [sys.executable, *train(features, shared_data, killed, *flags, "--jobs", "2")]
    for kept in (0, 3, 7, 12, 17):
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        while not (killed / "resume").is_dir() or len(list((killed / "resume").glob("*.pt"))) < kept:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.random())  # noqa: S311 - a moment, not a secret
        process.kill() if kept % 2 else os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    written = [
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}
        for folder in (whole, killed)
    ]
    assert written[0].keys() == written[1].keys()
    assert [name for name in written[0] if written[0][name] != written[1][name]] == []
