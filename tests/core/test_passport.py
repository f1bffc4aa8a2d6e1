"""The passport survives its file."""

import math

import pytest

from tests.cohort import synthetic_passport
from utils.core.passport import Passport
from utils.core.recipe import Recipe


def test_round_trip():
    passport = synthetic_passport("slide ü")
    again = Passport.from_json(passport.to_json())
    assert again == passport
    assert again.to_json() == passport.to_json()


def test_equal_passports_give_equal_text_whatever_the_order_of_their_fields():
    one = Passport(Recipe.from_dict({"level": 1, "b": 2}), {"x": 1, "y": 2})
    other = Passport(Recipe.from_dict({"b": 2, "level": 1}), {"y": 2, "x": 1})
    assert one.to_json() == other.to_json()


def test_a_passport_with_nan_is_not_written():
    with pytest.raises(ValueError, match="JSON"):
        Passport(Recipe(mpp=math.nan)).to_json()


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
