"""Pictures as a journal prints them: numbers beside small patches, colours of the bar as on the map, memory bounded."""

import weakref

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from tests.pictures.test_visualizer import RECORD
from tests.synthetic import place_image, write_pyramid
from utils.core.geometry import patch_grid
from utils.pictures import top_patches
from utils.pictures.attention_map import AttentionMap
from utils.pictures.evidence_map import CMAP, EvidenceMap, EvidenceOverlay
from utils.pictures.heatmap import evidence_figure, heatmap_figure, save_picture
from utils.pictures.overlay import MapStyle, Overlay, Picture
from utils.pictures.visualizer import AttentionVisualizer
from utils.slides.open_slides import open_slide


def overlays(size_level0, alpha=0.5, shape=(300, 400)):
    height, width = 10 * shape[0], 10 * shape[1]
    coords = patch_grid(width, height, size_level0, size_level0)
    attention = AttentionMap(coords, np.arange(1, len(coords) + 1) / np.arange(1, len(coords) + 1).sum(), size_level0)
    picture = Picture(np.full((*shape, 3), 255, np.uint8), width, height, 0.5)
    values = np.linspace(-1, 1, len(coords))[None].astype(np.float32)
    evidence = EvidenceMap(["a"], values, np.zeros(1), np.zeros(1))
    return Overlay(picture, attention, MapStyle(alpha=alpha)), EvidenceOverlay(picture, attention, evidence, "a")


@pytest.mark.parametrize("shape", [(300, 400), (40, 400), (400, 40)])
@pytest.mark.parametrize("size", [20, 60, 100, 200])
def test_no_number_covers_its_patch(size, shape):
    overlay, evidence = overlays(size, shape=shape)
    figures = (
        heatmap_figure(overlay, title="", top_k=5),
        evidence_figure(evidence, title="", text="", top_k=5, alpha=0.5),
    )
    for figure in figures:
        figure.draw_without_rendering()
        axes = figure.axes[0]
        numbers = [text for text in axes.texts if text.get_text().isdigit()]
        assert [number.get_text() for number in numbers] == ["1", "2", "3", "4", "5"]
        outlines = [patch for patch in axes.patches if not patch.get_fill() and patch.get_linestyle() == "-"]
        for number, outline in zip(numbers, outlines, strict=True):
            text, patch = number.get_window_extent(), outline.get_window_extent()
            width, height = (
                max(0, min(text.p1[axis], patch.p1[axis]) - max(text.p0[axis], patch.p0[axis])) for axis in (0, 1)
            )
            assert width * height <= 0.35 * patch.width * patch.height


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1])
def test_the_colour_bar_has_the_colours_of_the_map_over_white(alpha):
    overlay, evidence = overlays(100, alpha)
    for figure, cmap in (
        (heatmap_figure(overlay, title="", top_k=0), colormaps["viridis"]),
        (evidence_figure(evidence, title="", text="", top_k=0, alpha=alpha), CMAP),
    ):
        painted = np.asarray(figure.axes[0].images[1].get_array())
        over_white = painted[..., :3] * painted[..., 3:] + 1 - painted[..., 3:]
        figure.draw_without_rendering()
        (solids,) = [mesh for mesh in figure.axes[1].collections if len(mesh.get_facecolor()) > 100]
        colours = solids.get_facecolor()[:, :3]
        np.testing.assert_allclose(
            colours[[0, -1]], np.array([cmap(0.0), cmap(1.0)])[:, :3] * alpha + 1 - alpha, atol=0.01
        )
        np.testing.assert_allclose(over_white[0, 0], colours[0], atol=0.02)
        np.testing.assert_allclose(over_white[-1, -1], colours[-1], atol=0.02)


def test_pictures_have_300_dpi(tmp_path):
    save_picture(heatmap_figure(overlays(100)[0], title="", top_k=0), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_patches_at_full_resolution_are_not_held_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(top_patches, "PAGE_SIDE", 32)
    monkeypatch.setattr(top_patches, "GRID_SIDE", 20)
    monkeypatch.setattr("utils.pictures.picture_set.save_picture", lambda *_: None)
    monkeypatch.setattr("utils.pictures.picture_set.write_report", lambda *_: None)
    path = write_pyramid(tmp_path / "place.tiff", place_image(640, 640), mpp=0.25, tile=256)
    coords = patch_grid(640, 640, 40, 40)
    attention = np.random.default_rng(1).random(len(coords))
    read = []
    with open_slide(path) as slide:
        region = slide.read_region

        def read_region(*arguments):
            pixels = region(*arguments)
            read.append(weakref.ref(pixels))
            assert sum(reference() is not None for reference in read) <= 3
            return pixels

        monkeypatch.setattr(slide, "read_region", read_region)
        AttentionVisualizer().save_set(slide, tmp_path, coords, attention[None] / attention.sum(), 40, RECORD, top_k=60)
        top, _ = top_patches.read_extremes(slide, AttentionMap(coords, attention, 40), 60)
    assert [patch.pixels.shape[0] for patch in top] == [32] * 24 + [20] * 26
    files = list((tmp_path / "place_top_patches").glob("*.png"))
    assert len(files) == 120
    assert Image.open(files[0]).size == (40, 40)  # files are at full resolution
