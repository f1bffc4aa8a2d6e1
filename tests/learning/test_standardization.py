"""Features of any scale reach a model as those it is initialised for, by a map that is part of the model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from MILS import build_mil, list_mils
from MILS.bag_model import BagModel, evaluating
from MILS.ensemble import Ensemble
from MILS.mergeable import MergeableModel
from tests.cohort import write_cohort
from tests.learning.runs import assert_same, contents, leave_unfinished, make_cv
from tests.small import TASK
from utils.bags.inventory import root_mean_square
from utils.bags.store import read_bag, write_bag
from utils.core.errors import ConfigError
from utils.learning import jobs
from utils.learning.splits import InnerFold, OuterFold
from utils.learning.standardization import Standardization, feature_scale, standardize, why_unusual
from utils.mil_dataset import MILDataset
from utils.prediction.checkpoint import load_checkpoint
from utils.prediction.faithfulness import measure_faithfulness
from utils.prediction.forward_pass import SlideFeed, predict_features

DIM = 12


def small(name: str) -> BagModel:
    torch.manual_seed(0)
    heads = {"num_heads": 2} if name in ("LiteMIL", "TransMIL", "ABMIL_Multihead") else {}
    return build_mil(name, input_dim=DIM, num_classes=2, hidden_dim=16, **heads)


@pytest.fixture(params=list_mils())
def pair(request) -> tuple[BagModel, BagModel]:
    """A model, and the same one that standardises."""
    plain, other = small(request.param), small(request.param)
    standardize(other, *scale())
    return plain.eval(), other.eval()


def scale() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return 1e4 * torch.randn(DIM, generator=rng), 1e3 * (torch.rand(DIM, generator=rng) + 0.5)


def far(x: torch.Tensor) -> torch.Tensor:
    mean, std = scale()
    return x * std + mean


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_every_way_through_a_model_standardises(pair):
    plain, other = pair
    x = torch.randn(2, 30, DIM)
    mask = torch.arange(30).expand(2, 30) >= torch.tensor([[30], [20]])
    with torch.no_grad():
        for answer, expected in zip(other(far(x), mask), plain(x, mask), strict=True):
            found = (answer, expected) if isinstance(answer, torch.Tensor) else (answer["attn"], expected["attn"])
            assert close(*found)
        bags = [x[0], x[1, :20]]
        assert close(other.forward_bags([far(bag) for bag in bags])[0], plain.forward_bags(bags)[0])
        if isinstance(plain, MergeableModel):
            blocks = other.forward_blocks(far(x[0]).split(7))
            assert close(blocks[0], plain.forward_blocks(x[0].split(7))[0])


def test_long_bags_have_the_gradients_of_standardised_ones(monkeypatch):
    monkeypatch.setattr("MILS.mergeable.BLOCK_ROWS", {"cpu": 8})
    x, grads = torch.randn(1, 30, DIM), []
    for is_far in (False, True):
        model = small("ABMIL").eval()
        if is_far:
            standardize(model, *scale())
        model(far(x) if is_far else x)[0].sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(close(*both) for both in zip(*grads, strict=True))


def test_half_precision_features_are_standardised_in_single(pair):
    plain, other = pair
    other.set_feature_scale(torch.full((DIM,), 1000.0), torch.full((DIM,), 0.5))
    x = (1000 + torch.randn(1, 9, DIM)).half()
    with torch.no_grad():
        assert close(other(x)[0], plain((x.float() - 1000) / 0.5)[0])


def test_the_map_is_kept_with_the_weights(pair):
    _, other = pair
    state = other.state_dict()
    assert {"feature_mean", "feature_std"} <= state.keys()
    for again in (small(other.spec["name"]), Ensemble([small(other.spec["name"]), small(other.spec["name"])])):
        names = [""] if not isinstance(again, Ensemble) else ["members.0.", "members.1."]
        again.load_state_dict({name + key: value for name in names for key, value in state.items()})
        with torch.no_grad(), evaluating(again):
            x = far(torch.randn(1, 5, DIM))
            assert close(again(x)[0].softmax(-1), other(x)[0].softmax(-1))
    again = small(other.spec["name"])
    again.load_state_dict(state)
    again.load_state_dict(small(other.spec["name"]).state_dict())
    assert again.feature_mean is None, "weights without a map are those of a model without one"


def test_random_weights_of_faithfulness_see_standardised_features():
    plain, other = small("LiteMIL").eval(), small("LiteMIL").eval()
    standardize(other, *scale())
    x = torch.randn(40, DIM)
    with torch.no_grad():
        attention = plain(x[None])[1]["attn"][0].mean(dim=0).numpy()
    found = measure_faithfulness(TASK, [other], far(x), attention, 0)
    expected = measure_faithfulness(TASK, [plain], x, attention, 0)
    assert found.randomised == pytest.approx(expected.randomised, rel=1e-3)
    assert found.deletion.most_first == pytest.approx(expected.deletion.most_first, rel=1e-3)


def test_slides_weigh_alike_and_an_offset_costs_no_digits():
    rng = np.random.default_rng(0)
    slides = [1e6 + k + rng.standard_normal((count, 3)) for k, count in enumerate((5, 5000, 9000))]
    mean, std = feature_scale(lambda slide: torch.from_numpy(slides[slide]), [0, 1, 2])
    repeated = [np.resize(slide, (45_000, 3)) for slide in slides]
    assert mean.numpy() == pytest.approx(np.concatenate(repeated).mean(axis=0), rel=1e-6)
    expected = np.concatenate(repeated).std(axis=0)
    assert std.numpy() == pytest.approx(np.maximum(expected, np.median(expected)), rel=1e-4)


def test_features_that_hardly_vary_in_training_are_not_blown_up():
    """Of deviations of about 100, 1, 300, 200 and 0, the median of those that vary is the least."""
    features = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
    features *= torch.tensor([100.0, 1.0, 300.0, 200.0, 0.0])
    _, std = feature_scale(lambda _: features, [0, 0])
    assert std.numpy() == pytest.approx([100, 100, 300, 200, 100], rel=0.05)


def test_constant_features_are_left_at_nought():
    features = torch.cat([torch.full((50, 1), 0.1), torch.zeros(50, 1)], dim=1)
    mean, std = feature_scale(lambda _: features, [0, 0])
    assert ((features - mean) / std).abs().max() < 1e-6


@pytest.mark.parametrize("rms", [1e4, 1e-4, 1 / np.sqrt(512), 1 / np.sqrt(2560)])
def test_scales_that_are_unusual(rms):
    assert "root mean square" in (why_unusual(np.full(3, rms), 30) or "")


@pytest.mark.parametrize("dim", [8, 32, 64, 512])
def test_features_of_length_1_are_known_however_few_they_are(dim):
    features = torch.nn.functional.normalize(torch.randn(3, 200, dim), dim=2)
    rms = np.array([root_mean_square(slide.half()) for slide in features])
    assert "have length 1" in (why_unusual(rms, dim) or "")
    others = np.array([root_mean_square(slide) for slide in torch.randn(3, 200, dim) / dim**0.5])
    assert "length 1" not in (why_unusual(others * [0.9, 1, 1.1], dim) or "")


def test_each_fold_decides_by_its_own_training_slides():
    slides = np.arange(9)
    inner = [(InnerFold(np.setdiff1d(slides, test), test[:0]),) for test in np.split(slides, 3)]
    folds = [OuterFold(k + 1, test, inner[k]) for k, test in enumerate(np.split(slides, 3))]
    rms = np.array([1e4, 1e4, 1e4, 1e4, 1, 1, 1e4, 1, 1])  # of the first fold's training slides, only two are large
    assert Standardization.decide("auto", folds, rms, 30).folds == (2, 3)
    assert Standardization.decide("on", folds, rms, 30).folds == (1, 2, 3)
    assert Standardization.decide("off", folds, rms, 30).folds == ()
    assert Standardization.decide("auto", folds, np.ones(9), 30).as_dict() == {"asked": "auto", "folds": [], "rms": 1.0}


def test_a_model_that_takes_features_as_they_are_is_refused():
    class Raw(BagModel):
        def __init__(self) -> None:
            super().__init__(DIM, 2)
            self.layer = nn.Linear(DIM, 2)

        def forward(self, x, mask=None):
            return self.layer(x.mean(dim=1)), {"attn": None}

    with pytest.raises(ConfigError, match=r"Raw: does not standardise .* begin it with x = self\.cast\(x\), or give"):
        standardize(Raw(), *scale())


class TestStandardize:
    def scaled(self, folder: Path, factor: float) -> MILDataset:
        """The cohort of the other tests, its features so many times as large."""
        csv_path, features = write_cohort(folder, patches=(5, 50), dtype="float32")
        for path in features.iterdir():
            bag = read_bag(path)
            write_bag(path, replace(bag, features=bag.features * np.float32(factor)))
        return MILDataset(csv_path, features, chunk_size=20)

    @pytest.mark.usefixtures("blank_figures")
    def test_features_of_usual_scale_are_left_alone(self, finished, dataset, tmp_path):
        assert finished.results["standardize"] | {"rms": None} == {"asked": "auto", "folds": [], "rms": None}
        make_cv(dataset, tmp_path / "run", standardize="off").run()
        found, expected = contents(tmp_path / "run"), contents(finished.folder)
        assert [name for name in expected if found[name] != expected[name]] == ["outputs.json"]
        assert "feature_mean" not in load_checkpoint(finished.folder / "all_folds_best.pth").state_dict

    def test_the_decision_is_no_other_run_where_it_decides_the_same(self, finished, dataset):
        assert make_cv(dataset, finished.folder, standardize="off").run() == finished.results

    @pytest.mark.parametrize("final", ["best", "ensemble", "refit"])
    def test_features_of_another_scale_are_standardised_as_a_part_of_the_model(
        self, final, tmp_path, aloud, no_figures
    ):
        data = self.scaled(tmp_path / "cohort", 1e4)
        cv = make_cv(data, tmp_path / "run", final=final)
        results = cv.run()
        assert results["standardize"]["folds"] == [1, 2, 3]
        assert aloud.text.count("each feature is standardised (--standardize off leaves them as they are)") == 1
        predictions = pd.read_csv(tmp_path / "run" / "predictions.csv")
        for number, fold in enumerate(cv.folds(), start=1):
            model = load_checkpoint(tmp_path / "run" / f"fold_{number}_best.pth").build()
            for slide in fold.test.tolist():
                output = predict_features(TASK, model, data.features(slide), SlideFeed(20, "mean"))
                assert predictions["prob_malignant"][slide] == pytest.approx(output.probabilities[1], abs=1e-6)
            inner = results["fold_results"][number - 1]["selection"]["inner_fold"] or 1
            used = fold.train if final == "refit" else fold.inner[inner - 1].train
            mean, _ = feature_scale(data.features, used)
            stored = load_checkpoint(tmp_path / "run" / f"fold_{number}_best.pth").state_dict
            assert torch.equal(stored["members.0.feature_mean" if final == "ensemble" else "feature_mean"], mean)

    def test_a_killed_run_goes_on_standardising(self, tmp_path, no_figures, monkeypatch):
        data = self.scaled(tmp_path / "cohort", 1e-4)
        make_cv(data, tmp_path / "whole", n_outer=2).run()
        leave_unfinished(make_cv(data, tmp_path / "run", n_outer=2))
        monkeypatch.setattr(jobs, "fit", None)
        make_cv(data, tmp_path / "run", n_outer=2).run()
        assert_same(contents(tmp_path / "run"), contents(tmp_path / "whole"))

    def test_asked_for_or_not_it_is_another_run(self, dataset, tmp_path, unfitted, aloud):
        make_cv(dataset, tmp_path / "run").run()
        make_cv(dataset, tmp_path / "run", standardize="on").run()
        assert "held another run (standardized differs)" in aloud.text

    def test_turned_off_it_says_what_that_costs(self, tmp_path, unfitted, aloud):
        make_cv(self.scaled(tmp_path / "cohort", 1e4), tmp_path / "run", standardize="off").run()
        assert "they may learn little; give --standardize auto" in aloud.text
