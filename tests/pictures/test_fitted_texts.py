"""Texts of any length in figures of any shape: nothing is cut, nothing lies on anything else."""

import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.text import Text

from utils.core.geometry import patch_grid
from utils.pictures.attention_map import AttentionMap
from utils.pictures.evidence_map import EvidenceMap, EvidenceOverlay
from utils.pictures.faithfulness_figure import faithfulness_figure
from utils.pictures.heatmap import detailed_figure, evidence_figure, heatmap_figure, patch_grid_figure
from utils.pictures.overlay import MapStyle, Overlay, Picture

SHAPES = [(800, 600), (800, 400), (400, 800), (300, 3000), (3000, 300)]
CLASSES = [f"invasive ductal carcinoma of no special type, grade 3, with many lymphocytes {n}" for n in range(10)]
TITLE = f"TCGA-AA-1234-{'x' * 70}: {CLASSES[0]} (97.0%, 5 of 5 models), seen in training"
SHORT = "S1: benign (75.0%), seen in training"


def overlay_of(width: int, height: int) -> Overlay:
    scale = 200 / max(width, height)
    shape = (round(height * scale), round(width * scale), 3)
    coords = patch_grid(width, height, 50, 50)
    attention = np.random.default_rng(0).random(len(coords)) ** 4
    attention[3] = 5e3
    picture = Picture(np.full(shape, 200, np.uint8), width, height, 0.5)
    return Overlay(picture, AttentionMap(coords, attention / attention.sum(), 50), MapStyle())


def evidence_overlay(overlay: Overlay) -> EvidenceOverlay:
    values = np.random.default_rng(1).normal(size=(10, len(overlay.attention))).astype(np.float32)
    evidence = EvidenceMap(CLASSES, values, np.zeros(10), np.zeros(10))
    return EvidenceOverlay(overlay.picture, overlay.attention, evidence, CLASSES[0])


def texts_of(figure: Figure) -> list[tuple[str, np.ndarray]]:
    """Return the visible texts of a drawn figure, and the corners of each in px."""
    figure.set_dpi(200)
    for image in figure.findobj(AxesImage):  # resampled in vain
        image.set_visible(False)
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    shown = [
        text for text in texts if re.search(r"(?<!\\)\b[A-Za-z]", text.get_text()) and text.get_visible()
    ]  # no ticks
    return [(text.get_text(), text.get_window_extent().get_points()) for text in shown]


def check_texts(figure: Figure) -> None:
    texts = texts_of(figure)
    size = np.array([figure.bbox.width, figure.bbox.height])
    for text, corners in texts:
        assert (corners[0] >= -0.5).all(), (text, corners, size)
        assert (corners[1] <= size + 0.5).all(), (text, corners, size)
    for (text, box), (other, other_box) in combinations(texts, 2):
        overlap = np.minimum(box[1], other_box[1]) - np.maximum(box[0], other_box[0])
        assert (overlap <= 2).any(), (text, other)


def test_without_the_slide_no_panel_is_empty_and_the_heatmap_says_so():
    overlay = overlay_of(400, 300)
    blank = replace(overlay, picture=replace(overlay.picture, is_blank=True))
    evidence = evidence_overlay(blank)
    figure = detailed_figure(blank, title="S1", top_k=3, probabilities={"a": 1.0}, facts=[], evidence=evidence)
    check_texts(figure)
    titles = [text for text, _ in texts_of(figure)]
    assert "slide" not in titles
    assert "attention, the 3 highest outlined in red and numbered" in [" ".join(title.split()) for title in titles]
    written = " ".join(heatmap_figure(overlay, title="S1", top_k=3).axes[0].get_title().split())
    assert written == "S1 Outlined in red and numbered: the 3 most attended patches."
    assert heatmap_figure(overlay, title="S1", top_k=0).axes[0].get_title() == "S1"
    assert "Drawn without the slide" in heatmap_figure(blank, title="S1", top_k=3).axes[0].get_title()
    assert "Drawn without" not in heatmap_figure(overlay, title="S1", top_k=3).axes[0].get_title()


@pytest.mark.parametrize("title", [SHORT, TITLE, f"{'y' * 300}, seen in training"])
@pytest.mark.parametrize("shape", SHAPES)
def test_maps_of_any_shape_hold_their_title_and_label(shape, title):
    overlay = overlay_of(*shape)
    text = f"log-odds of {CLASSES[0]} +9: mean training slide +1, patches for it +10, patches against it -2"
    for figure in (
        heatmap_figure(overlay, title=title, top_k=3),
        evidence_figure(evidence_overlay(overlay), title=title, text=text, top_k=3, alpha=0.5),
    ):
        check_texts(figure)
        written = "".join(figure.axes[0].get_title().split())
        assert written.startswith("".join(title.split()))


@pytest.mark.parametrize("classes", [["a", "b"], CLASSES])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_detailed_figure_holds_long_names_and_facts(shape, classes):
    probabilities = dict.fromkeys(classes, 1 / len(classes)) | {classes[-1]: 1e-5}
    facts = [("checkpoint", "/folder/abc" * 60), ("note", "The model was trained on this slide. " * 8)]
    check_texts(detailed_figure(overlay_of(*shape), title=TITLE, top_k=3, probabilities=probabilities, facts=facts))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_detailed_figure_shows_both_maps(shape):
    overlay = overlay_of(*shape)
    evidence = evidence_overlay(overlay)
    figure = detailed_figure(
        overlay, title=TITLE, top_k=3, probabilities=dict.fromkeys(CLASSES, 0.1), facts=[], evidence=evidence
    )
    above = figure.subfigs[0].axes
    titles = [" ".join(axes.get_title().split()) for axes in above if axes.images]
    outlined = "red: most for it, dashed: against"
    assert titles == [
        "slide", "attention, the 3 highest outlined in red and numbered", f"evidence for {CLASSES[0]}; {outlined}"
    ]  # fmt: skip
    labels = [" ".join(axes.get_ylabel().split()) for axes in above if axes.get_ylabel()]
    assert labels == [overlay.style.label(overlay.attention), evidence.evidence.label(CLASSES[0])]
    painted = np.asarray(above[2].images[1].get_array())
    np.testing.assert_allclose(painted[..., :3], evidence.colours()[..., :3])
    check_texts(figure)


@pytest.mark.parametrize("count", [1, 5, 12])
def test_the_patch_grid_holds_its_titles(count):
    patches = [np.zeros((8, 8, 3), np.uint8)] * count
    groups = [
        (
            f"patches with most evidence for {CLASSES[0]}",
            kind,
            patches,
            ["120: 0.000123\nlevel-0 px (123456, 123456)"] * count,
        )
        for kind in ("top", "least")
    ]
    check_texts(patch_grid_figure(groups, TITLE))


@pytest.mark.parametrize("count", [0, 2])
def test_the_curves_hold_their_titles(count):
    curve = {
        "fractions": [0, 1], "random_mean": [1, 0], "random_std": [0, 0], "most_attended_first": [1, 0],
        "least_attended_first": [1, 0], "gap": 0.1,
    }  # fmt: skip
    record = {"deletion": curve, "insertion": curve, "random_orders": 10, "rank_correlation_with_random_weights": [0.5]}
    maps = [overlay_of(800, 600).attention] * count
    of_evidence = {"fractions": [0, 1], "most_for_first": [1, 0.5], "gap": 0.2}
    both = record | {"evidence": {"deletion": of_evidence, "insertion": of_evidence}}
    both["borne_out_more"] = "evidence"
    check_texts(faithfulness_figure(record, maps, "viridis", TITLE, CLASSES[0]))
    for name in ("attention", "uniform weight", "share of winning features"):
        figure = faithfulness_figure(both, maps, "viridis", TITLE, CLASSES[0], name)
        check_texts(figure)
        title, is_equal = " ".join(figure.axes[0].get_title().split()), name == "uniform weight"
        by_evidence = "deletion gap by evidence +0.200"
        assert title == (by_evidence if is_equal else f"deletion gap by {name} +0.100 {by_evidence}")
        labels = [" ".join(text.get_text().split()) for text in figure.legends[0].get_texts()]
        of_weights = [f"by {name}: {'most attended' if name == 'attention' else 'highest'} first"]
        of_weights.append(f"by {name}: {'least attended' if name == 'attention' else 'lowest'} first")
        assert labels == [
            "random (10 orders, ± sd)", *([] if is_equal else of_weights),
            "by evidence: most for the class first",
        ]  # fmt: skip
        assert len(figure.axes) == (4 if maps and not is_equal else 2)
        text = "Both maps beat random orders; the answer bears out the evidence more"
        assert (text in " ".join(figure.get_suptitle().split())) is not is_equal
    failing = {"deletion": curve | {"gap": -0.1}, "borne_out_more": None}
    figure = faithfulness_figure(both | failing, maps, "viridis", TITLE, CLASSES[0])
    check_texts(figure)
    title = " ".join(figure.get_suptitle().split())
    assert "Attention does not support this answer: without the most attended patches" in title
    assert title.endswith("The evidence does: look at that map.")


@pytest.mark.parametrize("name", ["attention", "uniform weight", "share of winning features", "mean weight"])
def test_the_detailed_figure_holds_the_name_of_any_weights(name):
    overlay = overlay_of(2400, 3200)
    overlay = replace(overlay, attention=replace(overlay.attention, name=name))
    for evidence in (None, evidence_overlay(overlay)):
        check_texts(
            detailed_figure(overlay, title=SHORT, top_k=3, probabilities={"a": 1.0}, facts=[], evidence=evidence)
        )
