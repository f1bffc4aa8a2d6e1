"""Trainings on a card: as on the CPU, repeatable, several at a time, resumed, in little memory.

What takes the fixture `device` runs on the CPU too.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from MILS import build_mil
from tests.conftest import needs_ray
from tests.learning.runs import (
    CHUNKED,
    TRAIN,
    VAL,
    Interrupted,
    assert_same,
    contents,
    leave_unfinished,
    make_cv,
)
from utils.bags.dataset import on_device
from utils.core.device import has_tf32, repeatable
from utils.core.engine import Processes, open_engine
from utils.core.errors import EngineError
from utils.core.files import read_json
from utils.core.ray_settings import Cluster
from utils.learning import jobs
from utils.learning.early_stopping import EarlyStopping
from utils.learning.settings import Training
from utils.learning.training import ModelTraining, fit
from utils.mil_dataset import MILDataset

SETTINGS = Training(epochs=3, batch_size=8, lr=1e-2, least_steps=0)
FACTORY = partial(build_mil, "LiteMIL", input_dim=16, num_classes=2, hidden_dim=16, num_heads=2)
pytestmark = pytest.mark.usefixtures("no_figures")


def fitted(data, device, make=FACTORY, **changes):
    settings = replace(SETTINGS, **changes)
    with repeatable(device, on=True):
        stopping = EarlyStopping(data.task, VAL, CHUNKED, "slide_auc", "best")
        return fit(make, data, TRAIN, stopping, settings, seed=7, device=device)


def same(one, other) -> bool:
    states = zip(one.state_dict.values(), other.state_dict.values(), strict=True)
    return one.history == other.history and all(torch.equal(*pair) for pair in states)


class TestATraining:
    def test_gives_the_same_bytes_twice(self, dataset, device):
        assert same(fitted(dataset, device), fitted(dataset, device))

    def test_agrees_with_the_cpus(self, dataset, device):
        """But for dropout, whose draws are those of the device."""
        make = partial(FACTORY, dropout=0.0)
        found, expected = (
            fitted(dataset, where, make, precision="fp32", epochs=2) for where in (device, torch.device("cpu"))
        )
        for row, wanted in zip(found.history, expected.history, strict=True):
            assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-3)
            assert row["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-3)

    def test_is_the_same_with_features_kept_on_the_device(self, dataset, device):
        kept = on_device(dataset, device)
        assert same(fitted(kept, device), fitted(dataset, device))
        assert kept.features(int(TRAIN[0])).device.type == device.type

    def test_standardizes_by_features_on_the_device(self, dataset, device):
        mean, expected = (
            fitted(data, device, standardize="on").state_dict["feature_mean"]
            for data in (on_device(dataset, device), dataset)
        )
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.gpu
    @pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "fp32"])
    def test_learns_in_every_precision(self, dataset, card, precision):
        if precision == "tf32" and not has_tf32(card):
            pytest.skip("the card has no TF32")
        training = ModelTraining(FACTORY, dataset, TRAIN, replace(SETTINGS, precision=precision, epochs=20), 7, card)
        assert training.scaler.is_enabled() == (precision == "fp16")
        losses = [training.epoch(number)["train_loss"] for number in range(1, 21)]
        assert losses[-1] < 0.7 * losses[0]
        assert all(parameter.dtype is torch.float32 for parameter in training.parameters)

    @pytest.mark.gpu
    def test_a_step_that_overflows_in_fp16_is_left_out(self, dataset, card):
        training = ModelTraining(FACTORY, dataset, TRAIN, replace(SETTINGS, precision="fp16"), 7, card)
        before = training.weights()
        training._step(sum(parameter.sum() for parameter in training.parameters) * float("inf"))
        after = training.weights()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert training.scaler.get_scale() < 2**16

    @pytest.mark.gpu
    def test_memory_that_runs_out_is_told_with_a_remedy(self, tmp_path, card, monkeypatch):
        monkeypatch.setattr(jobs, "fit", allocate_too_much)
        data = MILDataset(*_cohort(tmp_path), chunk_size=20)
        torch.cuda.set_per_process_memory_fraction(0.01)
        try:
            with pytest.raises(EngineError, match=r"ran out of memory.*smaller --batch_size"):
                make_cv(data, tmp_path / "run", device="cuda").run()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def allocate_too_much(*_, **__):
    torch.empty(torch.cuda.mem_get_info()[1] // 2, dtype=torch.uint8, device="cuda")


def _cohort(folder):
    from tests.cohort import write_cohort

    return write_cohort(folder, patches=(5, 50))


class TestARun:
    def test_gives_the_same_bytes_twice(self, dataset, device, tmp_path):
        for name in ("one", "other"):
            make_cv(dataset, tmp_path / name, device=str(device), deterministic=True).run()
        assert_same(contents(tmp_path / "one"), contents(tmp_path / "other"))

    def test_is_resumed_on_its_device(self, dataset, device, tmp_path, monkeypatch):
        leave_unfinished(make_cv(dataset, tmp_path / "run", device=str(device), deterministic=True))
        monkeypatch.setattr(jobs, "fit", _refuse)
        name = "cuda:0" if device.type == "cuda" else "cpu"
        make_cv(dataset, tmp_path / "run", device=name, deterministic=True).run()
        assert (tmp_path / "run" / "outputs.json").exists()

    @pytest.mark.gpu
    def test_begins_anew_on_another_kind_of_device(self, dataset, card, tmp_path, aloud):
        leave_unfinished(make_cv(dataset, tmp_path / "run", device="cuda"))
        make_cv(dataset, tmp_path / "run", device="cpu").run()
        assert "held another run (device differs); moved to" in aloud.text
        assert read_json(tmp_path / "run" / "run.json")["device"] == "cpu"

    @pytest.mark.gpu
    @pytest.mark.parametrize("several", [{"jobs": 2}, {"ray": "local", "actors": 2}])
    def test_several_trainings_share_a_card(self, dataset, card, tmp_path, several):
        if "ray" in several:
            needs_ray()
        settings = {"device": "cuda", "deterministic": True}
        make_cv(dataset, tmp_path / "one", FACTORY, **settings).run()
        make_cv(dataset, tmp_path / "two", FACTORY, **settings, **several).run()
        assert_same(contents(tmp_path / "two"), contents(tmp_path / "one"))
        assert read_json(tmp_path / "two" / "run.json")["jobs"] == 2

    @pytest.mark.gpu
    def test_keeps_features_on_the_card_and_says_so(self, dataset, card, tmp_path, aloud):
        make_cv(dataset, tmp_path / "run", device="cuda").run()
        assert "after the first epoch" in aloud.text
        record = read_json(tmp_path / "run" / "run.json")
        assert record["gpu"] == torch.cuda.get_device_name()
        assert record["peak_memory"]["device"] > 0

    @pytest.mark.gpu
    def test_a_dry_run_tells_the_cards_memory(self, dataset, card, tmp_path):
        assert "GPU memory: about" in make_cv(dataset, tmp_path / "run", device="cuda").dry_run()


def _refuse(*_, **__):
    raise Interrupted


class TestTheTrainer:
    def test_keeps_nothing_on_a_device_that_is_none(self, dataset, tmp_path):
        trainer = make_cv(dataset, tmp_path / "run").trainer
        assert trainer.on_device(2) is trainer

    @pytest.mark.parametrize(
        ("settings", "is_exact"), [({}, False), ({"precision": "fp32"}, True), ({"deterministic": True}, True)]
    )
    def test_keeps_what_may_not_be_rounded_as_it_is(self, dataset, tmp_path, settings, is_exact):
        cv = make_cv(dataset, tmp_path / "run", **({"precision": "auto"} | settings))
        trainer = replace(cv.trainer, device=torch.device("cuda"))
        features = trainer.on_device(3).dataset._features
        assert (features.processes, features.is_exact) == (3, is_exact)
        assert not on_device(dataset, torch.device("cpu"))._features.is_exact


def test_each_engine_says_how_many_share_a_card():
    with open_engine(Cluster(), Processes(3)) as engine:
        assert engine.sharers == 3
