"""NestedCrossValidation: inner folds choose the model, outer folds test it once, and a killed run goes on.

cv = NestedCrossValidation(functools.partial(build_mil, "LiteMIL", input_dim=1024, num_classes=2),
                           dataset, dataset.class_names, "outputs/LiteMIL/mine")
results = cv.run()
"""

import json
import pickle
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from MILS import ModelError, build_mil
from MILS.bag_model import BagModel
from MILS.ensemble import Ensemble
from utils.bags.dataset import MILDataset
from utils.bags.inventory import read_inventory
from utils.bags.settings import CohortFiles
from utils.core.cluster import Cluster
from utils.core.device import amp_dtype, peak_memory, resolve_device, run_metadata
from utils.core.engine import Engine, Lost, Processes, open_engine, refuse_rerun, threads
from utils.core.errors import ConfigError, EngineError, TrainingError, counted, named
from utils.core.files import appeared, digest, read_json, write_json, write_records
from utils.core.runtime import derive_seed, log, progress, progress_bar, versions
from utils.core.settings import check_names
from utils.evaluation import report
from utils.learning import plan, run_figures
from utils.learning.choice import Choice, choose, mean_validation
from utils.learning.epochs import Epochs
from utils.learning.finished_runs import draw_missing
from utils.learning.fold_results import FoldResult, pooled_predictions
from utils.learning.run_folder import RunFolder
from utils.learning.scale import Standardization
from utils.learning.selection import best_of, grid_settings, rank, read_grid, refit_epochs
from utils.learning.settings import Protocol, Running, Training
from utils.learning.splits import OuterFold, few_patients, given_splits, repeated_splits, unused_split
from utils.learning.threads import THREADS, ThreadChoice, choose_threads
from utils.learning.training import Diverged, Fitted, predict_slides
from utils.learning.units import ModelFactory, Trainer, Unit
from utils.prediction.checkpoint import Checkpoint, id_digests, load_checkpoint, save_checkpoint
from utils.prediction.feeding import SlideFeed

# What the features were, beside the results.
INVENTORY = "features.csv"


class NestedCrossValidation:
    """Nested, patient-level, stratified cross-validation of one model on one dataset.

    `model_factory` makes a fresh, untrained model at every call. For each outer fold, one model per inner fold (and
    setting of the `grid`) is trained on the rest and stopped on that inner fold's slides; the setting with the best
    mean inner validation gives the model that is tested on the outer fold, as `final` says. What is reported is
    slide-level and out of fold.

    Beyond those named, every other field of `Training`, `Protocol`, `Running` (`utils.learning.settings`) and
    `Cluster` is a keyword argument: `lr`, `weight_decay`, `repeats`, `splits`, `grid` (text, or names and values),
    `final`, `monitor`, `seed`, `jobs`, `ray` and so on. With several `jobs`, or on Ray, the factory must be what pickle
    takes: `functools.partial(build_mil, ...)`, not a lambda.

    Raises ConfigError for settings out of range, a factory that returns one shared model or models that do not fit the
    dataset, class names that are not the dataset's, or an output folder that holds something else; SplitError when
    there are too few patients.
    """

    def __init__(
        self,
        model_factory: ModelFactory,
        dataset: MILDataset,
        class_names: Sequence[str],
        output_dir: str | Path,
        n_outer: int = Protocol.n_outer,
        n_inner: int = Protocol.n_inner,
        batch_size: int | Literal["auto"] = Training.batch_size,
        epochs: int = Training.epochs,
        patience: int = Training.patience,
        device: str = Running.device,
        use_amp: bool = Training.use_amp,
        *,
        grid: str | Mapping[str, Sequence[Any]] | None = None,
        dataset_name: str | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(dataset, MILDataset):
            raise ConfigError(f"dataset: expected a MILDataset, found a {type(dataset).__name__}")
        names = CohortFiles(class_names=class_names).class_names or ()  # type: ignore[arg-type]
        if names != dataset.class_names:
            raise ConfigError(
                f"class_names {', '.join(names)}: the dataset's are {', '.join(dataset.class_names)}; pass those"
            )
        settings |= {"n_outer": n_outer, "n_inner": n_inner, "batch_size": batch_size, "epochs": epochs}
        settings |= {"patience": patience, "use_amp": use_amp, "device": str(device), "output_dir": output_dir}
        kinds = Training, Protocol, Running, Cluster
        self.training, self.protocol, self.running, self.cluster = _configs(settings, *kinds)
        self.dataset, self.dataset_name = dataset, dataset_name
        if self.running.output_dir is None:
            raise ConfigError("output_dir None: expected the folder for the results")
        self.output_dir = self.running.output_dir.absolute()
        self.device = resolve_device(self.running.device)
        amp_dtype(self.training.amp_precision, self.device)
        self.spec = _spec_of(model_factory)
        for name, expected in (("input_dim", dataset.input_dim), ("num_classes", len(dataset.task.outputs))):
            if self.spec.get(name, expected) != expected:
                raise ConfigError(f"model_factory: its models' {name} is {self.spec[name]}, the dataset's {expected}")
        grid = read_grid(grid, self.spec["name"]) if isinstance(grid, str) else grid or {}
        self.settings = grid_settings(grid, self.spec["name"])
        self.trainer = Trainer(
            model_factory,
            self.spec,
            tuple(self.settings),
            self.training,
            dataset,
            SlideFeed.of_mode(dataset.mode, dataset.chunk_size, dataset.sequential),
            self.device,
            self.protocol.seed,
            self.output_dir / "resume",
        )
        self._check_settings()

    def run(self) -> dict[str, Any]:
        """Train what is not trained yet, write every result, return the content of `outputs.json`."""
        refuse_rerun()
        folds = self.folds()
        folder = RunFolder(self.output_dir)
        with self._engine() as engine, folder.held():
            begun, standardization = self._begin(folder, folds, engine)
            if begun["finished"]:
                log.info("%s: this run is finished; its results are shown, nothing is trained", self.output_dir)
                draw_missing(self.output_dir, self.running.figure_format)
            else:
                started = time.time()
                self._warn_of_few_patients(folds)
                plan.tell_large_steps(self.trainer, self.units(folds)[0], self._sizes, self.dataset.input_dim)
                write_json(self.output_dir / "splits.json", self._splits_content(folds))
                if not folder.is_new:
                    self._tell_resumed(begun, engine)
                with threads(begun["threads"]):
                    self._write_results(self._run_folds(folds, engine, standardization), standardization)
                    seconds = round(time.time() - started, 1)
                    # On Ray others than this process needed it.
                    memory = None if self.cluster.is_asked_for else peak_memory(self.device)
                    record = self._record(engine) | {name: begun[name] for name in THREADS if name in begun}
                    folder.finish(record | {"seconds": seconds, "peak_memory": memory})
            folder.clear_leftovers()
        return read_json(self.output_dir / "outputs.json")

    def _begin(
        self, folder: RunFolder, folds: list[OuterFold], engine: Engine
    ) -> tuple[dict[str, Any], Standardization]:
        """Take the folder; return its run.json, and in which folds models standardise features."""
        asked, there = self.training.standardize, folder.record()
        known = {} if there is None else there["identity"]
        earlier = self._identity(folds) | {"slides": self._slides_by_time()}
        if asked != "on" and "features" not in known and all(known.get(name) == earlier[name] for name in earlier):
            return folder.take(earlier, dict), Standardization(asked)  # of a version that did not look at features
        before = read_inventory(self.output_dir / INVENTORY)
        records = self.dataset.inventory(before)
        standardization = Standardization.decide(
            asked, folds, np.array([record.rms for record in records]), self.dataset.input_dim
        )
        identity = self._identity(folds) | {
            "slides": digest(*(f"{row.wsi_id}\t{row.case_id}\t{row.label}" for row in self.dataset.rows)),
            "features": digest(*(record.sha256 for record in records)),
            "standardized": list(standardization.folds),
        }
        changed = [one.wsi_id for one in records if one.wsi_id in before and before[one.wsi_id].sha256 != one.sha256]
        details = {"features": f"features of {named(changed)}"} if changed else {}

        def record() -> dict[str, Any]:
            return self._record(engine) | self._chosen_threads(engine, folds).as_dict()

        begun = folder.take(identity, record, details)
        if records != list(read_inventory(self.output_dir / INVENTORY).values()):
            write_records(self.output_dir / INVENTORY, records)
        return begun, standardization

    @property
    def _is_sent_away(self) -> bool:
        """Whether trainings leave this process."""
        return self.running.jobs > 1 or self.cluster.is_asked_for

    def _engine(self) -> AbstractContextManager[Engine]:
        return open_engine(self.cluster, Processes(self.running.jobs), str(self.device))

    def _chosen_threads(self, engine: Engine, folds: Sequence[OuterFold]) -> ThreadChoice:
        """Choose on how many threads each training of a new run computes, and say it."""
        slides, size = folds[0].inner[0].train, self._training_of(1).batch_size
        choice = choose_threads(
            self.trainer.factory(self.settings[0]),
            lambda: next(self.dataset.batches(slides, size, self.protocol.seed)),
            engine.threads,
            self.device,
            may_try=not self.cluster.is_asked_for,
        )
        if engine.threads > 1:
            log.info("%s", choice)
        return choice

    def _tell_resumed(self, begun: Mapping[str, Any], engine: Engine) -> None:
        """Say that a run goes on as it began: what is trained now must fit what is kept."""
        if begun["threads"] != engine.threads:
            log.info("each training goes on with %s, as the run began", counted(begun["threads"], "thread"))
        torch_then = begun["versions"]["torch"]
        if torch_then != versions()["torch"]:
            log.warning("the run was begun with PyTorch %s; its last digits may differ", torch_then)

    def dry_run(self) -> str:
        """What a run would do and take: the folds, and an estimate from a short trial of every setting."""
        folds = self.folds()
        self._warn_of_few_patients(folds)
        units, data = self.units(folds), self.dataset
        head = f"{len(units)} inner trainings of at most {max(unit.epochs for unit in units)} epochs"
        if self.protocol.final == "refit":
            units += [self._longest_refit(units, fold) for fold in folds]
            head += f", {len(folds)} refits"
        sizes = self._sizes
        with self._engine() as engine, threads(self._chosen_threads(engine, folds).threads):
            jobs = engine.jobs
            first = {unit.setting: unit for unit in reversed(units)}
            bar = progress(sorted(first), "Trying each setting", unit="setting", leave=False)
            trials = [plan.trial(self.trainer, first[setting], sizes, data.window) for setting in bar]
        members = len(folds[0].inner) if self.protocol.final == "ensemble" else 1
        in_memory = sum(info.nbytes for info in data.info) if data.is_in_memory else 0
        found = plan.estimate(
            units, trials, sizes, checkpoints=(len(folds) + 1) * members, jobs=jobs, device=self.device,
            packed=in_memory if self._is_sent_away else 0, in_memory=in_memory,
        )  # fmt: skip
        table = plan.splits_table(folds, data, data.cases)
        return f"{table}\n\n{head}\n{found.text(jobs, self.output_dir)}"

    @property
    def _sizes(self) -> np.ndarray:
        """The patches of each slide."""
        return np.array([info.num_instances for info in self.dataset.info])

    def folds(self) -> list[OuterFold]:
        """The outer folds of all repeats, dealt from the seed or read from the `splits` file."""
        data, protocol, unit = self.dataset, self.protocol, self.dataset.group_column or "patient"
        strata = data.task.strata(data.labels)
        if protocol.splits is None:
            if note := unused_split([row.columns for row in data.rows]):
                log.warning(note)
            return repeated_splits(
                strata, data.groups, data.task.strata_names, protocol.n_outer, protocol.n_inner, protocol.repeats,
                protocol.seed, unit,
            )  # fmt: skip
        wsi_ids = [row.wsi_id for row in data.rows]
        folds = given_splits(
            protocol.splits, wsi_ids, strata, data.groups, data.task.strata_names, unit=unit,
            allow_missing="missing" in data.allow,
        )  # fmt: skip
        for name, found in (("n_outer", len(folds)), ("n_inner", len(folds[0].inner))):
            asked = getattr(protocol, name)
            if asked not in (found, getattr(Protocol, name)):
                raise ConfigError(f"--{name} {asked}: {protocol.splits} holds {found}; leave it out")
        unused = len(data) - len(np.unique(np.concatenate([fold.test for fold in folds])))
        if unused:
            log.warning("%s: %d of %d slides are tested by no fold", protocol.splits, unused, len(data))
        return folds

    def _warn_of_few_patients(self, folds: Sequence[OuterFold]) -> None:
        warning = few_patients(folds, self.dataset.labels, self.dataset.cases, self.dataset.class_names)
        if warning:
            log.warning(warning)

    def units(self, folds: Sequence[OuterFold], standardized: Collection[int] = ()) -> list[Unit]:
        """The inner trainings, in their order; in folds of the numbers `standardized` models standardise features."""
        return [
            Unit(fold, setting, inner, self._training_of(setting).epochs, monitor, fold.number in standardized)
            for fold in folds
            for monitor in [self._monitor(fold)]
            for setting in range(1, len(self.settings) + 1)
            for inner in range(1, len(fold.inner) + 1)
        ]

    def _training_of(self, setting: int) -> Training:
        return replace(self.training, **self.settings[setting - 1].training)

    def _run_folds(self, folds: list[OuterFold], engine: Engine, standardization: Standardization) -> list[FoldResult]:
        trainer = self.trainer
        if self._is_sent_away:
            trainer = replace(trainer, dataset=self.dataset.shared(trainer.folder))
            told = counted(engine.jobs, "training"), counted(torch.get_num_threads(), "thread")
            log.info("%s at a time, on %s each", *told)
        units = self.units(folds, standardization.folds)
        self._train(trainer, units, engine)
        choices = [self._choice(fold, [unit for unit in units if unit.fold is fold]) for fold in folds]
        if self.protocol.final == "refit":
            self._train(trainer, [self._refit_unit(choice) for choice in choices], engine)
        return [self._tested(choice, trainer.dataset) for choice in choices]

    def _train(self, trainer: Trainer, units: Sequence[Unit], engine: Engine) -> None:
        """Train those units that are not kept yet, and show it."""
        ended = {unit.name: found for unit in units if (found := trainer.epochs_of_kept(unit)) is not None}
        epochs = Epochs({unit.name: unit.epochs for unit in units}, ended)
        lost: list[str] = []
        name = "Refitting" if units and units[0].inner == 0 else "Training"
        with progress_bar(name, epochs.expected, unit="epoch", initial=epochs.count) as bar:

            def show(unit: Unit, row: dict[str, Any] | Lost | None) -> None:
                steps, told = 0, {}
                if isinstance(row, Lost):
                    if row.for_good:
                        lost.append(f"{unit.name}: {row}")
                    again = f"trained again, {row.left} at a time" if row.left else "trained again"
                    log.warning("%s: %s; it is %s", unit.name, row, "given up" if row.for_good else again)
                    steps = -epochs.restart(unit.name)
                elif row is None:  # it has ended, perhaps before its last epoch
                    epochs.end(unit.name)
                else:
                    epochs.step(unit.name)
                    score = row.get(unit.monitor.replace("slide_", "val_"))
                    steps, told = 1, {unit.monitor: "-" if score is None else f"{score:.3f}"}
                bar.total = epochs.expected
                bar.set_postfix({"trainings": f"{len(epochs.ended)}/{len(units)}"} | told, refresh=False)
                bar.update(steps)

            engine.run(trainer, [unit for unit in units if unit.name not in ended], show)
        if lost:
            others = f" (and {counted(len(lost) - 1, 'other training')})" if lost[1:] else ""
            remedy = "give the same again with fewer --actors"
            if not self.cluster.is_asked_for:  # then it was the only one in the end
                less = "--batch_size, --chunk_size or --hidden_dim"
                if self.dataset.largest_chunk is None:
                    less = "--batch_size or --hidden_dim, or --mode chunked"
                remedy = f"it needs more memory, or a smaller {less}"
            raise EngineError(f"{lost[0]}{others}; {remedy} (what is finished is kept)")

    def _monitor(self, fold: OuterFold) -> str:
        data, monitor = self.dataset, self.protocol.monitor
        metric = monitor.removeprefix("slide_")
        reasons = [data.task.why_undefined(metric, data.labels[inner.val]) for inner in fold.inner]
        reason = next(filter(None, reasons), "")
        if not reason:
            return monitor
        log.info(
            "outer fold %d: an inner fold %s, so the slide loss chooses instead of the %s", fold.number, reason,
            metric.upper(),
        )  # fmt: skip
        return "slide_loss"

    def _choice(self, fold: OuterFold, units: Sequence[Unit]) -> Choice:
        trained: list[list[Fitted | Diverged]] = [[] for _ in self.settings]
        history = []
        for unit in units:
            fitted = self._kept(unit)
            trained[unit.setting - 1].append(fitted)
            history += self._history(unit, fitted)
        return choose(self.dataset.task, fold, units[0].monitor, self.settings, trained, self.dataset.labels, history)

    def _refit_unit(self, choice: Choice) -> Unit:
        epochs = refit_epochs([fitted.epoch for fitted in choice.fitted])
        standardizes = "feature_mean" in choice.fitted[0].state_dict
        return Unit(choice.fold, choice.setting, 0, epochs, choice.monitor, standardizes)

    def _longest_refit(self, units: Sequence[Unit], fold: OuterFold) -> Unit:
        """The refit of the setting with the most epochs."""
        longest = max(units, key=lambda unit: unit.epochs)
        return replace(longest, fold=fold, inner=0)

    def _kept(self, unit: Unit) -> Fitted | Diverged:
        if self.cluster.is_asked_for:
            appeared(self.trainer.path(unit))
        fitted = self.trainer.kept(unit)
        if fitted is None:
            raise TrainingError(f"{self.trainer.path(unit)}: was removed or damaged meanwhile; give the command again")
        return fitted

    def _history(self, unit: Unit, fitted: Fitted | Diverged) -> list[dict[str, Any]]:
        if isinstance(fitted, Diverged):
            return []
        head = {"fold": unit.fold.number, "setting": str(self.settings[unit.setting - 1]), "inner": unit.inner}
        return [head | row for row in fitted.history]

    def _tested(self, choice: Choice, dataset: MILDataset) -> FoldResult:
        """Test the fold's model, as `final` makes it, on its test slides, and keep it."""
        final, history = self.protocol.final, choice.history
        best = choice.fitted[choice.best]
        record = {
            "chosen_on": "inner validation",
            "monitor": choice.monitor,
            "final": final,
            "outer_fold": choice.fold.number,
            "setting": self.settings[choice.setting - 1].values,
            "inner_fold": choice.best + 1 if final == "best" else None,
            "epoch": best.epoch,
            **best.validation,
        }
        states = [best.state_dict]
        if final == "ensemble":
            states = [fitted.state_dict for fitted in choice.fitted]
            record |= {"epoch": None, "epochs": [fitted.epoch for fitted in choice.fitted]}
        if final == "refit":
            unit = self._refit_unit(choice)
            refitted = self._kept(unit)
            assert isinstance(refitted, Fitted)  # noqa: S101 - for the type checker: one that diverges ends the run
            states, history = [refitted.state_dict], history + self._history(unit, refitted)
            record |= {"epoch": refitted.epoch}
        if final != "best":
            record |= mean_validation(choice.fitted)
        model = self._model(choice.setting, states)
        outputs = predict_slides(model.to(self.device), dataset, choice.fold.test, self.trainer.feed)
        threshold, temperature = (choice.fitted_to_values[name] for name in ("threshold", "temperature"))
        record |= {"threshold": threshold, "settings": choice.scores}
        result = FoldResult(dataset.task, choice.fold, outputs, threshold, temperature, record, history)
        self._save(model.cpu(), result, self.output_dir / f"fold_{choice.fold.number}_best.pth")
        return result

    def _model(self, setting: int, states: Sequence[Mapping[str, torch.Tensor]]) -> BagModel:
        models = [self.trainer.factory(self.settings[setting - 1])() for _ in states]
        for model, state in zip(models, states, strict=True):
            model.load_state_dict(state)
        return models[0] if len(models) == 1 else Ensemble(models)

    def _save(self, model: BagModel, result: FoldResult, path: Path) -> None:
        data, used = self.dataset, result.fold.train
        one = model.models[0] if isinstance(model, Ensemble) else model
        save_checkpoint(
            path,
            Checkpoint(
                model=one.spec,
                state_dict=model.state_dict(),
                class_names=data.class_names,
                dataset=self.dataset_name,
                feed=self.trainer.feed.as_dict(),
                recipe=data.recipe,
                mpp_range=data.mpp_range,
                selection=result.selection | {"best_of_all_folds": False},
                temperature=result.temperature,
                seen={
                    "slide": id_digests("slide", (data.rows[slide].wsi_id for slide in used.tolist())),
                    "case": id_digests("case", data.cases[used].tolist()),
                },
            ),
        )

    def _write_results(self, folds: list[FoldResult], standardization: Standardization) -> None:
        data, seed = self.dataset, self.protocol.seed
        self._save_best(folds)
        predictions = pooled_predictions(folds, data, derive_seed(seed, "bootstrap"))
        report.write_table(self.output_dir / "predictions.csv", predictions.table())
        report.write_table(self.output_dir / "gallery.csv", report.gallery_table(predictions))
        history = pd.DataFrame([row for fold in folds for row in fold.history])
        report.write_table(self.output_dir / "history.csv", history)
        monitors = {fold.fold.number: fold.selection["monitor"] for fold in folds}
        run_figures.draw_figures(self.output_dir, predictions, history, monitors, self.running.figure_format)
        head = {"model": self.spec, "dataset": self.dataset_name, "standardize": standardization.as_dict()}
        figures = [fold.figures(data) for fold in folds]
        content = head | report.outputs_content(predictions, figures, data.patients_from)
        write_json(self.output_dir / "outputs.json", content)

    def _save_best(self, folds: list[FoldResult]) -> None:
        """The model of the fold that did best on inner validation; the tests take no part."""
        # One measure for all folds: where one fold could only use the loss, the loss compares them.
        monitors = {fold.selection["monitor"] for fold in folds}
        monitor = monitors.pop() if len(monitors) == 1 else "slide_loss"
        best = folds[best_of([rank(fold.selection, monitor) for fold in folds])]
        checkpoint = load_checkpoint(self.output_dir / f"fold_{best.fold.number}_best.pth")
        selection = checkpoint.selection | {"best_of_all_folds": True}
        save_checkpoint(self.output_dir / "all_folds_best.pth", replace(checkpoint, selection=selection))

    def _splits_content(self, folds: list[OuterFold]) -> dict[str, Any]:
        def ids(slides: np.ndarray) -> list[str]:
            return [self.dataset.rows[slide].wsi_id for slide in slides.tolist()]

        return {
            "seed": self.protocol.seed,
            "folds": [
                {
                    "fold": fold.number,
                    "repeat": fold.repeat,
                    "test": ids(fold.test),
                    "inner": [{"train": ids(inner.train), "val": ids(inner.val)} for inner in fold.inner],
                }
                for fold in folds
            ],
        }

    def _identity(self, folds: list[OuterFold]) -> dict[str, Any]:
        """What makes two runs the same, the slides aside: with it unchanged, finished parts are kept."""
        protocol = {name: value for name, value in asdict(self.protocol).items() if name != "grid"}
        training = {name: value for name, value in asdict(self.training).items() if name != "standardize"}
        given = json.dumps(self._splits_content(folds)) if self.protocol.splits else None
        return {
            "model": self.spec,
            "training": training,
            **protocol,
            "splits": given and digest(given),
            "grid": [str(setting) for setting in self.settings],
            "feed": self.trainer.feed.as_dict(),
            "device": self.device.type,
            "feat_type": self.dataset.feat_type,
            "class_names": list(self.dataset.class_names),
            "groups": digest(*self.dataset.groups),
        }

    def _slides_by_time(self) -> str:
        """Return the digest of ids, labels, file sizes and times, by which earlier versions knew the slides."""
        files = [(row, row.path.stat()) for row in self.dataset.rows]
        lines = [(row.wsi_id, row.case_id, row.label, stat.st_size, stat.st_mtime_ns) for row, stat in files]
        return digest("\n".join("\t".join(map(str, line)) for line in lines))

    def _record(self, engine: Engine) -> dict[str, Any]:
        # Where `predict.py --out_of_fold` finds the slides again.
        features = str(self.dataset.features_dir.resolve())
        return {
            "dataset": self.dataset_name, "features_dir": features, "jobs": engine.jobs, **run_metadata(self.device)
        }  # fmt: skip

    def _check_settings(self) -> None:
        """Try every setting, and whether the work can be sent to other processes, before anything is begun."""
        for number, setting in enumerate(self.settings, start=1):
            self._training_of(number)
            try:
                self.trainer.factory(setting)()
            except ModelError as error:
                raise ConfigError(f"--grid {setting}: {error}") from error
        if self._is_sent_away:
            try:
                pickle.dumps(self.trainer.model_factory)
            except (pickle.PicklingError, AttributeError, TypeError) as failure:
                raise ConfigError(
                    f"model_factory cannot be sent to other processes ({failure}); make it with "
                    "functools.partial(build_mil, ...)"
                ) from failure


def _configs(settings: Mapping[str, Any], *kinds: type) -> list[Any]:
    """The settings as config classes, each with the fields that are its own."""
    names = [[part.name for part in fields(kind)] for kind in kinds]
    check_names("NestedCrossValidation", settings, [name for known in names for name in known])
    return [
        kind(**{name: value for name, value in settings.items() if name in known})
        for kind, known in zip(kinds, names, strict=True)
    ]


def _spec_of(model_factory: ModelFactory) -> dict[str, Any]:
    """The spec of the factory's models; refuses a factory whose models share weights (they would carry training from
    fold to fold, into test data) or cannot be rebuilt from a checkpoint.
    """
    if not callable(model_factory):
        raise ConfigError(f"model_factory {model_factory!r}: expected a function that makes a model (build_mil)")
    if isinstance(model_factory, torch.nn.Module):
        raise ConfigError(
            f"model_factory: expected a function that makes a model, found a {type(model_factory).__name__}; each "
            "training needs a fresh one: give functools.partial(build_mil, ...)"
        )
    first, second = model_factory(), model_factory()
    shared = {parameter.data_ptr() for parameter in first.parameters()} & {p.data_ptr() for p in second.parameters()}
    if first is second or shared:
        raise ConfigError(
            "model_factory returns one shared model; make a new one at every call: lambda: build_mil(...)"
        )
    spec = getattr(first, "spec", None)
    if not isinstance(spec, dict):
        raise ConfigError(f"{type(first).__name__} has no spec to rebuild it by; make it with MILS.register_mil")
    _check_rebuilt(first, spec)
    return spec


def _check_rebuilt(model: torch.nn.Module, spec: Mapping[str, Any]) -> None:
    """Raise ConfigError unless `build_mil` makes the same model of its spec, as a checkpoint is loaded."""
    name = type(model).__name__
    try:
        rebuilt = build_mil(**spec)
    except (ModelError, TypeError) as error:
        raise ConfigError(
            f"model_factory: a checkpoint of {name} could not be loaded ({error}); decorate the class with "
            "MILS.register_mil, and hand every hyperparameter to super().__init__"
        ) from error
    if type(rebuilt) is not type(model):
        raise ConfigError(f"model_factory: {name} is the name of another model; rename the class, and register it")
    own, again = ({key: value.shape for key, value in one.state_dict().items()} for one in (model, rebuilt))
    if own != again:
        unlike = next(key for key in own | again if own.get(key) != again.get(key))
        raise ConfigError(
            f"model_factory: the spec of {name} makes another model (they differ in {unlike}); hand every "
            "hyperparameter to super().__init__"
        )
