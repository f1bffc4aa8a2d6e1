import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.core.errors import ConfigError
from utils.core.geometry import patch_grid
from utils.pictures.heatmap import Picture, checked_colormap, heatmap_figure, patch_grid_figure, percentiles, rasterise


def painted_slowly(coords, values, size, extent, shape):
    """Each patch painted by a loop: edges rounded as halves to even, overlaps averaged."""
    total, count = np.zeros(shape), np.zeros(shape)
    scale = np.array([shape[1] / extent[0], shape[0] / extent[1]])
    for corner, value in zip(coords, values, strict=True):
        x0, y0 = np.minimum(np.round(corner * scale).astype(int), (shape[1] - 1, shape[0] - 1))
        x1, y1 = np.maximum(np.round((corner + size) * scale).astype(int), (x0 + 1, y0 + 1))
        total[y0:y1, x0:x1] += value
        count[y0:y1, x0:x1] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


@given(
    st.integers(8, 40), st.integers(8, 40), st.integers(40, 300), st.integers(40, 300),
    st.integers(5, 60), st.integers(5, 60), st.integers(0, 9),
)  # fmt: skip
def test_each_patch_is_painted_at_its_footprint_and_overlaps_are_averaged(size, stride, width, height, w, h, seed):
    coords = patch_grid(width, height, size, stride)
    values = np.random.default_rng(seed).random(len(coords))
    expected = painted_slowly(coords, values, size, (width, height), (h, w))
    np.testing.assert_allclose(rasterise(coords, values, size, (width, height), (h, w)), expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(97, 131), (400, 512), (1000, 1280), (33, 17)])
def test_neighbours_leave_no_seam_and_nothing_lies_outside(shape):
    coords = patch_grid(1280, 1000, 256, 256)[:6]  # one row of five and one patch below
    heat = rasterise(coords, np.ones(6), 256, (1280, 1000), shape)
    covered = ~np.isnan(heat)
    rows = round(256 * shape[0] / 1000)
    assert covered[:rows].all()
    below = covered[rows:]
    assert below[: round(512 * shape[0] / 1000) - rows, : round(256 * shape[1] / 1280)].all()
    assert not below[:, round(256 * shape[1] / 1280) :].any()
    assert np.nanmin(heat) == np.nanmax(heat) == 1


def test_a_patch_smaller_than_a_pixel_still_shows():
    heat = rasterise(np.array([[5000, 5000]]), np.array([3.0]), 10, (10_000, 10_000), (50, 50))
    assert np.nansum(heat) == 3
    assert heat[25, 25] == 3
    assert np.nansum(rasterise(np.array([[299, 299]]), np.array([3.0]), 1, (300, 300), (10, 10))) == 3


def test_percentiles_rank_and_share_ties():
    np.testing.assert_allclose(percentiles(np.array([0.1, 0.7, 0.2])), [0, 100, 50])
    np.testing.assert_allclose(percentiles(np.full(4, 0.25)), 50)
    np.testing.assert_allclose(percentiles(np.array([1.0])), 50)


def test_the_figure_shows_the_planted_patch_and_only_patches():
    """Pixel by pixel: the overview outside the patches is untouched, the planted patch has the map's last colour."""
    picture = Picture(np.full((100, 200, 3), 200, np.uint8), 2000, 1000, 0.5)
    coords = patch_grid(2000, 1000, 100, 100)[:50]
    attention = np.full(50, 0.01)
    attention[23] = 0.51
    figure = heatmap_figure(
        picture, coords, attention, 100, title="synthetic", cmap="viridis", alpha=1.0, top=np.array([23])
    )
    overlay = figure.axes[0].images[1].get_array()
    assert overlay is not None
    x, y = coords[23] // 10
    planted = np.asarray(overlay)[y : y + 10, x : x + 10]
    np.testing.assert_allclose(
        planted[..., :3], np.broadcast_to([0.993248, 0.906157, 0.143936], (10, 10, 3)), atol=1e-5
    )
    assert (np.asarray(overlay)[30:, :, 3] == 0).all()  # 50 patches are two and a half rows of ten pixels
    label = figure.axes[1].get_ylabel()
    assert "percentile" in label
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["1", "200 µm"]


def test_an_unknown_resolution_has_no_scale_bar():
    picture = Picture(np.zeros((10, 10, 3), np.uint8), 100, 100, None)
    figure = heatmap_figure(
        picture, np.array([[0, 0]]), np.ones(1), 50, title="", cmap="jet", alpha=0.5, top=np.array([], dtype=np.int64)
    )
    assert not figure.axes[0].texts


def test_an_unknown_colour_map_is_named():
    with pytest.raises(ConfigError, match="--cmap rainbows"):
        checked_colormap("rainbows")


@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_patch_grid_of_any_number(count):
    patches = [np.full((8, 8, 3), index, np.uint8) for index in range(count)]
    figure = patch_grid_figure(patches, [str(index) for index in range(count)], "synthetic")
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == [str(index) for index in range(count)]
