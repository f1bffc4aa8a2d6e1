"""Predictions, evidence and pictures on a card. What takes the fixture `device` runs on the CPU too."""

import numpy as np
import pytest
import torch

from MILS import list_mils
from tests.small import TASK
from utils.prediction.forward_pass import SlideFeed, predict_features, predict_values, set_references
from utils.prediction.predictor import SlidePredictor

FEEDS = {"whole": SlideFeed(None, "merge"), "chunks": SlideFeed(20, "mean")}


def features(count: int = 90, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)).half()


@pytest.fixture
def model(make_model):
    def make(name: str):
        torch.manual_seed(1)
        made = make_model(name).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.4 * torch.randn_like(parameter)
        set_references(made, lambda: [features(30, 7), features(40, 8)], FEEDS["chunks"])
        return made

    return make


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("name", list_mils())
def test_an_answer_is_the_cpus_wherever_the_features_are(name, feed, model, device):
    made = model(name)
    expected = predict_features(TASK, made, features(), FEEDS[feed], attention=True, evidence=True)
    made.to(device)
    for place in ("cpu", device):
        found = predict_features(TASK, made, features().to(place), FEEDS[feed], attention=True, evidence=True)
        np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-4)
        np.testing.assert_allclose(found.attention, expected.attention, atol=1e-4)
        assert (found.evidence is None) == (expected.evidence is None)
        if found.evidence is not None:
            np.testing.assert_allclose(found.evidence.contributions, expected.evidence.contributions, atol=1e-3)


@pytest.mark.parametrize("name", ["LiteMIL", "TransMIL"])
def test_many_slides_at_once_are_each_alone(name, model, device):
    made, slides = model(name).to(device), [features(count, count) for count in (3, 50, 17)]
    found = predict_values(TASK, made, (slide.to(device) for slide in slides), FEEDS["whole"])
    expected = [predict_features(TASK, made, slide, FEEDS["whole"]).probabilities for slide in slides]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "is_on"), [("auto", True), ("fp32", False)])
def test_predict_says_what_products_are_in(models, cohort, card, script, tmp_path, precision, is_on):
    from utils.core.device import has_tf32

    bag = next(cohort[1].glob("*.h5"))
    flags = ("--checkpoint", models[0], "--input", bag, "--output_dir", tmp_path / "out", "--device", "cuda")
    done = script("predict", *flags, "--precision", precision)
    assert done.code == 0, done.err
    assert torch.backends.cuda.matmul.allow_tf32 == (is_on and has_tf32(card))


def test_a_precision_that_the_device_lacks_is_refused(models, cohort, predict):
    bag = next(cohort[1].glob("*.h5"))
    done = predict("--checkpoint", models[0], "--input", bag, "--precision", "tf32")
    assert done.errors == ["error: --precision tf32: needs a CUDA device, not cpu; give auto or fp32"]


@pytest.mark.gpu
def test_pictures_and_faithfulness_are_made_on_the_card(drawable, card, script, tmp_path):
    flags, drawing = drawable("LiteMIL")
    where = ("--output_dir", tmp_path / "out", "--device", "cuda")
    done = script("predict", *flags, *drawing, *where, "--faithfulness")
    assert done.code == 0, done.err
    for name in ("slide_heatmap.png", "slide_evidence.png", "slide_report.html"):
        assert (tmp_path / "out" / name).exists(), sorted(path.name for path in (tmp_path / "out").iterdir())


def test_a_predictor_keeps_its_precision_for_every_slide(models, device, cohort):
    predictor = SlidePredictor(models[0], device=str(device))
    predictor.precision = "fp32"
    bag = next(cohort[1].glob("*.h5"))
    one, other = (predictor.predict(bag).probabilities for _ in range(2))
    np.testing.assert_array_equal(one, other)
    if device.type == "cuda":
        assert not torch.backends.cuda.matmul.allow_tf32
