"""Maps of slides that were answered together compare the patches of all of them."""

import numpy as np
import pytest

from utils.pictures.attention_map import AttentionMap
from utils.pictures.evidence_map import EvidenceMap
from utils.pictures.overlay import MapStyle


def test_colours_of_a_slide_of_several_compare_the_patches_of_all():
    rng = np.random.default_rng(3)
    weights = rng.random(50)
    weights /= weights.sum()
    coords = np.stack([np.arange(20) * 256, np.zeros(20)], axis=1).astype(np.int64)
    whole = AttentionMap(np.zeros((50, 2), np.int64), weights, 256)
    part = AttentionMap(coords, weights[10:30], 256, of_case=weights, first=10)
    alone = AttentionMap(coords, weights[10:30], 256)
    assert np.array_equal(part.percentiles, whole.percentiles[10:30])
    assert not np.allclose(part.percentiles, alone.percentiles)
    assert part.multiples == pytest.approx(weights[10:30] * 50)
    assert part.peak == pytest.approx(weights[10:30].max() * 50)
    assert np.array_equal(part.ranks, alone.ranks), "ranks are those within the slide"
    for scale in ("percentile", "attention", "uniform"):
        style = MapStyle(scale=scale)
        assert style.limits(part) == style.limits(whole)
        assert np.array_equal(style.values(part), style.values(whole)[10:30])
    assert "within the patient's slides" in MapStyle().label(part)
    assert "within the slide" in MapStyle().label(alone)


def test_the_colours_of_evidence_end_where_those_of_all_slides_do():
    values = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
    names, ends = ("a", "b"), np.zeros(2)
    whole = EvidenceMap(names, values, ends, ends)
    part = EvidenceMap(names, values[:, :10] / 9, ends, ends, of_case=values)
    assert part.limit("b") == whole.limit("b")
    assert np.array_equal(part.of_class("a"), values[0, :10] / 9)
