"""Runs of small models on a small cohort, and what stands for their training.

Import with `from tests.learning.runs import ...`.
"""

import copy
import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from MILS import build_mil
from utils.learning import cross_validation, fold_tester, jobs
from utils.learning.settings import Training
from utils.learning.training import Fitted
from utils.mil_dataset import MILDataset
from utils.nested_cv import NestedCrossValidation
from utils.prediction.checkpoint import load_checkpoint
from utils.prediction.forward_pass import SlideFeed
from utils.tasks.metrics import METRICS

N_OUTER, N_INNER, EPOCHS = 3, 2, 2
TRAININGS = N_OUTER * N_INNER
CHUNKED = SlideFeed(20, "mean")
TRAIN, VAL = np.arange(16), np.arange(16, 24)


def small(name: str = "LiteMIL", input_dim: int = 16, num_classes: int = 2, **options):
    heads = {"num_heads": 2} if name in ("LiteMIL", "TransMIL") else {}
    return build_mil(name, input_dim=input_dim, num_classes=num_classes, **({"hidden_dim": 16} | heads | options))


def make_cv(dataset, output_dir, model_factory: Callable = small, **changes) -> NestedCrossValidation:
    settings = {
        "n_outer": N_OUTER, "n_inner": N_INNER, "batch_size": 8, "epochs": EPOCHS, "device": "cpu", "lr": 1e-2,
        "seed": 5, "dataset_name": "demo", "final": "best",
    }  # fmt: skip
    return NestedCrossValidation(model_factory, dataset, dataset.class_names, output_dir, **(settings | changes))


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


def strict_json(path: Path):
    def refuse(constant):
        raise AssertionError(f"{path}: {constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


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


def is_state(path: Path, state: dict) -> bool:
    return all(torch.equal(part, state[name]) for name, part in load_checkpoint(path).state_dict.items())


class Interrupted(BaseException):
    """As a Ctrl-C: no handler of ours may take it for an error."""


def leave_unfinished(cv: NestedCrossValidation) -> None:
    """Run until every training is done and nothing but the results is missing."""

    def interrupted(*_):
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_validation, "write_results", interrupted)
        with pytest.raises(Interrupted):
            cv.run()


class Scripted:
    """Stands for `validate`: gives the figures of a script, and keeps the weights it was asked about."""

    def __init__(self, aucs, losses):
        self.script = [{"val_loss": loss, "val_auc": auc} for auc, loss in zip(aucs, losses, strict=True)]
        self.seen = []

    def __call__(self, model, *_):
        self.seen.append(copy.deepcopy(model.state_dict()))
        return self.script[len(self.seen) - 1], np.full((4, 2), len(self.seen) / 10)
