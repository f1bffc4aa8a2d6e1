import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.synthetic import place_image, place_of, write_pyramid
from utils.bags.store import Bag
from utils.core.errors import ConfigError, FeatureFileError
from utils.core.geometry import patch_grid
from utils.core.passport import Passport
from utils.core.recipe import Recipe
from utils.pictures.attention_map import AttentionMap
from utils.pictures.prediction_caption import Caption, prediction_title
from utils.pictures.slide_match import check_drawable
from utils.pictures.top_patches import patch_width_text, read_shown
from utils.pictures.visualizer import AttentionVisualizer
from utils.slides.open_slides import open_slide

SIZE = 500, 400
COORDS = patch_grid(*SIZE, 50, 50)
ATTENTION = np.linspace(1, 2, len(COORDS)) / np.linspace(1, 2, len(COORDS)).sum()


RECORD = {
    "slide": "place", "predicted_class": "b", "confidence": 0.7, "probabilities": {"a": 0.3, "b": 0.7},
    "mode": "chunked", "chunk_size": 1000, "seen_in_training": True, "model": {"name": "LiteMIL", "num_heads": 4},
    "checkpoint": "model.pth", "recipe": {"backbone": "uni", "weights_digest": "a" * 64, "mpp": None},
    "slide_record": {"mpp_delivered": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A slide whose pixels know their place."""
    return write_pyramid(tmp_path_factory.mktemp("slide") / "place.tiff", place_image(*SIZE), mpp=0.5, tile=128)


def test_top_patches_are_the_most_attended_ones_pixels(slide, tmp_path):
    attention = np.full(len(COORDS), 0.001)
    attention[[17, 42, 3]] = 0.5, 0.3, 0.2
    patches = AttentionVisualizer().extract_top_patches(slide, COORDS, attention, 50, save_dir=tmp_path, top_k=3)
    for patch, index in zip(patches, (17, 42, 3), strict=True):
        x, y = place_of(patch, *SIZE)
        np.testing.assert_allclose([x.min(), y.min()], COORDS[index], atol=2.5)
        np.testing.assert_allclose([x.max(), y.max()], COORDS[index] + 49, atol=2.5)
    names = sorted(path.name for path in tmp_path.iterdir())
    expected = [f"top_{rank:02d}_x{COORDS[i][0]}_y{COORDS[i][1]}.png" for rank, i in enumerate((17, 42, 3), 1)]
    assert [name for name in names if name.startswith("top")] == expected
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / expected[0])), patches[0])
    table = pd.read_csv(tmp_path / "patches.csv")
    assert table["file"].tolist()[:3] == expected
    assert set(table["file"]) | {"patches.csv"} == set(names)
    assert table["rank"].tolist() == [1, 2, 3, 80, 79, 78]
    np.testing.assert_allclose(table["attention"], [0.5, 0.3, 0.2, 0.001, 0.001, 0.001])
    assert table[["x", "y"]].to_numpy()[:3].tolist() == COORDS[[17, 42, 3]].tolist()


def test_patches_of_an_earlier_call_do_not_stay_behind(slide, tmp_path):
    visualizer = AttentionVisualizer()
    visualizer.extract_top_patches(slide, COORDS, ATTENTION, 50, save_dir=tmp_path, top_k=5)
    (tmp_path / "mine.png").write_bytes(b"the user's own")
    visualizer.extract_top_patches(slide, COORDS, ATTENTION[::-1].copy(), 50, save_dir=tmp_path, top_k=2)
    assert len(list(tmp_path.glob("top_*.png"))) == len(list(tmp_path.glob("least_*.png"))) == 2
    assert (tmp_path / "mine.png").exists()


@pytest.mark.usefixtures("coarse_figures")
def test_the_whole_set_is_written_and_nothing_stays_open(slide, tmp_path):
    coords = patch_grid(*SIZE, 100, 100)
    heads = np.stack([np.linspace(0, 0.1, len(coords)), np.linspace(0.07, 0.03, len(coords))])
    paths = AttentionVisualizer().save_set(slide, tmp_path, coords, heads, 100, RECORD, top_k=200)
    assert set(paths) == {path for path in tmp_path.rglob("*") if path.is_file()} - {slide}
    names = (
        "heatmap.png", "detailed.png", "patch_grid.png", "thumbnail.jpg", "attention.npz", "attention.geojson",
        "report.html",
    )  # fmt: skip
    assert [path.name for path in paths if path.parent == tmp_path] == [f"place_{name}" for name in names]
    patches = tmp_path / "place_top_patches"
    assert len(list(patches.glob("*.png"))) == len(coords)  # top_k larger than the slide shows what there is
    assert pd.read_csv(patches / "patches.csv")["seen_in_training"].all()
    data = np.load(paths[-3])
    assert set(data.files) == {
        "coords", "attention", "attention_heads", "patch_size_level0", "class_names", "probabilities", "prediction",
        "mpp", "mpp_patches", "checkpoints", "weights_digests", "seen_in_training",
    }  # fmt: skip
    assert (data["prediction"], data["mpp"], data["mpp_patches"], data["seen_in_training"]) == ("b", 0.5, 0.5, True)
    assert json.loads(paths[-2].read_text())["litemil"]["seen_in_training"] is True
    assert "was trained on this slide" in paths[-1].read_text()
    np.testing.assert_allclose(data["attention"], heads.mean(axis=0))
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("coords", "attention", "size"),
    [(COORDS, ATTENTION[:-1], 50), (COORDS + 100, ATTENTION, 50), (COORDS - 1, ATTENTION, 50), (COORDS, ATTENTION, 60)],
)
def test_patches_that_cannot_be_the_slides_are_refused(slide, coords, attention, size):
    with pytest.raises(FeatureFileError, match=r"place\.tiff"):
        AttentionVisualizer().visualize_full_attention(slide, coords, attention, size)


def test_drawing_is_checked_before_any_work(slide, tmp_path):
    features = np.ones((len(COORDS), 4), np.float32)
    source = tmp_path / "place.h5"
    assert check_drawable(slide, source, Bag(features, COORDS, 50)) == 50
    assert check_drawable(slide, source, Bag(features, COORDS), patch_size=25, level=1) == 50
    with pytest.raises(ConfigError, match=r"place\.h5: does not record the patch size; give --patch_size"):
        check_drawable(slide, source, Bag(features, COORDS))
    with pytest.raises(FeatureFileError, match=r"place\.h5: has no coordinates, so nothing can be drawn; extract"):
        check_drawable(slide, source, Bag(features))
    with pytest.raises(FeatureFileError, match=r"so nothing can be drawn \(its coords are in um\); extract"):
        check_drawable(slide, source, Bag(features, coords_withheld="its coords are in um"))
    with pytest.raises(FeatureFileError, match="but the patches reach"):
        check_drawable(slide, source, Bag(features, COORDS + 100, 50))
    other = Passport(Recipe(), {"name": "other", "width": SIZE[0], "height": SIZE[1], "quick_hash": "0" * 64})
    with pytest.raises(FeatureFileError, match=r"that .*place\.h5 was made from \(quick_hash.*give slide other"):
        check_drawable(slide, source, Bag(features, COORDS, 50, other))
    scanned = Passport(Recipe(), {"name": "other", "bounds": [0, 0, 100, 100]})
    slide_of = Passport(Recipe(), {"name": "place", "width": SIZE[0], "quick_hash": quick_hash_of(slide)})
    with pytest.raises(
        FeatureFileError, match=r"place\.tiff: has another name than .*renamed\.h5.*or --allow_mismatch"
    ):
        check_drawable(slide, tmp_path / "renamed.h5", Bag(features, COORDS, 50, scanned))
    assert check_drawable(slide, tmp_path / "renamed.h5", Bag(features, COORDS, 50), allow_renamed=True) == 50
    assert check_drawable(slide, tmp_path / "renamed.h5", Bag(features, COORDS, 50, slide_of)) == 50


def quick_hash_of(path):
    with open_slide(path) as slide:
        return slide.quick_hash()


def test_a_slide_of_other_bounds_is_refused(slide, tmp_path):
    made_from = Passport(Recipe(), {"name": "place", "bounds": [10, 20, 300, 200], "width": SIZE[0], "height": SIZE[1]})
    bag = Bag(np.ones((len(COORDS), 4), np.float32), COORDS, 50, made_from)
    assert check_drawable(slide, tmp_path / "place.h5", bag) == 50  # bounds that are not known contradict none
    with open_slide(slide) as opened:
        opened.bounds = (0, 0, 300, 200)
        message = r"not the slide that .* \(bounds: found \[0, 0, 300, 200\], expected"
        with pytest.raises(FeatureFileError, match=message):
            check_drawable(opened, tmp_path / "place.h5", bag)


def test_the_patch_grid_stays_a_figure(slide):
    figure = AttentionVisualizer().create_patch_grid(slide, COORDS, ATTENTION, 50, top_k=80)
    assert [len([axes for axes in part.axes if axes.images]) for part in figure.subfigs] == [50, 30]


@pytest.mark.parametrize(
    ("size", "mpp", "text"),
    [
        (50, 0.5, "Each patch is 25 µm wide (50 level-0 px)"),
        (1024, 0.2281, "Each patch is 234 µm wide (1,024 level-0 px)"),
        (256, None, "Each patch is 256 level-0 px wide"),
    ],
)
def test_the_width_of_patches_is_said_in_um_where_it_is_known(size, mpp, text):
    assert patch_width_text(size, mpp) == text


def test_the_grid_says_how_wide_patches_are_and_what_positions_count(slide):
    figure = AttentionVisualizer().create_patch_grid(slide, COORDS, ATTENTION, 50, top_k=1, title="S1")
    assert figure.get_suptitle() == "S1\nEach patch is 25 µm wide (50 level-0 px)"
    titles = [axes.get_title() for part in figure.subfigs for axes in part.axes if axes.images]
    assert titles == ["1: 0.0167\nlevel-0 px (450, 350)", "80: 0.00833\nlevel-0 px (0, 0)"]


@pytest.mark.parametrize(("count", "most_pixels"), [(12, 12 * 1024**2), (200, 22_000_000)])
def test_many_large_patches_are_made_small_as_they_are_read(count, most_pixels):
    class LargeSlide:
        def read_region(self, *_):
            return np.zeros((1024, 1024, 3), np.uint8)

    attention = AttentionMap(patch_grid(25_600, 8_192, 1024, 1024), np.arange(200) / 19_900, 1024)
    patches = read_shown(LargeSlide(), attention, attention.order[:count])
    assert len(patches) == min(count, 50)
    assert sum(patch.pixels.size // 3 for patch in patches) <= most_pixels
    assert (patches[0].pixels.shape[0] == 1024) is (count <= 12)


def test_chunks_count_by_their_size(slide):
    whole = AttentionVisualizer(alpha=1.0)
    parts = [slice(0, 20), slice(20, None)]
    chunked = whole.visualize_chunked_attention(
        slide, [COORDS[part] for part in parts], [ATTENTION[part] / ATTENTION[part].sum() for part in parts], 50
    )
    weights = np.concatenate([ATTENTION[part] / ATTENTION[part].sum() * len(ATTENTION[part]) / 80 for part in parts])
    assert weights.sum() == pytest.approx(1)
    expected = whole.visualize_full_attention(slide, COORDS, weights, 50)
    for one, other in zip(chunked.axes[0].images, expected.axes[0].images, strict=True):
        np.testing.assert_array_equal(one.get_array(), other.get_array())


def test_alpha_and_colour_map_are_checked_early():
    with pytest.raises(ConfigError, match="no such colour map"):
        AttentionVisualizer(cmap="rainbows")


def test_what_the_pictures_say_of_a_prediction():
    caption = Caption.of(RECORD)
    assert caption.answer == "b (70.0%)"
    assert dict(caption.facts) == {
        "model": "LiteMIL (num_heads 4)", "checkpoint": "model.pth", "backbone": "uni", "weights_digest": "a" * 16,
        "fed": "in chunks of 1000, their probabilities averaged", "µm/px of the patches": "0.5",
    }  # fmt: skip
    assert caption.notes == ["The model was trained on this slide: its prediction is not independent evidence."]
    unknown = Caption.of(RECORD | {"recipe": None, "slide_record": None, "seen_in_training": None, "mode": "full"})
    assert [name for name, _ in unknown.facts] == ["model", "checkpoint", "fed"]
    assert (dict(unknown.facts)["fed"], unknown.notes) == ("whole", [])
    patient = Caption.of(RECORD | {"seen_as": "case"})
    assert patient.notes == ["The model was trained on this patient: its prediction is not independent evidence."]


@pytest.mark.parametrize(
    ("count", "text"), [(1000, "whole"), (1001, "in chunks of 1000, their probabilities averaged")]
)
def test_a_slide_of_one_chunk_was_fed_whole(count, text):
    assert dict(Caption.of(RECORD | {"num_instances": count}).facts)["fed"] == text


@pytest.mark.parametrize(
    ("recipe_mpp", "delivered", "facts"),
    [
        (0.5, 0.5, {"µm/px of the patches": "0.5"}),
        (0.5, 0.499, {"µm/px of the patches": "0.499 (recipe: 0.5)"}),
        (None, 0.499, {"µm/px of the patches": "0.499"}),
        (0.5, None, {"mpp": "0.5"}),
    ],
)
def test_the_resolution_of_the_patches_is_said_once(recipe_mpp, delivered, facts):
    record = RECORD | {"recipe": {"mpp": recipe_mpp}, "slide_record": {"mpp_delivered": delivered}}
    assert {name: text for name, text in Caption.of(record).facts if "mpp" in name or "µm" in name} == facts


def test_calibrated_probabilities_of_another_class_are_said_to_differ():
    record = RECORD | {
        "seen_in_training": False, "calibrated_probabilities": {"a": 0.51, "b": 0.49}, "temperature": 2.0,
    }  # fmt: skip
    caption = Caption.of(record)
    assert caption.answer == "b (49.0% calibrated; a 51.0%)"
    assert prediction_title(record) == "place: b (49.0% calibrated; a 51.0%)"
    assert (caption.probabilities, caption.probability_title) == ({"a": 0.51, "b": 0.49}, "calibrated probability")
    assert dict(caption.facts)["calibration"] == "70.0% before, 49.0% after (temperature 2.00)"
    assert caption.notes == [
        "The predicted class, b, is the one with the highest probability before calibration; the calibrated "
        "probabilities differ: they are highest for a (51.0%)."
    ]
    alike = Caption.of(record | {"calibrated_probabilities": {"a": 0.4, "b": 0.6}})
    assert (alike.answer, alike.notes) == ("b (60.0% calibrated)", [])
    raw = Caption.of(record | {"calibrated_probabilities": None})
    assert (raw.answer, raw.probabilities, raw.probability_title) == ("b (70.0%)", {"a": 0.3, "b": 0.7}, "probability")


@pytest.mark.parametrize(("threshold", "differs"), [(0.8, True), (0.65, False), (None, False)])
def test_a_threshold_that_decides_otherwise_is_said_to_differ(threshold, differs):
    model = {"model": {"name": "LiteMIL"}, "weights_digest": "", "selection": {"threshold": threshold}}
    record = RECORD | {
        "seen_in_training": False, "calibrated_probabilities": {"a": 0.4, "b": 0.6}, "temperature": 2.0,
    }  # fmt: skip
    note = (
        "The predicted class, b, is the one with the highest probability before calibration; the model's own threshold "
        "(0.8 for b, fitted on inner validation) differs: by it the slide is a."
    )
    assert Caption.of(record | {"models": [model]}).notes == ([note] if differs else [])
    aimed = model | {"selection": {"threshold": threshold, "operating_point": "sensitivity=0.95"}}
    aim = note.replace("validation)", "validation for sensitivity=0.95)")
    assert Caption.of(record | {"models": [aimed]}).notes == ([aim] if differs else [])
    # Of an ensemble, most models decide.
    members: dict = {"member_probabilities": [{"a": 1 - value, "b": value} for value in (0.9, 0.65, 0.55)]}
    members["spread"] = {"a": 0.18, "b": 0.18}
    assert Caption.of(record | {"models": [model]} | members).notes == ([note] if differs else [])
    tie = members | {"member_probabilities": members["member_probabilities"][:2]}
    assert Caption.of(record | {"models": [model]} | tie).notes == []
    assert Caption.of(record | {"models": [model] * 2}).notes == []
    assert Caption.of(record | {"models": [model], "calibrated_probabilities": None}).notes == []


def test_what_the_pictures_say_of_several_models():
    curves = {"gap": 0.25, "random_orders_beaten": 9}
    record = RECORD | {
        "model": [{"name": "LiteMIL", "num_heads": 4}] * 2 + [{"name": "ABMIL", "hidden_dim": 8}],
        "checkpoint": ["run/a.pth", "run/b.pth", "other/c.pth"],
        "temperature": [1.5, 2.0, 0.5],
        "calibrated_probabilities": {"a": 0.4, "b": 0.6},
        "faithfulness": {"deletion": curves, "insertion": curves | {"gap": -0.125}, "random_orders": 10},
    }
    caption = Caption.of(record)
    facts = dict(caption.facts)
    assert facts["models, averaged"] == "2 x LiteMIL (num_heads 4); ABMIL (hidden_dim 8)"
    assert facts["checkpoints"] == "a.pth, b.pth in run; c.pth in other"
    assert facts["calibration"] == "70.0% before, 60.0% after (temperature 1.50, 2.00, 0.50)"
    with_prior = dict(Caption.of(record | {"prior": [[0.9, 0.1]] * 3}).facts)
    assert with_prior["calibration"].endswith("0.50; for slides of which 10.0% are b)")
    unlike = dict(Caption.of(record | {"prior": [[0.9, 0.1], [0.8, 0.2], [0.9, 0.1]]}).facts)
    assert unlike["calibration"].endswith("0.50; for slides of which 10.0% or 20.0% are b)")
    assert caption.notes == ["The model was trained on this slide: its prediction is not independent evidence."]
    gaps = "deletion gap by attention +0.250 (beats 9 of 10), insertion gap by attention -0.125 (beats 9 of 10)"
    assert facts["faithfulness"] == f"mean probability against random orders: {gaps}"


def test_what_the_pictures_say_of_both_maps():
    curves, none = {"gap": 0.25, "random_orders_beaten": 9}, {"gap": None, "reason": "uniform: all alike"}
    both = {"deletion": curves, "insertion": curves, "random_orders": 10, "borne_out_more": "evidence"}
    both["evidence"] = dict.fromkeys(("deletion", "insertion"), curves | {"gap": 0.5})
    facts = dict(Caption.of(RECORD | {"faithfulness": both}).facts)
    assert facts["faithfulness of evidence"].startswith(
        "mean probability against random orders: deletion gap by evidence +0.500"
    )
    assert facts["faithfulness of both maps"] == (
        "Both maps beat random orders; the answer bears out the evidence more (deletion gap by attention +0.250, "
        "deletion gap by evidence +0.500)."
    )
    equal = both | {"deletion": none, "insertion": none, "borne_out_more": None}
    facts = dict(Caption.of(RECORD | {"faithfulness": equal, "model": {"name": "meanPool"}}).facts)
    assert facts["faithfulness"] == "Uniform: all alike, so its weights have no order to test."
    assert "faithfulness of both maps" not in facts


@pytest.mark.usefixtures("coarse_figures")
def test_attention_that_does_not_support_the_answer_is_said_to(slide, tmp_path):
    against = {"gap": -0.1, "random_orders_beaten": 0}
    record = RECORD | {
        "seen_in_training": False, "faithfulness": {"deletion": against, "insertion": against, "random_orders": 10},
    }  # fmt: skip
    (note,) = Caption.of(record).notes
    assert note.startswith("Attention does not support this answer: without the most attended patches, b is no less")
    equal = Caption.of(record | {"model": {"name": "meanPool"}})
    assert (equal.notes, [name for name, _ in equal.facts if "faithful" in name]) == ([], [])  # without an order
    paths = AttentionVisualizer().save_set(slide, tmp_path, COORDS, ATTENTION[None], 50, record)
    assert note in paths[-1].read_text()
