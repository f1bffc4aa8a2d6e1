"""A recipe survives its file, is completed by what is asked for, and differs only where both sides know."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.core.errors import RecipeError
from utils.core.recipe import ENCODING_FIELDS, MPP_TOLERANCE, OUR_FIELDS, Recipe, backbone_name, mpp_difference
from utils.features.settings import Extraction

RECIPE = Recipe(
    backbone="uni", weights_digest="ab" * 32, transform={"resize": 224}, patch_size=256, stride=128, mpp=0.5,
    tissue_threshold=0.5, dtype="float16",
)  # fmt: skip
OTHER = Recipe(backbone="x", weights_digest="y", transform={}, patch_size=1)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"backbone": "uni", "patch_size": 256, "magnification": 20.0},
        {"stride": None, "level": 0, "mpp": None},
        {"scanner": "unheard of", "backbone": "uni", "others": 1},
    ],
)
def test_what_a_file_records_comes_back_as_it_was(content):
    assert list(Recipe.from_dict(content).as_dict().items()) == list(content.items())


def test_our_own_features_record_every_field():
    assert tuple(replace(RECIPE, recorded=OUR_FIELDS).as_dict()) == OUR_FIELDS
    assert replace(RECIPE, recorded=OUR_FIELDS) == RECIPE


def test_what_is_changed_is_recorded():
    assert replace(Recipe.from_dict({"backbone": "uni"}), dtype="float16").as_dict() == {
        "backbone": "uni", "dtype": "float16",
    }  # fmt: skip


def test_of_recipes_what_makes_features_incomparable_differs():
    assert RECIPE.differences(replace(RECIPE, stride=256, tissue_threshold=0)) == []
    assert RECIPE.differences(replace(RECIPE, backbone="phikon-v2")) == ["backbone: found phikon-v2, expected uni"]
    assert RECIPE.differences(replace(RECIPE, stride=256), ["stride"]) == ["stride: found 256, expected 128"]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", ENCODING_FIELDS)
def test_what_one_side_does_not_know_does_not_differ_and_is_named(name, side):
    partial = replace(OTHER, **{name: None})
    left, right = (partial, RECIPE) if side == 0 else (RECIPE, partial)
    lines = left.differences(right)
    assert len({line.partition(":")[0].partition(".")[0] for line in lines}) == len(ENCODING_FIELDS) - 1
    assert not any(line.startswith(name) for line in lines)
    assert left.unknown_fields(right) == [name]


def test_settings_that_are_asked_for_contradict_a_recipe():
    assert RECIPE.contradictions(Recipe(mpp=0.5, stride=128)) == []
    assert RECIPE.contradictions(Recipe(stride=64)) == ["stride: found 64, expected 128"]
    assert RECIPE.contradictions(Recipe(level=1)) == ["level: found 1, expected mpp 0.5"]
    of_a_level = replace(RECIPE, mpp=None, level=0)
    assert of_a_level.contradictions(Recipe(mpp=0.5)) == ["mpp: found 0.5, expected level 0"]
    assert of_a_level.contradictions(Recipe(level=0)) == []
    assert Recipe().contradictions(Recipe(level=1, stride=64)) == []


def test_a_recipe_that_leaves_something_open_is_completed():
    partial = Recipe(backbone="uni", patch_size=224)
    completed = partial.completed(Recipe(level=1, patch_size=512), tissue_threshold=0.5, dtype="float16")
    assert completed == Recipe(
        backbone="uni", patch_size=224, stride=224, level=1, tissue_threshold=0.5, dtype="float16"
    )


def test_its_settings_are_those_of_an_extraction():
    settings = RECIPE.settings()
    assert Extraction(**settings).target_mpp == 0.5
    assert (settings["qc"], settings["edge"]) == (False, "drop")
    with_quality = replace(RECIPE, qc={"max_ink": 0.25}, edge="keep").settings()
    assert (with_quality["qc"], with_quality["edge"]) == (True, "keep")
    with pytest.raises(RecipeError, match=r"does not say stride, level, tissue_threshold, dtype; give it \(--stride"):
        Recipe(backbone="uni", patch_size=224).settings()


def test_a_recipe_is_told_in_a_line():
    assert str(replace(RECIPE, qc={"max_ink": 0.25})) == (
        "uni, patches of 256 px at 0.5 µm/px, 128 px apart, at least 50% tissue, quality control on"
    )
    assert str(replace(RECIPE, edge="keep")).endswith("quality control off, edges kept")
    assert "at level 0, 128 px apart, at least 0% tissue" in str(replace(RECIPE, mpp=None, level=0, tissue_threshold=0))


def test_scanners_of_one_magnification_agree_and_other_magnifications_do_not():
    assert mpp_difference((0.25, 0.25), 0.22) == []
    assert mpp_difference((0.22, 0.25), 0.2528) == []
    assert mpp_difference((0.25, 0.25), 0.5) == ["mpp: found 0.5 um/px, expected 0.25 to 0.25"]
    assert mpp_difference((0.5, 0.5), 0.25) == ["mpp: found 0.25 um/px, expected 0.5 to 0.5"]
    assert mpp_difference(None, 0.5) == []
    assert mpp_difference((0.5, 0.5), None) == []


@given(st.floats(0.1, 2), st.floats(1, 1.5), st.floats(0.05, 4))
def test_the_mpp_tolerance_is_a_factor_on_both_sides(least, spread, found):
    greatest = least * spread
    edge = 1 + MPP_TOLERANCE
    inside = least / edge <= found <= greatest * edge
    assert (mpp_difference((least, greatest), found) == []) == inside


def test_a_backbone_has_one_name_whoever_wrote_it():
    for alias in ("uni", "UNI_v1", " MahmoodLab/UNI", "mahmood-uni"):
        assert backbone_name(alias) == "uni"
    assert backbone_name("Phikon_V2") == backbone_name("phikonv2") == "phikon-v2"
    assert backbone_name("H_optimus_0") == backbone_name("h-optimus-0") == "h-optimus-0"
    assert backbone_name("TIMM:resnet18.a1_in1k") == "timm:resnet18.a1_in1k"
