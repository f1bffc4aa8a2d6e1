"""Slides drawn by rule: what OpenSlide makes of them, that a seed draws one slide, and that the mask is the lesion."""

import numpy as np
import openslide
import pytest

from datasets.synthetic import DESCRIPTION, MASK_PX, MPP, PATTERNS, SITES, Patient, draw_slide, write_slide
from utils.slides.open_slides import open_slide

SIZE = 1024, 768


def drawn(pattern="glandular", site="A", seed=1):
    rng = np.random.default_rng(seed)
    return draw_slide(Patient.random(pattern, site, rng), *SIZE, rng)


@pytest.mark.parametrize(("name", "vendor"), [("slide.tif", "generic-tiff"), ("slide.svs", "aperio")])
def test_it_is_a_pyramid_with_a_resolution_that_says_it_is_synthetic(tmp_path, name, vendor):
    image = drawn().image
    write_slide(tmp_path / name, image, "A")
    with openslide.OpenSlide(tmp_path / name) as slide:
        assert slide.level_dimensions == (SIZE, (256, 192))
        assert slide.properties["openslide.vendor"] == vendor
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(MPP)
        assert DESCRIPTION in slide.properties["tiff.ImageDescription"]
        assert list(slide.associated_images) == (["thumbnail"] if vendor == "aperio" else [])
        read = np.asarray(slide.read_region((0, 0), 0, SIZE).convert("RGB")).astype(int)
    assert abs(read - image).mean() < 3  # JPEG's own loss
    with open_slide(tmp_path / name) as slide:
        assert slide.mpp == pytest.approx(MPP)


def test_a_seed_draws_one_slide_and_another_seed_another(tmp_path):
    one, again, other = (drawn(seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.image, again.image)
    assert (one.image != other.image).mean() > 0.5
    for name in ("a.tif", "b.tif"):
        write_slide(tmp_path / name, one.image, "A")
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("site", SITES)
def test_the_mask_is_where_the_nuclei_are_dense(pattern, site):
    image, lesion = drawn(pattern, site, seed=3)
    assert 0.15 < lesion.mean() < 0.4
    dark = image.mean(axis=2) < 130
    assert dark[lesion].mean() > 3 * dark[~lesion].mean()
    mask = np.asarray(drawn(pattern, site, seed=3).lesion_image())
    assert mask.shape == (SIZE[1] // MASK_PX, SIZE[0] // MASK_PX)
    assert mask.mean() == pytest.approx(lesion.mean(), abs=0.01)
