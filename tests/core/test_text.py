"""Numbers as they are written in figures and pages."""

import pytest

from utils.core.text import multiple_text, percent_text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0%"),
        (1e-9, "<0.1%"),
        (0.0006, "0.1%"),
        (0.25, "25.0%"),
        (0.9994, "99.9%"),
        (0.99999, ">99.9%"),
        (1, "100.0%"),
    ],
)
def test_a_share_is_neither_nothing_nor_all_unless_it_is(share, text):
    assert percent_text(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3e-22, "<0.001"), (0.0123, "0.0123"), (2, "2"), (6.8412, "6.84"), (123.4, "123"), (2.4e3, "2,400")],
)
def test_a_multiple_has_no_exponent(value, text):
    assert multiple_text(value) == text
