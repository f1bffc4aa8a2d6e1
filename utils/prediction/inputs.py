"""Find the slides that `predict.py` predicts, and name the file of each prediction."""

from itertools import chain
from pathlib import Path

from utils.bags import labels
from utils.bags.described_columns import read_columns
from utils.bags.label_table import read_table
from utils.bags.labels import LabelRow
from utils.bags.settings import names_in
from utils.bags.store import is_feature_file
from utils.core.cohorts import cohort_classes
from utils.core.errors import ConfigError, FeatureFileError, LabelsError, did_you_mean_path, first_few, plural
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
        self._slides_of: dict[Path, tuple[Path, ...]] = {}
        self.case_names: dict[Path, str] = {}  # of a model that predicts patients, the patient of each input

    def targets(self, folder: Path) -> dict[Path, Path]:
        """Map each input to the file of its prediction in `folder`."""
        return {source: folder / f"{source.stem}{ENDING}" for source in self.sources}

    def case_of(self, source: Path) -> tuple[Path, ...]:
        """Return the files that are answered together with an input, in their order; the input itself among them."""
        return self._slides_of.get(source, (source,))

    def join_cases(self, about: str) -> None:
        """Take all slides of a patient as one bag, in the order of the table that says whose they are, for a model that
        predicts patients; `about` names it.

        The table is `cases_csv`, else `labels_csv`, else that of the run. Raises ConfigError without one, for slides
        that it does not name, and for raw slides; LabelsError for slides of a patient that are not among the inputs,
        unless missing ones are allowed.
        """
        settings = self.settings
        if settings.input is not None:
            log.warning("%s: %s; this slide is taken as all slides of its patient", settings.input, about)
            return
        if self.are_raw:
            raise ConfigError(
                f"--input_dir {settings.input_dir}: {about}, whose features must all be there; run extractFeatures.py "
                "first, and give its folder (and these slides with --wsi, for maps)"
            )
        slides_of = (
            cases_in(settings.cases_csv or settings.labels_csv, about) if self.run is None else self.run.slides_of
        )
        source_of = {source.stem: source for source in self.sources}
        unknown = sorted(source_of.keys() - set(chain.from_iterable(slides_of.values())))
        if unknown:
            raise ConfigError(
                f"{settings.cases_csv or settings.labels_csv}: no row for {plural(len(unknown), 'slide')} of "
                f"{settings.input_dir} ({first_few(unknown)}); {about}, so add their patients"
            )
        cases = {case: slides for case, slides in slides_of.items() if source_of.keys() & set(slides)}
        missing = [slide for slides in cases.values() for slide in slides if slide not in source_of]
        if missing and "missing" not in settings.allow:
            raise LabelsError(
                f"{plural(len(missing), 'slide')} of these patients without a feature file: {first_few(missing)}; "
                f"{about}, so add them, or leave them out with --allow missing"
            )
        for case, slides in cases.items():
            sources = tuple(source_of[slide] for slide in slides if slide in source_of)
            self._slides_of |= dict.fromkeys(sources, sources)
            self.case_names |= dict.fromkeys(sources, case)
        self.sources = list(self._slides_of)

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


def cases_in(path: Path | None, about: str) -> dict[str, list[str]]:
    """Return the slides of each patient in a table, in its order. Raises ConfigError without one, and LabelsError if it
    names no patients.
    """
    if path is None:
        raise ConfigError(f"{about}: which slides are one patient's? Give --cases_csv, a table case_id,wsi_id")
    table = read_table(path, ())
    if table.patients_from is None:
        raise LabelsError(f"{labels.unknown_patients(table)}; {about}: call the column of patients case_id")
    slides_of: dict[str, list[str]] = {}
    case_of: dict[str, str] = {}
    for row in table.rows:
        case, slide = row["case_id"], row["wsi_id"]
        if case_of.setdefault(slide, case) != case:
            raise LabelsError(f"{path}: slide {slide} is of patient {case_of[slide]} and of {case}; give it one")
        if slide not in slides_of.setdefault(case, []):
            slides_of[case].append(slide)
    return slides_of


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
