import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps

from utils.core.errors import ConfigError
from utils.core.geometry import patch_grid
from utils.pictures.attention_map import AttentionMap
from utils.pictures.heatmap import detailed_figure, heatmap_figure, patch_grid_figure
from utils.pictures.overlay import MapStyle, Overlay, Picture


def rasterise(coords, values, size, extent, shape):
    return AttentionMap(coords, np.full(len(coords), 1 / len(coords)), size).raster(values, extent, shape)


def percentiles(attention):
    return AttentionMap(np.zeros((len(attention), 2), dtype=np.int64), attention, 1).percentiles


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
    overlay = Overlay(picture, AttentionMap(coords, attention, 100), MapStyle(alpha=1.0))
    figure = heatmap_figure(overlay, title="synthetic", top_k=1)
    painted = figure.axes[0].images[1].get_array()
    assert painted is not None
    x, y = coords[23] // 10
    planted = np.asarray(painted)[y : y + 10, x : x + 10]
    np.testing.assert_allclose(
        planted[..., :3], np.broadcast_to([0.993248, 0.906157, 0.143936], (10, 10, 3)), atol=1e-5
    )
    assert (np.asarray(painted)[30:, :, 3] == 0).all()  # 50 patches are two and a half rows of ten pixels
    label = figure.axes[1].get_ylabel()
    assert "percentile" in label
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["200 µm", "1"]


def test_an_unknown_resolution_has_no_scale_bar():
    picture = Picture(np.zeros((10, 10, 3), np.uint8), 100, 100, None)
    overlay = Overlay(picture, AttentionMap(np.array([[0, 0]]), np.ones(1), 50), MapStyle("jet"))
    figure = heatmap_figure(overlay, title="", top_k=0)
    assert not figure.axes[0].texts


def test_an_unknown_colour_map_is_named():
    with pytest.raises(ConfigError, match="--cmap rainbows"):
        MapStyle("rainbows")
    with pytest.raises(ConfigError, match="--scale 'rank': expected one of attention, percentile"):
        MapStyle(scale="rank")
    with pytest.raises(ConfigError, match="--alpha 5: out of range; give a number from 0 to 1"):
        MapStyle(alpha=5)


def test_the_scale_of_attention_begins_at_nothing_and_says_so():
    picture = Picture(np.full((20, 40, 3), 200, np.uint8), 40, 20, None)
    attention = AttentionMap(patch_grid(40, 20, 10, 10), np.arange(8) / 28, 10)
    style = MapStyle(scale="attention", alpha=1.0)
    painted = Overlay(picture, attention, style).colours
    np.testing.assert_allclose(painted[0, 0, :3], colormaps["viridis"](0.0)[:3])
    np.testing.assert_allclose(painted[15, 35, :3], colormaps["viridis"](1.0)[:3])
    np.testing.assert_allclose(painted[15, 5, :3], colormaps["viridis"](4 / 7)[:3], atol=0.01)
    assert style.label(attention) == "attention, which sums to 1 over 8 patches (highest: 2 x uniform)"


@pytest.mark.parametrize(("top", "least"), [(1, 0), (3, 2), (5, 5), (7, 6)])
def test_patch_grid_of_any_number(top, least):
    patches = [np.full((8, 8, 3), index, np.uint8) for index in range(top + least)]
    names = [str(index) for index in range(top + least)]
    figure = patch_grid_figure(
        [("most attended", "top", patches[:top], names[:top]), ("least attended", "least", patches[top:], names[top:])],
        "synthetic",
    )
    shown = [axes for part in figure.subfigs for axes in part.axes if axes.images]
    assert [axes.get_title() for axes in shown] == names
    assert [part.get_suptitle() for part in figure.subfigs] == ["most attended", "least attended"][: 1 + bool(least)]


def test_the_detailed_figure_says_how_concentrated_attention_is():
    picture = Picture(np.full((60, 80, 3), 200, np.uint8), 800, 600, 0.5)
    weights = np.r_[0.4, 0.2, np.full(46, 0.4 / 46)]
    attention = AttentionMap(patch_grid(800, 600, 100, 100), weights, 100)
    assert attention.half_count == 2
    figure = detailed_figure(
        Overlay(picture, attention, MapStyle()),
        title="t",
        top_k=3,
        probabilities={"a": 0.25, "b": 0.75},
        facts=[("model", "LiteMIL")],
        marked=["a"],
    )
    above, below = figure.subfigs
    distribution, concentration, classes, text = below.axes
    assert concentration.get_title() == "half is held by 2 of 48 (4.2%)"
    assert [bar.get_width() for bar in classes.patches] == [0.25, 0.75]
    assert [bar.get_facecolor()[0] < 0.5 for bar in classes.patches] == [True, False], "the answer, not the largest"
    assert "LiteMIL" in text.texts[0].get_text()
    assert sum(bar.get_height() for bar in distribution.patches) == 48
    assert len(above.axes) == 3  # slide, heatmap, colour bar


def test_most_and_least_attended_never_overlap():
    attention = AttentionMap(np.zeros((5, 2), dtype=np.int64), np.array([0.1, 0.3, 0.1, 0.2, 0.3]), 1)
    assert attention.top(2).tolist() == [1, 4]
    assert attention.lowest(2).tolist() == [2, 0]
    assert attention.top(3).tolist() == [1, 4, 3]
    assert attention.lowest(3).tolist() == [2, 0]
    assert attention.ranks.tolist() == [4, 1, 5, 3, 2]
    assert attention.lowest(9).tolist() == []
