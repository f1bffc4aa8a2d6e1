"""A planted region found again to the pixel: by heatmap, GeoJSON, patches and npz, from a slide and from its features.

The slide is synthetic: pinkish squares everywhere, and one square region of bluish ones. The model is written by hand:
it attends to what holds much haematoxylin. The pictures are compared with those in `golden/`; delete one to have it
written anew, and look at it before it is committed.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from MILS import build_mil
from tests.drawing import drawn_coarsely
from tests.synthetic import write_pyramid
from utils.bags.store import read_bag
from utils.core.plots import save_figure
from utils.features.extractor import WSIFeatureExtractor
from utils.pictures.heatmap import save_picture
from utils.pictures.visualizer import AttentionVisualizer
from utils.prediction.checkpoint import Checkpoint, save_checkpoint
from utils.prediction.forward_pass import SlideFeed

GOLDEN = Path(__file__).with_name("golden")
WIDTH, HEIGHT, MPP = 960, 768, 0.5
REGION = 192, 384  # from and to, along x and y; whole patches of every recipe below
PINK, BLUE = (222, 150, 190), (92, 72, 160)
# Patch sizes in level-0 px: 64, 64 (32 px at level 1) and 48 (32 px at 0.75 um/px).
RECIPES = {
    "level 0": ({"patch_size": 64, "level": 0}, 64),
    "level 1": ({"patch_size": 32, "level": 1}, 64),
    "0.75 um": ({"patch_size": 32, "mpp": 0.75}, 48),
}


def planted_image() -> np.ndarray:
    image = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    image[:] = PINK
    image[::16] = image[:, ::16] = (244, 236, 240)  # lines, so that a patch's pixels tell where it was cut
    image[slice(*REGION), slice(*REGION)] = BLUE
    return image


def write_model(path: Path, bag) -> None:
    """LiteMIL of one head: h is (1, 0, ...) or (0, 1, ...) as the first feature is above or below what lies between the
    two tissues, and the score is 4 h_0.
    """
    first = bag.features[:, 0].astype(np.float64)
    between = (first.min() + first.max()) / 2
    model = build_mil("LiteMIL", input_dim=bag.features.shape[1], num_classes=2, hidden_dim=4, num_heads=1, dropout=0.0)
    sign = 1.0 if first[in_region(bag.coords, bag.patch_size_level0)].mean() > between else -1.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        linear, norm = model.stream.project[0], model.stream.project[1]
        linear.weight[0, 0], linear.weight[1, 0] = sign, -sign
        linear.bias[0], linear.bias[1] = -sign * between, sign * between
        norm.weight.fill_(1)
        model.stream.attn.in_proj_bias[0] = 1  # the query
        model.stream.attn.in_proj_weight[4, 0] = 4.0  # the key, of h_0
        model.classifier[-1].bias[1] = 2.0
    save_checkpoint(
        path,
        Checkpoint(
            model.spec, model.state_dict(), ("without", "with region"), "golden", SlideFeed(None, "merge").as_dict(),
            bag.passport.recipe, None, {}, {"slide": [], "case": []},
        ),
    )  # fmt: skip


def in_region(coords: np.ndarray, size: int) -> np.ndarray:
    return ((coords >= REGION[0]) & (coords + size <= REGION[1])).all(axis=1)


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "planted.tif"
    return write_pyramid(path, planted_image(), mpp=MPP, downsamples=(1, 2))


@pytest.fixture
def heatmaps_alone_are_drawn(monkeypatch) -> None:
    """Draw heatmaps with fewer dots than in use, and leave the other figures of the set empty: no golden picture is of
    them.
    """

    def save(figure, path) -> None:
        if path.name.endswith("_heatmap.png"):
            save_figure(figure, path, dpi=100, tight=False)
            return
        with drawn_coarsely(blank=("png",)):
            save_picture(figure, path)

    monkeypatch.setattr("utils.pictures.picture_set.save_picture", save)


@pytest.fixture(params=["level 0", pytest.param("level 1", marks=pytest.mark.slow), "0.75 um"])
def predicted(request, slide, heatmaps_alone_are_drawn, script, tmp_path):
    """The set from the slide itself and from its feature file, and the patches' size."""
    settings, size = RECIPES[request.param]
    extractor = WSIFeatureExtractor("stain", tissue_threshold=0, device="cpu", **settings)
    extractor.extract_to(slide, tmp_path / "features" / "planted.h5")
    write_model(tmp_path / "model.pth", read_bag(tmp_path / "features" / "planted.h5"))
    flags = ("--checkpoint", tmp_path / "model.pth", "--visualize", "--top_k", 9, "--device", "cpu")
    for name, source in (
        ("raw", ("--input", slide)),
        ("cut", ("--input", tmp_path / "features" / "planted.h5", "--wsi", slide)),
    ):
        outcome = script("predict", *flags, *source, "--output_dir", tmp_path / name)
        assert outcome.code == 0, outcome.err
    return request.param, tmp_path / "raw", tmp_path / "cut", size


def test_the_planted_region_is_found_to_the_pixel(predicted, slide):
    recipe, raw, cut, size = predicted
    patches = [path.relative_to(raw) for path in (raw / "planted_top_patches").iterdir()]
    for name in ("planted_heatmap.png", "planted_attention.npz", "planted_attention.geojson", *patches):
        assert (raw / name).read_bytes() == (cut / name).read_bytes(), name
    number = ((REGION[1] - REGION[0]) // size) ** 2
    found = np.load(raw / "planted_attention.npz")
    inside = in_region(found["coords"], size)
    assert (len(found["coords"]), inside.sum()) == ((WIDTH // size) * (HEIGHT // size), number)
    assert found["attention"][inside].min() > 10 * found["attention"][~inside].max()
    assert found["patch_size_level0"] == size

    _check_geojson(raw / "planted_attention.geojson", number)
    _check_patches(raw / "planted_top_patches", size)
    _check_pixels(slide, found, size)
    _check_golden(raw / "planted_heatmap.png", GOLDEN / f"heatmap_{recipe.replace(' ', '_')}.png")


def _check_geojson(path: Path, number: int) -> None:
    """The tiles of the highest attention cover the region, each part once, and nothing else."""
    features = json.loads(path.read_text())["features"]
    ranked = sorted(features, key=lambda feature: feature["properties"]["measurements"]["Attention rank"])
    covered = np.zeros((HEIGHT, WIDTH), int)
    for feature in ranked[:number]:
        ring = np.array(feature["geometry"]["coordinates"][0])
        assert (ring == ring.astype(int)).all()
        (x0, y0), (x1, y1) = ring.astype(int).min(axis=0), ring.astype(int).max(axis=0)
        covered[y0:y1, x0:x1] += 1
    expected = np.zeros_like(covered)
    expected[slice(*REGION), slice(*REGION)] = 1
    np.testing.assert_array_equal(covered, expected)


def _check_patches(folder: Path, size: int) -> None:
    table, image = pd.read_csv(folder / "patches.csv"), planted_image()
    top = table[table["file"].str.startswith("top_")]
    assert len(top) == 9
    assert in_region(top[["x", "y"]].to_numpy(), size).all()
    assert not in_region(table[~table["file"].str.startswith("top_")][["x", "y"]].to_numpy(), size).any()
    for _, row in table.iterrows():
        pixels = np.asarray(Image.open(folder / row["file"]))
        np.testing.assert_array_equal(pixels, image[row["y"] : row["y"] + size, row["x"] : row["x"] + size])


def _check_pixels(slide: Path, found, size: int) -> None:
    """The heatmap's own pixels: the region has the highest value, all else another; no pixel between."""
    visualizer = AttentionVisualizer(alpha=1.0, scale="attention")
    figure = visualizer.visualize_full_attention(slide, found["coords"], found["attention"], size, top_k=1)
    heat = np.ma.filled(figure.axes[0].images[-1].get_array(), np.nan)
    if heat.ndim == 3:  # colours: the region's own colour and no other's
        values = (
            heat[..., :3]
            == heat[(REGION[0] + 5) * heat.shape[0] // HEIGHT, (REGION[0] + 5) * heat.shape[1] // WIDTH, :3]
        ).all(-1)
    else:
        values = heat > np.nanmax(heat) / 2
    rows, columns = np.flatnonzero(values.any(axis=1)), np.flatnonzero(values.any(axis=0))
    scale = heat.shape[0] / HEIGHT
    assert [rows[0], rows[-1] + 1] == [round(edge * scale) for edge in REGION]
    assert [columns[0], columns[-1] + 1] == [round(edge * heat.shape[1] / WIDTH) for edge in REGION]
    assert values[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def _check_golden(path: Path, golden: Path) -> None:
    if not golden.exists():
        golden.parent.mkdir(exist_ok=True)
        Image.open(path).convert("RGB").quantize(128).save(golden, optimize=True)
        pytest.fail(f"{golden} was not there; it is written: look at it, then commit it")
    found, expected = (np.asarray(Image.open(one).convert("RGB"), dtype=float) for one in (path, golden))
    assert found.shape == expected.shape
    # Another version of a font moves a few pixels of the letters; the colours of the golden one are rounded.
    assert np.abs(found - expected).mean() < 2
    assert (np.abs(found - expected).max(axis=-1) > 40).mean() < 0.005
