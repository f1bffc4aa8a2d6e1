import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from MILS import list_mils
from MILS.bag_model import BagModel
from tests.cohort import write_cohort
from tests.learning.runs import CHUNKED, TRAIN, VAL, Scripted
from tests.small import TASK
from utils.core.device import amp_dtype
from utils.core.errors import ConfigError, TrainingError
from utils.learning import training
from utils.learning.settings import Training
from utils.learning.training import Fitted, learning_rate, predict_slides, refit, validate
from utils.mil_dataset import MILDataset
from utils.prediction.forward_pass import predict_features, set_references
from utils.tasks.metrics import METRICS, balanced_class_weights

CPU = torch.device("cpu")


@pytest.fixture
def still(monkeypatch) -> None:
    """At a rate of zero nothing moves."""
    monkeypatch.setattr(training, "learning_rate", lambda *_: 0.0)


def equal_states(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained_weights(fitted: Fitted) -> dict:
    """Without the reference of evidence, which is made when the training is over."""
    return {name: values for name, values in fitted.state_dict.items() if name != "pooled_reference"}


class TestLearningRate:
    def test_warms_up_then_falls_to_the_final_rate(self):
        settings = Training(epochs=100, lr=1e-3)
        rates = [learning_rate(epoch, settings) for epoch in range(1, 101)]
        assert rates[:6] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])
        assert max(rates) == pytest.approx(1e-3)
        assert (np.diff(rates[5:]) < 0).all()
        assert rates[-1] == pytest.approx(settings.final_lr)

    def test_follows_a_cosine(self):
        settings = Training(epochs=26, lr=1.0)  # epochs 6 to 26 fall: epoch 16 is half way
        assert learning_rate(16, settings) == pytest.approx((1 + settings.final_lr) / 2)
        assert learning_rate(11, settings) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4), abs=1e-5)

    @pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (3, 0), (4, 1), (8, 2), (12, 3), (20, 5), (200, 5)])
    def test_a_short_training_warms_up_for_a_quarter(self, epochs, warmup):
        settings = Training(epochs=epochs, lr=1e-3)
        rates = [learning_rate(epoch, settings) for epoch in range(1, epochs + 1)]
        assert rates[:warmup] == pytest.approx([1e-3 * i / warmup for i in range(1, warmup + 1)])
        assert rates[warmup] == pytest.approx(1e-3)
        assert all(0 < rate <= 1e-3 for rate in rates)

    def test_one_epoch_trains_at_the_peak(self):
        assert learning_rate(1, Training(epochs=1, lr=1e-3)) == 1e-3

    @pytest.mark.parametrize("lr", [1e-8, 1e-7])
    def test_never_rises_above_the_rate_asked_for(self, lr):
        settings = Training(epochs=10, lr=lr)
        assert max(learning_rate(epoch, settings) for epoch in range(1, 11)) <= lr

    def test_is_what_the_optimizer_uses(self, train, monkeypatch):
        used = []
        step = torch.optim.AdamW.step

        def spying(optimizer, *arguments, **named):
            used.append(optimizer.param_groups[0]["lr"])
            return step(optimizer, *arguments, **named)

        monkeypatch.setattr(torch.optim.AdamW, "step", spying)
        fitted = train(epochs=4, batch_size=100)
        assert used == [row["lr"] for row in fitted.history]
        assert used == [learning_rate(epoch, Training(epochs=4, lr=1e-2)) for epoch in range(1, 5)]


class TestSelection:
    def test_the_best_epoch_is_a_copy_that_later_epochs_leave_alone(self, train, monkeypatch):
        script = Scripted([0.6, 0.9, 0.7, 0.8], [0.5] * 4)
        monkeypatch.setattr(training, "validate", script)
        fitted = train(epochs=4)
        assert fitted.epoch == 2
        assert equal_states(trained_weights(fitted), script.seen[1])
        assert not equal_states(fitted.state_dict, script.seen[3])
        assert fitted.validation["val_auc"] == 0.9
        assert (fitted.val_probabilities == 0.2).all()
        assert [row["epoch"] for row in fitted.history] == [1, 2, 3, 4]

    def test_an_auc_of_one_class_cannot_choose(self, train, dataset):
        benign = VAL[dataset.labels[VAL] == 0]
        with pytest.raises(TrainingError, match="slide_auc is undefined"):
            train(val=benign)
        assert train(val=benign, monitor="slide_loss").validation["val_auc"] is None

    def test_weights_are_on_the_cpu_and_share_no_memory_with_a_model(self, train, make_model):
        models = []
        fitted = train(lambda: models.append(make_model()) or models[-1], epochs=1)
        theirs = {tensor.data_ptr() for tensor in models[0].state_dict().values()}
        assert not theirs & {tensor.data_ptr() for tensor in fitted.state_dict.values()}
        assert {str(tensor.device) for tensor in fitted.state_dict.values()} == {"cpu"}
        assert not any(tensor.requires_grad for tensor in fitted.state_dict.values())


class TestLoss:
    @pytest.mark.parametrize("batch_size", [1, 5, 1000])
    def test_an_epoch_counts_slides_and_classes_alike(self, train, dataset, make_model, batch_size, still):
        """With a rate of 0 the training loss is the mean over slides of the mean over their chunks, class-balanced."""
        slides = np.concatenate([np.flatnonzero(dataset.labels == 0), np.flatnonzero(dataset.labels == 1)[:4]])
        counts = {math.ceil(dataset.info[slide].num_instances / 20) for slide in slides}
        assert len(counts) == 3
        batches, models = [], []
        original = dataset.batches

        class Spy:
            labels, task, features = dataset.labels, dataset.task, staticmethod(dataset.features)
            mode, chunk_size, sequential = dataset.mode, dataset.chunk_size, dataset.sequential
            unit = dataset.unit

            @staticmethod
            def batches(*arguments):
                for batch in original(*arguments):
                    batches.append(batch)
                    yield batch

        fitted = train(
            lambda: models.append(make_model()) or models[-1],
            data=Spy, slides=slides, epochs=1, batch_size=batch_size,
        )  # fmt: skip
        losses = {int(slide): [] for slide in slides}
        for batch in batches:
            for bag, slide in zip(batch.bags, batch.slides, strict=True):
                with torch.no_grad():
                    logits = models[0].eval()(bag[None])[0][0]
                losses[int(slide)].append(-torch.log_softmax(logits, dim=0)[dataset.labels[int(slide)]].item())
        weight = {0: len(slides) / (2 * 12), 1: len(slides) / (2 * 4)}
        expected = np.mean([weight[dataset.labels[slide]] * np.mean(losses[slide]) for slide in losses])
        assert {len(chunks) for chunks in losses.values()} == counts
        assert fitted.history[0]["train_loss"] == pytest.approx(expected, rel=1e-5)

    def test_without_class_weights_each_slide_counts_alike(self, dataset, make_model, still):
        """In the loss, and in the reference of evidence."""
        slides = np.concatenate([np.flatnonzero(dataset.labels == 0)[:4], np.flatnonzero(dataset.labels == 1)[:8]])
        settings = Training(epochs=1, batch_size=1000, standardize="off", class_weights="none")
        fitted = refit(make_model, dataset, slides, settings, epochs=1, seed=7, device=CPU)
        model = make_model()
        model.load_state_dict(trained_weights(fitted))
        set_references(model, lambda: map(dataset.features, slides), CHUNKED)
        assert torch.allclose(fitted.state_dict["pooled_reference"], model.pooled_reference, atol=1e-6)
        balanced = refit(make_model, dataset, slides, Training(epochs=1, batch_size=1000), epochs=1, seed=7, device=CPU)
        whole = training.ModelTraining(make_model, dataset, slides, settings, 7, CPU)
        assert whole.loss_weights.tolist() == [1, 1]
        assert fitted.history[0]["train_loss"] != pytest.approx(balanced.history[0]["train_loss"], rel=1e-5)

    def test_a_rate_of_zero_moves_nothing(self, train, make_model, still):
        models = []

        def make():
            models.append(make_model())
            return copy.deepcopy(models[-1])

        assert equal_states(trained_weights(train(make)), models[0].state_dict())

    def test_evidence_begins_at_the_mean_of_the_training_slides_as_the_kept_epoch_pools_them(
        self, train, dataset, make_model
    ):
        """The classes weigh alike, though one has twice the slides."""
        slides = np.concatenate([np.flatnonzero(dataset.labels == 0)[:4], np.flatnonzero(dataset.labels == 1)[:8]])
        fitted = train(epochs=2, slides=slides, val=np.setdiff1d(np.arange(len(dataset)), slides))
        model, means = make_model(), []
        model.load_state_dict(trained_weights(fitted))
        for label in (0, 1):
            of_class = [slide for slide in slides if dataset.labels[slide] == label]
            set_references(model, lambda of_class=of_class: map(dataset.features, of_class), CHUNKED)
            means.append(model.pooled_reference)
        reference = fitted.state_dict["pooled_reference"]
        assert torch.allclose(reference, (means[0] + means[1]) / 2, atol=1e-6)
        assert not torch.allclose(reference, (means[0] + 2 * means[1]) / 3, atol=1e-6)

    def test_validation_loss_counts_slides(self, dataset, make_model):
        model, weights = make_model(), balanced_class_weights(dataset.labels[TRAIN], 2)
        answers = [predict_features(TASK, model, dataset.features(slide), CHUNKED).probabilities for slide in VAL]
        losses = [-math.log(answer[label]) for answer, label in zip(answers, dataset.labels[VAL], strict=True)]
        expected = np.average(losses, weights=weights[dataset.labels[VAL]])
        assert validate(model, dataset, VAL, weights, CHUNKED)[0]["val_loss"] == pytest.approx(expected)


class TestReproducibility:
    @pytest.mark.parametrize("name", ["LiteMIL", "TransMIL"])
    def test_the_seed_decides_every_bit(self, train, make_model, name):
        few = {"slides": TRAIN[:8], "val": VAL[:4], "epochs": 2}
        first, again, other = (train(lambda: make_model(name, dropout=0.25), seed=seed, **few) for seed in (1, 1, 2))
        assert equal_states(first.state_dict, again.state_dict)
        assert first.history == again.history
        assert not equal_states(first.state_dict, other.state_dict)

    def test_what_was_drawn_before_does_not_matter(self, train, make_model):
        first = train(lambda: make_model(dropout=0.25))
        torch.manual_seed(99)
        torch.rand(17)
        np.random.seed(5)  # noqa: NPY002 - the global generator is the point
        assert equal_states(first.state_dict, train(lambda: make_model(dropout=0.25)).state_dict)

    def test_an_epochs_randomness_is_its_own(self, train, make_model):
        """What is drawn between two epochs, by a progress bar or a validation, changes no weight."""
        quiet = train(lambda: make_model(dropout=0.25))
        drawing = train(lambda: make_model(dropout=0.25), on_epoch=lambda _: torch.rand(3))
        assert equal_states(quiet.state_dict, drawing.state_dict)

    def test_epochs_differ_in_their_batches(self, dataset, train):
        orders = []

        class Spy:
            labels, task, features = dataset.labels, dataset.task, staticmethod(dataset.features)
            mode, chunk_size, sequential = dataset.mode, dataset.chunk_size, dataset.sequential
            unit = dataset.unit

            @staticmethod
            def batches(*arguments):
                for batch in dataset.batches(*arguments):
                    orders.append(batch.slides.tolist())
                    yield batch

        train(data=Spy, batch_size=1000)
        assert len({str(order) for order in orders}) == len(orders) == 3


class TestModes:
    def test_trains_in_training_mode_and_validates_in_evaluation_mode(self, train, dataset, monkeypatch):
        calls = []

        class Watched(BagModel):
            def __init__(self) -> None:
                super().__init__(16, 2)
                self.layer, self.dropout = nn.Linear(16, 2), nn.Dropout(0.5)

            def forward(self, x, mask=None):
                calls.append((self.training, self.dropout.training, torch.is_grad_enabled()))
                return self.layer(self.dropout(x.float()).mean(dim=1)), {"attn": None}

        train(Watched, epochs=2, batch_size=1000)
        chunks = sum(math.ceil(dataset.info[slide].num_instances / 20) for slide in VAL)
        epoch = [(True, True, True)] + [(False, False, False)] * chunks
        assert calls == epoch * 2

    def test_on_epoch_hears_each_row_of_history(self, train):
        heard = []
        fitted = train(on_epoch=heard.append)
        assert fitted.history == heard
        figures = {f"val_{name}" for name in ("loss", *METRICS)}
        assert set(heard[0]) == {"epoch", "train_loss", "lr", *figures}


class TestRefit:
    def test_goes_the_way_of_a_fit_to_the_epoch_asked_for(self, dataset, make_model, train):
        """The same seed and slides: a fit whose third epoch is its best has the weights of a refit of three epochs."""
        settings = Training(epochs=8, batch_size=8, lr=1e-2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "validate", Scripted([0.6, 0.7, 0.9, *[0.5] * 5], [0.5] * 8))
            fitted = train(epochs=8)
        heard = []
        refitted = refit(
            make_model, dataset, TRAIN, settings, epochs=3, seed=7, device=CPU, on_epoch=heard.append
        )  # fmt: skip
        assert fitted.epoch == refitted.epoch == 3
        assert equal_states(fitted.state_dict, refitted.state_dict)
        assert refitted.history == heard
        assert [row["train_loss"] for row in heard] == [row["train_loss"] for row in fitted.history[:3]]
        assert refitted.validation == {}
        assert refitted.val_probabilities.shape == (0, 2)

    def test_looks_at_no_other_slide(self, dataset, make_model):
        asked = []

        class Spy:
            labels, task = dataset.labels, dataset.task
            mode, chunk_size, sequential = dataset.mode, dataset.chunk_size, dataset.sequential
            unit = dataset.unit

            @staticmethod
            def features(slide):
                assert slide in TRAIN
                return dataset.features(slide)

            @staticmethod
            def batches(slides, *rest):
                asked.append(set(slides.tolist()))
                return dataset.batches(slides, *rest)

        refit(make_model, Spy, TRAIN, Training(epochs=5), epochs=2, seed=7, device=CPU)
        assert asked == [set(TRAIN.tolist())] * 2


class TestPrecision:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, torch.bfloat16), ({"precision": "bf16"}, torch.bfloat16), ({"precision": "fp16"}, torch.float16),
            ({"precision": "fp32"}, None), ({"use_amp": False}, None),
        ],
    )  # fmt: skip
    def test_on_cuda(self, settings, expected, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        assert amp_dtype(Training(**settings).amp_precision, torch.device("cuda")) is expected

    def test_a_cuda_device_without_bf16(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
        assert amp_dtype(Training().amp_precision, torch.device("cuda")) is torch.float16
        with pytest.raises(ConfigError, match="this CUDA device has none; give fp16"):
            amp_dtype(Training(precision="bf16").amp_precision, torch.device("cuda"))

    def test_elsewhere_it_is_off_and_cannot_be_asked_for(self):
        assert amp_dtype(Training().amp_precision, CPU) is None
        assert amp_dtype(Training(precision="fp32").amp_precision, CPU) is None
        with pytest.raises(ConfigError, match="--precision fp16: needs a CUDA device, not cpu"):
            amp_dtype(Training(precision="fp16").amp_precision, CPU)

    def test_both_flags_must_agree(self):
        with pytest.raises(ConfigError, match="--precision bf16: contradicts --no_amp"):
            Training(precision="bf16", use_amp=False)


class TestTrouble:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite_ends_the_training(self, train, make_model, value):
        def broken():
            model = make_model()
            with torch.no_grad():
                next(model.parameters()).fill_(value)
            return model

        with pytest.raises(TrainingError, match=r"the loss of epoch 1 is nan at learning rate 0.01; lower --lr$"):
            train(broken)  # where fp32 is on already, it is no remedy

    def test_nan_features_end_the_training(self, train, dataset):
        class Spoilt:
            labels, task, features = dataset.labels, dataset.task, staticmethod(dataset.features)
            mode, chunk_size, sequential = dataset.mode, dataset.chunk_size, dataset.sequential
            unit = dataset.unit

            @staticmethod
            def batches(*arguments):
                for batch in dataset.batches(*arguments):
                    batch.bags[0][0, 0] = float("nan")
                    yield batch

        with pytest.raises(TrainingError, match="the loss of epoch 1 is nan"):
            train(data=Spoilt)

    @pytest.mark.parametrize("monitor", ["slide_auc", "slide_loss"])
    def test_weights_that_burst_in_the_last_step_end_the_training(self, train, monitor, monkeypatch):
        """The loss of one big batch is taken before the step that bursts: only the validation sees it."""
        monkeypatch.setattr(training, "learning_rate", lambda *_: 1e30)

        class Unnormalised(BagModel):
            def __init__(self) -> None:
                super().__init__(16, 2)
                self.layers = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))

            def forward(self, x, mask=None):
                return self.layers(x.float().mean(dim=1)), {"attn": None}

        with pytest.raises(TrainingError, match="output for a slide is not finite; lower --lr"):
            train(Unnormalised, batch_size=1000, monitor=monitor)

    def test_an_answer_that_is_not_finite_is_no_answer(self, dataset, make_model):
        model = make_model()
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        with pytest.raises(TrainingError, match="not finite"):
            predict_slides(model, dataset, VAL, CHUNKED)

    def test_gradients_are_clipped(self, train, monkeypatch):
        norms = []
        step = torch.optim.AdamW.step

        def spying(self, *arguments, **named):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.norm(torch.stack([grad.norm() for grad in grads])).item())
            return step(self, *arguments, **named)

        class Steep(BagModel):
            def __init__(self) -> None:
                super().__init__(16, 2)
                self.layer = nn.Linear(16, 2)

            def forward(self, x, mask=None):
                return 1e3 * self.layer(x.float().mean(dim=1)), {"attn": None}

        monkeypatch.setattr(torch.optim.AdamW, "step", spying)
        train(Steep, epochs=1)
        assert norms
        assert max(norms) == pytest.approx(Training().clip_norm, rel=1e-3)


class TestLearning:
    @pytest.mark.parametrize("name", list_mils())
    def test_learns_what_the_cohort_holds(self, name, tmp_path_factory, train, make_model):
        csv, features = write_cohort(
            tmp_path_factory.mktemp("learn"), patients_per_class=10, slides_per_patient=1, patches=(15, 20), signal=3
        )
        data = MILDataset(csv, features, chunk_size=20)
        fitted = train(
            lambda: make_model(name), data=data, slides=np.arange(14), val=np.arange(14, 20),
            epochs=12, batch_size=7, lr=1e-2,
        )  # fmt: skip
        assert isinstance(fitted, Fitted)
        assert fitted.validation["val_auc"] >= 0.9
        assert fitted.history[-1]["train_loss"] < 0.7 * fitted.history[0]["train_loss"]
