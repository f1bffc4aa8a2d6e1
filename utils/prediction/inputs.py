"""Find the slides that `predict.py` predicts, and name the file of each prediction."""

from pathlib import Path

from utils.bags import labels
from utils.bags.described_columns import read_columns
from utils.bags.label_table import read_table
from utils.bags.labels import LabelRow
from utils.bags.settings import names_in
from utils.bags.store import is_feature_file
from utils.core.cohorts import cohort_classes
from utils.core.errors import ConfigError, FeatureFileError, did_you_mean_path, plural
from utils.core.files import check_distinct
from utils.core.runtime import log
from utils.prediction.existing_records import ENDING
from utils.prediction.out_of_fold import RECORD, OutOfFold
from utils.prediction.settings import Prediction
from utils.slides.batch import PREVIEWS
from utils.slides.find import is_slide_file, look_for_slides, no_slide_words, one_per_series
from utils.tasks.task import Task

# The default output folder, which has a folder for each model.
DEFAULT_FOLDER = Path("outputs/inference")


class PredictionFiles:
    """The inputs of `predict.py`, `sources`, in their order, and the file of each prediction.

    Inputs are the feature files in a folder and its subfolders or, if there are none, its slides; with `out_of_fold`
    the feature files of the run's cohort. Raises ConfigError for a folder with neither, and for inputs whose
    predictions would share a file; FeatureFileError for a file that is neither.
    """

    def __init__(self, settings: Prediction) -> None:
        self.settings = settings
        # Of the label table, once it is read: where it has the patients from, the group of each slide, and the columns
        # whose groups are scored.
        self.patients_from: str | None = None
        self.groups: dict[str, str] = {}
        self.subgroups: tuple[str, ...] = ()
        self.run = None if settings.out_of_fold is None else OutOfFold.read(settings.out_of_fold, settings.repeat)
        if settings.output_dir is not None and (settings.output_dir / RECORD).exists():
            raise ConfigError(
                f"--output_dir {settings.output_dir}: the folder of a training run, whose tables would be written "
                "over; give another"
            )
        if self.run is not None:
            self.sources = self.run.sources(settings.input_dir, settings.allow)
        else:
            self.sources = [settings.input] if settings.input is not None else _inputs_of(settings)
        for source in self.sources:
            check_input(source)
        check_distinct(self.targets(Path()))
        self.are_raw = not is_feature_file(self.sources[0])

    def targets(self, folder: Path) -> dict[Path, Path]:
        """Map each input to the file of its prediction in `folder`."""
        return {source: folder / f"{source.stem}{ENDING}" for source in self.sources}

    @property
    def feat_type(self) -> str:
        """Return the name of the features inside the files; out of fold, the one of the training run."""
        return self.settings.feat_type if self.run is None else self.run.feat_type

    def label_rows(self, task: Task, dataset: str | None) -> dict[str, LabelRow]:
        """Return the rows of `labels_csv` by slide, resolved as in training; none without a table."""
        settings = self.settings
        if settings.labels_csv is None:
            return {}
        classes = cohort_classes(dataset)
        sources = {source.stem: source for source in self.sources}
        table = read_table(settings.labels_csv, task.columns)
        self.patients_from = table.patients_from
        rows = labels.resolve_labels(
            table, task, sources.get, ids=sources.keys, allow=settings.allow,
            label_names=classes.label_names, left_out=classes.left_out,
        )  # fmt: skip
        for note in table.notes:
            log.info("%s: %s", table.path, note)
        labels.warn_of_patients(table, rows)
        if settings.group_column is not None:
            groups = labels.group_rows(table.path, [row.columns for row in rows], settings.group_column)
            self.groups = {row.wsi_id: group for row, group in zip(rows, groups, strict=True)}
        if settings.subgroups is not None:
            self.subgroups = names_in("subgroups", settings.subgroups)
            read_columns(table.path, [row.columns for row in rows], self.subgroups, "--subgroups")
        unlabelled = len(sources) - len(rows)
        if unlabelled > 0:
            log.info("%s of %s have no label, and are not scored", plural(unlabelled, "slide"), len(sources))
        return {row.wsi_id: row for row in rows}


def check_input(path: Path) -> None:
    """Raise FeatureFileError unless `path` is a feature file or a slide, by its ending."""
    if path.is_dir():
        raise FeatureFileError(f"{path}: is a folder; give it with --input_dir")
    if not path.is_file():
        near = did_you_mean_path(path)
        raise FeatureFileError(f"{path}: no such file; give a feature file (.h5, .pt, .pth) or a slide{near}")
    if not is_feature_file(path) and not is_slide_file(path):
        raise FeatureFileError(
            f"{path}: neither a feature file (.h5, .pt, .pth) nor a slide, by its ending {path.suffix!r}"
        )


def _inputs_of(settings: Prediction) -> list[Path]:
    folder, output_dir = settings.input_dir, (settings.output_dir or DEFAULT_FOLDER).resolve()
    assert folder is not None  # noqa: S101 - for the type checker: there is an input or a folder
    if not folder.is_dir():
        near = did_you_mean_path(folder)
        raise ConfigError(f"--input_dir {folder}: no such folder; give a folder of feature files or of slides{near}")
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and is_feature_file(path) and not path.name.startswith(".")
    )
    search = look_for_slides(folder, settings.extensions)
    slides = one_per_series(search.slides)
    if settings.extensions is not None or not files:
        if slides:
            search.log(folder)
        files = slides
    elif slides := [
        slide for slide in slides if PREVIEWS not in slide.parts and not slide.resolve().is_relative_to(output_dir)
    ]:
        endings = " ".join(sorted({slide.suffix for slide in slides}))
        log.warning(
            "%s: holds feature files; left out: %s. For those give --extensions %s",
            folder, plural(len(slides), "slide"), endings,
        )  # fmt: skip
    if output_dir != folder.resolve():  # a folder may be its own output folder
        files = [path for path in files if not path.resolve().is_relative_to(output_dir)]
    if not files:
        why = "" if slides else f": {no_slide_words(folder, search, settings.extensions)}"
        raise ConfigError(f"--input_dir {folder}: neither a feature file (.h5, .pt, .pth) nor a slide in it{why}")
    return files
