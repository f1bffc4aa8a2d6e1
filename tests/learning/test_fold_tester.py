"""The model that each outer fold tests, and its checkpoint."""

import math

import numpy as np
import pandas as pd
import pytest

from tests.learning.runs import N_OUTER, TRAININGS, assert_same, contents, leave_unfinished, make_cv, small, strict_json
from tests.small import TASK
from utils.bags.spelling import plain_spelling
from utils.core.files import read_json
from utils.learning import jobs
from utils.prediction.checkpoint import id_digests, load_checkpoint
from utils.prediction.forward_pass import SlideFeed, predict_features
from utils.tasks import classification
from utils.tasks.calibration import fitted_scaling


@pytest.mark.parametrize("class_weights", ["balanced", "none"])
def test_calibration_knows_whether_the_loss_was_weighted(class_weights, dataset, tmp_path, monkeypatch, no_figures):
    asked = []

    def remembering(labels, values, is_balanced):
        asked.append(is_balanced)
        return fitted_scaling(labels, values, is_balanced)

    monkeypatch.setattr(classification, "fitted_scaling", remembering)
    make_cv(dataset, tmp_path, class_weights=class_weights, epochs=1).run()
    assert asked == [class_weights == "balanced"] * N_OUTER


class TestOutputs:
    def test_each_folds_model_gives_its_predictions_again(self, finished, dataset):
        for fold in range(1, N_OUTER + 1):
            checkpoint = load_checkpoint(finished.folder / f"fold_{fold}_best.pth")
            model = checkpoint.build()
            for slide, row in enumerate(finished.table()):
                output = predict_features(TASK, model, dataset.features(slide), checkpoint.slide_feed)
                said = [float(row["prob_benign"]), float(row["prob_malignant"])]
                assert (output.probabilities.tolist() == said) is (int(row["fold"]) == fold)

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

    def test_a_model_of_all_slides_is_trained_beside_the_folds(self, dataset, tmp_path, monkeypatch, no_figures):
        refit, calls = jobs.refit, []

        def watched(factory, data, train, settings, **named):
            calls.append((train.tolist(), named["epochs"], settings.lr))
            return refit(factory, data, train, settings, **named)

        monkeypatch.setattr(jobs, "refit", watched)
        settings = {"keep": "best", "least_steps": 0, "epochs": 4, "grid": "lr=1e-3,1e-2"}
        results = make_cv(dataset, tmp_path / "all", final="all", **settings).run()
        usual = make_cv(dataset, tmp_path / "best", final="best", **settings).run()
        assert results["pooled"] == usual["pooled"], "the folds' figures stay"
        selections = [fold["selection"] for fold in results["fold_results"]]
        rates = [selection["setting"]["lr"] for selection in selections]
        lr = max(set(rates), key=rates.count)
        history = pd.read_csv(tmp_path / "all" / "history.csv")
        chosen = pd.DataFrame({"fold": range(1, N_OUTER + 1), "setting": [f"lr={rate}" for rate in rates]})
        kept = history[history["kept"] == 1].merge(chosen[chosen["setting"] == f"lr={lr}"])
        epochs = math.ceil(kept["epoch"].median())
        assert calls == [(list(range(len(dataset))), epochs, lr)]
        checkpoint = load_checkpoint(tmp_path / "all" / "all_slides.pth")
        assert checkpoint.seen["slide"] == id_digests("slide", [row.wsi_id for row in dataset.rows])
        selection = checkpoint.selection
        assert (selection["final"], selection["trained_on"], selection["outer_fold"]) == ("all", "all slides", None)
        assert (selection["epoch"], selection["setting"]) == (epochs, {"lr": lr})
        assert selection["expected"] == results["pooled"] | results["within_folds"]
        thresholds = [fold["threshold"] for fold in results["fold_results"]]
        assert selection["threshold"] == np.median(thresholds)
        output = predict_features(TASK, checkpoint.build(), dataset.features(0), checkpoint.slide_feed)
        assert output.probabilities.sum() == pytest.approx(1)
        assert not (tmp_path / "best" / "all_slides.pth").exists()

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
