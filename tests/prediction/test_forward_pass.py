import numpy as np
import pytest
import torch
from torch import nn

from MILS import list_mils
from MILS.bag_model import BagModel
from MILS.mergeable import BLOCK_ROWS
from tests.small import TASK
from utils.bags.chunks import cut_chunks
from utils.bags.store import Bag, open_bag, write_bag
from utils.prediction.forward_pass import SlideFeed, predict_features, predict_values

FULL = SlideFeed(None, "merge")
MODELS = list_mils()
MERGEABLE = [name for name in MODELS if name != "TransMIL"]


def bag(count: int = 53, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32))


def probabilities_of(model: nn.Module, features: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        logits, _ = model.eval()(features[None])
    return torch.softmax(logits[0].double(), dim=0).numpy()


@pytest.fixture
def stirred(make_model):
    """A model whose answers differ from slide to slide and whose attention is uneven."""

    def make(name: str, **options) -> nn.Module:
        torch.manual_seed(1)
        model = make_model(name, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        return model

    return make


@pytest.mark.parametrize("name", MODELS)
def test_mean_is_the_instance_weighted_mean_of_the_chunks(name, stirred):
    model, features = stirred(name), bag(53)
    cuts = cut_chunks(53, 20)
    each = np.stack([probabilities_of(model, features[torch.tensor(cut)]) for cut in cuts])
    sizes = np.array([len(cut) for cut in cuts])
    assert sorted(sizes.tolist()) == [17, 18, 18]
    output = predict_features(TASK, model, features, SlideFeed(20, "mean"))
    assert output.chunk_sizes.tolist() == sizes.tolist()
    assert output.chunk_probabilities == pytest.approx(each, abs=1e-6)
    assert output.probabilities == pytest.approx((each * sizes[:, None]).sum(axis=0) / 53, abs=1e-6)
    assert output.probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_larger_chunks_weigh_more(stirred):
    model, features = stirred("LiteMIL"), bag(3)
    output = predict_features(TASK, model, features, SlideFeed(2, "mean"))
    assert output.chunk_sizes.tolist() == [2, 1]
    expected = (2 * output.chunk_probabilities[0] + output.chunk_probabilities[1]) / 3
    assert output.probabilities == pytest.approx(expected)
    assert output.probabilities != pytest.approx(output.chunk_probabilities.mean(axis=0), abs=1e-4)


@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("feed", [FULL, SlideFeed(20, "merge")])
def test_merge_is_one_pass_over_the_whole_slide(name, feed, stirred, monkeypatch):
    model, features = stirred(name), bag(53)
    with monkeypatch.context() as patch:
        patch.setitem(BLOCK_ROWS, "cpu", 7)
        output = predict_features(TASK, model, features, feed, attention=True)
    assert output.probabilities == pytest.approx(probabilities_of(model, features), abs=1e-6)
    assert output.chunk_sizes.tolist() == [53]
    with torch.inference_mode():
        _, aux = model(features[None])
    assert output.attention == pytest.approx(aux["attn"][0].numpy(), abs=1e-6)


def test_merge_and_mean_differ(stirred):
    model, features = stirred("LiteMIL"), bag()
    merged = predict_features(TASK, model, features, SlideFeed(20, "merge")).probabilities
    assert merged != pytest.approx(
        predict_features(TASK, model, features, SlideFeed(20, "mean")).probabilities, abs=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_slide_of_one_chunk_is_the_whole_slide(name, stirred):
    model, features = stirred(name), bag(20)
    chunked = predict_features(TASK, model, features, SlideFeed(20, "mean"), attention=True)
    full = predict_features(TASK, model, features, FULL, attention=True)
    assert np.array_equal(chunked.probabilities, full.probabilities)
    assert np.array_equal(chunked.chunk_probabilities, full.probabilities[None])
    assert np.array_equal(chunked.attention, full.attention)
    assert chunked.chunk_sizes.tolist() == full.chunk_sizes.tolist() == [20]


def test_transmil_sees_a_full_slide_in_one_pass(stirred):
    model, features = stirred("TransMIL"), bag(53)
    assert predict_features(TASK, model, features, FULL).probabilities == pytest.approx(
        probabilities_of(model, features)
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("feed", [FULL, SlideFeed(20, "mean"), SlideFeed(20, "merge")])
def test_attention_is_a_distribution_over_the_slide(name, feed, stirred):
    attention = predict_features(TASK, stirred(name), bag(53), feed, attention=True).attention
    assert attention.shape[1] == 53
    assert (attention >= 0).all()
    assert attention.sum(axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("sequential", [False, True])
def test_attention_is_that_of_the_whole_slide_however_it_is_fed(name, sequential, stirred):
    model, features = stirred(name), bag(53)
    fed = predict_features(TASK, model, features, SlideFeed(20, "mean", sequential), attention=True).attention
    assert fed == pytest.approx(predict_features(TASK, model, features, FULL, attention=True).attention, abs=1e-6)


def test_attention_of_a_model_that_does_not_merge_is_put_together_from_its_chunks(stirred):
    model, features = stirred("TransMIL"), bag(53)
    cuts = cut_chunks(53, 20)
    attention = predict_features(TASK, model, features, SlideFeed(20, "mean"), attention=True).attention
    for cut in cuts:
        with torch.inference_mode():
            _, aux = model(features[torch.tensor(cut)][None])
        assert attention[:, cut] == pytest.approx(aux["attn"][0].numpy() * len(cut) / 53, abs=1e-6)


def test_attention_is_made_only_when_asked_for(stirred):
    assert predict_features(TASK, stirred("LiteMIL"), bag(), FULL).attention is None


def test_a_model_without_attention_gives_none(make_model):
    class Blind(BagModel):
        def __init__(self) -> None:
            super().__init__(16, 2)
            self.layer = nn.Linear(16, 2)

        def forward(self, x):
            return self.layer(x.mean(dim=1)), {"attn": None}

    for feed in (FULL, SlideFeed(20, "mean")):
        assert predict_features(TASK, Blind(), bag(), feed, attention=True).attention is None


def test_each_module_is_left_in_its_mode(make_model):
    model = make_model().train()
    frozen = list(model.modules())[-1]
    frozen.eval()
    before = [module.training for module in model.modules()]
    predict_features(TASK, model, bag(), SlideFeed(20, "mean"))
    assert [module.training for module in model.modules()] == before
    model.eval()
    predict_features(TASK, model, bag(), FULL)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_mode_is_restored_after_an_error(name, make_model):
    model = make_model(name).train()
    with pytest.raises(ValueError, match=name):
        predict_features(TASK, model, torch.zeros(5, 3), FULL)
    assert model.training


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("feed", [FULL, SlideFeed(20, "mean")])
def test_dropout_is_off(name, feed, make_model):
    model = make_model(name, dropout=0.5).train()
    first, second = (predict_features(TASK, model, bag(), feed).probabilities for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("feed", [FULL, SlideFeed(20, "mean")])
def test_half_precision_features_are_cast_not_computed_with(name, feed, stirred):
    model, features = stirred(name), bag().half()
    half, single = (predict_features(TASK, model, part, feed) for part in (features, features.float()))
    assert half.probabilities.dtype == np.float64
    assert np.array_equal(half.probabilities, single.probabilities)


def test_features_and_gradients_are_left_alone(stirred):
    model, features = stirred("LiteMIL"), bag()
    before = features.clone()
    predict_features(TASK, model, features, SlideFeed(20, "mean"))
    assert torch.equal(features, before)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("chunked", {"mode": "chunked", "chunk_size": 20, "aggregation": "mean"}),
        ("full", {"mode": "full", "chunk_size": None, "aggregation": "merge"}),
    ],
)
def test_feed_of_a_mode(mode, expected):
    assert SlideFeed.of_mode(mode, 20).as_dict() == expected | {"sequential": False}
    assert SlideFeed.of_mode("chunked", 20, sequential=True).as_dict()["sequential"]


def test_a_slide_is_cut_as_the_feed_says(stirred):
    model, features = stirred("LiteMIL"), bag(53)
    each = [probabilities_of(model, features[start:stop]) for start, stop in ((0, 17), (17, 35), (35, 53))]
    output = predict_features(TASK, model, features, SlideFeed(20, "mean", sequential=True), attention=True)
    assert output.chunk_probabilities == pytest.approx(np.stack(each), abs=1e-6)
    assert output.attention.sum(axis=1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("feed", [FULL, SlideFeed(20, "mean"), SlideFeed(20, "merge")], ids=["full", "mean", "merge"])
def test_features_left_in_their_file_give_the_same_answer(name, feed, stirred, tmp_path, monkeypatch):
    model, features = stirred(name), bag(53)
    write_bag(tmp_path / "slide.h5", Bag(features.numpy()))
    expected = predict_features(TASK, model, features, feed, attention=True)
    monkeypatch.setitem(BLOCK_ROWS, "cpu", 10)
    stored = open_bag(tmp_path / "slide.h5").features
    if name in MERGEABLE and feed is FULL:
        monkeypatch.setattr(stored, "whole", None)  # it is streamed
    found = predict_features(TASK, model, stored, feed, attention=True)
    for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("feed", [SlideFeed(20, "mean"), FULL], ids=["chunked", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_slides_predicted_together_are_answered_as_each_alone(name, feed, stirred, monkeypatch):
    monkeypatch.setitem(BLOCK_ROWS, "cpu", 32)
    model, slides = stirred(name).train(), [bag(count, count) for count in (7, 19, 53, 3, 20, 21, 1)]
    expected = np.stack([predict_features(TASK, model, slide, feed).probabilities for slide in slides])
    passes = []
    monkeypatch.setattr(type(model), "forward_bags", counting(type(model).forward_bags, passes))
    np.testing.assert_allclose(predict_values(TASK, model, iter(slides), feed), expected, atol=1e-6)
    assert model.training
    assert max(passes) > 1, "small slides share a pass"
    assert sum(passes) < len(slides), "a large one has its own"


def counting(forward_bags, passes):
    def counted(self, bags):
        passes.append(len(bags))
        return forward_bags(self, bags)

    return counted
