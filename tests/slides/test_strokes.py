"""Marker strokes of a stain's colour: found by their make, and nothing else is."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from tests.synthetic import stained_image, with_stroke
from utils.slides.colour import optical_density
from utils.slides.open_slides import open_slide
from utils.slides.strokes import find_strokes
from utils.slides.tissue import detect_tissue, is_stained, tissue_mask

PENS = {
    "pink": (214, 82, 117),
    "magenta": (192, 50, 138),
    "purple": (118, 60, 158),
    "brown": (126, 78, 44),
    "orange": (240, 135, 45),
    "yellow": (238, 225, 85),
    "lilac": (170, 120, 200),
    "maroon": (120, 25, 45),
    "coral": (235, 110, 90),
    "ochre": (200, 150, 50),
}


def glass(height=260, width=160):
    noise = np.random.default_rng(0).normal(0, 1.5, (height, width, 1))
    return np.clip(noise + np.array((242, 242, 245)), 0, 255).astype(np.uint8)


def strokes_of(image, mpp=8.0):
    density = optical_density(image)
    return find_strokes(density, is_stained(density), mpp)


@pytest.mark.parametrize("colour", PENS.values(), ids=PENS)
@pytest.mark.parametrize(("width", "bend"), [(33, 4), (14, 8), (58, 3)])
def test_a_stroke_on_glass_is_no_tissue(colour, width, bend):
    assert not tissue_mask(with_stroke(glass(), colour, (80, 50), width=width, bend=bend)).any()


@pytest.mark.parametrize("colour", PENS.values(), ids=PENS)
def test_a_stroke_beside_tissue_and_across_it_leaves_the_tissue(colour):
    image = glass(400, 400)
    image[120:300, 150:350] = stained_image(200, 180, seed=1, coverage=1.0)
    alone = tissue_mask(image)
    beside = tissue_mask(with_stroke(image, colour, (70, 60), length=250))
    np.testing.assert_array_equal(beside, alone)
    across = tissue_mask(with_stroke(image, colour, (250, 20), length=360))
    assert not across[:110].any()
    assert not across[310:].any()
    assert across[120:300, 155:220].mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("colour", PENS.values(), ids=PENS)
def test_a_ring_drawn_around_tissue_is_a_stroke(colour):
    y, x = np.mgrid[:400, :400]
    ring = ndimage.gaussian_filter((np.abs(np.hypot(y - 200, x - 200) - 160) < 13).astype(float), 1.2)[..., None]
    image = glass(400, 400)
    image[140:260, 140:260] = stained_image(120, 120, seed=1, coverage=1.0)
    alone = tissue_mask(image)
    inked = np.rint(image * (np.array(colour) / 255) ** ring).astype(np.uint8)
    np.testing.assert_array_equal(tissue_mask(inked), alone)


@pytest.mark.parametrize("width", [16, 28])
@pytest.mark.parametrize(
    "lines",
    [
        [[(60, 60), (240, 240)], [(240, 60), (60, 240)]],
        [[(40, 150), (260, 150)], [(220, 110), (260, 150), (220, 190)]],
        [[(50, 60), (250, 60)], [(150, 60), (150, 260)]],
    ],
    ids=["cross", "arrow", "T"],
)
@pytest.mark.parametrize("colour", [PENS[name] for name in ("pink", "magenta", "purple", "brown", "lilac", "maroon")])
def test_lines_that_meet_are_strokes(colour, lines, width):
    drawn = Image.new("L", (300, 300))
    for points in lines:
        ImageDraw.Draw(drawn).line(points, 255, width, joint="curve")
    ink = np.asarray(drawn) > 0
    image = glass(300, 300)
    image[ink] = colour
    assert strokes_of(image)[ink].mean() > 0.9


def test_a_core_of_tissue_has_the_shape_of_a_stroke_and_nuclei():
    """A needle biopsy."""
    image = glass(260, 260)
    image[40:220, 110:140] = stained_image(30, 180, seed=2, coverage=1.0)
    assert not strokes_of(image).any()
    assert tissue_mask(image)[45:215, 112:138].all()


@pytest.mark.parametrize("colour", [(225, 150, 190), (230, 160, 195)])
def test_a_pale_band_is_collagen(colour):
    assert tissue_mask(with_stroke(glass(), colour, (80, 50))).any()


def test_a_blot_or_a_short_dash_is_no_stroke():
    image = glass(260, 260)
    image[60:160, 60:160] = PENS["purple"]
    image[200:230, 60:110] = PENS["purple"]
    assert not strokes_of(image).any()


def test_a_band_within_tissue_is_no_stroke():
    """A vessel full of blood, seen along."""
    image = stained_image(260, 260, seed=4, coverage=1.0)
    assert not strokes_of(with_stroke(image, (190, 60, 90), (130, 50), width=20)).any()


def test_where_nuclei_cannot_be_seen_nothing_is_a_stroke():
    image = with_stroke(glass(), PENS["purple"], (80, 50))
    assert strokes_of(image, 8.0).any()
    assert not strokes_of(image, 20.0).any()
    assert not strokes_of(image, 1.0).any()  # 150 um long
    assert not strokes_of(image[:5, :5]).any()


def test_synthetic_tissue_holds_no_stroke():
    for seed in range(12):
        assert not strokes_of(stained_image(300, 260, seed=seed)).any(), seed


def test_real_tissue_holds_no_stroke(shared_data, monkeypatch):
    """In slides, crops and colon images without ink, masks are what they are without this rule."""
    paths = sorted((shared_data / "glas" / "images").iterdir())[::5]
    paths += sorted((shared_data / "tiles").iterdir())
    paths.append(shared_data / "slides" / "CMU-1-Small-Region.svs")
    masks = []
    for path in paths:
        with open_slide(path) as slide:
            masks.append(detect_tissue(slide).mask)
    monkeypatch.setattr("utils.slides.tissue.find_strokes", lambda density, stained, mpp: np.zeros_like(stained))
    for path, mask in zip(paths, masks, strict=True):
        with open_slide(path) as slide:
            np.testing.assert_array_equal(detect_tissue(slide).mask, mask, path.name)


def test_real_tissue_cut_into_bands_holds_no_stroke(shared_data):
    """Bands of 100 to 240 um of colon on glass, mirrored to 1.2 mm, at 8 um/px."""
    for path in sorted((shared_data / "glas" / "images").iterdir())[::10]:
        with open_slide(path) as slide:
            image = slide.thumbnail(downsample=8 / 0.62)
        for width in (12, 30):
            band = np.hstack([image[:width], image[:width, ::-1], image[:width]])[:, :150]
            on_glass = glass(width + 60, band.shape[1] + 60)
            on_glass[30 : 30 + width, 30:-30] = band
            assert not strokes_of(on_glass).any(), path.name


def test_drawn_pens_beside_tissue(shared_data):
    """Ten markers above a section, at 8 um/px."""
    path = shared_data.parent / "cases" / "slides" / "pens.tif"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with open_slide(path) as slide:
        mask = detect_tissue(slide).mask
    assert not mask[:210].any()
    assert mask[240:320, 200:450].mean() > 0.95
