"""Patches judged: blur of known width on made-up and real tissue, glass, ink, and what must not be taken for them."""

import io
import json
from functools import cache

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from utils.core.geometry import covered_fraction, patch_grid
from utils.slides.open_slides import open_slide
from utils.slides.quality import BLURRED, PEN, QUALITY_SETTINGS, REASONS, WHITE, QualitySettings, patch_quality
from utils.slides.tissue import detect_tissue

MPP, PATCH = 0.5, 256
GLASS, PINK, GREEN_INK = (243, 243, 243), (225, 150, 190), (40, 120, 60)


@cache
def tissue_image(size=1024):
    """Tissue edge to edge at 0.5 um/px: fine fibres, and nuclei of about 8 um with sharp rims."""
    rng = np.random.default_rng(1)
    grain = ndimage.gaussian_filter(rng.standard_normal((size, size)), 5, mode="wrap")
    fibres = ndimage.gaussian_filter(rng.standard_normal((size, size)), 1, mode="wrap")
    nuclei = ndimage.gaussian_filter((grain > grain.std()).astype(float), 0.7)
    eosin, haematoxylin = np.array([0.04, 0.25, 0.13]), np.array([0.45, 0.50, 0.22])
    density = (1 + 0.2 * fibres / fibres.std())[..., None] * eosin + nuclei[..., None] * haematoxylin
    return np.rint(244 * 10**-density).clip(0, 255).astype(np.uint8)


def blurred(image, sigma_um, mpp=MPP):
    """Out of focus by a Gaussian of so many um, with the camera's noise and the scanner's JPEG after it."""
    soft = ndimage.gaussian_filter(image.astype(np.float32), (sigma_um / mpp, sigma_um / mpp, 0))
    soft += np.random.default_rng(0).normal(0, 1.5, soft.shape)
    return compressed(np.clip(np.rint(soft), 0, 255).astype(np.uint8))


def compressed(image, quality=80):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def patches_of(image, coords, size=PATCH):
    return np.stack([image[y : y + size, x : x + size] for x, y in coords.tolist()])


def all_patches(image, size=PATCH):
    return patches_of(image, patch_grid(image.shape[1], image.shape[0], size, size), size)


def plain(colour, size=PATCH):
    return np.full((1, size, size, 3), colour, dtype=np.uint8)


def test_sharp_tissue_passes_and_blurred_tissue_does_not():
    image = tissue_image()
    assert (patch_quality(all_patches(compressed(image)), MPP) == "").all()
    for sigma in (2, 3):
        assert (patch_quality(all_patches(blurred(image, sigma)), MPP) == BLURRED).all()


@pytest.mark.parametrize("contrast", [0.6, 0.4])
def test_a_faint_stain_is_judged_by_its_detail(contrast):
    image = tissue_image()
    faint = np.rint(245 - contrast * (245.0 - image)).astype(np.uint8)
    assert (patch_quality(all_patches(faint), MPP) == "").all()
    assert (patch_quality(all_patches(blurred(faint, 2)), MPP) == BLURRED).all()


def test_a_brightness_or_another_order_changes_nothing():
    patches = np.concatenate([all_patches(tissue_image()), all_patches(blurred(tissue_image(), 2)), plain(GLASS)])
    reasons = patch_quality(patches, MPP)
    assert set(reasons) == {"", BLURRED, WHITE}
    np.testing.assert_array_equal(patch_quality(patches[::-1], MPP)[::-1], reasons)
    for index in range(0, len(patches), 5):
        assert patch_quality(patches[index : index + 1], MPP)[0] == reasons[index]


def test_smooth_tissue_is_not_blurred():
    """Mucus and fluid: stained, a slow shade, no detail to be in focus."""
    shade = np.linspace(0, 30, PATCH, dtype=np.float32)[None, :, None]
    noise = np.random.default_rng(0).normal(0, 1.0, (PATCH, PATCH, 3))
    smooth = np.clip((214, 196, 222) - shade + noise, 0, 255).astype(np.uint8)
    for quality in (95, 70, 40):
        assert patch_quality(compressed(smooth, quality)[None], MPP).tolist() == [""]


def test_slow_waves_without_noise_are_not_blurred():
    """What a scanner that smooths makes of mucus: grey levels that rise and fall by a few over 32 um."""
    wave = 4 * np.sin(np.arange(PATCH) * 2 * np.pi / 64)
    smooth = np.rint(np.array((214, 196, 222)) + wave[:, None, None] + wave[None, :, None]).astype(np.uint8)
    assert patch_quality(smooth[None], MPP).tolist() == [""]


def test_fat_is_neither_white_nor_blurred():
    """Thin sharp walls around clear cells of 50 um."""
    y, x = np.mgrid[:512, :512]
    wall = (np.minimum(x % 100, y % 100) < 6)[..., None]
    fat = np.where(wall, np.array(PINK), np.array(GLASS)).astype(np.uint8)
    assert (patch_quality(all_patches(compressed(fat)), MPP) == "").all()


def test_glass_is_white_and_half_a_patch_of_tissue_is_not():
    assert patch_quality(plain(GLASS), MPP).tolist() == [WHITE]
    assert patch_quality(plain((255, 255, 255)), MPP).tolist() == [WHITE]
    edge = plain(GLASS)
    edge[:, :, PATCH // 2 :] = PINK
    assert patch_quality(edge, MPP).tolist() == [""]


@pytest.mark.parametrize(
    "ink", [(220, 25, 50), GREEN_INK, (35, 55, 160), (15, 15, 15), (240, 135, 45), (238, 225, 85)], ids=str
)
def test_ink_on_glass_and_on_tissue_is_pen(ink):
    for ground in (plain(GLASS), all_patches(tissue_image())[:1]):
        stroke = ground.copy()
        stroke[:, :100] = ink
        assert patch_quality(stroke, MPP).tolist() == [PEN]


@pytest.mark.parametrize("colour", [(190, 130, 50), (235, 195, 150), (245, 235, 205), (150, 105, 70)], ids=str)
def test_brown_stain_saffron_and_yellowed_glass_are_no_ink(colour):
    assert PEN not in patch_quality(plain(colour), MPP)


def test_a_little_ink_on_glass_is_no_tissue():
    patch = plain(GLASS)
    patch[:, :100, :100] = GREEN_INK
    assert patch_quality(patch, MPP).tolist() == [WHITE]


def test_a_little_ink_or_pigment_is_let_pass():
    patch = all_patches(tissue_image())[:1].copy()
    patch[:, :60, :60] = (15, 15, 15)
    assert patch_quality(patch, MPP).tolist() == [""]


@pytest.mark.parametrize("mpp", [0.25, 1.0])
def test_blur_is_judged_in_micrometres(mpp):
    """2 um are 8 px or 2 px; and 2 px are no blur at 0.25 um/px."""
    image = tissue_image()[:512, :512]
    width = round(512 * MPP / mpp)
    scaled = np.asarray(Image.fromarray(image).resize((width, width), Image.Resampling.BICUBIC))
    assert (patch_quality(all_patches(scaled), mpp) == "").all()
    assert (patch_quality(all_patches(blurred(scaled, 2, mpp)), mpp) == BLURRED).all()
    if mpp < MPP:
        assert (patch_quality(all_patches(blurred(scaled, 0.5, mpp)), mpp) == "").all()


def test_what_cannot_be_judged_passes():
    soft = blurred(tissue_image(), 2)
    assert (patch_quality(all_patches(soft), 2.0) == "").all()  # so coarse that 2 um is a pixel
    assert (patch_quality(all_patches(soft, 32), MPP) == "").all()  # 16 um wide
    assert patch_quality(np.zeros((0, 8, 8, 3), np.uint8), MPP).tolist() == []


@pytest.mark.parametrize("size", [1, 5, 37, 250])
def test_any_patch_size_will_do(size):
    assert patch_quality(plain(GLASS, size), MPP).tolist() == [WHITE]
    assert patch_quality(plain(PINK, size), MPP).tolist() == [""]


def test_an_unknown_mpp_is_taken_for_the_usual_one():
    patches = np.concatenate([all_patches(tissue_image()), all_patches(blurred(tissue_image(), 2))])
    np.testing.assert_array_equal(patch_quality(patches, None), patch_quality(patches, QUALITY_SETTINGS.assumed_mpp))


def test_the_settings_say_everything():
    told = QUALITY_SETTINGS.as_dict()
    assert json.loads(json.dumps(told)) == told
    lenient = QualitySettings(min_focus=0.0, min_stained=0.0, max_ink=1.0)
    patches = np.concatenate([all_patches(blurred(tissue_image(), 2)), plain(GLASS), plain(GREEN_INK)])
    assert set(patch_quality(patches, MPP)) == set(REASONS)
    assert (patch_quality(patches, MPP, lenient) == "").all()


@pytest.mark.parametrize("every", [24, pytest.param(8, marks=pytest.mark.slow)])
def test_real_tissue_sharp_and_blurred(shared_data, every):
    """Of colon and skin in focus nothing is dropped; of what is blurred by 2 to 10 um nearly all."""
    files = sorted((shared_data / "glas" / "images").iterdir())[::every]
    judged = {blur: [] for blur in (0, 2, 7, 10)}
    for path, mpp in [(file, 0.62) for file in files] + [(shared_data / "slides" / "CMU-1-Small-Region.svs", 0.499)]:
        with open_slide(path) as slide:
            image = slide.read_region(0, 0, 0, min(slide.width, 1024), min(slide.height, 1024))
            grid = patch_grid(image.shape[1], image.shape[0], PATCH, PATCH)
            mask = detect_tissue(slide).mask
            grid = grid[covered_fraction(mask, grid, PATCH, slide.width, slide.height) >= 0.5]
        for blur, found in judged.items():
            found.extend(patch_quality(patches_of(blurred(image, blur, mpp) if blur else image, grid), mpp))
    assert len(judged[0]) > 640 / every
    assert set(judged[0]) == {""}
    caught = {blur: np.mean([reason == BLURRED for reason in found]) for blur, found in judged.items()}
    assert caught[2] > 0.98
    assert caught[7] > 0.9
    assert caught[10] > 0.85


def test_real_crops_of_pen_and_glass(shared_data):
    expected = {
        "no-tissue": {WHITE},
        "no-tissue2": {WHITE},
        "no-tissue-line": {WHITE},
        "almost-white-1": {WHITE},
        "tissue-level0-4302-10273-4814-10785": {""},
        "medium-nuclei-score-level0": {""},
        "very-low-nuclei-score-level0": {""},
    }
    for name, reasons in expected.items():
        with open_slide(shared_data / "tiles" / f"{name}.png") as slide:
            image = slide.read_region(0, 0, 0, slide.width, slide.height)
        assert set(patch_quality(all_patches(image), MPP)) == reasons, name
    with open_slide(shared_data / "tiles" / "no-tissue-green-pen.png") as slide:
        image = slide.read_region(0, 0, 0, slide.width, slide.height)
    assert (patch_quality(all_patches(image), MPP) == PEN).sum() >= 3  # the fourth shows the stroke's end


def test_small_patches_are_not_called_pen(shared_data):
    """A dark nucleus fills a fifth of 32 um."""
    with open_slide(shared_data / "slides" / "CMU-1-Small-Region.svs") as slide:
        image = slide.read_region(0, 0, 0, slide.width, slide.height)
    grid = patch_grid(image.shape[1], image.shape[0], 64, 64)
    assert PEN not in patch_quality(np.stack([image[y : y + 64, x : x + 64] for x, y in grid]), 0.499)
