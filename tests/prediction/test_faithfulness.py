import json

import numpy as np
import pytest
import torch

from MILS import build_mil, list_mils
from MILS.ensemble import Ensemble
from MILS.mergeable import BLOCK_ROWS
from tests.small import TASK
from utils.bags.store import Bag, open_bag, write_bag
from utils.core.errors import FeatureFileError
from utils.prediction.faithfulness import Curves, _borne_out_more, measure_faithfulness
from utils.prediction.forward_pass import SlideFeed, predict_features

WHOLE = SlideFeed(None, "merge")
COUNT = 60


def stirred(name: str, seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = build_mil(name, input_dim=16, num_classes=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def bag(count: int = COUNT, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32))


def attention_of(model, features) -> np.ndarray:
    return predict_features(TASK, model, features, WHOLE, attention=True).attention.mean(axis=0)


def said(model, features, kept: np.ndarray, index: int) -> float:
    return float(predict_features(TASK, model, features[torch.from_numpy(np.sort(kept))], WHOLE).probabilities[index])


@pytest.mark.parametrize("name", list_mils())
def test_the_curves_are_what_the_model_says_of_the_patches_that_are_left(name):
    model, features = stirred(name), bag()
    attention = np.random.default_rng(3).permutation(COUNT) + 1.0  # no two alike
    order, found = np.argsort(-attention), measure_faithfulness(TASK, [model], features, attention / attention.sum(), 1)
    for fraction, most, least in zip(
        found.deletion.fractions, found.deletion.most_first, found.deletion.least_first, strict=True
    ):
        gone = round(fraction * COUNT)
        assert most == pytest.approx(said(model, features, order[gone:], 1), abs=1e-5)
        assert least == pytest.approx(said(model, features, order[: COUNT - gone], 1), abs=1e-5)
    for fraction, most, least in zip(
        found.insertion.fractions, found.insertion.most_first, found.insertion.least_first, strict=True
    ):
        come = round(fraction * COUNT)
        assert most == pytest.approx(said(model, features, order[:come], 1), abs=1e-5)
        assert least == pytest.approx(said(model, features, order[COUNT - come :], 1), abs=1e-5)
    whole = said(model, features, order, 1)
    for curve in (found.deletion.most_first[0], found.deletion.random[:, 0], found.insertion.random[:, -1]):
        assert curve == pytest.approx(whole, abs=1e-5)
    assert found.deletion.fractions[0] == 0
    assert found.insertion.fractions[-1] == 1


def test_the_gap_is_between_the_order_of_attention_and_random_orders():
    fractions, half = np.array([0, 0.5, 1.0]), np.array([1, 0.5, 0.0])
    curves = Curves(
        fractions, np.array([1, 0, 0.0]), np.array([1, 1, 0.0]), np.stack([half, half, np.array([1, 0, 0.0])])
    )
    areas = 0.25, 0.75, [0.5, 0.5, 0.25]
    deletion, insertion = curves.as_dict(-1), curves.as_dict(1)
    for found in (deletion, insertion):
        assert (found["area_most_attended_first"], found["area_least_attended_first"]) == areas[:2]
        assert found["area_random"] == areas[2]
    assert deletion["gap"] == pytest.approx(np.mean(areas[2]) - areas[0])
    assert insertion["gap"] == pytest.approx(areas[0] - np.mean(areas[2]))
    assert (deletion["random_orders_beaten"], insertion["random_orders_beaten"]) == (2, 0)


def test_features_in_a_file_that_come_in_blocks_give_the_same_curves(tmp_path, monkeypatch):
    model, features = stirred("LiteMIL"), bag()
    attention = attention_of(model, features)
    expected = measure_faithfulness(TASK, [model], features, attention, 0)
    write_bag(tmp_path / "slide.h5", Bag(features.numpy()))
    monkeypatch.setitem(BLOCK_ROWS, "cpu", 7)
    monkeypatch.setattr("MILS.mergeable.GROUPED_ROWS", 20)
    found = measure_faithfulness(TASK, [model], open_bag(tmp_path / "slide.h5").features, attention, 0)
    for curves in ("deletion", "insertion"):
        for name in ("fractions", "most_first", "least_first", "random"):
            curve = getattr(getattr(expected, curves), name)
            # Logits of some hundreds: single precision is worth some 1e-5 of them.
            np.testing.assert_allclose(getattr(getattr(found, curves), name), curve, atol=1e-4)
    np.testing.assert_allclose(found.randomised, expected.randomised, rtol=1e-4)


def test_several_models_answer_as_their_mean(tmp_path):
    one, two, three = (stirred(name, seed) for name, seed in (("LiteMIL", 1), ("LiteMIL", 2), ("ABMIL", 3)))
    features = bag()
    attention = attention_of(one, features)
    each = [measure_faithfulness(TASK, [model], features, attention, 1) for model in (one, two, three)]
    together = measure_faithfulness(TASK, [Ensemble([one, two]), three], features, attention, 1)
    np.testing.assert_allclose(
        together.insertion.most_first, np.mean([found.insertion.most_first for found in each], axis=0), atol=1e-6
    )
    assert together.randomised.sum() == pytest.approx(1, abs=1e-4)


def planted() -> tuple[torch.nn.Module, torch.Tensor]:
    """A model that attends to the first feature, and says class 1 where it is high, as five of the patches have it."""
    torch.manual_seed(0)
    model = build_mil("LiteMIL", input_dim=16, num_classes=2, hidden_dim=16, num_heads=1, dropout=0.0).eval()
    features = 0.1 * bag()
    features[10:15, 0] = 3.0
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        negative = 0.1 * bag(seed=step + 1)
        positive = negative.clone()
        positive[np.random.default_rng(step).permutation(COUNT)[:5], 0] = 3.0
        loss = torch.nn.functional.cross_entropy(model(torch.stack([negative, positive]))[0], torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, features


def test_attention_that_matters_is_told_from_attention_that_does_not():
    model, features = planted()
    true = measure_faithfulness(TASK, [model], features, attention_of(model, features), 1).as_dict()
    assert true["deletion"]["gap"] > 0.3
    assert true["deletion"]["random_orders_beaten"] == true["random_orders"] == 10
    assert true["insertion"]["gap"] > 0.05
    made_up = np.random.default_rng(5).random(COUNT)
    false = measure_faithfulness(TASK, [model], features, made_up / made_up.sum(), 1).as_dict()
    assert abs(false["deletion"]["gap"]) < 0.2
    upside_down = 1 / attention_of(model, features)
    worse = measure_faithfulness(TASK, [model], features, upside_down / upside_down.sum(), 1).as_dict()
    assert worse["deletion"]["gap"] < 0
    assert worse["deletion"]["random_orders_beaten"] == 0


def test_a_map_that_owes_nothing_to_training_is_noted():
    """The rank correlation with random weights: 1 for a map that is the features' alone, none for a constant one."""
    model, features = planted()
    found = measure_faithfulness(TASK, [model], features, attention_of(model, features), 1)
    again = measure_faithfulness(TASK, [model], features, found.randomised, 1)
    assert again.rank_correlations[0] == pytest.approx(1)
    assert len(again.rank_correlations) == 3
    assert all(abs(one) < 0.9 for one in again.rank_correlations[1:])
    even = measure_faithfulness(TASK, [model], features, np.full(COUNT, 1 / COUNT), 1)
    assert even.rank_correlations == [None] * 3
    pooled = measure_faithfulness(TASK, [stirred("meanPool")], features, attention_of(model, features), 1)
    assert pooled.rank_correlations == [None] * 3
    json.dumps(even.as_dict(), allow_nan=False)


def test_patches_of_equal_attention_have_no_order_of_their_own():
    """Features that change along the file: an order by place would beat random ones."""
    model, features = planted()
    features = torch.cat([features[10:15], features[:10], features[15:]])
    curves = measure_faithfulness(TASK, [model], features, np.full(COUNT, 1 / COUNT), 1).deletion
    assert 0 < (curves.area(curves.random) > curves.area(curves.most_first)).sum() < 10


@pytest.mark.parametrize("noise", [0, 1e-8])  # sums in float32 are not quite equal
def test_equal_weights_have_no_gap_but_a_reason(noise):
    model, features = planted()
    attention = np.full(COUNT, 1 / COUNT) * (1 + noise * np.arange(COUNT))
    evidence = attention_of(model, features)
    found = measure_faithfulness(TASK, [model], features, attention, 1, evidence=evidence).as_dict()
    for name in ("deletion", "insertion"):
        curves = found[name]
        assert curves["reason"] == "uniform: this model weighs every patch alike"
        assert {key for key, value in curves.items() if value is None} == {
            "most_attended_first", "least_attended_first", "area_most_attended_first", "area_least_attended_first",
            "gap", "random_orders_beaten",
        }  # fmt: skip
        assert len(curves["random_mean"]) == len(curves["fractions"])
    assert found["evidence"]["deletion"]["gap"] > 0.3
    assert found["borne_out_more"] is None
    of_none = measure_faithfulness(TASK, [model], features, evidence, 1, evidence=np.zeros(COUNT)).as_dict()
    assert of_none["evidence"]["deletion"]["reason"] == "uniform: every patch has the same evidence"
    assert of_none["evidence"]["deletion"]["most_for_first"] is None
    json.dumps([found, of_none], allow_nan=False)


@pytest.mark.parametrize(
    ("attention_gap", "evidence_gap", "name"),
    [(0.1, 0.2, "evidence"), (0.2, 0.1, "attention"), (0.1, 0.1, None), (-0.1, 0.2, None), (None, 0.2, None)],
)
def test_of_two_maps_that_beat_random_orders_the_larger_gap_is_named(attention_gap, evidence_gap, name):
    assert _borne_out_more(attention_gap, evidence_gap) == name


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_small_slides(count):
    model, features = stirred("ABMIL"), bag(count)
    found = measure_faithfulness(TASK, [model], features, attention_of(model, features), 0)
    json.dumps(found.as_dict(), allow_nan=False)
    np.testing.assert_allclose(found.deletion.fractions, 1 - found.insertion.fractions[::-1])


def test_a_single_patch_is_refused():
    model = stirred("ABMIL")
    with pytest.raises(FeatureFileError, match="the slide has 1 patch, from which nothing can be taken away"):
        measure_faithfulness(TASK, [model], bag(1), np.ones(1), 0)
