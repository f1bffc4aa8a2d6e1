"""How findings name values and their slides."""

from utils.auditing.findings import AuditedSlide as Slide
from utils.auditing.findings import by_class, field_names, slides_text


def test_the_commonest_value_is_counted_and_the_slides_of_the_others_are_named():
    text = slides_text({"256": ["a", "b"], "128": ["c"], "64": [f"S{number}" for number in range(9)]})
    assert text.startswith("256 in 2 slides, 128 in 1 slide (c), 64 in 9 slides (S0, ")
    assert "S8" not in text, "of many slides the first few are named"


def test_a_long_value_is_cut():
    assert slides_text({"x" * 60: ["a"], "y" * 61: ["b"]}) == f"{'x' * 60} in 1 slide, {'y' * 12}... in 1 slide (b)"


def test_slides_are_told_apart_by_class():
    slides = [Slide({"wsi_id": name, "case_id": "P"}, label) for name, label in (("a", 1), ("b", 0), ("c", 1))]
    found = by_class(slides, ("benign", "malignant", "other"))
    assert {name: [slide.wsi_id for slide in group] for name, group in found.items()} == {
        "benign": ["b"], "malignant": ["a", "c"], "other": [],
    }  # fmt: skip


def test_fields_are_those_of_any_record_in_order():
    assert field_names([{"b": 1}, {"a": 2, "b": 3}]) == ["a", "b"]
