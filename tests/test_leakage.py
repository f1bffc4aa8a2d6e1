"""Nothing of a test fold reaches a training or a choice, and what would leak through a naive split does not here."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from MILS import build_mil
from tests.cohort import synthetic_bag, write_cohort
from tests.small import classification_metrics
from utils.bags.store import write_bag
from utils.core.files import read_json, write_text
from utils.learning import jobs, protocol, run_figures
from utils.learning.splits import repeated_splits
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation

SHUFFLES = 10


@pytest.fixture(autouse=True)
def _quick_results(monkeypatch):
    monkeypatch.setattr(run_figures, "draw_figures", lambda *_: None)


def run(dataset: MILDataset, folder: Path, mil: str = "meanPool", hidden_dim: int = 8, **changes) -> dict:
    factory = partial(build_mil, mil, input_dim=dataset.input_dim, num_classes=2, hidden_dim=hidden_dim)
    settings = {"n_outer": 3, "n_inner": 2, "batch_size": 8, "epochs": 4, "lr": 1e-2, "device": "cpu", "seed": 5}
    return NestedCrossValidation(factory, dataset, dataset.class_names, folder, **(settings | changes)).run()


def relabelled(csv: Path, target: Path, label_of: pd.Series) -> Path:
    table = pd.read_csv(csv, dtype=str)
    table.assign(label=table["case_id"].map(label_of)).to_csv(target, index=False)
    return target


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    figure = classification_metrics(labels, np.stack([1 - scores, scores], axis=1))["auc"]
    assert figure is not None
    return figure


def shuffled_runs(folder: Path, shuffles: int) -> tuple[list[float], np.ndarray]:
    """Pooled AUCs of whole cross-validations, grid and early stopping included, of labels shuffled by patient; and the
    `(permutations,)` means of as many AUCs that permuting the labels of the same out-of-fold predictions gives.
    """
    csv, features = write_cohort(
        folder / "cohort", patients_per_class=15, slides_per_patient=2, patches=(4, 8), dim=8, signal=0
    )
    labels = pd.read_csv(csv, dtype=str).groupby("case_id")["label"].first()
    rng = np.random.default_rng(0)
    found, permuted = [], []
    for shuffle in range(shuffles):
        meaning = pd.Series(rng.permutation(labels), labels.index)
        data = MILDataset(relabelled(csv, folder / f"{shuffle}.csv", meaning), features)
        results = run(data, folder / f"run_{shuffle}", epochs=10, grid="lr=1e-2,3e-2 dropout=0,0.25")
        found.append(results["pooled"]["auc"])
        rows = pd.read_csv(folder / f"run_{shuffle}" / "predictions.csv")
        _, patient = np.unique(rows["case_id"], return_inverse=True)
        of_patient = (rows.groupby("case_id")["label"].first() == data.class_names[1]).to_numpy().astype(int)
        draws = [rng.permutation(of_patient)[patient] for _ in range(400)]
        permuted.append([auc(draw, rows["prob_malignant"].to_numpy()) for draw in draws])
    return found, np.mean(permuted, axis=0)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> tuple[Path, Path]:
    """Twenty-four patients of a slide of a few patches, of which there is little to learn."""
    folder = tmp_path_factory.mktemp("labelled")
    return write_cohort(folder, patients_per_class=12, slides_per_patient=1, patches=(3, 9), signal=0.5)


def leaking(*arguments):
    """Splits whose inner validation is on the outer test slides: what the tests here are there to find."""
    return [
        replace(fold, inner=tuple(replace(inner, val=fold.test) for inner in fold.inner))
        for fold in repeated_splits(*arguments)
    ]


def chosen_in(folder: Path, fold: int) -> dict[str, object]:
    """What is trained and chosen for an outer fold: each epoch of each training, the checkpoint's bytes (setting,
    weights, threshold, temperature), and what it answers for the test slides.
    """
    history, answers = (pd.read_csv(folder / name) for name in ("history.csv", "predictions.csv"))
    answers = answers[answers["fold"] == fold]
    columns = [name for name in answers if name.startswith(("wsi_id", "prob_", "calibrated_", "predicted"))]
    return {
        "history": history[history["fold"] == fold].to_csv(),
        "checkpoint": (folder / f"fold_{fold}_best.pth").read_bytes(),
        "answers": answers[columns].to_csv(),
    }


class TestTurnedLabels:
    """The labels of an outer fold's test slides turned round: the quick form of what shuffled labels show."""

    def turned(self, labelled, folder: Path, monkeypatch, splits=repeated_splits, **changes) -> None:
        """Train twice on the same splits, into `before` and `after`, the second time with the test slides of the first
        fold turned round.
        """
        csv, features = labelled
        folds: list = []

        def deal(*arguments):
            folds.extend(() if folds else splits(*arguments))
            return folds

        monkeypatch.setattr(protocol, "repeated_splits", deal)
        settings = {"grid": "lr=1e-3,3e-2", "n_outer": 2} | changes
        run(MILDataset(csv, features), folder / "before", **settings)
        table = pd.read_csv(csv, dtype=str)
        is_test = table["wsi_id"].isin(read_json(folder / "before" / "splits.json")["folds"][0]["test"])
        other = table["label"].map({"benign": "malignant", "malignant": "benign"})
        table.assign(label=table["label"].where(~is_test, other)).to_csv(folder / "turned.csv", index=False)
        run(MILDataset(folder / "turned.csv", features), folder / "after", **settings)

    @pytest.mark.parametrize("final", ["best", "ensemble", "refit"])
    def test_they_change_nothing_that_is_trained_or_chosen_without_them(self, final, labelled, tmp_path, monkeypatch):
        self.turned(labelled, tmp_path, monkeypatch, final=final)
        before, after = (chosen_in(tmp_path / name, 1) for name in ("before", "after"))
        assert before == after
        # In a fold that trains on those slides it does.
        before, after = (chosen_in(tmp_path / name, 2) for name in ("before", "after"))
        assert not [name for name in before if before[name] == after[name]]

    def test_a_choice_by_them_would_show(self, labelled, tmp_path, monkeypatch):
        self.turned(labelled, tmp_path, monkeypatch, leaking)
        before, after = (chosen_in(tmp_path / name, 1) for name in ("before", "after"))
        assert not [name for name in before if before[name] == after[name]]


@pytest.mark.slow
class TestShuffledLabels:
    """Two-sided, so that a leak shows, and so does the bias of a broken split."""

    def test_labels_without_meaning_are_predicted_as_by_chance(self, tmp_path):
        found, chance = shuffled_runs(tmp_path, SHUFFLES)
        assert abs(np.mean(chance) - 0.5) < 0.01
        low, high = np.percentile(chance, [0.5, 99.5])
        assert low < np.mean(found) < high

    def test_a_choice_by_the_test_slides_would_show(self, tmp_path, monkeypatch):
        """The same with inner validation on the outer test slides."""
        monkeypatch.setattr(protocol, "repeated_splits", leaking)
        found, chance = shuffled_runs(tmp_path, SHUFFLES)
        assert np.mean(found) > np.percentile(chance, 99.5)


@pytest.fixture(scope="module")
def signed_cohort(tmp_path_factory) -> tuple[Path, Path]:
    """Slides whose features say whose they are, and nothing else of their class."""
    folder = tmp_path_factory.mktemp("signature")
    rng = np.random.default_rng(1)
    lines = ["case_id,wsi_id,label"]
    for patient in range(24):
        signature = rng.standard_normal(32)
        for slide in range(4):
            name = f"P{patient:02d}-S{slide}"
            features = (signature + 0.3 * rng.standard_normal((6, 32))).astype("float16")
            write_bag(folder / "features" / f"{name}.h5", synthetic_bag(name, features, rng))
            lines.append(f"P{patient:02d},{name},{'malignant' if patient % 2 else 'benign'}")
    write_text(folder / "labels.csv", "\n".join(lines) + "\n")
    return folder / "labels.csv", folder / "features"


class TestPatientSignature:
    @pytest.mark.parametrize("seeds", [1, pytest.param(5, marks=pytest.mark.slow)])
    def test_folds_by_patient_are_at_chance_where_folds_by_slide_soar(self, seeds, signed_cohort, tmp_path):
        csv, features = signed_cohort
        table = pd.read_csv(csv, dtype=str)
        table.assign(case_id=table["wsi_id"]).to_csv(tmp_path / "naive.csv", index=False)
        settings = {"epochs": 10, "least_steps": 1, "keep": "best", "hidden_dim": 64, "lr": 3e-2, "final": "ensemble"}
        naive = run(MILDataset(tmp_path / "naive.csv", features), tmp_path / "naive", **settings)
        by_patient = [
            run(MILDataset(csv, features), tmp_path / f"{seed}", **(settings | {"seed": seed})) for seed in range(seeds)
        ]
        assert naive["pooled"]["auc"] > 0.95
        aucs = [results["pooled"]["auc"] for results in by_patient]
        # 24 patients: the permutation distribution of one AUC has a standard deviation of 0.12.
        assert abs(np.mean(aucs) - 0.5) < 0.34 / np.sqrt(seeds)
        assert max(aucs) < 0.85


class TestInstrumented:
    @pytest.mark.parametrize("final", ["best", "ensemble", "refit"])
    def test_no_call_that_trains_or_chooses_ever_sees_a_test_slide(self, final, tmp_path, monkeypatch):
        """Every slide that is read while a fold trains, searches its grid, fits its threshold or refits is one of its
        own training slides; its test slides are read when all of that is over.
        """
        csv, features = write_cohort(tmp_path / "cohort", patches=(3, 9))
        dataset = MILDataset(csv, features)
        trainer, read, done = jobs.Trainer.__call__, MILDataset.features, []
        training_of: list[set[int]] = [set()]

        def watched_trainer(self, unit, send):
            training_of[0] = set(unit.fold.train.tolist())
            assert not training_of[0] & set(unit.fold.test.tolist())
            trainer(self, unit, send)
            training_of[0] = set()
            done.append(unit.name)

        def watched_read(self, slide):
            if training_of[0]:
                assert slide in training_of[0]
            else:
                tested.append(slide)
            return read(self, slide)

        tested: list[int] = []
        monkeypatch.setattr(jobs.Trainer, "__call__", watched_trainer)
        monkeypatch.setattr(MILDataset, "features", watched_read)
        run(dataset, tmp_path / "run", "LiteMIL", grid="lr=1e-2 num_heads=2,4", epochs=2, final=final)
        assert len(done) == 3 * 2 * 2 + (3 if final == "refit" else 0)
        assert sorted(tested) == list(range(len(dataset)))
        splits = read_json(tmp_path / "run" / "splits.json")["folds"]
        assert [dataset.rows[slide].wsi_id for slide in tested] == [one for fold in splits for one in fold["test"]]
