import csv
import json
import logging
import math
import multiprocessing
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from MILS import build_mil, list_mils
from MILS.bag_model import BagModel
from tests.cohort import write_cohort
from tests.conftest import drawn_coarsely
from tests.small import TASK, classification_metrics
from utils.bags.inventory import FileRecord
from utils.bags.spelling import plain_spelling
from utils.bags.store import read_bag, write_bag
from utils.core.engine import Processes, WorkerDied, threads
from utils.core.errors import ConfigError, DivergedError, EngineError, SplitError, TrainingError
from utils.core.files import read_json, write_text
from utils.core.plots import FORMATS
from utils.evaluation import predictions as predictions_module
from utils.evaluation.closing_table import closing_text, results_table
from utils.evaluation.outputs import NO_PATIENTS
from utils.learning import cross_validation as nested_cv
from utils.learning import dry_run, fold_tester, jobs, protocol, run_figures
from utils.learning.run_folder import RunFolder
from utils.learning.run_identity import settings_identity, slides_by_time
from utils.learning.settings import Protocol, Training
from utils.learning.splits import InnerFold, OuterFold
from utils.learning.standardization import feature_scale
from utils.learning.training import Fitted
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation
from utils.prediction.checkpoint import id_digests, load_checkpoint
from utils.prediction.forward_pass import SlideFeed, predict_features
from utils.tasks.calibration import scale_probabilities
from utils.tasks.metrics import METRICS, decision_metrics, fitted_threshold

pytestmark = pytest.mark.usefixtures("blank_figures")

N_OUTER, N_INNER, EPOCHS = 3, 2, 2
TRAININGS = N_OUTER * N_INNER


@pytest.fixture
def aloud(caplog) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "litemil"):
        yield caplog


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> tuple[Path, Path]:
    return write_cohort(tmp_path_factory.mktemp("cohort"), patches=(5, 50))


@pytest.fixture(scope="module")
def dataset(cohort) -> MILDataset:
    return MILDataset(*cohort, chunk_size=20)


def small(name: str = "LiteMIL", input_dim: int = 16, num_classes: int = 2, **options):
    heads = {"num_heads": 2} if name in ("LiteMIL", "TransMIL") else {}
    return build_mil(name, input_dim=input_dim, num_classes=num_classes, **({"hidden_dim": 16} | heads | options))


def make_cv(dataset, output_dir, model_factory: Callable = small, **changes) -> NestedCrossValidation:
    settings = {
        "n_outer": N_OUTER, "n_inner": N_INNER, "batch_size": 8, "epochs": EPOCHS, "device": "cpu", "lr": 1e-2,
        "seed": 5, "dataset_name": "demo",
    }  # fmt: skip
    return NestedCrossValidation(model_factory, dataset, dataset.class_names, output_dir, **(settings | changes))


@pytest.fixture
def no_figures(monkeypatch) -> None:
    def write(folder, *_):
        for name in run_figures.FIGURES:
            write_text(folder / f"{name}.png", "a figure")

    monkeypatch.setattr(run_figures, "draw_figures", write)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the record of the process, which holds its duration."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json"
    }


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@dataclass
class Watch:
    """What a run did, in its order: ("fit", train, val), ("batches", slides), ("features", slide), ("end",) of a fit,
    ("test", slides).
    """

    events: list[tuple] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fit, predict_slides = jobs.fit, fold_tester.predict_slides
        features, batches = MILDataset.features, MILDataset.batches

        def watched_fit(factory, dataset, train, stopping, *rest, **named):
            self.events.append(("fit", set(train.tolist()), set(stopping.slides.tolist())))
            fitted = fit(factory, dataset, train, stopping, *rest, **named)
            self.events.append(("end",))
            return fitted

        def watched_test(model, dataset, slides, feed):
            self.events.append(("test", set(slides.tolist())))
            return predict_slides(model, dataset, slides, feed)

        def watched_features(dataset, slide):
            self.events.append(("features", slide))
            return features(dataset, slide)

        def watched_batches(dataset, slides, *rest):
            self.events.append(("batches", set(slides.tolist())))
            return batches(dataset, slides, *rest)

        monkeypatch.setattr(jobs, "fit", watched_fit)
        monkeypatch.setattr(fold_tester, "predict_slides", watched_test)
        monkeypatch.setattr(MILDataset, "features", watched_features)
        monkeypatch.setattr(MILDataset, "batches", watched_batches)


@dataclass(frozen=True)
class Finished:
    folder: Path
    cv: NestedCrossValidation
    results: dict
    events: list[tuple]

    def table(self) -> list[dict[str, str]]:
        with (self.folder / "predictions.csv").open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory) -> Finished:
    """One uninterrupted run, watched."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = Watch()
        watch.install(monkeypatch)
        cv = make_cv(dataset, tmp_path_factory.mktemp("runs") / "LiteMIL" / "demo")
        results = cv.run()
    torch.set_num_threads(threads)
    return Finished(cv.output_dir, cv, results, watch.events)


def strict_json(path: Path):
    def refuse(constant):
        raise AssertionError(f"{path}: {constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


class TestOutputs:
    def test_the_files(self, finished):
        assert {path.name for path in finished.folder.iterdir()} == {
            *(f"fold_{k}_best.pth" for k in range(1, N_OUTER + 1)),
            "all_folds_best.pth", "outputs.json", "splits.json", "predictions.csv", "history.csv", "run.json",
            "features.csv", "gallery.csv", "roc.png", "precision_recall.png", "confusion_matrix.png",
            "calibration.png", "learning_curves.png",
        }  # fmt: skip

    def test_predictions_have_one_out_of_fold_row_per_slide_in_table_order(self, finished, dataset):
        rows = finished.table()
        assert list(rows[0]) == [
            "wsi_id", "case_id", "label", "predicted", "prob_benign", "prob_malignant", "calibrated_benign",
            "calibrated_malignant", "fold", "repeat",
        ]  # fmt: skip
        expected = [(row.wsi_id, row.case_id, dataset.class_names[row.label]) for row in dataset.rows]
        assert [(row["wsi_id"], row["case_id"], row["label"]) for row in rows] == expected
        for row in rows:
            benign, malignant = float(row["prob_benign"]), float(row["prob_malignant"])
            assert benign + malignant == pytest.approx(1, abs=1e-12)
            assert row["predicted"] == ("malignant" if malignant > benign else "benign")
        tested = {fold["fold"]: set(fold["test"]) for fold in strict_json(finished.folder / "splits.json")["folds"]}
        assert all(row["wsi_id"] in tested[int(row["fold"])] for row in rows)

    def test_each_folds_model_gives_its_predictions_again(self, finished, dataset):
        for fold in range(1, N_OUTER + 1):
            checkpoint = load_checkpoint(finished.folder / f"fold_{fold}_best.pth")
            model = checkpoint.build()
            for slide, row in enumerate(finished.table()):
                output = predict_features(TASK, model, dataset.features(slide), checkpoint.slide_feed)
                said = [float(row["prob_benign"]), float(row["prob_malignant"])]
                assert (output.probabilities.tolist() == said) is (int(row["fold"]) == fold)

    def test_outputs_hold_what_they_promise(self, finished, dataset):
        outputs = strict_json(finished.folder / "outputs.json")
        assert outputs == finished.results
        names = ("chunk_accuracy", "slide_accuracy", "slide_f1_macro", "slide_auc", "slide_balanced_accuracy")
        assert {f"{name}_{part}" for name in names for part in ("mean", "std")} < outputs.keys()
        assert outputs["n_folds"] == N_OUTER
        assert outputs["class_names"] == ["benign", "malignant"]
        assert (outputs["n_slides"], outputs["n_cases"], outputs["dataset"]) == (24, 12, "demo")
        assert outputs["model"] == small().spec

    def test_the_figures_follow_from_the_predictions(self, finished, dataset):
        outputs, rows = finished.results, finished.table()
        probabilities = np.array([[float(row["prob_benign"]), float(row["prob_malignant"])] for row in rows])
        folds = np.array([int(row["fold"]) for row in rows])
        for result in outputs["fold_results"]:
            part = folds == result["fold"]
            assert result["n_slides"] == part.sum()
            assert result["slide"] == classification_metrics(
                dataset.labels[part], probabilities[part], dataset.class_names
            )
        assert [result["fold"] for result in outputs["fold_results"]] == [1, 2, 3]
        for name in METRICS:
            values = [result["slide"][name] for result in outputs["fold_results"]]
            assert outputs[f"slide_{name}_mean"] == pytest.approx(np.mean(values))
            assert outputs[f"slide_{name}_std"] == pytest.approx(np.std(values, ddof=1))
            low, high = outputs["intervals_95"][name]
            assert low <= outputs["pooled"][name] <= high
        expected = classification_metrics(dataset.labels, probabilities, dataset.class_names)
        assert outputs["pooled"] == pytest.approx(expected, abs=1e-12)
        assert set(expected) == set(outputs["intervals_95"]) > {"sensitivity_benign", "specificity_malignant"}

    def test_the_temperature_is_the_checkpoints_and_scales_the_test_slides(self, finished, dataset):
        rows = finished.table()
        raw, scaled = (
            np.array([[float(row[f"{kind}_benign"]), float(row[f"{kind}_malignant"])] for row in rows])
            for kind in ("prob", "calibrated")
        )
        for result in finished.results["fold_results"]:
            temperature = load_checkpoint(finished.folder / f"fold_{result['fold']}_best.pth").temperature
            assert temperature == result["temperature"]
            part = np.array([int(row["fold"]) == result["fold"] for row in rows])
            np.testing.assert_allclose(scaled[part], scale_probabilities(raw[part], temperature))
        figures = classification_metrics(dataset.labels, scaled)
        assert finished.results["pooled_calibrated"] == pytest.approx(
            {name: figures[name] for name in ("brier", "ece")}
        )
        assert not np.allclose(raw, scaled)

    def test_chunk_accuracy_counts_chunks(self, finished, dataset):
        for result in finished.results["fold_results"]:
            model = load_checkpoint(finished.folder / f"fold_{result['fold']}_best.pth").build()
            right = []
            for slide, row in enumerate(finished.table()):
                if int(row["fold"]) == result["fold"]:
                    output = predict_features(TASK, model, dataset.features(slide), SlideFeed(20, "mean"))
                    assert len(output.chunk_sizes) == math.ceil(dataset.info[slide].num_instances / 20)
                    right += (output.chunk_probabilities.argmax(axis=1) == dataset.labels[slide]).tolist()
            assert len(right) > result["n_slides"]
            assert result["chunk"]["accuracy"] == pytest.approx(np.mean(right))

    def test_splits_are_the_ones_used(self, finished, dataset):
        content = strict_json(finished.folder / "splits.json")
        ids = [row.wsi_id for row in dataset.rows]
        fits = [event for event in finished.events if event[0] == "fit"]
        said = [inner for fold in content["folds"] for inner in fold["inner"]]
        assert [({*inner["train"]}, {*inner["val"]}) for inner in said] == [
            ({ids[slide] for slide in train}, {ids[slide] for slide in val}) for _, train, val in fits
        ]
        assert sorted(slide for fold in content["folds"] for slide in fold["test"]) == sorted(ids)
        assert content["seed"] == 5

    def test_history_has_every_epoch_of_every_training(self, finished):
        history = pd.read_csv(finished.folder / "history.csv")
        assert list(history)[:5] == ["fold", "setting", "inner", "epoch", "train_loss"]
        assert {"val_loss", "val_auc", "val_accuracy", "val_balanced_accuracy", "val_f1_macro", "lr"} < set(history)
        expected = [(k, i, e) for k in range(1, 4) for i in range(1, 3) for e in range(1, EPOCHS + 1)]
        assert list(history[["fold", "inner", "epoch"]].itertuples(index=False, name=None)) == expected
        assert history["setting"].isna().all()
        assert np.isfinite(history.drop(columns="setting").to_numpy()).all()

    def test_the_chosen_epoch_is_the_best_of_its_folds_history(self, finished):
        history = pd.read_csv(finished.folder / "history.csv")
        for result in finished.results["fold_results"]:
            chosen, rows = result["selection"], history[history["fold"] == result["fold"]]
            order = rows.sort_values(["val_auc", "val_loss", "inner", "epoch"], ascending=[False, True, True, True])
            best = order.iloc[0]
            assert (chosen["inner_fold"], chosen["epoch"]) == (best["inner"], best["epoch"])
            assert (chosen["val_auc"], chosen["val_loss"]) == (best["val_auc"], best["val_loss"])
            assert (chosen["chosen_on"], chosen["monitor"]) == ("inner validation", "slide_auc")

    def test_run_json_says_how_it_was_made(self, finished):
        record = strict_json(finished.folder / "run.json")
        assert record["finished"] is True
        assert record["seconds"] > 0
        assert {"argv", "versions", "git_commit", "device", "threads", "platform"} <= record.keys()
        assert (record["threads"], record["jobs"]) == (1, 1)
        assert 10**8 < record["peak_memory"]["process"] < 10**11
        assert record["identity"]["seed"] == 5
        assert record["identity"]["training"] == {
            "epochs": EPOCHS, "patience": 10, "batch_size": 8, "lr": 1e-2, "weight_decay": 0.01, "precision": "auto",
            "use_amp": True, "warmup_epochs": 5, "final_lr": 1e-6, "clip_norm": 1.0,
        }  # fmt: skip
        assert record["identity"]["feed"] == SlideFeed(20, "mean").as_dict()

    def test_checkpoints_say_what_they_are(self, finished, dataset):
        splits = strict_json(finished.folder / "splits.json")["folds"]
        for fold, result in zip(splits, finished.results["fold_results"], strict=True):
            checkpoint = load_checkpoint(finished.folder / f"fold_{fold['fold']}_best.pth")
            used = {slide for part in fold["inner"][0].values() for slide in part}
            cases = {row.case_id for row in dataset.rows if row.wsi_id in used}
            digests = [record.sha256 for record in dataset.inventory({}) if record.wsi_id in used]
            assert checkpoint.seen == {
                "slide": id_digests("slide", used), "case": id_digests("case", cases), "slide_hash": [],
                "case_spelling": id_digests("case_spelling", map(plain_spelling, cases)),
                "features": id_digests("features", digests),
            }  # fmt: skip
            assert not set(checkpoint.seen["slide"]) & set(id_digests("slide", fold["test"]))
            assert checkpoint.selection == result["selection"] | {"best_of_all_folds": False}
            assert checkpoint.recipe == dataset.recipe
            assert checkpoint.recipe.backbone == "synthetic"
            assert checkpoint.mpp_range == (0.5, 0.5)
            assert (checkpoint.dataset, checkpoint.class_names) == ("demo", ("benign", "malignant"))
            content = (finished.folder / f"fold_{fold['fold']}_best.pth").read_bytes()
            assert not [
                row for row in dataset.rows if row.wsi_id.encode() in content or row.case_id.encode() in content
            ]

    def test_the_closing_table(self, finished):
        lines = results_table(finished.results).splitlines()
        assert len({len(line) for line in lines}) == 1
        assert [line.split()[0] for line in lines if "---" not in line][1:] == [
            "fold", "fold", "fold", "mean", "std", "pooled", "95%",
        ]  # fmt: skip
        assert f"{finished.results['slide_auc_mean']:.3f}" in results_table(finished.results)

    def test_sensitivity_and_specificity_of_each_class_close_the_run(self, finished):
        results = finished.results
        for name in results["class_names"]:
            (line,) = [line for line in closing_text(results).splitlines() if line.split()[:1] == [name]]
            for kind in ("sensitivity", "specificity"):
                low, high = results["intervals_95"][f"{kind}_{name}"]
                assert f"{results['pooled'][f'{kind}_{name}']:.3f}" in line
                assert f"{low:.3f}-{high:.3f}" in line

    @pytest.mark.parametrize(("pooled", "is_explained"), [(0.96, True), (0.995, False)])
    def test_a_pooled_auc_that_differs_from_the_mean_is_explained(self, finished, pooled, is_explained):
        figures = finished.results["pooled"] | {"auc": pooled}
        words = closing_text(finished.results | {"slide_auc_mean": 1.0, "pooled": figures})
        assert ("The mean AUC 1.000 ranks each fold's slides" in words) is is_explained

    def test_where_the_patients_are_known_from_is_recorded(self, finished):
        assert finished.results["patients_from"] == "the column case_id"
        unknown = closing_text(finished.results | {"patients_from": NO_PATIENTS})
        assert "No patients are known" in unknown
        assert "No patients are known" not in closing_text(finished.results)


class TestSecrecyOfTheTestFold:
    def test_test_slides_are_read_only_after_their_folds_trainings(self, finished, dataset):
        everything, fits, within, tested = set(range(len(dataset))), [], None, None
        kinds = Counter(event[0] for event in finished.events)
        assert (kinds["fit"], kinds["test"], kinds["batches"]) == (TRAININGS, N_OUTER, TRAININGS * EPOCHS)
        for kind, *what in finished.events:
            if kind == "fit":
                assert tested is None  # all trainings come before the first test
                within = tuple(what)
                fits.append(within)
                assert not what[0] & what[1]
            elif kind == "end":
                within = None
            elif kind == "batches":
                assert what[0] == within[0]
            elif kind == "test":
                assert len(fits) % N_INNER == 0
                for train, val in fits[:N_INNER]:
                    assert what[0] == everything - train - val
                tested, fits = what[0], fits[N_INNER:]
            else:
                assert what[0] in (within[0] | within[1] if within else tested)
        assert not fits

    def test_spoiling_the_test_slides_changes_no_choice(self, finished, dataset, tmp_path, monkeypatch, no_figures):
        """With each fold's test features replaced by noise, the models, the epochs and their scores stay the same."""
        predict, tested = fold_tester.predict_slides, set()

        def spoilt(model, data, slides, feed):
            tested.update(slides.tolist())
            original = type(data).features

            def noise(data, slide):
                real = original(data, slide)
                return torch.randn(real.shape, generator=torch.Generator().manual_seed(slide)).to(real.dtype)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(data), "features", noise)
                return predict(model, data, slides, feed)

        monkeypatch.setattr(fold_tester, "predict_slides", spoilt)
        results = make_cv(dataset, tmp_path / "run").run()
        assert len(tested) == len(dataset)
        assert results["pooled"] != finished.results["pooled"]
        expected, found = contents(finished.folder), contents(tmp_path / "run")
        for name in ("history.csv", "splits.json", "all_folds_best.pth", *(f"fold_{k}_best.pth" for k in (1, 2, 3))):
            assert found[name] == expected[name], name


@dataclass
class Unfitted:
    """Stands for `fit`: untrained weights from the seed, the validation figures as scripted, call by call."""

    script: list[dict] = field(default_factory=list)
    states: list[dict] = field(default_factory=list)

    def __call__(self, factory, dataset, train, stopping, settings: Training, *, seed, **_) -> Fitted:
        torch.manual_seed(seed)
        state = {name: 3 * part.clone() for name, part in factory().state_dict().items()}
        validation = {"val_loss": 1.0, **dict.fromkeys([f"val_{name}" for name in METRICS], 0.5)}
        if self.script:
            validation |= self.script[len(self.states)]
        self.states.append(state)
        answers = torch.full((len(stopping.slides), 2), 0.5, dtype=torch.float64)
        row = {"epoch": 1, "train_loss": 1.0, "lr": settings.lr, **validation}
        return Fitted(state, 1, validation, answers, [row])


@pytest.fixture
def unfitted(monkeypatch, no_figures) -> Unfitted:
    """Runs in no time, where what is tested is not the training."""
    stand_in = Unfitted()
    monkeypatch.setattr(jobs, "fit", stand_in)
    quick = partial(predictions_module.bootstrap_intervals, resamples=10)
    monkeypatch.setattr(predictions_module, "bootstrap_intervals", quick)
    return stand_in


def is_state(path: Path, state: dict) -> bool:
    return all(torch.equal(part, state[name]) for name, part in load_checkpoint(path).state_dict.items())


class TestSelection:
    def test_inner_validation_chooses_whatever_the_test_says(self, dataset, tmp_path, unfitted):
        """Each fold in turn validates best and is taken, though another one tests better."""
        best_testers = []
        for favourite in range(N_OUTER):
            folder = tmp_path / f"run_{favourite}"
            unfitted.states.clear()
            unfitted.script = [{"val_auc": 0.6 + 0.01 * call} for call in range(TRAININGS)]
            unfitted.script[2 * favourite] = {"val_auc": 0.9}
            results = make_cv(dataset, folder).run()
            tested = [fold["slide"]["auc"] for fold in results["fold_results"]]
            best_testers.append(tested[favourite] == max(tested))
            assert is_state(folder / "all_folds_best.pth", unfitted.states[2 * favourite])
            for fold in range(N_OUTER):
                chosen = 2 * fold + (fold != favourite)
                assert is_state(folder / f"fold_{fold + 1}_best.pth", unfitted.states[chosen])
                assert results["fold_results"][fold]["selection"]["inner_fold"] == chosen % 2 + 1
            selection = load_checkpoint(folder / "all_folds_best.pth").selection
            assert (selection["outer_fold"], selection["best_of_all_folds"]) == (favourite + 1, True)
            assert selection["val_auc"] == 0.9
        assert not all(best_testers)

    def test_equal_aucs_are_decided_by_the_loss(self, dataset, tmp_path, unfitted):
        unfitted.script = [{"val_auc": 0.9, "val_loss": loss} for loss in (0.5, 0.4, 0.6, 0.3, 0.35, 0.7)]
        make_cv(dataset, tmp_path / "run").run()
        assert is_state(tmp_path / "run" / "all_folds_best.pth", unfitted.states[3])

    def test_accuracy_chooses_nothing(self, dataset, tmp_path, unfitted):
        """A majority voter's accuracy must not win over a better ranking."""
        unfitted.script = [{"val_auc": 0.6, "val_accuracy": 0.9}, {"val_auc": 0.7, "val_accuracy": 0.1}] * 3
        make_cv(dataset, tmp_path / "run").run()
        assert is_state(tmp_path / "run" / "fold_1_best.pth", unfitted.states[1])

    def test_folds_of_one_class_use_the_loss_and_leave_no_nan(self, dataset, tmp_path, monkeypatch, aloud):
        """Where an inner fold holds one class the loss chooses; a test fold of one class has no AUC."""
        benign, malignant = (np.flatnonzero(dataset.labels == label) for label in (0, 1))

        def one_class_folds(*_):
            folds = []
            for number, test in enumerate((benign[:6], np.setdiff1d(np.arange(24), benign[:6])), start=1):
                rest = np.setdiff1d(np.arange(24), test) if number == 1 else np.concatenate([benign[:6], malignant])
                vals = (rest[dataset.labels[rest] == 0][:4], rest[dataset.labels[rest] == 1][:4])
                inner = tuple(InnerFold(np.setdiff1d(rest, val), val) for val in vals)
                folds.append(OuterFold(number, test, inner))
            return folds

        monkeypatch.setattr(protocol, "repeated_splits", one_class_folds)
        results = make_cv(dataset, tmp_path / "run", n_outer=2).run()
        assert results["fold_results"][0]["slide"]["auc"] is None
        assert results["fold_results"][0]["selection"]["monitor"] == "slide_loss"
        assert results["slide_auc_mean"] == results["fold_results"][1]["slide"]["auc"]
        assert (results["slide_auc_std"], results["slide_auc_folds"]) == (None, 1)
        assert strict_json(tmp_path / "run" / "outputs.json") == results
        assert "the slide loss chooses" in aloud.text
        lacking = [line.split()[0] for line in results_table(results).splitlines() if "-" in line.split()]
        assert lacking == ["fold", "std"]
        assert pd.read_csv(tmp_path / "run" / "history.csv")["val_auc"].isna().all()


class Interrupted(BaseException):
    """As a Ctrl-C: no handler of ours may take it for an error."""


def leave_unfinished(cv: NestedCrossValidation) -> None:
    """Run until every training is done and nothing but the results is missing."""

    def interrupted(*_):
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nested_cv, "write_results", interrupted)
        with pytest.raises(Interrupted):
            cv.run()


class TestResume:
    def test_the_same_command_again_trains_nothing(self, finished, dataset, monkeypatch, aloud):
        before = contents(finished.folder), (finished.folder / "run.json").read_bytes()

        def must_not_train(*_, **__):
            raise AssertionError("trained again")

        monkeypatch.setattr(jobs, "fit", must_not_train)
        monkeypatch.setattr(fold_tester, "predict_slides", must_not_train)
        assert make_cv(dataset, finished.folder).run() == finished.results
        assert (contents(finished.folder), (finished.folder / "run.json").read_bytes()) == before
        assert "this run is finished" in aloud.text

    def test_two_runs_are_equal_byte_for_byte(self, finished, dataset, tmp_path):
        make_cv(dataset, tmp_path / "elsewhere").run()
        assert_same(contents(tmp_path / "elsewhere"), contents(finished.folder))

    def test_looking_at_slides_from_the_end_changes_no_run(self, finished, cohort, tmp_path):
        dataset = MILDataset(*cohort, chunk_size=20, cache="ram")
        for slide in (-2, -1, -3):
            dataset[slide]
        make_cv(dataset, tmp_path / "again").run()
        assert_same(contents(tmp_path / "again"), contents(finished.folder))

    def test_a_relative_folder_stays_where_it_was_named(self, dataset, tmp_path, monkeypatch, unfitted):
        monkeypatch.chdir(tmp_path)
        cv = make_cv(dataset, "run")
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        cv.run()
        assert (tmp_path / "run" / "outputs.json").is_file()
        assert not any((tmp_path / "other").iterdir())

    def test_interrupted_in_any_training_it_goes_on(self, finished, dataset, tmp_path, monkeypatch, aloud):
        fit, started = jobs.fit, []
        rng = random.Random(1)  # noqa: S311 - moments, not secrets
        stops = [rng.randint(1, EPOCHS) for _ in range(TRAININGS)]

        def interrupted(*arguments, on_epoch, **named):
            started.append(named["seed"])
            epochs = []

            def hook(validation):
                on_epoch(validation)
                epochs.append(validation)
                if len(epochs) == stops[0]:
                    stops.pop(0)
                    raise Interrupted

            return fit(*arguments, on_epoch=hook if len(started) % 2 else on_epoch, **named)

        monkeypatch.setattr(jobs, "fit", interrupted)
        for attempt in range(TRAININGS):
            with pytest.raises(Interrupted):
                make_cv(dataset, tmp_path / "run").run()
            assert len(list((tmp_path / "run" / "resume").glob("*.pt"))) == attempt
            assert not read_json(tmp_path / "run" / "run.json")["finished"]
            assert not (tmp_path / "run" / "outputs.json").exists()
            if attempt < TRAININGS - 1:
                # The next session finishes this training and is interrupted in the one after it.
                assert len(started) == 2 * attempt + 1
        monkeypatch.setattr(jobs, "fit", fit)
        make_cv(dataset, tmp_path / "run").run()
        assert_same(contents(tmp_path / "run"), contents(finished.folder))
        assert f"resuming; {TRAININGS - 1} trainings are done" in aloud.text
        assert Counter(started) == Counter(dict.fromkeys(started, 2) | {started[-1]: 1})

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_dying_at_every_write_in_turn_loses_nothing(
        self, moment, finished, dataset, tmp_path, monkeypatch, no_figures
    ):
        """Session n dies at its n-th write, just before or just after the file gets its name."""
        replace, budget = Path.replace, [0]

        def dying(path, target):
            budget[0] -= 1
            if budget[0] > 0 or moment == "after":
                replace(path, target)
            if budget[0] == 0:
                raise Interrupted

        sessions = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            while True:
                sessions += 1
                budget[0] = sessions
                try:
                    make_cv(dataset, tmp_path / "run").run()
                    break
                except Interrupted:
                    assert sessions < 100
        assert sessions > 10
        found, expected = contents(tmp_path / "run"), contents(finished.folder)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name] == (b"a figure" if name.endswith(".png") else expected[name]), name

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_killed_at_random_moments_it_ends_as_if_it_never_was(self, finished, dataset, tmp_path):
        """A process that dies of SIGKILL runs no handler: what is on the disk is all there is."""
        rng, folder = random.Random(os.getpid()), tmp_path / "run"  # noqa: S311 - moments, not secrets
        kept = folder / "resume"

        def session() -> multiprocessing.Process:
            process = multiprocessing.get_context("fork").Process(target=make_cv(dataset, folder).run)
            process.start()
            return process

        killed = 0
        for reached in (
            lambda: folder.is_dir(),
            lambda: len(list(kept.glob("*.pt"))) >= 2,
            lambda: len(list(kept.glob("*.pt"))) >= 4,
            lambda: (folder / "all_folds_best.pth").is_file(),
        ):
            process, deadline = session(), time.monotonic() + 60
            while not reached() and process.is_alive():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(rng.random() * 0.1)
            process.kill()
            process.join(10)
            assert process.exitcode in (0, -signal.SIGKILL)
            killed += process.exitcode == -signal.SIGKILL
        assert killed >= 3
        process = session()
        process.join(60)
        assert process.exitcode == 0
        assert_same(contents(folder), contents(finished.folder))

    def test_resumed_with_other_threads_it_keeps_those_it_began_with(self, finished, dataset, tmp_path, aloud):
        """`finished` was trained on one thread; so is this run, though its second session may use three."""
        leave_unfinished(make_cv(dataset, tmp_path / "run"))
        for path in sorted((tmp_path / "run" / "resume").glob("*.pt"))[1:]:
            path.unlink()
        with threads(3):
            make_cv(dataset, tmp_path / "run").run()
            assert torch.get_num_threads() == 3
        assert_same(contents(tmp_path / "run"), contents(finished.folder))
        assert read_json(tmp_path / "run" / "run.json")["threads"] == 1
        assert "each training goes on with 1 thread, as the run began" in aloud.text

    @pytest.mark.parametrize("damage", ["truncated", "empty", "text", "tensor", "lacking"])
    def test_a_damaged_resume_file_is_trained_again_aloud(
        self, damage, dataset, tmp_path, monkeypatch, unfitted, aloud
    ):
        make_cv(dataset, tmp_path / "whole").run()
        calls = len(unfitted.states)
        leave_unfinished(make_cv(dataset, tmp_path / "run"))
        path = tmp_path / "run" / "resume" / "fold_2_setting_1_inner_1.pt"
        content = path.read_bytes()
        if damage == "tensor":
            torch.save(torch.zeros(2), path)
        elif damage == "lacking":
            torch.save({"state_dict": {}}, path)
        else:
            path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage])
        unfitted.states.clear()
        make_cv(dataset, tmp_path / "run").run()
        assert len(unfitted.states) == 1 < calls
        assert_same(contents(tmp_path / "run"), contents(tmp_path / "whole"))
        warnings = [record.getMessage() for record in aloud.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert str(path) in warnings[0]
        assert "is done again" in warnings[0]

    def test_a_finished_run_killed_before_it_tidied_up_is_tidied_up(self, dataset, tmp_path, monkeypatch, unfitted):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, "clear_leftovers", lambda _: None)
            make_cv(dataset, tmp_path / "run").run()
        (tmp_path / "run" / ".outputs.json.x.part").write_text("half")
        assert (tmp_path / "run" / "resume").is_dir()
        make_cv(dataset, tmp_path / "run").run()
        assert not (tmp_path / "run" / "resume").exists()
        assert not (tmp_path / "run" / ".outputs.json.x.part").exists()


class TestWorkersThatDie:
    """Of a training each, the first always."""

    @pytest.fixture
    def engine(self, monkeypatch):
        class Mortal(Processes):
            deaths, for_good = 2, False

            def run(self, work, tasks, on_message) -> None:
                for times in range(1, self.deaths + 1):
                    on_message(tasks[0], {"epoch": 1, "lr": 0.1})
                    on_message(
                        tasks[0],
                        WorkerDied(times, self.for_good and times == self.deaths, "node7", 321, workers_left=3),
                    )
                super().run(work, tasks[self.for_good :], on_message)

        monkeypatch.setattr(nested_cv, "open_engine", lambda *_: nullcontext(Mortal()))
        return Mortal

    def test_the_training_is_done_again_aloud(self, engine, dataset, tmp_path, unfitted, aloud, capsys):
        cv = make_cv(dataset, tmp_path)
        cv.run()
        told = [message for message in aloud.messages if "it is trained again, 3 at a time" in message]
        assert len(told) == 2
        assert "its worker process on node7 was lost (2 times now)" in told[1]
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"trainings={TRAININGS}/{TRAININGS}" in last
        assert "0epoch" in last, "what was done before the loss is taken back"

    def test_one_that_is_lost_for_good_ends_the_run_when_the_others_are_trained(
        self, engine, dataset, tmp_path, unfitted, monkeypatch
    ):
        monkeypatch.setattr(engine, "for_good", True)
        with pytest.raises(
            EngineError,
            match=r"^fold_1_setting_1_inner_1: .*\(2 times now\).*it needs more memory, .* \(what is finished",
        ):
            make_cv(dataset, tmp_path).run()
        assert len(list((tmp_path / "resume").glob("fold_*.pt"))) == TRAININGS - 1

    def test_memory_that_runs_out_is_one_line_with_what_takes_less(self, cohort, tmp_path, unfitted, monkeypatch):
        def run_out(*_, **__):
            raise MemoryError

        monkeypatch.setattr(jobs, "fit", run_out)
        for mode, less in (
            ("chunked", "--batch_size, --chunk_size or"),
            ("full", "or --hidden_dim, or --mode chunked"),
        ):
            told = rf"^fold_1_setting_1_inner_1: it ran out of memory; it needs more memory, or a smaller .*{less}"
            with pytest.raises(EngineError, match=told):
                make_cv(MILDataset(*cohort, mode=mode), tmp_path / mode).run()


class TestFolder:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"seed": 6}, "seed"),
            ({"n_inner": 3}, "n_inner"),
            ({"n_outer": 2}, "n_outer"),
            ({"epochs": 4}, "training"),
            ({"lr": 1e-3}, "training"),
            ({"model_factory": lambda: small(hidden_dim=8)}, "model"),
            ({"model_factory": lambda: small("meanPool")}, "model"),
        ],
    )
    def test_another_configuration_moves_the_old_run_aside(self, changes, named, dataset, tmp_path, unfitted, aloud):
        make_cv(dataset, tmp_path / "run").run()
        first = contents(tmp_path / "run")
        trained = len(unfitted.states)
        make_cv(dataset, tmp_path / "run", **changes).run()
        assert_same(contents(tmp_path / "run.1"), first)
        assert len(unfitted.states) > trained
        assert read_json(tmp_path / "run" / "run.json")["finished"]
        assert f"held another run ({named} differs); moved to {tmp_path / 'run.1'}" in aloud.text

    @pytest.mark.parametrize("feed", [{"chunk_size": 10}, {"mode": "full"}])
    def test_another_feed_is_another_run(self, feed, cohort, dataset, tmp_path, unfitted):
        make_cv(dataset, tmp_path / "run").run()
        make_cv(MILDataset(*cohort, **({"chunk_size": 20} | feed)), tmp_path / "run").run()
        assert (tmp_path / "run.1" / "outputs.json").is_file()

    def test_each_old_run_keeps_its_own_folder(self, dataset, tmp_path, unfitted):
        kept = []
        for seed in (1, 2, 3):
            make_cv(dataset, tmp_path / "run", seed=seed).run()
            kept.append(contents(tmp_path / "run"))
        for folder, expected in zip(("run.1", "run.2", "run"), kept, strict=True):
            assert_same(contents(tmp_path / folder), expected)

    def test_an_unfinished_run_of_another_configuration_is_moved_whole(self, dataset, tmp_path, unfitted):
        leave_unfinished(make_cv(dataset, tmp_path / "run", seed=1))
        make_cv(dataset, tmp_path / "run", seed=2).run()
        assert len(list((tmp_path / "run.1" / "resume").glob("*.pt"))) == TRAININGS

    @pytest.mark.parametrize("what", ["features", "label", "patient"])
    def test_changed_data_is_another_run(self, what, tmp_path, unfitted):
        csv_path, features = write_cohort(tmp_path / "cohort", patches=(20, 20))
        make_cv(MILDataset(csv_path, features, chunk_size=20), tmp_path / "run").run()
        if what == "features":
            path = sorted(features.iterdir())[3]
            other = write_cohort(tmp_path / "other", patches=(20, 20), seed=1)[1] / path.name
            before = path.stat()
            path.write_bytes(other.read_bytes())
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
            assert path.stat().st_size == before.st_size
        elif what == "label":
            text = csv_path.read_text()
            csv_path.write_text(text.replace("P000-S1,benign", "P000-S1,malignant"))
        else:
            csv_path.write_text(csv_path.read_text().replace("P000,P000-S2", "P002,P000-S2"))
        make_cv(MILDataset(csv_path, features, chunk_size=20), tmp_path / "run").run()
        assert (tmp_path / "run.1" / "outputs.json").is_file()

    def test_changed_features_are_named(self, tmp_path, unfitted, aloud):
        csv_path, features = write_cohort(tmp_path / "cohort", patches=(20, 20))
        make_cv(MILDataset(csv_path, features, chunk_size=20), tmp_path / "run").run()
        path = sorted(features.iterdir())[3]
        path.write_bytes((write_cohort(tmp_path / "other", patches=(20, 20), seed=1)[1] / path.name).read_bytes())
        make_cv(MILDataset(csv_path, features, chunk_size=20), tmp_path / "run").run()
        assert f"held another run (features of {path.stem} differs)" in aloud.text

    @pytest.mark.parametrize("is_finished", [True, False])
    def test_files_that_were_only_touched_leave_a_run_what_it_is(
        self, is_finished, tmp_path, unfitted, monkeypatch, aloud
    ):
        csv_path, features = write_cohort(tmp_path / "cohort", patches=(5, 50))
        cv = make_cv(MILDataset(csv_path, features, chunk_size=20), tmp_path / "run")
        cv.run() if is_finished else leave_unfinished(cv)
        for path in features.iterdir():
            os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
        monkeypatch.setattr(jobs, "fit", None)
        read = FileRecord.of
        reads: list[str] = []
        monkeypatch.setattr(FileRecord, "of", lambda wsi_id, *rest: reads.append(wsi_id) or read(wsi_id, *rest))
        for times in (1, 2):
            make_cv(MILDataset(csv_path, features, chunk_size=20), tmp_path / "run").run()
            assert len(reads) == 24, f"read in run {times}"
        assert not (tmp_path / "run.1").exists()

    @pytest.mark.parametrize("is_finished", [True, False])
    def test_a_run_of_an_earlier_version_goes_on(self, is_finished, dataset, tmp_path, unfitted, monkeypatch, aloud):
        """It knew the feature files by size and time, and nothing of standardising."""
        cv = make_cv(dataset, tmp_path / "run")
        cv.run() if is_finished else leave_unfinished(cv)
        record = read_json(tmp_path / "run" / "run.json")
        del record["identity"]["features"], record["identity"]["standardized"]
        record["identity"]["slides"] = slides_by_time(cv.dataset)
        write_text(tmp_path / "run" / "run.json", json.dumps(record))
        (tmp_path / "run" / "features.csv").unlink()
        monkeypatch.setattr(jobs, "fit", None)
        monkeypatch.setattr(FileRecord, "of", None)
        make_cv(dataset, tmp_path / "run").run()
        assert not (tmp_path / "run.1").exists()
        assert read_json(tmp_path / "run" / "run.json")["identity"] == record["identity"]

    def test_a_folder_that_is_not_a_run_is_left_alone(self, dataset, tmp_path, unfitted):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.txt").write_text("years of work")
        with pytest.raises(ConfigError, match="not empty and not a training run; give another --output_dir"):
            make_cv(dataset, tmp_path / "run").run()
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]
        assert not unfitted.states

    def test_an_empty_folder_will_do(self, dataset, tmp_path, unfitted):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".DS_Store").write_text("")
        make_cv(dataset, tmp_path / "run").run()
        assert (tmp_path / "run" / "outputs.json").is_file()


class TestRefusals:
    def test_a_factory_of_one_shared_model(self, dataset, tmp_path):
        model = small()
        with pytest.raises(ConfigError, match="returns one shared model; make a new one at every call"):
            make_cv(dataset, tmp_path, lambda: model)

    def test_a_factory_whose_models_share_a_layer(self, dataset, tmp_path):
        layer = torch.nn.Linear(4, 4)

        def factory():
            model = small()
            model.shared = layer
            return model

        with pytest.raises(ConfigError, match="shared model"):
            make_cv(dataset, tmp_path, factory)

    def test_a_model_in_the_place_of_its_factory(self, dataset, tmp_path):
        with pytest.raises(ConfigError, match=r"a function that makes a model, found a LiteMIL; each .* a fresh one"):
            make_cv(dataset, tmp_path, small())

    @pytest.mark.parametrize("given", [None, ["S1"]])
    def test_a_dataset_that_is_none(self, given, tmp_path):
        with pytest.raises(ConfigError, match=f"dataset: expected a MILDataset, found a {type(given).__name__}"):
            NestedCrossValidation(small, given, ("a", "b"), tmp_path)

    def test_models_that_cannot_be_rebuilt(self, dataset, tmp_path):
        with pytest.raises(ConfigError, match="Linear has no spec to rebuild it by"):
            make_cv(dataset, tmp_path, lambda: torch.nn.Linear(16, 2))

    def test_a_model_that_is_not_registered(self, dataset, tmp_path):
        class Mine(BagModel):
            """Known to nobody."""

            def __init__(self, input_dim, num_classes):
                super().__init__(input_dim, num_classes)
                self.head = torch.nn.Linear(input_dim, num_classes)

        with pytest.raises(ConfigError, match=r"checkpoint of Mine .*unknown model 'Mine'.*decorate.*register_mil"):
            make_cv(dataset, tmp_path, lambda: Mine(16, 2))

    def test_a_model_that_its_spec_does_not_make(self, dataset, tmp_path):
        def factory():
            model = small("meanPool")
            model.classifier = torch.nn.Linear(16, 2)
            return model

        message = r"spec of meanPool makes another model .they differ in classifier.*; hand every"
        with pytest.raises(ConfigError, match=message):
            make_cv(dataset, tmp_path, factory)

    def test_a_model_of_another_s_name(self, dataset, tmp_path):
        class LiteMIL(BagModel):
            """Not the one that is registered."""

            def __init__(self, input_dim, num_classes):
                super().__init__(input_dim, num_classes)
                self.map = torch.nn.Linear(input_dim, num_classes)

        with pytest.raises(ConfigError, match="LiteMIL is the name of another model; rename the class"):
            make_cv(dataset, tmp_path, lambda: LiteMIL(16, 2))

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"num_classes": 3}, "num_classes is 3, the dataset's 2"),
            ({"input_dim": 8}, "input_dim is 8, the dataset's 16"),
        ],
    )
    def test_models_that_do_not_fit_the_dataset(self, option, message, dataset, tmp_path):
        with pytest.raises(ConfigError, match=message):
            make_cv(dataset, tmp_path, lambda: small(**option))

    @pytest.mark.parametrize("names", [("malignant", "benign"), ("benign",), ("benign", "malignant", "other")])
    def test_class_names_that_are_not_the_datasets(self, names, dataset, tmp_path):
        with pytest.raises(ConfigError, match="the dataset's are benign, malignant"):
            NestedCrossValidation(small, dataset, names, tmp_path)

    @pytest.mark.parametrize(
        "setting", [{"n_outer": 1}, {"epochs": 0}, {"lr": -1}, {"lr": 0}, {"lr": math.nan}, {"batch_size": 0}]
    )
    def test_settings_out_of_range(self, setting, dataset, tmp_path):
        with pytest.raises(ConfigError, match=f"--{next(iter(setting))}"):
            make_cv(dataset, tmp_path, **setting)

    def test_too_few_patients_leave_no_folder(self, dataset, tmp_path):
        with pytest.raises(SplitError, match="at most --n_outer 6 would work"):
            make_cv(dataset, tmp_path / "run", n_outer=7).run()
        assert not (tmp_path / "run").exists()


class TestGrid:
    def test_the_setting_with_the_best_mean_inner_validation_wins(self, dataset, tmp_path, unfitted):
        """Fold 1: the first setting has the single best model, the second the best mean; fold 2 the other way round."""
        aucs = [0.99, 0.5, 0.8, 0.8, 0.9, 0.9, 0.95, 0.6, 0.7, 0.7, 0.7, 0.7]
        losses = [1.0] * 8 + [1.0, 1.0, 0.9, 0.8]
        unfitted.script = [{"val_auc": auc, "val_loss": loss} for auc, loss in zip(aucs, losses, strict=True)]
        results = make_cv(dataset, tmp_path / "run", grid="lr=1e-3,1e-2").run()
        chosen = [fold["selection"] for fold in results["fold_results"]]
        assert [(one["setting"]["lr"], one["inner_fold"]) for one in chosen] == [(1e-2, 1), (1e-3, 1), (1e-2, 2)]
        for fold, call in enumerate((2, 4, 11), start=1):
            assert is_state(tmp_path / "run" / f"fold_{fold}_best.pth", unfitted.states[call])
        assert [score["setting"] for score in chosen[0]["settings"]] == [{"lr": 1e-3}, {"lr": 1e-2}]
        assert [score["val_auc"] for score in chosen[0]["settings"]] == pytest.approx([0.745, 0.8])
        assert "lr=0.01 in 2 of 3 folds; lr=0.001 in 1 of 3 folds" in closing_text(results)

    def test_settings_of_training_and_model_reach_both(self, dataset, tmp_path, monkeypatch, no_figures):
        fit, seen = jobs.fit, []

        def spying(factory, data, train, val, settings, **named):
            seen.append((settings.lr, settings.batch_size, factory().spec["hidden_dim"], named["seed"]))
            return fit(factory, data, train, val, settings, **named)

        monkeypatch.setattr(jobs, "fit", spying)
        cv = make_cv(dataset, tmp_path, n_outer=2, epochs=1, grid={"hidden_dim": (8, 16), "lr": (1e-3, 1e-2)})
        results = cv.run()
        expected = [(lr, 8, dim) for dim in (8, 16) for lr in (1e-3, 1e-2) for _ in range(2)] * 2
        assert [call[:3] for call in seen] == expected
        assert len({call[3] for call in seen}) == len(seen)
        for fold in results["fold_results"]:
            checkpoint = load_checkpoint(tmp_path / f"fold_{fold['fold']}_best.pth")
            assert checkpoint.model["hidden_dim"] == fold["selection"]["setting"]["hidden_dim"]
        history = pd.read_csv(tmp_path / "history.csv")
        assert history.groupby(["fold", "setting", "inner"]).ngroups == len(history) == 16
        assert set(history["setting"]) == {f"lr={lr} hidden_dim={dim}" for lr in (0.001, 0.01) for dim in (8, 16)}

    @pytest.mark.parametrize(
        ("grid", "message"),
        [
            ("lr=-1", "--grid lr=-1"),
            ("num_heads=3", "--grid num_heads=3: LiteMIL"),
            ("temperature=1", "--grid temperature: no hyperparameter"),
        ],
    )
    def test_a_setting_that_cannot_be_is_refused_before_anything_begins(self, grid, message, dataset, tmp_path):
        with pytest.raises(ConfigError, match=message):
            make_cv(dataset, tmp_path / "run", grid=grid)
        assert not (tmp_path / "run").exists()

    def test_another_grid_is_another_run(self, dataset, tmp_path, unfitted, aloud):
        make_cv(dataset, tmp_path / "run").run()
        make_cv(dataset, tmp_path / "run", grid="lr=1e-3,1e-2").run()
        assert "held another run (grid differs)" in aloud.text

    def test_a_setting_that_diverges_loses_and_the_others_go_on(self, dataset, tmp_path, no_figures, aloud):
        """A decay of 10 at a rate of 1 multiplies each weight by -9 in every step."""
        changes = {"weight_decay": 10, "epochs": 12, "n_outer": 2, "grid": "lr=1e-2,1"}
        results = make_cv(dataset, tmp_path / "run", **changes).run()
        for fold in results["fold_results"]:
            assert fold["selection"]["setting"] == {"lr": 0.01}
            kept, lost = fold["selection"]["settings"]
            assert lost == {"diverged": True, **dict.fromkeys(kept), "setting": {"lr": 1.0}}
            assert "diverged" not in kept
        assert strict_json(tmp_path / "run" / "outputs.json") == results
        told = r"outer fold 1, inner fold 1 with lr=1\.0: .* lower --lr; this setting is not chosen"
        assert [bool(re.search(told, message)) for message in aloud.messages].count(True) == 1
        assert set(pd.read_csv(tmp_path / "run" / "history.csv")["setting"]) == {"lr=0.01"}

    @pytest.fixture
    def bursting(self, monkeypatch, unfitted):
        """Trainings at the rates in it diverge."""
        rates: set[float] = set()

        def fit(factory, dataset, train, val, settings, **named):
            if settings.lr in rates:
                raise DivergedError("the loss of epoch 1 is nan; lower --lr")
            return unfitted(factory, dataset, train, val, settings, **named)

        monkeypatch.setattr(jobs, "fit", fit)
        return rates

    def test_that_a_setting_diverged_is_kept_over_a_kill(self, dataset, tmp_path, bursting, monkeypatch, aloud):
        bursting.add(1e-2)
        grid = {"grid": "lr=1e-3,1e-2"}
        make_cv(dataset, tmp_path / "whole", **grid).run()
        leave_unfinished(make_cv(dataset, tmp_path / "run", **grid))
        monkeypatch.setattr(jobs, "fit", None)
        aloud.clear()
        make_cv(dataset, tmp_path / "run", **grid).run()
        assert_same(contents(tmp_path / "run"), contents(tmp_path / "whole"))
        assert aloud.text.count("this setting is not chosen") == N_OUTER

    def test_where_all_settings_diverge_the_run_ends(self, dataset, tmp_path, bursting):
        bursting |= {1e-3, 1e-2}
        told = r"outer fold 1, inner fold 1 with lr=0\.001: .* leave this setting out"
        with pytest.raises(TrainingError, match=told):
            make_cv(dataset, tmp_path / "run", grid="lr=1e-3,1e-2").run()

    def test_without_a_grid_a_training_that_diverges_ends_the_run(self, dataset, tmp_path, bursting):
        bursting.add(1e-2)
        with pytest.raises(TrainingError, match=r"outer fold 1, inner fold 1: the loss of epoch 1 is nan; lower --lr$"):
            make_cv(dataset, tmp_path / "run").run()
        assert not list((tmp_path / "run" / "resume").glob("*.pt"))


class TestStandardize:
    def scaled(self, folder: Path, factor: float) -> MILDataset:
        """The cohort of the other tests, its features so many times as large."""
        csv_path, features = write_cohort(folder, patches=(5, 50), dtype="float32")
        for path in features.iterdir():
            bag = read_bag(path)
            write_bag(path, replace(bag, features=bag.features * np.float32(factor)))
        return MILDataset(csv_path, features, chunk_size=20)

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


class TestMonitor:
    @pytest.mark.parametrize("monitor", ["slide_auc", "slide_loss", "slide_balanced_accuracy", "slide_f1_macro"])
    def test_decides_between_the_inner_models(self, monitor, dataset, tmp_path, unfitted):
        name = monitor.replace("slide_", "val_")
        better = 0.1 if monitor == "slide_loss" else 0.9
        unfitted.script = [{"val_loss": 0.5}, {"val_loss": 0.5, name: better}] * 3
        results = make_cv(dataset, tmp_path / "run", monitor=monitor).run()
        assert [fold["selection"]["inner_fold"] for fold in results["fold_results"]] == [2, 2, 2]
        assert {fold["selection"]["monitor"] for fold in results["fold_results"]} == {monitor}


class TestFinal:
    def test_an_ensemble_answers_with_its_members_mean(self, dataset, tmp_path, monkeypatch, no_figures):
        fit, states = jobs.fit, []

        def keeping(*arguments, **named):
            states.append(fit(*arguments, **named))
            return states[-1]

        monkeypatch.setattr(jobs, "fit", keeping)
        results = make_cv(dataset, tmp_path, final="ensemble").run()
        rows = pd.read_csv(tmp_path / "predictions.csv")
        for fold in range(N_OUTER):
            members = []
            for fitted in states[2 * fold : 2 * fold + 2]:
                members.append(small())
                members[-1].load_state_dict(fitted.state_dict)
            checkpoint = load_checkpoint(tmp_path / f"fold_{fold + 1}_best.pth")
            assert checkpoint.model == small().spec
            for slide in rows.index[rows["fold"] == fold + 1]:
                each = [predict_features(TASK, one, dataset.features(slide), SlideFeed(20, "mean")) for one in members]
                mean = np.mean([one.probabilities for one in each], axis=0)
                assert rows.loc[slide, "prob_malignant"] == pytest.approx(mean[1], abs=1e-12)
                again = predict_features(TASK, checkpoint.build(), dataset.features(slide), checkpoint.slide_feed, True)
                assert again.probabilities[1] == rows.loc[slide, "prob_malignant"]
                assert again.attention.sum(axis=1) == pytest.approx(1, abs=1e-5)
            selection = results["fold_results"][fold]["selection"]
            assert selection["epochs"] == [fitted.epoch for fitted in states[2 * fold : 2 * fold + 2]]
            assert (selection["final"], selection["inner_fold"], selection["epoch"]) == ("ensemble", None, None)

    def test_an_ensembles_checkpoint_predicts_by_command(self, dataset, cohort, tmp_path, no_figures, script):
        make_cv(dataset, tmp_path / "run", final="ensemble", epochs=1).run()
        rows = pd.read_csv(tmp_path / "run" / "predictions.csv").set_index("wsi_id")
        name = rows.index[rows["fold"] == 2][0]
        outcome = script(
            "predict", "--checkpoint", tmp_path / "run" / "fold_2_best.pth", "--input", cohort[1] / f"{name}.h5",
            "--output_dir", tmp_path / "predict", "--device", "cpu",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        said = read_json(tmp_path / "predict" / f"{name}_prediction.json")["probabilities"]["malignant"]
        assert said == pytest.approx(rows.loc[name, "prob_malignant"], abs=1e-6)

    def test_a_refit_trains_on_all_but_the_test_slides(self, dataset, tmp_path, monkeypatch, no_figures):
        refit, fit, calls, epochs = jobs.refit, jobs.fit, [], []

        def watched(factory, data, train, settings, **named):
            calls.append((set(train.tolist()), named["epochs"]))
            return refit(factory, data, train, settings, **named)

        def counted(*arguments, **named):
            fitted = fit(*arguments, **named)
            epochs.append(fitted.epoch)
            return fitted

        monkeypatch.setattr(jobs, "refit", watched)
        monkeypatch.setattr(jobs, "fit", counted)
        results = make_cv(dataset, tmp_path / "run", final="refit").run()
        rows = pd.read_csv(tmp_path / "run" / "predictions.csv")
        for fold in range(N_OUTER):
            assert calls[fold][0] == set(rows.index[rows["fold"] != fold + 1])
            assert calls[fold][1] == math.ceil(np.median(epochs[2 * fold : 2 * fold + 2]))
            assert results["fold_results"][fold]["selection"]["epoch"] == calls[fold][1]
        history = pd.read_csv(tmp_path / "run" / "history.csv")
        refits = history[history["inner"] == 0]
        assert refits.groupby("fold")["epoch"].max().tolist() == [epochs for _, epochs in calls]
        assert refits["val_loss"].isna().all()
        assert np.isfinite(refits["train_loss"]).all()

    @pytest.mark.parametrize("final", ["ensemble", "refit"])
    def test_resumes_where_it_was_to_the_same_bytes(self, final, dataset, tmp_path, no_figures):
        make_cv(dataset, tmp_path / "whole", final=final, epochs=2).run()
        cv = make_cv(dataset, tmp_path / "run", final=final, epochs=2)
        leave_unfinished(cv)
        kept = sorted((tmp_path / "run" / "resume").glob("*.pt"))
        assert len(kept) == TRAININGS + (N_OUTER if final == "refit" else 0)
        for path in kept[::2]:
            path.unlink()
        make_cv(dataset, tmp_path / "run", final=final, epochs=2).run()
        assert_same(contents(tmp_path / "run"), contents(tmp_path / "whole"))


class TestThreshold:
    def test_is_fitted_on_inner_validation_and_applied_to_the_test(self, dataset, tmp_path, monkeypatch, no_figures):
        fit, fits = jobs.fit, []

        def keeping(factory, data, train, stopping, *rest, **named):
            fitted = fit(factory, data, train, stopping, *rest, **named)
            fits.append((data.labels[stopping.slides], fitted.val_probabilities[:, 1].numpy()))
            return fitted

        monkeypatch.setattr(jobs, "fit", keeping)
        results = make_cv(dataset, tmp_path).run()
        rows = pd.read_csv(tmp_path / "predictions.csv")
        at_threshold = np.empty(len(rows), dtype=int)
        for number, fold in enumerate(results["fold_results"]):
            labels, scores = (np.concatenate(part) for part in zip(*fits[2 * number : 2 * number + 2], strict=True))
            assert fold["threshold"] == fold["selection"]["threshold"] == fitted_threshold(labels, scores)
            mine = rows["fold"] == fold["fold"]
            at_threshold[mine] = rows.loc[mine, "prob_malignant"] >= fold["threshold"]
            expected = decision_metrics(dataset.labels[mine], at_threshold[mine], dataset.class_names)
            assert fold["thresholded"] == expected
        expected = decision_metrics(dataset.labels, at_threshold, dataset.class_names)
        assert results["pooled_thresholded"] == expected
        assert f"balanced accuracy {expected['balanced_accuracy']:.3f} (" in closing_text(results)


class TestRepeats:
    def test_each_repeat_tests_each_slide_once_on_other_folds(self, dataset, tmp_path, unfitted):
        results = make_cv(dataset, tmp_path, repeats=3).run()
        rows = pd.read_csv(tmp_path / "predictions.csv")
        ids = [row.wsi_id for row in dataset.rows]
        assert rows["wsi_id"].tolist() == ids * 3
        assert rows["repeat"].tolist() == [number for number in (1, 2, 3) for _ in ids]
        assert (rows.groupby("repeat")["fold"].unique().map(sorted).tolist()) == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
        partitions = {
            frozenset(frozenset(part) for _, part in repeat.groupby("fold")["wsi_id"])
            for _, repeat in rows.groupby("repeat")
        }
        assert len(partitions) == 3
        assert (results["n_folds"], results["n_repeats"], results["n_slides"]) == (9, 3, 24)
        assert len(list(tmp_path.glob("fold_*_best.pth"))) == 9
        assert "tested once in each of 3 repeats" in closing_text(results)

    def test_the_first_repeat_is_the_run_without_repeats(self, finished, dataset, tmp_path, no_figures):
        make_cv(dataset, tmp_path / "run", repeats=2).run()
        for name in (f"fold_{k}_best.pth" for k in range(1, N_OUTER + 1)):
            assert (tmp_path / "run" / name).read_bytes() == (finished.folder / name).read_bytes()
        rows = pd.read_csv(tmp_path / "run" / "predictions.csv")
        first = pd.read_csv(finished.folder / "predictions.csv")
        pd.testing.assert_frame_equal(rows[rows["repeat"] == 1], first)
        gallery = pd.read_csv(tmp_path / "run" / "gallery.csv").set_index("wsi_id")
        for wsi_id, probability in gallery["prob_malignant"].items():
            assert probability == pytest.approx(rows.loc[rows["wsi_id"] == wsi_id, "prob_malignant"].mean())


def write_clam_split(path: Path, train: list[str], val: list[str], test: list[str]) -> None:
    """As CLAM writes it: a first column without a name, columns as long as the longest."""
    pd.DataFrame({name: pd.Series(ids) for name, ids in {"train": train, "val": val, "test": test}.items()}).to_csv(
        path
    )


# The counts of a command line that does not say any: a file of splits says them.
UNSAID = {"n_outer": Protocol.n_outer, "n_inner": Protocol.n_inner}


class TestSplitsFile:
    def test_our_own_file_gives_the_run_again(self, finished, dataset, tmp_path, no_figures):
        cv = make_cv(dataset, tmp_path / "run", splits=finished.folder / "splits.json")
        results = cv.run()
        for name in ("predictions.csv", "history.csv", "splits.json", "fold_2_best.pth"):
            assert (tmp_path / "run" / name).read_bytes() == (finished.folder / name).read_bytes(), name
        assert results["pooled"] == finished.results["pooled"]

    def test_repeats_are_read_back(self, dataset, tmp_path, unfitted):
        first = make_cv(dataset, tmp_path / "a", repeats=2).run()
        again = make_cv(dataset, tmp_path / "b", splits=tmp_path / "a", **UNSAID).run()
        assert (tmp_path / "b" / "splits.json").read_bytes() == (tmp_path / "a" / "splits.json").read_bytes()
        assert (again["n_repeats"], again["n_folds"]) == (first["n_repeats"], first["n_folds"]) == (2, 6)

    def clam(self, folder: Path, dataset: MILDataset, tests: list[range]) -> Path:
        """Splits of patients P000-P011, each tested range its own file."""
        folder.mkdir()
        slides_of = {case: [row.wsi_id for row in dataset.rows if row.case_id == case] for case in set(dataset.cases)}
        for number, tested in enumerate(tests):
            left = [patient for patient in range(12) if patient not in tested]
            parts = [
                [wsi_id for patient in part for wsi_id in slides_of[f"P{patient:03d}"]]
                for part in (left[:-4], left[-4:], tested)
            ]
            write_clam_split(folder / f"splits_{number}.csv", *parts)
        return folder

    def test_clams_disjoint_tests_are_one_repeat(self, dataset, tmp_path, unfitted):
        splits = self.clam(tmp_path / "splits", dataset, [range(4), range(4, 8), range(8, 12)])
        results = make_cv(dataset, tmp_path / "run", splits=splits, **UNSAID).run()
        assert (results["n_repeats"], results["n_folds"], len(unfitted.states)) == (1, 3, 3)
        rows = pd.read_csv(tmp_path / "run" / "predictions.csv")
        assert rows["fold"].tolist() == [1 + patient // 4 for patient in range(12) for _ in range(2)]

    def test_clams_overlapping_tests_are_repeats(self, dataset, tmp_path, unfitted, aloud):
        splits = self.clam(tmp_path / "splits", dataset, [range(4), range(2, 6)])
        results = make_cv(dataset, tmp_path / "run", splits=splits, **UNSAID).run()
        assert (results["n_repeats"], results["n_folds"], results["n_slides"], results["n_cases"]) == (2, 2, 12, 6)
        assert "12 of 24 slides are tested by no fold" in aloud.text
        assert "the tests overlap; each of the 2 splits is a repeat of its own" in aloud.text
        assert len(pd.read_csv(tmp_path / "run" / "predictions.csv")) == 16

    def test_a_shared_patient_is_refused(self, dataset, tmp_path):
        ids = [row.wsi_id for row in dataset.rows]
        write_clam_split(tmp_path / "splits_0.csv", ids[:11], ids[12:18], [ids[11], *ids[18:]])
        cv = make_cv(dataset, tmp_path / "run", splits=tmp_path / "splits_0.csv", **UNSAID)
        with pytest.raises(SplitError, match=r"1 patient on both sides of splits_0.csv: P005 \(train and test\)"):
            cv.run()
        assert not (tmp_path / "run").exists()

    def test_a_shared_group_is_refused(self, cohort, tmp_path):
        table = pd.read_csv(cohort[0], dtype=str)
        table.assign(site=table["case_id"].str[1:].astype(int) // 4).to_csv(tmp_path / "labels.csv", index=False)
        data = MILDataset(tmp_path / "labels.csv", cohort[1], group_column="site")
        ids = [row.wsi_id for row in data.rows]
        write_clam_split(tmp_path / "splits_0.csv", ids[:12], ids[12:16], ids[16:])
        with pytest.raises(
            SplitError, match=r"1 site on both sides of splits_0.csv: 1 \(train and val\).*split by site"
        ):
            make_cv(data, tmp_path / "run", splits=tmp_path / "splits_0.csv", **UNSAID).run()

    @pytest.mark.parametrize(
        ("train", "val", "test", "message"),
        [
            (range(12), range(12, 24), range(0), "splits_0.csv has no slide in test"),
            ([0, 1, 4, 5], range(12, 16), range(16, 24), "has no slide of class malignant"),
        ],
    )
    def test_parts_that_cannot_serve(self, train, val, test, message, dataset, tmp_path):
        ids = [row.wsi_id for row in dataset.rows]
        write_clam_split(tmp_path / "splits_0.csv", *[[ids[slide] for slide in part] for part in (train, val, test)])
        with pytest.raises(SplitError, match=message):
            make_cv(dataset, tmp_path / "run", splits=tmp_path / "splits_0.csv", **UNSAID).run()

    def test_slides_that_the_cohort_lacks(self, cohort, dataset, tmp_path, unfitted):
        ids = [row.wsi_id for row in dataset.rows]
        write_clam_split(tmp_path / "splits_0.csv", [*ids[:8], "P099-S1"], ids[8:16], ids[16:])
        with pytest.raises(SplitError, match=r"1 slide of the splits not in the cohort: P099-S1; .*--allow missing"):
            make_cv(dataset, tmp_path / "run", splits=tmp_path / "splits_0.csv", **UNSAID).run()
        lenient = MILDataset(*cohort, chunk_size=20, allow=["missing"])
        assert make_cv(lenient, tmp_path / "run", splits=tmp_path / "splits_0.csv", **UNSAID).run()["n_folds"] == 1

    def test_counts_that_contradict_the_file(self, finished, dataset, tmp_path):
        cv = make_cv(dataset, tmp_path / "run", splits=finished.folder, n_outer=4)
        with pytest.raises(ConfigError, match=r"--n_outer 4: .* holds 3; leave it out"):
            cv.run()
        with pytest.raises(ConfigError, match=r"--repeats 2: --splits .* says which folds"):
            make_cv(dataset, tmp_path / "run", splits=finished.folder, repeats=2)

    def test_repeats_may_number_their_folds_alike(self, dataset, tmp_path, unfitted):
        """Two repeats with folds 1 to 3 each: none is taken for a part of the other."""
        make_cv(dataset, tmp_path / "a", repeats=2).run()
        content = read_json(tmp_path / "a" / "splits.json")
        for fold in content["folds"]:
            fold["fold"] = (fold["fold"] - 1) % 3 + 1
        write_text(tmp_path / "splits.json", json.dumps(content))
        make_cv(dataset, tmp_path / "b", splits=tmp_path / "splits.json", **UNSAID).run()
        assert (tmp_path / "b" / "splits.json").read_bytes() == (tmp_path / "a" / "splits.json").read_bytes()
        for fold in read_json(tmp_path / "b" / "splits.json")["folds"]:
            used = {one for inner in fold["inner"] for part in inner.values() for one in part}
            assert not used & set(fold["test"])
            assert len(used) + len(fold["test"]) == len(dataset)

    def test_a_fold_that_stands_twice(self, finished, dataset, tmp_path):
        content = read_json(finished.folder / "splits.json")
        content["folds"][1]["fold"] = 1
        write_text(tmp_path / "splits.json", json.dumps(content))
        with pytest.raises(SplitError, match="fold 1 more than once; give each fold a number of its own"):
            make_cv(dataset, tmp_path / "run", splits=tmp_path / "splits.json", **UNSAID).run()

    def test_a_slide_tested_twice_in_a_repeat(self, finished, dataset, tmp_path):
        content = read_json(finished.folder / "splits.json")
        content["folds"][1] = content["folds"][0] | {"fold": 2}
        write_text(tmp_path / "splits.json", json.dumps(content))
        with pytest.raises(SplitError, match="a slide is tested by two folds of repeat 1"):
            make_cv(dataset, tmp_path / "run", splits=tmp_path / "splits.json", **UNSAID).run()


class TestJobs:
    def test_two_processes_write_the_bytes_of_one(self, finished, cohort, dataset, tmp_path, monkeypatch):
        monkeypatch.setattr("utils.core.engine.threads_each", lambda jobs: 1)
        factory = partial(build_mil, "LiteMIL", input_dim=16, num_classes=2, hidden_dim=16, num_heads=2)
        make_cv(dataset, tmp_path / "run", factory, jobs=2).run()
        assert_same(contents(tmp_path / "run"), contents(finished.folder))
        record = read_json(tmp_path / "run" / "run.json")
        assert (record["jobs"], record["threads"]) == (2, 1)

    def test_the_number_of_jobs_is_no_other_run(self, finished, dataset, monkeypatch):
        factory = partial(build_mil, "LiteMIL", input_dim=16, num_classes=2, hidden_dim=16, num_heads=2)
        assert make_cv(dataset, finished.folder, factory, jobs=3).run() == finished.results

    def test_a_lambda_cannot_be_sent(self, dataset, tmp_path):
        with pytest.raises(ConfigError, match=r"model_factory cannot be sent.*functools.partial\(build_mil"):
            make_cv(dataset, tmp_path / "run", lambda: small(), jobs=2)

    @pytest.mark.parametrize("cache", ["ram", "off", "folder"])
    def test_processes_share_one_packed_file(self, cache, cohort, tmp_path, aloud):
        data = MILDataset(*cohort, cache=str(tmp_path / "cache") if cache == "folder" else cache)
        data.features(0)
        shared = data.shared(tmp_path / "resume")
        packed = list((tmp_path / "resume").glob("*.packed"))
        assert len(packed) == (cache == "ram")
        assert (shared is data) is (cache != "ram")
        assert ("--cache DIR packs them for all" in aloud.text) is (cache == "off")
        assert all(torch.equal(shared.features(slide), data.features(slide)) for slide in range(len(data)))
        assert not shared.is_in_memory


class TestDryRun:
    def test_says_what_a_run_would_do_and_does_nothing(self, dataset, tmp_path):
        cv = make_cv(dataset, tmp_path / "run", grid="lr=1e-3,1e-2", epochs=7)
        said = cv.dry_run()
        assert not (tmp_path / "run").exists()
        tests = [line.split() for line in said.splitlines() if "test" in line]
        assert [line[:2] for line in tests] == [["fold", "1:"], ["fold", "2:"], ["fold", "3:"]]
        assert sum(int(line[3]) for line in tests) == sum(int(line[5]) for line in tests) == 12
        assert "12 inner trainings of at most 7 epochs" in said
        assert "time: about" in said
        assert "GB free" in said
        assert "memory: about" in said
        refit = make_cv(dataset, tmp_path / "run", grid="lr=1e-3,1e-2", epochs=7, final="refit").dry_run()
        assert "12 inner trainings of at most 7 epochs, 3 refits" in refit

    def test_the_largest_step_of_the_run_is_taken(self, cohort, tmp_path, monkeypatch):
        steps = []
        monkeypatch.setattr(dry_run.ModelTraining, "step", lambda _, *step: steps.append(step))
        data = MILDataset(*cohort, mode="full", cache="ram")
        make_cv(data, tmp_path / "run", batch_size=3).dry_run()
        sizes = np.array([info.num_instances for info in data.info])
        (slides, batch_size), *_ = steps
        assert batch_size == 3
        assert sorted(sizes[slides]) == sorted(sizes)[-3:]
        make_cv(MILDataset(*cohort, mode="full", cache="off"), tmp_path / "run", batch_size=3).dry_run()
        assert len(steps[1][0]) == len(data), "what is read from files beside the batch"

    def test_a_setting_that_diverges_is_tried_all_the_same(self, dataset, tmp_path, monkeypatch):
        monkeypatch.setattr("utils.learning.training.learning_rate", lambda *_: 1e30)
        assert "12 inner trainings" in make_cv(dataset, tmp_path / "run", grid="lr=1e-2,1").dry_run()


class TestLargeSlides:
    @pytest.mark.parametrize(("free", "level"), [(10**12, "INFO"), (10**5, "WARNING")])
    def test_what_their_step_takes_is_said_at_the_start(
        self, free, level, cohort, tmp_path, unfitted, monkeypatch, aloud
    ):
        monkeypatch.setattr(dry_run, "MANY_PATCHES", 100)
        monkeypatch.setattr(dry_run, "FORECAST_ROWS", (32, 64))
        monkeypatch.setattr(dry_run, "available_memory", lambda: free)
        make_cv(MILDataset(*cohort, mode="full"), tmp_path / "run", lambda: small("TransMIL")).run()
        (record,) = [record for record in aloud.records if "TransMIL on whole slides" in record.getMessage()]
        assert re.search(r"\(8 slides, \d+ patches\) takes about \d+ seconds? and 0?\.?\d+.* MB", record.getMessage())
        assert record.levelname == level
        assert ("MB free)" in record.getMessage()) is (level == "WARNING")

    def test_chunks_and_small_slides_need_no_word(self, dataset, cohort, tmp_path, unfitted, monkeypatch, aloud):
        make_cv(MILDataset(*cohort, mode="full"), tmp_path / "full").run()
        monkeypatch.setattr(dry_run, "MANY_PATCHES", 1)
        make_cv(dataset, tmp_path / "chunked").run()
        assert "on whole slides" not in aloud.text


class TestKeywords:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"learning_rate": 1e-3}, "NestedCrossValidation: no setting learning_rate"),
            ({"finall": "best"}, "NestedCrossValidation: no setting finall; did you mean final"),
            ({"final": "Ensemble"}, "--final 'Ensemble': .* did you mean ensemble"),
            ({"epochs": "2"}, "--epochs '2': expected a whole number"),
            ({"patience": None}, "--patience None: expected a whole number"),
            ({"output_dir": None}, "output_dir None"),
            ({"model_factory": "LiteMIL"}, "model_factory 'LiteMIL': expected a function"),
        ],
    )
    def test_what_cannot_be_is_one_line(self, settings, message, dataset, tmp_path):
        with pytest.raises(ConfigError, match=message):
            make_cv(dataset, **({"output_dir": tmp_path} | settings))

    def test_class_names_that_are_numbers_are_told(self, dataset, tmp_path):
        with pytest.raises(ConfigError, match=r"--class_names \[0, 1\]: expected a list of text"):
            NestedCrossValidation(small, dataset, [0, 1], tmp_path)

    def test_what_means_the_same_is_the_same_run(self, dataset, tmp_path):
        plain, other = (
            make_cv(dataset, tmp_path, **settings)
            for settings in (
                {"monitor": "slide_auc", "epochs": 3, "device": "cpu"},
                {"monitor": "auc", "epochs": np.int64(3), "device": torch.device("cpu")},
            )
        )
        assert other.protocol == plain.protocol
        assert other.training == plain.training


class TestKinds:
    @pytest.mark.parametrize("name", list_mils())
    def test_every_model_trains(self, name, dataset, tmp_path, no_figures):
        results = make_cv(dataset, tmp_path, lambda: small(name), n_outer=2, epochs=1).run()
        assert results["model"]["name"] == name
        assert load_checkpoint(tmp_path / "all_folds_best.pth").build().spec == small(name).spec
        assert len(pd.read_csv(tmp_path / "predictions.csv")) == len(dataset)

    def test_full_mode_feeds_whole_slides(self, cohort, tmp_path, no_figures):
        data = MILDataset(*cohort, mode="full", chunk_size=20)
        results = make_cv(data, tmp_path, n_outer=2, epochs=2).run()
        checkpoint = load_checkpoint(tmp_path / "fold_1_best.pth")
        assert checkpoint.slide_feed == SlideFeed(None, "merge")
        for result in results["fold_results"]:
            assert result["chunk"] == result["slide"]
        rows = pd.read_csv(tmp_path / "predictions.csv")
        slide = int(rows.index[rows["fold"] == 1][0])
        with torch.inference_mode():
            logits, _ = checkpoint.build()(data[slide][0].float()[None])
        assert torch.softmax(logits[0], 0)[1].item() == pytest.approx(rows.loc[slide, "prob_malignant"], abs=1e-6)

    def test_sequential_chunks_are_evaluated_as_they_are_trained_on(self, cohort, tmp_path, no_figures):
        data = MILDataset(*cohort, chunk_size=20, sequential=True)
        make_cv(data, tmp_path, n_outer=2, epochs=1).run()
        checkpoint = load_checkpoint(tmp_path / "fold_1_best.pth")
        assert checkpoint.slide_feed == SlideFeed(20, "mean", sequential=True)
        rows = pd.read_csv(tmp_path / "predictions.csv")
        slide = int(rows.index[rows["fold"] == 1][0])
        output = predict_features(TASK, checkpoint.build(), data.features(slide), checkpoint.slide_feed)
        assert output.probabilities[1] == pytest.approx(rows.loc[slide, "prob_malignant"], abs=1e-6)

    def test_groups_stay_together_in_every_part(self, cohort, tmp_path, no_figures):
        table = pd.read_csv(cohort[0], dtype=str)
        numbers = table["case_id"].str[1:].astype(int)
        table.assign(site=(numbers % 6).map("site {}".format)).to_csv(tmp_path / "labels.csv", index=False)
        data = MILDataset(tmp_path / "labels.csv", cohort[1], chunk_size=20, group_column="site")
        make_cv(data, tmp_path / "run", n_outer=3, n_inner=2, epochs=1).run()
        site_of = {row.wsi_id: group for row, group in zip(data.rows, data.groups, strict=True)}
        for fold in strict_json(tmp_path / "run" / "splits.json")["folds"]:
            for inner in fold["inner"]:
                sites = [{site_of[wsi_id] for wsi_id in part} for part in (fold["test"], *inner.values())]
                assert sum(map(len, sites)) == len(set().union(*sites)) == 6

    def test_other_groups_are_another_run(self, cohort, tmp_path, unfitted):
        table = pd.read_csv(cohort[0], dtype=str)
        table.assign(site=table["case_id"]).to_csv(tmp_path / "same.csv", index=False)
        table.assign(site=table["case_id"].str[1:].astype(int) // 2).to_csv(tmp_path / "other.csv", index=False)
        runs = [
            make_cv(MILDataset(tmp_path / f"{name}.csv", cohort[1], group_column="site"), tmp_path / "run")
            for name in ("same", "other")
        ]
        identities = [settings_identity(cv.trainer, cv.protocol, []) for cv in runs]
        assert [key for key in identities[0] if identities[0][key] != identities[1][key]] == ["groups"]

    def test_figures_come_in_other_formats_without_another_training(self, dataset, tmp_path, caplog):
        """The format is nothing that a run depends on: an unfinished one goes on, a finished one draws what lacks."""
        with drawn_coarsely(blank=FORMATS):
            make_cv(dataset, tmp_path / "run", figure_format=("svg",)).run()
        before = contents(tmp_path / "run")
        assert {Path(name).stem for name in before if name.endswith(".svg")} == set(run_figures.FIGURES)
        (tmp_path / "run" / "roc.svg").unlink()
        with drawn_coarsely(blank=FORMATS), caplog.at_level("INFO"):
            make_cv(dataset, tmp_path / "run", figure_format=("svg", "pdf")).run()
        assert "nothing is trained" in caplog.text
        assert "drawn from its tables: roc.svg, roc.pdf, precision_recall.pdf" in caplog.text
        after = contents(tmp_path / "run")
        assert {name: after[name] for name in before} == before
        assert {name for name in after if name not in before} == {f"{name}.pdf" for name in run_figures.FIGURES}

    def test_three_classes(self, tmp_path, coarse_figures):
        names = ("CCRCC", "CHRCC", "PRCC")
        cohort = write_cohort(tmp_path / "cohort", classes=names, slides_per_patient=1, signal=4)
        data = MILDataset(*cohort, class_names=("PRCC", "CCRCC", "CHRCC"), chunk_size=30)
        results = make_cv(data, tmp_path / "run", lambda: small("ABMIL", num_classes=3), epochs=12).run()
        assert strict_json(tmp_path / "run" / "outputs.json") == results
        assert results["class_names"] == ["PRCC", "CCRCC", "CHRCC"]
        rows = pd.read_csv(tmp_path / "run" / "predictions.csv")
        probabilities = rows[["prob_PRCC", "prob_CCRCC", "prob_CHRCC"]].to_numpy()
        assert probabilities.sum(axis=1) == pytest.approx(1)
        assert [("PRCC", "CCRCC", "CHRCC")[k] for k in probabilities.argmax(axis=1)] == rows["predicted"].tolist()
        assert results["pooled"]["auc"] > 0.8
        assert results["pooled"]["accuracy"] == pytest.approx((rows["predicted"] == rows["label"]).mean())
        assert (tmp_path / "run" / "roc.png").stat().st_size > 1000

    def test_true_labels_are_learned_and_shuffled_ones_are_not(self, tmp_path, no_figures):
        """If anything of a test slide leaked into training, labels without meaning would be predicted too."""
        csv_path, features = write_cohort(
            tmp_path / "cohort", patients_per_class=12, slides_per_patient=2, patches=(20, 30), signal=4
        )
        table = pd.read_csv(csv_path, dtype=str)
        labels = table.groupby("case_id")["label"].first()

        def pooled_auc(name: str, meaning: pd.Series) -> float:
            path = tmp_path / f"{name}.csv"
            table.assign(label=table["case_id"].map(meaning)).to_csv(path, index=False)
            data = MILDataset(path, features, chunk_size=30)
            return make_cv(data, tmp_path / name, lambda: small("meanPool"), epochs=8).run()["pooled"]["auc"]

        shuffled = [
            pooled_auc(f"shuffled_{seed}", pd.Series(np.random.default_rng(seed).permutation(labels), labels.index))
            for seed in range(3)
        ]
        assert pooled_auc("true", labels) > 0.9
        assert abs(np.mean(shuffled) - 0.5) < 0.15
        assert max(shuffled) < 0.8
