"""What patches contribute to a slide's answer, however it is fed."""

import numpy as np
import pytest
import torch

from MILS import list_mils
from MILS.ensemble import Ensemble
from MILS.mergeable import MergeableModel
from MILS.summaries import MaxSummary
from utils.bags.chunks import cut_chunks
from utils.bags.store import Bag, open_bag, write_bag
from utils.prediction.forward_pass import SlideFeed, predict_features, set_references
from utils.tasks.classification import Classification

FEEDS = {
    "whole": SlideFeed(None, "merge"),
    "chunks": SlideFeed(20, "mean"),
    "runs": SlideFeed(20, "mean", sequential=True),
}
MERGEABLE = [name for name in list_mils() if name != "TransMIL"]
TASK = Classification(("a", "b"))


def bag(count: int = 53, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 16)).astype(np.float32))


@pytest.fixture
def made(make_model):
    """A model with sure answers, and a reference unless it is not to have one."""

    def make(name: str, seed: int = 1, *, reference: bool = True, **options):
        torch.manual_seed(seed)
        model = make_model(name, **options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.4 * torch.randn_like(parameter)
        if reference:
            set_references(model, lambda: [bag(30, 7), bag(40, 8)], FEEDS["chunks"])
        return model

    return make


def evidence_in(model, features, feed, task=TASK):
    return predict_features(task, model, features, feed, evidence=True)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("name", MERGEABLE)
def test_it_adds_up_to_the_log_odds_of_the_answer(name, reference, feed, classes, made):
    task = Classification(tuple("abc"[:classes]))
    model = made(name, reference=reference, num_classes=classes)
    output = evidence_in(model, bag(), FEEDS[feed], task)
    found, p = output.evidence, output.probabilities
    assert found.contributions.shape == (classes, 53)
    assert found.signals == pytest.approx(np.log(p / (1 - p)), abs=1e-4)
    assert found.contributions.sum(axis=1) == pytest.approx(found.signals - found.reference, abs=1e-3)
    assert found.is_own_mean is not reference


@pytest.mark.parametrize("name", MERGEABLE)
def test_the_reference_is_the_mean_of_the_slides_as_they_are_fed(name, made):
    model = made(name, reference=False)
    slides, feed = [bag(30, 7), bag(45, 8)], FEEDS["chunks"]
    set_references(model, lambda: slides, feed)
    means = []
    for slide in slides:
        cuts = cut_chunks(len(slide), feed.chunk_size)
        pooled = [model.pooled(model.read_blocks([slide[torch.as_tensor(cut)]])[0])[0] for cut in cuts]
        means.append(sum(len(cut) * one for cut, one in zip(cuts, pooled, strict=True)) / len(slide))
    assert torch.allclose(model.pooled_reference, sum(means) / 2, atol=1e-6)
    again = type(model)(**{key: value for key, value in model.spec.items() if key != "name"})
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.pooled_reference, model.pooled_reference)


def test_a_slide_that_is_the_reference_has_nothing_to_add(made):
    model = made("LiteMIL", reference=False)
    set_references(model, lambda: [bag()], FEEDS["whole"])
    found = evidence_in(model, bag(), FEEDS["whole"]).evidence
    assert found.signals == pytest.approx(found.reference, abs=1e-5)
    assert found.contributions.sum(axis=1) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("feed", FEEDS)
def test_each_patch_has_its_own(name, feed, made):
    """Patches that are the same contribute the same wherever they lie; the maximum is supplied by the first alone."""
    features = bag(7).repeat(8, 1)[:53]
    found = evidence_in(made(name), features, FEEDS["whole"] if name == "maxPool" else FEEDS[feed]).evidence
    if name == "maxPool":
        assert not found.contributions[:, 7:].any()
        return
    cuts = cut_chunks(53, FEEDS[feed].chunk_size, sequential=FEEDS[feed].sequential)
    for cut in cuts:
        places = torch.as_tensor(cut).numpy()
        for kind in range(7):
            same = found.contributions[1, places[places % 7 == kind]]
            assert same == pytest.approx(same[0], abs=1e-5)


@pytest.mark.parametrize("name", MERGEABLE)
def test_a_slide_is_read_from_its_file_in_blocks(name, made, tmp_path):
    path = tmp_path / "slide.h5"
    write_bag(path, Bag(bag().numpy()))
    stored = open_bag(path).features
    model = made(name)
    from_file, whole = (evidence_in(model, source, FEEDS["whole"]).evidence for source in (stored, bag()))
    assert from_file.contributions == pytest.approx(whole.contributions, abs=1e-6)


def test_an_ensemble_gives_the_mean_of_its_members(made):
    members = [made("LiteMIL", seed) for seed in (1, 2)]
    each = [evidence_in(member, bag(), FEEDS["chunks"]).evidence for member in members]
    found = evidence_in(Ensemble(members), bag(), FEEDS["chunks"]).evidence
    assert found.contributions == pytest.approx((each[0].contributions + each[1].contributions) / 2, abs=1e-6)
    assert found.signals == pytest.approx((each[0].signals + each[1].signals) / 2)
    assert not found.is_own_mean


def test_a_model_that_does_not_merge_gives_none(made):
    model = made("TransMIL")
    assert evidence_in(model, bag(), FEEDS["whole"]).evidence is None
    assert model.pooled_reference is None
    assert evidence_in(Ensemble([model, model]), bag(), FEEDS["whole"]).evidence is None


def test_a_model_of_ones_own_may_merge_without_evidence():
    class Last(MergeableModel):
        """Sees nothing but its last instance."""

        def __init__(self) -> None:
            super().__init__(16, 2)
            self.layers = torch.nn.Sequential(torch.nn.Linear(16, 4))
            self.head = torch.nn.Linear(4, 2)

        def instance_layers(self):
            return self.layers

        def reduce(self, h, mask):
            return MaxSummary(h[:, -1], torch.zeros(len(h), 4, dtype=torch.long), torch.tensor(h.shape[1])), h.mT[:, :1]

        def classify(self, summary):
            return self.head(summary.maximum)

        def attention(self, summary, trace):
            return torch.softmax(trace, dim=-1)

    model = Last().eval()
    set_references(model, lambda: [bag()], FEEDS["whole"])
    assert model.pooled_reference is None
    assert evidence_in(model, bag(), FEEDS["whole"]).evidence is None


def test_it_is_made_only_when_asked_for(made):
    assert predict_features(TASK, made("LiteMIL"), bag(), FEEDS["whole"], attention=True).evidence is None


@pytest.mark.parametrize("name", MERGEABLE)
def test_what_argues_for_a_class_is_what_its_answer_falls_without(name, made):
    """Without its supporters a class is less probable, without its opponents more."""
    model, features = made(name), bag()
    output = evidence_in(model, features, FEEDS["whole"])
    order = torch.from_numpy(np.argsort(output.evidence.contributions[1]))

    def probability(kept):
        return predict_features(TASK, model, features[kept], FEEDS["whole"]).probabilities[1]

    assert probability(order[:-10]) < output.probabilities[1] < probability(order[10:])
