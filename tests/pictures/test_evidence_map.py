"""Maps of evidence: what they point out, and how they are drawn."""

import numpy as np
import pytest

from tests.synthetic import place_image, write_pyramid
from utils.core.geometry import patch_grid
from utils.pictures.attention_map import AttentionMap
from utils.pictures.evidence_map import CMAP, EvidenceMap, EvidenceOverlay
from utils.pictures.heatmap import evidence_figure
from utils.pictures.overlay import Picture
from utils.pictures.prediction_caption import evidence_text
from utils.pictures.top_patches import read_evidence_groups
from utils.slides.open_slides import open_slide

NAMES = ("benign", "malignant")
COORDS = patch_grid(400, 200, 100, 100)  # 8 patches


def evidence_of(*values: float) -> EvidenceMap:
    contributions = np.array([[-value for value in values], values], np.float32)
    return EvidenceMap(NAMES, contributions, contributions.sum(axis=1), np.zeros(2))


def overlay_of(evidence: EvidenceMap, name: str = "malignant") -> EvidenceOverlay:
    picture = Picture(np.full((20, 40, 3), 200, np.uint8), 400, 200, 0.5)
    return EvidenceOverlay(picture, AttentionMap(COORDS, np.full(8, 1 / 8), 100), evidence, name)


def test_both_signs_are_told_apart_in_grey():
    """The lightness of the colours rises all the way from against to for."""
    lightness = CMAP(np.linspace(0, 1, 256))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()


def test_nothing_is_in_the_middle_whatever_the_sums():
    evidence = evidence_of(5, 4, 3, 2, 1, 0, 0, -0.5)
    middle = evidence.mappable("malignant").to_rgba(0.0)
    assert middle == pytest.approx(CMAP(0.5), abs=0.01)
    colours = overlay_of(evidence).colours()
    assert colours[15, 15, :3] == pytest.approx(CMAP(0.5)[:3], abs=0.02)  # the sixth patch
    assert (colours[..., 3] == 1).all()


def test_a_class_has_the_opposite_of_the_other():
    evidence = evidence_of(5, 4, 3, 2, 1, 0, 0, -0.5)
    assert overlay_of(evidence, "benign").heat == pytest.approx(-overlay_of(evidence).heat)


def test_one_patch_does_not_leave_the_others_grey():
    evidence = EvidenceMap(
        NAMES, np.tile(np.r_[np.full(499, 0.1), 100].astype(np.float32), (2, 1)), np.ones(2), np.ones(2)
    )
    assert evidence.limit("benign") == pytest.approx(0.1)


def test_patches_that_hardly_argue_are_not_pointed_out():
    evidence = evidence_of(5, 0.01, 3, -2, -0.001, 0, 0, -4)
    supporters, opponents = evidence.strongest("malignant", 5)
    assert (supporters.tolist(), opponents.tolist()) == ([0, 2], [7, 3])
    assert evidence.strongest("malignant", 1)[0].tolist() == [0]
    assert [len(indices) for indices in evidence_of(*[0.0] * 8).strongest("malignant", 5)] == [0, 0]


def test_the_figure_says_which_class_and_what_it_adds_up_to():
    text = "log-odds of malignant +9: mean training slide +1, patches for it +10, patches against it -2"
    figure = evidence_figure(
        overlay_of(evidence_of(5, 4, 1, 0, 0, 0, 0, -2)), title="S1", text=text, top_k=2, alpha=0.5
    )
    axes, bar = figure.axes
    outlined = "numbered patches argue most for it, dashed ones most against it"
    assert axes.get_title().replace("\n", " ") == f"S1 Evidence: {text}; {outlined}"
    assert bar.get_ylabel() == "log-odds of malignant: against (dark) and for (bright), 0 in the middle"
    assert [number.get_text() for number in axes.texts if number.get_text().isdigit()] == ["1", "2"]
    outlines = [patch.get_linestyle() for patch in axes.patches if not patch.get_fill()]
    assert outlines == ["-", "-", "--"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.53409, 0.20813, 1.29568, -0.96972), "+0.534: mean training slide +0.208, patches for it +1.296, "
         "patches against it -0.970"),
        ((0.06494, -0.05034, 0.13731, -0.02204), "+0.0649: mean training slide -0.0503, patches for it +0.1373, "
         "patches against it -0.0220"),
        ((-1234.5, 0, 0, -1234.5), "-1234: mean training slide +0, patches for it +0, patches against it -1234"),
        ((0, 0, 0, 0), "+0.000: mean training slide +0.000, patches for it +0.000, patches against it +0.000"),
    ],
)  # fmt: skip
def test_what_the_log_odds_are_the_sum_of_has_equal_decimals(values, text):
    names = ("log_odds", "reference", "for", "against")
    evidence = {name: {"malignant": value} for name, value in zip(names, values, strict=True)}
    answer = {"predicted_class": "malignant", "probabilities": {"benign": 0.4, "malignant": 0.6}}
    record = answer | {"evidence": evidence | {"begins_at": "mean training slide"}}
    assert evidence_text(record) == f"log-odds of malignant {text}"


def test_patches_have_the_numbers_of_the_map(tmp_path):
    evidence = evidence_of(5, 4, 1, 0, 0, 0, -3, -2)
    overlay = overlay_of(evidence)
    with open_slide(write_pyramid(tmp_path / "a.tiff", place_image(400, 200), mpp=0.5, tile=128)) as slide:
        groups = read_evidence_groups(slide, overlay.attention, evidence, "malignant", 2)
    assert [(group.kind, list(group.captions)) for group in groups] == [
        ("top", ["1: +5.0", "2: +4.0"]), ("least", ["-3.0", "-2.0"]),
    ]  # fmt: skip
    assert [[patch.index for patch in group.patches] for group in groups] == [[0, 1], [6, 7]]
    axes = evidence_figure(overlay, title="", text="", top_k=2, alpha=0.5).axes[0]
    numbers = {number.get_text(): number.get_position()[0] // 10 for number in axes.texts if number.get_text() in "12"}
    assert numbers == {"1": -1, "2": 0}  # the left edges of the first and the second patch of 10 px


def test_dashes_stand_out_on_dark_patches():
    overlay = overlay_of(evidence_of(1, 0, 0, 0, 0, 0, 0, -2))
    axes = evidence_figure(overlay, title="", text="", top_k=2, alpha=1).axes[0]
    outlines = [patch for patch in axes.patches if not patch.get_fill()]
    assert [(outline.get_linestyle(), len(outline.get_path_effects())) for outline in outlines] == [("-", 0), ("--", 1)]
