"""Which slides `predict.py` predicts, and the file of each one's answer."""

from collections.abc import Sequence
from pathlib import Path

from utils.bags import labels
from utils.bags.labels import LabelRow
from utils.bags.store import is_feature_file
from utils.bags.table import read_table
from utils.core.cohorts import cohort_classes
from utils.core.errors import ConfigError, FeatureFileError, plural
from utils.core.files import check_distinct
from utils.core.runtime import log
from utils.prediction.out_of_fold import RECORD, OutOfFold
from utils.prediction.records import ENDING
from utils.prediction.settings import Prediction
from utils.slides.batch import PREVIEWS
from utils.slides.find import is_slide_file, look_for_slides, no_slide_words, one_per_series

# Where answers go unless a folder is given, each model's into a folder of its own.
DEFAULT_FOLDER = Path("outputs/inference")


class PredictionFiles:
    """What `predict.py` is told of files: the inputs, `sources`, in their order, and the file of each one's answer.

    The feature files of a folder and its subfolders or, where there are none, its slides; with `out_of_fold` those of
    the run's cohort. Raises ConfigError for a folder with neither, and for inputs that would share an answer;
    FeatureFileError for a file that is neither.
    """

    def __init__(self, asked: Prediction) -> None:
        self.asked = asked
        self.run = None if asked.out_of_fold is None else OutOfFold.read(asked.out_of_fold, asked.repeat)
        if asked.output_dir is not None and (asked.output_dir / RECORD).exists():
            raise ConfigError(
                f"--output_dir {asked.output_dir}: the folder of a training run, whose tables would be written over; "
                "give another"
            )
        if self.run is not None:
            self.sources = self.run.sources(asked.input_dir, asked.allow)
        else:
            self.sources = [asked.input] if asked.input is not None else _inputs_of(asked)
        for source in self.sources:
            check_input(source)
        check_distinct(self.targets(Path()))
        self.are_raw = not is_feature_file(self.sources[0])

    def targets(self, folder: Path) -> dict[Path, Path]:
        """Return each input and the file of its answer in `folder`."""
        return {source: folder / f"{source.stem}{ENDING}" for source in self.sources}

    @property
    def feat_type(self) -> str:
        """The name of the features inside the files: of a run's, that of its training."""
        return self.asked.feat_type if self.run is None else self.run.feat_type

    def label_rows(self, class_names: Sequence[str], dataset: str | None) -> dict[str, LabelRow]:
        """The rows of `labels_csv` by slide, every one accounted for as in training; none without a table."""
        asked = self.asked
        if asked.labels_csv is None:
            return {}
        classes = cohort_classes(dataset)
        sources = {source.stem: source for source in self.sources}
        table = read_table(asked.labels_csv)
        found = labels.resolve_labels(
            table, class_names, sources.get, ids=sources.keys, allow=asked.allow,
            label_names=classes.label_names, left_out=classes.left_out,
        )  # fmt: skip
        for note in table.notes:
            log.info("%s: %s", table.path, note)
        labels.warn_of_patients(table, found)
        if len(found) < len(sources):
            log.info(
                "%s of %s have no label, and are not scored", plural(len(sources) - len(found), "slide"), len(sources)
            )
        return {row.wsi_id: row for row in found}


def check_input(path: Path) -> None:
    """Raise FeatureFileError unless `path` is a file that, by its ending, can be predicted."""
    if path.is_dir():
        raise FeatureFileError(f"{path}: is a folder; give it with --input_dir")
    if not path.is_file():
        raise FeatureFileError(f"{path}: no such file; give a feature file (.h5, .pt, .pth) or a slide")
    if not is_feature_file(path) and not is_slide_file(path):
        raise FeatureFileError(
            f"{path}: neither a feature file (.h5, .pt, .pth) nor a slide, by its ending {path.suffix!r}"
        )


def _inputs_of(asked: Prediction) -> list[Path]:
    folder, ours = asked.input_dir, (asked.output_dir or DEFAULT_FOLDER).resolve()
    assert folder is not None  # noqa: S101 - for the type checker: there is an input or a folder
    if not folder.is_dir():
        raise ConfigError(f"--input_dir {folder}: no such folder; give a folder of feature files or of slides")
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and is_feature_file(path) and not path.name.startswith(".")
    )
    looked = look_for_slides(folder, asked.extensions)
    slides = one_per_series(looked.slides)
    if slides and (asked.extensions is not None or not files):
        looked.log(folder)
    if asked.extensions is not None or not files:
        files = slides
    elif slides := [one for one in slides if PREVIEWS not in one.parts and not one.resolve().is_relative_to(ours)]:
        named = " ".join(sorted({slide.suffix for slide in slides}))
        log.warning(
            "%s: holds feature files; left out: %s. For those give --extensions %s",
            folder, plural(len(slides), "slide"), named,
        )  # fmt: skip
    if ours != folder.resolve():  # a folder may be its own output folder
        files = [path for path in files if not path.resolve().is_relative_to(ours)]
    if not files:
        why = "" if slides else f": {no_slide_words(folder, looked, asked.extensions)}"
        raise ConfigError(f"--input_dir {folder}: neither a feature file (.h5, .pt, .pth) nor a slide in it{why}")
    return files
