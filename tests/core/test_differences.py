"""What differs is told with both values, in a few characters, and only where both sides know."""

import json

import pytest

from utils.core.differences import differences, first_differences

SETTINGS = {"backbone": "uni", "digest": "ab" * 32, "transform": {"resize": 224}, "patch_size": 256, "level": 0}


def test_equal_settings_do_not_differ():
    assert differences(SETTINGS, json.loads(json.dumps(SETTINGS)), SETTINGS) == []


def test_differences_are_told_with_both_values():
    found = SETTINGS | {"backbone": "phikon-v2", "digest": "cd" * 32}
    assert differences(SETTINGS, found, SETTINGS) == [
        "backbone: found phikon-v2, expected uni",
        "digest: found cdcdcdcdcdcd, expected abababababab",
    ]


def test_only_the_fields_asked_for_differ():
    assert differences(SETTINGS, SETTINGS | {"level": 1}, ["patch_size"]) == []
    assert differences(SETTINGS, SETTINGS | {"level": 1}, ["level"]) == ["level: found 1, expected 0"]


@pytest.mark.parametrize("side", [0, 1])
def test_what_one_side_does_not_know_differs_only_where_that_counts(side):
    for partial in (SETTINGS | {"backbone": None}, {key: SETTINGS[key] for key in SETTINGS if key != "backbone"}):
        sides = (partial, SETTINGS) if side == 0 else (SETTINGS, partial)
        assert differences(*sides, SETTINGS) == []
        (line,) = differences(*sides, SETTINGS, strict=True)
        assert line == ("backbone: found uni, expected none" if side == 0 else "backbone: found none, expected uni")


def test_of_sets_of_settings_only_what_differs_is_told():
    left, right = {"tissue": {"a": 1, "b": 2, "c": 3}}, {"tissue": {"a": 1, "b": 5, "d": 6}}
    assert differences(left, right, ["tissue"]) == [
        "tissue.b: found 5, expected 2", "tissue.c: found none, expected 3", "tissue.d: found 6, expected none",
    ]  # fmt: skip


def test_a_message_names_what_differs_in_a_few_characters():
    long = {"recipe": {"a": "0123456789abcdef" * 4, "b": list(range(1000)), "c": 1, "d": 2, "e": 3}}
    lines = differences(long, {"recipe": {}}, ["recipe"])
    assert len(lines) == 5
    message = first_differences(lines)
    assert "recipe.a: found none, expected 0123456789ab;" in message
    assert message.endswith("; and 1 more")
    (line,) = differences(long, {}, ["recipe"], strict=True)
    assert line.startswith('recipe: found none, expected {"a": "0123456789abcdef')
    assert len(line) < 120
