"""Test each outer fold's chosen model on its test slides, once, and save it as a checkpoint."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from MILS.bag_model import BagModel
from MILS.ensemble import Ensemble, members_of
from utils.bags.spelling import plain_spelling
from utils.core.device import set_tf32, uses_tf32
from utils.core.errors import TrainingError
from utils.core.files import wait_for_file
from utils.learning.fold_results import FoldResult
from utils.learning.grid import Setting
from utils.learning.jobs import Trainer, TrainingJob
from utils.learning.model_selection import Choice, choose, mean_validation
from utils.learning.protocol import with_setting
from utils.learning.ranking import best_of, rank, refit_epochs
from utils.learning.splits import InnerFold, OuterFold
from utils.learning.training import Diverged, Fitted, predict_slides
from utils.prediction.checkpoint import Checkpoint, id_digests, load_checkpoint, save_checkpoint
from utils.tasks.operating_point import BALANCED
from utils.tasks.records import target_record
from utils.tasks.task import FittedFigures, Task

ALL_SLIDES = "all_slides.pth"


@dataclass(frozen=True)
class FoldTester:
    """Reads the trained jobs, chooses among them and tests the chosen model, as `final` says (see `Protocol`).

    Each tested model is saved in `folder`. `is_remote`: other machines write the trainings. `digests` are those of the
    slides' features, in the table's order; empty if unknown. `keep`: which epoch of each training was kept.
    `operating_point`: what thresholds are fitted for.
    """

    trainer: Trainer
    final: str
    folder: Path
    dataset_name: str | None
    is_remote: bool
    digests: Sequence[str] = ()
    keep: str = "best"
    operating_point: str = BALANCED

    def choice(self, fold: OuterFold, jobs: Sequence[TrainingJob]) -> Choice:
        """Choose among the settings by the inner trainings of a fold."""
        settings, data = self.trainer.settings, self.trainer.dataset
        trained: list[list[Fitted | Diverged]] = [[] for _ in settings]
        history = []
        for job in jobs:
            fitted = self._read(job)
            trained[job.setting - 1].append(fitted)
            history += self._history(job, fitted)
        return choose(data.task, fold, jobs[0].monitor, settings, trained, history, self._fit)

    def _fit(self, setting: Setting, slides: np.ndarray, values: np.ndarray) -> FittedFigures:
        """Return what the task fits to inner validation `slides` of trainings of this setting."""
        data, training = self.trainer.dataset, with_setting(self.trainer.training, setting)
        return data.task.fit_on_validation(
            data.labels[slides], values, data.cases[slides].tolist(), self.operating_point,
            training.class_weights == "balanced",
        )  # fmt: skip

    def refit_job(self, choice: Choice) -> TrainingJob:
        """Return the training of the chosen setting on the whole outer training set."""
        epochs = refit_epochs([fitted.epoch for fitted in choice.fitted])
        standardizes = "feature_mean" in choice.fitted[0].state_dict
        return TrainingJob(choice.fold, choice.setting, 0, epochs, choice.monitor, standardizes)

    def all_slides_job(self, choices: Sequence[Choice], *, standardizes: bool) -> TrainingJob:
        """Return the training on all slides, of the setting that most folds chose, for the median epoch kept there."""
        counts = Counter(choice.setting for choice in choices)
        setting = max(counts, key=lambda setting: (counts[setting], -setting))
        epochs = refit_epochs([fit.epoch for choice in choices if choice.setting == setting for fit in choice.fitted])
        slides = np.arange(len(self.trainer.dataset))
        fold = OuterFold(0, slides[:0], (InnerFold(slides, slides[:0]),))
        return TrainingJob(fold, setting, 0, epochs, choices[0].monitor, standardizes, "last")

    def save_all_slides(self, job: TrainingJob, choices: Sequence[Choice], expected: Mapping[str, Any]) -> None:
        """Save the model trained on all slides. No slide is left to test it or to fit to: `expected` are the figures of
        the cross-validation (`Predictions.reported`); threshold and calibration are the folds' medians.
        """
        trained = self._read(job)
        assert isinstance(trained, Fitted)  # noqa: S101 - for the type checker: if it diverges, the run ends
        fitted = _medians([choice.fitted_to_values for choice in choices])
        selection = {
            "chosen_on": "inner validation",
            "monitor": job.monitor,
            "keep": self.keep,
            "final": "all",
            "trained_on": "all slides",
            "outer_fold": None,
            "setting": self.trainer.settings[job.setting - 1].values,
            "inner_fold": None,
            "epoch": trained.epoch,
            **_decision_figures(self.trainer.dataset.task, fitted),
            "expected": dict(expected),
            "best_of_all_folds": False,
        }
        model = self._model(job.setting, [trained.state_dict])
        task = self.trainer.dataset.fitted_to(job.fold.train).task
        self._save(self.folder / ALL_SLIDES, model, task, job.fold.train, selection, fitted)

    def test(self, choice: Choice) -> FoldResult:
        """Test the fold's model on its test slides, and save it."""
        trainer, data = self.trainer, self.trainer.dataset.fitted_to(choice.fold.train)
        final, best = self.final, choice.fitted[choice.best]
        record = {
            "chosen_on": "inner validation",
            "monitor": choice.monitor,
            "keep": self.keep,
            "final": final,
            "outer_fold": choice.fold.number,
            "setting": trainer.settings[choice.setting - 1].values,
            "inner_fold": choice.best + 1 if final in ("best", "all") else None,
            "epoch": best.epoch,
            **best.validation,
        }
        states, changes, history = self._final_weights(choice)
        record |= changes
        model = self._model(choice.setting, states)
        # The trainings may have run in other processes.
        set_tf32(trainer.device, uses_tf32(trainer.training.amp_precision, trainer.device))
        outputs = predict_slides(model.to(trainer.device), data, choice.fold.test, trainer.feed)
        record |= {**_decision_figures(data.task, choice.fitted_to_values), "settings": choice.scores}
        validated = [fitted.val_probabilities.numpy() for fitted in choice.fitted]
        result = FoldResult(data.task, choice.fold, outputs, choice.fitted_to_values, record, history, validated)
        selection = result.selection | {"best_of_all_folds": False}
        self._save(self._path(result), model.cpu(), data.task, result.fold.train, selection, result.fitted)
        return result

    def save_best(self, results: Sequence[FoldResult]) -> None:
        """Save the model of the fold that did best on inner validation; the test slides play no role."""
        data = self.trainer.dataset
        # All folds are compared by one metric: the loss, if they used several.
        monitors = {result.selection["monitor"] for result in results}
        monitor = monitors.pop() if len(monitors) == 1 else "slide_loss"
        best = results[best_of([rank(data.task, result.selection, monitor) for result in results])]
        checkpoint = load_checkpoint(self._path(best))
        selection = checkpoint.selection | {"best_of_all_folds": True}
        save_checkpoint(self.folder / "all_folds_best.pth", replace(checkpoint, selection=selection))

    def _final_weights(
        self, choice: Choice
    ) -> tuple[list[Mapping[str, torch.Tensor]], dict[str, Any], list[dict[str, Any]]]:
        """Return the weights of the tested model, one set per member, the changes to its record, and the epochs of all
        trainings of the fold.
        """
        if self.final in ("best", "all"):
            return [choice.fitted[choice.best].state_dict], {}, choice.history
        means = mean_validation(choice.fitted)
        if self.final == "ensemble":
            epochs = {"epoch": None, "epochs": [fitted.epoch for fitted in choice.fitted]}
            return [fitted.state_dict for fitted in choice.fitted], epochs | means, choice.history
        job = self.refit_job(choice)
        refitted = self._read(job)
        assert isinstance(refitted, Fitted)  # noqa: S101 - for the type checker: a refit that diverges ends the run
        history = choice.history + self._history(job, refitted)
        return [refitted.state_dict], {"epoch": refitted.epoch} | means, history

    def _read(self, job: TrainingJob) -> Fitted | Diverged:
        if self.is_remote:
            wait_for_file(self.trainer.path(job))
        fitted = self.trainer.saved(job)
        if fitted is None:
            raise TrainingError(f"{self.trainer.path(job)}: was removed or damaged meanwhile; give the command again")
        return fitted

    def _history(self, job: TrainingJob, fitted: Fitted | Diverged) -> list[dict[str, Any]]:
        if isinstance(fitted, Diverged):
            return []
        head = {"fold": job.fold.number, "setting": str(self.trainer.settings[job.setting - 1]), "inner": job.inner}
        return [head | row | {"kept": int(row["epoch"] == fitted.epoch)} for row in fitted.history]

    def _model(self, setting: int, states: Sequence[Mapping[str, torch.Tensor]]) -> BagModel:
        models = [self.trainer.factory(self.trainer.settings[setting - 1])() for _ in states]
        for model, state in zip(models, states, strict=True):
            model.load_state_dict(state)
        return models[0] if len(models) == 1 else Ensemble(models)

    def _path(self, result: FoldResult) -> Path:
        return self.folder / f"fold_{result.fold.number}_best.pth"

    def _save(
        self,
        path: Path,
        model: BagModel,
        task: Task,
        slides: np.ndarray,
        selection: dict[str, Any],
        fitted: FittedFigures,
    ) -> None:
        data = self.trainer.dataset
        save_checkpoint(
            path,
            Checkpoint(
                model=members_of(model)[0].spec,
                state_dict=model.state_dict(),
                class_names=task.outputs,
                target=target_record(task),
                dataset=self.dataset_name,
                feed=self.trainer.feed.as_dict(),
                recipe=data.recipe,
                mpp_range=data.mpp_range,
                selection=selection,
                temperature=fitted.get("temperature"),
                intercepts=fitted.get("intercepts"),
                prior=fitted.get("prior"),
                seen={kind: id_digests(kind, ids) for kind, ids in self._seen(slides.tolist()).items()},
            ),
        )

    def _seen(self, bags: Sequence[int]) -> dict[str, list[str]]:
        """Return what identifies the slides of these bags, by its kind (see `Checkpoint.seen`)."""
        data = self.trainer.dataset
        slides = [slide for bag in bags for slide in data.slides_of[bag]]
        passports = [data.slide_info[slide].passport for slide in slides]
        cases = [data.slide_rows[slide].case_id for slide in slides]
        seen = {
            "slide": [data.slide_rows[slide].wsi_id for slide in slides],
            "case": cases,
            "case_spelling": [plain_spelling(name) for name in cases],
            "slide_hash": [name for passport in passports if passport and (name := passport.slide_hash)],
        }
        return seen | ({"features": [self.digests[slide] for slide in slides]} if self.digests else {})


def _decision_figures(task: Task, fitted: FittedFigures) -> dict[str, Any]:
    """Return what decides, such as a threshold and what it is for, as a checkpoint's selection records it."""
    return {name: fitted[name] for name in task.decision_figures}


def _medians(fitted: Sequence[FittedFigures]) -> dict[str, Any]:
    """Return the median of what was fitted in each fold, a number or a tuple of them; None if a fold lacks it. What is
    no number is the same in all folds.
    """
    medians: dict[str, Any] = {}
    for name in fitted[0]:
        values = [figures[name] for figures in fitted]
        if isinstance(values[0], str):
            medians[name] = values[0]
            continue
        median = None if None in values else np.median(values, axis=0).tolist()
        medians[name] = tuple(median) if isinstance(median, list) else median
    return medians
