"""MILDataset: a cohort's slides, labels and features, fed whole or in chunks.

dataset = MILDataset("labels.csv", "features", class_names=["benign", "malignant"])
features, label = dataset[0]
"""

import copy
import operator
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, SupportsIndex, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.bags import labels
from utils.bags.cases import CaseFeatures, case_info, case_rows
from utils.bags.chunks import (
    Batch,
    Chunk,
    chunks_per_step,
    cut_chunks,
    cuts_on,
    num_chunks,
    shuffled_batches,
    windows,
)
from utils.bags.cohort_features import look_at_files, open_features, share
from utils.bags.device_features import DeviceFeatures, Source
from utils.bags.feature_folder import FeatureFolder
from utils.bags.inventory import FileRecord, take_inventory
from utils.bags.label_table import LabelTable, read_table
from utils.bags.labels import LabelRow
from utils.bags.packed import FileFeatures, MemoryFeatures, packed_path
from utils.bags.settings import CHUNK_SIZE, BatchSize, Cohort, Unit, batch_size_option
from utils.bags.store import Bag, read_bag
from utils.core.cohorts import KNOWN_COHORTS, cohort_classes
from utils.core.errors import ConfigError, LabelsError, did_you_mean
from utils.core.recipe import Recipe
from utils.core.runtime import log
from utils.core.settings import checked
from utils.tasks.records import task_of
from utils.tasks.targets import Target
from utils.tasks.task import Task

BagFeatures = Source | CaseFeatures | DeviceFeatures

# Chunks are shuffled among slides that together hold about this many patches, so that an epoch reads each slide once
# whatever the cohort's size. Fixed: the numbers a training gives must not depend on the machine's memory.
SHUFFLE_WINDOW = 2**18
# Settings of a cohort that are arguments of the dataset by the same name.
_SAME_NAMES = (
    "unit",
    "mode",
    "chunk_size",
    "feat_type",
    "sequential",
    "group_column",
    "cache",
    "allow",
    "no_patients",
    "positive_class",
)  # of flags and arguments


class MILDataset(Dataset):
    """The slides of a label table, in its order; or, for the `unit` "case", the patients, each a bag of all slides.

    `csv_path` has the columns `case_id,wsi_id,label`, or others that say the same (see `utils.bags.label_table`); slide
    `wsi_id` has its features in `features_dir/<wsi_id>.h5` (or `.pt`, `.pth`), or in a subfolder, under the name
    `feat_type`. `mode` "chunked" trains on random chunks of at most `chunk_size` patches (`sequential`: on runs of
    patches that are neighbours in the file), "full" on whole slides. `class_names` defaults to the labels that occur,
    sorted; of two the rarer one is last, or `positive_class`. `label_names` renames labels, `left_out` names labels
    that are no class, `allow` the problems that only leave a row out (see `utils.bags.labels.resolve_labels`). `task`
    is what is predicted instead of classes (`utils.tasks`); its columns hold the target instead of `label`.
    `group_column` names the column whose values splits keep together, instead of the patient. `no_patients` takes each
    slide as a patient where the table names none.

    `cache` "off" reads feature files whenever they are needed, on a CUDA device too, "ram" keeps features in memory, a
    folder holds them in one packed file. Default: "ram" if the cohort fits in a quarter of the free memory, else "off".
    Slides are counted from 0 in the table's order, negative numbers from the end. `dataset[3:6]` is a list of three.
    By patients, what is said of a slide is said of a patient: `rows`, `labels`, `info` and `features` are those of the
    bags, `slide_rows` and `slide_info` those of the slides, and `slides_of[bag]` are the numbers of a bag's slides.
    Raises ConfigError, LabelsError for a table that does not account for every slide, FeatureFileError for files that
    are damaged or of different widths, RecipeError for files made in different ways.
    """

    def __init__(
        self,
        csv_path: str | Path,
        features_dir: str | Path,
        class_names: Sequence[str] | None = None,
        mode: str = "chunked",
        chunk_size: int = CHUNK_SIZE,
        feat_type: str = "features",
        *,
        sequential: bool = False,
        group_column: str | None = None,
        cache: str | Path | None = None,
        label_names: Mapping[str, str] | None = None,
        left_out: Collection[str] = (),
        allow: Collection[str] = (),
        no_patients: bool = False,
        positive_class: str | None = None,
        task: Task | None = None,
        unit: Unit = "slide",
    ) -> None:
        cohort = Cohort(
            dataset="", labels_csv=csv_path, features_dir=features_dir, class_names=class_names, mode=mode,  # type: ignore[arg-type]
            chunk_size=chunk_size, feat_type=feat_type, sequential=sequential, group_column=group_column,
            cache=str(cache) if isinstance(cache, Path) else cache, allow=allow, no_patients=no_patients,  # type: ignore[arg-type]
            positive_class=positive_class, unit=unit,
        )  # fmt: skip
        _check_arguments(csv_path, features_dir, label_names, left_out)
        self.features_dir = Path(features_dir)
        folder = FeatureFolder(self.features_dir)
        table = _table_of(csv_path, cohort, task)
        if task is None:
            classes = cohort.class_names or labels.classes_of(table, label_names=label_names, left_out=left_out)
            task = _task(table, labels.with_positive_last(classes, positive_class, table.path))
        self.mode, self.chunk_size, self.sequential = cohort.mode, cohort.chunk_size, cohort.sequential
        self.feat_type = feat_type
        self.unit: Unit = unit
        self.labels_csv, self.patients_from = table.path, table.patients_from
        self.slide_rows = labels.resolve_labels(
            table, task, folder.find, ids=lambda: folder.files, label_names=label_names, left_out=left_out,
            allow=allow,
        )  # fmt: skip
        folder.check_unique(row.wsi_id for row in self.slide_rows)
        self.rows, self.slides_of = _bags(self.slide_rows, unit, table.path)
        self.labels = np.array([row.label for row in self.rows])
        self.cases = np.array([row.case_id for row in self.rows])
        self.task = _of_cohort(task, table, self.labels, self.cases)
        groups = labels.group_rows(Path(csv_path), [row.columns for row in self.slide_rows], group_column)
        if "spelling" not in allow:
            labels.check_names(table, self.slide_rows, groups, group_column)
        self.groups = np.array([groups[slides[0]] for slides in self.slides_of])
        self.group_column, self.allow = group_column, cohort.allow
        log.info("%s", self._counts())
        packed = None if cache in (None, "off", "ram") else packed_path(Path(cache), self.features_dir, feat_type)
        paths = [row.path for row in self.slide_rows]
        self.slide_info = look_at_files(paths, feat_type, self.features_dir, packed)
        self.info = self.slide_info if unit == "slide" else case_info(self.slide_info, self.slides_of)
        files = FileFeatures(paths, self.slide_info, feat_type, self.features_dir)
        self._source: Source = open_features(files, cache, packed)
        self._features: BagFeatures = _of_bags(self, self._source)
        self._cache = cache

    @classmethod
    def of_cohort(cls, cohort: Cohort) -> "MILDataset":
        """Return the dataset of a command line. A known cohort has its classes, every name its default folders."""
        return cls(**_arguments(cohort))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        feed = "whole" if self.largest_chunk is None else f"in chunks of up to {self.chunk_size} patches"
        bags = "slides" if self.unit == "slide" else f"patients with {len(self.slide_rows)} slides"
        return f"MILDataset({len(self)} {bags}, fed {feed}; features {self.input_dim} wide; {self._counts()})"

    @overload
    def __getitem__(self, slide: SupportsIndex) -> tuple[Tensor, Target]: ...

    @overload
    def __getitem__(self, slide: slice) -> list[tuple[Tensor, Target]]: ...

    def __getitem__(self, slide: SupportsIndex | slice) -> tuple[Tensor, Target] | list[tuple[Tensor, Target]]:
        """Return a copy of a slide's `features (N, D)`, as stored, and its target, of a classification the class; for a
        slice, a list of these.
        """
        if isinstance(slide, slice):
            return [self[number] for number in range(len(self))[slide]]
        number = slide_number(slide, len(self))
        return self.features(number).clone(), self.rows[number].label

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the task's outputs: the classes."""
        return self.task.outputs

    def fitted_to(self, slides: np.ndarray) -> "MILDataset":
        """Return the dataset for models that are trained on these slides: its task is fitted to their targets."""
        dataset = copy.copy(self)
        dataset.task = self.task.fitted_to(self.labels[slides], self.cases[slides].tolist())
        return dataset

    @property
    def input_dim(self) -> int:
        """The features' width."""
        return self.info[0].dim

    @property
    def largest_chunk(self) -> int | None:
        """The most patches in a chunk, or None where slides are fed whole."""
        return self.chunk_size if self.mode == "chunked" else None

    @cached_property
    def recipe(self) -> Recipe | None:
        """How the features were made, by the first file that records it; None if none does."""
        return next((info.passport.recipe for info in self.slide_info if info.passport), None)

    @cached_property
    def mpp_range(self) -> tuple[float, float] | None:
        """The least and greatest um/px at which patches were read; None if unknown."""
        slides = [info.passport.slide for info in self.slide_info if info.passport]
        mpps = [slide["mpp_delivered"] for slide in slides if slide.get("mpp_delivered") is not None]
        return (min(mpps), max(mpps)) if mpps else None

    def bag(self, slide: SupportsIndex) -> Bag:
        """One slide with coordinates and passport, read from its file."""
        return read_bag(self.slide_rows[slide_number(slide, len(self.slide_rows))].path, self.feat_type)

    def features(self, slide: SupportsIndex) -> Tensor:
        """`(N, D)`, as stored, or in float16 on a device; maybe the cache itself, so copy it before you change it."""
        return self._features(slide_number(slide, len(self)))

    def inventory(self, earlier: Mapping[str, FileRecord]) -> list[FileRecord]:
        """Return a record of each slide's feature file, in the table's order; only files that are not in `earlier`, or
        have changed since, are read. Raises FeatureFileError, naming all files that cannot be read.
        """
        return take_inventory(self.slide_rows, self.slide_info, self._source, earlier)

    def batches(
        self, slides: Sequence[int] | np.ndarray, batch_size: int | Literal["auto"], seed: int, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """One epoch over `slides`: every patch once, in chunks cut, shuffled and batched at random from `seed`.

        Chunk weights average 1 and give each slide the same share of the epoch's loss. "auto" are batches of 128, or
        smaller ones where these were fewer than 8. `pin_memory` is for a CUDA device.
        """
        batch_size = checked(batch_size_option(), BatchSize, batch_size, "--batch_size ")
        slides = np.array([slide_number(slide, len(self)) for slide in slides], dtype=np.int64)
        if not len(slides):
            raise ConfigError("MILDataset: batches of no slides; give the number of at least one")
        rng = np.random.default_rng(seed)
        sizes = [info.num_instances for info in self.info]
        chunks = sum(num_chunks(sizes[slide], self.largest_chunk) for slide in slides)
        if batch_size == "auto":
            batch_size = chunks_per_step(chunks)
        runs = windows(rng.permutation(slides), sizes, SHUFFLE_WINDOW)
        chunks_of = partial(self._chunks, rng=rng, per_slide=len(slides) / chunks)
        yield from shuffled_batches(runs, chunks_of, batch_size, rng, pin_memory)

    @property
    def window(self) -> int:
        """Patches whose features are read from their files, and held, at a time."""
        return SHUFFLE_WINDOW if isinstance(self._source, FileFeatures) else 0

    @property
    def is_in_memory(self) -> bool:
        """Whether this process's memory holds the features once they are read."""
        return isinstance(self._source, MemoryFeatures)

    def _chunks(self, slide: int, rng: np.random.Generator, per_slide: float) -> list[Chunk]:
        features = self.features(slide)
        cuts = cuts_on(
            cut_chunks(len(features), self.largest_chunk, sequential=self.sequential, rng=rng), features.device
        )
        weight = 1 / (len(cuts) * per_slide)
        return [Chunk(features, cut, self.rows[slide].label, weight, slide) for cut in cuts]

    def _counts(self) -> str:
        targets, cases = zip(*((row.label, row.case_id) for row in self.slide_rows), strict=True)
        bags = "" if self.unit == "slide" else "; all slides of a patient are one bag"
        return f"{self.task.counts_text(np.array(targets), cases)}{bags}"

    def num_slides(self, bags: np.ndarray) -> int:
        """Return the number of slides in these bags."""
        return sum(len(self.slides_of[bag]) for bag in bags.tolist())


def shared(dataset: MILDataset, folder: Path) -> MILDataset:
    """Return the dataset for several processes: features that this one keeps in memory are packed into `folder`."""
    features = share(dataset._source, packed_path(folder, dataset.features_dir, dataset.feat_type))
    return dataset if features is dataset._source else _with_features(dataset, features, _of_bags(dataset, features))


def on_device(dataset: MILDataset, device: torch.device, *, processes: int = 1, is_exact: bool = False) -> MILDataset:
    """Return the dataset with its features on a device from their first use on, if they fit (see `DeviceFeatures`); the
    dataset itself if its `cache` is "off".
    """
    if dataset._cache == "off":
        return dataset
    source = _of_bags(dataset, dataset._source)
    features = DeviceFeatures(source, dataset.info, device, processes=processes, is_exact=is_exact)
    return _with_features(dataset, dataset._source, features)


def _bags(rows: list[LabelRow], unit: Unit, path: Path) -> tuple[list[LabelRow], list[list[int]]]:
    """Return the rows of the bags, and the numbers of the slides of each."""
    return (rows, [[number] for number in range(len(rows))]) if unit == "slide" else case_rows(rows, path)


def _of_bags(dataset: MILDataset, source: Source) -> Source | CaseFeatures:
    """Return the features of the bags, from those of the slides."""
    return source if dataset.unit == "slide" else CaseFeatures(source, dataset.slides_of)


def _with_features(dataset: MILDataset, source: Source, features: BagFeatures) -> MILDataset:
    dataset = copy.copy(dataset)
    dataset._source, dataset._features = source, features
    return dataset


def slide_number(slide: SupportsIndex, count: int) -> int:
    """Return the slide's number from 0, which is its place in every table of the cohort."""
    if getattr(slide, "dtype", type(slide)) in (bool, torch.bool):
        raise TypeError(f"MILDataset: slide {slide} is no number; of a mask give np.flatnonzero(mask)")
    try:
        return range(count)[operator.index(slide)]
    except IndexError:
        raise IndexError(f"MILDataset: no slide {slide}; there are {count}, counted from 0") from None


def _check_arguments(csv_path: Any, features_dir: Any, label_names: Any, left_out: Any) -> None:
    """Raise ConfigError for arguments that are no settings of a command line, where they are of another type."""
    for name, path in (("csv_path", csv_path), ("features_dir", features_dir)):
        if path is None:
            raise ConfigError(f"{name} None: expected a path")
    if label_names is not None and not (
        isinstance(label_names, Mapping) and _are_text([*label_names.keys(), *label_names.values()])
    ):
        raise ConfigError(f"label_names {label_names!r}: expected names by label, such as {{'0': 'benign'}}")
    if not isinstance(left_out, Collection) or isinstance(left_out, str) or not _are_text(left_out):
        raise ConfigError(f"left_out {left_out!r}: expected a list of labels, such as ['unknown']")


def _are_text(values: Collection[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _arguments(cohort: Cohort) -> dict[str, Any]:
    """Return the arguments of the dataset of a command line."""
    task = cohort.other_task()
    classes = cohort_classes(cohort.dataset if task is None else None, cohort.class_names)
    home = Path("datasets") / cohort.dataset
    if cohort.labels_csv is None and not (home / "labels.csv").exists():
        raise ConfigError(f"--dataset {cohort.dataset}: {_why_not_there(cohort.dataset, home)}")
    return {
        "csv_path": cohort.labels_csv or home / "labels.csv",
        "features_dir": cohort.features_dir or home / "features",
        "class_names": classes.class_names or None,
        "label_names": classes.label_names,
        "left_out": classes.left_out,
        "task": task,
        **{name: getattr(cohort, name) for name in _SAME_NAMES},
    }


def _table_of(path: str | Path, cohort: Cohort, task: Task | None) -> LabelTable:
    """Read the label table of a task; log how it was read, and warn of patients that are missing or doubtful. Raise
    ConfigError for classes beside another task.
    """
    if task is not None and (cohort.class_names or cohort.positive_class):
        raise ConfigError(
            f"class_names, positive_class: the task is a {task.kind}, which has no classes; leave them out"
        )
    table = read_table(path, ("label",) if task is None else task.columns)
    for note in table.notes:
        log.info("%s: %s", path, note)
    for warning in (labels.missing_patients(table, cohort.no_patients), labels.doubted_patients(table)):
        if warning:
            log.warning(warning)
    return table


def _of_cohort(task: Task, table: LabelTable, targets: np.ndarray, cases: np.ndarray) -> Task:
    """Return the task for these targets. Raise LabelsError if they cannot be evaluated."""
    try:
        return task.of_cohort(targets, cases.tolist())
    except ValueError as error:
        raise LabelsError(f"{table.path}: {error}") from None


def _task(table: LabelTable, class_names: tuple[str, ...]) -> Task:
    """Return the task of these classes. Raise LabelsError unless there are two different ones."""
    try:
        return task_of({"class_names": class_names})
    except ValueError as error:
        in_table = {row["label"] for row in table.rows}
        raise LabelsError(f"{table.path}: {error}{_separator_hint(class_names, in_table)}") from None


def _separator_hint(class_names: Sequence[str], labels: Collection[str]) -> str:
    """Return how to separate class names, if a single name seems to be several; else ""."""
    names = [name.strip() for name in ",".join(class_names).split(",")]
    if len(class_names) > 1 or len(names) < 2 or class_names[0] in labels:
        return ""
    return f"; separate the names by blanks: --class_names {shlex.join(names)}"


def _why_not_there(name: str, home: Path) -> str:
    """Return what to do about a cohort that is not in its default folder."""
    missing = f"no {home / 'labels.csv'}"
    if name in KNOWN_COHORTS:
        return f"{missing}; fetch it with python -m datasets.download {name}, or give --labels_csv and --features_dir"
    cohorts = [folder.name for folder in home.parent.glob("*/") if (folder / "labels.csv").exists()]
    near = did_you_mean(name, [*KNOWN_COHORTS, "demo", *cohorts])
    return f"{missing}{near}; for a cohort of your own give --labels_csv and --features_dir"
