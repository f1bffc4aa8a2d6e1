"""What `predict.py` does: slides or folders of them predicted, drawn, kept and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.bags.labels import LabelRow
from utils.core import cli
from utils.core.cluster import Cluster
from utils.core.cohorts import SYNTHETIC
from utils.core.device import resolve_device
from utils.core.engine import Threads, open_engine
from utils.core.errors import ConfigError, first_few, plural
from utils.core.files import clear_parts, read_json, read_record, wait_for_file
from utils.core.recipe import ASKED_FIELDS
from utils.core.runtime import log
from utils.core.text import NOTICE
from utils.pictures.caption import title_of
from utils.pictures.index import INDEX, IndexRow, write_index
from utils.prediction.answer import Answering, Predictors
from utils.prediction.inputs import DEFAULT_FOLDER, PredictionFiles
from utils.prediction.predictor import SlidePredictor, asked_recipe, extractPredict
from utils.prediction.records import ENDING, check_first, is_answer_to
from utils.prediction.scores import REPORT, Answers, Known, known_slides
from utils.prediction.settings import Prediction, PredictionRecipe
from utils.prediction.slide_prediction import SEEN
from utils.slides.batch import work_through
from utils.slides.slide_mpps import SlideMpps
from utils.slides.status import STATUSES, SlideStatus

if TYPE_CHECKING:  # it imports what draws
    from utils.prediction.pictures import PredictionPictures

_ONLY_RAW = ("save_features", "weights", "slides_csv", "slide_mpp")


def make_predictors(files: PredictionFiles, recipe: PredictionRecipe) -> Predictors:
    """Return what answers for the inputs: the predictor `predict.py` is asked for or, out of fold, each fold's own.

    Raises ConfigError for settings that go with raw slides only, and what SlidePredictor and extractPredict raise.
    """
    run = files.run
    if run is None:
        return Predictors([_make_predictor(files.asked, recipe, files.are_raw, files.asked.checkpoint)])
    used = {source.stem: run.slides[source.stem].fold for source in files.sources}
    folds = sorted(set(used.values()))
    predictors = [_make_predictor(files.asked, recipe, files.are_raw, (run.checkpoint(fold),)) for fold in folds]
    return Predictors(predictors, {slide: folds.index(fold) for slide, fold in used.items()})


def _make_predictor(
    asked: Prediction, recipe: PredictionRecipe, are_raw: bool, checkpoints: Sequence[Path]
) -> SlidePredictor:
    """Return the predictor of some checkpoints, with a feature extractor where the inputs are raw slides."""
    others: dict[str, Any] = {
        name: getattr(asked, name) for name in ("device", "dataset", "num_heads", "allow_mismatch")
    }
    if are_raw:
        asked_for = {name: getattr(recipe, name) for name in (*ASKED_FIELDS, "weights", "batch_size")}
        predictor = extractPredict(checkpoints, **asked_for, **others)
    else:
        unused = [f"--{name}" for name in _ONLY_RAW if getattr(recipe, name)]
        if unused:
            place = asked.input or asked.input_dir or asked.out_of_fold
            raise ConfigError(f"{place}: holds features already; {' and '.join(unused)} goes with raw slides")
        predictor = SlidePredictor(checkpoints, **others)
        predictor.require(recipe=asked_recipe(recipe))
    predictor.require(mil=asked.mil, input_dim=asked.input_dim)
    if predictor.feed(asked.mode, asked.chunk_size).mode == "full" and asked.chunk_size is not None:
        raise ConfigError("--chunk_size has no meaning in full mode; give --mode chunked with it")
    return predictor


def output_folder(files: PredictionFiles, predictors: Predictors) -> Path:
    """Return where the answers go: as asked for, else into a folder of the model's own."""
    name = predictors.folder_name + ("_out_of_fold" if files.run else "")
    return files.asked.output_dir or DEFAULT_FOLDER / name


def predict_files(
    predictors: Predictors,
    files: PredictionFiles,
    recipe: PredictionRecipe,
    drawing: PredictionPictures | None = None,
    cluster: Cluster | None = None,
) -> tuple[list[SlideStatus], str]:
    """Predict a slide or a folder of them, keep what is there, go on past a bad one.

    Each answer is a file; of a folder there are also the table, with labels the scores and their figures, an index page
    and a report. Returns what became of each slide and the closing words. Raises for a single slide that fails.
    """
    asked, folder, cluster = files.asked, output_folder(files, predictors), cluster or Cluster()
    _check_attention(predictors, {"--visualize": drawing is not None, "--faithfulness": asked.faithfulness})
    first = predictors.first.checkpoint
    rows = files.label_rows(first.class_names, asked.dataset or first.dataset)
    known = known_slides(folder) | {
        slide: Known(row.case_id, first.class_names[row.label]) for slide, row in rows.items()
    }
    if files.run is not None:
        known |= {slide: Known(tested.case_id, tested.label) for slide, tested in files.run.slides.items()}
    mpps = SlideMpps.read(recipe.slides_csv, recipe.slide_mpp)
    mpps.check(files.sources, asked.input or Path(str(asked.input_dir)))
    work = Answering(predictors, files, recipe, drawing, known, mpps)
    if asked.input is None:
        return _predict_folder(work, folder, rows, cluster)
    if cluster.is_asked_for:
        raise ConfigError("--ray shares a folder out; give --input_dir with it")
    return _predict_one(work, asked.input, files.targets(folder)[asked.input])


def _check_attention(predictors: Predictors, flags: Mapping[str, bool]) -> None:
    """Raise ConfigError where a flag that is given needs attention, and a model gives none."""
    needing = [flag for flag, is_given in flags.items() if is_given]
    if needing:
        for predictor in predictors.each:
            if not predictor.gives_attention():
                raise ConfigError(f"{predictor.path}: its model gives no attention; leave {' and '.join(needing)} out")


def _predict_one(work: Answering, source: Path, target: Path) -> tuple[list[SlideStatus], str]:
    status = work(source, target)
    record = read_json(target)
    if record["seen_as"]:
        log.warning(SEEN, source, record["seen_as"])
    lines = [title_of(record), *(f"  {path}" for path in [*work.made_files(record, target.parent), target])]
    if source.stem in known_slides(target.parent):  # a row of its folder's table, and of the page
        lines += _conclude(work, target.parent, [target], {}, failed=0)
    return [status], "\n".join([*lines, f"{NOTICE} (took {cli.took()})", f"Next: {_next_step(work)}"])


def _predict_folder(
    work: Answering, folder: Path, rows: Mapping[str, LabelRow], cluster: Cluster
) -> tuple[list[SlideStatus], str]:
    asked, predictors, targets = work.files.asked, work.predictors, work.files.targets(folder)
    if predictors.first.feature_extractor is not None and not cluster.is_asked_for:
        _ = predictors.first.feature_extractor.backbone  # one that cannot be had is no slide's fault
    clear_parts(folder)
    if not asked.overwrite:  # another model's predictions are nobody's slide's fault
        for number, settings in enumerate(work.settings):
            check_first([target for one, target in targets.items() if predictors.number(one.stem) == number], settings)
    with open_engine(cluster, Threads(), str(resolve_device(asked.device))) as engine:
        statuses = work_through(targets, engine, work, folder / REPORT)
    counts = ", ".join(f"{sum(one.status == name for one in statuses)} {name}" for name in STATUSES)
    made = [targets[one.slide] for one in statuses if one.is_made]
    words = _conclude(work, folder, made, rows, failed=len(statuses) - len(made)) if made else []
    words.append(f"{counts}; results are in {folder} (took {cli.took()})")
    if made:
        words += [NOTICE, f"Next: look at {folder / INDEX}; {_next_step(work)}"]
    return statuses, "\n".join(words)


def _next_step(work: Answering) -> str:
    """Return what may be tried next."""
    asked = work.files.asked
    if work.drawing is None:
        wsi = "" if work.files.are_raw else " --wsi SLIDE" if asked.input else " --wsi SLIDES_DIR"
        return f"the same command with --visualize{wsi} draws what the model attended to"
    if not asked.faithfulness:
        return "the same command with --faithfulness measures whether the attention matters"
    return "compare the maps with what you know of the slides"


def _conclude(
    work: Answering, folder: Path, made: Sequence[Path], rows: Mapping[str, LabelRow], failed: int
) -> list[str]:
    """Write what there is to a folder of answers, those that are `made` and the others in it by the same settings, and
    return what is to be said of it.
    """
    files = work.files
    records = [read_json(wait_for_file(path)) for path in made]
    ours = set(made)
    others = [read_record(path) for path in sorted(folder.glob(f"*{ENDING}")) if path not in ours]
    others = [record for record in others if is_answer_to(record, work.settings_of(str(record.get("slide"))))]
    everything = sorted([*records, *others], key=lambda record: record["slide"])
    answers = Answers(everything, rows, work.predictors.first.checkpoint.task, work.known)
    words = [answers.write(folder, work.threshold, work.settings[0], files.asked.overwrite, files.asked.figure_format)]
    notes = _about(work) + ([f"{plural(failed, 'slide')} without an answer: see {REPORT}."] if failed else [])
    write_index(folder / INDEX, [_index_row(record, answers, folder) for record in everything], notes)
    if files.run is not None:
        words.append(_out_of_fold_words(files, records))
    if others:
        words.append(f"With {plural(len(others), 'slide')} of earlier commands in {folder}.")
    return [text for text in words if text]


def _out_of_fold_words(files: PredictionFiles, records: Sequence[Mapping[str, Any]]) -> str:
    run, asked = files.run, files.asked
    assert run is not None  # noqa: S101 - for the type checker: only called with a run
    about = f"Each slide is answered by the model of the fold of {run.folder} that did not see it"
    if run.repeats > 1 and asked.repeat is None:
        about += f", in the first of {run.repeats} repeats (--repeat takes another)"
    if asked.mode or asked.chunk_size:
        return f"{about}; fed in another way than there, so not compared."
    return f"{about}. {run.agreement(records)}"


def _index_row(record: Mapping[str, Any], answers: Answers, folder: Path) -> IndexRow:
    """Return a slide's row on the index page: with the page and the picture of its map, where they are drawn."""
    slide, known = record["slide"], answers.known.get(record["slide"], Known())
    drawn = [name for name in (record.get("pictures") or {}).get("files", []) if (folder / name).is_file()]
    pages = [name for name in drawn if name == f"{slide}_report.html"]
    pictures = [folder / name for name in drawn if name in (f"{slide}_thumbnail.jpg", f"{slide}_heatmap.png")]
    return IndexRow(
        slide, record["predicted_class"], record["probabilities"], record["num_instances"],
        (pages or [f"{slide}{ENDING}"])[0], known.label, known.case_id, record["seen_in_training"], record.get("fold"),
        pictures[-1] if pictures else None,
    )  # fmt: skip


def _about(work: Answering) -> list[str]:
    """Return the notes of the index page: by which models, and on what they were trained."""
    run, trained = work.files.run, [one for each in work.predictors.each for one in each.trained]
    models = ", ".join(dict.fromkeys(one.checkpoint.model["name"] for one in trained))
    if run is not None:
        notes = [f"{models} of {run.folder}, each slide by the model of the fold that did not see it."]
    else:
        paths = first_few([str(one.path) for one in trained], 3)
        notes = [f"{models} ({paths})" + (", which answer as their mean." if trained[1:] else ".")]
    if any(one.checkpoint.dataset == SYNTHETIC for one in trained):
        notes.append("Trained on synthetic slides, drawn by rule: what is said of tissue means nothing.")
    return notes
