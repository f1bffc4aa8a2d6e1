"""Glass of a colour, and smears on it, taken for tissue at first sight: what is left is what lies on white glass."""

import numpy as np
import pytest
from scipy import ndimage

from tests.synthetic import stained_image
from utils.slides.colour import optical_density
from utils.slides.glass import find_smear, tint_of_border
from utils.slides.open_slides import open_slide
from utils.slides.tissue import detect_tissue, tissue_mask

PINKISH = [(238, 222, 232), (240, 215, 226), (236, 205, 220), (232, 195, 212), (245, 210, 215)]
LAVENDER = [(230, 226, 242), (225, 215, 240), (215, 205, 235)]
YELLOW = [(240, 232, 205), (235, 222, 190)]
SMEARS = {"light": (0.002, 0.01, 0.045), "strong": (0.01, 0.03, 0.1), "brownish": (0.015, 0.035, 0.08)}
WHITE = 244.0


def noisy(image, sigma=1.5):
    noise = np.random.default_rng(0).normal(0, sigma, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def on_glass(colour, sigma=1.5):
    """Tissue as `stained_image` makes it, all seen through glass of a colour."""
    return noisy(stained_image(300, 260, seed=3) * (np.array(colour) / WHITE), sigma)


def pale_ihc(height=260, width=300):
    """(h, w, 3) float: grained, pale blue tissue on white glass."""
    rng = np.random.default_rng(0)
    field = ndimage.gaussian_filter(rng.standard_normal((height, width)), 20)
    tissue = ndimage.gaussian_filter((field > np.quantile(field, 0.65)).astype(float), 1)
    grain = np.clip(1 + 0.6 * ndimage.gaussian_filter(rng.standard_normal((height, width)), 1), 0.3, 3)
    return WHITE * 10 ** -((tissue * grain)[..., None] * (0.10, 0.075, 0.045))


def agreement(mask, other):
    return (mask & other).sum() / (mask | other).sum()


@pytest.mark.parametrize("sigma", [1.5, 3.0])
@pytest.mark.parametrize("colour", PINKISH + LAVENDER + YELLOW, ids=str)
def test_tissue_on_tinted_glass_is_what_it_is_on_white_glass(colour, sigma):
    assert agreement(tissue_mask(on_glass(colour, sigma)), tissue_mask(on_glass((WHITE,) * 3, sigma))) > 0.97


def test_glass_that_is_lit_unevenly_is_glass():
    light = np.linspace(0.99, 1.01, 300)[None, :, None]
    image = np.clip(np.rint(on_glass(PINKISH[1]) * light), 0, 255).astype(np.uint8)
    assert agreement(tissue_mask(image), tissue_mask(on_glass((WHITE,) * 3))) > 0.97


def test_glass_that_was_left_alone_stays_as_it_is():
    for colour in [(WHITE,) * 3, (242, 236, 240), (245, 240, 228)]:
        image = on_glass(colour)
        assert tint_of_border(image, tissue_mask(image), 8.0) is None


def test_a_picture_full_of_pale_tissue_stays_tissue():
    grain = 1 + 0.3 * ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((200, 200, 1)), (1, 1, 0)) / 0.28
    full = np.clip(255 * 10 ** -(grain * (0.034, 0.076, 0.052)), 0, 255).astype(np.uint8)
    assert tissue_mask(full).all()


def test_a_large_empty_slide_of_tinted_glass_is_empty():
    empty = noisy(np.full((400, 400, 3), LAVENDER[1], dtype=float))
    assert not tissue_mask(empty, mpp=8.0).any()


@pytest.mark.parametrize("density", SMEARS.values(), ids=SMEARS)
@pytest.mark.parametrize("where", ["all", "half", "blot"])
def test_pale_ihc_under_a_yellowish_smear_is_found_and_the_smear_is_not(density, where):
    clear = pale_ihc()
    y, x = np.mgrid[:260, :300]
    blot = ((y - 130) / 100) ** 2 + ((x - 150) / 110) ** 2 < 1
    cover = {"all": np.ones_like(blot), "half": x < 165, "blot": blot}[where]
    cover = ndimage.gaussian_filter(cover.astype(float), 4)[..., None]
    mask = tissue_mask(noisy(clear * 10 ** -(cover * density)))
    assert agreement(mask, tissue_mask(noisy(clear))) > 0.85


def test_pale_brown_tissue_is_no_smear():
    image = np.full((200, 200, 3), WHITE)
    image[50:150, 50:150] = (228, 212, 192)  # thin diaminobenzidine
    mask = tissue_mask(noisy(image))
    assert mask[52:148, 52:148].all()
    assert find_smear(optical_density(noisy(image)), mask, 8.0) is None


def test_real_glass_and_tissue_are_left_alone(shared_data):
    paths = sorted((shared_data / "tiles").iterdir()) + sorted((shared_data / "glas" / "images").iterdir())[::5]
    for path in paths:
        with open_slide(path) as slide:
            tissue = detect_tissue(slide)
            image = slide.thumbnail(downsample=slide.width / tissue.mask.shape[1])
        if image.shape[:2] == tissue.mask.shape:
            assert tint_of_border(image, tissue.mask, 8.0) is None, path.name


def test_a_drawn_section_on_pinkish_glass(shared_data):
    folder = shared_data.parent / "cases" / "slides"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    masks = []
    for name in ("glass_pinkish.tif", "glass_white.tif"):
        with open_slide(folder / name) as slide:
            masks.append(detect_tissue(slide).mask)
    assert agreement(*masks) > 0.98
