"""The slide that a feature file's pictures are drawn on, among those of a folder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cohort import synthetic_passport
from tests.synthetic import stained_image, write_pyramid
from utils.bags.store import Bag, write_bag
from utils.core.errors import SlideError
from utils.core.passport import Passport
from utils.prediction.slide_folder import SlideFolder
from utils.slides.slide import quick_hash_of


@pytest.fixture
def slides(tmp_path) -> Path:
    """Slides a/S1.tif, b/S1.tif and c/S1.png of different pixels, and one of another name."""
    folder = tmp_path / "slides"
    for seed, name in enumerate(("a/S1.tif", "b/S1.tif", "other.tif")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_pyramid(folder / name, stained_image(256, 256, seed=seed), mpp=0.25)
    (folder / "c").mkdir()
    Image.fromarray(stained_image(32, 32)).save(folder / "c" / "S1.png")
    return folder


def features_of(path: Path, **record) -> Path:
    passport = Passport(synthetic_passport("x").recipe, record)
    write_bag(path, Bag(np.ones((1, 16), np.float16), np.zeros((1, 2), np.int64), 64, passport))
    return path


@pytest.mark.parametrize("name", ["a/S1.tif", "b/S1.tif", "other.tif"])
def test_of_slides_of_one_name_the_hash_decides(slides, tmp_path, name):
    source = features_of(tmp_path / "S1.h5", quick_hash=quick_hash_of(slides / name))
    assert SlideFolder(slides, "features").slide_of(source) == slides / name


def test_a_slide_left_out_by_its_name_is_known_by_its_hash(slides, tmp_path):
    (slides / "c" / "S1.svs").write_bytes((slides / "other.tif").read_bytes())
    source = features_of(tmp_path / "S1.h5", quick_hash=quick_hash_of(slides / "c" / "S1.png"))
    assert SlideFolder(slides, "features").slide_of(source) == slides / "c" / "S1.png"


def test_without_a_hash_the_size_tells_a_slide_from_a_picture_of_it(slides, tmp_path):
    (slides / "b" / "S1.tif").unlink()
    source = features_of(tmp_path / "S1.h5", width=256, height=256)
    assert SlideFolder(slides, "features").slide_of(source) == slides / "a" / "S1.tif"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "records no hash of its slide"),
        ({"width": 256, "height": 256}, "records no hash of its slide"),
        ({"quick_hash": "0" * 64}, "none has the hash of the slide that it was made from"),
    ],
)
def test_slides_among_which_nothing_decides_are_named(slides, tmp_path, record, reason):
    source = features_of(tmp_path / "S1.h5", **record)
    with pytest.raises(SlideError) as caught:
        SlideFolder(slides, "features").slide_of(source)
    message = str(caught.value)
    assert f"{source}: --wsi {slides} holds 3 slides S1 (a/S1.tif, b/S1.tif, c/S1.png)" in message
    assert reason in message
    assert "keep only the right one under --wsi" in message


def test_a_renamed_feature_file_finds_its_slide(slides, tmp_path):
    source = features_of(tmp_path / "renamed.h5", quick_hash=quick_hash_of(slides / "other.tif"))
    assert SlideFolder(slides, "features").slide_of(source) == slides / "other.tif"
    unknown = features_of(tmp_path / "unknown.h5")
    with pytest.raises(SlideError, match=r"unknown.h5: --wsi .* holds no slide unknown to draw it on"):
        SlideFolder(slides, "features").slide_of(unknown)
