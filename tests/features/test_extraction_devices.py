"""Extraction on a card, and on several that one stands for. What takes the fixture `device` runs on the CPU too."""

import numpy as np
import pytest
import torch

from tests.conftest import BACKBONE, PATCH
from utils.bags.store import read_bag
from utils.core.device import has_tf32
from utils.core.errors import SlideError
from utils.features.extraction import extract_slides
from utils.features.extractor import WSIFeatureExtractor
from utils.slides.settings import ExtractionFiles

SLIDE = "P00_0.tif"
# The most by which features may differ from those of a CPU, as a share of their size.
NEAR = {"fp32": 1e-3, "tf32": 5e-3, "fp16": 1e-2, "bf16": 5e-2}


@pytest.fixture
def extractor(slide_cohort):
    def make(device, backbone=BACKBONE, **settings) -> WSIFeatureExtractor:
        weights = slide_cohort.weights if backbone == BACKBONE else None
        common = {"level": 1, "tissue_threshold": 0.3, "weights": weights, "device": str(device)}
        return WSIFeatureExtractor(backbone, PATCH, **{**common, **settings})

    return make


def differ(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_features_are_the_cpus(slide_cohort, extractor, device):
    features = extractor(device).process(slide_cohort.slides / SLIDE)["features"]
    assert differ(features, read_bag(slide_cohort.features / "P00_0.h5").features) < NEAR["tf32"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", list(NEAR))
def test_every_precision_is_near(slide_cohort, extractor, card, precision):
    if precision == "tf32" and not has_tf32(card):
        pytest.skip("the card has no TF32")
    made = extractor(card, precision=precision)
    features = made.process(slide_cohort.slides / SLIDE)["features"]
    assert differ(features, read_bag(slide_cohort.features / "P00_0.h5").features) < NEAR[precision]
    recorded = {"fp32": "float32", "tf32": "tf32", "fp16": "float16", "bf16": "bfloat16"}
    assert made.recipe.precision == recorded[precision]


@pytest.mark.parametrize("backbone", ["stain", "stain-texture"])
def test_a_descriptor_is_the_same_on_every_device(slide_cohort, extractor, device, backbone):
    found, expected = (
        extractor(where, backbone, dtype="float32").process(slide_cohort.slides / SLIDE) for where in (device, "cpu")
    )
    assert found["metadata"]["recipe"] == expected["metadata"]["recipe"]
    assert differ(found["features"], expected["features"]) < 1e-3


def test_several_devices_share_a_folder(slide_cohort, extractor, device, tmp_path):
    several = extractor(f"{device},{device}")
    statuses = extract_slides(several, ExtractionFiles(input_dir=slide_cohort.slides, output_dir=tmp_path))
    assert [status.status for status in statuses] == ["done"] * 10
    for path in sorted(tmp_path.glob("*.h5")):
        assert differ(read_bag(path).features, read_bag(slide_cohort.features / path.name).features) < NEAR["tf32"]


@pytest.fixture
def little_memory(card):
    """Let this process take a given number of bytes of the card beyond what it holds."""

    def limit(count: int) -> None:
        torch.cuda.empty_cache()
        taken, total = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(card).total_memory
        torch.cuda.set_per_process_memory_fraction((taken + count) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_a_batch_that_does_not_fit_is_halved(slide_cohort, extractor, card, little_memory, caplog):
    made = extractor(card, batch_size=256)
    patches = np.zeros((256, 512, 512, 3), np.uint8)  # 805 MB in float32
    _ = made.backbone
    little_memory(500 * 2**20)
    features = made.encoder._embed(torch.from_numpy(patches))
    assert features.shape == (256, 64)
    assert "out of memory; going on with batches of 128" in caplog.text


@pytest.mark.gpu
def test_a_card_without_room_for_a_patch_is_told(extractor, card, little_memory):
    made = extractor(card)
    _ = made.backbone
    little_memory(2**20)
    with pytest.raises(SlideError, match="does not hold the backbone with a single patch"):
        made.encoder._embed(torch.zeros(1, 4096, 4096, 3, dtype=torch.uint8))
