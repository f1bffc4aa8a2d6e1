"""NestedCrossValidation: what it keeps from the test folds, resumes, takes and refuses."""

import math
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from MILS import build_mil, list_mils
from tests.cohort import write_cohort
from tests.learning.runs import (
    EPOCHS,
    N_INNER,
    N_OUTER,
    TRAININGS,
    Interrupted,
    assert_same,
    contents,
    leave_unfinished,
    make_cv,
    small,
    strict_json,
)
from tests.small import TASK
from utils.bags.dataset import shared
from utils.core.engine import threads
from utils.core.errors import ConfigError, SplitError
from utils.core.files import read_json
from utils.learning import fold_tester, jobs
from utils.learning.settings import PRESETS
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation
from utils.prediction.checkpoint import load_checkpoint
from utils.prediction.forward_pass import SlideFeed, predict_features

SMALL = {"n_outer": 3, "n_inner": 2, "epochs": 2, "lr": 1e-2, "batch_size": 8}
pytestmark = pytest.mark.usefixtures("blank_figures")


class TestOutputs:
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
            "use_amp": True, "warmup_epochs": 5, "final_lr": 1e-6, "clip_norm": 1.0, "least_steps": 400,
            "class_weights": "balanced",
        }  # fmt: skip
        assert record["identity"]["feed"] == SlideFeed(20, "mean").as_dict()

    def test_run_json_names_a_preset_and_what_differs_from_it(self, dataset, tmp_path, unfitted):
        make_cv(dataset, tmp_path / "run", **(PRESETS["paper"] | SMALL), preset="paper").run()
        preset = strict_json(tmp_path / "run" / "run.json")["preset"]
        assert preset == {"name": "paper", "changed": SMALL}
        make_cv(dataset, tmp_path / "other").run()
        assert strict_json(tmp_path / "other" / "run.json")["preset"] is None


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


class TestRefusals:
    @pytest.mark.parametrize("given", [None, ["S1"]])
    def test_a_dataset_that_is_none(self, given, tmp_path):
        with pytest.raises(ConfigError, match=f"dataset: expected a MILDataset, found a {type(given).__name__}"):
            NestedCrossValidation(small, given, ("a", "b"), tmp_path)

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


class TestJobs:
    def test_two_processes_write_the_bytes_of_one(self, finished, cohort, dataset, tmp_path, monkeypatch):
        monkeypatch.setattr("utils.core.engine.threads_each", lambda jobs: 1)
        factory = partial(build_mil, "LiteMIL", input_dim=16, num_classes=2, hidden_dim=16, num_heads=2)
        make_cv(dataset, tmp_path / "run", factory, jobs=2).run()
        assert_same(contents(tmp_path / "run"), contents(finished.folder))
        record = read_json(tmp_path / "run" / "run.json")
        assert (record["jobs"], record["threads"]) == (2, 1)

    def test_a_lambda_cannot_be_sent(self, dataset, tmp_path):
        with pytest.raises(ConfigError, match=r"model_factory cannot be sent.*functools.partial\(build_mil"):
            make_cv(dataset, tmp_path / "run", lambda: small(), jobs=2)

    @pytest.mark.parametrize("cache", ["ram", "off", "folder"])
    def test_processes_share_one_packed_file(self, cache, cohort, tmp_path, aloud):
        data = MILDataset(*cohort, cache=str(tmp_path / "cache") if cache == "folder" else cache)
        data.features(0)
        for_all = shared(data, tmp_path / "resume")
        packed = list((tmp_path / "resume").glob("*.packed"))
        assert len(packed) == (cache == "ram")
        assert (for_all is data) is (cache != "ram")
        assert ("--cache DIR packs them for all" in aloud.text) is (cache == "off")
        assert all(torch.equal(for_all.features(slide), data.features(slide)) for slide in range(len(data)))
        assert not for_all.is_in_memory


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
