"""The tissue detector: on made-up images for what it must do, on real crops for whether it does."""

import json
import logging

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from tests.synthetic import stained_image, write_pyramid
from utils.core.errors import SlideError
from utils.core.geometry import covered_fraction, patch_grid
from utils.slides.open_slides import open_slide
from utils.slides.tissue import TISSUE_SETTINGS, TissueSettings, detect_tissue, mask_downsample, tissue_mask

GLASS, PINK, PURPLE = (243, 243, 243), (225, 150, 190), (130, 80, 150)


def canvas(colour=GLASS, size=200):
    return np.full((size, size, 3), colour, dtype=np.uint8)


def with_square(colour, ground=GLASS):
    image = canvas(ground)
    image[60:140, 60:140] = colour
    return image


@pytest.mark.parametrize("ground", [GLASS, (255, 255, 255), (230, 230, 232), (244, 241, 238), (200, 201, 200)])
def test_an_empty_slide_stays_empty(ground):
    noise = np.random.default_rng(0).normal(0, 1, (200, 200, 1))
    image = np.clip(canvas(ground) + noise, 0, 255).astype(np.uint8)
    assert not tissue_mask(image).any()


@pytest.mark.parametrize("ground", [(245, 240, 228), (240, 235, 222), (235, 228, 210)])
def test_yellowed_glass_is_glass_and_what_lies_on_it_is_tissue(ground):
    noise = np.random.default_rng(0).normal(0, 1.5, (200, 200, 1))
    for colour in (None, PINK, PURPLE, (236, 214, 214)):
        image = canvas(ground) if colour is None else with_square(colour, ground)
        mask = tissue_mask(np.clip(image + noise, 0, 255).astype(np.uint8))
        if colour is None:
            assert not mask.any()
        else:
            assert mask[62:138, 62:138].all()
            assert mask.sum() == pytest.approx(80 * 80, rel=0.02)


def test_bluish_haematoxylin_is_no_ink():
    """Optical densities in the ratio 0.65 : 0.50 : 0.20, as of the pale counterstain of immunohistochemistry."""
    for strength in (0.1, 0.2, 0.3, 0.4, 0.6):
        colour = tuple(np.rint(255 * 10 ** -(strength * np.array([0.65, 0.50, 0.20]))).astype(int))
        assert tissue_mask(with_square(colour))[62:138, 62:138].all(), colour


@pytest.mark.parametrize(
    "colour",
    [PINK, PURPLE, (236, 214, 226), (235, 190, 200), (200, 60, 80), (150, 105, 70), (165, 168, 190), (90, 40, 110)],
    ids=["eosin", "haematoxylin", "faint", "pale-pink", "blood", "dab", "ihc-blue", "dense-nuclei"],
)
def test_stains_are_tissue_edge_to_edge_and_on_glass(colour):
    assert tissue_mask(canvas(colour)).all()
    mask = tissue_mask(with_square(colour))
    assert mask[62:138, 62:138].all()
    assert mask.sum() == pytest.approx(80 * 80, rel=0.02)


@pytest.mark.parametrize(
    "colour",
    [
        (20, 20, 20),
        (45, 22, 48),
        (60, 60, 62),
        (130, 130, 130),
        (90, 80, 88),
        (220, 25, 50),
        (60, 170, 140),
        (40, 120, 60),
        (35, 55, 160),
    ],
    ids=["black", "bluish-black", "dark-grey", "grey", "tinted-shadow", "red-pen", "teal-pen", "green-pen", "blue-pen"],
)
def test_pens_borders_and_shadows_are_not_tissue(colour):
    assert not tissue_mask(with_square(colour)).any()
    framed = canvas(PINK)
    framed[:, :15] = framed[:15] = colour
    mask = tissue_mask(framed)
    assert not mask[:15].any()
    assert not mask[:, :15].any()
    assert mask[25:, 25:].all()


def test_a_blurred_pen_stroke_leaves_no_rim():
    stroke = ndimage.gaussian_filter(with_square((220, 30, 40)).astype(float), (6, 6, 0)).astype(np.uint8)
    assert not tissue_mask(stroke).any()


def test_black_and_white_stitched_borders_around_tissue():
    image = canvas((0, 0, 0))
    image[20:180, 20:180] = 255
    image[50:150, 50:150] = PINK
    mask = tissue_mask(image)
    assert mask[52:148, 52:148].all()
    assert mask.sum() == pytest.approx(100 * 100, rel=0.02)


def test_large_holes_stay_holes_and_small_ones_are_filled():
    image = canvas(PINK)
    image[60:90, 60:90] = GLASS  # 240 um
    image[150:158, 150:158] = GLASS  # 64 um, more than closing bridges
    mask = tissue_mask(image)
    assert not mask[63:87, 63:87].any()
    assert mask[148:160, 148:160].all()


def test_specks_are_dropped_and_a_small_biopsy_is_not():
    image = canvas()
    image[20:26, 20:26] = PURPLE  # 48 um
    image[100:120, 100:120] = PURPLE  # 160 um
    mask = tissue_mask(image)
    assert not mask[:50, :50].any()
    assert mask[101:119, 101:119].all()


def test_scale_decides_what_is_small():
    image = canvas(size=400)
    image[100:120, 100:120] = PURPLE
    assert tissue_mask(image, mpp=8.0).any()
    assert not tissue_mask(image, mpp=4.0).any()


def test_the_judging_resolution_is_bounded():
    assert mask_downsample(100_000, 80_000, 0.25) == 32
    assert mask_downsample(1152, 700, 28.97) == 1
    assert mask_downsample(775, 522, 0.5) == pytest.approx(775 / 64)
    huge = mask_downsample(500_000, 400_000, 1.0)
    assert 500_000 * 400_000 / huge**2 <= TISSUE_SETTINGS.max_pixels * 1.0001


def test_detect_tissue_spans_the_slide_and_says_how(tmp_path):
    image = stained_image(1200, 900, seed=3)
    path = write_pyramid(tmp_path / "a.tiff", image, mpp=0.5)
    with open_slide(path) as slide:
        tissue = detect_tissue(slide)
    assert tissue.mask.shape == (56, 75)
    assert tissue.mpp == pytest.approx(8.0, rel=0.02)
    assert tissue.fraction == pytest.approx(0.35, abs=0.05)
    grid = patch_grid(1200, 900, 100, 100)
    stained = [image[y : y + 100, x : x + 100, 1].mean() < 220 for x, y in grid.tolist()]
    agreement = (covered_fraction(tissue.mask, grid, 100, 1200, 900) > 0.3) == stained
    assert agreement.mean() > 0.9
    assert json.loads(json.dumps(tissue.settings.as_dict())) == TissueSettings().as_dict()


def test_unknown_mpp_is_judged_too_and_stays_unknown(tmp_path):
    path = write_pyramid(tmp_path / "a.tiff", stained_image(1200, 900, seed=3))
    with open_slide(path) as slide:
        tissue = detect_tissue(slide)
    assert tissue.mpp is None
    assert tissue.fraction == pytest.approx(0.35, abs=0.05)


def test_fluorescence_is_refused_and_a_black_border_is_not(tmp_path):
    fluorescent = canvas((0, 0, 0), size=3000)
    fluorescent[900:2100, 900:2100, 2] = 255
    bordered = canvas((0, 0, 0), size=3000)
    bordered[900:2100, 900:2100] = PINK
    for name, image in {"fluorescent": fluorescent, "bordered": bordered, "black": fluorescent * 0}.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    for name in ("fluorescent", "black"):
        with (
            open_slide(tmp_path / f"{name}.png") as slide,
            pytest.raises(SlideError, match=f"{name}.png: mostly black.*brightfield"),
        ):
            detect_tissue(slide)
    with open_slide(tmp_path / "bordered.png") as slide:
        assert detect_tissue(slide).fraction == pytest.approx(0.16, rel=0.2)  # less a rim of 24 um


@pytest.mark.parametrize("colours", ["blue", "green", "blue and green"])
def test_a_frame_crowded_with_fluorescence_is_refused_too(tmp_path, colours):
    """As light as a dense H&E section on average, but every pixel lacks a colour."""
    light = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((2, 800, 800)), (0, 8, 8))
    light = np.clip(light / light.std() * 120 + 150, 0, 255)
    image = np.zeros((800, 800, 3))
    image[..., 1] = light[0] * ("green" in colours)
    image[..., 2] = light[1] * ("blue" in colours)
    Image.fromarray(image.astype(np.uint8)).save(tmp_path / "crowded.png")
    with (
        open_slide(tmp_path / "crowded.png") as slide,
        pytest.raises(SlideError, match=r"colours on black.*leave it out"),
    ):
        detect_tissue(slide)


@pytest.mark.parametrize("ground", [30, 45, 60])
def test_fluorescence_on_a_background_that_is_not_quite_black_is_refused(tmp_path, ground):
    light = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((800, 800)), 8)
    image = canvas((ground,) * 3, 800).astype(float)
    image[200:600, 200:600, 2] += np.clip(100 + 40 * light / light.std(), 0, None)[200:600, 200:600]
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(tmp_path / "grey.png")
    with open_slide(tmp_path / "grey.png") as slide, pytest.raises(SlideError, match="as fluorescence"):
        detect_tissue(slide)


def test_a_dark_section_edge_to_edge_is_not_fluorescence(tmp_path):
    for name, colour in {"nuclei": (90, 40, 110), "dab": (70, 40, 25), "blood": (150, 25, 40)}.items():
        Image.fromarray(canvas(colour, 800)).save(tmp_path / f"{name}.png")
        with open_slide(tmp_path / f"{name}.png") as slide:
            detect_tissue(slide)


# Real images. The ranges are what a look at each picture says, not what the detector happened to answer.

TILES = {
    "no-tissue": (0, 0),
    "no-tissue2": (0, 0),
    "no-tissue-line": (0, 0),
    "no-tissue-green-pen": (0, 0.01),
    "no-tissue-red-pen": (0, 0.01),
    "almost-white-1": (0, 0),
    "almost-white-2": (0.01, 0.08),
    "almost-white-ihc": (0, 0),
    "high-nuclei-score-level0": (0.97, 1),
    "high-nuclei-score-level2": (0.1, 0.2),
    "high-nuclei-score-red-pen-level1": (0.75, 0.93),
    "kidney-ihc-level0-310-500-360-530": (0.6, 0.9),
    "kidney-ihc-level0-330-480-380-510": (0.25, 0.5),
    "kidney-ihc-level0-340-520-390-550": (0.7, 0.95),
    "kidney-ihc-level0-350-530-360-540": (0.9, 1),
    "liver-level2-10907-7808-11707-8608": (0.97, 1),
    "liver-level2-20914-13715-21714-14515": (0.1, 0.25),
    "liver-level2-38626-13514-39426-14315": (0, 0),
    "liver-level2-57138-8209-57938-9009": (0.6, 0.75),
    "low-nuclei-score-level0": (0.15, 1),
    "low-nuclei-score-level1": (0.3, 1),
    "medium-nuclei-score-green-pen-level1": (0.2, 0.45),
    "medium-nuclei-score-level0": (0.95, 1),
    "medium-nuclei-score-level1-2": (0.97, 1),
    "medium-nuclei-score-level1": (0.6, 0.85),
    "medium-nuclei-score-level2": (0.75, 0.88),
    "tissue-level0-4302-10273-4814-10785": (0.85, 1),
    "tissue-level0-7352-11762-7864-12274": (0.82, 0.93),
    "tissue-level2-1784-6289-5880-10386": (0.7, 0.88),
    "tissue-level2-3000-7666-7096-11763": (0.75, 0.9),
    "tissue-level2-4640-4649-8736-8746": (0.7, 0.88),
    "tissue-level2-4760-5241-8856-9338": (0.7, 0.88),
    "very-low-nuclei-score-level0": (0.97, 1),
    "very-low-nuclei-score-red-pen-level1": (0, 0.3),
}


@pytest.mark.parametrize("name", TILES)
def test_real_crops(shared_data, name):
    low, high = TILES[name]
    with open_slide(shared_data / "tiles" / f"{name}.png") as slide:
        assert low <= detect_tissue(slide).fraction <= high


def test_every_crop_has_an_expectation(shared_data):
    assert {path.stem for path in (shared_data / "tiles").iterdir()} == set(TILES)


def test_real_slides(shared_data, caplog):
    caplog.set_level(logging.ERROR)
    expected = {
        "CMU-1-Small-Region.svs": (0.3, 0.5),
        "OS-1-detail_pyramid.tiff": (0.97, 1),
        "ezwsi_multiframe_camelyon_challenge_image.dcm": (0.15, 0.32),
        "boxes.tiff": (0, 0),
    }
    for name, (low, high) in expected.items():
        with open_slide(shared_data / "slides" / name) as slide:
            assert low <= detect_tissue(slide).fraction <= high, name
    with (
        open_slide(shared_data / "slides" / "test3-DAPI-387.ndpi") as slide,
        pytest.raises(SlideError, match=r"test3-DAPI-387\.ndpi: mostly black"),
    ):
        detect_tissue(slide)


def test_glas_images_are_tissue_but_for_their_glass(shared_data):
    """117 crops of colon, most of them edge to edge; a few show real glass, at most two thirds of the picture."""
    kept, total = [], []
    for path in sorted((shared_data / "glas" / "images").iterdir()):
        with open_slide(path) as slide:
            grid = patch_grid(slide.width, slide.height, 112, 112)
            fraction = covered_fraction(detect_tissue(slide).mask, grid, 112, slide.width, slide.height)
        kept.append(int((fraction >= 0.5).sum()))
        total.append(len(grid))
    share = np.array(kept) / np.array(total)
    assert len(share) == 117
    assert sum(kept) / sum(total) > 0.95
    assert (share == 1).sum() >= 98
    assert share.min() > 0.25
