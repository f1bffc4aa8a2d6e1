"""The passport survives its file, and recipes differ only where both sides know."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cohort import synthetic_passport
from utils.core.passport import (
    ENCODING_FIELDS,
    MPP_TOLERANCE,
    Passport,
    backbone_name,
    first_differences,
    mpp_difference,
    recipe_differences,
    unknown_fields,
)

RECIPE = {
    "backbone": "uni",
    "weights_digest": "ab" * 32,
    "transform": {"resize": 224},
    "patch_size": 256,
    "stride": 256,
}


def test_round_trip():
    passport = synthetic_passport("slide ü")
    again = Passport.from_json(passport.to_json())
    assert again == passport
    assert again.to_json() == passport.to_json()


def test_equal_passports_give_equal_text_whatever_the_order_of_their_fields():
    one = Passport({"a": 1, "b": 2}, {"x": 1, "y": 2})
    other = Passport({"b": 2, "a": 1}, {"y": 2, "x": 1})
    assert one.to_json() == other.to_json()


def test_a_passport_with_nan_is_not_written():
    with pytest.raises(ValueError, match="JSON"):
        Passport({"mpp": math.nan}).to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "7",
        '{"schema": 1, "recipe": null, "slide": {}, "software": {}}',
        '{"schema": 1, "recipe": {}, "slide": [], "software": {}}',
        '{"schema": 1, "recipe": {}, "slide": {}}',
    ],
)
def test_what_is_no_passport_is_refused(text):
    with pytest.raises((ValueError, KeyError, TypeError)):
        Passport.from_json(text)


def test_equal_recipes_do_not_differ():
    assert recipe_differences(RECIPE, json.loads(json.dumps(RECIPE)), RECIPE) == []


def test_differences_are_told_with_both_values():
    found = RECIPE | {"backbone": "phikon-v2", "weights_digest": "cd" * 32}
    assert recipe_differences(RECIPE, found, ENCODING_FIELDS) == [
        "backbone: found phikon-v2, expected uni",
        "weights_digest: found cdcdcdcdcdcd, expected abababababab",
    ]


def test_only_the_fields_asked_for_differ():
    assert recipe_differences(RECIPE, RECIPE | {"stride": 128}, ENCODING_FIELDS) == []
    assert recipe_differences(RECIPE, RECIPE | {"stride": 128}, ["stride"]) == ["stride: found 128, expected 256"]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", ENCODING_FIELDS)
def test_what_one_side_does_not_know_does_not_differ_and_is_told_apart(name, side):
    other = {"backbone": "x", "weights_digest": "y", "transform": {}, "patch_size": 1, "stride": 1}
    for unknown in (other | {name: None}, {key: value for key, value in other.items() if key != name}):
        sides = (unknown, RECIPE) if side == 0 else (RECIPE, unknown)
        told = recipe_differences(*sides, ENCODING_FIELDS)
        assert len(told) == len(ENCODING_FIELDS) - 1
        assert not any(difference.startswith(f"{name}:") for difference in told)
        assert unknown_fields(*sides, ENCODING_FIELDS) == [name]


def test_zero_and_false_are_known():
    assert recipe_differences({"level": 0}, {"level": 1}, ["level"]) == ["level: found 1, expected 0"]
    assert unknown_fields({"level": 0}, {"level": 0}, ["level"]) == []


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


def test_of_sets_of_settings_only_what_differs_is_told():
    left, right = {"tissue": {"a": 1, "b": 2, "c": 3}}, {"tissue": {"a": 1, "b": 5, "d": 6}}
    assert recipe_differences(left, right, ["tissue"]) == [
        "tissue.b: found 5, expected 2", "tissue.c: found none, expected 3", "tissue.d: found 6, expected none",
    ]  # fmt: skip


def test_a_message_names_what_differs_in_a_few_characters():
    long = {"recipe": {"a": "0123456789abcdef" * 4, "b": list(range(1000)), "c": 1, "d": 2, "e": 3}}
    differences = recipe_differences(long, {"recipe": {}}, ["recipe"])
    assert len(differences) == 5
    told = first_differences(differences)
    assert "recipe.a: found none, expected 0123456789ab;" in told
    assert told.endswith("; and 1 more")
    (told,) = recipe_differences(long, {}, ["recipe"], strict=True)
    assert told.startswith('recipe: found none, expected {"a": "0123456789abcdef')
    assert len(told) < 120
