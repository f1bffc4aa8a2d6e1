"""NestedCrossValidation: inner folds choose the model, outer folds test it once, and a killed run can be resumed.

cv = NestedCrossValidation(functools.partial(build_mil, "LiteMIL", input_dim=1024, num_classes=2),
                           dataset, dataset.class_names, "outputs/LiteMIL/mine")
results = cv.run()
"""

import pickle
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from MILS import ModelError
from MILS.registry import factory_of
from utils.bags.dataset import MILDataset, shared
from utils.bags.inventory import read_inventory
from utils.bags.settings import CohortFiles
from utils.core.device import amp_dtype, peak_memory, repeatable, resolve_device, run_metadata
from utils.core.engine import Engine, Processes, open_engine, refuse_rerun, threads
from utils.core.errors import ConfigError, first_few, plural
from utils.core.files import read_json, write_json, write_records
from utils.core.ray_settings import Cluster
from utils.core.runtime import derive_seed, log, versions
from utils.core.settings import check_names
from utils.learning import dry_run
from utils.learning.finished_runs import draw_missing
from utils.learning.fold_results import FoldResult, pooled_predictions
from utils.learning.fold_tester import FoldTester
from utils.learning.grid import grid_settings, read_grid
from utils.learning.jobs import Trainer, TrainingJob
from utils.learning.model_factory import ModelFactory, as_training_errors, spec_of, weight_count
from utils.learning.patient_columns import PatientColumns
from utils.learning.protocol import (
    changed_monitors,
    check_operating_point,
    inner_jobs,
    log_kept_epoch,
    operating_point_entry,
    outer_folds,
    splits_content,
    warn_of_folds,
    with_monitor,
    with_setting,
)
from utils.learning.results import write_results
from utils.learning.run_folder import RunFolder
from utils.learning.run_identity import settings_identity, slides_by_time, slides_identity
from utils.learning.scheduler import train_jobs
from utils.learning.settings import Analyses, Preset, Protocol, Running, Training, preset_record
from utils.learning.splits import OuterFold
from utils.learning.standardization import Standardization
from utils.learning.threads import THREADS, ThreadChoice, choose_threads
from utils.prediction.forward_pass import SlideFeed

# The digests of the features, beside the results.
INVENTORY = "features.csv"


class NestedCrossValidation:
    """Nested, patient-level, stratified cross-validation of one model on one dataset.

    `model_factory` makes a fresh, untrained model at every call. For each outer fold, one model per inner fold (and
    setting of the `grid`) is trained on the other inner folds and validated on that one. The setting with the best
    mean inner validation gives the model that is tested on the outer fold. All figures are out of fold.

    Every field of `Training`, `Protocol`, `Running`, `Analyses` (`utils.learning.settings`) and `Cluster` is a keyword
    argument: `lr`, `weight_decay`, `repeats`, `splits`, `grid` (text, or names and values), `final`, `monitor`, `seed`,
    `jobs`, `ray` and so on. With several `jobs`, or on Ray, the factory must be picklable:
    `functools.partial(build_mil, ...)`, not a lambda. `preset` names for run.json the one of `settings.PRESETS` that
    the settings are from.

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
        preset: str | None = None,
        **settings: Any,
    ) -> None:
        _check_dataset(dataset, class_names)
        settings |= {"n_outer": n_outer, "n_inner": n_inner, "batch_size": batch_size, "epochs": epochs}
        settings |= {"patience": patience, "use_amp": use_amp, "device": str(device), "output_dir": output_dir}
        kinds = Training, Protocol, Running, Cluster, Analyses
        self.training, self.protocol, self.running, self.cluster, analyses = _configs(settings, *kinds)
        self.columns = PatientColumns.read(dataset, analyses)
        self.protocol = with_monitor(self.protocol, dataset.task)
        self.dataset, self.dataset_name = dataset, dataset_name
        self.preset = Preset(preset=preset).preset  # type: ignore[arg-type]
        if self.running.output_dir is None:
            raise ConfigError("output_dir None: expected the folder for the results")
        self.output_dir = self.running.output_dir.absolute()
        self.device = resolve_device(self.running.device)
        amp_dtype(self.training.amp_precision, self.device)
        model_factory = _factory_for(model_factory, dataset)
        self.spec = _spec_for(model_factory, dataset)
        grid = read_grid(grid, self.spec["name"]) if isinstance(grid, str) else grid or {}
        self.settings = grid_settings(grid, self.spec["name"])
        feed = SlideFeed.of_mode(dataset.mode, dataset.chunk_size, dataset.sequential, dataset.unit)
        self.trainer = Trainer(
            model_factory, self.spec, tuple(self.settings), self.training, dataset, feed, self.device,
            self.protocol.seed, self.output_dir / "resume", self.running.deterministic,
        )  # fmt: skip
        _check_trainer(self.trainer, self._uses_workers)

    @as_training_errors()
    def run(self) -> dict[str, Any]:
        """Train what is not trained yet, write all results and return the content of `outputs.json`."""
        refuse_rerun()
        folds = self.folds()
        folder = RunFolder(self.output_dir)
        with self._engine() as engine, folder.locked(), repeatable(self.device, self.running.deterministic):
            begun, standardization, digests = self._begin(folder, folds, engine)
            if begun["finished"]:
                log.info("%s: this run is finished; its results are shown, nothing is trained", self.output_dir)
                draw_missing(self.output_dir, self.running.figure_format)
            else:
                started = time.time()
                warn_of_folds(self.dataset, self.protocol.monitor, folds)
                log_kept_epoch(self.dataset, self.protocol.keep, folds, self.training, self.settings)
                dry_run.log_large_steps(self.trainer, self.jobs(folds)[0])
                content = splits_content(self.dataset, folds, self.protocol.seed)
                write_json(self.output_dir / "splits.json", content)
                if not folder.is_new:
                    _log_resumed(begun, engine)
                with threads(begun["threads"]):
                    results = self._run_folds(folds, engine, standardization, digests)
                    about = {"model": self.spec, "dataset": self.dataset_name, "standardize": standardization.as_dict()}
                    about |= operating_point_entry(self.dataset.task, self.protocol.operating_point)
                    about["parameters"] = self._weight_counts(results)
                    about["changed_monitors"] = changed_monitors(self.dataset, self.protocol.monitor, folds)
                    seed, formats = derive_seed(self.protocol.seed, "bootstrap"), self.running.figure_format
                    write_results(self.output_dir, results, self.dataset, about, seed, formats)
                    seconds = round(time.time() - started, 1)
                    # On Ray, other processes used the memory.
                    memory = None if self.cluster.is_asked_for else peak_memory(self.device)
                    threads_used = {name: begun[name] for name in THREADS if name in begun}
                    folder.finish(self._record(engine) | threads_used | {"seconds": seconds, "peak_memory": memory})
            folder.clear_leftovers()
            self.columns.write(self.output_dir, folds, is_balanced=self.training.class_weights == "balanced")
        return read_json(self.output_dir / "outputs.json")

    def _begin(
        self, folder: RunFolder, folds: list[OuterFold], engine: Engine
    ) -> tuple[dict[str, Any], Standardization, list[str]]:
        """Take the folder. Return its run.json, in which folds models standardise features, and the digests of the
        slides' features, if they are read.
        """
        standardize, record = self.training.standardize, folder.record()
        recorded = {} if record is None else record["identity"]
        identity = settings_identity(self.trainer, self.protocol, folds)
        # An earlier version did not read the features.
        earlier = identity | {"slides": slides_by_time(self.dataset)}
        is_earlier = standardize != "on" and "features" not in recorded
        if is_earlier and all(recorded.get(name) == value for name, value in earlier.items()):
            return folder.take(earlier, dict), Standardization(standardize), []
        before = read_inventory(self.output_dir / INVENTORY)
        records = self.dataset.inventory(before)
        standardization = Standardization.decide(
            standardize, folds, np.array([record.rms for record in records]), self.dataset.input_dim
        )
        identity |= slides_identity(self.dataset, records, standardization.folds)
        changed = [new.wsi_id for new in records if new.wsi_id in before and before[new.wsi_id].sha256 != new.sha256]
        details = {"features": f"features of {first_few(changed)}"} if changed else {}
        if _has_other_code(recorded.get("model"), self.spec):
            details["model"] = f"the code of {self.spec['code']}"

        def new_record() -> dict[str, Any]:
            return self._record(engine) | self._chosen_threads(engine, folds).as_dict()

        begun = folder.take(identity, new_record, details)
        if records != list(read_inventory(self.output_dir / INVENTORY).values()):
            write_records(self.output_dir / INVENTORY, records)
        return begun, standardization, [record.sha256 for record in records]

    @property
    def _uses_workers(self) -> bool:
        """Return whether the trainings run in other processes."""
        return self.running.jobs > 1 or self.cluster.is_asked_for

    def _engine(self) -> AbstractContextManager[Engine]:
        return open_engine(self.cluster, Processes(self.running.jobs), str(self.device))

    def _chosen_threads(self, engine: Engine, folds: Sequence[OuterFold]) -> ThreadChoice:
        """Choose the number of threads of each training of a new run, and log it."""
        slides, size = folds[0].inner[0].train, with_setting(self.training, self.settings[0]).batch_size
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

    @as_training_errors()
    def dry_run(self) -> str:
        """Return the folds, and the time and memory that a run would take, from a short trial of every setting."""
        folds = self.folds()
        warn_of_folds(self.dataset, self.protocol.monitor, folds)
        with self._engine() as engine, threads(self._chosen_threads(engine, folds).threads):
            return dry_run.report(
                self.trainer.on_device(engine.sharers), folds, self.jobs(folds), self.protocol.final, engine.jobs,
                self._uses_workers, self.output_dir,
            )  # fmt: skip

    def folds(self) -> list[OuterFold]:
        """Return the outer folds of all repeats, drawn by the seed or read from the `splits` file."""
        folds = outer_folds(self.dataset, self.protocol)
        check_operating_point(self.dataset, self.protocol.operating_point, folds)
        return folds

    def jobs(self, folds: Sequence[OuterFold], standardized: Collection[int] = ()) -> list[TrainingJob]:
        """Return the inner trainings (see `inner_jobs`)."""
        return inner_jobs(self.dataset, self.protocol, self.training, self.settings, folds, standardized)

    def _run_folds(
        self, folds: list[OuterFold], engine: Engine, standardization: Standardization, digests: Sequence[str]
    ) -> list[FoldResult]:
        trainer = self.trainer
        if self._uses_workers:
            trainer = replace(trainer, dataset=shared(self.dataset, trainer.folder))
            each = plural(torch.get_num_threads(), "thread")
            log.info("%s at a time, on %s each", plural(engine.jobs, "training"), each)
        kept = trainer.on_device(engine.sharers)
        jobs, remedy = self.jobs(folds, standardization.folds), _remedy(self.cluster, self.dataset)
        tester = FoldTester(
            trainer if self._uses_workers else kept, self.protocol.final, self.output_dir, self.dataset_name,
            self.cluster.is_asked_for, digests, jobs[0].keep, self.protocol.operating_point,
        )  # fmt: skip
        train_jobs(kept, jobs, engine, remedy)
        choices = [tester.choice(fold, [job for job in jobs if job.fold is fold]) for fold in folds]
        if self.protocol.final == "refit":
            train_jobs(kept, [tester.refit_job(choice) for choice in choices], engine, remedy)
        results = [tester.test(choice) for choice in choices]
        tester.save_best(results)
        if self.protocol.final == "all":
            job = tester.all_slides_job(choices, standardizes=2 * len(standardization.folds) > len(folds))
            train_jobs(kept, [job], engine, remedy)
            pooled = pooled_predictions(results, self.dataset, derive_seed(self.protocol.seed, "bootstrap"))
            tester.save_all_slides(job, choices, pooled.reported)
        return results

    def _weight_counts(self, results: Sequence[FoldResult]) -> list[int]:
        """Return the number of weights of each fold's model, of one member of an ensemble."""
        chosen = [result.selection["setting"] for result in results]
        settings = [next(each for each in self.settings if each.values == values) for values in chosen]
        return [weight_count(self.trainer.factory(setting)) for setting in settings]

    def _record(self, engine: Engine) -> dict[str, Any]:
        features = str(self.dataset.features_dir.resolve())  # `predict.py --out_of_fold` finds them by it
        preset = self.preset and preset_record(self.preset, asdict(self.training) | asdict(self.protocol))
        about = {"dataset": self.dataset_name, "features_dir": features, "jobs": engine.jobs, "preset": preset}
        return about | run_metadata(self.device)


def _has_other_code(recorded: Any, spec: Mapping[str, Any]) -> bool:
    """Return whether a recorded spec differs from a model's in the digest of other people's code alone."""
    digests = [each.get("digest") for each in (recorded, spec) if isinstance(each, Mapping)]
    return len(set(digests)) == 2 and {**recorded, "digest": ""} == {**spec, "digest": ""}


def _log_resumed(begun: Mapping[str, Any], engine: Engine) -> None:
    """Log the thread count and the PyTorch version that a resumed run began with, if this session's differ."""
    if begun["threads"] != engine.threads:
        log.info("each training goes on with %s, as the run began", plural(begun["threads"], "thread"))
    torch_version = begun["versions"]["torch"]
    if torch_version != versions()["torch"]:
        log.warning("the run was begun with PyTorch %s; its last digits may differ", torch_version)


def _remedy(cluster: Cluster, dataset: MILDataset) -> str:
    """Return the advice for a training whose workers die again and again."""
    if cluster.is_asked_for:
        return "give the same again with fewer --actors"
    # In the end it ran alone, so fewer workers would not help.
    less = "--batch_size, --chunk_size or --hidden_dim"
    if dataset.largest_chunk is None:
        less = "--batch_size or --hidden_dim, or --mode chunked"
    return f"it needs more memory, or a smaller {less}"


def _configs(settings: Mapping[str, Any], *kinds: type) -> list[Any]:
    """Return the settings as config classes, each with its own fields."""
    names_of = {kind: [field.name for field in fields(kind)] for kind in kinds}
    check_names("NestedCrossValidation", settings, [name for names in names_of.values() for name in names])
    return [
        kind(**{name: value for name, value in settings.items() if name in names}) for kind, names in names_of.items()
    ]


def _check_dataset(dataset: Any, class_names: Sequence[str]) -> None:
    if not isinstance(dataset, MILDataset):
        raise ConfigError(f"dataset: expected a MILDataset, found a {type(dataset).__name__}")
    names = CohortFiles(class_names=class_names).class_names or ()  # type: ignore[arg-type]
    if names != dataset.class_names:
        raise ConfigError(
            f"class_names {', '.join(names)}: the dataset's are {', '.join(dataset.class_names)}; pass those"
        )


def _factory_for(model_factory: ModelFactory, dataset: MILDataset) -> ModelFactory:
    """Return a factory of bag models, also for other people's class. Raises ConfigError if it cannot be used."""
    if not callable(model_factory) or isinstance(model_factory, torch.nn.Module):
        return model_factory  # which is refused
    try:
        return factory_of(model_factory, dataset.input_dim, dataset.task.num_logits)
    except ModelError as error:
        raise ConfigError(f"model_factory: {error}") from error


def _spec_for(model_factory: ModelFactory, dataset: MILDataset) -> dict[str, Any]:
    """Return the spec of the factory's models. Raise ConfigError unless they fit the dataset."""
    spec = spec_of(model_factory, has_two_classes=dataset.task.positive_output is not None)
    for name, expected in (("input_dim", dataset.input_dim), ("num_classes", dataset.task.num_logits)):
        if spec.get(name, expected) != expected:
            raise ConfigError(f"model_factory: its models' {name} is {spec[name]}, the dataset's {expected}")
    return spec


def _check_trainer(trainer: Trainer, uses_workers: bool) -> None:
    """Raise ConfigError for a setting that makes no model, or a factory that cannot be sent to the workers."""
    for setting in trainer.settings:
        with_setting(trainer.training, setting)
        try:
            trainer.factory(setting)()
        except ModelError as error:
            raise ConfigError(f"--grid {setting}: {error}") from error
    if uses_workers:
        try:
            pickle.dumps(trainer.model_factory)
        except (pickle.PicklingError, AttributeError, TypeError) as failure:
            raise ConfigError(
                f"model_factory cannot be sent to other processes ({failure}); make it with "
                "functools.partial(build_mil, ...)"
            ) from failure
