"""NestedCrossValidation: inner folds choose the model, outer folds test it once, and a killed run goes on.

cv = NestedCrossValidation(lambda: build_mil("LiteMIL", input_dim=1024, num_classes=2),
                           dataset, dataset.class_names, "outputs/LiteMIL/mine")
results = cv.run()
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from MILS.pooling import BagModel
from utils.core.config import Protocol, Training
from utils.core.errors import ConfigError, TrainingError
from utils.core.files import digest, load_tensors, read_json, save_tensors, write_json, write_text
from utils.core.runtime import derive_seed, log, progress_bar, resolve_device, run_metadata
from utils.learning import figures
from utils.learning.aggregation import SlideFeed, SlideOutput
from utils.learning.checkpoint import Checkpoint, id_digests, save_checkpoint
from utils.learning.metrics import METRICS, auc_is_defined, classification_metrics, mean_and_std
from utils.learning.splits import OuterFold, nested_splits
from utils.learning.statistics import bootstrap_intervals
from utils.learning.training import Fitted, fit, predict_slides, rank
from utils.mil_dataset import MILDataset


@dataclass(frozen=True)
class _FoldResult:
    """An outer fold: the chosen inner model (its number from 1), how it was chosen, what it says of the test slides,
    and the epochs of all inner trainings.
    """

    fold: OuterFold
    inner: int
    monitor: str
    chosen: Fitted
    outputs: list[SlideOutput]
    history: list[dict[str, Any]]


class NestedCrossValidation:
    """Nested, patient-level, stratified cross-validation of one model on one dataset.

    `model_factory` makes a fresh, untrained model at every call. For each outer fold, one model per inner fold is
    trained on the rest and stopped on that inner fold's slides; the one with the best inner validation is tested on
    the outer fold. What is reported is slide-level and out of fold.

    Raises ConfigError for settings out of range, a factory that returns one shared model or models that do not fit the
    dataset, class names that are not the dataset's, or an output folder that holds something else; SplitError when
    there are too few patients.
    """

    def __init__(
        self,
        model_factory: Callable[[], BagModel],
        dataset: MILDataset,
        class_names: Sequence[str],
        output_dir: str | Path,
        n_outer: int = Protocol.n_outer,
        n_inner: int = Protocol.n_inner,
        batch_size: int = Training.batch_size,
        epochs: int = Training.epochs,
        patience: int = Training.patience,
        device: str = Protocol.device,
        use_amp: bool = Training.use_amp,
        *,
        lr: float = Training.lr,
        weight_decay: float = Training.weight_decay,
        seed: int = Protocol.seed,
        dataset_name: str | None = None,
    ) -> None:
        if tuple(class_names) != dataset.class_names:
            raise ConfigError(
                f"class_names {', '.join(class_names)}: the dataset's are {', '.join(dataset.class_names)}; pass those"
            )
        self.model_factory, self.dataset, self.dataset_name = model_factory, dataset, dataset_name
        self.protocol = Protocol(
            n_outer=n_outer, n_inner=n_inner, seed=seed, output_dir=Path(output_dir), device=device
        )
        self.training = Training(
            epochs=epochs, patience=patience, batch_size=batch_size, lr=lr, weight_decay=weight_decay, use_amp=use_amp
        )
        self.output_dir = Path(output_dir).absolute()
        self.device = resolve_device(device)
        self.feed = SlideFeed.of_mode(dataset.mode, dataset.chunk_size, dataset.sequential)
        self.spec = _spec_of(model_factory)
        for name, expected in (("input_dim", dataset.input_dim), ("num_classes", len(dataset.class_names))):
            if self.spec.get(name, expected) != expected:
                raise ConfigError(f"model_factory: its models' {name} is {self.spec[name]}, the dataset's {expected}")

    def run(self) -> dict[str, Any]:
        """Train what is not trained yet, write every result, return the content of `outputs.json`."""
        folds = nested_splits(
            self.dataset.labels,
            self.dataset.groups,
            self.dataset.class_names,
            self.protocol.n_outer,
            self.protocol.n_inner,
            self.protocol.seed,
            self.dataset.group_column or "patient",
        )
        if self._take_output_dir():
            log.info("%s: this run is finished; its results are shown, nothing is trained", self.output_dir)
        else:
            started = time.time()
            write_json(self.output_dir / "splits.json", self._splits_content(folds))
            self._write_results(self._run_folds(folds))
            ended = {"finished": True, "seconds": round(time.time() - started, 1)}
            write_json(self.output_dir / "run.json", self._run_record() | ended)
        self._clear_leftovers()
        return read_json(self.output_dir / "outputs.json")

    @property
    def _resume_dir(self) -> Path:
        return self.output_dir / "resume"

    def _clear_leftovers(self) -> None:
        """Remove what only an unfinished run needs, and the half-written files of killed ones."""
        shutil.rmtree(self._resume_dir, ignore_errors=True)
        for part in self.output_dir.glob(".*.part"):
            part.unlink(missing_ok=True)

    def _run_folds(self, folds: list[OuterFold]) -> list[_FoldResult]:
        total = len(folds) * self.protocol.n_inner * self.training.epochs
        with progress_bar("Training", total, unit="epoch") as bar:
            return [self._run_fold(fold, bar) for fold in folds]

    def _run_fold(self, fold: OuterFold, bar: tqdm) -> _FoldResult:
        monitor = self._monitor(fold)
        fitted = [self._inner_training(fold, number, monitor, bar) for number in range(1, len(fold.inner) + 1)]
        best = max(range(len(fitted)), key=lambda index: rank(fitted[index].validation, monitor))
        model = self.model_factory()
        model.load_state_dict(fitted[best].state_dict)
        outputs = predict_slides(model.to(self.device), self.dataset, fold.test, self.feed)
        history = [
            {"fold": fold.number, "inner": inner, **epoch}
            for inner, training in enumerate(fitted, start=1)
            for epoch in training.history
        ]
        result = _FoldResult(fold, best + 1, monitor, fitted[best], outputs, history)
        save_checkpoint(self.output_dir / f"fold_{fold.number}_best.pth", self._checkpoint(result))
        return result

    def _monitor(self, fold: OuterFold) -> str:
        num_classes = len(self.dataset.class_names)
        if all(auc_is_defined(self.dataset.labels[inner.val], num_classes) for inner in fold.inner):
            return "auc"
        log.info(
            "outer fold %d: an inner fold lacks a class, so the slide loss chooses instead of the AUC", fold.number
        )
        return "loss"

    def _inner_training(self, fold: OuterFold, number: int, monitor: str, bar: tqdm) -> Fitted:
        """One unit of resume: trained once, then read back."""
        path = self._resume_dir / f"outer_{fold.number}_inner_{number}.pt"
        before = bar.n
        fitted = _kept(path)
        if fitted is None:
            name = f"Outer {fold.number}/{self.protocol.n_outer} inner {number}/{len(fold.inner)}"
            bar.set_description(name, refresh=False)
            inner = fold.inner[number - 1]

            def show(validation: dict[str, float | None]) -> None:
                auc = validation["val_auc"]
                bar.set_postfix(val_auc="-" if auc is None else f"{auc:.3f}", refresh=False)
                bar.update()

            fitted = fit(
                self.model_factory, self.dataset, inner.train, inner.val, self.training,
                monitor=monitor, feed=self.feed, device=self.device, on_epoch=show,
                seed=derive_seed(self.protocol.seed, "outer", fold.number, "inner", number),
            )  # fmt: skip
            save_tensors(path, {"state_dict": fitted.state_dict, "epoch": fitted.epoch,
                                "validation": fitted.validation, "history": fitted.history})  # fmt: skip
        bar.update(before + self.training.epochs - bar.n)
        return fitted

    def _write_results(self, results: list[_FoldResult]) -> None:
        # One measure for all folds: where one fold could only use the loss, the loss compares them.
        monitor = "auc" if all(result.monitor == "auc" for result in results) else "loss"
        best = max(results, key=lambda result: rank(result.chosen.validation, monitor))
        save_checkpoint(self.output_dir / "all_folds_best.pth", self._checkpoint(best, all_folds=True))

        predictions = self._predictions(results)
        write_text(self.output_dir / "predictions.csv", predictions.to_csv(index=False, lineterminator="\n"))
        history = pd.DataFrame([epoch for result in results for epoch in result.history])
        write_text(self.output_dir / "history.csv", history.to_csv(index=False, lineterminator="\n"))

        probabilities = predictions[[f"prob_{name}" for name in self.dataset.class_names]].to_numpy()
        write_json(self.output_dir / "outputs.json", self._outputs(results, probabilities))
        names, labels = self.dataset.class_names, self.dataset.labels
        drawn = {
            "roc.png": figures.roc_figure(labels, probabilities, names, predictions["fold"].to_numpy()),
            "confusion_matrix.png": figures.confusion_figure(labels, probabilities, names),
            "learning_curves.png": figures.learning_figure(history),
        }
        for name, figure in drawn.items():
            figures.save_figure(figure, self.output_dir / name)

    def _predictions(self, results: list[_FoldResult]) -> pd.DataFrame:
        """One out-of-fold row per slide, in the label table's order."""
        rows = {}
        names = self.dataset.class_names
        for result in results:
            for slide, output in zip(result.fold.test.tolist(), result.outputs, strict=True):
                row = self.dataset.rows[slide]
                rows[slide] = {
                    "wsi_id": row.wsi_id,
                    "case_id": row.case_id,
                    "label": names[row.label],
                    "predicted": names[int(output.probabilities.argmax())],
                    **{f"prob_{name}": value for name, value in zip(names, output.probabilities.tolist(), strict=True)},
                    "fold": result.fold.number,
                }
        return pd.DataFrame([rows[slide] for slide in range(len(self.dataset))])

    def _outputs(self, results: list[_FoldResult], probabilities: np.ndarray) -> dict[str, Any]:
        fold_results = [self._fold_figures(result) for result in results]
        summary: dict[str, Any] = {
            "model": self.spec,
            "dataset": self.dataset_name,
            "class_names": list(self.dataset.class_names),
            "n_slides": len(self.dataset),
            "n_cases": len(set(self.dataset.cases)),
            "n_folds": len(results),
        }
        for level, names in (("chunk", ("accuracy",)), ("slide", METRICS)):
            for name in names:
                values = [fold[level][name] for fold in fold_results]
                mean, std = mean_and_std(values)
                summary |= {f"{level}_{name}_mean": mean, f"{level}_{name}_std": std}
                summary[f"{level}_{name}_folds"] = sum(value is not None for value in values)
        seed = derive_seed(self.protocol.seed, "bootstrap")
        summary["pooled"] = classification_metrics(self.dataset.labels, probabilities)
        summary["intervals_95"] = bootstrap_intervals(self.dataset.labels, probabilities, self.dataset.cases, seed)
        summary["fold_results"] = fold_results
        return summary

    def _fold_figures(self, result: _FoldResult) -> dict[str, Any]:
        labels = self.dataset.labels[result.fold.test]
        chunk_labels = np.repeat(labels, [len(output.chunk_sizes) for output in result.outputs])
        chunks = np.concatenate([output.chunk_probabilities for output in result.outputs])
        slides = np.stack([output.probabilities for output in result.outputs])
        return {
            "fold": result.fold.number,
            "n_slides": len(labels),
            "chunk": classification_metrics(chunk_labels, chunks),
            "slide": classification_metrics(labels, slides),
            "selection": self._selection(result),
        }

    def _selection(self, result: _FoldResult) -> dict[str, Any]:
        return {
            "chosen_on": "inner validation",
            "monitor": f"slide_{result.monitor}",
            "outer_fold": result.fold.number,
            "inner_fold": result.inner,
            "epoch": result.chosen.epoch,
            **result.chosen.validation,
        }

    def _checkpoint(self, result: _FoldResult, all_folds: bool = False) -> Checkpoint:
        used = result.fold.train
        return Checkpoint(
            model=self.spec,
            state_dict=result.chosen.state_dict,
            class_names=self.dataset.class_names,
            dataset=self.dataset_name,
            feed=self.feed.as_dict(),
            recipe=self.dataset.recipe,
            mpp_range=self.dataset.mpp_range,
            selection=self._selection(result) | {"best_of_all_folds": all_folds},
            seen={
                "slide": id_digests("slide", (self.dataset.rows[slide].wsi_id for slide in used.tolist())),
                "case": id_digests("case", self.dataset.cases[used].tolist()),
            },
        )

    def _splits_content(self, folds: list[OuterFold]) -> dict[str, Any]:
        def ids(slides: np.ndarray) -> list[str]:
            return [self.dataset.rows[slide].wsi_id for slide in slides.tolist()]

        return {
            "seed": self.protocol.seed,
            "folds": [
                {
                    "fold": fold.number,
                    "test": ids(fold.test),
                    "inner": [{"train": ids(inner.train), "val": ids(inner.val)} for inner in fold.inner],
                }
                for fold in folds
            ],
        }

    def _take_output_dir(self) -> bool:
        """Make the output folder this run's: True when it is finished already. Another run's is moved aside."""
        path = self.output_dir / "run.json"
        if path.is_file():
            record = read_json(path)
            if not isinstance(record, dict) or "finished" not in record:
                raise ConfigError(f"{path}: not the record of a training run; give another --output_dir")
            changed = sorted(
                name for name, value in self._identity().items() if record.get("identity", {}).get(name) != value
            )
            if not changed:
                if not record["finished"]:
                    done = len(list(self._resume_dir.glob("*.pt")))
                    log.info("%s: resuming; %d inner trainings are done", self.output_dir, done)
                return record["finished"]
            aside = _next_free(self.output_dir)
            self.output_dir.rename(aside)
            log.warning("%s held another run (%s differs); moved to %s", self.output_dir, ", ".join(changed), aside)
        elif self.output_dir.is_dir() and any(not item.name.startswith(".") for item in self.output_dir.iterdir()):
            raise ConfigError(f"{self.output_dir}: not empty and not a training run; give another --output_dir")
        write_json(path, self._run_record() | {"finished": False})
        return False

    def _identity(self) -> dict[str, Any]:
        """What makes two runs the same: with it unchanged, finished parts are kept."""
        files = [(row.wsi_id, row.case_id, row.label, row.path.stat()) for row in self.dataset.rows]
        slides = "\n".join(
            f"{wsi}\t{case}\t{label}\t{stat.st_size}\t{stat.st_mtime_ns}" for wsi, case, label, stat in files
        )
        return {
            "model": self.spec,
            "training": asdict(self.training),
            "n_outer": self.protocol.n_outer,
            "n_inner": self.protocol.n_inner,
            "seed": self.protocol.seed,
            "feed": self.feed.as_dict(),
            "feat_type": self.dataset.feat_type,
            "class_names": list(self.dataset.class_names),
            "slides": digest(slides),
            "groups": digest(*self.dataset.groups),
        }

    def _run_record(self) -> dict[str, Any]:
        return {"identity": self._identity(), "dataset": self.dataset_name, **run_metadata(self.device)}


def _kept(path: Path) -> Fitted | None:
    """The inner training an earlier run ended; None where there is none, or none that can be read."""
    if not path.is_file():
        return None
    try:
        return Fitted(**load_tensors(path, TrainingError, "resume state"))
    except (TrainingError, TypeError):
        log.warning("%s: damaged resume state; this inner training is done again", path)
        return None


def results_table(results: dict[str, Any]) -> str:
    """The closing table: per fold, their mean and standard deviation, and the pooled figures with their intervals."""
    header = ["", *[name.replace("_", " ") for name in METRICS]]
    rows = [
        [f"fold {fold['fold']}", *[_figure(fold["slide"][name]) for name in METRICS]]
        for fold in results["fold_results"]
    ]
    rows.append(["mean", *[_figure(results[f"slide_{name}_mean"]) for name in METRICS]])
    rows.append(["std", *[_figure(results[f"slide_{name}_std"]) for name in METRICS]])
    rows.append(["pooled", *[_figure(results["pooled"][name]) for name in METRICS]])
    rows.append(["95% CI", *[_interval(results["intervals_95"][name]) for name in METRICS]])
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-4], rule, *lines[-4:]])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(limits: Sequence[float] | None) -> str:
    return "-" if limits is None else f"{limits[0]:.3f}-{limits[1]:.3f}"


def _spec_of(model_factory: Callable[[], BagModel]) -> dict[str, Any]:
    """The spec of the factory's models; refuses a factory whose models share weights (they would carry training from
    fold to fold, into test data) or cannot be rebuilt from a checkpoint.
    """
    first, second = model_factory(), model_factory()
    shared = {parameter.data_ptr() for parameter in first.parameters()} & {p.data_ptr() for p in second.parameters()}
    if first is second or shared:
        raise ConfigError(
            "model_factory returns one shared model; make a new one at every call: lambda: build_mil(...)"
        )
    spec = getattr(first, "spec", None)
    if not isinstance(spec, dict):
        raise ConfigError(f"{type(first).__name__} has no spec to rebuild it by; make it with MILS.register_mil")
    return spec


def _next_free(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return aside
