"""How well a map finds the patches of a class."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from utils.evaluation.localization import SCORES, map_scores, mean_scores, means_text


def drawn_at_random(values: np.ndarray, is_inside: np.ndarray, times: int = 4000) -> tuple[float, float]:
    """Pointing and overlap with ties broken at random, the mean of many times."""
    rng, count = np.random.default_rng(0), int(is_inside.sum())
    orders = [np.lexsort((rng.random(len(values)), -values)) for _ in range(times)]
    return np.mean([is_inside[order[0]] for order in orders]), np.mean([is_inside[o[:count]].mean() for o in orders])


@pytest.mark.parametrize("values", [[5, 4, 3, 2, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [2, 1, 2, 1, 0, 0]])
@pytest.mark.parametrize("inside", [[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 0]])
def test_scores_are_those_of_ties_broken_at_random(values, inside):
    values, is_inside = np.array(values, dtype=float), np.array(inside, dtype=bool)
    scores = map_scores(values, is_inside)
    pointing, overlap = drawn_at_random(values, is_inside)
    assert scores["auc"] == pytest.approx(roc_auc_score(is_inside, values))
    assert scores["pointing"] == pytest.approx(pointing, abs=0.03)
    assert scores["overlap"] == pytest.approx(overlap, abs=0.03)


@pytest.mark.parametrize("inside", [[False] * 3, [True] * 3])
def test_without_patches_of_the_class_or_others_nothing_is_scored(inside):
    assert map_scores(np.arange(3.0), np.array(inside)) == dict.fromkeys(SCORES)


def entry(auc: float | None, patches: int = 2) -> dict:
    scores = dict.fromkeys(SCORES, auc)
    return {"classes": {"tumour": {"patches": patches, "of": 10, "attention": scores, "evidence": scores}}}


def test_means_count_slides_with_the_class_and_intervals_draw_patients():
    entries = [*(entry(auc) for auc in (1.0, 0.0, 0.4, 0.6, 0.5)), entry(None, patches=0), {"classes": {}}]
    found = mean_scores(entries, list("abcdefg"), seed=0)["tumour"]
    assert (found["n_slides"], found["n_cases"], found["chance_overlap"]) == (5, 5, 0.2)
    assert found["attention"]["auc"] == 0.5
    low, high = found["attention"]["intervals_95"]["auc"]
    assert 0 <= low < 0.4
    assert 0.6 < high <= 1
    few = mean_scores(entries[:4], list("abcd"), seed=0)["tumour"]
    assert few["attention"]["intervals_95"]["auc"] is None
    together = mean_scores(entries, list("aabcdef"), seed=0)["tumour"]
    assert (together["n_cases"], together["attention"]["intervals_95"]["auc"]) == (4, None)
    assert "mean of 5 slides (chance: AUC 0.5, overlap 0.200): attention AUC 0.500" in means_text({"tumour": found})[0]


def test_a_class_that_no_slide_shows_is_said_to_be_unscored():
    means = mean_scores([entry(None, patches=0)], ["a"], seed=0)
    assert means_text(means) == ["Annotated tumour: no slide has patches of it and others, so no map is scored."]
