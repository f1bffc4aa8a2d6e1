"""Grids and covered fractions against slow, plain counting."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.core.geometry import covered_fraction, level0_size, patch_grid, usable_extent


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 120), st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_the_grid_is_every_multiple_of_the_stride_that_fits(width, height, size, stride):
    grid = patch_grid(width, height, size, stride)
    expected = [
        (x, y)
        for y in range(0, max(height, 1), stride)
        for x in range(0, max(width, 1), stride)
        if x + size <= width and y + size <= height
    ]
    assert grid.dtype == np.int64
    assert grid.shape == (len(expected), 2)
    assert [tuple(corner) for corner in grid.tolist()] == expected


@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 120), st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_a_kept_edge_adds_one_place_along_each_axis_where_something_is_left(width, height, size, stride):
    regular, kept = patch_grid(width, height, size, stride), patch_grid(width, height, size, stride, 1)
    if not len(regular):
        assert not len(kept)
        return
    places = [sorted({*regular[:, axis].tolist(), (width, height)[axis] - size}) for axis in (0, 1)]
    assert kept.tolist() == [[x, y] for y in places[1] for x in places[0]]


def test_a_remainder_below_the_least_is_none():
    assert patch_grid(203, 200, 100, 100, 4).tolist() == patch_grid(203, 200, 100, 100).tolist()
    assert patch_grid(204, 200, 100, 100, 4).tolist() == [[x, y] for y in (0, 100) for x in (0, 100, 104)]


def test_a_slide_of_exactly_one_patch_has_one_and_a_smaller_one_none():
    assert patch_grid(256, 256, 256, 256).tolist() == [[0, 0]]
    assert patch_grid(255, 256, 256, 256).shape == (0, 2)
    assert patch_grid(256, 255, 256, 256).shape == (0, 2)


@pytest.mark.parametrize(("size", "stride"), [(0, 10), (10, 0), (10, -1)])
def test_a_size_or_stride_below_one_is_refused(size, stride):
    with pytest.raises(ValueError, match="at least 1"):
        patch_grid(100, 100, size, stride)


def exact_fraction(mask, x, y, size, width, height):
    """Exact rational overlap of a footprint with each marked cell."""
    rows, columns = mask.shape
    cell_x, cell_y = Fraction(width, columns), Fraction(height, rows)
    total = Fraction(0)
    for row, column in zip(*np.nonzero(mask), strict=True):
        across = min((int(column) + 1) * cell_x, Fraction(x + size)) - max(int(column) * cell_x, Fraction(x))
        down = min((int(row) + 1) * cell_y, Fraction(y + size)) - max(int(row) * cell_y, Fraction(y))
        total += max(across, Fraction(0)) * max(down, Fraction(0))
    return float(total / size**2)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_covered_fraction_equals_exact_overlap(data):
    rows, columns = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    width, height = data.draw(st.integers(20, 200)), data.draw(st.integers(20, 200))
    seed = data.draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.5
    size = data.draw(st.integers(1, 60))
    # Some footprints hang over the slide's edge: what is outside is unmarked.
    coords = np.stack([rng.integers(-10, width, 5), rng.integers(-10, height, 5)], axis=1)
    expected = [exact_fraction(mask, x, y, size, width, height) for x, y in coords.tolist()]
    np.testing.assert_allclose(covered_fraction(mask, coords, size, width, height), expected, atol=1e-9)


def test_covered_fraction_uses_the_scale_of_each_axis():
    mask = np.zeros((10, 40), dtype=bool)
    mask[:, :10] = True  # the left quarter of the slide
    fractions = covered_fraction(mask, np.array([[0, 0], [50, 300], [100, 0], [75, 100]]), 100, 400, 400)
    np.testing.assert_allclose(fractions, [1.0, 0.5, 0.0, 0.25])
    assert fractions.dtype == np.float64


def test_covered_fraction_of_no_patches_is_empty():
    assert covered_fraction(np.ones((3, 3), bool), np.empty((0, 2), np.int64), 10, 30, 30).shape == (0,)


@given(st.integers(1, 200_000), st.integers(1, 64))
def test_a_level_that_shows_all_of_the_slide_loses_nothing_to_rounding(extent, factor):
    level = max(1, extent // factor)
    assert usable_extent(extent, level, extent / level) == extent


def test_a_level_that_was_cut_shows_less_than_the_slide():
    assert int(49 * (1 / 49)) == 0  # what float arithmetic does unguarded
    assert usable_extent(1, 49, 1 / 49) == 1
    assert usable_extent(1101, 550, 1101 / 550) == 1101
    assert usable_extent(300, 37, 8.086312118570184) == 299
    assert usable_extent(250, 31, 8.086312118570184) == 250
    assert usable_extent(1000, 500, 2.0) == 1000


def test_level0_size_rounds():
    assert level0_size(256, 4.0) == 1024
    assert level0_size(100, 4.016129) == 402
    assert level0_size(1, 0.2) == 1
