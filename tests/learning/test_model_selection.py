"""Inner validation chooses the setting and the model of each outer fold."""

import re

import numpy as np
import pandas as pd
import pytest

from MILS.ensemble import members_of
from tests.learning.runs import (
    N_OUTER,
    TRAININGS,
    assert_same,
    contents,
    is_state,
    leave_unfinished,
    make_cv,
    strict_json,
)
from utils.core.errors import ConfigError, DivergedError, TrainingError
from utils.evaluation.closing_table import closing_text
from utils.learning import jobs
from utils.prediction.checkpoint import load_checkpoint
from utils.prediction.forward_pass import predict_values
from utils.tasks.metrics import decision_metrics
from utils.tasks.operating_point import OperatingPoint


class TestOutputs:
    def test_the_chosen_epoch_is_the_best_of_its_folds_history(self, finished):
        history = pd.read_csv(finished.folder / "history.csv")
        for result in finished.results["fold_results"]:
            chosen, rows = result["selection"], history[history["fold"] == result["fold"]]
            order = rows.sort_values(["val_auc", "val_loss", "inner", "epoch"], ascending=[False, True, True, True])
            best = order.iloc[0]
            assert (chosen["inner_fold"], chosen["epoch"]) == (best["inner"], best["epoch"])
            assert (chosen["val_auc"], chosen["val_loss"]) == (best["val_auc"], best["val_loss"])
            assert (chosen["chosen_on"], chosen["monitor"]) == ("inner validation", "slide_auc")


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


class TestMonitor:
    @pytest.mark.parametrize("monitor", ["slide_auc", "slide_loss", "slide_balanced_accuracy", "slide_f1_macro"])
    def test_decides_between_the_inner_models(self, monitor, dataset, tmp_path, unfitted):
        name = monitor.replace("slide_", "val_")
        better = 0.1 if monitor == "slide_loss" else 0.9
        unfitted.script = [{"val_loss": 0.5}, {"val_loss": 0.5, name: better}] * 3
        results = make_cv(dataset, tmp_path / "run", monitor=monitor).run()
        assert [fold["selection"]["inner_fold"] for fold in results["fold_results"]] == [2, 2, 2]
        assert {fold["selection"]["monitor"] for fold in results["fold_results"]} == {monitor}


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
            assert fold["threshold"] == fold["selection"]["threshold"] == OperatingPoint().threshold(labels, scores)
            mine = rows["fold"] == fold["fold"]
            at_threshold[mine] = rows.loc[mine, "prob_malignant"] >= fold["threshold"]
            expected = decision_metrics(dataset.labels[mine], at_threshold[mine], dataset.class_names)
            assert fold["thresholded"] == expected
        expected = decision_metrics(dataset.labels, at_threshold, dataset.class_names)
        assert results["pooled_thresholded"] == expected
        assert f"balanced accuracy {expected['balanced_accuracy']:.3f} (" in closing_text(results | {"cases": None})

    @pytest.mark.parametrize("final", ["best", "ensemble"])
    def test_for_a_wanted_sensitivity_is_recorded_and_told(self, final, dataset, tmp_path, no_figures):
        results = make_cv(dataset, tmp_path, operating_point="sensitivity=0.8", final=final).run()
        rows = pd.read_csv(tmp_path / "predictions.csv")
        by_fold = {fold["fold"]: fold["threshold"] for fold in results["fold_results"]}
        is_called = np.empty(len(rows), bool)
        for fold, threshold in by_fold.items():
            checkpoint = load_checkpoint(tmp_path / f"fold_{fold}_best.pth")
            tested = np.flatnonzero(rows["fold"] == fold)
            values = [
                predict_values(checkpoint.task, model, map(dataset.features, tested), checkpoint.slide_feed)
                for model in members_of(checkpoint.build())
            ]
            is_called[tested] = (np.stack(values)[..., 1] >= threshold).mean(axis=0) > 0.5
        sensitivity = is_called[rows["label"] == "malignant"].mean()
        assert results["pooled_thresholded"]["sensitivity_malignant"] == pytest.approx(sensitivity)
        low, high = results["pooled_thresholded_intervals_95"]["sensitivity_malignant"]
        assert low < sensitivity < high or low < high == sensitivity
        sentence = "At the threshold fitted on inner validation for sensitivity=0.8, pooled: sensitivity of malignant "
        assert f"{sentence}{sensitivity:.3f} ({low:.3f}-{high:.3f}; " in closing_text(results | {"cases": None})
        selection = load_checkpoint(tmp_path / "fold_1_best.pth").selection
        assert (selection["operating_point"], selection["threshold"]) == ("sensitivity=0.8", by_fold[1])

    def test_that_too_few_slides_can_place_is_refused_before_training(self, dataset, tmp_path, unfitted):
        message = r"sensitivity=0.95: takes 19 slides of malignant in inner validation, outer fold 1 has 8"
        with pytest.raises(ConfigError, match=message):
            make_cv(dataset, tmp_path / "run", operating_point="sensitivity=0.95").run()
        with pytest.raises(ConfigError, match=r"--operating_point recall=0\.9: expected balanced_accuracy, or"):
            make_cv(dataset, tmp_path / "run", operating_point="recall=0.9")
        assert not (tmp_path / "run").exists()
        assert not unfitted.states
