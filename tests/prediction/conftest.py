"""A small cohort, small models, and predict.py run in this process, for all tests of this room."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from MILS import build_mil
from tests.cohort import synthetic_passport, write_cohort
from tests.prediction.predict_helpers import write_model
from tests.small import dataset, make_model  # noqa: F401 - fixtures
from tests.synthetic import stained_image, write_pyramid
from utils.bags.store import Bag, write_bag
from utils.core.passport import Passport
from utils.pictures.heatmap import save_picture


@pytest.fixture(scope="session")
def cohort(tmp_path_factory) -> tuple[Path, Path]:
    return write_cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> list[Path]:
    home = tmp_path_factory.mktemp("models")
    return [write_model(home / f"fold_{seed}_best.pth", seed) for seed in (1, 2, 3)]


@pytest.fixture
def predict(script, tmp_path):
    def run(*flags, output="out"):
        return script("predict", *flags, "--output_dir", tmp_path / output, "--device", "cpu")

    return run


@pytest.fixture
def drawable(tmp_path):
    """Flags of a prediction of nine patches, and those that draw it, for an untrained model of a kind."""
    coords = np.stack(np.meshgrid([0, 128, 256], [0, 128, 256]), axis=-1).reshape(-1, 2)
    features = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float16)
    write_bag(tmp_path / "slide.h5", Bag(features, coords, 128, Passport(synthetic_passport("slide").recipe)))
    write_pyramid(tmp_path / "slide.tif", stained_image(512, 512), mpp=0.25)

    def make(mil: str, **changes):
        torch.manual_seed(0)
        model = build_mil(mil, input_dim=16, num_classes=2)
        write_model(tmp_path / "model.pth", 1, model=model.spec, state_dict=model.state_dict(), **changes)
        flags = ("--checkpoint", tmp_path / "model.pth", "--input", tmp_path / "slide.h5")
        return flags, ("--visualize", "--wsi", tmp_path / "slide.tif", "--top_k", 2)

    return make


@pytest.fixture
def texts_of_figures(monkeypatch) -> dict[str, str]:
    """All words of each figure that is written, by the file's name."""
    told = {}

    def note(figure, path):
        told[Path(path).name] = "\n".join(text.get_text() for text in figure.findobj(Text))
        save_picture(figure, path)

    monkeypatch.setattr("utils.pictures.picture_set.save_picture", note)
    monkeypatch.setattr("utils.pictures.heatmap.save_picture", note)
    return told
