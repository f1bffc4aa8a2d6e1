"""Figures of groups of slides: they are those of the group alone, and say why one is missing."""

import numpy as np
import pytest

from tests.evaluation.predicted import predicted
from utils.evaluation.subgroups import subgroup_figures, subgroup_table, subgroups_text


@pytest.fixture
def content():
    rows = predicted(patients=20)
    number = np.array([int(case[1:]) for case in rows.cases])
    return subgroup_figures(rows, {
        "side": {"left": number < 12, "right": number >= 12},
        "stage": {"I": number < 17, "II": (number >= 17) & (number != 18), "III": number == 18, "IV": number > 99},
    })  # fmt: skip


def test_figures_are_those_of_the_groups_patients(content):
    rows = predicted(patients=20)
    left = rows.where(np.array([int(case[1:]) < 12 for case in rows.cases])).by_case()
    figures = content["side"]["left"]
    assert (figures["n_cases"], figures["n_slides"]) == (12, 24)
    assert figures["pooled"] == pytest.approx(left.metrics)
    assert figures["within_folds"]["auc"] == pytest.approx(left.within_folds["auc"].value)
    low, high = figures["within_folds_intervals_95"]["auc"]
    assert low < figures["within_folds"]["auc"] <= high


def test_a_group_without_a_row_is_left_out(content):
    assert list(content["stage"]) == ["I", "II", "III"]


def test_the_table_and_the_text_say_why_a_figure_is_missing(content):
    table = subgroup_table(content)
    one = table[(table["group"] == "III") & (table["metric"] == "auc")].iloc[0]
    assert np.isnan(one["value"])
    assert one["method"] == "none: undefined for these slides"
    text = subgroups_text({"subgroups": content, "class_names": ["no", "yes"]})
    assert "subgroup  patients  slides" in text
    assert text.endswith("-: undefined for these slides") or "; undefined for these slides" in text
    assert subgroups_text({"class_names": ["no", "yes"]}) == ""
