"""The three commands on the demo, on a card: features, training, prediction with pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import BACKBONE, FIRST_COMMAND, PATCH, ROOT, SMALL_RUN, run_small_demo

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a small demo that was trained on the card."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return run_small_demo(tmp_path_factory, "demo_on_card", *FIRST_COMMAND, *SMALL_RUN, "--device", "cuda")[0]


def run(home: Path, script: str, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_train(trained):
    record = json.loads((trained / "outputs" / "LiteMIL" / "demo" / "run.json").read_text())
    assert record["device"] == "cuda"
    assert record["gpu"]
    table = pd.read_csv(trained / "outputs" / "LiteMIL" / "demo" / "predictions.csv")
    assert table.filter(like="prob_").sum(axis=1).sub(1).abs().max() < 1e-6


def test_predict_with_pictures(trained, tmp_path):
    slide, checkpoint = next((trained / "datasets/demo/holdout/wsi").glob("*.tif")), "outputs/LiteMIL/demo"
    flags = ("--checkpoint", checkpoint, "--input", slide, "--output_dir", tmp_path, "--device", "cuda", "--visualize")
    run(trained, "predict", *flags)
    answers = [
        json.loads((tmp_path / f"{slide.stem}_prediction.json").read_text()),
        json.loads(_on_cpu(trained, slide, tmp_path / "cpu").read_text()),
    ]
    assert answers[0]["probabilities"] == pytest.approx(answers[1]["probabilities"], abs=0.02)
    assert (tmp_path / f"{slide.stem}_heatmap.png").exists()
    assert (tmp_path / f"{slide.stem}_evidence.png").exists()


def _on_cpu(home: Path, slide: Path, folder: Path) -> Path:
    flags = ("--checkpoint", "outputs/LiteMIL/demo", "--input", slide, "--output_dir", folder, "--device", "cpu")
    run(home, "predict", *flags)
    return folder / f"{slide.stem}_prediction.json"


def test_extract(trained, slide_cohort, tmp_path):
    slide = next((trained / "datasets/demo/holdout/wsi").glob("*.tif"))
    flags = ("--input", slide, "--output", tmp_path / "slide.h5", "--backbone", BACKBONE, "--weights")
    done = run(trained, "extractFeatures", *flags, slide_cohort.weights, "--patch_size", PATCH, "--device", "cuda")
    assert (tmp_path / "slide.h5").exists()
    assert "on cuda" in done.stderr
