"""The pictures of an extraction: what they show where, and how large they get."""

import time

import numpy as np
import pytest
from PIL import Image, ImageFont

from utils.core.fonts import font_file
from utils.core.geometry import covered_fraction, patch_grid
from utils.slides.preview import LITTLE_TISSUE, MAX_SIDE, draw_preview, write_preview
from utils.slides.quality import REASONS

SIZE, PATCH = (8000, 6000), 400
NONE = np.empty((0, 2), dtype=np.int64)
TOP = 24  # px of the title above the picture


def drawn(
    thumbnail=None, size=SIZE, kept=NONE, dropped=None, size_level0=PATCH, mask=None, mpp=None, title="a slide", **more
):
    thumbnail = np.full((600, 800, 3), 240, dtype=np.uint8) if thumbnail is None else thumbnail
    dropped = dropped or {}
    return np.asarray(
        draw_preview(
            thumbnail,
            size,
            kept=kept,
            dropped=dropped,
            size_level0=size_level0,
            mask=mask,
            mpp=mpp,
            title=title,
            **more,
        )
    )


def changed(image, shape=(600, 800)):
    """(h, w) bool: where the drawing over a plain thumbnail is."""
    return (image[TOP : TOP + shape[0], : shape[1]] != 240).any(axis=-1)


def test_a_patch_is_outlined_where_it_is():
    outline = changed(drawn(kept=np.array([[2000, 1000]])))
    rows, columns = np.nonzero(outline)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (100, 140, 200, 240)
    assert outline.sum() == 4 * 40  # the outline alone
    assert not changed(drawn()).any()


def test_neighbours_share_an_edge_and_the_last_patch_shows():
    grid = patch_grid(*SIZE, PATCH, PATCH)
    outline = changed(drawn(kept=grid))
    assert outline[::40].all()
    assert outline[:, ::40].all()
    inner = outline.reshape(15, 40, 20, 40)[:, 1:-1, :, 1:-1]
    assert not inner.any()
    assert outline[-1].all()
    assert outline[:, -1].all()


def test_each_reason_has_a_colour_of_its_own_and_fills_its_patches():
    corners = patch_grid(*SIZE, PATCH, PATCH)
    dropped = {reason: corners[index : index + 1] for index, reason in enumerate([*REASONS, "something else"])}
    image = drawn(dropped=dropped)
    middles = [tuple(image[TOP + 20, 20 + 40 * index].tolist()) for index in range(len(dropped))]
    assert len(set(middles)) == len(dropped)
    assert (240, 240, 240) not in middles


def test_patches_with_little_tissue_are_shaded_faintly_but_for_what_was_kept():
    grid = patch_grid(*SIZE, PATCH, PATCH // 2)
    kept = grid[(grid == 2000).all(axis=1)]
    image = drawn(dropped={LITTLE_TISSUE: grid[~(grid == 2000).all(axis=1)]}, kept=kept)
    assert 200 < image[TOP + 310, 310].mean() < 240  # between the lines of the grid
    assert (image[TOP + 201 : TOP + 240, 201:240] == 240).all()
    assert changed(drawn(dropped={LITTLE_TISSUE: grid[:1]}, kept=NONE)).sum() == 41 * 41  # all of it


def test_names_and_units_are_written_in_letters_that_the_font_has():
    font = ImageFont.truetype(font_file(""), 12)
    missing = font.getmask("\ufffe")
    for letter in "µéüßłΩЖ":
        mask = font.getmask(letter)
        assert (mask.size, bytes(mask)) != (missing.size, bytes(missing))


def test_small_patches_are_drawn_as_their_union():
    grid = patch_grid(*SIZE, 10, 10)
    left = grid[grid[:, 0] < SIZE[0] // 2]
    covered = changed(drawn(kept=left, size_level0=10))
    assert covered[:, :400].all()
    assert not covered[:, 400:].any()
    assert changed(drawn(kept=left[:1], size_level0=1)).sum() == 1  # far smaller than a pixel, and yet seen


def test_the_tissue_and_its_holes_are_outlined():
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:50, 10:60] = True
    mask[20:30, 20:30] = False
    rim = changed(drawn(mask=mask))
    assert rim[100, 100:600].all()
    assert rim[100:500, 100].all()
    assert rim[199, 200:300].all()  # the hole's
    assert not rim[:, :100].any()
    assert not rim[202:298, 202:298].any()
    assert not rim[300:400, 400:500].any()


def test_the_legend_counts_and_the_bar_needs_an_mpp():
    plain, with_bar = drawn(), drawn(mpp=0.5)
    assert with_bar.shape[0] > plain.shape[0]
    many = drawn(dropped={f"reason number {number}": np.array([[0, 0]]) for number in range(12)})
    assert many.shape[0] > plain.shape[0] + 24  # wrapped
    bar = (with_bar[TOP + 600 + 12, 10:211] == 0).all(axis=-1)  # 1 mm at 5 um/px
    assert bar.all()
    assert (with_bar[TOP + 600 + 12, 211:216] == 255).all()


@pytest.mark.parametrize(
    ("shape", "size"),
    [((40, 50), (50, 40)), ((1, 3000), (300_000, 100)), ((3000, 1), (1, 3000)), ((2400, 2000), (20_000, 24_000))],
)
def test_the_picture_is_neither_large_nor_tiny(shape, size):
    thumbnail = np.full((*shape, 3), 200, dtype=np.uint8)
    mask = np.ones((max(1, shape[0] // 3), max(1, shape[1] // 3)), dtype=bool)
    image = drawn(thumbnail, size, kept=np.array([[0, 0]]), size_level0=10, mask=mask, mpp=0.5, title="name " * 200)
    assert max(image.shape) <= MAX_SIDE
    assert max(image.shape) >= 480


def test_a_small_slide_is_enlarged():
    tiny = np.full((40, 50, 3), 240, dtype=np.uint8)
    rows, columns = np.nonzero(changed(drawn(tiny, (50, 40), kept=np.array([[10, 10]]), size_level0=20), (384, 480)))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (96, 288, 96, 288)


def test_a_million_patches_are_quick(tmp_path):
    size = 100_000, 100_000
    grid = patch_grid(*size, 100, 100)
    mask = np.zeros((500, 500), dtype=bool)
    mask[100:400, 100:300] = True
    tissue = covered_fraction(mask, grid, 100, *size) >= 0.5
    thumbnail = np.full((1000, 1000, 3), 240, dtype=np.uint8)
    start = time.perf_counter()
    draw_preview(
        thumbnail, size, kept=grid[tissue], dropped={LITTLE_TISSUE: grid[~tissue]}, size_level0=100, mask=mask, mpp=0.5
    )
    assert time.perf_counter() - start < 5


def test_the_file_stays_small_even_for_noise(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1100, 3)).astype(np.uint8)
    preview = draw_preview(noise, (1100, 1100), kept=NONE, dropped={}, size_level0=10)
    write_preview(tmp_path / "new" / "noise.jpg", preview)
    assert (tmp_path / "new" / "noise.jpg").stat().st_size < 300_000
    assert Image.open(tmp_path / "new" / "noise.jpg").size == preview.size
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["noise.jpg"]
